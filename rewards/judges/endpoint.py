"""A judge behind an OpenAI-compatible endpoint."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from rolltune.endpoints.budget import Budget
from rolltune.endpoints.client import BudgetExceeded, Endpoint, EndpointDown, Refused, Reply
from rolltune.endpoints.settings import EndpointSettings, check_sampling
from rolltune.rewards.judges.cache import AnswerCache, cache_key
from rolltune.rewards.judges.delimit import added_tokens, token_breaker
from rolltune.rewards.judges.judge import (
    Answer,
    Failure,
    Question,
    read_answer,
    repair,
    response_format,
    without_tokens,
)
from rolltune.terminal import printable
from rolltune.types import Message

_USUALLY_ABOUT_ALL = frozenset({402, 404})  # a service may also route or price one long text differently
# Finish reasons of whole replies. Servers name many others, such as "content_filter", "tool_calls" and "abort".
_WHOLE = frozenset({"", "stop", "eos", "eos_token", "end_turn", "stop_sequence", "complete", "completed"})
_HARMLESS: tuple[Message, ...] = ({"role": "user", "content": "Reply with an empty JSON object."},)
_MAX_KEPT_CHARS = 64_000  # of a reply
_log = logging.getLogger(__name__)


class EndpointJudge:
    """A model that answers questions from the cache, by a call, or by a second call that repairs a malformed reply.

    Identical questions that are in flight at the same time share one call. :class:`rolltune.endpoints.client.Endpoint`
    retries transient failures; any other failure leaves the question unscored. Event loops may follow one another.

    Example:
        >>> settings = EndpointSettings(base_url="http://localhost:8000/v1", model="qwen2.5-7b")
        >>> EndpointJudge(endpoint=settings, cache="outputs/judge.sqlite").name
        'qwen2.5-7b@localhost:8000'

    Args:
        endpoint: address, model, limits. Caps apply to this process, or to a run (:meth:`share_budget`).
        temperature: 0 .. 2. At 0 answers repeat, as far as the server is deterministic.
        seed: for servers that sample by a seed.
        max_tokens: of one reply. A reply cut there is unscored.
        json_schema: send the reply's JSON schema; False for a server that refuses schemas.
        max_concurrency: calls in flight at once.
        special_tokens: strings that the judge's tokenizer reads as special tokens. They are broken by a backslash in
            all that the judge is shown. Those of the common model families are recognised by their form without this.
        tokenizer: folder or Hugging Face name of the judge's tokenizer, whose special tokens are broken likewise.
        cache: SQLite file of answers, created if needed. Processes of one machine may share it. None: no cache.

    Raises:
        ValueError: an argument is out of range, ``cache`` is another kind of file, or ``tokenizer`` cannot be loaded.
    """

    def __init__(
        self,
        *,
        endpoint: EndpointSettings,
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int = 2048,
        json_schema: bool = True,
        max_concurrency: int = 32,
        special_tokens: list[str] | None = None,
        tokenizer: str | None = None,
        cache: str | None = None,
    ) -> None:
        check_sampling(temperature=temperature, max_tokens=max_tokens)
        self.endpoint = Endpoint(endpoint, max_concurrency=max_concurrency)
        self._settings = endpoint
        self._stop_reason: str | None = None
        self._temperature = temperature
        self._seed = seed
        self._max_tokens = max_tokens
        self._json_schema = json_schema
        self._broken = token_breaker([*(special_tokens or []), *([] if tokenizer is None else _tokens_of(tokenizer))])
        self._cache = None if cache is None else AnswerCache(cache)
        self._in_flight: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Task[Answer]] = {}
        self._askers: Counter[tuple[asyncio.AbstractEventLoop, str]] = Counter()
        self._questions = self._cache_hits = self._repairs = self._answered = 0
        self._latency_seconds = 0.0
        self._unscored: dict[Failure, int] = dict.fromkeys(get_args(Failure), 0)
        self._has_answered = False
        self._logged: set[Failure] = set()

    def __repr__(self) -> str:
        return f"EndpointJudge({self.name!r})"

    @property
    def name(self) -> str:
        return f"{self._settings.model}@{self._settings.host}"

    @property
    def stop_reason(self) -> str | None:
        """The cap that is reached; None while none is."""
        return self._stop_reason

    async def ask(self, question: Question) -> Answer:
        """Answer a question; the answer has no value if that fails.

        Raises:
            ValueError: the server refuses every call (a wrong key, model or address, no quota, a schema it does not
                support); or the cache is broken.
        """
        self._questions += 1
        question = without_tokens(question, self._broken)
        key = self._key(question)
        if (known := self._cached(key, question)) is not None:
            self._cache_hits += 1
            return known
        place = (asyncio.get_running_loop(), key)
        is_shared = place in self._in_flight
        if not is_shared:
            self._in_flight[place] = place[0].create_task(self._find(key, question))
        task = self._in_flight[place]
        self._askers[place] += 1
        try:
            # Shielded: if this asker is cancelled, others may still wait for the same answer.
            answer = await asyncio.shield(task)
        finally:
            self._askers[place] -= 1
            if not self._askers[place]:  # nobody waits any more: free the call's slot
                task.cancel()
                del self._askers[place], self._in_flight[place]
        if answer.failure is not None:
            self._unscored[answer.failure] += 1
        elif is_shared:
            self._cache_hits += 1
            answer = dataclasses.replace(answer, cached=True)
        return answer

    def share_budget(self, path: Path) -> None:
        """Apply the caps to all processes that count their usage in this file."""
        self.endpoint.share_budget(Budget(path, self._settings.account))

    def metrics(self) -> dict[str, float]:
        """Return this process's totals.

        - ``questions`` asked; ``cache_hits``: those that needed no call of their own;
        - ``calls`` sent; ``retries``: those after a failed call; ``failures``: those without a reply; ``repairs``:
          those that asked again after a malformed reply;
        - ``prompt_tokens``, ``completion_tokens``, ``dollars``;
        - ``replies``, and their summed ``latency_seconds``, including the wait for a slot;
        - unscored questions by failure: ``judge_down`` and so on.
        """
        return {
            "questions": self._questions,
            "cache_hits": self._cache_hits,
            **dataclasses.asdict(self.endpoint.usage),
            "repairs": self._repairs,
            "replies": self._answered,
            "latency_seconds": self._latency_seconds,
            **self._unscored,
        }

    async def aclose(self) -> None:
        """Cancel the running event loop's calls, and close its connections and the cache."""
        loop = asyncio.get_running_loop()
        tasks = [task for (where, _), task in self._in_flight.items() if where is loop]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.endpoint.aclose()
        if self._cache is not None:
            self._cache.close()

    def _key(self, question: Question) -> str:
        return cache_key(
            base_url=self.endpoint.base_url,
            model=self._settings.model,
            messages=question.messages,
            schema=response_format(question.answer),
            json_schema=self._json_schema,
            temperature=float(self._temperature) + 0.0,  # one key for 0, 0.0 and -0.0
            seed=self._seed,
            max_tokens=self._max_tokens,
        )

    def _cached(self, key: str, question: Question) -> Answer | None:
        """Look up the answer in the cache."""
        text = None if self._cache is None else self._cache.get(key)
        if text is None:
            return None
        try:
            value = read_answer(question, text)
        except ValueError:  # stored by a version that read replies differently
            return None
        return Answer(value=value, failure=None, text=text, judge=self.name, cached=True)

    async def _find(self, key: str, question: Question) -> Answer:
        """Get the answer from the server, or the reason that there is none."""
        try:
            return await self._ask_twice(key, question)
        except BudgetExceeded as error:
            self._stop_reason = f"{self.name}: {error}"
            return self._none("judge_budget", self._stop_reason)
        except EndpointDown as error:
            return self._none("judge_down", str(error))
        except Refused as error:
            # A status may concern only the question's text, which may be too long or blocked by a filter. A wrong key
            # (401), an exhausted account (429) and a redirection never do.
            is_final = error.status in (401, 429) or error.status < 400
            if is_final or await self._refuses_all(question.answer, error.status):
                raise
            return self._none("judge_refused", str(error))

    async def _ask_twice(self, key: str, question: Question) -> Answer:
        """Ask, and ask again after a malformed reply."""
        messages: Sequence[Message] = question.messages
        text = problem = ""
        for is_repair in (False, True):
            self._repairs += is_repair
            reply = await self._call(messages, question.answer)
            # Some servers file a whole reply under its thoughts.
            text = self._kept(reply.text if reply.text.strip() else reply.reasoning)
            if reply.finish_reason == "length":
                return self._none("judge_cut", f"the reply reached max_tokens: {self._max_tokens}", text)
            if reply.finish_reason not in _WHOLE:
                return self._none("judge_refused", f"the reply is incomplete: {reply.finish_reason}", text)
            try:
                value = read_answer(question, text)
            except ValueError as error:
                where = "" if reply.text.strip() else "the content is empty; of the reasoning: "
                problem = f"{where}{error}"
            else:
                self._store(key, text, reply)
                return Answer(value=value, failure=None, text=text, judge=self.name, cached=False)
            messages = (*question.messages, *repair(text, problem))
        return self._none("judge_unparseable", f"{problem}, in {text[-200:]!r}", text)

    async def _call(self, messages: Sequence[Message], answer: type[BaseModel]) -> Reply:
        start = time.monotonic()
        reply = await self.endpoint.chat(
            messages,
            temperature=self._temperature,
            max_tokens=self._max_tokens,
            seed=self._seed,
            response_format=response_format(answer) if self._json_schema else None,
        )
        self._latency_seconds += time.monotonic() - start
        self._answered += 1
        self._has_answered = True
        return reply

    async def _refuses_all(self, answer: type[BaseModel], status: int) -> bool:
        """Whether a refusal concerns the server and not only the question.

        It concerns the question if the server answered another one since the last refusal, or answers a harmless one.
        """
        if self._has_answered and status not in _USUALLY_ABOUT_ALL:
            self._has_answered = False
            return False
        try:
            await self._call(_HARMLESS, answer)
        except Refused:
            return True
        except (EndpointDown, BudgetExceeded):
            pass
        return False

    def _store(self, key: str, text: str, reply: Reply) -> None:
        if self._cache is not None:
            self._cache.put(key, text, prompt_tokens=reply.prompt_tokens, completion_tokens=reply.completion_tokens)

    def _kept(self, text: str) -> str:
        """Return a reply's end without the key, which a server may echo."""
        return self.endpoint.redacted(text)[-_MAX_KEPT_CHARS:]

    def _none(self, failure: Failure, why: str, text: str = "") -> Answer:
        if failure not in self._logged:  # only the first is logged; all are counted
            self._logged.add(failure)
            _log.warning("%s: a question is unscored (%s): %s", self.name, failure, printable(why))
        return Answer(value=None, failure=failure, text=text, judge=self.name, cached=False)


def _tokens_of(name: str) -> list[str]:
    from transformers import AutoTokenizer  # takes seconds to import

    try:
        return added_tokens(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError) as error:
        raise ValueError(f"tokenizer: {name!r} cannot be loaded ({str(error).splitlines()[0]:.200})") from None
