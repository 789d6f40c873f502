"""The native sampler against plain forward passes and transformers' own generate."""

from __future__ import annotations

import copy
import threading
from collections.abc import Sequence
from contextlib import contextmanager

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import (
    Gemma2Config,
    GptOssConfig,
    Lfm2Config,
    MistralConfig,
    PreTrainedModel,
    T5Config,
    T5ForConditionalGeneration,
)

from rolltune.model.parts import attention
from rolltune.samplers.native import NativeSampler
from rolltune.types import Completion, Prompt, SampleRequest, SamplingParams

EOS = 27


def letters(text: str) -> tuple[int, ...]:
    return tuple(26 if c == " " else ord(c) - ord("a") for c in text)


PROMPTS = [letters(text) for text in ("what is two and two", "q", "how many", "a longer one than the others are", "ab")]


def requests(seeds: int, prompts: Sequence[tuple[int, ...]] = PROMPTS, prefill: str = "") -> list[SampleRequest]:
    return [
        SampleRequest(
            prompt=Prompt(token_ids=ids, prefill=prefill), seeds=tuple(1000 * sum(ids) + i for i in range(seeds))
        )
        for ids in prompts
    ]


def reference_logprobs(model: nn.Module, prompt: Sequence[int], completion: Completion, params: SamplingParams):
    """Log-probs of a completion from one plain forward pass, renormalised over the support in float64."""
    return [logprob for logprob, _ in reference(model, prompt, completion, params)]


def reference(model: nn.Module, prompt: Sequence[int], completion: Completion, params: SamplingParams):
    """Log-probs as in :func:`reference_logprobs`, each with its support."""
    ids = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].double()
    logprobs = torch.log_softmax(logits / params.temperature, -1)
    result = []
    for exact, token in zip(logprobs, completion.token_ids, strict=True):
        values, order = exact.sort(descending=True, stable=True)
        if params.top_k:
            values, order = values[: params.top_k], order[: params.top_k]
            values = values - values.logsumexp(0)
        keep = int((values.exp().cumsum(0) < params.top_p).sum()) + 1
        values, order = values[:keep], order[:keep]
        index = (order == token).nonzero()
        assert len(index) == 1, f"token {token} is not in the support"
        result.append(((values - values.logsumexp(0))[index.item()].item(), tuple(sorted(order.tolist()))))
    return result


@contextmanager
def recorded(model: nn.Module):
    """Record the shapes of input_ids of every forward pass."""
    shapes: list[tuple[int, ...]] = []
    hook = model.register_forward_pre_hook(
        lambda _m, _a, k: shapes.append(tuple(k["input_ids"].shape)), with_kwargs=True
    )
    yield shapes
    hook.remove()


def ids_of(groups: list[tuple[Completion, ...]]) -> list[list[tuple[int, ...]]]:
    return [[completion.token_ids for completion in group] for group in groups]


# --- completions ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("maker", ["make_llama", "make_qwen2"])
@pytest.mark.parametrize("tied", [False, True])
def test_greedy_is_what_transformers_generates(request, letter_tokenizer, maker: str, tied: bool):
    model = request.getfixturevalue(maker)(tie_word_embeddings=tied)
    sampler = NativeSampler(model, letter_tokenizer)
    groups = sampler.generate(requests(2), SamplingParams(temperature=0.0, top_k=5, max_new_tokens=40))
    for ids, group in zip(PROMPTS, groups, strict=True):
        expected = model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=False,
            max_new_tokens=40,
        )
        expected = tuple(expected[0, len(ids) :].tolist())
        for completion in group:
            assert completion.token_ids == expected
            assert completion.logprobs == (0.0,) * len(expected)
            assert completion.support is None
            assert completion.finish_reason == ("stop" if expected[-1] == EOS else "length")


