"""Which weights get LoRA adapters, and the translation of the config section ``lora`` into peft's class."""

from __future__ import annotations

import re
from collections.abc import Sequence

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer, ParamWrapper
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rolltune.config.schema import LoRAConfig
from rolltune.model.load import unwrapped
from rolltune.model.parts import text_decoder
from rolltune.model.quantized import num_weights

try:
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
except ImportError:  # older versions of peft rewrite nothing
    convert_peft_config_for_transformers = None

# peft refuses adapters on out_proj of these: Mamba's kernels read its weight without calling the layer.
MAMBA_TYPES = ("falcon_h1", "mamba", "mamba2", "falcon_mamba", "nemotron_h")


def lora_modules(model: PreTrainedModel, target_modules: str) -> list[str]:
    """Return the names of the modules that ``lora.target_modules`` stands for, all of them in the text model.

    Args:
        model: without adapters; may be on the meta device.
        target_modules: "all-linear", for all linear layers but the LM head and routers, or ends of module names, split
            by commas.

    Raises:
        ValueError: a name is the end of no module's name, or that of the LM head; or peft can adapt none of them.
    """
    text = {id(module) for module in text_decoder(model).modules()}
    head = model.get_output_embeddings()
    if target_modules == "all-linear":
        layers = {name: model.get_submodule(name) for name in _linear_layers(model)}
        found = {name: m for name, m in layers.items() if _can_adapt(name, m, model)}
    else:
        found = {}
        for target in _split(target_modules):
            modules = _named(model, target)
            if not modules:
                leaves = {name.rpartition(".")[2] for name in _linear_layers(model)}
                raise ValueError(f"lora.target_modules: {target}; the model has {', '.join(sorted(leaves))}")
            if any(m is head for m in modules.values()):
                raise ValueError(
                    f"lora.target_modules: {target}; an adapter on the LM head is not supported; leave it out"
                )
            found |= modules
    try:
        kept = _kept_by_peft(model, [name for name, m in found.items() if id(m) in text])
    except ValueError as error:
        raise ValueError(f"lora.target_modules: {target_modules}: {error}") from error
    if not kept:
        raise ValueError(f"lora.target_modules: {target_modules}; peft can adapt none of these layers of the model")
    return kept


def _split(target_modules: str) -> list[str]:
    return [name.strip() for name in target_modules.split(",")]


def _named(model: PreTrainedModel, target: str) -> dict[str, nn.Module]:
    """Return the modules whose names end with ``target``."""
    return {name: m for name, m in model.named_modules() if f".{name}".endswith(f".{target}")}


def _kept_by_peft(model: PreTrainedModel, names: Sequence[str]) -> list[str]:
    """Leave out layers whose names peft would take for those of experts.

    In some mixture-of-experts models it rewrites names such as gate_proj, also those of dense layers beside the
    experts, so that old adapters load.
    """
    if convert_peft_config_for_transformers is None:
        return list(names)
    config = LoraConfig(target_modules=list(names))
    convert_peft_config_for_transformers(config, model, None)
    return [name for name in names if name in (config.target_modules or ())]


def _linear_layers(model: PreTrainedModel) -> list[str]:
    """Return the names of the layers that peft calls all-linear."""
    head = model.get_output_embeddings()
    return [name for name, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D) and m is not head]


def _can_adapt(name: str, layer: nn.Module, model: PreTrainedModel) -> bool:
    """Whether LoRA fits a linear layer: not a router, which returns more than a product, nor what peft refuses."""
    if model.config.model_type in MAMBA_TYPES and name.endswith(".out_proj"):
        return False
    if type(layer) in (nn.Linear, Conv1D):
        return True
    with torch.no_grad():
        inputs = torch.zeros(1, layer.in_features, dtype=model.dtype, device=layer.weight.device)  # pyright: ignore
        return isinstance(layer(inputs), Tensor)


def lora_config(lora: LoRAConfig, model: PreTrainedModel, wanted: Sequence[str]) -> LoraConfig:
    """Translate the config section ``lora`` into peft's class; ``wanted`` are the names of the layers."""
    experts = expert_parameters(model)
    if lora.experts and not experts:
        raise ValueError(f"lora.experts: true; {type(model).__name__} has no experts that peft can adapt; leave it out")
    if lora.experts and lora.dropout > 0:
        raise ValueError(
            f"lora.dropout: {lora.dropout}; must be 0 with lora.experts: true, whose adapters have no dropout"
        )
    if lora.target_modules == "all-linear":
        targets, meant = "all-linear", _linear_layers(model)
    else:
        targets = _split(lora.target_modules)
        meant = [name for target in targets for name in _named(model, target)]
    if experts or set(meant) != set(wanted):  # with experts, peft would adapt more than it is asked for
        targets = list(wanted)
    return LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # pyright: ignore[reportArgumentType]  peft divides it by the rank, so a float works
        lora_dropout=lora.dropout,
        target_modules=targets,
        target_parameters=experts if lora.experts else None,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        task_type="CAUSAL_LM",
    )


