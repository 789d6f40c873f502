"""Only the LoRA adapter is sent to vLLM: against the trainer and merged weights, and with faults of a sync injected."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from adapter_faults import FAULTS
from peft import LoraConfig, get_peft_model
from vllm_helpers import OPTIONS, requests, shake, trainer_logprobs

from rolltune.errors import EngineError, SyncError
from rolltune.model.load import load_model
from rolltune.samplers.vllm import colocated
from rolltune.samplers.vllm_sampler import VLLMSampler
from rolltune.types import SamplingParams

pytestmark = pytest.mark.vllm

versions = itertools.count(1)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.5)
# A rank that vLLM has no size for, on parts of its fused layers.
RSLORA = LoraConfig(r=9, lora_alpha=6, target_modules=["q_proj", "v_proj", "down_proj"], use_rslora=True)


@pytest.fixture(scope="module")
def make_policy(vllm_folder: Path) -> Callable:
    """A policy with an adapter that has been trained a little: B is no longer zero."""

    def make(lora: LoraConfig, dtype: str = "float32", quantization: str | None = None):
        torch.manual_seed(0)
        base = load_model(str(vllm_folder), dtype=dtype, device="cpu", quantization=quantization)
        model = get_peft_model(base, lora).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if ".lora_B." in name:
                    parameter.normal_(std=0.02)
        return model

    return make


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def sampler(request, make_policy, tokenizer) -> Iterator[VLLMSampler]:
    policy = make_policy(LORA, request.param)
    sampler = colocated(policy, tokenizer, **OPTIONS, lora="adapter")
    sampler.policy = policy
    yield sampler
    sampler.close()


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults_of_a_sync_are_caught(sampler, tokenizer, fault):
    sampler.sync(next(versions))
    kept = {name: p.detach().clone() for name, p in sampler.policy.named_parameters() if p.requires_grad}
    with pytest.MonkeyPatch.context() as monkeypatch:
        message = fault(sampler._engine, monkeypatch, sampler.policy)
        shake(sampler.policy, 6)
        with pytest.raises(SyncError, match=message):
            sampler.sync(next(versions))
        with pytest.raises(AssertionError):  # an unchecked adapter is never sampled with
            sampler.generate(requests(tokenizer, "one"), SamplingParams(max_new_tokens=2))
    sampler._engine._llm.wake_up()
    sampler.policy.load_state_dict(kept, strict=False)
    sampler.sync(next(versions))  # a correct sync repairs the engine
    assert sampler.generate(requests(tokenizer, "one"), SamplingParams(max_new_tokens=2))


def test_only_the_first_sync_sends_the_base_model(sampler):
    sampler.sync(next(versions))
    shake(sampler.policy, 1)
    sampler.sync(next(versions))
    size = sampler.policy.dtype.itemsize
    assert sampler.last_sync.num_bytes == size * sum(p.numel() for p in sampler.policy.parameters() if p.requires_grad)
    assert len(list(sampler._engine._folder.glob("adapter_*"))) == 1


@pytest.mark.parametrize(("adapter", "quantization"), [(RSLORA, None), (LORA, "nf4")], ids=["rslora", "qlora"])
def test_completions_are_those_of_merged_weights(make_policy, tokenizer, adapter, quantization):
    """For the same seeds; and both are the trainer's, whose adapter peft scales."""
    policy, written = make_policy(adapter, quantization=quantization), {}
    wanted = requests(tokenizer, "one", "two and two make " * 12)
    for lora in ("merged", "adapter"):
        sampler = colocated(policy, tokenizer, **OPTIONS, lora=lora)
        try:
            assert lora == "adapter" or sampler._engine.adapter_problems(4, []) == ["takes no adapters"]
            sampler.sync(version := 3)
            written[lora] = sampler.generate(wanted, SamplingParams(temperature=0.8, max_new_tokens=30))
        finally:
            sampler.close()
    for request, merged, apart in zip(wanted, written["merged"], written["adapter"], strict=True):
        assert [c.token_ids for c in merged] == [c.token_ids for c in apart]
        for completion in apart:
            expected = trainer_logprobs(policy, request, completion, 0.8)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=2e-4)
            assert completion.policy_version == version


def test_an_engine_loads_no_adapter_but_the_runs(sampler, tmp_path):
    """Neither a folder that peft has written, nor another run's file, nor one from the Hub."""
    from vllm.lora.request import LoRARequest

    sampler.sync(next(versions))
    sampler.policy.save_pretrained(tmp_path / "peft")
    (file,) = sampler._engine._folder.glob("adapter_*")
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors", file, "org/adapter"):
        with pytest.raises(ValueError, match=r"adapter other: "):
            sampler._engine._llm.llm_engine.add_lora(LoRARequest("other", 10**6, str(path)))


def test_what_the_engine_refuses_is_refused_before_the_first_sync(sampler, make_policy, tokenizer):
    assert sampler._engine.adapter_problems(17, ["model.layers.0.mlp.up_proj", "model.embed_tokens"]) == [
        "takes adapters of rank 8 at most, not 17",
        "has no place for adapters on embed_tokens",
    ]
    with pytest.raises(EngineError, match=r"LoRA rank 40 is greater than max_lora_rank 8"):
        rank = {f"model.layers.0.mlp.up_proj.lora_{m}.weight": torch.zeros(40, 40) for m in "AB"}
        sampler._engine.load_adapter(rank, "run:1")
    with pytest.raises(ValueError, match=r"^sampler\.lora: pickle; must be merged or adapter"):
        colocated(sampler.policy, tokenizer, **OPTIONS, lora="pickle")
    dora = make_policy(LoraConfig(r=4, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match=r"^sampler\.lora: adapter; model\.layers\.0\.self_attn\.q_proj: .* DoRA"):
        colocated(dora, tokenizer, **OPTIONS, lora="adapter")
    with pytest.raises(ValueError, match=r"^sampler\.lora: adapter; the model has no adapter"):
        colocated(dora.unload(), tokenizer, **OPTIONS, lora="adapter")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("vllm.v1.worker.lora_model_runner_mixin.supports_lora", lambda model: False)
        with pytest.raises(ValueError, match=r"^sampler\.lora: adapter; .*LlamaForCausalLM does not support LoRA"):
            colocated(sampler.policy, tokenizer, **OPTIONS, lora="adapter")
    large = make_policy(LoraConfig(r=600, target_modules=["q_proj"]))
    with pytest.raises(ValueError, match=r"^lora\.rank: 600; must be <= 512"):
        colocated(large, tokenizer, **OPTIONS, lora="adapter")
