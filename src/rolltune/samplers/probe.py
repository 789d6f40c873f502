"""Fixed prompts that engine and trainer both score, to check that they have the same distribution.

The engine samples a continuation of each probe: one from the whole distribution at temperature 1, one at another
temperature under top-k and top-p. In an engine that has the right weights but does not sample from them,

  - the log-probs are further from the trainer's than rounding explains, or
  - they did not follow the trainer's change since an earlier sync, whose weights the kernels may still use, or
  - they do not differ from the base model's as the trainer's do, because a LoRA adapter is not applied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.errors import SyncError
from rolltune.model import parallel
from rolltune.model.load import unwrapped
from rolltune.model.parts import is_mixture
from rolltune.types import Prompt, SamplingParams

MIN_MODEL_LEN = 16  # tokens
# Longer than a block of the prefix cache: 16 tokens on GPUs, 32 on CPUs.
_TEXTS = (
    (40, " ".join(f"{n} and {n + 1} make {2 * n + 1}." for n in range(1, 200))),
    (24, "Long ago a miller lived with three sons beside a river. When he grew old, he gave the eldest his mill. " * 9),
)
_SAMPLING = (SamplingParams(temperature=1.0), SamplingParams(temperature=0.6, top_k=20, top_p=0.95))
# Differences in fp32 come from the order of summation, so few tokens show a fault. In half precision all activations
# are rounded, and a fault is a larger mean over many tokens.
_NEW_TOKENS = {torch.float32: 8, torch.float16: 24, torch.bfloat16: 24}
TOLERANCE = 1e-3  # largest mean |dlogp| in fp32, in nats
# In half precision: largest mean |dlogp| of the engine from fp32, as a multiple of the trainer's own. Without a fault
# it is 0.6 to 1.3, with keys and values in fp8 2 to 4, with a repetition penalty of 1.05 5 to 8. In a mixture of
# experts it is 0.1 to 2.4 without a fault, because rounding sends single tokens to other experts.
ROUNDING, MOE_ROUNDING = 1.75, 4.0
_USUAL_GAP = 1.5  # a smaller gap, in units of the trainer's own error, needs no forward pass in fp32
MIXED_TOLERANCE = 0.4  # between a trainer in fp32 and an engine in half precision, whose rounding is not measured
_VISIBLE = 4  # a change of the trainer's log-probs is visible if it is this many times the gap of the last sync


@dataclass(frozen=True, kw_only=True, slots=True)
class Probe:
    """A prompt, and how its continuation is sampled. No token ends it early."""

    prompt: tuple[int, ...]
    params: SamplingParams


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """An engine's continuation of a probe.

    Attributes:
        token_ids: the new tokens.
        logprobs: the engine's, float32 [N].
        support: the tokens that top-k and top-p kept; None for all.
    """

    token_ids: tuple[int, ...]
    logprobs: Tensor
    support: tuple[tuple[int, ...], ...] | None


def build_probes(
    tokenizer: PreTrainedTokenizerBase, max_model_len: int, dtype: torch.dtype = torch.float32
) -> tuple[Probe, ...]:
    """Return fixed probes, whose continuations have different lengths. ``dtype``: the lower of both precisions."""
    new = min(_NEW_TOKENS[dtype], max_model_len // 4)
    probes = []
    for (length, text), sampling in zip(_TEXTS, _SAMPLING, strict=True):
        ids = tokenizer.encode(text, add_special_tokens=False)
        new += 1
        prompt = tuple(ids[: min(length, max_model_len - new)])
        probes.append(Probe(prompt=prompt, params=replace(sampling, max_new_tokens=new)))
    return tuple(probes)


class ProbeCheck:
    """Compares an engine's answers with the trainer's scores of them, now and at earlier syncs."""

    def __init__(self, model: PreTrainedModel | PeftModel, probes: Sequence[Probe], dtype: torch.dtype):
        """
        Args:
            model: the policy.
            probes: the fixed prompts.
            dtype: dtype of the engine's weights.
        """
        self._model = model
        self._probes = probes
        self._dtypes = {dtype, unwrapped(model).dtype}
        # bfloat16 rounds 8 times as coarsely as float16. What is measured is the trainer's rounding.
        self._coarser = max(1.0, torch.finfo(dtype).eps / torch.finfo(unwrapped(model).dtype).eps)
        self._rounding = MOE_ROUNDING if is_mixture(unwrapped(model)) else ROUNDING
        self._measured_rounding = 0.0  # smallest mean |dlogp| of the trainer from fp32 so far
        self._last: dict[int, _Scored] = {}  # by replica: the last sync
        self._anchors: dict[int, _Scored] = {}  # by replica: the sync before the last visible change
        self._base: list[_Scored] = []  # by replica: the base model, under an adapter

    def set_base(self, replicas: Sequence[Sequence[Answer]]) -> None:
        """Check each replica's answers without an adapter, which :meth:`check` compares those with one to.

        Raises:
            SyncError: a replica does not have the base model's distribution.
        """
        assert isinstance(self._model, PeftModel)
        with self._model.disable_adapter():
            self._base = self._scored(replicas)

    def check(self, replicas: Sequence[Sequence[Answer]], *, has_changed: bool) -> float:
        """Check the answers of each replica, one a probe.

        Args:
            replicas: each replica's answers, in the order of the probes.
            has_changed: whether the policy has other weights than at the last call.

        Returns:
            The largest mean |dlogp| of a replica.

        Raises:
            SyncError: a replica does not have the policy's distribution.
        """
        scored = self._scored(replicas)
        for replica, one in enumerate(scored):
            self._check_change(replica, one, has_changed)
            if self._base:
                self._check_effect(self._base[replica], one)
        return max(one.gap for one in scored)

    def _scored(self, replicas: Sequence[Sequence[Answer]]) -> list[_Scored]:
        """Score each replica's answers with the trainer, and check the gap."""
        scores: dict[tuple, Tensor] = {}  # replicas mostly give the same answers
        scored = []
        for answers in replicas:
            for probe, answer in zip(self._probes, answers, strict=True):
                if (probe, answer.token_ids, answer.support) not in scores:
                    scores[probe, answer.token_ids, answer.support] = self._score(probe, answer)
            ours = [scores[p, a.token_ids, a.support] for p, a in zip(self._probes, answers, strict=True)]
            scored.append(_Scored(answers=answers, scores=ours, gap=self._check_gap(answers, ours)))
        return scored

    def _score(self, probe: Probe, answer: Answer) -> Tensor:
        return trainer_logprobs(
            self._model, probe.prompt, answer.token_ids, probe.params.temperature, support=answer.support
        )

    def _check_gap(self, answers: Sequence[Answer], scores: Sequence[Tensor]) -> float:
        """Return mean |dlogp| between engine and trainer. Raises SyncError if rounding does not explain it."""
        theirs, ours = torch.cat([answer.logprobs for answer in answers]), torch.cat(list(scores))
        gap = error = _distance(theirs, ours)
        limit, judged = MIXED_TOLERANCE if len(self._dtypes) > 1 else TOLERANCE, "the trainer"
        if torch.float32 not in self._dtypes:
            if gap <= _USUAL_GAP * self._coarser * self._measured_rounding:
                return gap
            with _InFloat32():
                exact = torch.cat([self._score(*pair) for pair in zip(self._probes, answers, strict=True)])
            error, rounding = _distance(theirs, exact), _distance(ours, exact)
            self._measured_rounding = min(rounding, self._measured_rounding or rounding)
            limit = self._rounding * self._coarser * rounding + TOLERANCE
            judged = f"the trainer in fp32, from which its own precision is {rounding:.3g} away"
        if not error <= limit:
            raise SyncError(
                f"log-probs of the probes' {len(ours)} new tokens differ by {error:.3g} on average between the engine "
                f"and {judged}; at most {limit:.3g} is accepted"
            )
        return gap

    def _check_change(self, replica: int, scored: _Scored, has_changed: bool) -> None:
        """Check that the engine's log-probs changed as the trainer's did.

        An engine that computes with older weights samples the same tokens again, because the seeds are the same. So the
        log-probs of the tokens that two syncs have in common can be compared.
        """
        if has_changed and replica in self._last:
            theirs, ours = scored.changes_since(self._last[replica])
            if (ours != 0).sum() > len(ours) / 2 and not theirs.any():
                raise SyncError(
                    "the weights have changed, but the engine's log-probs of the probes have not: it computes with "
                    "older weights"
                )
        self._last[replica] = scored
        anchor = self._anchors.setdefault(replica, scored)
        theirs, ours = scored.changes_since(anchor)
        if _strays(theirs, ours, anchor.gap):
            raise SyncError(
                f"since an earlier sync log-probs of the probes have changed by {_size(ours):.3g} on average in the "
                f"trainer and by {_size(theirs):.3g} in the engine: it computes with older weights"
            )
        if _is_visible(ours, anchor.gap) or len(ours) < sum(map(len, scored.scores)) / 2:
            self._anchors[replica] = scored

    def _check_effect(self, base: _Scored, scored: _Scored) -> None:
        """Check that the adapter changes the engine's log-probs as it changes the trainer's."""
        theirs, ours = scored.changes_since(base)
        # Smaller effects may be rounded away in an engine of lower precision.
        is_ignored = _size(ours) > TOLERANCE / 100 and not theirs.any()
        if is_ignored or _strays(theirs, ours, base.gap):
            raise SyncError(
                f"the adapter changes log-probs of the probes by {_size(ours):.3g} on average in the trainer and by "
                f"{_size(theirs):.3g} in the engine: it does not apply the adapter"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class _Scored:
    """A replica's answers, the trainer's scores of them, and the mean |dlogp| between both."""

    answers: Sequence[Answer]
    scores: Sequence[Tensor]
    gap: float

    def changes_since(self, earlier: _Scored) -> tuple[Tensor, Tensor]:
        """Return the changes of the engine's and of the trainer's log-probs of the tokens that both begin with."""
        theirs, ours = [], []
        for now, then, score, score_then in zip(
            self.answers, earlier.answers, self.scores, earlier.scores, strict=True
        ):
            pairs = zip(now.token_ids, then.token_ids, strict=True)
            common = next((i for i, (a, b) in enumerate(pairs) if a != b), len(now.token_ids))
            theirs.append(now.logprobs[:common] - then.logprobs[:common])
            ours.append(score[:common] - score_then[:common])
        return torch.cat(theirs), torch.cat(ours)


def _strays(theirs: Tensor, ours: Tensor, gap: float) -> bool:
    """Whether the engine's log-probs have not changed as the trainer's have, visibly beside a gap between both."""
    return _is_visible(ours, gap) and _distance(theirs, ours) > _size(ours) / 2 + 2 * max(gap, TOLERANCE / 100)


def _is_visible(change: Tensor, gap: float) -> bool:
    return _size(change) > _VISIBLE * max(gap, TOLERANCE / 100)


def _size(change: Tensor) -> float:
    return change.abs().mean().item() if len(change) else 0.0


def _distance(a: Tensor, b: Tensor) -> float:
    return _size(a - b)


@torch.no_grad()
def trainer_logprobs(
    model: PreTrainedModel | PeftModel,
    prompt: tuple[int, ...],
    completion: tuple[int, ...],
    temperature: float = 1.0,
    *,
    support: tuple[tuple[int, ...], ...] | None = None,
) -> Tensor:
    """Score a completion with the training forward pass, without dropout.

    Returns:
        Log-probs of the softmax over the support, or over all tokens: float32 [len(completion)], on the CPU.
    """
    causal_lm = unwrapped(model)
    sequence = TrainSequence(token_ids=completion, logprobs=(0.0,) * len(completion), advantage=0.0, support=support)
    group = TrainGroup(prompt=Prompt(token_ids=prompt), sequences=(sequence,))
    (microbatch,) = pack([group], max_tokens=len(prompt) + len(completion), device=causal_lm.device)
    training = [module for module in model.modules() if module.training]
    model.eval()  # the engine has no dropout
    try:
        return parallel.logprobs(causal_lm, microbatch, temperature=temperature)[0].cpu()
    finally:
        for module in training:
            module.training = True


class _InFloat32(TorchFunctionMode):
    """Converts half-precision arguments of every function to fp32, so that a bf16 model computes in fp32.

    At most one weight is converted at a time.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func.__name__ not in ("__get__", "__len__", "size", "dim"):  # of a tensor's attributes
            args, kwargs = tree_map(_to_float32, (args, kwargs or {}))
        return func(*args, **kwargs or {})


def _to_float32(value: Any) -> Any:
    is_half = isinstance(value, Tensor) and value.is_floating_point() and value.element_size() == 2
    return value.float() if is_half else value
