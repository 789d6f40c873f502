"""Check how a family is trained and sampled from, against plain eager transformers on each sequence alone."""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from byte_tokenizer import byte_tokenizer
from model_families import LENGTHS, load_plain, save_model
from peft import PeftModel
from torch import Tensor
from transformers import AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import causal_mask_function
from transformers.modeling_layers import GradientCheckpointingLayer

from rolltune.batch import pack, train_group
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.errors import ConfigError
from rolltune.model.checkpointing import recompute_activations
from rolltune.model.forward import forward_of
from rolltune.model.load import load_tokenizer
from rolltune.model.packed_attention import PACKED_ATTENTION, packed_mask
from rolltune.model.parts import text_decoder
from rolltune.model.policy import Policy, build_policy
from rolltune.run.estimates import estimate_memory
from rolltune.run.selftest import run_selftest
from rolltune.samplers.native import NativeSampler
from rolltune.types import (
    Completion,
    Group,
    Microbatch,
    Problem,
    Prompt,
    RolloutMicrobatch,
    SampleRequest,
    SamplingParams,
    Score,
)

TOLERANCE = 2e-3  # of log-probs, in nats; rounding of these models is 1e-6 to 1e-5
GRADIENT_TOLERANCE = 5e-3  # relative
KEYS = ("model.", "sampler:", "sampling.", "lora", "prompt", "support:")  # start of a readable refusal
NEW_TOKENS = 16
ADVANTAGES = ([0.7, -1.1, 0.4, 1.3], [-0.6, 0.9, -1.4, 0.5])


@dataclass
class Result:
    """What was found for one family at one length.

    Attributes:
        model: name of the model's class.
        trained: "packed", "packed, own masks", "unpacked" or "refused".
        sampled: "shared cache", "own cache" or "refused".
        head: "own" if logits are more than a product; else empty.
        errors: largest error by check; log-probs in nats, the gradient relative.
        refused: the message by check.
        wrong: what is wrong by check: a crash, an untrained adapter, a failed self-test.
    """

    family: str
    length: str
    model: str
    trained: str = "refused"
    sampled: str = "refused"
    head: str = ""
    errors: dict[str, float] = field(default_factory=dict)
    refused: dict[str, str] = field(default_factory=dict)
    wrong: dict[str, str] = field(default_factory=dict)

    def attempt(self, check: str, function: Callable[[], Any]) -> Any:
        """Return the function's result; None if it raised, which is recorded."""
        try:
            return function()
        except Exception as error:
            text = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            if isinstance(error, ConfigError) or (isinstance(error, ValueError) and str(error).startswith(KEYS)):
                self.refused[check] = text.partition(": ")[2]
            else:
                self.wrong[check] = f"{text} {traceback.format_exc().strip().splitlines()[-3].strip()}"
            return None

    @property
    def silently_wrong(self) -> list[str]:
        return [
            f"{check} off by {error:.2g}"
            for check, error in self.errors.items()
            if not error <= (GRADIENT_TOLERANCE if "gradient" in check else TOLERANCE)
        ]

    @property
    def is_right(self) -> bool:
        return self.trained != "refused" and not self.silently_wrong and not self.wrong


def check_family(family: str, length: str, folder: Path) -> Result:
    """Load, sample, train, save and reload a tiny model of the family."""
    lengths = LENGTHS[length]
    plain = save_model(family, lengths, folder)
    result = Result(family=family, length=length, model=type(plain).__name__)
    result.attempt("dry run", lambda: _estimate(folder))
    policy = result.attempt("load", lambda: _build(folder))
    if policy is None:
        return result
    generator = torch.Generator().manual_seed(7)
    prompts = [tuple(torch.randint(4, 260, (n,), generator=generator).tolist()) for n in lengths.prompts]
    tokenizer = load_tokenizer(str(folder))
    sampler = result.attempt("sampler", lambda: NativeSampler(policy.model, tokenizer, max_num_seqs=8))
    groups = result.attempt("sampler", lambda: _sample(sampler, prompts)) if sampler else None
    if groups is None:  # as another sampler would give them
        drawn = [[_draw(n, generator) for n in counts] for counts in ((16, 13, 16, 9), (11, 16, 14, 16))]
        groups = [
            _group(p, [_completion(c, _truth(plain, p, c)) for c in cs]) for p, cs in zip(prompts, drawn, strict=True)
        ]
    else:
        result.sampled = "own cache" if sampler.notes else "shared cache"
    with torch.no_grad():
        truth = [_truth(plain, g.prompt.token_ids, c.token_ids) for g in groups for c in g.completions]
    if result.sampled != "refused":
        sampled = [torch.tensor(c.logprobs) for g in groups for c in g.completions]
        result.errors["sampled log-probs"] = _gap(sampled, truth)
    trained = [train_group(g, a) for g, a in zip(groups, ADVANTAGES, strict=True)]
    (microbatch,) = pack(trained, max_tokens=10**9)
    firsts = [type(g)(prompt=g.prompt, sequences=g.sequences[:1]) for g in trained]
    (examples,) = pack(firsts, max_tokens=10**9)
    with torch.no_grad(), _SpiedMasks() as spied:
        ours = result.attempt("train", lambda: policy.logprobs(microbatch, temperature=1.0)[0])
        ours_sft = result.attempt("train", lambda: policy.logprobs(examples, temperature=1.0)[0])
    if ours is None or ours_sft is None:
        return result
    forward = forward_of(policy.causal_lm)
    result.trained = ("packed, own masks" if spied.own else "packed") if forward.packed else "unpacked"
    result.head = "" if forward.plain_head else "own"
    result.errors["log-probs"] = _gap(_split(ours, microbatch), truth)
    result.errors["log-probs of examples"] = _gap(_split(ours_sft, examples), [truth[0], truth[4]])
    result.attempt("gradient", lambda: _check_gradients(result, policy, plain, microbatch, groups))
    result.attempt("self-test", lambda: _check_selftest(result, policy, groups, tokenizer))
    result.attempt("save", lambda: _check_save(result, policy, microbatch, groups, folder / "saved", tokenizer))
    result.attempt("lora", lambda: _check_lora(result, folder, microbatch, groups, tokenizer))
    return result


