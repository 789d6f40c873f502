"""An error of one rank ends all, and a difference between ranks is named."""

from __future__ import annotations

import errno

import pytest
import torch
from thread_world import on_ranks

from rolltune.config.schema import EvaluateConfig
from rolltune.distributed import World
from rolltune.errors import ConfigError, EngineError, RunStopped
from rolltune.run.agreement import agree, agree_on_run, source_checksum, together, weights_checksum
from rolltune.run.lifecycle import barrier_on_exit
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
            with barrier_on_exit(world), together(world):
                if world.rank == 1:
                    raise KeyError("bug")  # that rank ends, and waits at no barrier
        except (KeyError, RunStopped) as error:
            return f"{type(error).__name__}: {error}"
        return ""

    assert on_ranks(2, set_up) == ["data.train: no such file"] * 2
    assert on_ranks(2, fail) == ["RankFailed: rank 1: KeyError: 'bug'", "KeyError: 'bug'"]


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


def test_a_checksum_of_the_source_sees_folders_that_are_links(tmp_path):
    """As rewards and data are in a checkout."""
    (package := tmp_path / "src/package").mkdir(parents=True)
    (rewards := tmp_path / "rewards").mkdir()
    (package / "rewards").symlink_to(rewards)
    (rewards / "answer.py").write_text("full_marks = 1.0")
    before = source_checksum(package)
    (rewards / "answer.py").write_text("full_marks = 2.0")
    changed = source_checksum(package)
    (rewards / "answer.py").rename(rewards / "format.py")
    assert len({before, changed, source_checksum(package)}) == 3


def test_a_difference_between_configs_shows_no_secret(monkeypatch):
    monkeypatch.setenv("JUDGE_API_KEY", "sk-123456")

    def run(world: World) -> str:
        data = {"_component_": "mine.problems", "url": f"https://h{world.rank}/v1?key=sk-123456"}
        with pytest.raises(ConfigError) as error:
            agree_on_run(EvaluateConfig(data=data), world)
        return str(error.value)

    said = on_ranks(2, run)[0]
    assert "data.url: https://h0/v1?key=${oc.env:JUDGE_API_KEY} on rank 0, https://h1/" in said
    assert "sk-123456" not in said


def test_an_error_of_the_system_is_told_with_its_file_if_it_has_one():
    def run(error: OSError) -> str:
        def fail(world: World) -> str:
            with pytest.raises(RunStopped) as stopped, together(world):
                if world.rank == 1:
                    raise error
            return str(stopped.value)

        return on_ranks(2, fail)[0]

    assert run(OSError(errno.ENOSPC, "No space left on device")) == "rank 1: No space left on device"
    assert run(OSError(errno.ENOSPC, "No space left on device", "a")) == "rank 1: a: No space left on device"
    assert run(OSError("cannot connect")) == "rank 1: cannot connect"
