"""Tiny models and a tokenizer, built in memory within a second; and a saved model for the tests that start vLLM."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from rolltune.model.load import load_model

VOCAB = 32
EOS, PAD = 27, 28


@pytest.fixture(scope="session")
def letter_tokenizer() -> PreTrainedTokenizerBase:
    """Tokens: a .. z (0 .. 25), space (26), <eos> (27), <pad> (28). A model's ids 29 .. 31 decode to nothing."""
    vocab = {character: i for i, character in enumerate("abcdefghijklmnopqrstuvwxyzĠ")}
    backend = Tokenizer(BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = ByteLevelDecoder()  # pyright: ignore[reportAttributeAccessIssue]
    result = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>", pad_token="<pad>")
    assert (result.eos_token_id, result.pad_token_id) == (EOS, PAD)
    return result


def build(config: PreTrainedConfig, *, seed: int = 0, std: float = 0.25) -> PreTrainedModel:
    """Build a model with random weights, large enough that distributions are far from uniform and attention matters."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=std) if parameter.dim() > 1 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def llama_config(**changes: Any) -> LlamaConfig:
    return LlamaConfig(**{**_SIZES, **changes})


def qwen2_config(**changes: Any) -> Qwen2Config:
    return Qwen2Config(**{**_SIZES, "num_attention_heads": 6, "hidden_size": 48, **changes})


_SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": None,
    "eos_token_id": EOS,
    "pad_token_id": PAD,
}


@pytest.fixture
def make_llama() -> Callable[..., PreTrainedModel]:
    """A tiny Llama: ``make_llama(seed=1, tie_word_embeddings=True, ...)``."""
    return lambda seed=0, **changes: build(llama_config(**changes), seed=seed)


@pytest.fixture
def make_qwen2() -> Callable[..., PreTrainedModel]:
    """A tiny Qwen2, with biases on q, k and v and three query heads a key head."""
    return lambda seed=0, **changes: build(qwen2_config(**changes), seed=seed)


@pytest.fixture
def llama(make_llama) -> PreTrainedModel:
    return make_llama()


@pytest.fixture
def build_model() -> Callable[..., PreTrainedModel]:
    """Build a model of any config with random weights."""
    return build


@pytest.fixture(scope="module")
def vllm_folder(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved tiny Llama with heads of 32, as vLLM's CPU kernels need."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", hidden_size=128)


@pytest.fixture(scope="module")
def model(vllm_folder: Path) -> PreTrainedModel:
    """The policy of the vLLM tests. They change its weights."""
    return load_model(str(vllm_folder), dtype="float32", device="cpu")
