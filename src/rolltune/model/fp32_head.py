"""An LM head that multiplies in fp32, for a model held in bf16 or fp16.

The head's product is the last rounding before the softmax, and it reaches every log-prob: a bf16 logit of 20 is a
multiple of 1/8. With fp32 products of the same weights, sampler and trainer differ only by their hidden states.
MiniMax-M1 (arXiv 2506.13585) did this when its sampler's probabilities differed from its trainer's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class FP32Head(nn.Linear):
    """``x.float() @ weight.float().T``, without a bias. The weight keeps its precision, tied or not."""

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


def use_fp32_head(model: PreTrainedModel, path: str) -> None:
    """Replace the model's LM head by an :class:`FP32Head`, so that all logits of the model are fp32.

    Raises:
        ValueError: the head is not a linear layer without a bias; the message names ``path``.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear) or head.bias is not None:
        raise ValueError(
            f"model.fp32_head: true; the LM head of {path} is not a linear layer without a bias; leave it out"
        )
    model.set_output_embeddings(FP32Head(head.weight))
