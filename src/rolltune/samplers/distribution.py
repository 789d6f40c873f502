"""The sampling distribution (temperature, top-k, top-p), and draws from it with one uniform number each."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rolltune.model.batch_invariant import chosen_logprobs
from rolltune.types import SamplingParams

# A draw first sums blocks of this many tokens, so that only one block is summed token by token. It divides the usual
# vocabulary sizes (32000, 49152, 128256, 151936, 256000), which therefore need no padding.
BLOCK = 128
NUCLEUS_CANDIDATES = 1024  # the nucleus is first searched among this many tokens: sorting a vocabulary is slow


def sample(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Draw one token a sequence, with its log-prob under exactly the distribution that it was drawn from.

    Args:
        logits: [B, V], float32 or lower; overwritten if it is float32.
        uniforms: float64 [B], in [0, 1).
        params: temperature (0 takes the most probable token, with log-prob 0), top_k and top_p.
        batch_invariant: whether to compute log-probs as the trainer of a batch-invariant model does.

    Returns:
        Tokens int64 [B]; log-probs float32 [B], NaN where the logits hold a NaN or +inf; and the support bool [B, V]:
        the tokens that top_k and top_p kept, None if they keep all.
    """
    if params.temperature == 0:
        tokens = logits.argmax(-1)  # of a NaN, if there is one
        largest = logits.gather(-1, tokens[:, None]).squeeze(-1).float()
        return tokens, torch.where(largest.isfinite(), 0.0, torch.nan), None
    logits = logits.float().div_(params.temperature)
    probabilities = torch.softmax(logits, dim=-1)
    if params.truncates:
        probabilities = truncate(probabilities, top_k=params.top_k, top_p=params.top_p)
    support = probabilities > 0 if params.truncates else None
    if batch_invariant and support is not None:  # the sum in truncate depends on the batch size
        probabilities = torch.softmax(logits.masked_fill_(~support, -torch.inf), dim=-1)
    tokens = draw(probabilities, uniforms)
    if batch_invariant:
        return tokens, chosen_logprobs(logits, tokens), support
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log(), support


def truncate(probabilities: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Keep the most probable tokens, and renormalise.

    First top-k, then top-p on the renormalised k: the smallest set of most probable tokens whose mass is at least
    ``top_p``. Of equally probable tokens the lower id is kept first.

    Args:
        probabilities: float32 [B, V].
        top_k: number of tokens kept; 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.

    Returns:
        float32 [B, V], 0 for tokens that were not kept.
    """
    vocab = probabilities.shape[-1]
    width = min(top_k or NUCLEUS_CANDIDATES, vocab)
    ranked, mass = _ranked(probabilities, width)
    while not top_k and width < vocab and bool((mass[:, -1] < top_p).any()):
        width = min(8 * width, vocab)
        ranked, mass = _ranked(probabilities, width)
    if top_p < 1:
        target = top_p * mass[:, -1:] if top_k else top_p
        count = ((mass < target).sum(-1, keepdim=True) + 1).clamp_(max=width)
    else:
        count = torch.full_like(mass[:, :1], width, dtype=torch.int64)
    threshold = ranked.gather(-1, count - 1)
    above, equal = probabilities > threshold, probabilities == threshold
    room = count - above.sum(-1, keepdim=True)
    if bool((equal.sum(-1, keepdim=True) > room).any()):
        equal &= equal.cumsum(-1) <= room
    kept = probabilities.where(above | equal, 0.0)
    return kept.div_(kept.sum(-1, keepdim=True))


def _ranked(probabilities: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Return the ``width`` largest probabilities, descending [B, width], and their cumulative sums in float64."""
    ranked = probabilities.topk(width).values  # not its indices: which of two equal tokens it takes is undefined
    return ranked, ranked.cumsum(-1, dtype=torch.float64)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: return the first token whose cumulative probability exceeds ``uniforms``.

    A token of probability 0 is never returned, however the sums are rounded.

    Args:
        probabilities: float32 [B, V], with any positive total.
        uniforms: float64 [B], in [0, 1).

    Returns:
        Tokens int64 [B].
    """
    batch, vocab = probabilities.shape
    blocks = F.pad(probabilities, (0, -vocab % BLOCK)) if vocab % BLOCK else probabilities
    blocks = blocks.view(batch, -1, BLOCK)
    block, uniforms = _first_above(blocks.sum(-1), uniforms)
    token, _ = _first_above(blocks[torch.arange(batch, device=blocks.device), block], uniforms)
    # NaN probabilities may point into the padding; the token that results has a log-prob of NaN.
    return (block * BLOCK + token).clamp_(max=vocab - 1)


def _first_above(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Find the first item of weights [B, N] whose cumulative weight exceeds ``uniforms`` x total.

    Returns:
        Its index int64 [B], and the position of the point within the item, float64 [B] in [0, 1).
    """
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # A float64 below 1 is at most 1 - 2^-53, so its product with the total is below the total even after rounding. So
    # some sum exceeds the target. The sum before the first such sum does not, so the item between has a weight > 0.
    target = uniforms[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    index.clamp_(max=weights.shape[-1] - 1)  # only NaN weights need it
    weight = weights.gather(-1, index).double()
    start = cumulative.gather(-1, index) - weight
    inside = ((target - start) / weight).clamp_(0.0, 1.0 - 2.0**-53)
    return index.squeeze(-1), inside.squeeze(-1)