def rounding(params: SamplingParams) -> float:
    """Room between log-probs of two float32 forward passes that sum in another order: a hundred ulps of logits
    of order 1, which a temperature below 1 stretches."""
    return 100 * torch.finfo(torch.float32).eps / min(1.0, params.temperature or 1.0)


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(temperature=1.0, max_new_tokens=30),
        SamplingParams(temperature=0.6, max_new_tokens=30),
        SamplingParams(temperature=1.0, top_k=4, max_new_tokens=30),
        SamplingParams(temperature=1.3, top_p=0.8, max_new_tokens=30),
        SamplingParams(temperature=0.9, top_k=12, top_p=0.9, max_new_tokens=30),
    ],
    ids=["T1", "T0.6", "top-k", "top-p", "top-k and top-p"],
)
@pytest.mark.parametrize("maker", ["make_llama", "make_qwen2"])
def test_logprobs_are_those_of_a_plain_forward_pass(request, letter_tokenizer, maker: str, params: SamplingParams):
    model = request.getfixturevalue(maker)()
    groups = NativeSampler(model, letter_tokenizer, max_num_seqs=7, prefill_tokens=20).generate(requests(4), params)
    lengths = set()
    for ids, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            lengths.add(len(completion.token_ids))
            expected, support = zip(*reference(model, ids, completion, params), strict=True)
            assert completion.logprobs == pytest.approx(expected, abs=rounding(params))
            assert completion.support == (support if params.truncates else None)
    assert len(lengths) > 3, "the sequences should have ended at different times"


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize(("dtype", "room"), [(torch.bfloat16, 1), (torch.float16, 1 / 8)])
def test_half_precision_stays_near_a_plain_forward_pass(make_llama, letter_tokenizer, lora: bool, dtype, room: float):
    model = make_llama().to(dtype)
    policy = (with_lora(model) if lora else model).eval()
    groups = NativeSampler(policy, letter_tokenizer).generate(requests(4), SamplingParams(max_new_tokens=20))
    errors = []
    for ids, group in zip(PROMPTS, groups, strict=True):
        for completion in group:
            expected = reference_logprobs(policy, ids, completion, SamplingParams())
            errors += [abs(a - b) for a, b in zip(completion.logprobs, expected, strict=True)]
    assert sum(errors) / len(errors) < 0.02 * room
    assert max(errors) < 0.3 * room


def with_lora(model: PreTrainedModel) -> PeftModel:
    torch.manual_seed(1)
    policy = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.5))
    assert isinstance(policy, PeftModel)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.2)
    return policy


def test_adapters_of_a_peft_model_are_used_without_dropout(make_llama, letter_tokenizer):
    model = make_llama()
    bare = NativeSampler(model, letter_tokenizer).generate(requests(3), SamplingParams(max_new_tokens=20))
    policy = with_lora(model).train()
    adapted = NativeSampler(policy, letter_tokenizer).generate(requests(3), SamplingParams(max_new_tokens=20))
    assert ids_of(bare) != ids_of(adapted)
    policy.eval()
    for ids, group in zip(PROMPTS, adapted, strict=True):
        for completion in group:
            expected = reference_logprobs(policy, ids, completion, SamplingParams())
            assert completion.logprobs == pytest.approx(expected, abs=rounding(SamplingParams()))


@pytest.mark.parametrize("pack_weights", [False, True])
def test_weights_are_always_current(llama, letter_tokenizer, pack_weights: bool):
    sampler = NativeSampler(llama, letter_tokenizer, pack_weights=pack_weights)
    params = SamplingParams(max_new_tokens=12)
    before = sampler.generate(requests(3), params)
    with torch.no_grad():
        for parameter in llama.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    sampler.sync(3)
    after = sampler.generate(requests(3), params)
    assert ids_of(before) != ids_of(after)
    assert {c.policy_version for group in before for c in group} == {0}
    assert {c.policy_version for group in after for c in group} == {3}
    for ids, group in zip(PROMPTS, after, strict=True):
        for completion in group:
            expected = reference_logprobs(llama, ids, completion, params)
            assert completion.logprobs == pytest.approx(expected, abs=rounding(params))


