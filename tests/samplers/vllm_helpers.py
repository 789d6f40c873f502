"""Shared by the tests that start vLLM."""

from __future__ import annotations

import torch

from rolltune.samplers import probe
from rolltune.types import Completion, Prompt, SampleRequest

OPTIONS = {"kv_cache_gib": 0.05, "max_num_seqs": 16, "max_model_len": 400}


def shake(model, seed: int, scale: float = 0.03) -> None:
    """Change the policy by about as much as many optimizer steps would: ``scale`` standard deviations."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(scale * parameter.std() * torch.randn_like(parameter))


def requests(tokenizer, *texts: str, seeds: int = 3) -> list[SampleRequest]:
    return [
        SampleRequest(prompt=Prompt(token_ids=tuple(tokenizer.encode(text))), seeds=tuple(range(i, i + seeds)))
        for i, text in enumerate(texts)
    ]


def trainer_logprobs(model, request: SampleRequest, completion: Completion, temperature: float) -> torch.Tensor:
    return probe.trainer_logprobs(model, request.prompt.token_ids, completion.token_ids, temperature)
