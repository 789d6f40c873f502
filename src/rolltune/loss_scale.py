"""Dynamic loss scaling: what keeps small gradients alive in float16.

fp16 holds nothing below 6e-8 and nothing above 65,504. The loss is multiplied by a scale S before the backward pass, so
that every gradient is S times as large on its way through the network, and gradients are divided by S in fp32 before
anything looks at them. The largest S that does not overflow is found by trying: a step whose gradient is not finite is
skipped and S halved, and after some steps without one S is doubled.

"Mixed Precision Training" (Micikevicius et al., arXiv 1710.03740, section 3.2); the same trajectory as
``torch.amp.GradScaler``'s, but for the floor of 1. For RL in fp16: arXiv 2510.26788.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import Tensor


class LossScale:
    """The scale and what moves it. Powers of two alone, so that scaling changes no bit of a gradient that fits.

    Attributes:
        value: S, >= 1.
        clean_steps: since S was last changed.
    """

    def __init__(self, *, initial: float = 2.0**16, growth_interval: int = 400):
        """
        Args:
            initial: the first S, a power of two.
            growth_interval: steps without an overflow after which S is doubled; 400 is what arXiv 2510.26788 trains
                with, GradScaler's own default is 2000.

        Raises:
            ValueError: a value out of its range.
        """
        if not (1 <= initial < math.inf and math.frexp(initial)[0] == 0.5):
            raise ValueError(f"initial: {initial}; must be a power of two, >= 1")
        if growth_interval < 1:
            raise ValueError(f"growth_interval: {growth_interval}; must be >= 1")
        self.growth_interval = growth_interval
        self.value = float(initial)
        self.clean_steps = 0

    def unscale(self, parameters: Iterable[Tensor]) -> None:
        """Divide the gradients, fp32, by S."""
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(1 / self.value)

    def grow(self) -> None:
        """Count a step that was taken."""
        self.clean_steps += 1
        if self.clean_steps == self.growth_interval:
            self.value, self.clean_steps = 2 * self.value, 0

    def shrink(self) -> bool:
        """Halve S after an overflow; False where it is 1 already, so that scaling is not what went wrong."""
        if self.value == 1:
            return False
        self.value, self.clean_steps = self.value / 2, 0
        return True

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value, "clean_steps": self.clean_steps}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value, self.clean_steps = state["value"], int(state["clean_steps"])
