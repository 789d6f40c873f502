"""Choose the forward pass that is trained, by numbers: the fastest that gives the log-probs of eager attention.

At load, a few made-up prompts with several completions are computed one by one by transformers' own eager attention,
and as a microbatch in each way that there is. They are longer than any sliding window below 64 tokens, and lie on both
sides of a RoPE limit below that length. Everything is computed in float32, where wrong attention cannot be taken for
rounding. Larger limits are not reached, so what depends on them is not decided by numbers: mask functions are evaluated
at every length, and :func:`rolltune.model.parts.rope_change` and :func:`depends_on_row` read the config.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rolltune.batch import TokenSequence, TrainGroup, pack_examples
from rolltune.errors import ConfigError
from rolltune.model import parallel
from rolltune.model.forward import Forward, set_forward
from rolltune.model.head import is_plain_head
from rolltune.model.parts import attention, in_float32, is_mixture, rope_change, set_attention
from rolltune.types import Microbatch, Prompt

TOLERANCE = 2e-3  # largest difference of log-probs, in nats; rounding in float32 is 1e-6 to 1e-4
# Two experts may be equally good to the last bits, and rounding then chooses between them; wrong attention reaches most
# tokens of a prompt's second completion.
RIGHT_IN_MIXTURES = 0.9  # share of tokens
LENGTHS = ((7, (16, 9, 1)), (57, (12, 16)))  # tokens of each made-up prompt and of its completions

CODE_ERRORS = (AttributeError, TypeError, ValueError, LookupError, RuntimeError, AssertionError)

_chosen: dict[str, tuple[Forward, str]] = {}  # by architecture, so that a reference model need not be checked again


def choose_forward(
    model: PreTrainedModel,
    path: str,
    *,
    packed_attention: str,
    tried: Callable[[], PreTrainedModel] | None = None,
) -> None:
    """Choose how the model's log-probs are computed, and set the model up for it.

    Args:
        model: as loaded, in eval mode.
        path: ``model.path``, for messages.
        packed_attention: name of the attention implementation for packed sequences.
        tried: builds the model that is tried in the place of a hollow one. If it is sharded, all processes call this.

    Raises:
        ConfigError: no way gives the log-probs of eager attention.
    """
    config = {name: value for name, value in model.config.to_dict().items() if not name.startswith("_")}
    key = json.dumps([config, str(model.dtype), str(model.device), packed_attention], sort_keys=True, default=str)
    if key not in _chosen:
        subject = model if tried is None else tried()
        with in_float32(subject):
            _chosen[key] = _choose(subject, path, packed_attention)
    forward, implementation = _chosen[key]
    set_attention(model, implementation)
    set_forward(model, forward)


@torch.no_grad()
def _choose(model: PreTrainedModel, path: str, packed_attention: str) -> tuple[Forward, str]:
    """Return how log-probs are computed, and the attention implementation for it."""
    name = type(model).__name__.removeprefix("FSDP")  # of sharded models
    groups = made_up_groups(model)
    (microbatch,) = pack_examples(groups, max_tokens=10**9, device=model.device)
    try:
        with attention(model, "eager"), readable_errors():
            microbatch, expected = _eager_logprobs(model, groups, microbatch)
    except ValueError as error:
        raise ConfigError([f"model.path: {path}: {name} cannot compute log-probs: {error}"]) from error
    config = model.config.get_text_config()
    packed = Forward(
        plain_head=_try_plain_head(model),
        rope_limit=rope_change(config, "longrope"),
        max_length=rope_change(config, "dynamic"),
    )
    unpacked = replace(packed, packed=False)
    ways = [(packed, packed_attention), (unpacked, packed_attention), (unpacked, "eager")]
    reason = ""
    if depends_on_row(model):
        ways, reason = ways[1:], "its queries are scaled by their place in the row"
    for forward, implementation in ways:
        set_forward(model, forward)
        with attention(model, implementation):
            problem = _difference(model, microbatch, expected)
        if problem is None:
            return replace(forward, note=_note(name, forward, reason)), implementation
        reason = reason or problem
    raise ConfigError(
        [f"model.path: {path}: {name} is not supported: its log-probs are not those of eager attention ({reason})"]
    )


def _note(name: str, forward: Forward, reason: str) -> str:
    notes = []
    if not forward.packed:
        notes.append(f"packed attention does not reproduce {name} ({reason}): training unpacked, which is slower")
    elif forward.rope_limit is not None:
        notes.append(
            f"RoPE of {name} changes at {forward.rope_limit} tokens: a microbatch with shorter and longer sequences is "
            "trained unpacked"
        )
    if not forward.plain_head:
        notes.append(f"log-probs of {name} go through its own LM head")
    return "; ".join(notes)


def made_up_groups(model: PreTrainedModel) -> list[TrainGroup[TokenSequence]]:
    """Return prompts of random tokens with several completions each, as long as the model's context allows."""
    config = model.config.get_text_config()
    special = {
        value
        for c in (model.config, config)
        for name, value in c.to_dict().items()
        if "token" in name and isinstance(value, int)
    }
    ordinary = torch.tensor([i for i in range(min(config.vocab_size, 32768)) if i not in special])
    limits = (getattr(config, "max_position_embeddings", None), rope_change(config, "dynamic"))
    context = min((limit for limit in limits if limit is not None), default=10**9)
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(ordinary[torch.randint(len(ordinary), (count,), generator=generator)].tolist())

    return [
        TrainGroup(
            prompt=Prompt(token_ids=draw(max(1, min(prompt, context - max(completions))))),
            sequences=tuple(TokenSequence(token_ids=draw(count)) for count in completions),
        )
        for prompt, completions in LENGTHS
    ]


