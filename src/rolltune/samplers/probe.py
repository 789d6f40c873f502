"""A fixed prompt that engine and trainer both score, to check that they have the same distribution."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.batch import TokenSequence, TrainGroup, pack_examples
from rolltune.model.forward import packed_logprobs
from rolltune.model.load import unwrapped
from rolltune.types import Prompt

PROMPT_TOKENS, NEW_TOKENS = 40, 4  # longer than a block of the prefix cache: 16 tokens on GPUs, 32 on CPUs
# Largest mean |dlogp| of the new tokens. In fp32 the order of summation differs; in half precision every layer's
# activations are rounded: a mean of 0.04 and single tokens up to 0.6 in bf16 on SmolLM2-135M, where a stale head gives
# 1. So in half precision the probe finds only gross errors, and the fingerprints find the rest.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}


def probe_prompt(tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> tuple[int, ...]:
    """Return token ids of a fixed text that leaves room for :data:`NEW_TOKENS`."""
    text = " ".join(f"{n} and {n + 1} make {2 * n + 1}." for n in range(1, 200))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tuple(ids[: min(PROMPT_TOKENS, max_model_len - NEW_TOKENS)])


@torch.no_grad()
def trainer_logprobs(
    model: PreTrainedModel | PeftModel, prompt: tuple[int, ...], completion: tuple[int, ...], temperature: float = 1.0
) -> Tensor:
    """Score a completion with the training forward pass, without dropout.

    Returns:
        Log-probs of the full softmax, float32 [len(completion)], on the CPU.
    """
    causal_lm = unwrapped(model)
    group = TrainGroup(prompt=Prompt(token_ids=prompt), sequences=(TokenSequence(token_ids=completion),))
    (microbatch,) = pack_examples([group], max_tokens=len(prompt) + len(completion), device=causal_lm.device)
    training = [module for module in model.modules() if module.training]
    model.eval()  # the engine has no dropout
    try:
        return packed_logprobs(causal_lm, microbatch, temperature=temperature)[0].cpu()
    finally:
        for module in training:
            module.training = True