def expert_parameters(model: PreTrainedModel) -> list[str]:
    """Return the names of the weights of experts: three-dimensional parameters, one matrix an expert."""
    text = {id(parameter) for parameter in text_decoder(model).parameters()}
    convolutions = {id(m.weight) for m in model.modules() if isinstance(m, nn.Conv1d)}
    return [
        name
        for name, parameter in model.named_parameters()
        if parameter.ndim == 3 and id(parameter) in text and id(parameter) not in convolutions
    ]


def about_adapters(model: PeftModel | PreTrainedModel, lora: LoRAConfig) -> str:
    """Return a line about the layers that all-linear stands for, and the matrices that it leaves out, if any matter."""
    causal_lm = unwrapped(model)
    if lora.target_modules != "all-linear":
        return ""
    layers = [n for n, m in causal_lm.named_modules() if is_adapted(m) and not isinstance(m, ParamWrapper)]
    kinds = sorted({name.rpartition(".")[2] for name in layers})
    said = f"lora: all-linear adapts {len(layers)} layers: {', '.join(kinds)}"
    ends = (causal_lm.get_input_embeddings(), causal_lm.get_output_embeddings())
    embeddings = {id(module.weight) for module in ends if module is not None}
    sizes: dict[str, int] = {}  # of matrices without an adapter, by name without the number of the layer
    total, has_experts = 0, False
    for name, parameter in text_decoder(causal_lm).named_parameters():
        if ".lora_" in name or name.endswith("bias") or parameter.ndim < 2 or id(parameter) in embeddings:
            continue
        total += num_weights(parameter)
        if ".base_layer." not in name:
            short = re.sub(r"^.*\.\d+\.", "", name.removesuffix(".weight"))
            sizes[short] = sizes.get(short, 0) + num_weights(parameter)
            has_experts |= parameter.ndim == 3 and "experts" in name
    share = sum(sizes.values()) / max(1, total)
    if share < 0.01:
        return said
    largest = sorted(sizes, key=lambda name: -sizes[name])
    names = ", ".join(largest[:4]) + (", ..." if len(largest) > 4 else "")
    remedy = "; lora.experts: true adapts experts" if has_experts else ""
    return f"{said}; {share:.0%} of the weights have no adapter: {names}{remedy}"


def check_adapter(model: PeftModel, lora: LoRAConfig, wanted: Sequence[str], path: str) -> None:
    """Raise ValueError unless a loaded adapter has the rank, alpha and layers that the config gives."""
    loaded = model.peft_config["default"]
    if (loaded.r, float(loaded.lora_alpha)) != (lora.rank, float(lora.alpha)):  # pyright: ignore[reportAttributeAccessIssue]
        raise ValueError(
            f"lora: rank {lora.rank}, alpha {lora.alpha}; the adapter at {path} has rank {loaded.r}, "  # pyright: ignore[reportAttributeAccessIssue]
            f"alpha {loaded.lora_alpha}; give the same values"  # pyright: ignore[reportAttributeAccessIssue]
        )
    for key, is_loaded in (("rslora", loaded.use_rslora), ("dora", loaded.use_dora)):  # pyright: ignore
        if is_loaded != getattr(lora, key):
            raise ValueError(
                f"lora.{key}: {str(not is_loaded).lower()}; the adapter at {path} was trained with "
                f"{str(is_loaded).lower()}; give the same value"
            )
    has_experts = bool(loaded.target_parameters)  # pyright: ignore[reportAttributeAccessIssue]
    if has_experts != lora.experts:
        raise ValueError(
            f"lora.experts: {str(lora.experts).lower()}; the adapter at {path} is {'' if has_experts else 'not '}on "
            "experts; give the same value"
        )
    layers = unwrapped(model).named_modules()
    adapted = {name for name, module in layers if is_adapted(module) and not isinstance(module, ParamWrapper)}
    if adapted != set(wanted):
        names = ", ".join(sorted({name.rpartition(".")[2] for name in adapted}))
        raise ValueError(
            f"lora.target_modules: {lora.target_modules}; stands for {len(wanted)} layers of the model, but the "
            f"adapter at {path} is on {len(adapted)} ({names}); name the same layers"
        )


def is_adapted(module: nn.Module) -> bool:
    return isinstance(module, LoraLayer) and "default" in module.lora_dropout


def set_dropout(model: PeftModel, probability: float) -> None:
    """Give a loaded adapter the config's dropout: how it was trained before says nothing about this run."""
    model.peft_config["default"].lora_dropout = probability  # pyright: ignore[reportAttributeAccessIssue]
    for module in model.modules():
        if is_adapted(module):
            module.lora_dropout["default"] = nn.Dropout(probability) if probability > 0 else nn.Identity()  # pyright: ignore