def test_sampled_frequencies_follow_the_exact_distribution(llama, letter_tokenizer):
    """Chi-square of the first two tokens of 3000 completions against the model's probabilities."""
    n, params = 3000, SamplingParams(temperature=1.5, max_new_tokens=2)
    request = SampleRequest(prompt=Prompt(token_ids=PROMPTS[0]), seeds=tuple(range(n)))
    (group,) = NativeSampler(llama, letter_tokenizer, max_num_seqs=500).generate([request], params)
    with torch.no_grad():
        first = torch.softmax(llama(torch.tensor([PROMPTS[0]])).logits[0, -1] / 1.5, -1)
        second = torch.softmax(llama(torch.tensor([[*PROMPTS[0], t] for t in range(32)])).logits[:, -1] / 1.5, -1)
    second[EOS] = 0  # nothing follows it
    expected = torch.cat(((first[:, None] * second).flatten(), first[EOS, None])).double() * n
    counts = torch.zeros_like(expected)
    for completion in group:
        ids = completion.token_ids
        counts[-1 if ids[0] == EOS else 32 * ids[0] + ids[1]] += 1
    common = expected >= 5  # the chi-square approximation needs that; the rest is one class
    expected = torch.cat((expected[common], expected[~common].sum()[None]))
    counts = torch.cat((counts[common], counts[~common].sum()[None]))
    freedom = len(expected) - 1
    assert freedom > 50
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    assert abs(chi_square - freedom) < 4 * (2 * freedom) ** 0.5


def test_completions_depend_only_on_their_seeds(make_qwen2, letter_tokenizer):
    """Other requests, their order, max_num_seqs, prefill_tokens and max_new_tokens change nothing in a completion."""
    model = make_qwen2()
    params = SamplingParams(temperature=1.2, max_new_tokens=25)
    wanted = ids_of(NativeSampler(model, letter_tokenizer).generate(requests(5), params))
    assert len({ids for group in wanted for ids in group}) > 20

    for max_num_seqs, prefill_tokens in ((1, 1), (3, 10), (8, 8192), (1000, 40)):
        sampler = NativeSampler(model, letter_tokenizer, max_num_seqs=max_num_seqs, prefill_tokens=prefill_tokens)
        assert ids_of(sampler.generate(requests(5), params)) == wanted
    sampler = NativeSampler(model, letter_tokenizer, max_num_seqs=6)
    assert ids_of(sampler.generate(requests(5)[::-1], params)) == wanted[::-1]
    for request, group in zip(requests(5), wanted, strict=True):
        alone = SampleRequest(prompt=request.prompt, seeds=request.seeds[3:4])
        assert ids_of(sampler.generate([alone], params)) == [[group[3]]]
    short = ids_of(sampler.generate(requests(5), SamplingParams(temperature=1.2, max_new_tokens=4)))
    assert short == [[ids[:4] for ids in group] for group in wanted]


def test_the_global_generators_are_neither_used_nor_moved(llama, letter_tokenizer):
    sampler, params = NativeSampler(llama, letter_tokenizer), SamplingParams(max_new_tokens=10)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = sampler.generate(requests(2), params)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert sampler.generate(requests(2), params) == first


# --- batching ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("max_num_seqs", [1, 4, 64])
def test_each_prompt_is_prefilled_once_and_finished_sequences_leave(llama, letter_tokenizer, max_num_seqs: int):
    sampler = NativeSampler(llama, letter_tokenizer, max_num_seqs=max_num_seqs)
    with recorded(llama) as shapes:
        groups = sampler.generate(requests(6), SamplingParams(max_new_tokens=50))
    completions = [completion for group in groups for completion in group]
    assert len({len(c.token_ids) for c in completions}) > 5
    decoding = [batch for batch, tokens in shapes if tokens == 1]
    # A prompt's last token is the input of its completions' first step; the prefill of "ab" alone is also [1, 1].
    prefilled = sum(tokens for batch, tokens in shapes if batch == 1 and tokens > 1)
    prefilled += sum(decoding) - sum(len(c.token_ids) for c in completions)
    assert prefilled == sum(len(ids) - 1 for ids in PROMPTS)
    assert max(decoding) == min(max_num_seqs, len(completions))
    assert len(decoding) >= max(len(c.token_ids) for c in completions)


def test_prefill_passes_are_bounded(llama, letter_tokenizer):
    sampler = NativeSampler(llama, letter_tokenizer, prefill_tokens=30)
    with recorded(llama) as shapes:
        sampler.generate(requests(2), SamplingParams(max_new_tokens=1))
    # Lengths without the last token, longest first: 31 | 18 + 7 + 1; the prompt of one token needs no prefill.
    assert shapes == [(1, 31), (1, 26), (10, 1)]


