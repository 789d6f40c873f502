"""Checks of the whole gradient path on one real batch, before the first step.

Each check stands for a fault that published trainers have had: a temperature that the trainer did not apply, an EOS
masked with the padding, prompt tokens in the loss, a reference other than the starting policy, a reward that the gold
answer does not satisfy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rolltune.batch import TokenSequence, TrainGroup, pack, pack_examples, train_group
from rolltune.model.batch_invariant import is_batch_invariant
from rolltune.model.parts import attention, in_float32
from rolltune.model.policy import Policy
from rolltune.prompts import without_prefill, worked_response
from rolltune.terminal import printable
from rolltune.types import Completion, Group, Microbatch, Prompt, Reward, RolloutMicrobatch

# Limits on |difference| of log-probs: (mean, max) over tokens. In fp32 only the order of summation differs. bf16 keeps
# 8 bits of each logit, so single unlikely tokens may be far off while the mean stays small; fp16 keeps 11. vLLM was
# 4.3e-2 off in the mean in bf16, and 1.4e-2 in fp16. Batch-invariant models must agree exactly with their sampler.
TOLERANCE = {"exact": (0.0, 0.0), "float32": (1e-4, 1e-2), "float16": (0.02, 0.3), "bfloat16": (0.08, 1.0)}
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
    """Check the gradient path of GRPO on completions of two groups, packed into one microbatch.

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
    chosen = _choose(groups)
    trained = [train_group(group, [1.0] * len(group.completions)) for group in chosen]
    (microbatch,) = pack(trained, max_tokens=10**9, device=next(policy.model.parameters()).device)
    completions = [completion for group in chosen for completion in group.completions]
    sampled_in = max((name for name in (dtype, sampler_dtype) if name in TOLERANCE), key=TOLERANCE.__getitem__)
    logprobs = policy.logprobs(microbatch, temperature=temperature)[0]
    checks = [
        _check_ratio(logprobs, microbatch, "exact" if is_batch_invariant(policy.causal_lm) else sampled_in),
        _check_plain_forward(policy, trained, microbatch, temperature),
        _check_tokens(trained, [completion.token_ids for completion in completions], microbatch),
        _check_eos(completions, microbatch, tokenizer),
        _check_text(chosen, microbatch, tokenizer),
        *_check_gold_answers(groups, rewards, answer_format),
    ]
    if with_reference:
        reference = policy.reference_logprobs(microbatch, temperature=temperature)
        checks.append(_check_reference(logprobs, reference, dtype, starts_as_reference))
    return checks


@torch.no_grad()
def run_sft_selftest(
    policy: Policy,
    examples: Sequence[TrainGroup[TokenSequence]],
    *,
    responses: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
) -> list[Check]:
    """Check the gradient path of SFT on the shortest and the longest example, packed into one microbatch.

    Args:
        policy: the policy before the step.
        examples: prompts, each with its one response.
        responses: the text of each response, prefill included.
        tokenizer: the policy's tokenizer.

    Returns:
        The results of all checks, passed or not.
    """
    by_length = sorted(range(len(examples)), key=lambda i: len(examples[i].sequences[0].token_ids))
    chosen = dict.fromkeys((by_length[0], by_length[-1]))  # one and the same if there is one example
    trained = [examples[i] for i in chosen]
    (microbatch,) = pack_examples(trained, max_tokens=10**9, device=next(policy.model.parameters()).device)
    ends = [(i, example.sequences[0].token_ids[-1]) for i, example in enumerate(trained)]
    texts = [without_prefill(responses[i], examples[i].prompt.prefill) for i in chosen]
    return [
        _check_plain_forward(policy, trained, microbatch, 1.0),
        _check_tokens(trained, [example.sequences[0].token_ids for example in trained], microbatch),
        _check_end(ends, microbatch, tokenizer),
        _check_decoded(texts, microbatch, tokenizer),
    ]


def _choose(groups: Sequence[Group]) -> list[Group]:
    """Return the shortest group, preferably one in which a completion ended by itself, and a part of the longest.

    The part is the shortest completion that ended by itself, the longest, and the last.
    """
    longest = max(range(len(groups)), key=lambda i: _longest(groups[i]))
    others = [group for i, group in enumerate(groups) if i != longest]
    if not others:
        return [groups[longest]]
    shortest = min(others, key=lambda g: (not any(c.finish_reason == "stop" for c in g.completions), _longest(g)))
    completions = groups[longest].completions
    lengths = [len(completion.token_ids) for completion in completions]
    ended = [i for i, completion in enumerate(completions) if completion.finish_reason == "stop"]
    kept = sorted({*sorted(ended, key=lengths.__getitem__)[:1], lengths.index(max(lengths)), len(lengths) - 1})
    part = {name: tuple(getattr(groups[longest], name)[i] for i in kept) for name in ("completions", "scores")}
    return [shortest, replace(groups[longest], **part)]


def _longest(group: Group) -> int:
    """Return the tokens of the group's longest completion, with its prompt."""
    return len(group.prompt.token_ids) + max(len(completion.token_ids) for completion in group.completions)


