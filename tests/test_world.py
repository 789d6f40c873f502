"""Sharding over processes, and sums over all of them."""

import os
import socket
import subprocess
import sys
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from rolltune import distributed
from rolltune.distributed import World, init_world, joined_world
from rolltune.errors import ConfigError, RankFailed, RunStopped

CPU = torch.device("cpu")


def world(rank: int, size: int) -> World:
    return World(rank=rank, size=size, device=CPU)


@given(st.lists(st.integers()), st.integers(1, 9))
def test_shards_cover_everything_once(items, size):
    shards = [world(rank, size).shard(items) for rank in range(size)]
    assert sorted(item for shard in shards for item in shard) == sorted(items)
    assert max(map(len, shards)) - min(map(len, shards)) <= 1


@given(st.sampled_from([1, 2, 4]), st.sampled_from([1, 2, 3]), st.integers(1, 3))
def test_every_minibatch_of_a_step_is_spread_evenly(size, minibatches, per_rank):
    """Groups of a minibatch are consecutive in the step. Each rank must have the same number of them."""
    groups = range(size * minibatches * per_rank)
    for rank in range(size):
        mine = world(rank, size).shard(groups)
        counts = [sum(number * minibatches // len(groups) == m for number in mine) for m in range(minibatches)]
        assert counts == [per_rank] * minibatches


def test_a_world_of_one_communicates_nothing(monkeypatch):
    for name in ("all_reduce", "all_gather_object", "barrier"):
        monkeypatch.setattr(dist, name, lambda *args, **kwargs: pytest.fail("there is no process group"))
    alone = world(0, 1)
    assert alone.is_main and not world(1, 2).is_main
    assert alone.shard([3, 1, 2]) == [3, 1, 2]
    assert alone.sum([0.5, 2]) == alone.max([0.5, 2]) == [0.5, 2]
    assert alone.sum([]) == [] and alone.gather(iter("ab")) == ["a", "b"]
    parameter = torch.zeros(2)
    alone.sum_gradients([parameter])
    assert parameter.grad is None
    alone.barrier()


def test_gradients_are_summed_in_buckets(monkeypatch):
    """Every rank has the same gradients here, so the sum over three ranks is three times each."""
    sent = []

    def all_reduce(tensor):
        sent.append((tensor.dtype, tensor.nbytes))
        tensor.mul_(3)

    monkeypatch.setattr(dist, "all_reduce", all_reduce)
    monkeypatch.setattr(distributed, "BUCKET_BYTES", 16)
    shapes = [(2, 2), (3,), (), (2,), (5,)]
    parameters = [torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]
    half = torch.nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    parameters.insert(3, half)
    for i, parameter in enumerate(parameters, start=1):
        if i != 2:  # the second one has no gradient on this rank
            parameter.grad = torch.full_like(parameter, float(i)).contiguous()
    parameters[0].grad = torch.arange(4.0).reshape(2, 2).T  # not contiguous
    world(0, 3).sum_gradients(parameters)
    assert torch.equal(parameters[0].grad, 3 * torch.arange(4.0).reshape(2, 2).T)
    assert torch.equal(parameters[1].grad, torch.zeros(3))
    for i, parameter in enumerate(parameters[2:], start=3):
        assert torch.equal(parameter.grad, torch.full_like(parameter, 3.0 * i)), i
    # 4 + 3 numbers exceed the bucket, so the third tensor opens another one; the bfloat16 one has its own bucket.
    assert sent == [(torch.float32, 28), (torch.float32, 4), (torch.bfloat16, 4), (torch.float32, 28)]


def test_without_torchrun_there_is_one_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dist, "init_process_group", lambda *a, **k: pytest.fail("one process needs no group"))
    assert init_world("cpu") == world(0, 1)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert init_world("auto") == world(0, 1)


def test_each_rank_has_its_own_gpu(monkeypatch):
    chosen = []
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, **kwargs: chosen.append(backend))
    assert init_world("auto") == World(rank=3, size=4, device=torch.device("cuda", 1))
    assert chosen == [torch.device("cuda", 1), "nccl"]
    assert init_world("cpu").device == CPU and chosen[-1] == "gloo"


def test_the_group_is_left_when_all_ranks_end_together(monkeypatch):
    left = []
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "destroy_process_group", lambda: left.append(True))
    for error, times in ((None, 1), (ConfigError([""]), 1), (RunStopped(""), 1), (RankFailed(""), 0), (KeyError(), 0)):
        left.clear()
        with suppress(Exception), joined_world("cpu"):
            if error:
                raise error
        assert len(left) == times, error


RANK_PROGRAM = """
import torch
from rolltune.distributed import joined_world
from rolltune.errors import ConfigError


def check(world):
    assert (world.size, world.is_main) == (2, world.rank == 0)
    third = 1 / 3
    assert world.sum([world.rank + 1, third * 2**-30, 1e15 + world.rank]) == [3.0, third * 2**-29, 2e15 + 1]
    assert world.max([-world.rank, world.rank]) == [0.0, 1.0]
    assert world.gather(["a", "b"][: world.rank + 1]) == ["a", "a", "b"]
    assert world.gather([]) == []
    seen, unseen = torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(()))
    seen.grad = torch.tensor([1.0, 10.0]) * (world.rank + 1)
    if world.rank == 1:
        unseen.grad = torch.tensor(5.0)
    world.sum_gradients([seen, unseen])
    assert seen.grad.tolist() == [3.0, 30.0] and unseen.grad.item() == 5.0
    world.barrier()


try:
    with joined_world("cpu") as world:
        check(world)
        raise ConfigError(["of all ranks"])
except ConfigError:
    assert not torch.distributed.is_initialized()  # it might abort the process at exit
print("done")
"""


def test_two_processes(monkeypatch):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2"}
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK_PROGRAM],
            env=environment | {"RANK": str(rank), "OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for rank in ranks:
        out, err = rank.communicate(timeout=120)
        assert rank.returncode == 0 and out == "done\n", err
