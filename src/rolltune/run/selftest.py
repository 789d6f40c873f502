"""Checks of the whole gradient path on one real batch, before the first step.

Each has caught a real fault in a published trainer: a temperature the trainer forgot, an EOS masked with the padding,
prompt tokens in the loss, a reference that was not the starting policy, a reward that its own gold answer does not
satisfy.
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
from rolltune.types import Group, Microbatch, Reward

# |trainer - sampler| log-prob: (mean, max) over tokens. fp32 differs by the order of summation alone; bf16 keeps 8 bits
# of each logit, so single unlikely tokens may be far off while the mean stays small; fp16 keeps 11, and vLLM's was seen
# 1.4e-2 off in the mean. Of batch-invariant models nothing differs.
TOLERANCE = {"exact": (0.0, 0.0), "float32": (1e-4, 1e-2), "float16": (0.02, 0.3), "bfloat16": (0.05, 1.0)}
KL_TOLERANCE = {"float32": 1e-6, "bfloat16": 1e-3, "float16": 1e-3 / 8}


class SelfTestError(ValueError):
    """The run would have trained on something wrong; the message says what."""


@dataclass(frozen=True, kw_only=True)
class Check:
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
    """Check the gradient path on the shortest of ``groups`` that holds a stopped completion, if one does.

    Args:
        policy: before the step.
        groups: sampled with the policy's current weights.
        tokenizer: the policy's.
        rewards: the text-only rewards by name; each must give its full marks to the gold turn.
        answer_format: how a right turn is written, with ``{solution}`` and ``{answer}``.
        temperature: the one that was sampled with.
        dtype: of the policy; sets the tolerances.
        sampler_dtype: the sampler's option, None where it has none: its log-probs are held to the coarser of the two.
        with_reference: whether the loss has a KL term.
        starts_as_reference: whether the policy has not been trained since the reference was frozen.
    """
    group = min(groups, key=lambda g: (not any(c.finish_reason == "stop" for c in g.completions), _tokens(g)))
    trained = train_group(group, [1.0] * len(group.completions))
    (row,) = pack([trained], max_tokens=10**9, device=next(policy.model.parameters()).device)
    was_training = policy.model.training
    policy.model.eval()  # adapters may have dropout; the sampler has it off as well
    sampled_in = max((name for name in (dtype, sampler_dtype) if name in TOLERANCE), key=TOLERANCE.__getitem__)
    try:
        logprobs, _ = policy.logprobs(row, temperature=temperature)
        checks = [
            _check_ratio(logprobs, row, "exact" if is_batch_invariant(policy.causal_lm) else sampled_in),
            _check_plain_forward(policy, trained, row, logprobs, temperature, dtype),
            _check_tokens(group, row),
            _check_eos(group, row, tokenizer),
            _check_text(group, row, tokenizer),
            *_check_overoptimization(groups, rewards, answer_format),
        ]
        if with_reference:
            reference = policy.reference_logprobs(row, temperature=temperature)
            checks.append(_check_reference(logprobs, reference, dtype, starts_as_reference))
    finally:
        policy.model.train(was_training)
    return checks


def print_selftest(checks: Sequence[Check], group: Group, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the checks and one example, its trained tokens marked; raise SelfTestError if a check failed."""
    table = Table("", "self-test", "seen", title=None, show_edge=False, pad_edge=False)
    for check in checks:
        table.add_row("[green]ok[/]" if check.passed else "[red]FAILED[/]", check.name, Text(check.detail))
    console.print(table)
    completion = group.completions[0]
    prompt_tail = tokenizer.decode(list(group.prompt.token_ids[-60:]))
    trained = str(tokenizer.decode(list(completion.token_ids[:200])))
    console.print("one example, trained tokens in green (the prompt's end is not trained):", style="dim")
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


