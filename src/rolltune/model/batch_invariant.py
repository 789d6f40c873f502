"""Log-probs that do not depend on the batch, so that sampler and trainer agree to the last bit (CPU, float32 only).

The shape of a product or a reduction decides the order in which it is summed. So the last bits of a token's log-prob
depend on what is computed beside it: the sampler sees one token of each completion, the trainer whole microbatches (He
et al., Thinking Machines, "Defeating Nondeterminism in LLM Inference", 2025). Here they do not:

  - products with a weight run in tiles of ``TILE_ROWS`` rows, the last one padded, so that oneDNN always takes the same
    kernel;
  - attention runs in tiles of fixed size, see :mod:`rolltune.model.batch_invariant_attention`;
  - activations run on pieces whose length is a multiple of every vector length, because PyTorch computes a remainder
    with scalar instructions, which round differently;
  - log-probs are ``log_softmax`` of the logits, and the sampler's are of the logits that it draws from.

Norms, rotary embeddings, softmax and log_softmax are PyTorch's own: its CPU kernels compute a row in the same way
whatever the number of rows, the position and the number of threads. All of this is a property of the installed kernels,
which do not promise it. Tests compare bits over shapes and threads, and the self-test before a run's first step accepts
no difference.

Gradients are those of the usual kernels.
"""

from __future__ import annotations

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.activations import ACT2CLS

from rolltune.model.batch_invariant_attention import BATCH_INVARIANT_PACKED_ATTENTION
from rolltune.model.cpu import onednn

TILE_ROWS = 32
# A multiple of every vector length, and too short for PyTorch to split it among threads (GELU splits from 24576 on).
PIECE = 16384
_ACTIVATIONS = tuple(entry[0] if isinstance(entry, tuple) else entry for entry in ACT2CLS.values())


def check_usable(dtype: str, device: torch.device | str) -> None:
    """Raise ValueError if there are no kernels with a fixed order of summation for this type and device."""
    if dtype != "float32":
        raise ValueError(f"model.dtype: {dtype}; model.batch_invariant needs float32")
    if torch.device(device).type != "cpu":
        raise ValueError(
            f"model.batch_invariant: true; it works only on a CPU, and the device is {device}, whose matrix products "
            "and attention choose their order of summation by the size of the batch; set it to false (in float32, "
            "sampler and trainer then differ only by rounding: see mismatch/max_abs)"
        )
    if not torch.backends.mkldnn.is_available():
        raise ValueError("model.batch_invariant: true; it needs oneDNN, which this build of torch does not have")


def make_batch_invariant(model: nn.Module) -> None:
    """Replace the forward of linear layers and activations. Call again after adding adapters.

    Raises:
        ValueError: the model has weights outside of linear layers and embeddings.
    """
    for module in model.modules():
        if type(module) is nn.Linear:
            module.forward = partial(onednn.linear, module, multiply=product)  # pyright: ignore[reportAttributeAccessIssue]
        elif isinstance(module, _ACTIVATIONS):
            module.forward = partial(elementwise, module)  # pyright: ignore[reportAttributeAccessIssue]
        elif not isinstance(module, nn.Embedding) and any(p.ndim > 1 for p in module.parameters(recurse=False)):
            raise ValueError(
                f"model.batch_invariant: true; the model has weights in {type(module).__name__}, whose products may "
                "depend on the batch; only torch.nn.Linear is supported"
            )


def is_batch_invariant(model: PreTrainedModel) -> bool:
    """Whether :func:`rolltune.model.load.load_model` loaded the model with ``batch_invariant=True``."""
    return model.config._attn_implementation == BATCH_INVARIANT_PACKED_ATTENTION


def product(a: Tensor, weight: Tensor) -> Tensor:
    """Compute ``a @ weight.T`` in float32, without a gradient, each row independently of the others.

    Args:
        a: [M, K], M of any size.
        weight: [N, K], plain or already packed by oneDNN.

    Returns:
        [M, N].
    """
    weight = weight if weight.is_mkldnn else torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    tiles = F.pad(a, (0, 0, 0, -len(a) % TILE_ROWS)).split(TILE_ROWS)
    products = [torch.ops.mkldnn._linear_pointwise(tile, weight, None, "none", [], "") for tile in tiles]
    return torch.cat(products)[: len(a)]


def sampling_linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear layer through :func:`product`, [..., K] -> [..., N], without a gradient."""
    y = product(x.flatten(0, -2), weight).unflatten(0, x.shape[:-1])
    return y if bias is None else y + bias


def elementwise(module: nn.Module, x: Tensor) -> Tensor:
    """Compute ``module(x)`` for an activation, with x of any shape."""
    pieces = F.pad(x.flatten(), (0, -x.numel() % 64)).split(PIECE)
    y = torch.cat([type(module).forward(module, piece) for piece in pieces])
    return y[: x.numel()].view(x.shape)


def chosen_logprobs(logits: Tensor, targets: Tensor) -> Tensor:
    """Return log-probs float32 [N] of ``targets`` [N] under softmax(logits [N, V]). Sampler and trainer both use it."""
    return torch.log_softmax(logits, dim=-1).gather(-1, targets[:, None]).squeeze(-1)
