"""The vLLM sampler with the real engine in this process: against the trainer, and with faults of a sync injected."""

from __future__ import annotations

import itertools
import os
import random
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from sync_faults import loads
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, Qwen2Config, Qwen2ForCausalLM
from vllm_helpers import OPTIONS, requests, shake, trainer_logprobs

from rolltune.errors import SyncError
from rolltune.model.load import load_model
from rolltune.model.weights import policy_weights
from rolltune.samplers import vllm_sync
from rolltune.samplers.native import NativeSampler
from rolltune.samplers.vllm import colocated
from rolltune.samplers.vllm_sampler import VLLMSampler
from rolltune.types import Prompt, SampleRequest, SamplingParams

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module")
def sampler(model, tokenizer) -> Iterator[VLLMSampler]:
    sampler = colocated(model, tokenizer, **OPTIONS)
    yield sampler
    sampler.close()


versions = iter(range(1, 10**6))


# --- completions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_the_trainers(sampler, model, tokenizer, temperature):
    sampler.sync(next(versions))
    wanted = requests(tokenizer, "one", "two and two make " * 12)  # the second is longer than blocks of the cache
    written = sampler.generate(wanted, SamplingParams(temperature=temperature, max_new_tokens=40))
    for request, completions in zip(wanted, written, strict=True):
        assert len({c.token_ids for c in completions}) == 3
        for completion in completions:
            expected = trainer_logprobs(model, request, completion, temperature)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=2e-4)


def test_supports_are_reported_and_logprobs_renormalised(sampler, model, tokenizer):
    sampler.sync(next(versions))
    (request,) = requests(tokenizer, "one", seeds=4)
    params = SamplingParams(temperature=0.8, top_k=7, top_p=0.9, max_new_tokens=30)
    (vllms,) = sampler.generate([request], params)
    (natives,) = NativeSampler(model, tokenizer).generate([request], params)
    for completion in vllms:
        assert completion.support is not None and len(completion.support) == len(completion.token_ids)
        for token, kept in zip(completion.token_ids, completion.support, strict=True):
            assert token in kept and list(kept) == sorted(set(kept)) and len(kept) <= 7
    # The first token's distribution is one for both: the same support, wherever both drew the same token.
    first = {c.token_ids[0]: c.logprobs[0] for c in natives}
    shared = [c for c in vllms if c.token_ids[0] in first]
    for completion in shared:
        assert completion.logprobs[0] == pytest.approx(first[completion.token_ids[0]], abs=1e-4)


def test_params_that_vllm_does_not_support_are_refused(sampler, tokenizer):
    sampler.sync(next(versions))
    with pytest.raises(ValueError, match=r"sampling\.top_p: 0\.9"):
        sampler.generate(requests(tokenizer, "one"), SamplingParams(top_p=0.9))
    with pytest.raises(ValueError, match=r"sampling\.top_k: 2000"):
        sampler.generate(requests(tokenizer, "one"), SamplingParams(top_k=2000))
    with pytest.raises(ValueError, match=r"sampling\.temperature: 3\.0"):
        sampler.generate(requests(tokenizer, "one"), SamplingParams(temperature=3.0))


def test_greedy_is_the_native_samplers(sampler, model, tokenizer):
    sampler.sync(next(versions))
    wanted = requests(tokenizer, "one", "two", seeds=1)
    params = SamplingParams(temperature=0.0, top_p=0.5, max_new_tokens=30)
    vllms, natives = sampler.generate(wanted, params), NativeSampler(model, tokenizer).generate(wanted, params)
    assert [(c.token_ids, c.logprobs, c.text) for (c,) in vllms] == [
        (c.token_ids, c.logprobs, c.text) for (c,) in natives
    ]
    assert set(vllms[0][0].logprobs) == {0.0}


