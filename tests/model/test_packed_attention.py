"""Packed attention: the layout by hand, the result against a dense mask, and unsupported kinds of attention."""

import pytest
import torch
import torch.nn.functional as F

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.model.forward import packed_logprobs
from rolltune.model.load import load_model
from rolltune.model.packed_attention import packed_attention, packed_layout
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
    packed, _ = packed_attention(torch.nn.Module(), q, k, v, None, scaling=0.3, layout=packed_layout(microbatch))
    dense = F.scaled_dot_product_attention(
        q, k, v, attn_mask=allowed(microbatch), scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    torch.testing.assert_close(packed, dense, rtol=0, atol=1e-6)
    weights = torch.randn(packed.shape, generator=generator)
    ours = torch.autograd.grad((packed * weights).sum(), (q, k, v))
    theirs = torch.autograd.grad((dense * weights).sum(), (q, k, v))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=1e-5)


@pytest.mark.parametrize("window", [5, 1])
def test_refuses_a_window_shorter_than_a_sequence(window):
    q = torch.zeros(1, 2, len(MICROBATCH.input_ids), 4)
    layout = packed_layout(MICROBATCH)
    with pytest.raises(ValueError, match=f"window of {window} tokens.*sequence of 6"):
        packed_attention(torch.nn.Module(), q, q, q, None, layout=layout, sliding_window=window)
    for wide in (6, 4096, None):
        packed_attention(torch.nn.Module(), q, q, q, None, layout=layout, sliding_window=wide)


@pytest.mark.parametrize("name", ["softcap", "s_aux"])
def test_refuses_a_softcap_and_sinks(name):
    q = torch.zeros(1, 2, len(MICROBATCH.input_ids), 4)
    with pytest.raises(ValueError, match=f"model.path: .*{name}"):
        packed_attention(
            torch.nn.Module(), q, q, q, None, layout=packed_layout(MICROBATCH), **{name: torch.tensor(1.0)}
        )
    packed_attention(torch.nn.Module(), q, q, q, None, layout=packed_layout(MICROBATCH), **{name: None})


@pytest.fixture(scope="module")
def windowed(tmp_path_factory, tiny_llama):
    """A whole model with a sliding window of 8: Mistral's layers pass it to attention on their own."""
    from transformers import AutoTokenizer, MistralConfig, MistralForCausalLM

    folder = tmp_path_factory.mktemp("mistral")
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=260,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        sliding_window=8,
    )
    MistralForCausalLM(config).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return load_model(str(folder), dtype="float32", device="cpu")


def test_a_model_with_a_window_accepts_short_sequences_and_refuses_long_ones(windowed):
    microbatch = make_microbatch((4, (4, 3)))  # 4 + 3 tokens: within the window
    logprobs, _ = packed_logprobs(windowed, microbatch, temperature=1.0)
    ids = torch.tensor([[*range(10, 14), *range(50, 54)]])
    with torch.no_grad():
        plain = torch.log_softmax(windowed(ids).logits[0, 3:-1], -1).gather(-1, ids[0, 4:, None]).squeeze(-1)
    torch.testing.assert_close(logprobs[:4], plain, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match=r"window of 8 tokens.*sequence of 9"):
        packed_logprobs(windowed, make_microbatch((4, (6, 3))), temperature=1.0)
