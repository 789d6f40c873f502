"""Estimates of tokens and memory, made before any weight is loaded."""

from __future__ import annotations

import math
import re
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rolltune.config.schema import Component, GRPOConfig, LoRAConfig, ModelConfig, SFTConfig
from rolltune.errors import ConfigError
from rolltune.model.load import DTYPES, empty_model, load_config
from rolltune.model.logprobs import CHUNK_BYTES
from rolltune.model.lora import expert_parameters, lora_modules
from rolltune.model.quantized import NF4_BYTES
from rolltune.run.checkpoint import free_bytes

GIB = 2**30


def count_parameters(config, lora: LoRAConfig | None = None) -> tuple[int, int]:
    """Return the number of parameters, and the summed features (in and out) of the matrices that LoRA adapts.

    Both come from the shapes; no weight is loaded.
    """
    model = empty_model(config)
    features = 0
    if lora is not None:
        weights = [model.get_parameter(f"{name}.weight") for name in lora_modules(model, lora.target_modules)]
        features = sum(sum(weight.shape) for weight in weights)  # [out, in], or [in, out] in a Conv1D
        experts = [model.get_parameter(name) for name in expert_parameters(model)] if lora.experts else []
        features += sum(len(weight) * sum(weight.shape[1:]) for weight in experts)
    return sum(p.numel() for p in model.parameters()), features


def count_linear(config) -> int:
    """Return the number of weights of linear layers but the LM head, those that ``model.quantization`` stores."""
    model = empty_model(config)
    head = model.get_output_embeddings()
    return sum(m.weight.numel() for m in model.modules() if type(m) is torch.nn.Linear and m is not head)


def estimate_memory(
    model: ModelConfig,
    lora: LoRAConfig | None,
    *,
    microbatch_tokens: int,
    kv_tokens: int,
    with_reference: bool,
    rearranged_copy: bool = False,
    optimizer: str = "AdamW",
) -> dict[str, float]:
    """Estimate the memory of one process in GiB, by part. Activations are rough (about +-30 %), the rest is counted.

    Args:
        model: the policy.
        lora: its adapters; None for full training.
        microbatch_tokens: tokens in one forward and backward pass.
        kv_tokens: tokens whose keys and values are held while sampling, at most.
        with_reference: whether the loss has a KL term, which needs a frozen reference.
        rearranged_copy: whether the sampler holds a second copy of the weights (on CPUs, in the layout of oneDNN).
        optimizer: its component; taken for AdamW, with moments in 8 or 4 bits where the name says so.
    """
    config = load_config(model.path)
    text = config.get_text_config()
    size = torch.finfo(DTYPES[model.dtype]).bits // 8
    parameters, linear_features = count_parameters(config, lora)
    quantized = count_linear(config) if model.quantization else 0
    weights = (parameters - quantized) * size + quantized * NF4_BYTES
    trained = lora.rank * linear_features if lora else parameters
    trained_size = 4 if lora or model.master_weights else size
    bits = re.search(r"([48])bit", optimizer)
    moment_size = int(bits[1]) / 8 if bits else trained_size
    heads = _size(text, "num_attention_heads", default=1)
    head_dim = _size(text, "head_dim", default=text.hidden_size // heads)
    kv_width = head_dim * _size(text, "num_key_value_heads", default=heads)
    # Kept for the backward pass per layer: norms, q, k, v, attention output, residuals; gate, up, their product.
    layer = 8 * text.hidden_size + 2 * kv_width + 4 * _size(text, "intermediate_size", default=4 * text.hidden_size)
    layers = text.num_hidden_layers
    per_token = text.hidden_size * layers + layer if model.gradient_checkpointing else layer * layers
    parts = {
        "weights": weights + (trained * 4 if lora else 0),
        "gradients": trained * trained_size,
        "optimizer's moments": 2 * trained * moment_size,
        "fp32 master weights": trained * 4 if model.master_weights else 0,
        "frozen reference": weights if with_reference and not lora else 0,
        "activations of a microbatch": per_token * microbatch_tokens * size,
        "LM head in fp32": text.vocab_size * text.hidden_size * 4 if model.fp32_head else 0,
        "logits of a chunk": 3 * CHUNK_BYTES["cuda" if torch.cuda.is_available() else "cpu"],
        "keys and values while sampling": 2 * kv_width * layers * kv_tokens * size,
        "rearranged weights while sampling": (parameters - quantized) * size if rearranged_copy else 0,
    }
    return {name: value / GIB for name, value in parts.items() if value}


def _size(config, name: str, *, default: int) -> int:
    """Return a size from a config; the default where the family has no such size, or one for each layer."""
    value = getattr(config, name, None)
    return value if isinstance(value, int) and value > 0 else default


def check_disk(cfg: GRPOConfig | SFTConfig) -> None:
    """Raise ConfigError if the disk of ``output_dir`` has no room for the checkpoints that a run keeps.

    These are the last ones, the best, and one that is being written. The optimizer is taken for AdamW.
    """
    parameters, linear_features = count_parameters(load_config(cfg.model.path), cfg.lora)
    trained = cfg.lora.rank * linear_features if cfg.lora else parameters
    weight_bytes = 4 if cfg.lora else torch.finfo(DTYPES[cfg.model.dtype]).bits // 8
    one = trained * (weight_bytes + 8 + (4 if cfg.model.master_weights else 0))
    saves = math.ceil(cfg.num_steps / cfg.checkpoint.every_n_steps)
    count = min(cfg.checkpoint.keep_last + 2, saves + 1)
    folder = Path(cfg.output_dir) / "checkpoints"
    there = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    free = free_bytes(folder)
    if count * one - there > free:
        raise ConfigError(
            [
                f"output_dir: {cfg.output_dir}: {count} checkpoints of about {one / GIB:.2f} GiB do not fit; "
                f"{free / GIB:.2f} GiB are free: lower checkpoint.keep_last, or choose a folder on another disk"
            ]
        )


def engine_memory(model: ModelConfig, sampler: Component) -> dict[str, float] | None:
    """Estimate the memory of vLLM in the training process, in GiB.

    Args:
        model: the policy.
        sampler: the config's sampler node.

    Returns:
        Empty if vLLM runs in other processes; None if the sampler is not vLLM.
    """
    path = "rolltune.samplers.vllm."
    if not sampler["_component_"].startswith(path):
        return None
    if sampler["_component_"] != f"{path}colocated":
        return {}
    parameters, _ = count_parameters(load_config(model.path))
    size = torch.finfo(DTYPES[sampler.get("dtype") or model.dtype]).bits // 8
    return {
        "vLLM's weights while sampling": parameters * size / GIB,
        "vLLM's keys and values while sampling": float(sampler.get("kv_cache_gib", 4.0)),
    }


def print_memory(parts: dict[str, float], console: Console) -> None:
    """Print the parts and their peak."""
    table = Table("memory of one process", "GiB", show_edge=False, pad_edge=False)
    for name, gib in parts.items():
        table.add_row(name, f"{gib:.2f}")
    table.add_row("peak (approximate)", f"{peak(parts):.2f}")
    console.print(table)


def peak(parts: dict[str, float]) -> float:
    """Return the most memory that is held at a time. Sampling and training alternate, so only the larger one counts."""
    sampling = sum(gib for name, gib in parts.items() if name.endswith("while sampling"))
    return sum(parts.values()) - min(parts["activations of a microbatch"], sampling)