def test_completions_depend_only_on_their_seeds(sampler, tokenizer):
    sampler.sync(next(versions))
    params = SamplingParams(max_new_tokens=20)
    a, b = requests(tokenizer, "one", "two", seeds=2)
    together = sampler.generate([a, b], params)
    assert sampler.generate([b], params)[0] == together[1]
    assert sampler.generate([b, a], params)[1] == together[0]


def test_completions_end_as_with_the_native_sampler(sampler, model, tokenizer):
    sampler.sync(next(versions))
    wanted = requests(tokenizer, "one", "two", "three", seeds=8)
    params = SamplingParams(temperature=2.0, max_new_tokens=300)  # hot, or the tiny model would hardly ever end a text
    written = [c for group in sampler.generate(wanted, params) for c in group]
    ended = [c for c in written if c.finish_reason == "stop"]
    assert ended and all(c.token_ids[-1] == tokenizer.eos_token_id for c in ended)
    assert all(tokenizer.eos_token_id not in c.token_ids[:-1] for c in written)
    assert all(len(c.token_ids) == 300 for c in written if c.finish_reason == "length")
    (whole,), (group,) = (
        sampler.generate(wanted[:1], SamplingParams(max_new_tokens=300, stop=stop)) for stop in ((), ("a", "ef"))
    )
    # vLLM waits for complete characters, which random bytes seldom form, so a stop is not always at the first "a".
    assert all(w.token_ids[: len(c.token_ids)] == c.token_ids for w, c in zip(whole, group, strict=True))
    stopped = [c for w, c in zip(whole, group, strict=True) if len(c.token_ids) < len(w.token_ids)]
    assert stopped and all(c.finish_reason == "stop" and ("a" in c.text or "ef" in c.text) for c in stopped)


def test_completions_are_reported_as_they_finish_with_the_prefill(sampler, tokenizer):
    sampler.sync(version := next(versions))
    prompt = Prompt(token_ids=tuple(tokenizer.encode("one <think>")), prefill="<think>")
    seen, progress = [], []
    (group,) = sampler.generate(
        [SampleRequest(prompt=prompt, seeds=(5, 6, 7))],
        SamplingParams(max_new_tokens=9),
        on_progress=lambda done, total: progress.append((done, total)),
        on_completion=lambda i, j, c: seen.append((i, j, c)),
    )
    assert sorted(seen, key=lambda s: s[1]) == [(0, j, c) for j, c in enumerate(group)]
    assert progress == [(1, 3), (2, 3), (3, 3)]
    assert all(c.text.startswith("<think>") and c.policy_version == version for c in group)


def test_more_prompts_than_vllm_reads_at_once(model, tokenizer):
    """vLLM 0.32 crashes on a CPU if a prompt is prefilled in chunks."""
    sampler = colocated(model, tokenizer, **OPTIONS, options={"max_num_batched_tokens": 400})
    try:
        sampler.sync(0)
        wanted = requests(tokenizer, *(f"{i} and two and two make " * 7 for i in range(9)), seeds=2)
        assert sum(len(r.prompt.token_ids) for r in wanted) > 3 * 400
        written = sampler.generate(wanted, SamplingParams(max_new_tokens=8))
        for request, (completion, _) in zip(wanted, written, strict=True):
            expected = trainer_logprobs(model, request, completion, 1.0)
            torch.testing.assert_close(torch.tensor(completion.logprobs), expected, rtol=0, atol=2e-4)
    finally:
        sampler.close()


