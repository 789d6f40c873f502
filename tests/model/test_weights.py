"""The policy's weights under the names of a checkpoint, with LoRA merged."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma3Config,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from rolltune.model.adapter import adapted_layers, adapter_rank, adapter_weights
from rolltune.model.weights import base_weights, check_mergeable, policy_weights, tied_names, weight_shapes

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": 1,
}
MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FAMILIES = {
    "llama": (LlamaConfig(**SIZES), "model.layers.1.mlp.up_proj.weight"),
    "tied": (LlamaConfig(**SIZES, tie_word_embeddings=True), "model.embed_tokens.weight"),
    "qwen3_moe": (Qwen3MoeConfig(**SIZES, **MOE, num_experts=4), "model.layers.1.mlp.experts.3.down_proj.weight"),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=4), "model.layers.1.block_sparse_moe.experts.3.w2.weight"),
    "gpt_neox": (GPTNeoXConfig(**SIZES), "embed_out.weight"),
    "deepseek_v3": (
        DeepseekV3Config(
            **SIZES,
            **MOE,
            n_routed_experts=4,
            n_group=2,
            topk_group=1,
            kv_lora_rank=8,
            q_lora_rank=8,
            qk_rope_head_dim=8,
            qk_nope_head_dim=8,
            v_head_dim=8,
            first_k_dense_replace=1,
        ),
        "model.layers.1.mlp.gate.e_score_correction_bias",  # a buffer
    ),
    "gemma3_vl": (
        Gemma3Config(
            text_config={**SIZES, "head_dim": 8, "num_key_value_heads": 2},
            vision_config={
                "hidden_size": 32,
                "intermediate_size": 48,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "image_size": 28,
                "patch_size": 14,
            },
        ),
        "language_model.model.layers.1.mlp.up_proj.weight",
    ),
}


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


@pytest.mark.parametrize("family", FAMILIES)
def test_names_shapes_and_values_are_those_of_the_checkpoint(family, tmp_path):
    """Also where the modelling code has other names, all experts in one tensor, or weights that are buffers."""
    config, example = FAMILIES[family]
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "first")
    model = load(tmp_path / "first")  # the names of a model that was loaded are those of its file
    model.save_pretrained(tmp_path / "again")
    for folder in (tmp_path / "first", tmp_path / "again"):
        saved = load_file(folder / "model.safetensors")
        found = dict(policy_weights(model, torch.float32))
        assert example in found and found.keys() == saved.keys()
        assert all(torch.equal(found[name], saved[name]) for name in saved)
    assert weight_shapes(model, torch.bfloat16) == [
        (name, tensor.dtype, tensor.shape) for name, tensor in policy_weights(model, torch.bfloat16)
    ]


def test_what_the_model_keeps_in_fp32_stays_in_fp32(tmp_path):
    config, bias = FAMILIES["deepseek_v3"]
    model = AutoModelForCausalLM.from_config(config)
    dtypes = {name: tensor.dtype for name, tensor in policy_weights(model, torch.bfloat16)}
    assert dtypes.pop(bias) == torch.float32 and set(dtypes.values()) == {torch.bfloat16}


def test_weights_that_have_the_dtype_are_not_copied(tiny_llama):
    model = load(tiny_llama)
    found = dict(policy_weights(model, torch.float32))
    assert found["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in policy_weights(model, torch.bfloat16))


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"use_dora": True}], ids=["lora", "rslora", "dora"])
def test_lora_is_merged_as_peft_merges_it(tiny_llama, options):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False, **options)
    model = get_peft_model(load(tiny_llama), lora)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter.mul_(1.1)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = dict(policy_weights(model, torch.float32))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    merged = model.merge_and_unload().state_dict()
    merged.pop("lm_head.weight")  # tied
    assert found.keys() == merged.keys()
    for name, tensor in merged.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_a_low_precision_base_is_merged_in_fp32_and_rounded_once(tiny_llama):
    torch.manual_seed(0)
    base = load(tiny_llama).to(torch.bfloat16)
    model = get_peft_model(base, LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], init_lora_weights=False))
    layer = model.base_model.model.model.layers[0].self_attn.q_proj  # pyright: ignore[reportIndexIssue]
    expected = layer.base_layer.weight.float() + 1.5 * layer.lora_B["default"].weight @ layer.lora_A["default"].weight
    found = dict(policy_weights(model, torch.bfloat16))["model.layers.0.self_attn.q_proj.weight"]
    assert layer.lora_A["default"].weight.dtype == torch.float32
    assert torch.equal(found, expected.to(torch.bfloat16))


@pytest.mark.parametrize(
    ("adapter", "why"),
    [
        (LoraConfig(target_modules=["up_proj"], lora_bias=True), r"layers\.0\.mlp\.up_proj: a LoRA bias"),
        (LoraConfig(target_modules=["embed_tokens"]), r"embed_tokens: peft\.tuners\.lora\.layer\.Embedding"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), r"norm: .* \(ModulesToSaveWrapper\)"),
        (
            LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]),
            r"embed_tokens: .*\(TrainableTokensWrapper",
        ),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), r"k_proj: peft\.tuners\.ia3"),
    ],
    ids=["bias", "embedding", "saved", "tokens", "ia3"],
)
def test_adapters_other_than_lora_and_dora_are_refused(make_tiny_llama, tmp_path, adapter, why):
    base = load(make_tiny_llama(tmp_path / "biased", mlp_bias=True))
    check_mergeable(base)
    model = get_peft_model(base, adapter)
    with pytest.raises(ValueError, match=rf"^lora: model\..*{why}"):
        next(policy_weights(model, torch.float32))


def test_shapes_with_lora_agree_with_the_weights(tiny_llama):
    model = get_peft_model(load(tiny_llama), LoraConfig(target_modules="all-linear"))
    given = [(name, t.dtype, t.shape) for name, t in policy_weights(model, torch.bfloat16)]
    assert weight_shapes(model, torch.bfloat16) == given


@pytest.mark.parametrize("rslora", [False, True])
def test_an_adapter_apart_contains_the_scale_that_peft_applies(tiny_llama, rslora):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    lora.use_rslora = rslora
    model = get_peft_model(load(tiny_llama), lora)
    layers = adapted_layers(model)
    found = dict(adapter_weights(layers, torch.float32))
    assert len(found) == 2 * len(layers) == 8 and adapter_rank(layers) == 4
    for name, layer in layers.items():
        assert layer.scaling["default"] == (3.0 if rslora else 1.5)  # 6 / sqrt(4), 6 / 4
        delta = found[f"{name}.lora_B.weight"] @ found[f"{name}.lora_A.weight"]
        torch.testing.assert_close(delta, layer.get_delta_weight("default"), rtol=0, atol=1e-6)
    plain = dict(base_weights(model, torch.float32))
    assert all(torch.equal(plain[name], tensor) for name, tensor in policy_weights(load(tiny_llama), torch.float32))


def test_lora_beside_experts_gives_the_checkpoint_of_the_merged_model(tmp_path):
    AutoModelForCausalLM.from_config(FAMILIES["qwen3_moe"][0]).save_pretrained(tmp_path)
    model = get_peft_model(load(tmp_path), LoraConfig(target_modules=["q_proj", "o_proj"], init_lora_weights=False))
    found = dict(policy_weights(model, torch.float32))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    saved = load_file(tmp_path / "merged" / "model.safetensors")
    assert found.keys() == saved.keys()
    for name, tensor in saved.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)


def test_lora_on_a_tied_head_is_refused(tiny_llama):
    model = get_peft_model(load(tiny_llama), LoraConfig(target_modules=["lm_head"]))
    with pytest.raises(ValueError, match=r"^lora: lm_head: .*tied to the embeddings"):
        check_mergeable(model)


def test_tied_head_is_named(tiny_llama, make_tiny_llama, tmp_path):
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_names(load(tiny_llama)) == tied
    assert tied_names(get_peft_model(load(tiny_llama), LoraConfig(target_modules=["q_proj"]))) == tied
    assert tied_names(load(make_tiny_llama(tmp_path / "untied", tie_word_embeddings=False))) == {}
