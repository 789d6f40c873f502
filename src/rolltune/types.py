"""The values that cross module borders, from a problem to a gradient.

Light on purpose: rewards and data sets import this module and nothing heavier. Up to :class:`Group` everything
is plain Python; tensors begin at :class:`Microbatch` (the name ``torch`` below is needed by type checkers alone).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol, TypedDict

if TYPE_CHECKING:
    from torch import Tensor

    from rolltune.rewards.rubric.schema import Rubric


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Problem:
    """One row of a data set: what is asked, and what is known of the answer.

    Example:
        >>> Problem(id="gsm8k/train/0", messages=({"role": "user", "content": "2 + 2?"},), answer="4")

    Attributes:
        id: unique and stable within the data set; names the problem in logs and seeds its samples.
        messages: the conversation up to the turn that the model writes.
        answer: the gold answer in canonical form (``"1800"``, not ``"$1,800"``); None where none is known.
        solution: a worked solution in plain text, for SFT and few-shot turns; None where none is known.
        rubric: what a judge is to look for in an answer; None where there is none.
    """

    id: str
    messages: tuple[Message, ...]
    answer: str | None = None
    solution: str | None = None
    rubric: Rubric | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Prompt:
    """A problem as the policy sees it.

    Attributes:
        token_ids: the rendered chat template, generation prompt and prefill included.
        prefill: the text of the assistant's turn that is already in ``token_ids``. Rewards see it in front of
            what the model wrote, so a prefilled ``<think>`` is not asked for twice.
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
    """One prompt and the seeds of the completions wanted for it (one completion a seed)."""

    prompt: Prompt
    seeds: tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Completion:
    """What the sampler wrote: ids, log-probs and text leave it together and are never made again from text.

    Example:
        >>> Completion(token_ids=(19, 2), logprobs=(-0.1, -0.02), finish_reason="stop", policy_version=3, text="4")

    Attributes:
        token_ids: sampled tokens only, the EOS included where the model wrote one.
        logprobs: of each sampled token, under the distribution it was sampled from.
        finish_reason: "stop" for EOS or a stop string, "length" for a completion cut at ``max_new_tokens``.
        policy_version: number of optimizer steps behind the weights that wrote this.
        text: the whole assistant turn for the rewards: the prompt's prefill, then the decoded completion
            without special tokens.
        support: of each sampled token, the ids that top-k and top-p left to draw from, in ascending order, itself
            among them; None where nothing was truncated.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish_reason: Literal["stop", "length"]
    policy_version: int
    text: str
    support: tuple[tuple[int, ...], ...] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Score:
    """What a reward says of one completion.

    Example:
        >>> Score(total=0.0, failure="no_answer")

    Attributes:
        total: the reward. None means unscored (a judge was down, a checker ran out of time), which is never the same as
            0: an unscored completion leaves its group.
        parts: named components behind the total, for the curves; an unscored part is None.
        failure: why no value could be parsed, in one or two snake_case words that name a curve; None if it could.
        notes: text behind the parts, such as a judge's reasons, for the sample tables.
    """

    total: float | None
    parts: Mapping[str, float | None] = field(default_factory=dict)
    failure: str | None = None
    notes: Mapping[str, str] = field(default_factory=dict)


class Reward(Protocol):
    """A function of a problem and of the assistant's turn.

    A reward that needs more than the text (a token count, the finish reason) takes a keyword argument named
    ``completion``; the rest of its keyword arguments are its options and come from the config.
    """

    def __call__(self, problem: Problem, text: str, /) -> Score: ...


@dataclass(frozen=True, kw_only=True, slots=True)
class Group:
    """The completions of one problem with their scores, in the same order."""

    problem: Problem
    prompt: Prompt
    completions: tuple[Completion, ...]
    scores: tuple[Score, ...]

    def scored(self) -> Group:
        """The same group without its unscored completions."""
        keep = [i for i, score in enumerate(self.scores) if score.total is not None]
        return Group(
            problem=self.problem,
            prompt=self.prompt,
            completions=tuple(self.completions[i] for i in keep),
            scores=tuple(self.scores[i] for i in keep),
        )

    @property
    def rewards(self) -> list[float]:
        """Totals of a group in which everything is scored."""
        rewards = [score.total for score in self.scores if score.total is not None]
        assert len(rewards) == len(self.scores), "call scored() first"
        return rewards


@dataclass(frozen=True, kw_only=True)
class Support:
    """What each of N tokens was drawn from: a set of K_i ids, K in all, one set behind the other.

    Attributes:
        token_ids: int32 [K]; those of token i are ``token_ids[offsets[i]:offsets[i + 1]]``. A token without any was
            drawn from the full vocabulary.
        offsets: int64 [N + 1].
    """

    token_ids: Tensor
    offsets: Tensor


@dataclass(frozen=True, kw_only=True)
class Microbatch:
    """One packed row: prompts, each followed by its completions, and the N tokens that are trained on.

    A prompt stands once in a row however many completions follow it. Token i may attend to token j <= i of the same
    segment if j is of the prompt or of i's own completion. There is no padding and no mask: the trained tokens are
    listed, by the hidden state that predicts each one.

    Attributes:
        input_ids: int64 [T].
        position_ids: int64 [T]; every completion goes on from the end of its prompt.
        segment_index: int64 [T]; one number a prompt and its completions.
        sequence_index: int64 [T]; -1 on prompt tokens, else the completion's number within the row.
        predictor_index: int64 [N]; index into T of the hidden state that predicts the trained token.
        target_ids: int64 [N]; the trained token.
        target_sequence_index: int64 [N]; the completion's number within the row, 0 .. num_sequences - 1.
        advantages: float32 [N]; one value a completion, repeated on its tokens.
        sampler_logprobs: float32 [N].
        num_sequences: completions in this row.
        support: of the N trained tokens; None where all of them were drawn from the full vocabulary.
    """

    input_ids: Tensor
    position_ids: Tensor
    segment_index: Tensor
    sequence_index: Tensor
    predictor_index: Tensor
    target_ids: Tensor
    target_sequence_index: Tensor
    advantages: Tensor
    sampler_logprobs: Tensor
    num_sequences: int
    support: Support | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class LossTotals:
    """The denominators of one optimizer step, counted once over all ranks and micro-batches.

    Attributes:
        tokens: trained tokens.
        sequences: completions.
    """

    tokens: int
    sequences: int


@dataclass(frozen=True, kw_only=True)
class TrainBatch:
    """What one optimizer step of one rank trains on.

    ``totals`` may count more than the rows hold: completions with a zero advantage can be left out of the rows where
    the loss has no KL term (their gradient is 0), never out of the denominators.
    """

    microbatches: Sequence[Microbatch]
    totals: LossTotals


@dataclass(frozen=True, kw_only=True)
class LossInputs:
    """Per-token tensors of one micro-batch, all float32 [N] but ``sequence_index``.

    Attributes:
        logprobs: of the policy under training; carries the gradient.
        old_logprobs: of the policy that the ratio is taken to (no gradient).
        advantages: one value a completion, repeated on its tokens.
        sequence_index: int64 [N], 0 .. num_sequences - 1.
        num_sequences: completions in the micro-batch.
        reference_logprobs: of the frozen reference; None where the loss has no KL term.
        importance_weights: stop-gradient weights for sampler/trainer mismatch; None means 1.
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

    The scalar is this micro-batch's share of the loss, already divided by the step's totals: the sum of it
    over micro-batches and ranks is the loss. Metrics are sums over the micro-batch's tokens, for whoever
    logs them to divide.
    """

    @property
    def kl_coef(self) -> float: ...

    def __call__(self, inputs: LossInputs, totals: LossTotals) -> tuple[Tensor, dict[str, Tensor]]: ...
