"""Checks of the whole gradient path on one real batch, before the first step.

Each check stands for a fault that published trainers have had: a temperature that the trainer did not apply, an EOS
masked with the padding, prompt tokens in the loss, a reference other than the starting policy, a reward that the gold
answer does not satisfy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rolltune.batch import TrainGroup, pack, train_group
from rolltune.model.batch_invariant import is_batch_invariant
from rolltune.model.policy import Policy
from rolltune.prompts import worked_response
from rolltune.types import Group, Reward, RolloutMicrobatch

# Limits on |trainer - sampler| log-prob: (mean, max) over tokens. In fp32 only the order of summation differs. bf16
# keeps 8 bits of each logit, so single unlikely tokens may be far off while the mean stays small. fp16 keeps 11 bits;
# vLLM in fp16 was seen 1.4e-2 off in the mean. Batch-invariant models must agree exactly.
TOLERANCE = {"exact": (0.0, 0.0), "float32": (1e-4, 1e-2), "float16": (0.02, 0.3), "bfloat16": (0.05, 1.0)}
KL_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-3 / 8}


class SelfTestError(ValueError):
    """The run would have trained on something wrong; the message names the failed checks."""


@dataclass(frozen=True, kw_only=True)
class Check:
    """The result of one check."""

    name: str
    passed: bool
    detail: str


@torch.no_grad()
def run_selftest(
    policy: Policy,
    groups: Sequence[Group],
    *,
    tokenizer: PreTrainedTokenizerBase,
    rewards: Mapping[str, Reward],
    answer_format: str,
    temperature: float,
    dtype: str,
    sampler_dtype: str | None,
    with_reference: bool,
    starts_as_reference: bool,
) -> list[Check]:
    """Check the gradient path on the shortest of ``groups``, preferably one with a completion that ended by itself.

    Args:
        policy: the policy before the step.
        groups: groups sampled with the policy's current weights.
        tokenizer: the policy's tokenizer.
        rewards: the text-only rewards by name; each must give its full marks to the gold response.
        answer_format: form of a correct response, with ``{solution}`` and ``{answer}``.
        temperature: the sampling temperature.
        dtype: the policy's dtype, which sets the tolerances.
        sampler_dtype: the sampler's own dtype option; None if it has none. The coarser of the two dtypes sets the
            tolerance of the comparison with the sampler.
        with_reference: whether the loss has a KL term.
        starts_as_reference: whether the policy has not been trained since the reference was frozen.

    Returns:
        The results of all checks, passed or not.
    """
    group = min(groups, key=lambda g: (not any(c.finish_reason == "stop" for c in g.completions), _tokens(g)))
    trained = train_group(group, [1.0] * len(group.completions))
    (microbatch,) = pack([trained], max_tokens=10**9, device=next(policy.model.parameters()).device)
    was_training = policy.model.training
    policy.model.eval()  # adapters may have dropout, which is off in the sampler too
    sampled_in = max((name for name in (dtype, sampler_dtype) if name in TOLERANCE), key=TOLERANCE.__getitem__)
    try:
        logprobs, _ = policy.logprobs(microbatch, temperature=temperature)
        checks = [
            _check_ratio(logprobs, microbatch, "exact" if is_batch_invariant(policy.causal_lm) else sampled_in),
            _check_plain_forward(policy, trained, microbatch, logprobs, temperature, dtype),
            _check_tokens(group, microbatch),
            _check_eos(group, microbatch, tokenizer),
            _check_text(group, microbatch, tokenizer),
            *_check_gold_answers(groups, rewards, answer_format),
        ]
        if with_reference:
            reference = policy.reference_logprobs(microbatch, temperature=temperature)
            checks.append(_check_reference(logprobs, reference, dtype, starts_as_reference))
    finally:
        policy.model.train(was_training)
    return checks


def print_selftest(checks: Sequence[Check], group: Group, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the results and one example with its trained tokens marked; raise SelfTestError if a check failed."""
    table = Table("", "self-test", "result", title=None, show_edge=False, pad_edge=False)
    for check in checks:
        table.add_row("[green]ok[/]" if check.passed else "[red]FAILED[/]", check.name, Text(check.detail))
    console.print(table)
    completion = group.completions[0]
    prompt_tail = tokenizer.decode(list(group.prompt.token_ids[-60:]))
    trained = str(tokenizer.decode(list(completion.token_ids[:200])))
    console.print("one example, trained tokens in green (the end of the prompt, in grey, is not trained):", style="dim")
    console.print(
        Text.assemble(
            (f"...{prompt_tail}", "dim"), (trained, "green"), "" if len(completion.token_ids) <= 200 else "..."
        )
    )
    failed = [check for check in checks if not check.passed]
    if failed:
        raise SelfTestError(
            "the self-test before the first step failed, nothing was trained:\n"
            + "\n".join(f"  {check.name}: {check.detail}" for check in failed)
        )


def _tokens(group: Group) -> int:
    return sum(len(completion.token_ids) for completion in group.completions)


def _check_ratio(logprobs: Tensor, microbatch: RolloutMicrobatch, dtype: str) -> Check:
    gap = (logprobs - microbatch.sampler_logprobs).abs()
    mean, largest = TOLERANCE[dtype]
    ratio = torch.exp(logprobs - microbatch.sampler_logprobs).mean().item()
    return Check(
        name="sampler and trainer give the same log-probs (ratio 1)",
        passed=gap.mean().item() <= mean and gap.max().item() <= largest,
        detail=f"mean ratio {ratio:.6f}, |difference| mean {gap.mean().item():.1e} (at most {mean:g}), "
        f"max {gap.max().item():.1e} (at most {largest:g})",
    )


