"""Two completions, of 2 tokens and 1 token, small enough to compute every loss by hand."""

import math

import pytest
import torch

from rolltune.types import LossInputs, LossTotals


def logs(*probabilities: float) -> torch.Tensor:
    return torch.tensor([math.log(p) for p in probabilities])


@pytest.fixture
def logprobs() -> torch.Tensor:
    return logs(0.3, 0.2, 0.1).requires_grad_()


@pytest.fixture
def inputs(logprobs) -> LossInputs:
    """Ratios (1.5, 0.5 | 0.5), advantages (1, 1 | -2), pi_ref / pi (2, 1 | 1/2).

    k3 of a quotient q is q - log(q) - 1: (1 - log 2, 0 | log 2 - 1/2), about (0.3069, 0, 0.1931), which sum to 1/2.
    Its derivative by log pi is 1 - q: (-1, 0 | 1/2).
    """
    return LossInputs(
        logprobs=logprobs,
        old_logprobs=logs(0.2, 0.4, 0.2),
        advantages=torch.tensor([1.0, 1.0, -2.0]),
        sequence_index=torch.tensor([0, 0, 1]),
        num_sequences=2,
        reference_logprobs=logs(0.6, 0.2, 0.05),
    )


@pytest.fixture
def totals() -> LossTotals:
    return LossTotals(tokens=3, sequences=2)
