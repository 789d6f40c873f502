"""Results that are equal to the last bit whatever the batch: products, activations, norms, attention, whole models."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, Qwen2Config, Qwen2ForCausalLM
from transformers.activations import ACT2FN
from transformers.masking_utils import sliding_window_causal_mask_function
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.model.batch_invariant import (
    check_usable,
    chosen_logprobs,
    elementwise,
    is_batch_invariant,
    make_batch_invariant,
    product,
)
from rolltune.model.batch_invariant_attention import BATCH_INVARIANT_PACKED_ATTENTION, batch_invariant_packed_attention
from rolltune.model.load import load_model
from rolltune.model.logprobs import selected_logprobs
from rolltune.model.packed_attention import PackedMask, packed_attention, packed_layout, packed_mask, packed_rows
from rolltune.model.policy import Policy, build_policy
from rolltune.samplers.native import NativeSampler
from rolltune.types import Completion, Prompt, SampleRequest, SamplingParams

CPU = torch.device("cpu")
THREADS = (1, 2, 3)


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# --- products and activations -----------------------------------------------------------------------------------------


def test_product_by_hand():
    a = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    assert product(a, torch.tensor([[1.0, 0.0], [1.0, 1.0]])).tolist() == [[1.0, 3.0], [3.0, 7.0], [5.0, 11.0]]
    assert product(a[:0], torch.ones(4, 2)).shape == (0, 4)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 150),
    inner=st.integers(1, 700),
    outer=st.integers(1, 300),
    data=st.data(),
    seed=st.integers(0, 9),
)
def test_a_row_of_a_product_does_not_depend_on_the_others(rows: int, inner: int, outer: int, data, seed: int):
    a, weight = normal(rows, inner, seed=seed), normal(outer, inner, seed=seed + 1)
    torch.set_num_threads(1)
    whole = product(a, weight)
    torch.testing.assert_close(whole, a @ weight.T, atol=1e-3, rtol=1e-4)
    start = data.draw(st.integers(0, rows - 1))
    stop = data.draw(st.integers(start + 1, rows))
    packed = torch.ops.mkldnn._reorder_linear_weight(weight)
    for count in THREADS:
        torch.set_num_threads(count)
        assert torch.equal(product(a[start:stop], weight), whole[start:stop])
        assert torch.equal(product(a[[start]], packed), whole[[start]])


@pytest.mark.parametrize("name", ["silu", "gelu_pytorch_tanh", "gelu", "relu", "quick_gelu"])
def test_an_element_of_an_activation_does_not_depend_on_the_others(name):
    module, x = ACT2FN[name], normal(33, 1501) * 3
    torch.set_num_threads(1)
    whole = elementwise(module, x)
    torch.testing.assert_close(whole, module(x))
    for count in THREADS:
        torch.set_num_threads(count)
        for start, stop in ((0, 1), (1, 2), (5, 33)):
            assert torch.equal(elementwise(module, x[start:stop]), whole[start:stop])
        assert torch.equal(elementwise(module, x[7, 1:32]), whole[7, 1:32])


@pytest.mark.parametrize("width", [8, 100, 576, 2048, 3001])
@pytest.mark.parametrize("name", ["rms", "layer_norm", "softmax", "log_softmax", "cos"])
def test_rows_of_pytorchs_own_kernels_do_not_depend_on_the_others(name, width):
    function = {
        "rms": LlamaRMSNorm(width),
        "layer_norm": nn.LayerNorm(width),
        "softmax": lambda x: x.softmax(-1),
        "log_softmax": lambda x: x.log_softmax(-1),
        "cos": torch.cos,
    }[name]
    x = normal(70, width) * 3
    with torch.no_grad():
        torch.set_num_threads(1)
        whole = function(x)
        for count in THREADS:
            torch.set_num_threads(count)
            for start, stop in ((0, 1), (3, 5), (9, 70)):
                assert torch.equal(function(x[start:stop]), whole[start:stop])
                assert torch.equal(function(x[None, start:stop])[0], whole[start:stop])


def test_masked_blocks_leave_a_softmax_as_it_is():
    x = normal(5, 192) * 4
    nothing = torch.full((5, 64), -1e30)
    padded = torch.cat([nothing, x[:, :64], nothing, nothing, x[:, 64:], nothing], -1).softmax(-1)
    assert torch.equal(torch.cat([padded[:, 64:128], padded[:, 256:384]], -1), x.softmax(-1))
    assert padded[:, 128:256].abs().max() == 0


def test_chosen_logprobs_by_hand():
    logits = torch.tensor([[0.0, 0.0], [0.0, torch.log(torch.tensor(3.0))]])
    torch.testing.assert_close(chosen_logprobs(logits, torch.tensor([1, 1])), torch.tensor([0.5, 0.75]).log())


def test_selected_logprobs_and_gradients_equal_the_usual_ones():
    hidden, weight = normal(50, 24), normal(70, 24, seed=1)
    targets = torch.arange(50) % 70
    results = []
    for batch_invariant in (False, True):
        h, w = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
        logprobs, entropy = selected_logprobs(h, w, targets, 0.7, batch_invariant=batch_invariant)
        (logprobs * torch.linspace(-1, 1, 50)).sum().backward()
        results.append((logprobs, entropy, h.grad, w.grad))
    for usual, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, usual, atol=1e-4, rtol=1e-5)
    few, _ = selected_logprobs(hidden[[17, 3]], weight, targets[[17, 3]], 0.7, batch_invariant=True)
    assert torch.equal(few, results[1][0][[17, 3]])


# --- attention --------------------------------------------------------------------------------------------------------


def groups_of(*lengths: tuple[int, tuple[int, ...]]) -> list[TrainGroup]:
    """(prompt length, completion lengths) of each group."""
    return [
        TrainGroup(
            prompt=Prompt(token_ids=tuple(range(10, 10 + prompt))),
            sequences=tuple(
                TrainSequence(token_ids=tuple(range(50, 50 + n)), logprobs=(0.0,) * n, advantage=1.0)
                for n in completions
            ),
        )
        for prompt, completions in lengths
    ]


GROUPS = groups_of((70, (3, 66, 1)), (1, (4,)), (64, (1, 1)), (65, (130,)), (2, (2, 1)))


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_packed_attention_and_gradients_equal_the_usual_ones(kv_heads):
    (microbatch,) = pack(GROUPS, max_tokens=10**6)
    layout, count = packed_layout(microbatch), len(microbatch.input_ids)
    q, k, v = (normal(1, heads, count, 8, seed=i).requires_grad_() for i, heads in enumerate((4, kv_heads, kv_heads)))
    upstream = normal(1, count, 4, 8)
    results = []
    for attention in (packed_attention, batch_invariant_packed_attention):
        out, _ = attention(nn.Module(), q, k, v, PackedMask.causal(layout), scaling=0.3)
        results.append((out, *torch.autograd.grad(out, (q, k, v), upstream)))
    for usual, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, usual, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("count", THREADS)
def test_attention_of_a_group_does_not_depend_on_the_others(count):
    torch.set_num_threads(count)
    (microbatch,) = pack(GROUPS, max_tokens=10**6)
    q, k, v = (normal(1, heads, len(microbatch.input_ids), 8, seed=i) for i, heads in enumerate((4, 2, 2)))
    whole, _ = batch_invariant_packed_attention(nn.Module(), q, k, v, PackedMask.causal(packed_layout(microbatch)))
    start = 0
    for group in GROUPS:
        (alone,) = pack([group], max_tokens=10**6)
        part = slice(start, start + len(alone.input_ids))
        out, _ = batch_invariant_packed_attention(
            nn.Module(), q[:, :, part], k[:, :, part], v[:, :, part], PackedMask.causal(packed_layout(alone))
        )
        assert torch.equal(out, whole[:, part])
        start = part.stop
    assert start == len(microbatch.input_ids)


def test_dropout_in_attention_is_refused():
    (microbatch,) = pack(GROUPS, max_tokens=10**6)
    x = normal(1, 2, len(microbatch.input_ids), 8)
    with pytest.raises(ValueError, match="dropout of 0.1"):
        batch_invariant_packed_attention(
            nn.Module(), x, x, x, PackedMask.causal(packed_layout(microbatch)), dropout=0.1
        )


def test_a_window_shorter_than_a_sequence_and_a_softcap_are_refused():
    (microbatch,) = pack(GROUPS, max_tokens=10**6)
    x = normal(1, 2, len(microbatch.input_ids), 8)
    with packed_rows(packed_layout(microbatch)):
        windowed = packed_mask(mask_function=sliding_window_causal_mask_function(9))
    with pytest.raises(ValueError, match=r"model\.batch_invariant: true; .*sliding window"):
        batch_invariant_packed_attention(nn.Module(), x, x, x, windowed)
    with pytest.raises(ValueError, match=r"model\.batch_invariant: true; .*softcap"):
        batch_invariant_packed_attention(
            nn.Module(), x, x, x, PackedMask.causal(packed_layout(microbatch)), softcap=9.0
        )


# --- sampler and trainer ----------------------------------------------------------------------------------------------

PROMPTS = [tuple(4 + (7 * i + n) % 250 for i in range(n)) for n in (20, 1, 66, 65)]
STOP = ("a", "b", "c")  # so that sequences end at different times
REQUESTS = [
    SampleRequest(prompt=Prompt(token_ids=ids), seeds=tuple(100 * len(ids) + i for i in range(2))) for ids in PROMPTS
]


@pytest.fixture(scope="module")
def tiny_qwen2(tmp_path_factory, tokenizer) -> Path:
    """Has biases on q, k and v, three query heads a key head, heads of 12, and an untied LM head."""
    folder = tmp_path_factory.mktemp("qwen2")
    torch.manual_seed(1)
    config = Qwen2Config(
        vocab_size=len(tokenizer),
        hidden_size=72,
        intermediate_size=100,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.2,
        tie_word_embeddings=False,
    )
    model = Qwen2ForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def build(path: Path, lora: LoRAConfig | None = None, *, batch_invariant: bool = True) -> Policy:
    config = ModelConfig(path=str(path), batch_invariant=batch_invariant)
    policy = build_policy(config, lora, device=CPU, seed=0, with_reference=True)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:  # 0 at the start
                parameter.copy_(0.1 * normal(*parameter.shape))
    return policy


@pytest.fixture(params=["llama", "qwen2", "lora"], scope="module")
def policies(request, tiny_llama, tiny_qwen2) -> tuple[Policy, Policy]:
    """One model with the usual kernels and with batch-invariant ones."""
    path = tiny_qwen2 if request.param == "qwen2" else tiny_llama
    lora = LoRAConfig(rank=3, alpha=6.0) if request.param == "lora" else None
    return build(path, lora, batch_invariant=False), build(path, lora)


@pytest.fixture
def policy(policies) -> Policy:
    return policies[1]


def written(
    policy: Policy, tokenizer, params: SamplingParams, *, requests: list[SampleRequest] = REQUESTS, **options
) -> list[tuple[Completion, ...]]:
    return NativeSampler(policy.model, tokenizer, **options).generate(requests, replace(params, stop=STOP))


def train_groups(groups: list[tuple[Completion, ...]]) -> list[TrainGroup]:
    return [
        TrainGroup(
            prompt=request.prompt,
            sequences=tuple(
                TrainSequence(token_ids=c.token_ids, logprobs=c.logprobs, advantage=1.0, support=c.support)
                for c in group
            ),
        )
        for request, group in zip(REQUESTS, groups, strict=True)
    ]


TWENTY = SamplingParams(max_new_tokens=20)
TRUNCATED = replace(TWENTY, temperature=0.9, top_k=40, top_p=0.8)


@pytest.mark.parametrize(
    "params",
    [SamplingParams(max_new_tokens=70), SamplingParams(temperature=0.6, max_new_tokens=70), TRUNCATED],
    ids=["T1", "T0.6", "truncated"],
)
def test_the_trainers_logprobs_are_the_samplers(policy, tokenizer, params):
    groups = written(policy, tokenizer, params)
    assert len({len(c.token_ids) for group in groups for c in group}) > 1 or params == TRUNCATED
    for max_tokens, count in ((10**6, 1), (200, 3), (1, 2)):
        torch.set_num_threads(count)
        for microbatch in pack(train_groups(groups), max_tokens=max_tokens):
            logprobs, _ = policy.logprobs(microbatch, temperature=params.temperature)
            assert torch.equal(logprobs, microbatch.sampler_logprobs)
            with torch.no_grad():
                assert torch.equal(
                    policy.logprobs(microbatch, temperature=params.temperature)[0], microbatch.sampler_logprobs
                )


@pytest.mark.slow
@pytest.mark.parametrize("params", [TWENTY, TRUNCATED], ids=["T1", "truncated"])
def test_completions_do_not_depend_on_the_batch(policy, tokenizer, params):
    torch.set_num_threads(2)
    whole = written(policy, tokenizer, params)
    for count, options in (
        (1, {"max_num_seqs": 1, "prefill_tokens": 1}),
        (2, {"max_num_seqs": 3, "prefill_tokens": 90}),
        (3, {"pack_weights": False}),
    ):
        torch.set_num_threads(count)
        assert written(policy, tokenizer, params, **options) == whole
    halves = [written(policy, tokenizer, params, requests=REQUESTS[i::2]) for i in range(2)]
    assert [halves[i % 2][i // 2] for i in range(len(REQUESTS))] == whole  # as two processes would share them


def test_logprobs_and_gradients_equal_the_usual_kernels(policies, policy, tokenizer):
    microbatch, *_ = pack(train_groups(written(policy, tokenizer, TWENTY)), max_tokens=300)
    results = []
    for each in policies:
        logprobs, _ = each.logprobs(microbatch, temperature=1.0)
        results.append((logprobs.detach(), *torch.autograd.grad(logprobs.mean(), each.trainable_parameters)))
    for usual, ours in zip(*results, strict=True):
        torch.testing.assert_close(ours, usual, atol=1e-5, rtol=1e-3)


def test_the_reference_is_the_policy_to_the_last_bit_at_the_start(tiny_llama, tokenizer):
    policy = build(tiny_llama)
    microbatch, *_ = pack(train_groups(written(policy, tokenizer, TWENTY)), max_tokens=10**6)
    assert torch.equal(policy.reference_logprobs(microbatch, temperature=1.0), microbatch.sampler_logprobs)


def test_only_a_model_loaded_as_batch_invariant_is_so(tiny_llama):
    usual = load_model(str(tiny_llama), dtype="float32", device="cpu")
    ours = load_model(str(tiny_llama), dtype="float32", device="cpu", batch_invariant=True)
    assert is_batch_invariant(ours) and not is_batch_invariant(usual)
    assert ours.config._attn_implementation == BATCH_INVARIANT_PACKED_ATTENTION
    ids = torch.arange(4, 40)[None]
    torch.testing.assert_close(ours(ids).logits, usual(ids).logits, atol=1e-4, rtol=1e-4)


def test_unsupported_types_devices_and_models_are_refused(tiny_llama):
    with pytest.raises(ValueError, match=r"model\.dtype: bfloat16; .*float32"):
        load_model(str(tiny_llama), dtype="bfloat16", device="cpu", batch_invariant=True)
    with pytest.raises(ValueError, match=r"model\.batch_invariant: true; .*cuda"):
        check_usable("float32", "cuda:1")
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=10, n_positions=10))
    with pytest.raises(ValueError, match=r"model\.batch_invariant: true; .*Conv1D"):
        make_batch_invariant(gpt2)
