"""The parts of a causal LM, found by structure, and its context. Names and prefixes differ between families."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rolltune.model.quantized import is_quantized


def decoder(model: PreTrainedModel) -> PreTrainedModel:
    """Return the part of a causal LM that turns tokens into hidden states: the child with the input embeddings."""
    embeddings = model.get_input_embeddings()
    for child in model.children():
        if child is not embeddings and any(module is embeddings for module in child.modules()):
            assert isinstance(child, PreTrainedModel)
            return child
    raise ValueError(f"{type(model).__name__} has no decoder that could run without its LM head")


def text_decoder(model: PreTrainedModel) -> nn.Module:
    """Return the decoder of the text, without a multimodal model's other parts."""
    found = model.get_decoder()
    return decoder(model) if found is None or found is model else found


def set_attention(model: PreTrainedModel, name: str) -> None:
    """Select an attention implementation in every part of a model."""
    for config in _configs(model):
        config._attn_implementation = name


@contextmanager
def attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Select an attention implementation until the context ends."""
    # Parts of a composite model have their own configs; setting the attention of the whole would set it in all.
    before = [(config, config._attn_implementation) for config in _configs(model)]
    set_attention(model, name)
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


@contextmanager
def in_float32(model: PreTrainedModel) -> Iterator[None]:
    """Compute in float32 whatever the precision of the weights, until the context ends.

    Values in half precision are float32 values, so nothing is lost. One layer is held in float32 at a time, besides the
    embeddings and the head.
    """
    half = model.dtype
    if half == torch.float32:
        yield
        return

    def tensors(module: nn.Module) -> list[Tensor]:
        return [tensor for tensor in chain(module.parameters(), module.buffers()) if tensor.dtype == half]

    def cast(some: Iterable[Tensor]) -> None:
        for tensor in some:
            tensor.data = tensor.data.float()

    def restore(some: Iterable[Tensor]) -> None:  # the same memory, which FSDP gathers weights into
        for tensor in some:
            tensor.data = stored[id(tensor)]

    def set_products(dtype: torch.dtype) -> None:
        for module in filter(is_quantized, model.modules()):
            module.compute_dtype = dtype  # pyright: ignore[reportArgumentType]

    everything = tensors(model)
    stored = {id(tensor): tensor.data for tensor in everything}
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    by_layer = {layer: tensors(layer) for layer in layers}
    in_layers = {id(tensor) for own in by_layer.values() for tensor in own}
    hooks = []
    for layer, own in by_layer.items():
        hooks.append(layer.register_forward_pre_hook(lambda *_, own=own: cast(own)))
        hooks.append(layer.register_forward_hook(lambda *_, own=own: restore(own)))
    try:
        cast(tensor for tensor in everything if id(tensor) not in in_layers)
        set_products(torch.float32)
        yield
    finally:
        for hook in hooks:
            hook.remove()
        restore(everything)
        set_products(half)


def is_mixture(model: PreTrainedModel) -> bool:
    """Whether the model has experts, of which a router chooses."""
    return any(name.endswith("experts") for name, _ in model.named_modules())


def _configs(model: PreTrainedModel) -> list:
    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())


def rope_change(config: PreTrainedConfig, kind: str) -> int | None:
    """Return the length beyond which RoPE's frequencies follow from the longest sequence of a batch.

    Args:
        config: of a text model.
        kind: "longrope", which then has one other set of frequencies, or "dynamic", which has one for each length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    by_layer = rope.values() if rope and all(isinstance(value, dict) for value in rope.values()) else [rope]
    if not any(parameters.get("rope_type") == kind for parameters in by_layer):
        return None
    lengths = [parameters.get("original_max_position_embeddings") for parameters in by_layer]
    original = getattr(config, "original_max_position_embeddings", None) or config.max_position_embeddings
    return min((length for length in lengths if length), default=original)