def _eager_logprobs(
    model: PreTrainedModel, groups: Sequence[TrainGroup[TokenSequence]], microbatch: Microbatch
) -> tuple[Microbatch, Tensor]:
    """Compute each sequence by itself. Return the microbatch with the most likely tokens as targets, and log-probs."""
    rows = []
    for group in groups:
        for sequence in group.sequences:
            ids = torch.tensor([group.prompt.token_ids + sequence.token_ids[:-1]], device=model.device)
            logits = model(input_ids=ids, use_cache=False).logits[0, -len(sequence.token_ids) :].float()
            rows.append(torch.log_softmax(logits, dim=-1).max(-1))
    targets = torch.cat([row.indices for row in rows])
    return replace(microbatch, target_ids=targets), torch.cat([row.values for row in rows])


def _difference(model: PreTrainedModel, microbatch: Microbatch, expected: Tensor) -> str | None:
    """Return what is wrong with the log-probs of the microbatch, if anything."""
    try:
        with readable_errors():
            logprobs, _ = parallel.logprobs(model, microbatch, temperature=1.0)
    except ValueError as error:
        return str(error)
    gap = (logprobs - expected).abs()
    if torch.quantile(gap, RIGHT_IN_MIXTURES if is_mixture(model) else 1.0).item() <= TOLERANCE:
        return None
    return f"log-probs differ by up to {gap.max().item():.2g}"


def _try_plain_head(model: PreTrainedModel) -> bool:
    try:
        with readable_errors():
            return is_plain_head(model)
    except ValueError:
        return True  # the comparison of log-probs decides


def depends_on_row(model: PreTrainedModel) -> bool:
    """Whether queries are scaled by their place in the row, from ``floor_scale`` tokens on (Llama 4)."""
    config = model.config.get_text_config()
    return bool(getattr(config, "attn_temperature_tuning", False)) and hasattr(config, "floor_scale")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Turn errors of modelling code that meets an unknown argument into ValueErrors of one short line."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except CODE_ERRORS as error:
        text = " ".join(str(error).split())[:150]
        what = "" if isinstance(error, ValueError) else f"its code fails with {type(error).__name__}: "
        raise ValueError(f"{what}{text}") from error
