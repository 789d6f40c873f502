"""Mixtures of experts: the routers' load-balancing loss, and adapters on experts. And adapters of multimodal models."""

import pytest
import torch
from family_check import load_plain
from model_families import LENGTHS, save_model
from peft import PeftModel
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from rolltune.batch import TokenSequence, TrainGroup, pack_examples
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.model.policy import build_policy
from rolltune.model.router import load_balancing_loss
from rolltune.model.weights import policy_weights
from rolltune.run.estimates import count_parameters
from rolltune.types import Prompt

SEQUENCES = (TokenSequence(token_ids=(50, 51, 52)), TokenSequence(token_ids=(60, 61)))
(MICROBATCH,) = pack_examples([TrainGroup(prompt=Prompt(token_ids=(10, 11, 12)), sequences=SEQUENCES)], max_tokens=99)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("mixtral")
    save_model("mixtral", LENGTHS["short"], folder)
    return folder


def build(folder, lora: LoRAConfig | None = None, **model):
    config = ModelConfig(path=str(folder), **model)
    return build_policy(config, lora, device=torch.device("cpu"), seed=0, with_reference=lora is not None)


def test_the_loss_by_hand():
    # Two tokens, two experts, top 1: both choose expert 0, with probability 3/4. 2 * (1 * 3/4 + 0 * 1/4).
    logits = torch.tensor([[3.0, 1.0], [3.0, 1.0]]).log()
    assert load_balancing_loss([logits], 1).item() == pytest.approx(1.5)
    balanced = torch.tensor([[3.0, 1.0], [1.0, 3.0]]).log()
    assert load_balancing_loss([balanced], 1).item() == pytest.approx(1.0)


def test_the_loss_is_that_of_transformers():
    layers = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(0)).unbind()
    assert load_balancing_loss(layers, 2).item() == pytest.approx(load_balancing_loss_func(layers, 5, 2).item())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_loss_of_a_microbatch_and_its_gradient(mixtral, checkpointing):
    policy = build(mixtral, router_aux_loss=0.1, gradient_checkpointing=checkpointing)
    logprobs, _, balance = policy.trained_logprobs(MICROBATCH, temperature=1.0)
    assert torch.equal(logprobs, policy.logprobs(MICROBATCH, temperature=1.0)[0])
    # The same from the routers of each sequence alone; the prompt counts once.
    plain = load_plain(mixtral)
    ids = [torch.tensor([[10, 11, 12, 50, 51]]), torch.tensor([[10, 11, 12, 60]])]
    first, second = (plain(input_ids=row, output_router_logits=True, use_cache=False).router_logits for row in ids)
    expected = load_balancing_loss([torch.cat([a, b[3:]]) for a, b in zip(first, second, strict=True)], 2)
    assert balance.item() == pytest.approx(expected.item(), abs=1e-5)
    gate = "model.layers.0.mlp.gate.weight"
    (ours,) = torch.autograd.grad(balance, policy.causal_lm.get_parameter(gate))
    (theirs,) = torch.autograd.grad(expected, plain.get_parameter(gate))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_there_is_no_loss_unless_it_is_asked_for(mixtral):
    assert build(mixtral).trained_logprobs(MICROBATCH, temperature=1.0)[2] is None


@pytest.mark.parametrize(("value", "message"), [(-0.1, "must be >= 0"), (0.1, "LlamaForCausalLM has no routers")])
def test_a_loss_that_does_not_fit_is_refused(tiny_llama, value, message):
    with pytest.raises(ValueError, match=rf"model\.router_aux_loss: {value}; {message}"):
        build(tiny_llama, router_aux_loss=value)


@pytest.mark.parametrize("experts", [False, True])
def test_adapters_on_experts(mixtral, tmp_path, tokenizer, experts):
    lora = LoRAConfig(rank=4, alpha=8.0, experts=experts)
    policy = build(mixtral, lora)
    adapted = {
        name.split(".lora_")[0].split(".base_layer")[0]
        for name, p in policy.model.named_parameters()
        if p.requires_grad
    }
    kinds = {name.partition("layers.0.")[2] for name in adapted if "layers.0." in name}
    assert kinds == {f"self_attn.{x}_proj" for x in "qkvo"} | ({"mlp.experts"} if experts else set())
    count = sum(p.numel() for p in policy.trainable_parameters)
    assert count == 4 * count_parameters(policy.causal_lm.config, lora)[1]
    assert ("have no adapter" in "".join(policy.notes)) is not experts
    policy.logprobs(MICROBATCH, temperature=1.0)[0].sum().backward()
    torch.optim.SGD(policy.trainable_parameters, lr=0.1).step()
    policy.save(tmp_path / "adapter", tokenizer)
    again = PeftModel.from_pretrained(load_plain(mixtral), str(tmp_path / "adapter")).eval()
    with torch.no_grad():
        logits = again(input_ids=torch.tensor([[10, 11, 12, 50, 51]]), use_cache=False).logits[0, 2:]
        expected = logits.log_softmax(-1).gather(-1, torch.tensor([[50], [51], [52]])).squeeze(-1)
        ours = policy.logprobs(MICROBATCH, temperature=1.0)[0][:3]
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)
    build(tmp_path / "adapter", lora)  # training goes on
    with pytest.raises(ValueError, match="lora.experts: .* is (not )?on experts; give the same value"):
        build(tmp_path / "adapter", LoRAConfig(rank=4, alpha=8.0, experts=not experts))


def test_the_note_names_what_has_an_adapter_and_what_has_none(mixtral, tiny_llama):
    (note,) = build(tiny_llama, LoRAConfig()).notes
    kinds = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    assert note == f"lora: all-linear adapts 14 layers: {kinds}"
    assert build(tiny_llama, LoRAConfig(target_modules="q_proj")).notes == []
    (note,) = build(mixtral, LoRAConfig()).notes
    assert note == (
        "lora: all-linear adapts 8 layers: k_proj, o_proj, q_proj, v_proj; 86% of the weights "
        "have no adapter: mlp.experts.gate_up_proj, mlp.experts.down_proj, mlp.gate; "
        "lora.experts: true adapts experts"
    )


def test_options_that_do_not_fit_experts_are_refused(mixtral, tiny_llama):
    with pytest.raises(ValueError, match=r"lora\.dropout: 0\.1; must be 0 with lora\.experts"):
        build(mixtral, LoRAConfig(experts=True, dropout=0.1))
    with pytest.raises(ValueError, match=r"lora\.experts: true; LlamaForCausalLM has no experts"):
        build(tiny_llama, LoRAConfig(experts=True))
    with pytest.raises(ValueError, match="cannot be merged for vLLM"):
        list(policy_weights(build(mixtral, LoRAConfig(experts=True)).model, torch.float32))


@pytest.mark.parametrize("target_modules", ["all-linear", "q_proj,down_proj"])
def test_adapters_of_a_multimodal_model_are_in_its_text_model(tmp_path, target_modules):
    save_model("gemma3-vl", LENGTHS["short"], tmp_path)
    policy = build(tmp_path, LoRAConfig(target_modules=target_modules))
    layers = [name for name, module in policy.causal_lm.named_modules() if hasattr(module, "lora_A")]
    assert len(layers) == 2 * (7 if target_modules == "all-linear" else 2)
    assert all(name.startswith("model.language_model.layers.") for name in layers)
