"""Frozen weights in 4 bits under LoRA adapters: QLoRA (arXiv 2305.14314), with bitsandbytes.

The weights of all linear layers but the LM head are stored as NF4, in blocks of 64 whose scales are quantised too, so a
weight takes 4.13 bits. They are decoded to the model's own precision for each product. Trainer, reference and native
sampler use the same decoded weights, and vLLM gets them with the adapter merged.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rolltune.errors import ConfigError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

_NOTE = "quantization.json"
NF4_BYTES = 0.5 + (1 + 4 / 256) / 64  # a weight: 4 bits; a block of 64: a byte; 256 blocks: a float32


def nf4_config(dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the setting with which transformers loads a model in NF4.

    Args:
        dtype: of the decoded weights and of the matrix products.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    from transformers import BitsAndBytesConfig

    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            ['model.quantization: nf4; bitsandbytes is not installed; run `pip install "rolltune[qlora]"`']
        )
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def keep_layout(model: nn.Module) -> None:
    """Keep weights as they were stored. On some CPUs the first forward pass would repack them for products in bfloat16.

    Later passes would then round differently, and so would other machines.
    """
    for module in model.modules():
        if is_quantized(module):
            module.support_avx512bf16_for_cpu = False  # pyright: ignore[reportArgumentType]


def note_quantization(folder: Path) -> None:
    """Note beside a saved adapter that it was trained on weights in 4 bits, which peft does not record."""
    (folder / _NOTE).write_text('{"base_model": "nf4"}\n', encoding="utf-8")


def check_quantization(adapter: str, quantization: str | None) -> None:
    """Raise ValueError if training would go on with an adapter on other weights than those that it was trained on."""
    if quantization is None and (Path(adapter) / _NOTE).exists():
        raise ValueError(
            f"model.quantization: null; the adapter at {adapter} was trained on weights in 4 bits; set it to nf4"
        )


def is_quantized(module: nn.Module) -> bool:
    """Whether a layer's weight is stored in 4 bits."""
    return hasattr(getattr(module, "weight", None), "quant_state")


def decoded(layer: Any) -> Tensor:
    """Return the weight [out, in] of a layer stored in 4 bits, in the precision of its products."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def num_weights(parameter: nn.Parameter) -> int:
    """Return the number of weights that a parameter holds; one stored in 4 bits holds two in each byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else state.shape.numel()
