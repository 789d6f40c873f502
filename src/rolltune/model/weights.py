"""Export the policy's weights to an inference engine: those of a checkpoint, with LoRA merged, one layer at a time."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from itertools import chain, groupby
from typing import TypeGuard

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from rolltune.model.load import unwrapped
from rolltune.model.quantized import decoded, is_quantized


def policy_weights(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield every weight under the name and in the layout that it has in a checkpoint of the full model.

    Modelling code may keep weights in another layout, such as all experts of a layer in one tensor. transformers
    converts them back, as it does in ``save_pretrained``. Persistent buffers are weights too.

    A LoRA layer yields ``W + scale * B @ A``, added in fp32 and rounded once; with DoRA its norms are the adapter's.
    Tied weights come once. The merged and converted tensors of at most one layer exist at a time.

    Args:
        model: the policy, wrapped by peft or not; its active adapter is merged.
        dtype: dtype of the tensors. Weights that have it already are yielded without a copy. Buffers, and parameters
            that the model keeps in another precision than its own (such as fp32 routers), keep theirs.

    Raises:
        ValueError: an adapter cannot be merged, see :func:`check_mergeable`.
    """
    check_mergeable(model)
    yield from _exported(model, dtype, lambda tensor: tensor)


def base_weights(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield what :func:`policy_weights` does for the base model, without its adapters."""
    yield from _exported(model, dtype, lambda tensor: tensor, merge=False)


def weight_shapes(model: PreTrainedModel | PeftModel, dtype: torch.dtype) -> list[tuple[str, torch.dtype, torch.Size]]:
    """Return name, dtype and shape of the tensors of :func:`policy_weights`, in its order, without merging."""
    exported = _exported(model, dtype, lambda tensor: tensor.to("meta"))
    return [(name, tensor.dtype, tensor.shape) for name, tensor in exported]


@torch.no_grad()
def _exported(
    model: PreTrainedModel | PeftModel,
    dtype: torch.dtype,
    prepare: Callable[[Tensor], Tensor],
    *,
    merge: bool = True,
) -> Iterator[tuple[str, Tensor]]:
    """Yield the converted weights of each layer in turn, each tensor passed through ``prepare`` first."""
    causal_lm = unwrapped(model)
    layers = causal_lm.named_modules() if merge else ()
    adapted = {f"{name}.weight": module for name, module in layers if is_lora(module)}
    quantized = _quantized_layers(causal_lm)
    for _, layer in groupby(_stored_tensors(causal_lm), key=lambda item: _layer(item[0])):
        tensors: dict[str, Tensor] = {}
        for name, tensor in layer:
            stored = decoded(quantized[name]) if name in quantized else tensor
            is_cast = isinstance(tensor, torch.nn.Parameter) and stored.dtype == causal_lm.dtype
            value = prepare(stored.detach())
            if name in adapted and not value.is_meta:
                value = _merged(adapted[name], value)
            tensors[name] = value.to(dtype if is_cast else stored.dtype)
        yield from revert_weight_conversion(causal_lm, tensors).items()


def _stored_tensors(causal_lm: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield the parameters and buffers of a checkpoint, under the names of the modelling code, without adapters."""
    stored = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in _state(causal_lm)
        if ".lora_" not in name and name not in (causal_lm._keys_to_ignore_on_save or ())
    }
    yield from remove_tied_weights_from_state_dict(stored, causal_lm).items()


def _state(model: PreTrainedModel) -> Iterator[tuple[str, Tensor]]:
    """Yield what ``model.state_dict()`` holds, which would cut gathered weights into slices again."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if tensor is not None and name not in module._non_persistent_buffers_set:
                yield f"{path}.{name}" if path else name, tensor


def _quantized_layers(causal_lm: PreTrainedModel) -> dict[str, torch.nn.Module]:
    """Return the layers whose weights are stored in 4 bits, by the weight's name without adapters."""
    return {
        f"{name.removesuffix('.base_layer')}.weight": module
        for name, module in causal_lm.named_modules()
        if is_quantized(module)
    }


