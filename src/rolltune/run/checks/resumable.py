"""Try optimizer and schedule on a few numbers, before weights are loaded: do they step, and do they resume?

Whatever a config names is stepped twice: unbroken, and as in a run that is killed again and again, which saves, builds
everything anew and loads. Both must go the same way bit for bit. The trial takes milliseconds.
"""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

from rolltune.config.components import instantiate
from rolltune.config.schema import Component
from rolltune.errors import ConfigError
from rolltune.run.build import parameter_groups

OPTIMIZER_STEPS = 12
SCHEDULE_STEPS = 2000  # at most, of a run's
SCHEDULE_RESTARTS = 20


def optimizer_problem(node: Component) -> str | None:
    """Say why an optimizer cannot train, or does not resume; None if it does both. Its arguments have been checked."""
    if "capturable" in node:
        node = node | {"capturable": False}  # which needs tensors in CUDA
    with _trial():
        # 8-bit optimizers keep the moments of less than 4,096 weights in float32.
        unbroken = [Parameter(torch.randn(shape)) for shape in ((4,), (3, 4), (64, 65))]
        resumed = _copies(unbroken)
        try:
            optimizer, restarted = _build(node, unbroken), _build(node, resumed)
            for step in range(OPTIMIZER_STEPS):
                _step(optimizer, unbroken, seed=step)
                _step(restarted, resumed, seed=step)
                resumed = _copies(resumed)
                restarted = _restart(restarted, _build(node, resumed))
                if not all(map(_equal, unbroken, resumed)):
                    return "a resumed run would go another way, since its state_dict lacks some of its state"
        except ConfigError as error:
            return str(error).removeprefix(f"{node['_component_']}: ")
        except Exception as error:  # of the user's code, or of torch's
            return f"a trial failed ({_first_line(error)})"
    return None


def schedule_problem(node: Component, optimizer: Component, num_updates: int) -> str | None:
    """Say why a schedule cannot be stepped, or does not resume; None if it does both.

    Args:
        node: the schedule, whose arguments have been checked.
        optimizer: the optimizer whose rate it sets.
        num_updates: optimizer steps of the run.
    """

    def build() -> tuple[Optimizer, Any]:
        built = _build(optimizer, [Parameter(torch.zeros(1))])
        return built, instantiate(node, optimizer=built, num_training_steps=num_updates)

    steps = min(num_updates, SCHEDULE_STEPS)
    with _trial():
        try:
            unbroken, resumed = build(), build()
            for step in range(steps):
                if step % max(1, steps // SCHEDULE_RESTARTS) == 0:
                    resumed = tuple(map(_restart, resumed, build()))
                unbroken[1].step()
                resumed[1].step()
                rates = [float(group["lr"]) for group in unbroken[0].param_groups]
                if not all(map(math.isfinite, rates)):
                    return f"the rate of step {step + 2} is {rates[0]}; must be finite"
                if _settings(unbroken[0]) != _settings(resumed[0]):
                    return (
                        f"a resumed run would have another rate from step {step + 2} on; keep no state but last_epoch"
                    )
        except ConfigError as error:
            return str(error)
        except Exception as error:
            return f"a trial failed ({_first_line(error)}); it is stepped without arguments, after each optimizer step"
    return None


@contextmanager
def _trial() -> Iterator[None]:
    """Leave torch's random state as it is, and print no warnings."""
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings(action="ignore"):
        torch.manual_seed(0)
        yield


def _build(node: Component, weights: list[Parameter]) -> Optimizer:
    return instantiate(node, parameter_groups(weights))


def _step(optimizer: Optimizer, weights: list[Parameter], *, seed: int) -> None:
    torch.manual_seed(seed)  # as training does
    for weight in weights:
        weight.grad = torch.randn_like(weight)
    step: Callable[[], Any] = optimizer.step
    step()
    optimizer.zero_grad(set_to_none=True)


def _restart(old: Any, new: Any) -> Any:
    """Give an optimizer or schedule the state of another, as a checkpoint does."""
    file = io.BytesIO()
    torch.save(old.state_dict(), file)
    file.seek(0)
    new.load_state_dict(torch.load(file, weights_only=True))
    return new


def _copies(weights: list[Parameter]) -> list[Parameter]:
    return [Parameter(weight.detach().clone()) for weight in weights]


def _equal(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.nan_to_num(), b.nan_to_num())


def _settings(optimizer: Optimizer) -> str:
    """The rate of each group and whatever else a schedule may set, to compare."""
    return repr(
        [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    )


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:200]}"
