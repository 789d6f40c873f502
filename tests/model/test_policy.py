import json
import shutil
from dataclasses import replace

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.model.policy import Policy, build_policy
from rolltune.samplers.native import NativeSampler
from rolltune.types import Prompt, SampleRequest, SamplingParams

CPU = torch.device("cpu")
LORA = LoRAConfig(rank=4, alpha=8.0)


@pytest.fixture(scope="module")
def microbatch():
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(4, 250, (30,), generator=generator).tolist()
    sequence = TrainSequence(token_ids=tuple(ids[8:]), logprobs=(0.0,) * 22, advantage=1.0)
    (microbatch,) = pack([TrainGroup(prompt=Prompt(token_ids=tuple(ids[:8])), sequences=(sequence,))], max_tokens=100)
    return microbatch


def build(path, lora=None, **options):
    options = {"device": CPU, "seed": 0, "with_reference": True} | options
    return build_policy(ModelConfig(path=str(path)), lora, **options)


def train_a_little(policy: Policy, microbatch, steps: int = 3) -> None:
    optimizer = torch.optim.SGD(policy.trainable_parameters, lr=0.5)
    for _ in range(steps):
        (-policy.logprobs(microbatch, temperature=1.0)[0].mean()).backward()
        optimizer.step()
        optimizer.zero_grad()


def current(policy: Policy, microbatch):
    return policy.logprobs(microbatch, temperature=1.0)[0].detach()


@pytest.mark.parametrize("lora", [None, LORA], ids=["full", "lora"])
def test_the_reference_stays_at_the_start(tiny_llama, microbatch, lora):
    policy = build(tiny_llama, lora)
    start = current(policy, microbatch)
    torch.testing.assert_close(policy.reference_logprobs(microbatch, temperature=1.0), start, rtol=0, atol=0)
    train_a_little(policy, microbatch)
    assert (current(policy, microbatch) - start).abs().max() > 0.01
    torch.testing.assert_close(policy.reference_logprobs(microbatch, temperature=1.0), start, rtol=0, atol=0)


def test_the_reference_of_lora_after_sft_is_the_sft_adapter(tiny_llama, tokenizer, microbatch, tmp_path):
    sft = build(tiny_llama, LORA)
    base = current(sft, microbatch)
    train_a_little(sft, microbatch)
    after_sft = current(sft, microbatch)
    assert (after_sft - base).abs().max() > 0.01
    sft.save(tmp_path / "sft", tokenizer)

    policy = build(tmp_path / "sft", LORA)
    torch.testing.assert_close(policy.reference_logprobs(microbatch, temperature=1.0), after_sft, rtol=0, atol=1e-6)
    torch.testing.assert_close(current(policy, microbatch), after_sft, rtol=0, atol=1e-6)
    before = {name: p.clone() for name, p in policy.model.named_parameters() if ".reference." in name}
    assert before
    train_a_little(policy, microbatch)
    assert (current(policy, microbatch) - after_sft).abs().max() > 0.01
    torch.testing.assert_close(policy.reference_logprobs(microbatch, temperature=1.0), after_sft, rtol=0, atol=1e-6)
    for name, parameter in policy.model.named_parameters():
        if name in before:
            assert not parameter.requires_grad
            torch.testing.assert_close(parameter, before[name], rtol=0, atol=0)


def test_switching_to_the_reference_keeps_the_trainable_set(tiny_llama, tokenizer, microbatch, tmp_path):
    sft = build(tiny_llama, LORA)
    sft.save(tmp_path / "sft", tokenizer)
    policy = build(tmp_path / "sft", LORA)
    names = {name for name, p in policy.model.named_parameters() if p.requires_grad}
    assert names and all(".default." in name for name in names)
    policy.reference_logprobs(microbatch, temperature=1.0)
    assert {name for name, p in policy.model.named_parameters() if p.requires_grad} == names


def test_the_reference_of_a_resumed_policy_is_the_start_of_the_run(tiny_llama, tokenizer, microbatch, tmp_path):
    for name, lora in (("full", None), ("lora", LORA)):
        policy = build(tiny_llama, lora)
        start = current(policy, microbatch)
        train_a_little(policy, microbatch)
        trained = current(policy, microbatch)
        policy.save(tmp_path / name, tokenizer)
        resumed = build(tiny_llama, lora, resume_from=tmp_path / name)
        torch.testing.assert_close(current(resumed, microbatch), trained, rtol=0, atol=0)
        torch.testing.assert_close(resumed.reference_logprobs(microbatch, temperature=1.0), start, rtol=0, atol=0)


