"""Learning-rate schedules that torchtune has not got. Called with the optimizer and the run's number of updates."""

from __future__ import annotations

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant_with_warmup(optimizer: Optimizer, *, num_warmup_steps: int, num_training_steps: int) -> LambdaLR:
    """Linear from 0 over ``num_warmup_steps`` updates, then constant (DAPO, arXiv 2503.14476, section 4.1).

    Args:
        optimizer: its learning rate is the constant.
        num_warmup_steps: >= 0.
        num_training_steps: of the whole run; only there to be more than the warm-up.

    Raises:
        ValueError: a warm-up that is negative or longer than the run.
    """
    if not 0 <= num_warmup_steps <= num_training_steps:
        raise ValueError(
            f"num_warmup_steps: {num_warmup_steps}: must lie in 0 .. {num_training_steps}, the run's updates"
        )
    return LambdaLR(optimizer, lambda update: min(1.0, update / num_warmup_steps) if num_warmup_steps else 1.0)
