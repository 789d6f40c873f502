"""Dynamic loss scaling, which keeps small gradients representable in float16.

fp16 represents magnitudes from 6e-8 to 65,504. The loss is multiplied by a scale S before the backward pass, and the
gradients are divided by S in fp32 before they are clipped. A step with a gradient that is not finite is skipped and
halves S. After enough steps without one S is doubled.

"Mixed Precision Training" (Micikevicius et al., arXiv 1710.03740, section 3.2). For RL in fp16: arXiv 2510.26788.
"""

from __future__ import annotations

import math

from torch.amp.grad_scaler import GradScaler


class LossScale(GradScaler):
    """A ``torch.amp.GradScaler`` whose scale is a power of two, so that scaling does not round gradients.

    :meth:`rolltune.update.Optimization.step` never lets the scale fall below 1.
    """

    def __init__(self, *, init_scale: float = 2.0**16, growth_interval: int = 400):
        """
        Args:
            init_scale: the first scale, a power of two, >= 1.
            growth_interval: steps without an overflow after which the scale is doubled. 400 is the value of arXiv
                2510.26788; GradScaler's default is 2000.

        Raises:
            ValueError: a value out of its range.
        """
        if not (1 <= init_scale < math.inf and math.frexp(init_scale)[0] == 0.5):
            raise ValueError(f"init_scale: {init_scale}; must be a power of two, >= 1")
        if growth_interval < 1:
            raise ValueError(f"growth_interval: {growth_interval}; must be >= 1")
        # GradScaler needs a device only to disable itself without CUDA. Its tensors are on the device of the loss.
        super().__init__("cpu", init_scale=float(init_scale), growth_interval=growth_interval)
