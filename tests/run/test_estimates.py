"""Parameters and bytes of the tiny Llama, counted by hand."""

import io
import shutil

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, GPTNeoXConfig, LlamaForCausalLM

from rolltune.config.schema import LoRAConfig, ModelConfig, SFTConfig
from rolltune.errors import ConfigError
from rolltune.model.load import load_config
from rolltune.model.logprobs import chunk_size
from rolltune.model.policy import build_policy
from rolltune.run import estimates
from rolltune.run.estimates import (
    GIB,
    count_parameters,
    engine_memory,
    estimate_memory,
    print_memory,
)

# 260 tokens, hidden 32, intermediate 64, 2 layers, 4 heads of 8, 2 of keys and values; embeddings tied.
ATTENTION = 32 * 32 + 2 * 32 * 16 + 32 * 32
LAYER = ATTENTION + 3 * 32 * 64 + 2 * 32
PARAMETERS = 260 * 32 + 2 * LAYER + 32
QKVO = (32 + 32) + 2 * (32 + 16) + (32 + 32)
LINEAR_FEATURES = 2 * (QKVO + 2 * (32 + 64) + (64 + 32))
ACTIVATIONS = 8 * 32 + 2 * 16 + 4 * 64  # of a layer, each token


@pytest.fixture(scope="module")
def config(tiny_llama):
    return AutoConfig.from_pretrained(tiny_llama)