def test_a_prompt_is_cached_once_however_many_completions_it_has(llama, letter_tokenizer):
    held = []
    llama.register_forward_pre_hook(lambda _m, _a, kwargs: held.append(kwargs.get("past_key_values")), with_kwargs=True)
    sampler = NativeSampler(llama, letter_tokenizer)
    held.clear()
    sampler.generate(requests(9), SamplingParams(max_new_tokens=5))
    layer = held[0].layers[1]
    assert layer.prompts.values.shape == (5, 2, 64, 8)
    assert layer.own.values.shape == (45, 2, 64, 8)
    assert layer.prompts.keys.shape == (5, 2, 8, 64)


def test_waiting_sequences_replace_finished_ones(llama, letter_tokenizer):
    sampler = NativeSampler(llama, letter_tokenizer, max_num_seqs=8)
    with recorded(llama) as shapes:
        groups = sampler.generate(requests(20), SamplingParams(temperature=1.5, max_new_tokens=60))
    lengths = [len(completion.token_ids) for group in groups for completion in group]
    steps = sum(tokens == 1 for _, tokens in shapes)
    longest_of_waves = sum(max(lengths[i : i + 8]) for i in range(0, len(lengths), 8))
    assert steps < 0.7 * longest_of_waves
    assert steps < 1.4 * sum(lengths) / 8 + max(lengths)


def test_only_the_last_position_goes_through_the_head(llama, letter_tokenizer):
    shapes: list[tuple[int, ...]] = []
    llama.get_output_embeddings().register_forward_pre_hook(lambda _m, args: shapes.append(tuple(args[0].shape)))
    sampler = NativeSampler(llama, letter_tokenizer)
    shapes.clear()
    sampler.generate(requests(2), SamplingParams(max_new_tokens=2))
    assert all(tokens == 1 for _, tokens, _ in shapes)


def test_progress_counts_completions(llama, letter_tokenizer):
    calls = []
    NativeSampler(llama, letter_tokenizer, max_num_seqs=3).generate(
        requests(4), SamplingParams(max_new_tokens=30), on_progress=lambda done, total: calls.append((done, total))
    )
    done = [d for d, _ in calls]
    assert {total for _, total in calls} == {20}
    assert done == sorted(set(done))
    assert done[-1] == 20
    assert done[0] < 20


def test_completions_are_reported_as_they_finish(llama, letter_tokenizer):
    seen: dict[tuple[int, int], Completion] = {}
    done: list[int] = []

    def take(request: int, sample: int, completion: Completion) -> None:
        assert (request, sample) not in seen
        seen[request, sample] = completion

    groups = NativeSampler(llama, letter_tokenizer, max_num_seqs=3).generate(
        requests(4),
        SamplingParams(max_new_tokens=30),
        on_progress=lambda _done, _total: done.append(len(seen)),
        on_completion=take,
    )
    assert seen == {(i, j): completion for i, group in enumerate(groups) for j, completion in enumerate(group)}
    assert 0 < done[0] < 20  # some long before the last


def test_requests_may_be_empty(llama, letter_tokenizer):
    sampler, params = NativeSampler(llama, letter_tokenizer), SamplingParams(max_new_tokens=3)
    assert sampler.generate([], params) == []
    some = [SampleRequest(prompt=Prompt(token_ids=PROMPTS[0]), seeds=()), *requests(2)]
    groups = sampler.generate(some, params)
    assert [len(group) for group in groups] == [0, 2, 2, 2, 2, 2]
    assert groups[1:] == sampler.generate(requests(2), params)


# --- stopping ---------------------------------------------------------------------------------------------------------


