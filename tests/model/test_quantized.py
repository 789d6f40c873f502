"""QLoRA: frozen weights in 4 bits under adapters."""

import importlib.util

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from transformers import AutoModelForCausalLM

from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.errors import ConfigError
from rolltune.model.load import load_for_sampling, load_model, load_tokenizer, unwrapped
from rolltune.model.parts import in_float32
from rolltune.model.policy import Policy, build_policy
from rolltune.model.quantized import NF4_BYTES, decoded, is_quantized, num_weights
from rolltune.model.weights import policy_weights, weight_shapes

CPU = torch.device("cpu")
IDS = torch.arange(20)[None] % 11


def load(path, dtype: str = "float32"):
    return load_model(str(path), dtype=dtype, device=CPU, quantization="nf4")


def build(path, *, resume_from=None, **lora) -> Policy:
    config = ModelConfig(path=str(path), quantization="nf4")
    return build_policy(
        config, LoRAConfig(rank=4, **lora), device=CPU, seed=0, with_reference=True, resume_from=resume_from
    )


def perturb(policy: Policy) -> None:
    with torch.no_grad():
        for parameter in policy.trainable_parameters:
            parameter.add_(torch.randn_like(parameter) * 0.1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_linear_layers_hold_nf4_and_everything_else_its_own_weights(tiny_llama, dtype):
    model, plain = load(tiny_llama, dtype), AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=dtype)
    layers = {name for name, module in model.named_modules() if is_quantized(module)}
    assert layers == {n for n, m in plain.named_modules() if type(m) is torch.nn.Linear and n != "lm_head"}
    for name, module in plain.named_modules():
        if name in layers:
            codes, state = quantize_4bit(module.weight.data, quant_type="nf4", compress_statistics=True)
            assert torch.equal(decoded(model.get_submodule(name)), dequantize_4bit(codes, state))
            assert num_weights(model.get_parameter(f"{name}.weight")) == module.weight.numel()
    for name, parameter in plain.named_parameters():
        if name.removesuffix(".weight") not in layers:
            assert torch.equal(parameter, model.get_parameter(name)) and model.dtype == parameter.dtype


def test_the_forward_pass_is_chosen_in_float32(tiny_llama):
    """Rounding of bfloat16 would exceed the limit of the comparison with eager attention."""
    model = load(tiny_llama, "bfloat16")
    with in_float32(model):
        exact = model(IDS).logits
    decoded_model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    rounded = model(IDS).logits
    assert rounded.dtype == torch.bfloat16
    for module in filter(is_quantized, model.modules()):
        module.weight.quant_state.dtype = torch.float32
    decoded_model.load_state_dict(dict(policy_weights(model, torch.float32)), strict=False)
    torch.testing.assert_close(exact, decoded_model(IDS).logits, rtol=1e-4, atol=1e-5)
    assert (rounded - exact).abs().max() > 1e-3


def test_bytes_of_a_weight():
    codes, state = quantize_4bit(torch.randn(1024, 1024), quant_type="nf4", compress_statistics=True)
    held = codes.nbytes + state.absmax.nbytes + state.state2.absmax.nbytes
    assert held / 1024**2 == pytest.approx(NF4_BYTES)


def test_the_adapter_off_is_the_reference_and_weights_are_exported_merged(tiny_llama):
    policy = build(tiny_llama)
    base = load(tiny_llama)
    perturb(policy)
    ours = policy.causal_lm(IDS).logits
    with policy._as_reference() as reference:
        torch.testing.assert_close(reference(IDS).logits, base(IDS).logits)
    assert (ours - base(IDS).logits).abs().max() > 0.01

    exported = dict(policy_weights(policy.model, torch.float32))
    shapes = [(name, tensor.dtype, tensor.shape) for name, tensor in exported.items()]
    assert weight_shapes(policy.model, torch.float32) == shapes
    plain = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    missing, unexpected = plain.load_state_dict(exported, strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    torch.testing.assert_close(plain(IDS).logits, ours, rtol=1e-4, atol=1e-5)


def test_gradients_are_those_of_lora_on_the_decoded_weights(tiny_llama, tmp_path):
    policy = build(tiny_llama)
    perturb(policy)
    policy.save(tmp_path / "adapter", load_tokenizer(str(tiny_llama)))
    again = build(tiny_llama, resume_from=tmp_path / "adapter")
    decoded_base = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    decoded_base.load_state_dict(dict(policy_weights(load(tiny_llama), torch.float32)), strict=False)
    decoded_base.save_pretrained(tmp_path / "decoded")
    load_tokenizer(str(tiny_llama)).save_pretrained(tmp_path / "decoded")
    plain = build_policy(
        ModelConfig(path=str(tmp_path / "decoded")),
        LoRAConfig(rank=4),
        device=CPU,
        seed=0,
        with_reference=False,
        resume_from=tmp_path / "adapter",
    )
    for each in (again, plain):
        each.causal_lm(IDS, labels=IDS).loss.backward()
    pairs = list(zip(again.trainable_parameters, plain.trainable_parameters, strict=True))
    assert pairs and all(ours.requires_grad for ours, _ in pairs)
    for ours, theirs in pairs:
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_an_adapter_is_sampled_on_the_weights_that_it_was_trained_on(tiny_llama, tmp_path):
    policy = build(tiny_llama)
    perturb(policy)
    policy.save(tmp_path / "adapter", load_tokenizer(str(tiny_llama)))
    sampled = load_for_sampling(str(tmp_path / "adapter"), dtype="float32", device=CPU, quantization="nf4")
    assert torch.equal(unwrapped(sampled)(IDS).logits, policy.causal_lm(IDS).logits)


def test_without_bitsandbytes(tiny_llama, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "bitsandbytes" else find(name, *a)
    )
    with pytest.raises(ConfigError, match=r"model\.quantization: nf4; .*pip install .rolltune\[qlora\]"):
        load(tiny_llama)
