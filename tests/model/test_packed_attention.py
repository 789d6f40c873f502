"""Packed attention: the layout and masks by hand, and the result against a dense mask and explicit softmaxes."""

import pytest
import torch
import torch.nn.functional as F
from transformers.masking_utils import causal_mask_function, sliding_window_causal_mask_function

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.model.packed_attention import (
    PackedMask,
    packed_attention,
    packed_layout,
    packed_mask,
    packed_rows,
)
from rolltune.types import Prompt


def make_microbatch(*groups: tuple[int, tuple[int, ...]]):
    """(prompt length, completion lengths) of each group; a completion's last token is not an input."""
    made = [
        TrainGroup(
            prompt=Prompt(token_ids=tuple(range(10, 10 + prompt))),
            sequences=tuple(
                TrainSequence(token_ids=tuple(range(50, 50 + n)), logprobs=(0.0,) * n, advantage=1.0) for n in lengths
            ),
        )
        for prompt, lengths in groups
    ]
    (microbatch,) = pack(made, max_tokens=10**6)
    return microbatch


MICROBATCH = make_microbatch((3, (3, 2)), (1, (4,)))  # prompts at 0 1 2 and 6, completions at 3 4, 5 and 7 8 9


def test_layout_by_hand():
    layout = packed_layout(MICROBATCH)
    assert layout.prompts.tolist() == [[0, 1, 2], [6, 0, 0]]
    assert layout.completions.tolist() == [[3, 4, 0], [5, 0, 0], [7, 8, 9]]
    assert layout.prompt_of.tolist() == [0, 0, 1]
    assert layout.length == 6
    causal = [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert layout.visible[:, 0].int().tolist() == [
        [[1, 1, 1, *line] for line in causal],
        [[1, 1, 1, *line] for line in causal],
        [[1, 0, 0, *line] for line in causal],
    ]
    # Two prompts of 3 places, then three completions of 3.
    assert layout.restore.tolist() == [0, 1, 2, 6, 7, 9, 3, 12, 13, 14]


def allowed(microbatch) -> torch.Tensor:
    """bool [T, T], by the definition in Microbatch's docstring."""
    i, j = torch.arange(len(microbatch.input_ids))[:, None], torch.arange(len(microbatch.input_ids))[None]
    own = microbatch.sequence_index[:, None] == microbatch.sequence_index[None]
    same_segment = microbatch.segment_index[:, None] == microbatch.segment_index[None]
    return (j <= i) & same_segment & (own | (microbatch.sequence_index == -1)[None])


@pytest.mark.parametrize(
    "microbatch",
    [
        MICROBATCH,
        make_microbatch((5, (1, 1))),
        make_microbatch((2, (1,)), (4, (6, 1, 2)), (3, (1,))),
        make_microbatch((1, (2,)), (1, (2,))),
    ],
    ids=["mixed", "prompt alone", "single tokens", "shortest"],
)
@pytest.mark.parametrize("heads", [4, 2], ids=["every head its own keys", "grouped"])
def test_result_and_gradients_equal_a_dense_mask(microbatch, heads):
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, 4, len(microbatch.input_ids), 8, generator=generator, requires_grad=True)
    k, v = (
        torch.randn(1, heads, len(microbatch.input_ids), 8, generator=generator, requires_grad=True) for _ in range(2)
    )
    packed, _ = packed_attention(torch.nn.Module(), q, k, v, PackedMask.causal(packed_layout(microbatch)), scaling=0.3)
    dense = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed(microbatch), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-6)
    weights = torch.randn(packed.shape, generator=generator)
    ours = torch.autograd.grad((packed * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((dense * weights).sum(), (q, k, v))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


def mask_of(microbatch, mask_function=causal_mask_function) -> PackedMask:
    with packed_rows(packed_layout(microbatch)):
        mask = packed_mask(mask_function=mask_function)
    assert isinstance(mask, PackedMask)
    return mask


def test_a_window_hides_tokens_by_their_positions_in_the_sequence():
    mask = mask_of(MICROBATCH, sliding_window_causal_mask_function(2))
    assert mask.prompts is not None
    assert mask.prompts[0, 0].int().tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert mask.completions[:, 0].int().tolist() == [
        [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]],
        [[0, 0, 1, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]],
        [[1, 0, 0, 1, 0, 0], [0, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 1]],
    ]


@pytest.mark.parametrize("window", [6, 4096])
def test_a_window_that_no_sequence_exceeds_is_the_fast_causal_mask(window):
    mask = mask_of(MICROBATCH, sliding_window_causal_mask_function(window))
    assert mask.is_causal and mask.completions is mask.layout.visible


def explicit_attention(q, k, v, visible, *, softcap=None, sinks=None):
    """Softmax by its definition: q [H, T, D], visible [T, T]."""
    scores = (q @ k.mT) * 0.3
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    weights = torch.where(visible, scores.exp(), 0.0)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + sinks[:, None, None].exp()
    return (weights / total) @ v


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("options", [{"softcap": 1.5}, {"sinks": torch.tensor([0.5, -1.0])}], ids=["softcap", "sinks"])
def test_softcap_and_sinks(window, options):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, len(MICROBATCH.input_ids), 8, generator=generator) for _ in range(3))
    mask = mask_of(MICROBATCH) if window is None else mask_of(MICROBATCH, sliding_window_causal_mask_function(window))
    names = {"softcap": "softcap", "sinks": "s_aux"}
    passed = {names[name]: value for name, value in options.items()}
    packed, _ = packed_attention(torch.nn.Module(), q, k, v, mask, scaling=0.3, **passed)
    visible = allowed(MICROBATCH)
    if window is not None:
        positions = MICROBATCH.position_ids
        visible &= positions[:, None] - positions[None] < window
    expected = explicit_attention(q[0], k[0], v[0], visible, **options)
    torch.testing.assert_close(packed[0].transpose(0, 1), expected, rtol=0, atol=1e-6)


def test_a_layer_that_drops_the_mask_is_an_error():
    q = torch.zeros(1, 2, len(MICROBATCH.input_ids), 4)
    with packed_rows(packed_layout(MICROBATCH)), pytest.raises(ValueError, match="does not hand the attention mask on"):
        packed_attention(torch.nn.Module(), q, q, q, None)
    packed_attention(torch.nn.Module(), q, q, q, None)  # a plain forward pass


@pytest.mark.parametrize("name", ["softcap", "s_aux", "position_bias"])
def test_a_plain_call_refuses_what_sdpa_would_ignore(name):
    q = torch.zeros(1, 2, 3, 4)
    with pytest.raises(ValueError, match=f"{name}.*eager"):
        packed_attention(torch.nn.Module(), q, q, q, None, **{name: torch.tensor(1.0)})
