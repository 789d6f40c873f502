"""Log-probs through a model's own head: equal to the fast product where both are right, and to explicit softmaxes."""

import pytest
import torch
from transformers import AutoModelForCausalLM, CohereConfig, FalconH1Config, Gemma2Config, OPTConfig, PhiConfig

from rolltune.model import head as own_head
from rolltune.model.head import is_plain_head, own_logits, own_logprobs
from rolltune.model.logprobs import selected_logprobs
from rolltune.types import Support

SIZES = {
    "vocab_size": 60,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def model_of(config):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    if getattr(model.get_output_embeddings(), "bias", None) is not None:
        torch.nn.init.normal_(model.get_output_embeddings().bias, std=0.01)
    return model


HEADS = {
    "plain": (OPTConfig(vocab_size=60, hidden_size=16, ffn_dim=24, num_hidden_layers=1, num_attention_heads=2), True),
    "bias": (PhiConfig(**SIZES), False),
    "scale": (CohereConfig(**SIZES, logit_scale=0.25), False),
    "softcap": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=30.0), False),
    "high softcap": (Gemma2Config(**SIZES, head_dim=8, final_logit_softcapping=200.0), False),
    "multiplier of the decoder": (
        FalconH1Config(**SIZES, lm_head_multiplier=0.5, mamba_n_heads=4, mamba_d_ssm=32),
        False,
    ),
}


@pytest.mark.parametrize("name", HEADS)
def test_heads_that_are_more_than_a_product_are_noticed(name):
    config, plain = HEADS[name]
    assert is_plain_head(model_of(config)) is plain


def test_own_logits_are_those_of_the_whole_model():
    model = model_of(HEADS["softcap"][0])
    ids = torch.tensor([[3, 1, 4, 1, 5]])
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[0]
        hidden = model.model(input_ids=ids, use_cache=False).last_hidden_state[0]
        torch.testing.assert_close(own_logits(model, hidden), whole, rtol=0, atol=1e-6)
    assert type(model.model).__name__ == "Gemma2Model"  # back in its place


@pytest.mark.parametrize(
    "support",
    [None, Support(token_ids=torch.tensor([7, 9, 3], dtype=torch.int32), offsets=torch.tensor([0, 2, 2, 3, 3]))],
)
def test_log_probs_entropy_and_gradients_equal_the_products(monkeypatch, support):
    monkeypatch.setattr(own_head, "chunk_size", lambda *_: 3)  # so that there are two chunks of 4 tokens
    model = model_of(HEADS["plain"][0])
    targets, weight = torch.tensor([9, 0, 3, 59]), model.get_output_embeddings().weight
    results = []
    for compute in (
        lambda h: selected_logprobs(h, weight, targets, 0.7, support),
        lambda h: own_logprobs(model, h, targets, 0.7, support),
    ):
        hidden = torch.randn(4, 16, generator=torch.Generator().manual_seed(1), requires_grad=True)
        logprobs, entropy = compute(hidden)
        gradients = torch.autograd.grad((logprobs * torch.tensor([1.0, -2.0, 3.0, 0.5])).sum(), (hidden, weight))
        results.append((logprobs.detach(), entropy, *gradients))
        assert not entropy.requires_grad
    for product, own in zip(*results, strict=True):
        torch.testing.assert_close(own, product, rtol=0, atol=1e-5)


def test_a_target_outside_of_its_support_is_an_error():
    model = model_of(HEADS["bias"][0])
    support = Support(token_ids=torch.tensor([7], dtype=torch.int32), offsets=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="support: token 5, number 0 of 1"):
        own_logprobs(model, torch.ones(1, 16), torch.tensor([5]), 1.0, support)
