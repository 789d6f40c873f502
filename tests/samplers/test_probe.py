"""The trainer's scores of the probe, against plain transformers."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from rolltune.model.load import load_model, load_tokenizer
from rolltune.samplers import probe


def test_the_prompt_is_fixed_and_leaves_room(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    whole = probe.probe_prompt(tokenizer, 512)
    assert len(whole) == probe.PROMPT_TOKENS > 32 and whole == probe.probe_prompt(tokenizer, 512)
    assert probe.probe_prompt(tokenizer, 30) == whole[: 30 - probe.NEW_TOKENS]


@pytest.mark.parametrize("lora", [False, True])
def test_scores_are_those_of_a_plain_forward_pass_without_dropout(tiny_llama, lora):
    model, plain = (
        load_model(str(tiny_llama), dtype="float32", device="cpu"),
        AutoModelForCausalLM.from_pretrained(tiny_llama),
    )
    if lora:
        config = LoraConfig(target_modules="all-linear", lora_dropout=0.5, init_lora_weights=False)
        torch.manual_seed(0)
        model = get_peft_model(model, config)
        torch.manual_seed(0)
        plain = get_peft_model(plain, config)
    model.train()
    prompt = probe.probe_prompt(load_tokenizer(str(tiny_llama)), 512)
    written = (7, 8, 9)
    found = probe.trainer_logprobs(model, prompt, written)
    with torch.no_grad():
        logits = plain.eval()(torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)[range(3), list(written)]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert model.training and all(module.training for module in model.modules())