@pytest.fixture
def memory(tiny_llama, monkeypatch):
    """Bytes of each part."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)

    def estimate(
        lora=None, *, microbatch_tokens=100, kv_tokens=50, with_reference=False, optimizer="torch.optim.AdamW", **model
    ) -> dict[str, float]:
        parts = estimate_memory(
            ModelConfig(path=str(tiny_llama), **model),
            lora,
            microbatch_tokens=microbatch_tokens,
            kv_tokens=kv_tokens,
            with_reference=with_reference,
            optimizer=optimizer,
        )
        return {name: gib * GIB for name, gib in parts.items() if name != "logits of a chunk"}

    return estimate


def test_parameters_by_hand_and_by_the_model(config):
    assert PARAMETERS == 26912 and LINEAR_FEATURES == 1024
    assert count_parameters(config, LoRAConfig()) == (PARAMETERS, LINEAR_FEATURES)
    assert PARAMETERS == sum(p.numel() for p in LlamaForCausalLM(config).parameters())


def test_a_head_of_its_own_counts_but_is_not_adapted(config):
    untied = AutoConfig.for_model(**config.to_dict() | {"tie_word_embeddings": False})
    assert count_parameters(untied, LoRAConfig()) == (PARAMETERS + 260 * 32, LINEAR_FEATURES)


@pytest.mark.parametrize(
    ("modules", "features"),
    [
        ("q_proj", 2 * 64),
        ("q_proj,v_proj", 2 * (64 + 48)),
        ("q_proj, k_proj, v_proj, o_proj", 2 * QKVO),
        ("mlp.down_proj", 2 * 96),
    ],
)
def test_target_modules_by_name(config, modules, features):
    assert count_parameters(config, LoRAConfig(target_modules=modules)) == (PARAMETERS, features)


def test_target_modules_that_are_not_there_or_not_supported(config):
    with pytest.raises(ValueError, match=r"lora.target_modules: proj; the model has .*down_proj, .*q_proj"):
        count_parameters(config, LoRAConfig(target_modules="q_proj,proj"))
    with pytest.raises(ValueError, match="lora.target_modules: lm_head; an adapter on the LM head is not supported"):
        count_parameters(config, LoRAConfig(target_modules="q_proj,lm_head"))


@pytest.mark.parametrize("modules", ["all-linear", "q_proj,v_proj", "down_proj"])
def test_is_what_peft_trains(tiny_llama, config, modules):
    lora = LoRAConfig(rank=3, alpha=3.0, target_modules=modules)
    policy = build_policy(
        ModelConfig(path=str(tiny_llama)), lora, device=torch.device("cpu"), seed=0, with_reference=False
    )
    trained = sum(p.numel() for p in policy.trainable_parameters)
    assert trained == 3 * count_parameters(config, LoRAConfig(target_modules=modules))[1] > 0


def test_full_training_in_float32(memory):
    assert memory(with_reference=True) == pytest.approx(
        {
            "weights": 4 * PARAMETERS,
            "gradients": 4 * PARAMETERS,
            "optimizer's moments": 8 * PARAMETERS,
            "frozen reference": 4 * PARAMETERS,
            "activations of a microbatch": 100 * 2 * ACTIVATIONS * 4,
            "keys and values while sampling": 50 * 2 * 2 * 16 * 4,  # tokens, keys and values, layers, 2 heads of 8
        }
    )
    assert "frozen reference" not in memory()
    assert "keys and values while sampling" not in memory(kv_tokens=0)


def test_bfloat16_and_its_master_weights(memory):
    half = memory(dtype="bfloat16", with_reference=True)
    assert half == pytest.approx({name: value / 2 for name, value in memory(with_reference=True).items()})
    assert memory(dtype="bfloat16", master_weights=True, with_reference=True) == pytest.approx(
        half
        | {"gradients": 4 * PARAMETERS, "optimizer's moments": 8 * PARAMETERS, "fp32 master weights": 4 * PARAMETERS}
    )


def test_float16_is_as_large_as_bfloat16_and_an_fp32_head_comes_on_top(memory):
    half = memory(dtype="bfloat16", master_weights=True)
    assert memory(dtype="float16", master_weights=True) == half
    assert memory(dtype="float16", master_weights=True, fp32_head=True) == half | {"LM head in fp32": 4 * 260 * 32}


def test_lora_trains_fp32_adapters_and_has_its_reference_for_nothing(memory):
    lora = LoRAConfig(rank=4)
    assert memory(lora, dtype="bfloat16", with_reference=True) == pytest.approx(
        {
            "weights": 2 * PARAMETERS + 4 * 4 * LINEAR_FEATURES,
            "gradients": 4 * 4 * LINEAR_FEATURES,
            "optimizer's moments": 8 * 4 * LINEAR_FEATURES,
            "activations of a microbatch": 100 * 2 * ACTIVATIONS * 2,
            "keys and values while sampling": 50 * 2 * 2 * 16 * 2,
        }
    )
    narrow = memory(LoRAConfig(rank=4, target_modules="q_proj"))
    assert narrow["gradients"] == pytest.approx(4 * 4 * 2 * 64)


def test_frozen_weights_and_moments_in_fewer_bits(memory):
    lora = memory(LoRAConfig(rank=4), dtype="bfloat16", with_reference=True)
    qlora = memory(LoRAConfig(rank=4), dtype="bfloat16", quantization="nf4", with_reference=True)
    linear = 2 * (ATTENTION + 3 * 32 * 64)  # all but the embeddings, the head and the norms
    assert lora["weights"] - qlora["weights"] == pytest.approx((2 - 0.5 - (1 + 1 / 64) / 64) * linear)
    assert {**qlora, "weights": 0} == {**lora, "weights": 0}
    assert memory(optimizer="bitsandbytes.optim.AdamW8bit")["optimizer's moments"] == pytest.approx(2 * PARAMETERS)


def test_checkpointing_keeps_the_input_of_each_layer_and_one_whole_layer(memory):
    parts = memory(gradient_checkpointing=True)
    assert parts["activations of a microbatch"] == pytest.approx(100 * (2 * 32 + ACTIVATIONS) * 4)


def test_logits_are_of_a_chunk_never_of_the_micro_batch(tiny_llama, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for tokens in (1, 10**6):
        parts = estimate_memory(
            ModelConfig(path=str(tiny_llama)), None, microbatch_tokens=tokens, kv_tokens=0, with_reference=False
        )
        assert parts["logits of a chunk"] * GIB == pytest.approx(3 * 4 * 260 * chunk_size(260), rel=1e-3)


def test_models_whose_heads_all_have_keys_of_their_own(tmp_path):
    """GPT-NeoX (Pythia) says nothing of key-value heads."""
    GPTNeoXConfig(
        vocab_size=50, hidden_size=32, intermediate_size=64, num_hidden_layers=3, num_attention_heads=4
    ).save_pretrained(tmp_path)
    parts = estimate_memory(
        ModelConfig(path=str(tmp_path)), None, microbatch_tokens=1, kv_tokens=10, with_reference=False
    )
    assert parts["keys and values while sampling"] * GIB == pytest.approx(10 * 2 * 3 * 32 * 4)


def test_the_peak_counts_training_or_sampling_not_both():
    def peak(parts):
        console = Console(file=io.StringIO(), width=100)
        print_memory(parts, console)
        (line,) = [line for line in console.file.getvalue().splitlines() if line.startswith("peak")]  # pyright: ignore
        return float(line.split()[-1])

    activations, cache = "activations of a microbatch", "keys and values while sampling"
    assert peak({"weights": 1.0, activations: 2.0, cache: 0.5}) == 3.0
    assert peak({"weights": 1.0, activations: 2.0, cache: 5.0}) == 6.0
    assert peak({"weights": 1.0, activations: 2.0}) == 3.0  # sft samples nothing


def test_vllm_in_the_process_has_weights_of_its_own(tiny_llama):
    model = ModelConfig(path=str(tiny_llama), dtype="float32")
    node = {"_component_": "rolltune.samplers.vllm.colocated", "kv_cache_gib": 2.0}
    parameters, _ = count_parameters(load_config(str(tiny_llama)))
    for dtype, size in ((None, 4), ("bfloat16", 2)):
        assert engine_memory(model, node | {"dtype": dtype}) == {
            "vLLM's weights while sampling": parameters * size / GIB,
            "vLLM's keys and values while sampling": 2.0,
        }
    assert engine_memory(model, {"_component_": "rolltune.samplers.vllm.served"}) == {}
    assert engine_memory(model, {"_component_": "rolltune.samplers.native.NativeSampler"}) is None


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4)], ids=["full", "lora"])
def test_a_disk_that_is_too_small_for_the_checkpoints(tiny_llama, tmp_path, monkeypatch, lora):
    """Two that are kept, the best and one that is being written; fewer where the run saves less often."""
    trained = 4 * LINEAR_FEATURES if lora else PARAMETERS
    cfg = SFTConfig(output_dir=str(tmp_path / "run"), model=ModelConfig(path=str(tiny_llama)), lora=lora, num_steps=20)
    cfg.checkpoint.every_n_steps, cfg.checkpoint.keep_last = 5, 2
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 12 * trained))
    estimates.check_disk(cfg)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 12 * trained - 1))
    with pytest.raises(ConfigError, match="output_dir: .*: 4 checkpoints of about 0.00 GiB do not fit"):
        estimates.check_disk(cfg)
    cfg.checkpoint.every_n_steps = 10
    estimates.check_disk(cfg)
