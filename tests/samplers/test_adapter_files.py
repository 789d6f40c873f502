"""The files in which adapters travel to a vLLM worker."""

from __future__ import annotations

import json
import os

import pytest
import torch
from safetensors.torch import save_file

from rolltune.samplers.vllm_adapters import read_adapter, write_adapter

TENSORS = {"model.layers.0.mlp.up_proj.lora_A.weight": torch.arange(6.0).view(2, 3)}


def test_an_adapter_is_read_as_it_was_written(tmp_path):
    write_adapter(tmp_path / "adapter_1.safetensors", {n: t.T.contiguous().T for n, t in TENSORS.items()}, "run:1")
    found = read_adapter(str(tmp_path / "adapter_1.safetensors"), "run:1")
    assert found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_only_what_a_run_has_written_under_the_name_is_read(tmp_path, monkeypatch):
    """No folder, no pickle, no other tensors, no adapter of another run or version, and nothing from the Hub."""
    write_adapter(tmp_path / "good.safetensors", TENSORS, "run:1")
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save(TENSORS, tmp_path / "adapter_model.bin")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 2, "lora_alpha": 2, "target_modules": []}))
    half = (tmp_path / "good.safetensors").read_bytes()[:-8]
    (tmp_path / "half.safetensors").write_bytes(half)
    monkeypatch.chdir(tmp_path)
    names = ("", "adapter_model.bin", "adapter_config.json", "model.safetensors", "half.safetensors", "missing")
    for path in [*(str(tmp_path / name) for name in names), "good.safetensors", "org/adapter", "../etc/passwd", ""]:
        with pytest.raises(ValueError, match=r"^adapter run:1: "):
            read_adapter(path, "run:1")
    for name in ("run:2", "other:1", ""):
        with pytest.raises(ValueError, match="not written by a run under this name"):
            read_adapter(str(tmp_path / "good.safetensors"), name)
    assert read_adapter(os.path.abspath("good.safetensors"), "run:1")
