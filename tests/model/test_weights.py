"""The policy's weights under the names of a checkpoint, with LoRA merged."""

import pytest
import torch
from peft import IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from rolltune.model.weights import check_mergeable, policy_weights, tied_names, weight_shapes


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def test_full_weights_are_those_of_the_checkpoint(tiny_llama):
    found = dict(policy_weights(load(tiny_llama), torch.float32))
    saved = load_file(tiny_llama / "model.safetensors")
    assert found.keys() == saved.keys()  # neither has the tied head
    assert all(torch.equal(found[name], saved[name]) for name in saved)


def test_weights_that_have_the_dtype_are_not_copied(tiny_llama):
    model = load(tiny_llama)
    found = dict(policy_weights(model, torch.float32))
    assert found["model.norm.weight"].data_ptr() == model.model.norm.weight.data_ptr()
    assert all(tensor.dtype == torch.bfloat16 for _, tensor in policy_weights(model, torch.bfloat16))


def test_lora_is_merged_as_peft_merges_it(tiny_llama):
    torch.manual_seed(0)
    model = get_peft_model(
        load(tiny_llama), LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", init_lora_weights=False)
    )
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    found = dict(policy_weights(model, torch.float32))
    assert all(torch.equal(before[name], parameter) for name, parameter in model.named_parameters())
    merged = model.merge_and_unload().state_dict()
    merged.pop("lm_head.weight")
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
        (LoraConfig(target_modules=["q_proj"], use_dora=True), r"layers\.0\.self_attn\.q_proj: a variant .*\(Dora\)"),
        (LoraConfig(target_modules=["up_proj"], lora_bias=True), r"layers\.0\.mlp\.up_proj: a LoRA bias"),
        (LoraConfig(target_modules=["embed_tokens"]), r"embed_tokens: peft\.tuners\.lora\.layer\.Embedding"),
        (LoraConfig(target_modules=["q_proj"], modules_to_save=["norm"]), r"norm: .* \(ModulesToSaveWrapper\)"),
        (
            LoraConfig(target_modules=["q_proj"], trainable_token_indices=[1]),
            r"embed_tokens: .*\(TrainableTokensWrapper",
        ),
        (IA3Config(target_modules=["k_proj"], feedforward_modules=[]), r"k_proj: peft\.tuners\.ia3"),
    ],
    ids=["dora", "bias", "embedding", "saved", "tokens", "ia3"],
)
def test_adapters_other_than_plain_lora_are_refused(make_tiny_llama, tmp_path, adapter, why):
    base = load(make_tiny_llama(tmp_path / "biased", mlp_bias=True))
    check_mergeable(base)
    model = get_peft_model(base, adapter)
    with pytest.raises(ValueError, match=rf"^lora: model\..*{why}"):
        next(policy_weights(model, torch.float32))


def test_shapes_agree_with_the_weights(tiny_llama):
    for model in (load(tiny_llama), get_peft_model(load(tiny_llama), LoraConfig(target_modules="all-linear"))):
        given = [(name, t.dtype, t.shape) for name, t in policy_weights(model, torch.bfloat16)]
        assert weight_shapes(model, torch.bfloat16) == given


def test_tied_head_is_named(tiny_llama, make_tiny_llama, tmp_path):
    tied = {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied_names(load(tiny_llama)) == tied
    assert tied_names(get_peft_model(load(tiny_llama), LoraConfig(target_modules=["q_proj"]))) == tied
    assert tied_names(load(make_tiny_llama(tmp_path / "untied", tie_word_embeddings=False))) == {}