def print_selftest(
    checks: Sequence[Check],
    prompt: Prompt,
    token_ids: Sequence[int],
    tokenizer: PreTrainedTokenizerBase,
    console: Console,
) -> None:
    """Print the results, and one prompt and response with the trained tokens marked.

    Raises:
        SelfTestError: a check failed.
    """
    table = Table("", "self-test", "result", title=None, show_edge=False, pad_edge=False)
    for check in checks:
        table.add_row("[green]ok[/]" if check.passed else "[red]FAILED[/]", check.name, Text(printable(check.detail)))
    console.print(table)
    prompt_tail = printable(str(tokenizer.decode(list(prompt.token_ids[-60:]))))
    trained = printable(str(tokenizer.decode(list(token_ids[:200]))))
    console.print("one example, trained tokens in green (the end of the prompt, in grey, is not trained):", style="dim")
    console.print(
        Text.assemble((f"...{prompt_tail}", "dim"), (trained, "green"), "" if len(token_ids) <= 200 else "...")
    )
    failed = [check for check in checks if not check.passed]
    if failed:
        raise SelfTestError(
            "the self-test before the first step failed, nothing was trained:\n"
            + "\n".join(f"  {check.name}: {check.detail}" for check in failed)
        )


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
    policy: Policy,
    trained: Sequence[TrainGroup[TokenSequence]],
    microbatch: Microbatch,
    temperature: float,
) -> Check:
    """Compare packing and the chunked head with the model's own logits of each completion.

    In float32: in bf16 a right packing may be 0.1 nats off in the mean of a completion.
    """
    name = "packed sequences give the model's own log-probs"
    gaps = []
    sequences = [(group.prompt, sequence) for group in trained for sequence in group.sequences]
    with in_float32(policy.causal_lm):
        logprobs = policy.logprobs(microbatch, temperature=temperature)[0]
        of_each = [_plain_logprobs(policy, prompt, sequence, temperature) for prompt, sequence in sequences]
    for number, plain in enumerate(of_each):
        packed = logprobs[microbatch.target_sequence_index == number]
        if len(packed) != len(plain):
            detail = f"{len(packed)} trained tokens in a completion of {len(plain)}"
            return Check(name=name, passed=False, detail=detail)
        gaps.append((plain - packed).abs())
    mean, largest = TOLERANCE["float32"]
    return Check(
        name=name,
        passed=all(gap.mean().item() <= mean and gap.max().item() <= largest for gap in gaps),
        detail=f"|difference| mean {max(gap.mean().item() for gap in gaps):.1e}, max "
        f"{max(gap.max().item() for gap in gaps):.1e} on the worst of {len(gaps)} completions",
    )


def _plain_logprobs(policy: Policy, prompt: Prompt, sequence: TokenSequence, temperature: float) -> Tensor:
    ids = torch.tensor([prompt.token_ids + sequence.token_ids], device=policy.causal_lm.device)
    with attention(policy.causal_lm, "eager"):
        logits = policy.causal_lm(input_ids=ids, use_cache=False).logits[0, len(prompt.token_ids) - 1 : -1].float()
    for t, kept in enumerate(getattr(sequence, "support", None) or ()):
        outside = torch.ones_like(logits[t], dtype=torch.bool)
        outside[list(kept)] = False
        logits[t].masked_fill_(outside, -torch.inf)
    targets = torch.tensor(sequence.token_ids, device=logits.device)
    return torch.log_softmax(logits / temperature, dim=-1).gather(-1, targets[:, None]).squeeze(-1)


def _check_tokens(
    trained: Sequence[TrainGroup[TokenSequence]], written: Sequence[Sequence[int]], microbatch: Microbatch
) -> Check:
    """Compare the targets with the tokens that were written, and count the prompt tokens that predict one."""
    tokens = [token for token_ids in written for token in token_ids]
    same = microbatch.target_ids.tolist() == tokens
    prompt_predictors = (microbatch.sequence_index[microbatch.predictor_index] == -1).sum().item()
    prompt_tokens = sum(len(group.prompt.token_ids) for group in trained)
    return Check(
        name="all completion tokens are trained, prompt tokens are not",
        passed=same and prompt_predictors == len(written),
        detail=f"{len(microbatch.target_ids)} of {len(tokens)} completion tokens are trained; {prompt_tokens} prompt "
        f"tokens of {len(trained)} prompts come before {len(written)} completions",
    )


def _check_eos(completions: Sequence[Completion], microbatch: Microbatch, tokenizer: PreTrainedTokenizerBase) -> Check:
    stopped = [(i, c.token_ids[-1]) for i, c in enumerate(completions) if c.finish_reason == "stop"]
    if not stopped:
        detail = "not checked: no completion in this batch ended by itself; raise sampling.max_new_tokens?"
        return Check(name="EOS is trained", passed=True, detail=detail)
    return _check_end(stopped, microbatch, tokenizer)


def _check_end(ends: Sequence[tuple[int, int]], microbatch: Microbatch, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Check that the last trained token of a completion is the one that ended it; ``ends``: (completion, token)."""
    last = [microbatch.target_ids[microbatch.target_sequence_index == i][-1:].tolist() == [end] for i, end in ends]
    return Check(
        name="EOS is trained",
        passed=all(last),
        detail=f"the last trained token of {len(ends)} completions that ended is the one that ended them "
        f"({tokenizer.decode([ends[0][1]])!r})",
    )


def _check_text(groups: Sequence[Group], microbatch: Microbatch, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Compare the decoded targets with the texts that rewards saw."""
    texts = [
        completion.text.removeprefix(group.prompt.prefill) if completion.text.startswith(group.prompt.prefill) else None
        for group in groups
        for completion in group.completions
    ]
    return _check_decoded(texts, microbatch, tokenizer)


def _check_decoded(texts: Sequence[str | None], microbatch: Microbatch, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Compare the decoded targets of each completion with its text; None is never right."""
    decoded = [
        tokenizer.decode(
            microbatch.target_ids[microbatch.target_sequence_index == i].tolist(), skip_special_tokens=True
        )
        for i in range(len(texts))
    ]
    right = sum(a == b for a, b in zip(decoded, texts, strict=True))
    return Check(
        name="trained tokens decode to the text of the response",
        passed=right == len(texts),
        detail=f"{right} of {len(texts)} completions",
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