def _estimate(folder: Path) -> None:
    config = ModelConfig(path=str(folder))
    estimate_memory(config, LoRAConfig(), microbatch_tokens=64, kv_tokens=64, with_reference=True)


def _build(folder: Path, lora: LoRAConfig | None = None) -> Policy:
    config = ModelConfig(path=str(folder), dtype="float32")
    return build_policy(config, lora, device=torch.device("cpu"), seed=0, with_reference=True)


def _sample(sampler: NativeSampler, prompts: Sequence[tuple[int, ...]]) -> list[Group]:
    sampler.sync(0)
    requests = [
        SampleRequest(prompt=Prompt(token_ids=prompt), seeds=tuple(range(4 * i, 4 * i + 4)))
        for i, prompt in enumerate(prompts)
    ]
    completions = sampler.generate(requests, SamplingParams(temperature=1.0, max_new_tokens=NEW_TOKENS))
    return [_group(prompt, group) for prompt, group in zip(prompts, completions, strict=True)]


def _draw(count: int, generator: torch.Generator) -> tuple[int, ...]:
    return tuple(torch.randint(4, 260, (count,), generator=generator).tolist())


def _group(prompt: tuple[int, ...], completions: Sequence[Completion]) -> Group:
    return Group(
        problem=Problem(id="0", messages=({"role": "user", "content": "?"},), answer="1"),
        prompt=Prompt(token_ids=prompt),
        completions=tuple(completions),
        scores=tuple(Score(total=float(i)) for i in range(len(completions))),
    )


def _completion(token_ids: tuple[int, ...], logprobs: Tensor) -> Completion:
    text = str(byte_tokenizer().decode(list(token_ids), skip_special_tokens=True))
    values = tuple(logprobs.tolist())
    return Completion(token_ids=token_ids, logprobs=values, finish_reason="length", policy_version=0, text=text)


def _truth(model: Any, prompt: tuple[int, ...], completion: tuple[int, ...]) -> Tensor:
    """Log-probs of a completion by the model's own forward pass; its last token is no input, as in training."""
    ids = torch.tensor([[*prompt, *completion[:-1]]])
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 :].float()
    return torch.log_softmax(logits, -1).gather(-1, torch.tensor(completion)[:, None]).squeeze(-1)


