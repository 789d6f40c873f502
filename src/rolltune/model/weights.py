"""Export the policy's weights to an inference engine: Hugging Face names, LoRA merged, one tensor at a time."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel

from rolltune.model.load import unwrapped


@torch.no_grad()
def policy_weights(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under its name in a checkpoint of the full model.

    A LoRA layer yields ``W + scale * B @ A``, added in fp32 and rounded once. Tied weights come once, under the name of
    the input embeddings. At most one merged tensor exists at a time.

    Args:
        model: the policy, wrapped by peft or not; its active adapter is merged.
        dtype: dtype of the tensors. Weights that have it already are yielded without a copy.

    Raises:
        ValueError: an adapter cannot be merged, see :func:`check_mergeable`.
    """
    check_mergeable(model)
    causal_lm = unwrapped(model)
    adapted = {name: module for name, module in causal_lm.named_modules() if isinstance(module, LoraLinear)}
    for name, parameter in causal_lm.named_parameters():
        if ".lora_" in name:
            continue
        owner, _, last = name.rpartition(".base_layer.")
        if owner not in adapted:
            yield name, parameter.detach().to(dtype)
        elif last == "weight":
            yield f"{owner}.weight", _merged(adapted[owner], parameter).to(dtype)
        else:
            yield f"{owner}.{last}", parameter.detach().to(dtype)


def check_mergeable(model: PreTrainedModel | PeftModel) -> None:
    """Raise ValueError if an adapter is not plain LoRA on a linear layer, the only kind that is merged here."""
    for name, module in unwrapped(model).named_modules():
        if why := _not_mergeable(module):
            raise ValueError(
                f"lora: {name}: {why} cannot be merged for vLLM; use rolltune.samplers.native.NativeSampler"
            )


def _not_mergeable(module: torch.nn.Module) -> str | None:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return f"a module that peft trains besides LoRA ({type(module).__name__})"
    if not isinstance(module, BaseTunerLayer):
        return None
    if type(module) is not LoraLinear:
        return f"{type(module).__module__}.{type(module).__name__}"
    for adapter in module.active_adapters:
        if variant := module.lora_variant.get(adapter):
            return f"a variant of LoRA ({type(variant).__name__.removesuffix('LinearVariant')})"
        if module.lora_bias.get(adapter):
            return "a LoRA bias"
    return None


def weight_shapes(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> list[tuple[str, torch.dtype, torch.Size]]:
    """Return name, dtype and shape of the tensors of :func:`policy_weights`, in its order, without merging."""
    causal_lm = unwrapped(model)
    return [
        (name.replace(".base_layer.", "."), dtype, parameter.shape)
        for name, parameter in causal_lm.named_parameters()
        if ".lora_" not in name
    ]


def _merged(layer: LoraLinear, weight: Tensor) -> Tensor:
    merged = weight.detach().float()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            merged = merged + layer.get_delta_weight(adapter).float()
    return merged


def tied_names(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """Return {name of a tied head's weight: name of the embeddings' weight}; empty if the head is not tied."""
    causal_lm = unwrapped(model)
    head, embeddings = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return {}
    names = {module: name for name, module in causal_lm.named_modules()}
    return {f"{names[head]}.weight": f"{names[embeddings]}.weight"}
