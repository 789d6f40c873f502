"""Log-prob and entropy of each trained token from hidden states and LM head, without the full [tokens, vocab] logits.

Forward and backward work on chunks of tokens, and the backward pass recomputes a chunk's logits instead of storing
them. (Liger and mgmalek compute the gradient in the forward pass. That does not work here: the upstream gradient of a
policy loss is known only after all log-probs.)

If top-k or top-p truncated the distribution, the softmax runs over the tokens that they kept, as the sampler's did. A
full softmax would put every ratio off by the mass that was cut ("Keep Sampling Mask", DeepSeek-V3.2, arXiv 2512.02556,
section 3.1).
"""

from __future__ import annotations

import torch
from torch import Tensor

from rolltune.model import batch_invariant as invariant
from rolltune.model.cpu.onednn import product
from rolltune.types import Support

# Size of the fp32 logits of a chunk: small enough for a CPU's cache, large enough to keep an accelerator busy.
CHUNK_BYTES = {"cpu": 32 * 2**20, "cuda": 512 * 2**20}


def chunk_size(vocab_size: int, device_type: str = "cpu") -> int:
    """Return the number of tokens in a chunk."""
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
            restrict(z, support, start)
            exact = invariant.chosen_logprobs(z, targets[part]) if batch_invariant else None
            top = z.amax(-1, keepdim=True)
            z.sub_(top)  # in place from here on: a chunk is the largest tensor here
            chosen = z.gather(-1, targets[part, None]).squeeze(-1)
            p = torch.exp(z)
            total = p.sum(-1)
            log_total = total.log()
            logprobs[part] = chosen - log_total if exact is None else exact
            z.clamp_(min=torch.finfo(z.dtype).min)  # tokens outside the support have p = 0, and 0 x -inf is NaN
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
        # Summed in fp32 over the chunks: in bf16 the sum would lose small terms.
        d_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        head = weight.to(hidden.dtype)
        size = chunk_size(len(weight), weight.device.type)
        for start in range(0, len(targets), size):
            part = slice(start, start + size)
            z = product(hidden[part], head).float().div_(ctx.temperature)
            restrict(z, ctx.support, start)
            # d logp[y] / dz = (onehot(y) - softmax(z)) / T
            scale = upstream[part, None] / ctx.temperature
            dz = torch.exp_(z.sub_(logsumexp[part, None])).mul_(-scale)
            dz.scatter_add_(-1, targets[part, None], scale)
            dz = dz.to(hidden.dtype)
            d_hidden[part] = product(dz, head.T)
            if d_weight is not None:
                d_weight += product(dz.T, hidden[part].T)
        return d_hidden, None if d_weight is None else d_weight.to(weight.dtype), None, None, None, None


def restrict(z: Tensor, support: Support | None, start: int) -> None:
    """Set logits [chunk, V] outside of each token's support to -inf, in place. ``start``: number of the first token."""
    if support is None:
        return
    offsets = support.offsets[start : start + len(z) + 1]
    ids = support.token_ids[offsets[0] : offsets[-1]]
    sizes = offsets.diff()
    tokens = torch.repeat_interleave(sizes, output_size=len(ids))
    kept = z[tokens, ids]
    z.masked_fill_(sizes[:, None] > 0, -torch.inf)  # a token without ids has the full vocabulary
    z[tokens, ids] = kept


def check_support(logprobs: Tensor, targets: Tensor, support: Support | None) -> None:
    """Raise ValueError if a target is not in its own support."""
    missing = logprobs.isneginf().nonzero().flatten().tolist() if support is not None else []
    if missing:
        raise ValueError(
            f"support: token {targets[missing[0]].item()}, number {missing[0]} of {len(targets)}, is not in the set of "
            "tokens that it was drawn from"
        )


def selected_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    support: Support | None = None,
    *,
    batch_invariant: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute log-probs of ``targets`` under softmax(hidden @ weight.T / temperature), and the softmax's entropy.

    Args:
        hidden: [N, H]; its dtype is that of the matrix products.
        weight: [V, H], the LM head; converted to that dtype for the duration of a pass.
        targets: int64 [N].
        temperature: the sampling temperature, > 0.
        support: the tokens that each target was drawn from; the softmax runs over them only. None: the full vocabulary.
        batch_invariant: whether a log-prob must not depend on the other tokens
            (:mod:`rolltune.model.batch_invariant`); float32 on a CPU only.

    Returns:
        ``(logprobs, entropy)``, both float32 [N] in nats; the entropy carries no gradient.

    Raises:
        ValueError: a target is not in its own support.
    """
    logprobs, entropy = _SelectedLogprobs.apply(hidden, weight, targets, temperature, support, batch_invariant)
    check_support(logprobs, targets, support)
    return logprobs, entropy
