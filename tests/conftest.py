"""A tiny random Llama with a byte-level tokenizer and a chat template: small enough for every test, real in every
part."""

from __future__ import annotations

import os
import re
import signal
from collections.abc import Callable
from pathlib import Path

from repo import ROOT

# Two test processes or ranks on two cores would otherwise spin against each other.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import pytest
import torch
from byte_tokenizer import byte_tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# A shell starts what goes to the background with Ctrl-C ignored, and what the tests start would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)


def save_tiny_llama(folder: Path, *, seed: int = 0, **options) -> Path:
    """A tiny Llama with its tokenizer, in Hugging Face format."""
    tokenizer = byte_tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": len(tokenizer),
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 512,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "initializer_range": 0.2,  # wide enough for distributions that are not flat
            "tie_word_embeddings": True,
        }
        | options
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests marked gpu on a machine without CUDA."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="torch finds no CUDA device"))


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_llama(tmp_path_factory.mktemp("tiny_llama"))


@pytest.fixture(scope="session")
def make_tiny_llama() -> Callable[..., Path]:
    """:func:`save_tiny_llama`, for tests of more models than one."""
    return save_tiny_llama


@pytest.fixture(scope="session")
def long_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny Llama with the context that the configs of real models ask for."""
    return save_tiny_llama(tmp_path_factory.mktemp("long_llama"), max_position_embeddings=4096)


@pytest.fixture
def earlier_stages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, long_llama: Path) -> None:
    """Configs that start from another's output find one, and nothing is written into the repository."""
    monkeypatch.chdir(tmp_path)
    texts = [path.read_text() for path in (ROOT / "configs").glob("*.yaml")]
    for stage in {stage for text in texts for stage in re.findall(r"path: outputs/(\w+)/best", text)}:
        (tmp_path / "outputs" / stage).mkdir(parents=True)
        (tmp_path / "outputs" / stage / "best").symlink_to(long_llama)


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return byte_tokenizer()