def _layer(name: str) -> str:
    """Return the part of a weight's name up to the number of its layer; the empty string outside of layers."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else ""


def check_mergeable(model: PreTrainedModel | PeftModel) -> None:
    """Raise ValueError if an adapter is neither LoRA nor DoRA on linear layers, the only kinds that are merged here."""
    for name, why in adapter_problems(model):
        raise ValueError(f"lora: {name}: {why} cannot be merged for vLLM; use rolltune.samplers.native.NativeSampler")


def adapter_problems(model: PreTrainedModel | PeftModel) -> Iterator[tuple[str, str]]:
    """Yield name and kind of each module with an adapter that is neither LoRA nor DoRA on an untied linear layer."""
    causal_lm = unwrapped(model)
    embeddings = causal_lm.get_input_embeddings()
    for name, module in causal_lm.named_modules():
        why = _problem(module)
        if isinstance(module, LoraLinear) and module.weight is embeddings.weight:
            why = "a head that is tied to the embeddings"
        if why:
            yield name, why


def _problem(module: torch.nn.Module) -> str | None:
    if isinstance(module, AuxiliaryTrainingWrapper):
        return f"a module that peft trains besides LoRA ({type(module).__name__})"
    if not isinstance(module, BaseTunerLayer):
        return None
    if not is_lora(module):
        return f"{type(module).__module__}.{type(module).__name__}"
    for adapter in module.active_adapters:
        variant = module.lora_variant.get(adapter)
        if variant and not isinstance(variant, DoraLinearVariant):
            return f"a variant of LoRA ({type(variant).__name__.removesuffix('LinearVariant')})"
        if module.lora_bias.get(adapter):
            return "a LoRA bias"
    return None


def is_lora(module: torch.nn.Module) -> TypeGuard[LoraLinear]:
    """Whether a module is LoRA on a linear layer, whose weight may be stored in 4 bits."""
    return type(module) is LoraLinear or (isinstance(module, LoraLayer) and is_quantized(module.get_base_layer()))


def is_dora(layer: LoraLinear) -> bool:
    return any(isinstance(layer.lora_variant.get(name), DoraLinearVariant) for name in layer.active_adapters)


def _merged(layer: LoraLinear, weight: Tensor) -> Tensor:
    merged = weight.float()
    for adapter in layer.active_adapters:
        if adapter in layer.lora_A:
            merged = merged + layer.get_delta_weight(adapter).float()
            if is_dora(layer):  # arXiv 2402.09353: a trained norm for each output
                merged = merged * _dora_factors(layer, adapter, merged)
    return merged


def _dora_factors(layer: LoraLinear, adapter: str, merged: Tensor) -> Tensor:
    """Return what each output's weights are multiplied by, to have the adapter's norm: [out, 1], or [1, out]."""
    inputs = 0 if layer.fan_in_fan_out else 1  # dimension
    magnitude = layer.lora_magnitude_vector[adapter].weight.float()
    return magnitude.unsqueeze(inputs) / torch.linalg.norm(merged, dim=inputs, keepdim=True)  # pyright: ignore


def tied_names(model: PreTrainedModel | PeftModel) -> dict[str, str]:
    """Return {name of a tied head's weight: name of the embeddings' weight} in a checkpoint; empty if not tied."""
    causal_lm = unwrapped(model)
    head, embeddings = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    if head is None or head.weight is not embeddings.weight:
        return {}
    names = {module: f"{name}.weight" for name, module in causal_lm.named_modules()}
    nothing = torch.empty(0, device="meta")
    (head_name,), (embeddings_name,) = (
        revert_weight_conversion(causal_lm, {names[module]: nothing}) for module in (head, embeddings)
    )
    return {head_name: embeddings_name}
