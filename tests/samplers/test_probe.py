"""The probes: the trainer's scores against plain transformers, and engines that do not sample as the trainer scores."""

from __future__ import annotations

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM
from vllm_helpers import shake

from rolltune.errors import SyncError
from rolltune.model.load import load_model, load_tokenizer
from rolltune.samplers import probe
from rolltune.samplers.probe import Answer, Probe, ProbeCheck, build_probes, trainer_logprobs


def test_probes_are_fixed_and_leave_room(tiny_llama):
    tokenizer = load_tokenizer(str(tiny_llama))
    probes = build_probes(tokenizer, 512)
    assert probes == build_probes(tokenizer, 512)
    assert max(len(p.prompt) for p in probes) > 32  # longer than a block of the prefix cache
    assert len({p.params.max_new_tokens for p in probes}) == len({p.params.temperature for p in probes}) == len(probes)
    assert {p.params.truncates for p in probes} == {False, True}
    for limit in (probe.MIN_MODEL_LEN, 30, 100):
        for p in build_probes(tokenizer, limit, torch.bfloat16):
            assert p.prompt and len(p.prompt) + p.params.max_new_tokens <= limit


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
    prompt, written, kept = build_probes(load_tokenizer(str(tiny_llama)), 512)[0].prompt, (7, 8, 9), (7, 8, 9, 20, 30)
    with torch.no_grad():
        logits = plain.eval()(torch.tensor([[*prompt, *written]])).logits[0, len(prompt) - 1 : -1]
    expected = torch.log_softmax(logits, -1)[range(3), list(written)]
    torch.testing.assert_close(trainer_logprobs(model, prompt, written), expected, rtol=0, atol=1e-4)
    expected = torch.log_softmax(logits[:, list(kept)] / 0.6, -1)[range(3), range(3)]
    found = trainer_logprobs(model, prompt, written, 0.6, support=(kept,) * 3)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    assert model.training and all(module.training for module in model.modules())


def test_a_half_precision_model_is_scored_in_fp32(tiny_llama):
    half = load_model(str(tiny_llama), dtype="bfloat16", device="cpu")
    exact = copy.deepcopy(half).float()
    arguments = tuple(range(40)), (7, 8, 9)
    with probe._InFloat32():
        found = trainer_logprobs(half, *arguments)
    torch.testing.assert_close(found, trainer_logprobs(exact, *arguments), rtol=0, atol=1e-4)
    assert (found - trainer_logprobs(half, *arguments)).abs().max() > 1e-4
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}


class Engine:
    """Answers probes with the log-probs of a model, as an engine with these weights would."""

    def __init__(self, model, probes):
        self.model, self.probes = model, probes
        self.seed = 0  # of the noise

    def answers(self, *, temperature: float | None = None, noise: float = 0.0) -> list[Answer]:
        return [self._answer(p, temperature, noise) for p in self.probes]

    def _answer(self, p: Probe, temperature: float | None, noise: float) -> Answer:
        torch.manual_seed(0)
        tokens = tuple(torch.randint(4, 250, (p.params.max_new_tokens,)).tolist())
        support = tuple(tuple(sorted({t, *range(40, 59)})) for t in tokens) if p.params.truncates else None
        logprobs = trainer_logprobs(self.model, p.prompt, tokens, temperature or p.params.temperature, support=support)
        torch.manual_seed(self.seed)
        return Answer(token_ids=tokens, logprobs=logprobs + noise * torch.randn(len(tokens)), support=support)


@pytest.fixture(params=["float32", "bfloat16"])
def model(request, tiny_llama):
    return load_model(str(tiny_llama), dtype=request.param, device="cpu")


@pytest.fixture
def probes(model, tiny_llama):
    return build_probes(load_tokenizer(str(tiny_llama)), 512, model.dtype)


