"""Requests to stop, and runs in which nothing moves."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist
from thread_world import on_ranks

from rolltune.distributed import World
from rolltune.errors import RankLost, StopRequested
from rolltune.run import stop_file
from rolltune.run.agreement import together
from rolltune.run.watch import Watch, watch
from rolltune.run.watch import _Sign as Sign

ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def wait_until(condition) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_signal_is_a_request_to_stop_and_handlers_come_back():
    before = signal.getsignal(signal.SIGINT)
    with watch(ALONE, stall_seconds=0, grace_seconds=60) as watching:
        assert watching.stop_requested() is None
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)  # from torchrun and from the scheduler, at the same time
        wait_until(lambda: watching.stop_requested() == "stopped by SIGTERM")
    assert signal.getsignal(signal.SIGINT) is before and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_stop_file_is_a_request_to_stop(tmp_path):
    def run(world: World) -> str | None:
        return Watch(world, 60, tmp_path if world.is_main else tmp_path / "not_shared").stop_requested()

    assert on_ranks(2, run) == [None, None]
    stop_file.request_stop(tmp_path)
    assert on_ranks(2, run) == [f"stopped by {tmp_path / 'stop'}"] * 2
    stop_file.clear(tmp_path)
    assert on_ranks(2, run) == [None, None]


def test_a_step_that_samples_is_left_after_half_of_the_grace_time():
    watching = Watch(ALONE, grace_seconds=0.2)
    watching.beat("sampling")
    watching.on_signal(signal.SIGTERM)
    watching.beat("sampling")
    time.sleep(0.12)
    watching.beat("training")
    with pytest.raises(StopRequested, match="stopped by SIGTERM"):
        watching.beat("sampling")
    watching._over.set()


def test_all_ranks_leave_the_step_that_one_leaves():
    def run(world: World) -> str:
        with pytest.raises(StopRequested) as error, together(world):
            if world.rank == 1:
                raise StopRequested("stopped by SIGTERM")
        return str(error.value)

    assert on_ranks(2, run) == ["rank 1: stopped by SIGTERM"] * 2


class Ended(Exception):
    """Raised in place of the end of the process."""


@pytest.fixture
def pair(monkeypatch) -> Watch:
    """The watch of rank 0 of 2, in a process that has a group, with looks every 20 ms; its report is raised."""
    for name, value in (("_LONGEST_LOOK", 0.02), ("_PULSE", 0.5)):
        monkeypatch.setattr(f"rolltune.run.watch.{name}", value)
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")

    def report(self: Watch, what: str, missing: set[int]) -> None:
        raise Ended(what, self._describe_missing(missing))

    monkeypatch.setattr(Watch, "_report", report)
    return Watch(World(rank=0, size=2, device=torch.device("cpu")), grace_seconds=60, pulse=0.01)


@contextmanager
def signs(watching: Watch, *, silent: set[int], phase: str = "training") -> Iterator[None]:
    """Let this rank move and all ranks give signs of life, except for the silent ones."""
    over = threading.Event()

    def give() -> None:
        pulses = 0
        while not over.wait(0.01):
            pulses += 1
            given = {rank: Sign(1 if rank in silent else pulses, phase=phase) for rank in range(2)}
            watching.beat(phase)
            watching._signs = given

    thread = threading.Thread(target=give)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("silent", "said"),
    [
        ({1}, "rank 1 does not answer: it is stopped, or its process or machine is gone"),
        ({0, 1}, "no sign of rank 1: the store at 10.0.0.1:29500 does not answer; this machine is cut off from it"),
    ],
)
def test_a_rank_without_a_sign_ends_a_run_that_moves(pair, silent, said):
    with signs(pair, silent=silent), pytest.raises(Ended, match="a rank has given no sign for") as ended:
        pair.look(1000.0)
    assert ended.value.args[1][0].startswith(said)
    with signs(pair, silent=silent):
        assert pair.roll_call().startswith(said)


def test_a_rank_that_has_ended_is_not_missed(pair):
    with signs(pair, silent={1}, phase="ended"):
        threading.Timer(1.0, pair._over.set).start()
        pair.look(1000.0)
        assert "rank 1 has ended; its own output says why" in pair.roll_call()


def test_a_collective_of_fsdp_that_fails_is_named():
    with pytest.raises(RankLost, match=r"rank 0: step 1: a collective has failed \(Connection closed by peer"):
        with watch(ALONE, stall_seconds=0, grace_seconds=60):
            raise RuntimeError("[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection closed by peer")


def run_watched(body: str, *, stall: float = 0.0, grace: float = 60.0) -> subprocess.Popen:
    program = textwrap.dedent("""
        import signal, sys, threading, time, torch
        from rolltune.distributed import World
        from rolltune.run.watch import watch
        world = World(rank=0, size=1, device=torch.device("cpu"))
        with watch(world, stall_seconds={stall}, grace_seconds={grace}) as watching:
            print("ready", flush=True)
            {body}
    """).format(stall=stall, grace=grace, body=body)
    run = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert run.stdout is not None and run.stdout.readline() == "ready\n"
    return run


def test_a_process_that_does_not_listen_ends_after_the_grace_time():
    """It sleeps in C, like one that waits for another rank; the signal's own handler never runs."""
    run = run_watched("threading.Event().wait()", grace=0.5)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 1
    assert "SIGTERM: finishing the step and saving, for at most 0.5 s" in errors
    assert "stopped by SIGTERM: the step did not end within grace_seconds, 0.5" in errors


def test_a_second_signal_ends_it_at_once():
    run = run_watched("threading.Event().wait()")
    run.send_signal(signal.SIGINT)
    time.sleep(2.3)
    run.send_signal(signal.SIGINT)
    _, errors = run.communicate(timeout=30)
    assert run.returncode == 130 and "SIGINT: stopped at once" in errors


def test_what_does_not_move_is_named_with_its_stack():
    run = run_watched("watching.step = 7; watching.beat('sampling'); time.sleep(3600)", stall=1.0)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 1
    assert "nothing has moved for 1 s (stall_seconds), in sampling after step 7" in errors
    assert "Thread" in errors and "time.sleep" not in errors.splitlines()[0] and "<string>" in errors
    assert "continue with the same command and resume=true" in errors


def test_what_moves_slowly_or_was_paused_goes_on():
    body = "[(watching.beat('training'), time.sleep(0.4)) for _ in range(8)]"
    run = run_watched(body, stall=1.0)
    run.send_signal(signal.SIGSTOP)
    time.sleep(2.5)
    run.send_signal(signal.SIGCONT)
    _, errors = run.communicate(timeout=60)
    assert run.returncode == 0, errors
