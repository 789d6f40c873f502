"""A mixture of experts in the real vLLM. In a file of its own: vLLM cannot start one beside another kind of model."""

from __future__ import annotations

import pytest
import torch
from sync_faults import loads
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from vllm_helpers import OPTIONS, shake

from rolltune.errors import SyncError
from rolltune.model.load import load_model
from rolltune.samplers.vllm import colocated

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_mixture_of_experts(tokenizer, tmp_path, dtype):
    """vLLM fuses the experts of a layer and packs them; on a CPU it forgets the latter when they are loaded again."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32,
        max_position_embeddings=512, initializer_range=0.1, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path)
    model = load_model(str(tmp_path), dtype=dtype, device="cpu")
    sampler = colocated(model, tokenizer, **OPTIONS)
    try:
        for version in range(2):
            shake(model, version)
            sampler.sync(version)
        assert dtype != "float32" or sampler.last_sync.probe_gap < 1e-4
        expert = "model.layers.1.mlp.experts.3.down_proj.weight"
        shake(model, 2)
        with pytest.MonkeyPatch.context() as monkeypatch:
            loads(sampler._engine, monkeypatch, lambda name, t: 1.01 * t if name == expert else t)
            with pytest.raises(SyncError, match=rf"than the policy\n  {expert}: has other values[^\n]*$"):
                sampler.sync(2)
        sampler.sync(2)
    finally:
        sampler.close()
