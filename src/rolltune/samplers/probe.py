"""A fixed prompt that engine and trainer both score: whether they have one distribution, up to their precision."""

from __future__ import annotations

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.model.load import unwrapped
from rolltune.model.policy import packed_logprobs
from rolltune.types import Microbatch

PROMPT_TOKENS, NEW_TOKENS = 40, 4  # longer than a block of the prefix cache, of 16 tokens on GPUs and 32 on CPUs
# Mean |dlogp| of the new tokens. fp32 differs by the order of summation; half precision by the rounding of every
# layer's activations: a mean of 0.04 and single tokens up to 0.6 in bf16 on SmolLM2-135M, where an old head gives 1. So
# the probe is for what is grossly wrong there, the fingerprints for the rest.
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.05, torch.bfloat16: 0.4}


def probe_prompt(tokenizer: PreTrainedTokenizerBase, max_model_len: int) -> tuple[int, ...]:
    """Token ids of a fixed text that leaves room for :data:`NEW_TOKENS`."""
    text = " ".join(f"{n} and {n + 1} make {2 * n + 1}." for n in range(1, 200))
    ids = tokenizer.encode(text, add_special_tokens=False)
    return tuple(ids[: min(PROMPT_TOKENS, max_model_len - NEW_TOKENS)])


@torch.no_grad()
def trainer_logprobs(model: PreTrainedModel | PeftModel, prompt: tuple[int, ...], written: tuple[int, ...]) -> Tensor:
    """Log-probs of what was written after the prompt, at temperature 1, by the pass that is trained with.

    Returns:
        float32 [len(written)], on the CPU.
    """
    causal_lm = unwrapped(model)
    start, count, device = len(prompt), len(written), causal_lm.device
    row = Microbatch(
        input_ids=torch.tensor([*prompt, *written], device=device),
        position_ids=torch.arange(start + count, device=device),
        segment_index=torch.zeros(start + count, dtype=torch.int64, device=device),
        sequence_index=torch.tensor([-1] * start + [0] * count, device=device),
        predictor_index=torch.arange(start - 1, start + count - 1, device=device),
        target_ids=torch.tensor(written, device=device),
        target_sequence_index=torch.zeros(count, dtype=torch.int64, device=device),
        num_sequences=1,
    )
    training = [module for module in model.modules() if module.training]
    model.eval()  # dropout of an adapter is none of the engine's
    try:
        return packed_logprobs(causal_lm, row, temperature=1.0)[0].cpu()
    finally:
        for module in training:
            module.training = True