def _gap(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    return max((a.detach() - b.detach()).abs().max().item() for a, b in zip(ours, theirs, strict=True))


def _split(values: Tensor, microbatch: Microbatch) -> list[Tensor]:
    return [values[microbatch.target_sequence_index == i] for i in range(microbatch.num_sequences)]


class _SpiedMasks:
    """Records whether a model hands over a mask function that is not plain causal attention."""

    def __enter__(self) -> _SpiedMasks:
        self.own = False
        self._registered = AttentionMaskInterface()[PACKED_ATTENTION]

        def spy(*args, mask_function=causal_mask_function, **kwargs):
            self.own |= mask_function is not causal_mask_function
            return packed_mask(*args, mask_function=mask_function, **kwargs)

        AttentionMaskInterface.register(PACKED_ATTENTION, spy)
        return self

    def __exit__(self, *_) -> None:
        AttentionMaskInterface.register(PACKED_ATTENTION, self._registered)


def _check_gradients(
    result: Result, policy: Policy, plain: PreTrainedModel, microbatch: RolloutMicrobatch, groups: Sequence[Group]
) -> None:
    """Compare all gradients, also with the activations of each layer computed again in the backward pass."""
    for group, advantages in zip(groups, ADVANTAGES, strict=True):
        for completion, advantage in zip(group.completions, advantages, strict=True):
            (_truth(plain, group.prompt.token_ids, completion.token_ids).sum() * advantage).backward()
    theirs = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    norm = torch.stack([gradient.norm() for gradient in theirs.values()]).norm()
    zero = torch.zeros(())

    def error() -> float:
        policy.model.zero_grad()
        (policy.logprobs(microbatch, temperature=1.0)[0] * microbatch.advantages).sum().backward()
        ours = {name: p.grad for name, p in policy.causal_lm.named_parameters() if p.grad is not None}
        gaps = [(ours.get(n, zero) - theirs.get(n, zero)).norm() for n in ours.keys() | theirs.keys()]
        return (torch.stack(gaps).norm() / norm).item()

    result.errors["gradient"] = error()
    layers = [module for module in policy.causal_lm.modules() if isinstance(module, GradientCheckpointingLayer)]
    if layers:
        recompute_activations(policy.causal_lm)
        result.attempt("checkpointing", lambda: result.errors.update({"checkpointed gradient": error()}))
        for layer in layers:
            del layer.forward


def _check_selftest(result: Result, policy: Policy, groups: Sequence[Group], tokenizer: Any) -> None:
    checks = run_selftest(
        policy,
        groups,
        tokenizer=tokenizer,
        rewards={},
        answer_format="{answer}",
        temperature=1.0,
        dtype="float32",
        sampler_dtype=None,
        with_reference=True,
        starts_as_reference=True,
    )
    failed = [f"{check.name}: {check.detail}" for check in checks if not check.passed]
    if failed:
        result.wrong["self-test"] = "; ".join(failed)


def _reloaded_gap(policy: Policy, reloaded: Any, microbatch: RolloutMicrobatch, groups: Sequence[Group]) -> float:
    with torch.no_grad():
        ours = _split(policy.logprobs(microbatch, temperature=1.0)[0], microbatch)
        theirs = [_truth(reloaded, g.prompt.token_ids, c.token_ids) for g in groups for c in g.completions]
    return _gap(ours, theirs)


def _check_save(
    result: Result, policy: Policy, microbatch: RolloutMicrobatch, groups: Sequence[Group], target: Path, tokenizer: Any
) -> None:
    """Take a step with the gradient that is there, save, and reload in plain transformers."""
    with torch.no_grad():
        for parameter in policy.trainable_parameters:
            if parameter.grad is not None:
                parameter -= 1e-3 * parameter.grad / (parameter.grad.norm() + 1e-9)
    policy.save(target, tokenizer)
    again = load_plain(target)
    ours, theirs = policy.causal_lm.state_dict(), again.state_dict()
    differ = [
        n
        for n in ours.keys() | theirs.keys()
        if n not in ours or n not in theirs or not torch.equal(ours[n], theirs[n])
    ]
    if differ:
        result.wrong["save"] = f"{len(differ)} tensors differ, such as {sorted(differ)[0]}"
    result.errors["saved"] = _reloaded_gap(policy, again, microbatch, groups)


def _check_lora(
    result: Result, folder: Path, microbatch: RolloutMicrobatch, groups: Sequence[Group], tokenizer: Any
) -> None:
    """Take a step on adapters, save, and reload in plain peft."""
    adapted = _build(folder, LoRAConfig(rank=4, alpha=8.0))
    layers = {name: m for name, m in adapted.causal_lm.named_modules() if hasattr(m, "lora_A")}
    text = {id(module) for module in text_decoder(adapted.causal_lm).modules()}
    if outside := [name for name, module in layers.items() if id(module) not in text]:
        result.wrong["lora"] = f"{len(outside)} adapters are not in the text model, such as {outside[0]}"
    (adapted.logprobs(microbatch, temperature=1.0)[0] * microbatch.advantages).sum().neg().backward()
    dead = [n for n, m in layers.items() if all(p.grad is None or not p.grad.any() for p in m.lora_B.parameters())]
    if len(dead) == len(layers):
        result.wrong["lora"] = "no adapter has a gradient"
    torch.optim.SGD(adapted.trainable_parameters, lr=0.05).step()
    with redirect_stdout(io.StringIO()):
        adapted.save(folder / "adapter", tokenizer)
        again = PeftModel.from_pretrained(load_plain(folder), str(folder / "adapter")).eval()
    result.errors["adapter"] = _reloaded_gap(adapted, again, microbatch, groups)