def scripted(model: PreTrainedModel, script: Sequence[int], start: int) -> None:
    """From now on a sequence at position ``start + i`` generates ``script[i]``."""
    positions: list[torch.Tensor] = []

    def note_positions(_module, _args, kwargs: dict) -> None:
        plain = torch.arange(kwargs["input_ids"].shape[1])[None]
        positions.append(kwargs.get("position_ids", plain))

    model.register_forward_pre_hook(note_positions, with_kwargs=True)

    def replace(_module, _args, logits: torch.Tensor) -> torch.Tensor:
        steps = (positions[-1][:, -logits.shape[1] :] - start).clamp(0, len(script) - 1)
        wanted = torch.tensor(script)[steps]
        return 1000 * nn.functional.one_hot(wanted, logits.shape[-1]).float()

    head = model.get_output_embeddings()
    assert head is not None
    head.register_forward_hook(replace)


def written(model, letter_tokenizer, text_ids: Sequence[int], params: SamplingParams, prefill: str = "") -> Completion:
    sampler = NativeSampler(model, letter_tokenizer)
    scripted(model, text_ids, len(PROMPTS[0]) - 1)
    ((completion,),) = sampler.generate(requests(1, PROMPTS[:1], prefill), params)
    return completion


def test_eos_is_kept_and_left_out_of_the_text(llama, letter_tokenizer):
    c = written(
        llama, letter_tokenizer, [*letters("four"), EOS, *letters("more")], SamplingParams(max_new_tokens=20), "<think>"
    )
    assert c.token_ids == (*letters("four"), EOS)
    assert len(c.logprobs) == 5
    assert (c.finish_reason, c.text) == ("stop", "<think>four")


def test_every_eos_of_the_generation_config_ends_a_completion(llama, letter_tokenizer):
    llama.generation_config.eos_token_id = [30, 31]
    c = written(llama, letter_tokenizer, [*letters("ab"), 31, *letters("cd")], SamplingParams(max_new_tokens=20))
    assert (c.token_ids, c.finish_reason, c.text) == ((0, 1, 31), "stop", "ab")
    d = written(llama, letter_tokenizer, [*letters("ab"), EOS, *letters("cd")], SamplingParams(max_new_tokens=20))
    assert (d.token_ids, d.finish_reason) == ((0, 1, EOS), "stop")


def test_the_length_limit_is_not_a_stop_but_eos_on_it_is(llama, letter_tokenizer):
    c = written(llama, letter_tokenizer, letters("abcdefgh"), SamplingParams(max_new_tokens=5))
    assert (c.token_ids, c.finish_reason, c.text) == (letters("abcde"), "length", "abcde")
    d = written(llama, letter_tokenizer, [*letters("abcd"), EOS], SamplingParams(max_new_tokens=5))
    assert (d.token_ids, d.finish_reason) == ((*letters("abcd"), EOS), "stop")


@pytest.mark.parametrize(
    ("stop", "text"),
    [
        (("the end",), "this is a rather long text up to the end"),
        (("x", "g t"), "this is a rather long t"),
        ((" ",), "this "),
        (("zzz",), "this is a rather long text up to the end and not farther"),
        (("this is a rather long text up to",), "this is a rather long text up to"),
    ],
)
def test_a_stop_string_ends_a_completion_with_the_token_that_completes_it(llama, letter_tokenizer, stop, text: str):
    script = "this is a rather long text up to the end and not farther"
    c = written(llama, letter_tokenizer, letters(script), SamplingParams(max_new_tokens=len(script), stop=stop))
    assert c.token_ids == letters(text)
    assert c.text == text
    assert c.finish_reason == ("length" if stop == ("zzz",) else "stop")


def test_a_stop_string_in_the_prompt_or_prefill_does_not_count(llama, letter_tokenizer):
    params = SamplingParams(max_new_tokens=3, stop=("two", "prefill"))
    c = written(llama, letter_tokenizer, letters("abc"), params, prefill="prefill")
    assert (c.text, c.finish_reason) == ("prefillabc", "length")


def test_a_stop_string_is_found_across_a_special_token(llama, letter_tokenizer):
    script = [*letters("st"), 28, *letters("op"), *letters("more")]
    c = written(llama, letter_tokenizer, script, SamplingParams(max_new_tokens=20, stop=("stop",)))
    assert (c.token_ids, c.text) == (tuple(script[:5]), "stop")


