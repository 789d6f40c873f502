"""An error of one rank ends all, and a difference between ranks is named."""

from __future__ import annotations

import pytest
import torch
from thread_world import on_ranks

from rolltune.distributed import World
from rolltune.errors import ConfigError, EngineError, RunStopped
from rolltune.run.agreement import agree, together, weights_checksum
from rolltune.samplers.generation import PromptTooLong


@pytest.mark.parametrize("kind", [EngineError, FloatingPointError, PromptTooLong])
def test_all_ranks_raise_what_one_has_raised(kind):
    """They stop in the same way, with a checkpoint that all of them join in."""

    def run(world: World) -> str:
        with pytest.raises(kind) as error:
            with together(world):
                if world.rank == 1:
                    raise kind("no answer")
        return str(error.value)

    assert on_ranks(3, run) == ["rank 1: no answer"] * 3


def test_a_rank_that_goes_on_is_not_held_up():
    def run(world: World) -> int:
        with together(world):
            value = world.rank
        return value

    assert on_ranks(2, run) == [0, 1]


def test_the_mistake_of_one_rank_ends_all(tmp_path):
    def set_up(world: World) -> str:
        try:
            with together(world):
                if world.rank == 1:
                    raise ConfigError(["data.train: no such file"])
        except ConfigError as error:
            return str(error)
        return ""

    def fail(world: World) -> str:
        try:
            with together(world):
                if world.rank == 1:
                    raise KeyError("bug")
        except (KeyError, RunStopped) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    assert on_ranks(2, set_up) == ["data.train: no such file"] * 2
    assert on_ranks(2, fail) == ["RunStopped: rank 1: KeyError: 'bug'", "KeyError: 'bug'"]


def test_what_differs_is_named_with_its_ranks():
    def differ(world: World) -> str:
        with pytest.raises(ConfigError) as error:
            agree(world, {"seed": "0", "torch": "2.10" if world.rank == 1 else "2.13"})
        return str(error.value)

    assert set(on_ranks(3, differ)) == {"torch: 2.13 on rank 0, 2, 2.10 on rank 1; must be the same on all ranks"}


def test_a_checksum_sees_one_bit_and_swapped_tensors():
    weights = [torch.zeros(3), torch.ones(3, dtype=torch.bfloat16)]
    same = weights_checksum(weights)
    assert weights_checksum([w.clone() for w in weights]) == same
    weights[0][1] = 2**-149  # the last bit
    assert weights_checksum(weights) != same
    assert weights_checksum([torch.ones(2), torch.zeros(2)]) != weights_checksum([torch.zeros(2), torch.ones(2)])
