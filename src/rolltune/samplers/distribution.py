"""The distribution that is sampled from, and a draw from it with one uniform number."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from rolltune.model.batch_invariant import chosen_logprobs
from rolltune.types import SamplingParams

# A draw sums blocks of so many tokens first, so that only one block has to be summed token by token. It divides the
# usual vocabulary sizes (32000, 49152, 128256, 151936, 256000), which are then never padded.
BLOCK = 128
NUCLEUS_CANDIDATES = 1024  # a nucleus is looked for among so many tokens first, as sorting a vocabulary is slow


def sample(
    logits: Tensor, uniforms: Tensor, params: SamplingParams, *, batch_invariant: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """One token a row, with its log-prob under exactly the distribution that it was drawn from, and its support.

    Args:
        logits: [R, V], float32 or lower; overwritten where it is float32.
        uniforms: float64 [R], in [0, 1).
        params: temperature (0 takes the most probable token, with log-prob 0), top_k and top_p.
        batch_invariant: compute log-probs as the trainer of a batch-invariant model does.

    Returns:
        int64 [R], float32 [R], and bool [R, V]: what top_k and top_p left to draw from; None where they leave all.
    """
    if params.temperature == 0:
        tokens = logits.argmax(-1)
        return tokens, torch.zeros(len(tokens), dtype=torch.float32, device=logits.device), None
    logits = logits.float().div_(params.temperature)
    probabilities = torch.softmax(logits, dim=-1)
    if params.truncates:
        probabilities = truncate(probabilities, top_k=params.top_k, top_p=params.top_p)
    support = probabilities > 0 if params.truncates else None
    if batch_invariant and support is not None:  # truncate's own sum would depend on the number of rows
        probabilities = torch.softmax(logits.masked_fill_(~support, -torch.inf), dim=-1)
    tokens = draw(probabilities, uniforms)
    if batch_invariant:
        return tokens, chosen_logprobs(logits, tokens), support
    return tokens, probabilities.gather(-1, tokens[:, None]).squeeze(-1).log(), support


def truncate(probabilities: Tensor, *, top_k: int, top_p: float) -> Tensor:
    """Keep the most probable tokens, and renormalise.

    The k most probable tokens are kept, then of the renormalised k the smallest set of most probable tokens
    whose mass is at least ``top_p``. Of equally probable tokens the lower id is kept first.

    Args:
        probabilities: float32 [R, V].
        top_k: 0 keeps all.
        top_p: in (0, 1]; 1 keeps all.
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
    """The ``width`` largest probabilities of each row in descending order, and their cumulative sums in float64."""
    ranked = probabilities.topk(width).values  # which of two equal tokens topk would take is not defined
    return ranked, ranked.cumsum(-1, dtype=torch.float64)


def draw(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Invert the cumulative distribution: the first token whose cumulative probability is above ``uniforms``.

    A token of probability 0 is never returned, whatever rounding does to the sums.

    Args:
        probabilities: float32 [R, V], of any positive total.
        uniforms: float64 [R], in [0, 1).

    Returns:
        int64 [R].
    """
    rows, vocab = probabilities.shape
    blocks = F.pad(probabilities, (0, -vocab % BLOCK)) if vocab % BLOCK else probabilities
    blocks = blocks.view(rows, -1, BLOCK)
    block, uniforms = _first_above(blocks.sum(-1), uniforms)
    token, _ = _first_above(blocks[torch.arange(rows, device=blocks.device), block], uniforms)
    # NaN probabilities may point into the padding; whatever token they give, its log-prob is NaN.
    return (block * BLOCK + token).clamp_(max=vocab - 1)


def _first_above(weights: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first item of each row [R, N] whose cumulative weight is above ``uniforms`` x total, and how far into
    that item the point lies, in [0, 1)."""
    cumulative = weights.cumsum(-1, dtype=torch.float64)
    # A float64 below 1 is at most 1 - 2^-53, and so its product with the total is below the total after rounding too.
    # Hence there is a first sum above the target; as the one in front is not, the item between them has a weight.
    target = uniforms[:, None] * cumulative[:, -1:]
    index = torch.searchsorted(cumulative, target, right=True)
    index.clamp_(max=weights.shape[-1] - 1)  # only NaN weights need it
    weight = weights.gather(-1, index).double()
    start = cumulative.gather(-1, index) - weight
    inside = ((target - start) / weight).clamp_(0.0, 1.0 - 2.0**-53)
    return index.squeeze(-1), inside.squeeze(-1)