def _check_ratio(logprobs: Tensor, row: Microbatch, dtype: str) -> Check:
    gap = (logprobs - row.sampler_logprobs).abs()
    mean, largest = TOLERANCE[dtype]
    ratio = torch.exp(logprobs - row.sampler_logprobs).mean().item()
    return Check(
        name="sampler and trainer give the same log-probs (ratio 1)",
        passed=gap.mean().item() <= mean and gap.max().item() <= largest,
        detail=f"mean ratio {ratio:.6f}, |difference| mean {gap.mean().item():.1e} (at most {mean:g}), "
        f"max {gap.max().item():.1e} (at most {largest:g})",
    )


def _check_plain_forward(
    policy: Policy, trained: TrainGroup, row: Microbatch, logprobs: Tensor, temperature: float, dtype: str
) -> Check:
    """The packed row and the chunked head against the model's own logits on one completion alone."""
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
    packed = logprobs[row.target_sequence_index == number]
    name = "packed rows give the model's own log-probs"
    if len(packed) != len(targets):
        return Check(name=name, passed=False, detail=f"{len(packed)} trained tokens in a completion of {len(targets)}")
    gap = (plain - packed).abs()
    mean, largest = TOLERANCE[dtype]
    return Check(
        name=name,
        passed=gap.mean().item() <= mean and gap.max().item() <= largest,
        detail=f"|difference| mean {gap.mean().item():.1e}, max {gap.max().item():.1e} on {len(targets)} tokens",
    )


def _check_tokens(group: Group, row: Microbatch) -> Check:
    sampled = [token for completion in group.completions for token in completion.token_ids]
    same = row.target_ids.tolist() == sampled
    prompt_predictors = (row.sequence_index[row.predictor_index] == -1).sum().item()
    return Check(
        name="prompt tokens are not trained, sampled tokens all are",
        passed=same and prompt_predictors == len(group.completions),
        detail=f"{len(row.target_ids)} trained of {len(sampled)} sampled, "
        f"{len(group.prompt.token_ids)} prompt tokens stand once for {len(group.completions)} completions",
    )


def _check_eos(group: Group, row: Microbatch, tokenizer: PreTrainedTokenizerBase) -> Check:
    stopped = [i for i, c in enumerate(group.completions) if c.finish_reason == "stop"]
    last = [
        row.target_ids[row.target_sequence_index == i][-1:].tolist() == [group.completions[i].token_ids[-1]]
        for i in stopped
    ]
    token = tokenizer.decode([group.completions[stopped[0]].token_ids[-1]]) if stopped else ""
    detail = f"the last trained token of {len(stopped)} stopped completions is the one that stopped them ({token!r})"
    return Check(
        name="EOS is trained",
        passed=all(last),
        detail=detail if stopped else "no completion in this batch stopped: nothing to check (raise max_new_tokens?)",
    )


def _check_text(group: Group, row: Microbatch, tokenizer: PreTrainedTokenizerBase) -> Check:
    wrong = 0
    for i, completion in enumerate(group.completions):
        decoded = str(
            tokenizer.decode(row.target_ids[row.target_sequence_index == i].tolist(), skip_special_tokens=True)
        )
        wrong += group.prompt.prefill + decoded != completion.text
    return Check(
        name="trained tokens decode to the text that was rewarded",
        passed=wrong == 0,
        detail=f"{len(group.completions) - wrong} of {len(group.completions)} completions",
    )


def full_marks(reward: Reward) -> float | None:
    """What a reward gives a turn that is entirely right: 1.0, or what its function states as ``full_marks``."""
    return getattr(getattr(reward, "func", reward), "full_marks", 1.0)


def _check_overoptimization(groups: Sequence[Group], rewards: Mapping[str, Reward], answer_format: str) -> list[Check]:
    """Every reward gives its full marks to the gold turn; one that has none (None) is not asked."""
    checks = []
    for name, reward in rewards.items():
        full = full_marks(reward)
        if full is None:
            continue
        totals = {g.problem.id: reward(g.problem, worked_response(g.problem, answer_format)).total for g in groups}
        short = {problem: total for problem, total in totals.items() if total != full}
        detail = f"{full:g} on all {len(totals)} gold turns"
        if short:
            problem, total = next(iter(short.items()))
            detail = (
                f"{total} instead of {full:g} on {len(short)} of {len(totals)} gold turns, first {problem}: "
                "make answer_format write what the reward wants"
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
