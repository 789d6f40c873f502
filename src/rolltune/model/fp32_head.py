"""An LM head that multiplies in fp32, over a model held in bf16 or fp16.

The head's product is the last thing that is rounded before the softmax, and its rounding lands in every log-prob: a
bf16 logit of 20 is a multiple of 1/8. With fp32 products of the same weights, what sampler and trainer still differ by
comes from the hidden states alone. MiniMax-M1 (arXiv 2506.13585) did so when its sampler's probabilities were not its
trainer's.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel


class FP32Head(nn.Linear):
    """``x.float() @ weight.float().T``, without a bias; the weight stays what it is, tied or not."""

    def __init__(self, weight: Tensor):
        super().__init__(weight.shape[1], weight.shape[0], bias=False, device="meta")
        self.weight = weight

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input.float(), self.weight.float())


def use_fp32_head(model: PreTrainedModel) -> None:
    """Put an :class:`FP32Head` in the place of the model's head: all that asks the model for logits gets fp32 ones."""
    head = model.get_output_embeddings()
    assert isinstance(head, nn.Linear)
    model.set_output_embeddings(FP32Head(head.weight))