def test_a_stop_string_that_is_a_special_token_is_found_by_its_id(llama, letter_tokenizer):
    script = [*letters("st"), 28, *letters("more")]
    c = written(llama, letter_tokenizer, script, SamplingParams(max_new_tokens=6, stop=("<pad>",)))
    assert (c.token_ids, c.text, c.finish_reason) == (tuple(script[:3]), "st", "stop")
    with pytest.raises(ValueError, match="sampling.stop: 't<pad>': '<pad>' is a special token"):
        written(llama, letter_tokenizer, script, SamplingParams(max_new_tokens=6, stop=("t<pad>",)))


def test_the_token_that_ends_a_turn_in_the_template_ends_a_completion(llama, letter_tokenizer):
    tokenizer = copy.deepcopy(letter_tokenizer)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<pad>{% endfor %}"
    c = written(llama, tokenizer, [*letters("st"), 28, *letters("more")], SamplingParams(max_new_tokens=6))
    assert (c.token_ids, c.finish_reason) == ((*letters("st"), 28), "stop")


def test_ids_beyond_the_tokenizer_can_be_sampled_and_decode_to_nothing(llama, letter_tokenizer):
    c = written(llama, letter_tokenizer, [0, 31, 1], SamplingParams(max_new_tokens=3, stop=("no",)))
    assert (c.token_ids, c.text) == ((0, 31, 1), "ab")


# --- side effects -----------------------------------------------------------------------------------------------------


def state_of(model: nn.Module) -> tuple:
    modes = tuple(module.training for module in model.modules())
    forwards = sum("forward" in module.__dict__ for module in model.modules())
    parameters = tuple((p.requires_grad, p.is_inference(), p._version) for p in model.parameters())
    base: PreTrainedModel = getattr(model, "get_base_model", lambda: model)()  # pyright: ignore
    return modes, forwards, parameters, base.config._attn_implementation, torch.is_grad_enabled()


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_the_model_is_restored(make_llama, letter_tokenizer, implementation: str, lora: bool):
    model = make_llama(attention_dropout=0.1)
    model.config._attn_implementation = implementation
    policy = with_lora(model) if lora else model
    policy.train()
    model.model.layers[0].mlp.eval()  # modules need not all be in the same mode
    next(policy.parameters()).requires_grad_(False)
    before = state_of(policy)
    sampler = NativeSampler(policy, letter_tokenizer)
    assert state_of(policy) == before
    sampler.generate(requests(2), SamplingParams(max_new_tokens=5))
    assert state_of(policy) == before

    def fail(_done: int, _total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampler.generate(requests(2), SamplingParams(max_new_tokens=5), on_progress=fail)
    assert state_of(policy) == before


def test_the_model_can_be_trained_afterwards(llama, letter_tokenizer):
    def gradients() -> list[torch.Tensor]:
        llama.zero_grad()
        llama.train()
        ids = torch.tensor([PROMPTS[0]])
        llama(input_ids=ids, labels=ids).loss.backward()
        return [parameter.grad.clone() for parameter in llama.parameters()]

    before = gradients()
    groups = NativeSampler(llama, letter_tokenizer).generate(requests(2), SamplingParams(max_new_tokens=8))
    after = gradients()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    logprobs = torch.tensor(groups[0][0].logprobs, requires_grad=True)
    logprobs.exp().sum().backward()
    assert logprobs.grad is not None


def test_autograd_in_another_thread_is_not_affected(llama, letter_tokenizer):
    """no_grad belongs to a thread: another thread may train while completions are generated."""
    seen = []

    def progress(_done: int, _total: int) -> None:
        thread = threading.Thread(target=lambda: seen.append(torch.is_grad_enabled()))
        thread.start()
        thread.join()

    NativeSampler(llama, letter_tokenizer).generate(requests(1), SamplingParams(max_new_tokens=2), on_progress=progress)
    assert seen and all(seen)


# --- errors -----------------------------------------------------------------------------------------------------------

SIZES = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "pad_token_id": 28,
    "bos_token_id": None,
    "eos_token_id": EOS,
}


