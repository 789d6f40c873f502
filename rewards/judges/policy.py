"""The policy as its own judge, through its sampler (the self-critique of Kimi K2, arXiv 2507.20534, section 3.2.2).

K2 keeps its critic honest by training it on verifiable prompts, which rolltune does not do. A policy that rewards
itself drifts, so compare it with an independent measure (``eval.overoptimization``), or let the starting weights judge
(``frozen: true``).
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from rolltune.prompts import PromptRenderer
from rolltune.rewards.judges.delimit import added_tokens, token_breaker
from rolltune.rewards.judges.judge import Answer, Question, read_answer, repair
from rolltune.samplers import Sampler
from rolltune.seeding import derive_seed
from rolltune.types import Completion, Message, Problem, SampleRequest, SamplingParams

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    messages: tuple[Message, ...]
    loop: asyncio.AbstractEventLoop
    reply: asyncio.Future[Completion | None]  # None: the sampler refuses the question


class PolicyJudge:
    """A judge whose replies the policy's own sampler writes, many at a time, between sampling and training.

    Questions wait until the sampling thread calls :meth:`answer_waiting`. Each answer names its weights: ``policy@12``
    is the policy after 12 optimizer steps, ``start@0`` the frozen copy. A question that is too long for the model is
    unscored (``judge_refused``), and so is one answered by other weights than the policy's (``judge_stale``). Neither
    raises, since an error on one rank would leave the others waiting; ``batch.max_unscored`` stops all ranks.

    Args:
        frozen: judge by the run's starting weights. They take memory beside the policy.
        max_new_tokens: of one reply. A reply cut there is unscored.
        temperature: 0 for the likeliest reply.
        seed: together with the question it seeds a sampled reply.

    Raises:
        ValueError: an argument is out of range.
    """

    stop_reason = None  # it has no caps

    def __init__(
        self, *, frozen: bool = False, max_new_tokens: int = 512, temperature: float = 0.0, seed: int = 0
    ) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {max_new_tokens}; must be >= 1")
        if not 0 <= temperature <= 2:
            raise ValueError(f"temperature: {temperature}; must be in 0 .. 2")
        self._frozen = frozen
        self._params = SamplingParams(temperature=temperature, max_new_tokens=max_new_tokens)
        self._seed = seed
        self._sampler: Sampler | None = None
        self._render: PromptRenderer | None = None
        self._broken = token_breaker([])
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        totals = ("questions", "repairs", "completion_tokens", "latency_seconds")
        failures = ("judge_refused", "judge_unparseable", "judge_cut", "judge_stale")
        self._totals: dict[str, float] = dict.fromkeys((*totals, *failures), 0.0)
        self._has_refused = False

    @property
    def name(self) -> str:
        return "start" if self._frozen else "policy"

    def bind(
        self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, starting_sampler: Callable[[], Sampler]
    ) -> None:
        """Set the sampler that answers.

        Args:
            sampler: the policy's, which the training loop keeps current.
            tokenizer: its chat template renders the questions.
            starting_sampler: makes a sampler of the run's starting weights; called only if ``frozen``.
        """
        self._sampler = starting_sampler() if self._frozen else sampler
        self._render = PromptRenderer(tokenizer)
        self._broken = token_breaker(added_tokens(tokenizer))

    async def ask(self, question: Question) -> Answer:
        """Return the policy's answer. An unparseable reply is asked for once more."""
        self._totals["questions"] += 1
        messages: tuple[Message, ...] = question.messages
        answer = Answer(value=None, failure="judge_unparseable", text="", judge=self.name, cached=False)
        for is_repair in (False, True):
            self._totals["repairs"] += is_repair
            reply = await self._reply(messages)
            if reply is None and is_repair:
                break
            if reply is None:
                self._totals["judge_refused"] += 1
                return Answer(value=None, failure="judge_refused", text="", judge=self.name, cached=False)
            judge = f"{self.name}@{reply.policy_version}"
            if reply.policy_version < 0:
                self._totals["judge_stale"] += 1
                return Answer(value=None, failure="judge_stale", text=reply.text, judge=judge, cached=False)
            if reply.finish_reason == "length":
                self._totals["judge_cut"] += 1
                return Answer(value=None, failure="judge_cut", text=reply.text, judge=judge, cached=False)
            try:
                value = read_answer(question, reply.text)
            except ValueError as error:
                answer = Answer(value=None, failure="judge_unparseable", text=reply.text, judge=judge, cached=False)
                messages = (*question.messages, *repair(reply.text, str(error)))
            else:
                return Answer(value=value, failure=None, text=reply.text, judge=judge, cached=False)
        self._totals["judge_unparseable"] += 1
        return answer

    async def _reply(self, messages: tuple[Message, ...]) -> Completion | None:
        loop = asyncio.get_running_loop()
        waiting = _Waiting(messages, loop, loop.create_future())
        with self._lock:
            self._waiting.append(waiting)
        return await waiting.reply

    def answer_waiting(self) -> int:
        """Answer all waiting questions, and return their number. Call it from the sampling thread."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        waiting = [question for question in waiting if not question.reply.done()]  # drops cancelled questions
        start = time.monotonic()
        replies = self._generate([self._request(question.messages) for question in waiting])
        self._totals["latency_seconds"] += time.monotonic() - start
        for question, reply in zip(waiting, replies, strict=True):
            self._totals["completion_tokens"] += 0 if reply is None else len(reply.token_ids)
            question.loop.call_soon_threadsafe(_settle, question.reply, reply)
        return len(waiting)

    def _generate(self, requests: Sequence[SampleRequest]) -> list[Completion | None]:
        """Return a reply to each request; None for a refused one, which does not affect the others."""
        if not requests:
            return []
        assert self._sampler is not None, "JudgePool.bind() comes first"
        try:
            return [reply for (reply,) in self._sampler.generate(requests, self._params)]
        except ValueError as error:
            if len(requests) > 1:
                half = len(requests) // 2
                return [*self._generate(requests[:half]), *self._generate(requests[half:])]
            if not self._has_refused:
                _log.warning("%s: a question is unscored (judge_refused): %s", self.name, error)
            self._has_refused = True
            return [None]

    def _request(self, messages: Sequence[Message]) -> SampleRequest:
        assert self._render is not None, "JudgePool.bind() comes first"
        # The tokenizer reads its special tokens wherever they stand: in the response, the problem or the rubric.
        shown: tuple[Message, ...] = tuple({"role": m["role"], "content": self._broken(m["content"])} for m in messages)
        prompt = self._render(Problem(id="judge", messages=shown))
        return SampleRequest(prompt=prompt, seeds=(derive_seed(self._seed, "judge", *map(str, messages)),))

    def share_budget(self, path: Path) -> None:
        """Do nothing: it has no caps."""

    def metrics(self) -> dict[str, float]:
        """Return this process's totals. ``latency_seconds`` is the time spent on sampling replies."""
        return dict(self._totals)

    async def aclose(self) -> None:
        """Do nothing: nothing is open."""


def _settle(future: asyncio.Future[Completion | None], reply: Completion | None) -> None:
    if not future.done():  # cancelled meanwhile
        future.set_result(reply)
