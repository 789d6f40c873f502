"""Hidden states of a microbatch's sequences one by one, for models that packed attention does not reproduce.

Each row is a prompt with one completion, padded on the right: in a causal model no token depends on what comes behind
it. Recurrent, convolutional and any other layers are the model's own. The price is that a prompt is computed once for
each of its completions.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from rolltune.model.parts import decoder
from rolltune.types import Microbatch


def sequence_tokens(microbatch: Microbatch) -> list[Tensor]:
    """Return the tokens of each sequence, prompt included, as indices into the microbatch: int64 [length] each."""
    sequence, segment = microbatch.sequence_index, microbatch.segment_index
    firsts = torch.searchsorted(
        microbatch.target_sequence_index, torch.arange(microbatch.num_sequences, device=sequence.device)
    )
    prompt_ends = microbatch.predictor_index[firsts]  # the prompt's last token predicts a completion's first one
    return [
        ((sequence == i) | ((sequence == -1) & (segment == segment[end]))).nonzero().squeeze(-1)
        for i, end in enumerate(prompt_ends)
    ]


def unpacked_hidden(model: PreTrainedModel, microbatch: Microbatch, *, rope_limit: int | None = None) -> Tensor:
    """Return the hidden states [N, H] that predict the trained tokens.

    A pass has at most as many tokens as the microbatch, padding included, or one sequence. If there are several, each
    is computed again in the backward pass, so that the activations of one are held at a time.

    Args:
        model: a causal LM.
        microbatch: T tokens, N of them trained.
        rope_limit: sequences on different sides of this length go into different passes.
    """
    tokens = sequence_tokens(microbatch)
    counts = torch.bincount(microbatch.target_sequence_index, minlength=microbatch.num_sequences).tolist()
    passes = _passes([len(index) for index in tokens], len(microbatch.input_ids), rope_limit)

    def last_hidden(input_ids: Tensor) -> Tensor:
        return decoder(model)(input_ids=input_ids, use_cache=False)[0]

    hidden: dict[int, Tensor] = {}  # of each sequence's trained tokens
    for numbers in passes:
        ids = pad_sequence([microbatch.input_ids[tokens[i]] for i in numbers], batch_first=True)
        rows = checkpoint(last_hidden, ids, use_reentrant=False) if len(passes) > 1 else last_hidden(ids)
        for row, i in zip(rows, numbers, strict=True):
            length = len(tokens[i])
            hidden[i] = row[length - counts[i] : length]
    return torch.cat([hidden[i] for i in range(len(tokens))])


def _passes(lengths: list[int], max_tokens: int, rope_limit: int | None) -> list[list[int]]:
    """Split sequences into passes of similar lengths."""

    def beyond(i: int) -> bool:
        return rope_limit is not None and lengths[i] > rope_limit

    passes: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lengths.__getitem__):
        fits = passes and lengths[i] * (len(passes[-1]) + 1) <= max_tokens and beyond(i) == beyond(passes[-1][-1])
        if fits:
            passes[-1].append(i)
        else:
            passes.append([i])
    return passes
