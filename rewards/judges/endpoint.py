"""A judge behind any OpenAI-compatible endpoint, a service or a server of one's own."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from pydantic import BaseModel

from rolltune.endpoints.budget import Budget
from rolltune.endpoints.client import BudgetExceeded, Endpoint, EndpointDown, Refused, Reply
from rolltune.rewards.judges.cache import AnswerCache, cache_key
from rolltune.rewards.judges.judge import Answer, Failure, Question, read_answer, repair, response_format
from rolltune.types import Message

# Refusals that may be about a question's text: too long, or of a kind that the service does not take.
_ABOUT_THE_TEXT = frozenset({400, 403, 413, 422, 451})
_HARMLESS: tuple[Message, ...] = ({"role": "user", "content": "Reply with an empty JSON object."},)
_MOST_TEXT = 64_000  # characters of a reply that are kept
_log = logging.getLogger(__name__)


class EndpointJudge:
    """A model that answers questions: from the cache, or by a call, or by a second one that mends a malformed reply.

    Two questions that are the same and asked at the same time are asked once. What may pass is tried again by
    :class:`rolltune.endpoints.client.Endpoint`; what does not pass leaves a question unscored. Event loops may come
    and go, one
    after the other.

    Example:
        >>> judge = EndpointJudge(base_url="http://localhost:8000/v1", model="qwen2.5-7b", cache="outputs/judge.sqlite")
        >>> judge.name
        'qwen2.5-7b@localhost'

    Args:
        base_url: of the endpoint, up to and with ``/v1``.
        model: as the server names it.
        api_key_env: the environment variable with the key; need not be set for a server without keys.
        temperature: 0 .. 2. At 0 a judge says the same of the same, as far as its server does.
        seed: for servers that sample by it.
        max_tokens: of one reply; one that reaches it is cut, and unscored.
        json_schema: ask for the reply by a JSON schema; False for a server that refuses one.
        max_concurrency: calls at once.
        timeout_seconds: for a whole reply.
        max_attempts: calls for one reply, at most, where calls fail.
        max_calls: cap on the calls, as with :class:`rolltune.endpoints.client.Endpoint`: of this process, or with
            :meth:`share_budget` of a run.
        max_total_tokens: cap on the tokens, prompts included.
        max_dollars: cap on the price.
        dollars_per_million_input: price of prompt tokens.
        dollars_per_million_output: price of completion tokens.
        cache: an SQLite file of answers, made if needed; processes of one machine may share it. None: no cache.

    Raises:
        ValueError: an argument is out of range, or ``cache`` is another file.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        temperature: float = 0.0,
        seed: int = 0,
        max_tokens: int = 2048,
        json_schema: bool = True,
        max_concurrency: int = 32,
        timeout_seconds: float = 120.0,
        max_attempts: int = 6,
        max_calls: int | None = None,
        max_total_tokens: int | None = None,
        max_dollars: float | None = None,
        dollars_per_million_input: float = 0.0,
        dollars_per_million_output: float = 0.0,
        cache: str | None = None,
    ) -> None:
        if not 0 <= temperature <= 2:
            raise ValueError(f"temperature: {temperature}; must be in 0 .. 2")
        if max_tokens < 1:
            raise ValueError(f"max_tokens: {max_tokens}; must be >= 1")
        if max_total_tokens is not None and max_total_tokens < 1:
            raise ValueError(f"max_total_tokens: {max_total_tokens}; must be >= 1")
        self.endpoint = Endpoint(
            base_url=base_url,
            model=model,
            api_key_env=api_key_env,
            max_concurrency=max_concurrency,
            timeout_seconds=timeout_seconds,
            max_attempts=max_attempts,
            max_calls=max_calls,
            max_tokens=max_total_tokens,
            max_dollars=max_dollars,
            dollars_per_million_input=dollars_per_million_input,
            dollars_per_million_output=dollars_per_million_output,
        )
        self._stop_reason: str | None = None
        self._api_key_env = api_key_env
        self._temperature = temperature
        self._seed = seed
        self._max_tokens = max_tokens
        self._json_schema = json_schema
        self._cache = None if cache is None else AnswerCache(cache)
        self._in_flight: dict[tuple[asyncio.AbstractEventLoop, str], asyncio.Task[Answer]] = {}
        self._askers: Counter[tuple[asyncio.AbstractEventLoop, str]] = Counter()
        self._questions = self._cache_hits = self._repairs = self._answered = 0
        self._latency_seconds = 0.0
        self._unscored: dict[Failure, int] = dict.fromkeys(get_args(Failure), 0)
        self._takes_calls = False
        self._told: set[Failure] = set()

    def __repr__(self) -> str:
        return f"EndpointJudge({self.name!r})"

    @property
    def name(self) -> str:
        return f"{self.endpoint.model}@{self.endpoint.host}"

    @property
    def stop_reason(self) -> str | None:
        """Which cap is reached, in words; None as long as none is."""
        return self._stop_reason

    async def ask(self, question: Question) -> Answer:
        """The answer; without a value where there is none to be had.

        Raises:
            ValueError: the server refuses every call (a wrong key, model or address, a schema that it does not take),
                or does not count the tokens that a cap is on; or the cache is broken.
        """
        self._questions += 1
        key = self._key(question)
        if (known := self._known(key, question)) is not None:
            self._cache_hits += 1
            return known
        place = (asyncio.get_running_loop(), key)
        is_shared = place in self._in_flight
        if not is_shared:
            self._in_flight[place] = place[0].create_task(self._find(key, question))
        task = self._in_flight[place]
        self._askers[place] += 1
        try:
            # Shielded: another asker may wait for the same answer when this one is cancelled.
            answer = await asyncio.shield(task)
        finally:
            self._askers[place] -= 1
            if not self._askers[place]:  # nobody waits: the call would keep later ones from being sent
                task.cancel()
                del self._askers[place], self._in_flight[place]
        if answer.failure is not None:
            self._unscored[answer.failure] += 1
        elif is_shared:
            self._cache_hits += 1
            answer = dataclasses.replace(answer, cached=True)
        return answer

    def share_budget(self, path: Path) -> None:
        """Have the caps hold for all that keep their account of this model in the same file."""
        self.endpoint.share_budget(Budget(path, f"{self.endpoint.model} {self.endpoint.base_url}"))

    def metrics(self) -> dict[str, float]:
        """Totals of this process.

        ``questions`` asked here, of which ``cache_hits`` took no call of their own; ``calls`` sent, of which
        ``retries`` followed a failed one and ``failures`` brought no reply; ``repairs``, calls that asked for a
        malformed reply again; ``prompt_tokens``, ``completion_tokens`` and ``dollars``; ``replies`` and, summed over
        them, ``latency_seconds``, waiting for a free place included; and the unscored questions by their failure,
        ``judge_down`` and so on.
        """
        return {
            "questions": self._questions,
            "cache_hits": self._cache_hits,
            **dataclasses.asdict(self.endpoint.spent),
            "repairs": self._repairs,
            "replies": self._answered,
            "latency_seconds": self._latency_seconds,
            **self._unscored,
        }

    async def aclose(self) -> None:
        """End the calls of the running event loop, and close its connections and the cache."""
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
            model=self.endpoint.model,
            messages=question.messages,
            schema=response_format(question.answer),
            json_schema=self._json_schema,
            temperature=self._temperature,
            seed=self._seed,
            max_tokens=self._max_tokens,
        )

    def _known(self, key: str, question: Question) -> Answer | None:
        """The answer in the cache."""
        text = None if self._cache is None else self._cache.get(key)
        if text is None:
            return None
        try:
            value = read_answer(question, text)
        except ValueError:  # read by other rules when it was stored
            return None
        return Answer(value=value, failure=None, text=text, judge=self.name, cached=True)

    async def _find(self, key: str, question: Question) -> Answer:
        """The answer by calls, or why there is none."""
        try:
            return await self._ask_twice(key, question)
        except BudgetExceeded as error:
            name = "max_total_tokens" if error.key == "max_tokens" else error.key  # as it is called here
            self._stop_reason = f"{self.name}: {BudgetExceeded(name, error.limit, error.spent)}"
            return self._none("judge_budget", self._stop_reason)
        except EndpointDown as error:
            return self._none("judge_down", str(error))
        except Refused as error:
            if error.status not in _ABOUT_THE_TEXT or await self._refuses_all(question.answer):
                raise
            return self._none("judge_refused", str(error))

    async def _ask_twice(self, key: str, question: Question) -> Answer:
        """Ask, and once more where the reply is malformed. Of two malformed replies the part that can be read stays."""
        messages: Sequence[Message] = question.messages
        part: BaseModel | None = None
        text = problem = ""
        for is_repair in (False, True):
            self._repairs += is_repair
            reply = await self._call(messages, question.answer)
            text = self._kept(reply.text)
            if reply.finish_reason == "length":
                return self._none("judge_cut", f"a reply reached max_tokens: {self._max_tokens}", text)
            if reply.finish_reason == "content_filter":
                return self._none("judge_refused", "a reply was filtered", text)
            try:
                value = read_answer(question, text)
            except ValueError as error:
                problem = str(error)
            else:
                self._store(key, text, reply)
                return Answer(value=value, failure=None, text=text, judge=self.name, cached=False)
            part = _part(question, text) or part
            messages = (*question.messages, *repair(text, problem))
        if part is not None:
            return Answer(value=part, failure=None, text=text, judge=self.name, cached=False)
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
        self._takes_calls = True
        return reply

    async def _refuses_all(self, answer: type[BaseModel]) -> bool:
        """Whether the refusal of a question was about the server and not about the question.

        It was not where another question has been answered since the last refusal, or a harmless one is now.
        """
        if self._takes_calls:
            self._takes_calls = False
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
        """A reply's end, without the key: a server may echo what it was sent."""
        key = os.environ.get(self._api_key_env, "").strip()
        return text.replace(key or "\0", "***")[-_MOST_TEXT:]

    def _none(self, failure: Failure, why: str, text: str = "") -> Answer:
        if failure not in self._told:  # the first one; the others are counted
            self._told.add(failure)
            _log.warning("%s: a question is unscored (%s): %s", self.name, failure, why)
        return Answer(value=None, failure=failure, text=text, judge=self.name, cached=False)


def _part(question: Question, text: str) -> BaseModel | None:
    """What can be used of an answer that is not whole."""
    try:
        return read_answer(question, text, whole=False)
    except ValueError:
        return None
