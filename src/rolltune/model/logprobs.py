"""Hidden states x LM head -> log-prob and entropy of each trained token, without the full [tokens, vocab] logits.

Forward and backward walk over chunks of tokens; the backward pass computes a chunk's logits again rather than keep
them. (Liger's and mgmalek's way of computing the gradient in the forward pass does not fit here: the
gradient that comes from a policy loss is not known before all log-probs are.)

Where top-k or top-p left tokens out, the softmax is over what they kept, as the sampler's was: with the full one every
ratio would be off by the mass that was cut ("Keep Sampling Mask", DeepSeek-V3.2, arXiv 2512.02556, section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolltune.model import batch_invariant as invariant
from rolltune.model.cpu.onednn import product
from rolltune.types import Support

# fp32 logits held at a time: small enough to stay warm in a CPU's cache, large enough to fill an accelerator.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


def chunk_size(vocab_size: int, device_type: str = "cpu") -> int:
    """Tokens whose logits are held at a time."""
    return max(16, CHUNK_BYTES.get(device_type, CHUNK_BYTES["cuda"]) // (4 * vocab_size))


class _SelectedLogprobs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor,
        temperature: float,
        support: Support | None,
        batch_invariant: bool,
    ):
        multiply = invariant.product if batch_invariant else product
        logprobs = torch.empty(len(targets), dtype=torch.float32, device=hidden.device)
        entropy, logsumexp = torch.empty_like(logprobs), torch.empty_like(logprobs)
        head = weight.to(hidden.dtype)
        size = chunk_size(len(weight), weight.device.type)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            z = multiply(hidden[part], head).float().div_(temperature)  # [chunk, V]
            _restrict(z, support, start)
            exact = invariant.chosen_logprobs(z, targets[part]) if batch_invariant else None
            top = z.amax(-1, keepdim=True)
            z.sub_(top)  # in place from here on: each copy of a chunk would be the largest tensor around
            chosen = z.gather(-1, targets[part, None]).squeeze(-1)
            p = torch.exp(z)
            total = p.sum(-1)
            log_total = total.log()
            logprobs[part] = chosen - log_total if exact is None else exact
            z.clamp_(min=torch.finfo(z.dtype).min)  # what was left out has p = 0, and 0 x -inf would be NaN
            entropy[part] = log_total - p.mul_(z).sum(-1) / total
            logsumexp[part] = log_total + top.squeeze(-1)
        ctx.save_for_backward(hidden, weight, targets, logsumexp)
        ctx.temperature, ctx.support = temperature, support
        ctx.mark_non_differentiable(entropy)
        return logprobs, entropy

    @staticmethod
    def backward(ctx, *grads: Tensor):
        hidden, weight, targets, logsumexp = ctx.saved_tensors
        upstream = grads[0]
        d_hidden = torch.empty_like(hidden)
        # Chunks of a bf16 head would lose their tail if they were summed in bf16.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        head = weight.to(hidden.dtype)
        size = chunk_size(len(weight), weight.device.type)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            z = product(hidden[part], head).float().div_(ctx.temperature)
            _restrict(z, ctx.support, start)
            # d logp[y] / dz = (onehot(y) - softmax(z)) / T
            scale = upstream[part, None] / ctx.temperature
            dz = torch.exp_(z.sub_(logsumexp[part, None])).mul_(-scale)
            dz.scatter_add_(-1, targets[part, None], scale)
            dz = dz.to(hidden.dtype)
            d_hidden[part] = product(dz, head.T)
            if d_weight is not None:
                d_weight += product(dz.T, hidden[part].T)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def _restrict(z: Tensor, support: Support | None, start: int) -> None:
    """Put -inf in the place of logits [chunk, V] outside their token's support; the first token is number ``start``."""
    if support is None:
        return
    offsets = support.offsets[start : start + len(z) + 1]
    ids = support.token_ids[offsets[0] : offsets[-1]]
    sizes = offsets.diff()
    rows = torch.repeat_interleave(sizes, output_size=len(ids))
    kept = z[rows, ids]
    z.masked_fill_(sizes[:, None] > 0, -torch.inf)  # a token without ids has the full vocabulary
    z[rows, ids] = kept


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    support: Support | None = None,
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Log-probs of ``targets`` under softmax(hidden @ weight.T / temperature), and that softmax's entropy.

    Args:
        hidden: [N, H]; matrix products are in its dtype.
        weight: [V, H], the LM head. Of another dtype, it is converted for as long as a pass takes.
        targets: int64 [N].
        temperature: > 0, the one that was sampled with.
        support: what each target was drawn from; the softmax is over these alone. None: over the full vocabulary.
        batch_invariant: a log-prob is the same to the last bit whatever the other tokens are
            (:mod:`rolltune.model.batch_invariant`); float32 on a CPU alone.

    Returns:
        ``(logprobs, entropy)``, both float32 [N] in nats; the entropy carries no gradient.

    Raises:
        ValueError: a target is not of its own support.
    """
    logprobs, entropy = _SelectedLogprobs.apply(hidden, weight, targets, temperature, support, batch_invariant)
    missing = logprobs.isneginf().nonzero().flatten().tolist() if support is not None else []
    if missing:
        raise ValueError(
            f"support: token {targets[missing[0]].item()}, number {missing[0]} of {len(targets)}, is not among the ids "
            "that it was sampled from"
        )
    return logprobs, entropy
