"""Slots of the KV cache, and attention to prompt and own tokens merged into the result of one softmax."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from rolltune.model.kv_cache import KVSlots, SharedPromptCache, shared_prompt_attention
from rolltune.samplers.sequences import DecodeBatch, PromptState, SequenceState

KV_HEADS, GROUP, DIM, VALUE_DIM = 2, 3, 8, 5


def slots_like(dtype: torch.dtype = torch.float32) -> KVSlots:
    return KVSlots(torch.empty(1, KV_HEADS, 1, DIM), torch.empty(1, KV_HEADS, 1, VALUE_DIM), dtype)


def test_growing_keeps_the_contents_and_adds_zeros():
    slots = slots_like()
    slots.reserve(3, 10)
    assert slots.keys.shape == (3, KV_HEADS, DIM, 64)
    slots.keys.normal_()
    slots.values.normal_()
    keys, values = slots.keys.clone(), slots.values.clone()
    slots.reserve(2, 64)  # fits
    assert torch.equal(slots.keys, keys)
    slots.reserve(4, 65)
    assert slots.keys.shape == (4, KV_HEADS, DIM, 128)
    assert slots.values.shape == (4, KV_HEADS, 128, VALUE_DIM)
    assert torch.equal(slots.keys[:3, :, :, :64], keys)
    assert torch.equal(slots.values[:3, :, :64], values)
    assert slots.keys.count_nonzero() == keys.count_nonzero()
    assert slots.values.count_nonzero() == values.count_nonzero()


def test_sequences_move_into_the_slots_of_those_that_leave():
    batch = DecodeBatch(torch.device("cpu"))
    prompts = [PromptState(i, (1, 2, 3), 2) for i in range(3)]
    sequences = [SequenceState(prompt, i, np.zeros(1)) for prompt in prompts for i in range(2)]
    assert batch.admit(sequences) == prompts
    cache = batch.cache
    cache.plan = batch.decode_plan()
    cache.update(torch.empty(1, KV_HEADS, 1, DIM), torch.empty(1, KV_HEADS, 1, VALUE_DIM), 0)
    layer = cache.layers[0]
    for slots, count in ((layer.own, 6), (layer.prompts, 3)):
        slots.reserve(count, 1)
        slots.values[:] = torch.arange(count)[:, None, None, None]
    for i in (0, 1, 3):
        sequences[i].finish_reason = "stop"
    assert len(batch.remove_finished()) == 3
    assert batch.sequences == [sequences[4], sequences[5], sequences[2]]
    assert layer.own.values[:3, 0, 0, 0].tolist() == [4, 5, 2]
    assert batch.prompts == [prompts[2], prompts[1]]
    assert layer.prompts.values[:2, 0, 0, 0].tolist() == [2, 1]
    assert [prompt.slot for prompt in batch.prompts] == [0, 1]
    plan = batch.decode_plan()
    assert plan.group_index.tolist() == [0, 1, 2, 0]  # sequences of prompt 2, then of prompt 1 with padding
    assert plan.ungroup_index.tolist() == [0, 1, 2]
    assert batch.remove_finished() == []


@pytest.mark.parametrize("scale", [0.3, 10.0], ids=["flat", "peaked"])
def test_merged_attention_is_one_softmax(scale: float):
    """Sequences with 0, 3 and 1 own tokens. The first two share a prompt of 8 tokens; the third has a prompt of one.

    A prompt's last token is not in its slot, so the second prompt's slot is empty.
    """
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    prompts = [PromptState(0, tuple(range(8)), 2), PromptState(1, (5,), 1)]
    sequences = [SequenceState(prompts[p], 0, np.zeros(1), token_ids=[0] * own) for p, own in ((0, 0), (0, 3), (1, 1))]
    batch = DecodeBatch(torch.device("cpu"))
    batch.admit(sequences)
    prompt_k, prompt_v, query = random(KV_HEADS, 7, DIM), random(KV_HEADS, 7, VALUE_DIM), random(1, 6, 7, DIM)
    batch.cache.plan = batch.prefill_plan(prompts[:1])
    update, _ = batch.cache.update(prompt_k[None], prompt_v[None], 0)
    out, _ = shared_prompt_attention(nn.Module(), query, update, update, None, scaling=scale)
    expected = F.scaled_dot_product_attention(
        query, prompt_k[None], prompt_v[None], is_causal=True, scale=scale, enable_gqa=True
    )
    torch.testing.assert_close(out, expected.transpose(1, 2))

    own = batch.cache.layers[0].own
    own.reserve(3, 4)
    own.keys.copy_(random(*own.keys.shape))  # leftovers of earlier sequences must not matter
    own.values.copy_(random(*own.values.shape))
    new_k, new_v, query = random(3, KV_HEADS, 1, DIM), random(3, KV_HEADS, 1, VALUE_DIM), random(3, 6, 1, DIM)
    batch.cache.plan = batch.decode_plan()
    update, _ = batch.cache.update(new_k, new_v, 0)
    out, _ = shared_prompt_attention(nn.Module(), query, update, update, None, scaling=scale)
    assert out.shape == (3, 1, 6, VALUE_DIM)
    for i, sequence in enumerate(sequences):
        n = len(sequence.token_ids)
        shared = slice(None) if sequence.prompt is prompts[0] else slice(0)
        keys = torch.cat((prompt_k[:, shared], own.keys[i, :, :, :n].mT, new_k[i]), 1)
        values = torch.cat((prompt_v[:, shared], own.values[i, :, :n], new_v[i]), 1)
        weights = torch.softmax(scale * query[i].view(KV_HEADS, GROUP, DIM) @ keys.mT, -1)
        torch.testing.assert_close(out[i, 0], (weights @ values).view(6, VALUE_DIM), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_arguments_that_change_attention_are_refused(name: str):
    cache = SharedPromptCache()
    update, _ = cache.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4), 0)
    with pytest.raises(ValueError, match="it has"):
        shared_prompt_attention(nn.Module(), torch.zeros(1, 1, 1, 4), update, update, None, **{name: torch.ones(1)})
