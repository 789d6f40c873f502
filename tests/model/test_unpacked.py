"""Sequences one by one, right-padded: the same log-probs and gradients as packed rows, in one pass or several."""

import pytest
import torch

from rolltune.batch import TokenSequence, TrainGroup, pack_examples
from rolltune.model.forward import Forward, forward_of, packed_logprobs, set_forward
from rolltune.model.load import load_model
from rolltune.model.unpacked import _passes, sequence_tokens
from rolltune.types import Prompt


def tokens(start: int, count: int) -> tuple[int, ...]:
    return tuple(range(start, start + count))


GROUPS = [
    TrainGroup(
        prompt=Prompt(token_ids=tokens(10, 3)),
        sequences=(TokenSequence(token_ids=(50, 51, 52)), TokenSequence(token_ids=(60,))),
    ),
    TrainGroup(prompt=Prompt(token_ids=(20,)), sequences=(TokenSequence(token_ids=(70, 71)),)),
]
(MICROBATCH,) = pack_examples(GROUPS, max_tokens=10**6)  # A B C d e | f | with tokens at 0 1 2, 3 4, - and 5, 6


def test_tokens_of_each_sequence_by_hand():
    assert [index.tolist() for index in sequence_tokens(MICROBATCH)] == [[0, 1, 2, 3, 4], [0, 1, 2], [5, 6]]


@pytest.mark.parametrize(
    ("max_tokens", "limit", "passes"),
    [
        (100, None, [[2, 1, 0]]),
        (6, None, [[2, 1], [0]]),
        (1, None, [[2], [1], [0]]),  # a sequence that is longer than that has a pass of its own
        (100, 3, [[2, 1], [0]]),
        (100, 2, [[2], [1, 0]]),
    ],
)
def test_passes(max_tokens, limit, passes):
    assert _passes([5, 3, 2], max_tokens, limit) == passes


@pytest.fixture(scope="module")
def model(tiny_llama):
    return load_model(str(tiny_llama), dtype="float32", device="cpu")


@pytest.mark.parametrize("limit", [None, 3], ids=["one pass", "two passes"])
def test_log_probs_and_gradients_equal_those_of_packed_rows(model, limit):
    results = []
    for forward in (Forward(), Forward(packed=False, rope_limit=limit)):
        set_forward(model, forward)
        model.zero_grad()
        logprobs, entropy = packed_logprobs(model, MICROBATCH, temperature=0.7)
        (logprobs * torch.arange(6.0)).sum().backward()
        results.append((logprobs.detach(), entropy, *[p.grad.clone() for p in model.parameters()]))
    set_forward(model, Forward())
    for packed, unpacked in zip(*results, strict=True):
        torch.testing.assert_close(unpacked, packed, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("limit", "shapes"),
    [(1, [(1, 7)]), (2, [(1, 2), (1, 3), (1, 5)]), (3, [(2, 3), (1, 5)]), (5, [(1, 7)])],
)
def test_a_microbatch_across_a_rope_limit_is_not_packed(model, limit, shapes):
    seen = []
    hook = model.model.register_forward_pre_hook(
        lambda _m, _a, kwargs: seen.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    set_forward(model, Forward(rope_limit=limit))
    packed_logprobs(model, MICROBATCH, temperature=1.0)
    set_forward(model, Forward())
    hook.remove()
    assert seen == shapes


def test_lengths_beyond_dynamic_rope_are_refused(model):
    set_forward(model, Forward(max_length=4))
    with pytest.raises(ValueError, match=r"model\.path: RoPE of LlamaForCausalLM changes .* beyond 4 tokens"):
        packed_logprobs(model, MICROBATCH, temperature=1.0)
    set_forward(model, Forward(max_length=5))
    packed_logprobs(model, MICROBATCH, temperature=1.0)
    set_forward(model, Forward())
    assert forward_of(model) == Forward()