def check_own_logprobs(model, groups: Sequence[Sequence[Completion]], prompts: Sequence[tuple[int, ...]]) -> None:
    """Compare the log-probs of completions with those of a plain eager forward pass."""
    for prompt, group in zip(prompts, groups, strict=True):
        for completion in group:
            with attention(model, "eager"):
                expected = reference_logprobs(model, prompt, completion, SamplingParams())
            assert completion.logprobs == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        Gemma2Config(**SIZES, attn_logit_softcapping=2.0, query_pre_attn_scalar=1),
        GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
        Lfm2Config(**{**SIZES, "layer_types": ["conv", "full_attention"]}),
    ],
    ids=["softcap", "sinks", "convolution"],
)
def test_other_kinds_of_layers_are_sampled_with_the_models_own_cache(build_model, letter_tokenizer, config):
    model = build_model(config)
    implementation = model.config._attn_implementation
    sampler = NativeSampler(model, letter_tokenizer, max_num_seqs=3)
    assert [type(model).__name__ in note and "its own cache" in note for note in sampler.notes] == [True]
    made = requests(4, PROMPTS[:2])
    groups = sampler.generate(made, SamplingParams(max_new_tokens=12))
    check_own_logprobs(model, groups, PROMPTS[:2])
    assert model.config._attn_implementation == implementation
    # A completion depends on its seed alone.
    again = NativeSampler(model, letter_tokenizer).generate(made[1:], SamplingParams(max_new_tokens=12))
    assert [c.token_ids for c in again[0]] == [c.token_ids for c in groups[1]]


def test_encoder_decoders_are_refused(letter_tokenizer):
    config = T5Config(vocab_size=32, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
    with pytest.raises(ValueError, match="encoder-decoder"):
        NativeSampler(T5ForConditionalGeneration(config), letter_tokenizer)


def test_a_model_whose_logits_come_out_different_is_refused(llama, letter_tokenizer):
    """Here because a layer remembers earlier passes and adds something of them."""
    memory = []
    llama.model.layers[0].mlp.register_forward_hook(
        lambda _m, _a, out: (memory.append(out.mean()), out + sum(memory[:-1], torch.tensor(0.0)))[1]
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM.*logits differ"):
        NativeSampler(llama, letter_tokenizer)


def test_sequences_longer_than_a_sliding_window_are_sampled_with_the_models_own_cache(build_model, letter_tokenizer):
    model = build_model(MistralConfig(**SIZES, sliding_window=80))
    sampler = NativeSampler(model, letter_tokenizer)
    assert "beyond 80 tokens" in sampler.notes[0]
    prompt = PROMPTS[3] * 2
    for new_tokens in (80 - len(prompt), 60):
        groups = sampler.generate(requests(2, [prompt]), SamplingParams(max_new_tokens=new_tokens))
        check_own_logprobs(model, groups, [prompt])


def test_the_context_is_a_limit_on_the_length(make_llama, letter_tokenizer):
    sampler = NativeSampler(make_llama(max_position_embeddings=40), letter_tokenizer)
    with pytest.raises(ValueError, match="40 tokens"):
        sampler.generate(requests(1), SamplingParams(max_new_tokens=30))
    rope = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 36}
    sampler = NativeSampler(make_llama(rope_parameters=rope), letter_tokenizer)
    with pytest.raises(ValueError, match="36 tokens"):
        sampler.generate(requests(1), SamplingParams(max_new_tokens=10))


def test_options_and_prompts_are_checked(llama, letter_tokenizer):
    with pytest.raises(ValueError, match=r"sampler\.max_num_seqs: 0"):
        NativeSampler(llama, letter_tokenizer, max_num_seqs=0)
    with pytest.raises(ValueError, match=r"sampler\.prefill_tokens: -1"):
        NativeSampler(llama, letter_tokenizer, prefill_tokens=-1)
    with pytest.raises(ValueError, match="request 1 has no tokens"):
        NativeSampler(llama, letter_tokenizer).generate(requests(1, [PROMPTS[0], ()]), SamplingParams())


def test_diverged_weights_stop_the_run(llama, letter_tokenizer):
    sampler = NativeSampler(llama, letter_tokenizer)
    with torch.no_grad():
        llama.model.norm.weight.fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="diverged"):
        sampler.generate(requests(1), SamplingParams(max_new_tokens=3))