def _check_plain_forward(
    policy: Policy, trained: TrainGroup, microbatch: RolloutMicrobatch, logprobs: Tensor, temperature: float, dtype: str
) -> Check:
    """Compare packing and the chunked head with the model's own logits of one completion."""
    sequence = max(trained.sequences, key=lambda s: len(s.token_ids))
    number = trained.sequences.index(sequence)
    ids = torch.tensor([trained.prompt.token_ids + sequence.token_ids], device=logprobs.device)
    logits = policy.causal_lm(ids, use_cache=False).logits[0, len(trained.prompt.token_ids) - 1 : -1].float()
    for t, kept in enumerate(sequence.support or ()):
        outside = torch.ones_like(logits[t], dtype=torch.bool)
        outside[list(kept)] = False
        logits[t].masked_fill_(outside, -torch.inf)
    targets = torch.tensor(sequence.token_ids, device=logprobs.device)
    plain = torch.log_softmax(logits / temperature, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
    packed = logprobs[microbatch.target_sequence_index == number]
    name = "packed sequences give the model's own log-probs"
    if len(packed) != len(targets):
        return Check(name=name, passed=False, detail=f"{len(packed)} trained tokens in a completion of {len(targets)}")
    gap = (plain - packed).abs()
    mean, largest = TOLERANCE[dtype]
    return Check(
        name=name,
        passed=gap.mean().item() <= mean and gap.max().item() <= largest,
        detail=f"|difference| mean {gap.mean().item():.1e}, max {gap.max().item():.1e} on {len(targets)} tokens",
    )


def _check_tokens(group: Group, microbatch: RolloutMicrobatch) -> Check:
    sampled = [token for completion in group.completions for token in completion.token_ids]
    same = microbatch.target_ids.tolist() == sampled
    prompt_predictors = (microbatch.sequence_index[microbatch.predictor_index] == -1).sum().item()
    return Check(
        name="all sampled tokens are trained, prompt tokens are not",
        passed=same and prompt_predictors == len(group.completions),
        detail=f"{len(microbatch.target_ids)} of {len(sampled)} sampled tokens are trained; "
        f"{len(group.prompt.token_ids)} prompt tokens are shared by {len(group.completions)} completions",
    )


def _check_eos(group: Group, microbatch: RolloutMicrobatch, tokenizer: PreTrainedTokenizerBase) -> Check:
    stopped = [i for i, c in enumerate(group.completions) if c.finish_reason == "stop"]
    sequences = microbatch.target_sequence_index
    last = [
        microbatch.target_ids[sequences == i][-1:].tolist() == [group.completions[i].token_ids[-1]] for i in stopped
    ]
    token = tokenizer.decode([group.completions[stopped[0]].token_ids[-1]]) if stopped else ""
    detail = f"the last trained token of {len(stopped)} stopped completions is the one that stopped them ({token!r})"
    if not stopped:
        detail = "not checked: no completion in this batch ended by itself; raise sampling.max_new_tokens?"
    return Check(name="EOS is trained", passed=all(last), detail=detail)


def _check_text(group: Group, microbatch: RolloutMicrobatch, tokenizer: PreTrainedTokenizerBase) -> Check:
    wrong = 0
    for i, completion in enumerate(group.completions):
        trained = microbatch.target_ids[microbatch.target_sequence_index == i].tolist()
        decoded = tokenizer.decode(trained, skip_special_tokens=True)
        wrong += f"{group.prompt.prefill}{decoded}" != completion.text
    return Check(
        name="trained tokens decode to the text that was rewarded",
        passed=wrong == 0,
        detail=f"{len(group.completions) - wrong} of {len(group.completions)} completions",
    )


def full_marks(reward: Reward) -> float | None:
    """Return what a reward gives a correct response: its attribute ``full_marks`` (None: unknown), or else 1.0."""
    return getattr(getattr(reward, "func", reward), "full_marks", 1.0)


def _check_gold_answers(groups: Sequence[Group], rewards: Mapping[str, Reward], answer_format: str) -> list[Check]:
    """Check that every reward gives its full marks to the gold response; a reward without full marks is not checked."""
    checks = []
    for name, reward in rewards.items():
        full = full_marks(reward)
        if full is None:
            continue
        totals = {g.problem.id: reward(g.problem, worked_response(g.problem, answer_format)).total for g in groups}
        short = {problem: total for problem, total in totals.items() if total != full}
        detail = f"{full:g} on all {len(totals)} gold responses"
        if short:
            problem, total = next(iter(short.items()))
            detail = (
                f"{total} instead of {full:g} on {len(short)} of {len(totals)} gold responses, first {problem}: "
                "change answer_format to the form that the reward expects"
            )
        checks.append(Check(name=f"reward `{name}` gives the gold answer full marks", passed=not short, detail=detail))
    return checks


def _check_reference(logprobs: Tensor, reference: Tensor, dtype: str, starts_as_reference: bool) -> Check:
    gap = reference - logprobs
    kl = (torch.expm1(gap) - gap).mean().item()
    return Check(
        name="KL to the reference is 0 at the start" if starts_as_reference else "KL to the reference is finite",
        passed=kl <= KL_TOLERANCE[dtype] if starts_as_reference else kl == kl and kl != float("inf"),
        detail=f"k3 {kl:.1e}" + (f" (at most {KL_TOLERANCE[dtype]:g})" if starts_as_reference else ""),
    )