def test_prompts_that_do_not_fit_are_refused(sampler, tokenizer):
    sampler.sync(next(versions))
    with pytest.raises(ValueError, match=r"request 0 has no tokens"):
        sampler.generate([SampleRequest(prompt=Prompt(token_ids=()), seeds=(0,))], SamplingParams())
    with pytest.raises(ValueError, match=r"max_new_tokens: 389.*12 tokens.*400"):
        sampler.generate(requests(tokenizer, "three " * 2), SamplingParams(max_new_tokens=389))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int8"}, r"sampler\.dtype: int8; .*float32"),
        ({"max_num_seqs": 0}, r"sampler\.max_num_seqs: 0"),
        ({"kv_cache_gib": 0.0}, r"sampler\.kv_cache_gib: 0\.0"),
        ({"max_model_len": 4096}, r"sampler\.max_model_len: 4096; .*512"),
    ],
)
def test_options_out_of_range_are_refused_before_anything_is_loaded(model, tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        colocated(model, tokenizer, **OPTIONS | options)


def test_another_version_of_vllm_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr("rolltune.endpoints.serving._distribution", lambda: "0.31.2+cpu")
    with pytest.raises(ValueError, match=r"0\.31\.2\+cpu.*0\.32"):
        colocated(model, tokenizer, **OPTIONS)


# --- sync -------------------------------------------------------------------------------------------------------------


def test_a_sync_brings_the_new_weights(sampler, model, tokenizer):
    sampler.sync(next(versions))
    (request,) = requests(tokenizer, "two and two make " * 12, seeds=1)  # its blocks are cached now
    params = SamplingParams(max_new_tokens=20)
    ((before,),) = sampler.generate([request], params)
    shake(model, 1)
    sampler.sync(version := next(versions))
    assert sampler.last_sync.probe_gap < 1e-4
    ((after,),) = sampler.generate([request], params)
    assert after.policy_version == version == before.policy_version + 1
    expected = trainer_logprobs(model, request, after, 1.0)
    torch.testing.assert_close(torch.tensor(after.logprobs), expected, rtol=0, atol=2e-4)
    assert before.logprobs != after.logprobs


def test_a_version_is_sent_only_once(sampler, monkeypatch):
    sampler.sync(version := next(versions))
    monkeypatch.setattr(sampler._engine, "load_weights", None)
    sampler.sync(version)


@pytest.mark.parametrize(
    ("dtype", "quantization", "engine"),
    [("bfloat16", None, "bfloat16"), ("float32", None, "bfloat16"), ("float32", "nf4", "float32")],
)
def test_lora_and_other_precisions(vllm_folder, tokenizer, dtype, quantization, engine):
    base = load_model(str(vllm_folder), dtype=dtype, device="cpu", quantization=quantization)
    torch.manual_seed(0)
    lora = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.5, target_modules="all-linear", init_lora_weights=False)
    lora.use_dora = dtype == "bfloat16"
    model = get_peft_model(base, lora).train()
    sampler = colocated(model, tokenizer, **OPTIONS, dtype=engine)
    try:
        for version in range(2):
            sampler.sync(version)
            shake(model, version)
        (request,) = requests(tokenizer, "one", seeds=4)
        shake(model, 5)
        sampler.sync(2)
        assert model.training and all(layer.training for layer in model.modules() if "Dropout" in type(layer).__name__)
        (group,) = sampler.generate([request], SamplingParams(max_new_tokens=40))
        model.eval()
        gaps = torch.cat([(trainer_logprobs(model, request, c, 1.0) - torch.tensor(c.logprobs)).abs() for c in group])
        assert gaps.mean() < (0.1 if engine == "bfloat16" else 1e-3)
    finally:
        sampler.close()


def test_an_interrupted_load_does_not_block_the_next(sampler, model, monkeypatch):
    def broken(model, dtype):
        yield from itertools.islice(policy_weights(model, dtype), 5)
        raise RuntimeError("no more")

    sampler.sync(next(versions))
    shake(model, 7)
    with monkeypatch.context() as patch:
        patch.setattr(vllm_sync, "policy_weights", broken)
        with pytest.raises(SyncError, match="RuntimeError: no more"):
            sampler.sync(next(versions))
    sampler.sync(next(versions))


# --- side effects -----------------------------------------------------------------------------------------------------


def state() -> tuple:
    return (
        torch.get_rng_state().tolist(),
        random.getstate(),
        np.random.get_state()[1].tolist(),  # pyright: ignore[reportIndexIssue]
        dict(os.environ),
        torch.get_num_threads(),
        torch.set_num_threads,
        torch.get_default_dtype(),
        torch.is_grad_enabled(),
        torch.are_deterministic_algorithms_enabled(),
    )


