"""Export a LoRA adapter to an engine that keeps it apart from the base model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from rolltune.model.load import unwrapped
from rolltune.model.weights import adapter_problems, is_dora, is_lora

A, B = ".lora_A.weight", ".lora_B.weight"  # ends of the names of an adapter's matrices


def adapted_layers(model: PreTrainedModel | PeftModel) -> dict[str, LoraLinear]:
    """Return the layers that have an adapter, by the names that they have in a checkpoint.

    Raises:
        ValueError: the model has no adapter, or one of a kind that vLLM does not serve.
    """
    merged = "set sampler.lora: merged"
    if not isinstance(model, PeftModel):
        raise ValueError(f"sampler.lora: adapter; the model has no adapter; add a lora section, or {merged}")
    for name, why in adapter_problems(model):
        raise ValueError(
            f"sampler.lora: adapter; {name}: {why} is not supported; use rolltune.samplers.native.NativeSampler"
        )
    causal_lm = unwrapped(model)
    layers = {}
    for name, layer in causal_lm.named_modules():
        if not is_lora(layer):
            continue
        if is_dora(layer):
            raise ValueError(f"sampler.lora: adapter; {name}: vLLM does not serve DoRA; {merged}")
        names = list(revert_weight_conversion(causal_lm, {f"{name}.weight": layer.weight.detach().to("meta")}))
        if len(names) != 1 or not names[0].endswith(".weight"):
            raise ValueError(f"sampler.lora: adapter; {name}: is not one linear layer in a checkpoint; {merged}")
        layers[names[0].removesuffix(".weight")] = layer
    return layers


def adapter_rank(layers: Mapping[str, LoraLinear]) -> int:
    """Return the largest rank of the active adapter's matrices."""
    return max(layer.r[name] for layer in layers.values() for name in layer.active_adapters)


@torch.no_grad()
def adapter_weights(layers: Mapping[str, LoraLinear], dtype: torch.dtype) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices A [R, in] and B [out, R] of each layer's active adapter, named as peft names them.

    B contains the adapter's scale (alpha / R, or alpha / sqrt(R) for rsLoRA), multiplied in fp32 and rounded once. So
    an engine that adds B @ A @ x needs no scale of its own.
    """
    for name, layer in layers.items():
        (adapter,) = layer.active_adapters
        yield name + A, layer.lora_A[adapter].weight.detach().to(dtype)  # pyright: ignore[reportCallIssue]
        b = layer.lora_B[adapter].weight.detach().float()  # pyright: ignore[reportCallIssue]
        yield name + B, (b * layer.scaling[adapter]).to(dtype)
