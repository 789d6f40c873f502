"""The values that pass from module to module, from a problem to a gradient.

    Problem -> Prompt -> Completion -> Score -> Group -> Microbatch -> LossInputs

Rewards and data sets import this module and nothing heavier. Everything up to :class:`Group` is plain Python; tensors
begin at :class:`Microbatch` (only type checkers import torch here).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from decimal import Decimal
from numbers import Real
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

    from rolltune.rewards.rubric.schema import Rubric


class Message(TypedDict):
    """One message of a conversation, in the form that chat templates take."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One record of a data set: a question, and what is known about its answer.

    Example:
        >>> problem = Problem(id="gsm8k/train/0", messages=({"role": "user", "content": "2 + 2?"},), answer="4")

    Attributes:
        id: unique and stable name within the data set; it names the problem in logs and seeds its samples.
        messages: the conversation before the model's response.
        answer: the gold answer in canonical form (``"1800"``, not ``"$1,800"``); None if unknown.
        solution: a worked solution in plain text, for SFT and few-shot examples; None if unknown.
        rubric: the criteria for judges; None if the problem has none.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    solution: str | None = None
    rubric: Rubric | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """The tokens that the policy continues.

    Attributes:
        token_ids: the rendered chat template, with generation prompt and prefill.
        prefill: the start of the response, already in ``token_ids``. Rewards see it before the text that the model
            wrote, so that a prefilled ``<think>`` counts.
    """

    token_ids: tuple[int, ...]
    prefill: str = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingParams:
    """The distribution to sample from, and when to stop.

    The log-probs of a sample are those of exactly this distribution: logits / temperature, restricted to the top-k and
    top-p tokens, renormalised. ``temperature=0`` is greedy decoding, whose log-probs are all 0.

    Attributes:
        temperature: >= 0.
        top_p: probability mass kept, in (0, 1]; 1 keeps every token.
        top_k: number of tokens kept, >= 0; 0 keeps every token.
        max_new_tokens: >= 1; a completion that reaches it without a stop has finish reason "length".
        stop: non-empty strings that end a completion; the token that completes one is the last token kept.

    Raises:
        ValueError: a value out of its range.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 256
    stop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ValueError(f"temperature: {self.temperature}; must be >= 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p: {self.top_p}; must be in (0, 1]")
        if self.top_k < 0:
            raise ValueError(f"top_k: {self.top_k}; must be >= 0")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens: {self.max_new_tokens}; must be >= 1")
        if "" in self.stop:
            raise ValueError("stop: holds an empty string, which would end every completion at once")

    @property
    def truncates(self) -> bool:
        """Whether top-k or top-p leaves tokens out of the distribution."""
        return self.temperature > 0 and (self.top_k > 0 or self.top_p < 1)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleRequest:
    """One prompt, and one seed for each completion wanted."""

    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """The output of a sampler. Token ids, log-probs and text stay together; text is never tokenized again.

    Example:
        >>> completion = Completion(
        ...     token_ids=(19, 2), logprobs=(-0.1, -0.02), finish_reason="stop", policy_version=3, text="4"
        ... )

    Attributes:
        token_ids: the sampled tokens, including EOS if the model wrote one.
        logprobs: log-prob of each sampled token under the distribution it was sampled from.
        finish_reason: "stop" for EOS or a stop string, "length" for a completion cut at ``max_new_tokens``.
        policy_version: number of optimizer steps behind the weights that wrote the completion.
        text: the whole response, for the rewards: the prompt's prefill, then the decoded completion without special
            tokens.
        support: for each sampled token the ids that top-k and top-p kept, ascending, the token itself among them; None
            if the distribution was not truncated.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    policy_version: int
    text: str
    support: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """The result of a reward for one completion.

    Example:
        >>> score = Score(total=0.0, failure="no_answer")

    Numbers may be of any kind: Python's (bool, Decimal, Fraction), or scalars of numpy and torch. They become floats.

    Attributes:
        total: the reward. None means unscored (a judge was down, a verifier ran out of time), which is never the same
            as 0: an unscored completion leaves its group.
        parts: named components of the total, for the curves; an unscored part is None.
        failure: why no value could be parsed, in one or two snake_case words that name a curve; None if it was parsed.
        notes: text for the sample tables, such as a judge's reasons.
    """

    total: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    failure: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "total", _as_float(self.total))
        object.__setattr__(self, "parts", {name: _as_float(value) for name, value in self.parts.items()})


def _as_float(value: Any) -> Any:
    """A number as a float; anything else as it is, for the caller's error message to name."""
    scalar = value.item() if getattr(value, "ndim", None) == 0 else value
    return float(scalar) if isinstance(scalar, Real | Decimal) else value