def test_the_process_state_is_preserved(model, tokenizer, monkeypatch):
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "7")
    before = state()
    second = colocated(model, tokenizer, **OPTIONS)  # beside the first
    assert state() == before
    try:
        second.sync(0)
        assert state() == before
        second.generate(requests(tokenizer, "one"), SamplingParams(max_new_tokens=20, top_k=3))
        assert state() == before
    finally:
        second.close()
    assert state() == before


def test_an_interrupted_call_leaves_no_requests_in_the_engine(sampler, tokenizer):
    sampler.sync(next(versions))

    def interrupt(i, j, completion):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(requests(tokenizer, "one"), SamplingParams(max_new_tokens=50), on_completion=interrupt)
    assert not sampler._engine._llm.llm_engine.has_unfinished_requests()
    sampler.generate(requests(tokenizer, "one"), SamplingParams(max_new_tokens=5))


def test_biases_and_an_untied_head(tokenizer, tmp_path):
    """Qwen2's attention has biases, which vLLM fuses as it fuses weights."""
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=512, initializer_range=0.2, tie_word_embeddings=False,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    Qwen2ForCausalLM(config).save_pretrained(tmp_path)
    for dtype in ("float32", "bfloat16"):
        model = load_model(str(tmp_path), dtype=dtype, device="cpu")
        shake(model, 0)  # biases start at 0
        sampler = colocated(model, tokenizer, **OPTIONS)
        try:
            sampler.sync(0)
            shake(model, 1)
            sampler.sync(1)
            with torch.no_grad():
                model.model.layers[1].self_attn.k_proj.bias += 1.0
            with pytest.MonkeyPatch.context() as monkeypatch:
                lost = "model.layers.1.self_attn.k_proj.bias"
                loads(sampler._engine, monkeypatch, lambda name, t, lost=lost: None if name == lost else t)
                with pytest.raises(SyncError, match=r"layers\.1\.self_attn\.k_proj\.bias"):
                    sampler.sync(2)
            sampler.sync(2)
        finally:
            sampler.close()


def test_an_fp32_head_is_the_engines_too(vllm_folder, tokenizer):
    gaps = {}
    for fp32_head in (False, True):
        model = load_model(str(vllm_folder), dtype="bfloat16", device="cpu", fp32_head=fp32_head)
        sampler = colocated(model, tokenizer, **OPTIONS)
        try:
            sampler.sync(0)
            assert (sampler._engine._llm.model_config.head_dtype == torch.float32) == fp32_head
            (request,) = requests(tokenizer, "one", seeds=8)
            (group,) = sampler.generate([request], SamplingParams(max_new_tokens=60))
        finally:
            sampler.close()
        theirs = torch.cat([torch.tensor(c.logprobs) for c in group])
        ours = torch.cat([trainer_logprobs(model, request, c, 1.0) for c in group])
        gaps[fp32_head] = (ours - theirs).abs().mean()
    assert gaps[True] < 0.1 and gaps[False] < 0.1


@pytest.mark.slow
def test_a_model_that_vllm_runs_by_transformers_code_is_refused(tokenizer, tmp_path):
    """In a process of its own: vLLM changes the model's class for good."""
    config = GPTNeoXConfig(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        max_position_embeddings=512, bos_token_id=None, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPTNeoXForCausalLM(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    code = (
        "from rolltune.model.load import load_model, load_tokenizer\n"
        "from rolltune.samplers.vllm import colocated\n"
        f"model = load_model({str(tmp_path)!r}, dtype='float32', device='cpu')\n"
        f"colocated(model, load_tokenizer({str(tmp_path)!r}), **{OPTIONS})"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ValueError: sampler: vLLM runs GPTNeoXModel by transformers' code" in run.stderr
    assert "samplers.vllm.served" in run.stderr