@pytest.mark.parametrize("kind", [{}, {"rslora": True}, {"dora": True}], ids=["lora", "rslora", "dora"])
def test_adapters_of_each_kind_train_and_load_in_plain_peft(tiny_llama, tokenizer, microbatch, tmp_path, kind):
    lora = replace(LORA, **kind)
    policy = build(tiny_llama, lora)
    start = {name: p.detach().clone() for name, p in policy.model.named_parameters() if p.requires_grad}
    train_a_little(policy, microbatch)
    assert all(not torch.equal(p, start[name]) for name, p in policy.model.named_parameters() if name in start)
    assert any("lora_magnitude_vector" in name for name in start) == lora.dora
    policy.save(tmp_path / "lora", tokenizer)
    plain = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tiny_llama), str(tmp_path / "lora"))
    ids = microbatch.input_ids[None]
    with torch.no_grad():
        logits = policy.causal_lm(ids).logits
        torch.testing.assert_close(plain(ids).logits, logits, atol=1e-5, rtol=1e-5)
        merged = plain.merge_and_unload()
        torch.testing.assert_close(merged(ids).logits, logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(current(build(tmp_path / "lora", lora), microbatch), current(policy, microbatch))
    if kind:
        with pytest.raises(ValueError, match=rf"lora\.{next(iter(kind))}: false; the adapter at .* with true"):
            build(tmp_path / "lora", LORA)


def test_saved_folders_load_in_plain_transformers(tiny_llama, tokenizer, microbatch, tmp_path):
    full = build(tiny_llama)
    train_a_little(full, microbatch)
    full.save(tmp_path / "full", tokenizer)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "full")
    ids = microbatch.input_ids[None]
    with torch.no_grad():
        torch.testing.assert_close(plain(ids).logits, full.causal_lm(ids).logits, atol=1e-5, rtol=1e-5)


def test_lora_trains_only_the_adapter(tiny_llama):
    policy = build(tiny_llama, LORA)
    assert all("lora_" in name for name, p in policy.model.named_parameters() if p.requires_grad)
    # Rank 4 on every linear layer of two blocks: 4 * (in + out) each.
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]
    assert sum(p.numel() for p in policy.trainable_parameters) == 2 * sum(4 * (i + o) for i, o in shapes)


def test_an_adapter_needs_a_lora_section_with_its_rank(tiny_llama, tokenizer, tmp_path):
    build(tiny_llama, LORA).save(tmp_path / "sft", tokenizer)
    with pytest.raises(ValueError, match="lora: .*is a LoRA adapter"):
        build(tmp_path / "sft")
    with pytest.raises(ValueError, match="lora: rank 8, .*has rank 4"):
        build(tmp_path / "sft", LoRAConfig(rank=8, alpha=8.0))


def test_adapters_start_the_same_for_the_same_seed_only(tiny_llama):
    def weights(seed):
        return torch.cat([p.flatten() for p in build(tiny_llama, LORA, seed=seed).trainable_parameters])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_bfloat16_stays_near_float32(tiny_llama, microbatch):
    exact = current(build(tiny_llama), microbatch)
    half = build_policy(
        ModelConfig(path=str(tiny_llama), dtype="bfloat16"), None, device=CPU, seed=0, with_reference=False
    )
    rounded = current(half, microbatch)
    assert rounded.dtype == torch.float32
    assert (rounded - exact).abs().mean() < 0.1


def test_target_modules_by_name_spaces_or_not(tiny_llama):
    policy = build(tiny_llama, LoRAConfig(rank=4, alpha=8.0, target_modules="q_proj, v_proj"))
    adapted = {
        name.split(".lora_")[0].rsplit(".", 1)[-1] for name, p in policy.model.named_parameters() if p.requires_grad
    }
    assert adapted == {"q_proj", "v_proj"}


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=0.6, top_p=0.9, max_new_tokens=24),
        SamplingParams(top_k=20, max_new_tokens=24),
        SamplingParams(top_k=20, top_p=0.9, max_new_tokens=24),
    ],
    ids=["top-p", "top-k", "top-k and top-p"],
)
def test_the_trainer_has_the_truncated_samplers_log_probs(tiny_llama, tokenizer, params):
    """The reference too has the same log-probs, so that the KL of a policy that has not moved is 0."""
    policy = build(tiny_llama)
    prompt = Prompt(token_ids=tuple(tokenizer("<|user|>What is 2 + 2?<|end|><|assistant|>")["input_ids"]))
    (written,) = NativeSampler(policy.model, tokenizer).generate(
        [SampleRequest(prompt=prompt, seeds=tuple(range(24)))], params
    )
    sequences = [
        TrainSequence(token_ids=c.token_ids, logprobs=c.logprobs, advantage=1.0, support=c.support) for c in written
    ]
    (microbatch,) = pack([TrainGroup(prompt=prompt, sequences=tuple(sequences))], max_tokens=10_000)
    assert len(microbatch.target_ids) > 200
    ours, entropy = policy.logprobs(microbatch, temperature=params.temperature)
    torch.testing.assert_close(ours.detach(), microbatch.sampler_logprobs, atol=1e-4, rtol=0)
    assert torch.exp(ours - microbatch.sampler_logprobs).mean().item() == pytest.approx(1, abs=1e-4)
    torch.testing.assert_close(policy.reference_logprobs(microbatch, temperature=params.temperature), ours.detach())
    full, full_entropy = policy.logprobs(replace(microbatch, support=None), temperature=params.temperature)
    assert torch.exp(full - microbatch.sampler_logprobs).mean().item() < 0.95, "the kept mass"
    assert (entropy < full_entropy).all()