def test_an_engine_that_follows_the_policy_passes(model, probes):
    check = ProbeCheck(model, probes, model.dtype)
    for version, scale in enumerate((0, 1e-5, 1e-3, 1e-1, 0, 1e-5)):
        shake(model, version, scale)
        engine = Engine(copy.deepcopy(model), probes)
        noise = 1e-5 if model.dtype == torch.float32 else 5e-3
        assert check.check([engine.answers(noise=noise)] * 2, has_changed=scale > 0) < 4 * noise


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1e-1])
def test_an_engine_that_computes_with_older_weights_is_found(model, probes, scale):
    check = ProbeCheck(model, probes, model.dtype)
    engine = Engine(copy.deepcopy(model), probes)
    check.check([engine.answers()], has_changed=True)
    shake(model, 0, scale)
    with pytest.raises(SyncError, match="older weights|log-probs of the probes"):
        check.check([engine.answers()], has_changed=True)


def test_slow_changes_add_up_until_they_are_visible(tiny_llama):
    """The engine is behind, but never answers with the same bits, so that only the size of the change shows it."""
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    probes = build_probes(load_tokenizer(str(tiny_llama)), 512)
    engine, check = Engine(copy.deepcopy(model), probes), ProbeCheck(model, probes, model.dtype)
    with pytest.raises(SyncError, match="by .* in the trainer .* in the engine: it computes with older weights"):
        for _ in range(100):
            check.check([engine.answers(noise=1e-4)], has_changed=True)
            engine.seed += 1
            shake(model, 0, 1e-5)  # in the same direction each time
    assert 2 < engine.seed < 99


def test_the_second_of_two_replicas_is_checked(model, probes):
    check = ProbeCheck(model, probes, model.dtype)
    engine = Engine(model, probes)
    with pytest.raises(SyncError, match="log-probs of the probes"):
        check.check([engine.answers(), engine.answers(noise=0.5)], has_changed=True)


def test_a_temperature_that_is_not_applied_is_found(model, probes):
    with pytest.raises(SyncError, match="log-probs of the probes"):
        ProbeCheck(model, probes, model.dtype).check([Engine(model, probes).answers(temperature=1.0)], has_changed=True)


def test_an_engine_in_bfloat16_may_round_more_than_a_trainer_in_float16(tiny_llama):
    trainer, other = (load_model(str(tiny_llama), dtype=dtype, device="cpu") for dtype in ("float16", "bfloat16"))
    probes = build_probes(load_tokenizer(str(tiny_llama)), 512, torch.bfloat16)
    ProbeCheck(trainer, probes, torch.bfloat16).check([Engine(other, probes).answers()], has_changed=True)
    with pytest.raises(SyncError, match="log-probs of the probes"):
        ProbeCheck(trainer, probes, torch.float16).check([Engine(other, probes).answers()], has_changed=True)


@pytest.mark.parametrize("size", [1e-5, 1e-3, 1e-1])
def test_an_engine_that_ignores_the_adapter_is_found(model, probes, size):
    """Also where its effect is far below the accepted gap; and one that applies half of it."""
    base = Engine(copy.deepcopy(model), probes)
    policy = get_peft_model(model, LoraConfig(target_modules="all-linear")).eval()
    check = ProbeCheck(policy, probes, model.dtype)
    check.set_base([base.answers()])
    trained = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert check.check([base.answers()], has_changed=True) < 1  # B is zero: the adapter has no effect yet
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            if ".lora_B." in name:
                parameter.normal_(std=size)
    with pytest.raises(SyncError, match="does not apply the adapter|older weights|log-probs of the probes"):
        check.check([base.answers()], has_changed=True)
    follows = ProbeCheck(policy, probes, model.dtype)
    follows.set_base([base.answers()])
    with pytest.raises(SyncError, match="does not apply the adapter|log-probs of the probes"):
        follows.check([base.answers()], has_changed=True)
    follows.check([Engine(policy, probes).answers()], has_changed=True)
    assert trained == {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def test_another_base_model_is_found(tiny_llama):
    model = load_model(str(tiny_llama), dtype="float32", device="cpu")
    probes = build_probes(load_tokenizer(str(tiny_llama)), 512)
    policy = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    with pytest.raises(SyncError, match="log-probs of the probes"):
        ProbeCheck(policy, probes, torch.float32).set_base([Engine(policy, probes).answers()])