class Reward(Protocol):
    """A function of a problem and a response.

    A reward that needs more than the text (a token count, the finish reason) has a keyword argument named
    ``completion``; its other keyword arguments are options, set in the config.
    """

    def __call__(self, problem: Problem, text: str, /) -> Score: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The completions of one problem and their scores, in the same order."""

    problem: Problem
    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    def scored(self) -> Group:
        """Return the group without its unscored completions."""
        keep = [i for i, score in enumerate(self.scores) if score.total is not None]
        return Group(
            problem=self.problem,
            prompt=self.prompt,
            completions=tuple(self.completions[i] for i in keep),
            scores=tuple(self.scores[i] for i in keep),
        )

    @property
    def rewards(self) -> list[float]:
        """The totals of a group whose completions are all scored."""
        rewards = [score.total for score in self.scores if score.total is not None]
        assert len(rewards) == len(self.scores), "call scored() first"
        return rewards


@dataclass(frozen=True, kw_only=True)
class Support:
    """The tokens that top-k and top-p left to choose from, for N trained tokens: N sets of token ids, K ids in all.

    Attributes:
        token_ids: int32 [K], the sets one after the other; set i is ``token_ids[offsets[i]:offsets[i + 1]]``. An empty
            set stands for the full vocabulary.
        offsets: int64 [N + 1].
    """

    token_ids: Tensor
    offsets: Tensor


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """Packed sequences of one forward pass: T tokens, N of them trained. :func:`rolltune.batch.pack` shows one.

    A prompt appears once, followed by its completions. Token i attends to token j <= i of the same segment if j belongs
    to the prompt or to i's own completion. There is no padding and no mask: the trained tokens are listed, each with
    the position of the hidden state that predicts it.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T]; every completion continues from the end of its prompt.
        segment_index: int64 [T]; one number for a prompt and its completions.
        sequence_index: int64 [T]; the number of the completion within the microbatch, -1 for prompt tokens.
        predictor_index: int64 [N]; index into T of the hidden state that predicts the trained token.
        target_ids: int64 [N]; the trained token.
        target_sequence_index: int64 [N]; the number of the trained token's completion, 0 .. num_sequences - 1.
        num_sequences: completions in the microbatch.
        support: sets of the N trained tokens; None if all of them were sampled from the full vocabulary.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_index: Tensor
    sequence_index: Tensor
    predictor_index: Tensor
    target_ids: Tensor
    target_sequence_index: Tensor
    num_sequences: int
    support: Support | None = None


@dataclass(frozen=True, kw_only=True)
class RolloutMicrobatch(Microbatch):
    """A microbatch of sampled completions.

    Attributes:
        advantages: float32 [N]; one value per completion, repeated on its tokens.
        sampler_logprobs: float32 [N]; log-probs under the distribution that was sampled from.
    """

    advantages: Tensor
    sampler_logprobs: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTotals:
    """The denominators of one optimizer step, counted once over all ranks and microbatches.

    They may count more than the microbatches hold: where the loss has no KL term, completions with a zero advantage
    (and so no gradient) are left out of the microbatches, but never out of the denominators.

    Attributes:
        tokens: trained tokens.
        sequences: completions.
    """

    tokens: int
    sequences: int


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Per-token tensors of one microbatch, all float32 [N] except ``sequence_index``.

    Attributes:
        logprobs: log-probs of the policy under training; carries the gradient.
        old_logprobs: log-probs of the policy that the ratio is taken to; no gradient.
        advantages: one value per completion, repeated on its tokens.
        sequence_index: int64 [N], the completion of each token, 0 .. num_sequences - 1.
        num_sequences: completions in the microbatch.
        reference_logprobs: log-probs of the frozen reference; None if the loss has no KL term.
        importance_weights: weights for the sampler/trainer mismatch, no gradient; None means 1.
    """

    logprobs: Tensor
    old_logprobs: Tensor
    advantages: Tensor
    sequence_index: Tensor
    num_sequences: int
    reference_logprobs: Tensor | None = None
    importance_weights: Tensor | None = None


class Loss(Protocol):
    """An objective: per-token tensors to (scalar, metrics).

    The scalar is this microbatch's share of the loss, already divided by the step's totals; its sum over microbatches
    and ranks is the loss. Metrics are sums over the microbatch's tokens; the caller divides them.
    """

    @property
    def kl_coef(self) -> float: ...

    def __call__(self, inputs: LossInputs, totals: LossTotals) -> tuple[Tensor, dict[str, Tensor]]: ...
