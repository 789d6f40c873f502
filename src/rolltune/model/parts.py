"""The parts of a causal LM, found by structure: names and prefixes differ between families."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedModel


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


def _configs(model: PreTrainedModel) -> list:
    return list({id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values())
