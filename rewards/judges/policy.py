"""The policy as its own judge, through its sampler (the self-critique of Kimi K2, arXiv 2507.20534, section 3.2.2).

K2's critic is trained further on verifiable prompts, which keeps it honest; nothing of the kind is done here. A policy
that is both paid and payer drifts, so compare it with a measure that it has no part in
(``eval.overoptimization``), or let the weights from the start of the run judge (``frozen: true``).
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

from rolltune.prompts import render_prompt
from rolltune.rewards.judges.judge import Answer, Question, read_answer, repair
from rolltune.samplers import Sampler
from rolltune.seeding import derive_seed
from rolltune.types import Completion, Message, Problem, SampleRequest, SamplingParams

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class _Waiting:
    messages: tuple[Message, ...]
    loop: asyncio.AbstractEventLoop
    reply: asyncio.Future[Completion | None]  # None: the sampler refuses it


class PolicyJudge:
    """A judge whose replies the policy's own sampler writes, many at a time, between sampling and training.

    Questions wait until :meth:`answer_waiting` is called, by the thread that samples. Each answer says which weights
    gave it: ``policy@12`` is the policy after 12 optimizer steps, ``start@0`` the frozen copy. A question that is too
    long for the model is unscored (``judge_refused``), and so is one that other weights than the policy's had a part in
    answering (``judge_stale``): an error on one rank would leave the others waiting, ``batch.max_unscored`` stops all.

    Args:
        frozen: judge by the weights that the run starts from. They are held in memory beside the policy.
        max_new_tokens: of one reply; one that reaches it is cut, and unscored.
        temperature: 0 for the likeliest reply.
        seed: with the question it seeds a reply where the temperature is not 0.

    Raises:
        ValueError: an argument is out of range.
    """

    stop_reason = None  # it costs nothing but time

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
        self._tokenizer: PreTrainedTokenizerBase | None = None
        self._lock = threading.Lock()
        self._waiting: list[_Waiting] = []
        totals = ("questions", "repairs", "completion_tokens", "latency_seconds")
        failures = ("judge_refused", "judge_unparseable", "judge_cut", "judge_stale")
        self._totals: dict[str, float] = dict.fromkeys((*totals, *failures), 0.0)
        self._has_refused = False

    @property
    def name(self) -> str:
        return "start" if self._frozen else "policy"

    def bind(self, sampler: Sampler, tokenizer: PreTrainedTokenizerBase, frozen: Callable[[], Sampler]) -> None:
        """Say who answers.

        Args:
            sampler: of the policy; whoever trains keeps it current.
            tokenizer: whose chat template asks the questions.
            frozen: makes a sampler of the weights that the run started from; called where they are wanted.
        """
        self._sampler = frozen() if self._frozen else sampler
        self._tokenizer = tokenizer

    async def ask(self, question: Question) -> Answer:
        """The policy's answer; asked once more where it cannot be read."""
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
        """Write the replies to all questions that wait; returns how many. For the thread that samples."""
        with self._lock:
            waiting, self._waiting = self._waiting, []
        waiting = [question for question in waiting if not question.reply.done()]  # nobody waits for a cancelled one
        start = time.monotonic()
        replies = self._generate([self._request(question.messages) for question in waiting])
        self._totals["latency_seconds"] += time.monotonic() - start
        for question, reply in zip(waiting, replies, strict=True):
            self._totals["completion_tokens"] += 0 if reply is None else len(reply.token_ids)
            question.loop.call_soon_threadsafe(_settle, question.reply, reply)
        return len(waiting)

    def _generate(self, requests: Sequence[SampleRequest]) -> list[Completion | None]:
        """A reply to each; None for those that the sampler refuses, which keep no other from being answered."""
        if not requests:
            return []
        assert self._sampler is not None, "bind() comes first"
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
        assert self._tokenizer is not None
        prompt = render_prompt(Problem(id="judge", messages=tuple(messages)), self._tokenizer)
        return SampleRequest(prompt=prompt, seeds=(derive_seed(self._seed, "judge", *map(str, messages)),))

    def share_budget(self, path: Path) -> None:
        """It has no caps."""

    def metrics(self) -> dict[str, float]:
        """Totals of this process; ``latency_seconds`` is the time that sampling replies took."""
        return dict(self._totals)

    async def aclose(self) -> None:
        """Nothing is open."""


def _settle(future: asyncio.Future[Completion | None], reply: Completion | None) -> None:
    if not future.done():  # cancelled meanwhile
        future.set_result(reply)