def test_a_loaded_adapter_has_the_configs_dropout_and_layers(tiny_llama, tokenizer, microbatch, tmp_path):
    """An adapter that was trained with dropout, here 0.5, is trained on without it unless the config says so."""
    folder = tmp_path / "sft"
    sft = build(tiny_llama, LoRAConfig(rank=4, alpha=8.0, dropout=0.5, target_modules="q_proj,down_proj"))
    with sft.with_dropout():
        train_a_little(sft, microbatch)
        assert not torch.equal(current(sft, microbatch), current(sft, microbatch))
    sft.save(folder, tokenizer)
    lora = LoRAConfig(rank=4, alpha=8.0, target_modules="q_proj,down_proj")
    policy = build(folder, lora)
    with policy.with_dropout():
        assert not policy.has_dropout and torch.equal(current(policy, microbatch), current(policy, microbatch))
        start = policy.reference_logprobs(microbatch, temperature=1.0)
        assert torch.equal(start, current(policy, microbatch)) and torch.equal(start, current(sft, microbatch))
    policy.save(tmp_path / "again", tokenizer)
    assert json.loads((tmp_path / "again" / "adapter_config.json").read_text())["lora_dropout"] == 0.0
    with (kept := build(folder, replace(lora, dropout=0.3))).with_dropout():
        rates = {m.p for name, m in kept.model.named_modules() if ".lora_dropout.default" in name and m.training}
    assert rates == {0.3}, "and the reference's is off"
    for modules in ("q_proj", "all-linear"):
        with pytest.raises(ValueError, match=f"lora.target_modules: {modules}; stands for .* on 4 .down_proj, q_proj"):
            build(folder, replace(lora, target_modules=modules))


def test_an_adapter_on_the_lm_head_is_refused(tiny_llama):
    with pytest.raises(ValueError, match="lora.target_modules: lm_head; an adapter on the LM head is not supported"):
        build(tiny_llama, replace(LORA, target_modules="q_proj,lm_head"))


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory, tokenizer):
    """A model whose config has dropout: 0.1 in embeddings, attention and residuals."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=64, initializer_range=0.2
    )
    folder = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("checkpointing", [False, True])
def test_dropout_of_the_model_is_off_unless_asked_for(gpt2, tiny_llama, microbatch, checkpointing):
    def policy(path=gpt2, **options):
        model = ModelConfig(path=str(path), gradient_checkpointing=checkpointing, **options)
        return build_policy(model, None, device=CPU, seed=0, with_reference=True)

    plain, dropping = policy(), policy(dropout=True)
    for each in (plain, dropping):  # old policy and reference: without dropout
        assert torch.equal(current(each, microbatch), each.reference_logprobs(microbatch, temperature=1.0))
    assert (plain.has_dropout, dropping.has_dropout) == (False, True)
    with plain.with_dropout(), dropping.with_dropout():
        assert torch.equal(current(plain, microbatch), plain.reference_logprobs(microbatch, temperature=1.0))
        gap = current(dropping, microbatch) - dropping.reference_logprobs(microbatch, temperature=1.0)
        assert gap.abs().max() > 0.01
        train_a_little(dropping, microbatch)
    with pytest.raises(ValueError, match="model.dropout: true; the config of .* has no dropout; leave it out"):
        policy(tiny_llama, dropout=True)


def test_an_adapter_loads_from_any_working_directory(tiny_llama, tokenizer, microbatch, tmp_path, monkeypatch):
    """Its base was given by a relative path; then the base moves, and so does the folder of the run."""
    (tmp_path / "models").mkdir()
    shutil.copytree(tiny_llama, tmp_path / "models/base")
    monkeypatch.chdir(tmp_path)
    policy = build("models/base", LORA)
    train_a_little(policy, microbatch)
    policy.save(tmp_path / "run/adapter", tokenizer)
    expected = current(policy, microbatch)
    monkeypatch.chdir("/")
    again = build(tmp_path / "run/adapter", LORA)
    assert torch.equal(current(again, microbatch), expected)
    assert AutoPeftModelForCausalLM.from_pretrained(tmp_path / "run/adapter").peft_config["default"].r == 4

    (tmp_path / "models/base").rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=rf"adapter: its base model {tmp_path}/models/base is not there; move it back"):
        build(tmp_path / "run/adapter", LORA)
    file = tmp_path / "run/adapter/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "../moved"}))
    monkeypatch.chdir(tmp_path / "models")
    build("../run/adapter", LORA).save(tmp_path / "again", tokenizer)
    monkeypatch.chdir("/")
    assert torch.equal(current(build(tmp_path / "again", LORA), microbatch), expected)


def test_a_damaged_adapter_config_is_named(tiny_llama, tokenizer, tmp_path):
    build(tiny_llama, LORA).save(tmp_path / "adapter", tokenizer)
    (tmp_path / "adapter/adapter_config.json").write_text('{"base_model')
    with pytest.raises(ValueError, match=r"model\.path: .*adapter_config\.json: is damaged"):
        build(tmp_path / "adapter", LORA)
