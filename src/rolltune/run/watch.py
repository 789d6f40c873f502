"""End a run that is asked to stop, and one in which nothing moves.

Both need threads of their own. The main thread may be inside a collective, waiting for a rank that is gone, and there
Python handles no signal.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NoReturn

import torch.distributed as dist

from rolltune.distributed import World
from rolltune.errors import StopRequested
from rolltune.run import stop_file

STALLED = 1  # exit status
_REPEATED = 2.0  # seconds within which a signal counts once: torchrun and a terminal may both send it
_LOOKS = 20  # looks within stall_seconds
_UNANSWERED = 3  # looks without a sign of life from a rank


@dataclass(frozen=True)
class _Sign:
    """What a rank says of itself.

    Attributes:
        looks: looks of its watching thread, which go on while it waits for another rank.
        beats: things that have moved.
        step: steps taken.
        phase: what it does.
    """

    looks: int = 0
    beats: int = 0
    step: int = 0
    phase: str = "set-up"


@dataclass
class Watch:
    """A run's request to stop, and its signs of life.

    Attributes:
        world: all ranks.
        grace_seconds: time from a request to stop to the end of the process.
        output_dir: folder whose stop file (:mod:`rolltune.run.stop_file`) is a request too; None for no folder.
        step: steps taken.
    """

    world: World
    grace_seconds: float
    output_dir: Path | None = None
    step: int = 0
    _beats: int = 0
    _phase: str = "set-up"
    _request: str | None = None
    _asked_at: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)

    def beat(self, phase: str) -> None:
        """Note that something has moved.

        Raises:
            StopRequested: half of the grace time is over, and the step can still be left: it samples, so the weights
                are those of the last step.
        """
        self._beats += 1
        self._phase = phase
        if self._request and phase == "sampling" and time.monotonic() - self._asked_at > self.grace_seconds / 2:
            raise StopRequested(self._request)

    def stop_requested(self) -> str | None:
        """Return why the run should stop, None if nobody asked; all ranks call this, and get one answer."""
        request = self._request
        if request is None and self.world.is_main and self.output_dir and stop_file.is_requested(self.output_dir):
            request = f"stopped by {self.output_dir / stop_file.NAME}"
        return next(iter(self.world.gather([request] if request else [])), None)

    # --- signals

    def on_signal(self, number: int) -> None:
        """Note a request to stop; a second one ends the process at once."""
        name, now = signal.Signals(number).name, time.monotonic()
        if self._request is not None:
            if now - self._asked_at > _REPEATED:
                self._end(128 + number, f"{name}: stopped at once; the last checkpoint is whole")
            return
        self._asked_at, self._request = now, f"stopped by {name}"
        if self.world.is_main:
            _say(f"{name}: finishing the step and saving, for at most {self.grace_seconds:g} s; again to stop at once")
        threading.Thread(target=self._end_after_grace, daemon=True).start()

    def _end_after_grace(self) -> None:
        if not self._over.wait(self.grace_seconds):
            self._end(
                1,
                f"{self._request}: the step did not end within grace_seconds, {self.grace_seconds:g}; the last "
                "checkpoint is whole; continue with the same command and resume=true",
            )

    def _end(self, status: int, message: str) -> NoReturn:
        _say(f"rank {self.world.rank}: {message}" if self.world.size > 1 else message)
        os._exit(status)

    # --- stalls

    def look(self, stall_seconds: float) -> None:
        """Look again and again whether anything moves on any rank; end the process if nothing does for too long.

        Looks are counted instead of seconds, so that a process that was stopped as a whole is not blamed.
        """
        interval = min(max(stall_seconds / _LOOKS, 0.1), 30.0)
        signs: dict[int, _Sign] = {}
        exchange = threading.Thread(target=self._exchange, args=(signs, interval), daemon=True)
        if dist.is_initialized():
            exchange.start()
        before: list[int] = []
        last_look: dict[int, tuple[int, int]] = {}  # rank: its looks, and ours when they last changed
        idle = looks = 0
        while not self._over.wait(interval):
            looks += 1
            signs[self.world.rank] = _Sign(looks, self._beats, self.step, self._phase)
            for rank, sign in list(signs.items()):
                if sign.looks != last_look.get(rank, (-1, 0))[0]:
                    last_look[rank] = (sign.looks, looks)
            beats = [sign.beats for _, sign in sorted(signs.items())]
            idle = 0 if beats != before else idle + 1
            before = beats
            if idle * interval >= stall_seconds:
                silent = {r for r in range(self.world.size) if looks - last_look.get(r, (0, 0))[1] > _UNANSWERED}
                self._report(idle * interval, signs, silent)
        if exchange.is_alive():
            exchange.join(_REPEATED)

    def _exchange(self, signs: dict[int, _Sign], interval: float) -> None:
        """Tell the other ranks of this one, and learn of them, through the store by which they have met."""
        store = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
            "rolltune/watch", dist.distributed_c10d._get_default_store()
        )
        while not self._over.wait(interval):
            try:
                own = signs.get(self.world.rank, _Sign())
                store.set(str(self.world.rank), f"{own.looks} {own.beats} {own.step} {own.phase}")
                for rank in range(self.world.size):
                    if rank != self.world.rank and store.check([str(rank)]):
                        looks, beats, step, phase = store.get(str(rank)).decode().split(" ", 3)
                        signs[rank] = _Sign(int(looks), int(beats), int(step), phase)
            except RuntimeError:  # the store has gone with its process
                return

    def _report(self, seconds: float, signs: dict[int, _Sign], silent: set[int]) -> NoReturn:
        """Say where the ranks are, and show this one's stacks."""
        own = signs[self.world.rank]
        prefix = f"rank {self.world.rank}: " if self.world.size > 1 else ""
        _say(f"{prefix}nothing has moved for {seconds:.0f} s (stall_seconds), in {own.phase} after step {own.step}")
        if self.world.rank == min(set(range(self.world.size)) - silent):
            for rank in sorted(silent):
                _say(f"rank {rank} does not answer: it is stopped, or its process or machine is gone")
            for rank, sign in sorted(signs.items()):
                if rank not in silent | {self.world.rank}:
                    _say(f"rank {rank} is in {sign.phase} after step {sign.step}")
        faulthandler.dump_traceback(file=2, all_threads=True)
        time.sleep(_REPEATED)  # torchrun ends the others as soon as one has ended, and they show their stacks too
        self._end(STALLED, "stopped; the last checkpoint is whole: continue with the same command and resume=true")


@contextmanager
def watch(
    world: World, *, stall_seconds: float, grace_seconds: float, output_dir: str | Path | None = None
) -> Iterator[Watch]:
    """Watch a run, from set-up to its end.

    Args:
        world: all ranks enter this.
        stall_seconds: time without any movement after which the process ends; 0: never.
        grace_seconds: time after SIGTERM (Slurm, Kubernetes) or Ctrl-C after which the process ends, whatever it does.
        output_dir: the run's folder, where a stop file may appear.
    """
    watching = Watch(world, grace_seconds, None if output_dir is None else Path(output_dir))
    looking = threading.Thread(target=watching.look, args=(stall_seconds,), daemon=True)
    if stall_seconds:
        looking.start()
    try:
        with _signals(watching.on_signal):
            yield watching
    finally:
        watching._over.set()
        if looking.is_alive():
            looking.join()  # it uses the store of the process group, which is closed next


@contextmanager
def _signals(react: Callable[[int], None]) -> Iterator[None]:
    """Call ``react`` in a thread of its own for each SIGTERM and SIGINT, instead of what they do otherwise."""
    if threading.current_thread() is not threading.main_thread():  # only it may set handlers
        yield
        return
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    previous = {number: signal.signal(number, lambda *_: None) for number in (signal.SIGTERM, signal.SIGINT)}
    wakeup = signal.set_wakeup_fd(writer.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        while received := reader.recv(1):
            if received[0] in previous:
                react(received[0])

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in previous.items():
            signal.signal(number, handler)
        writer.close()
        listener.join()
        reader.close()


def _say(message: str) -> None:
    try:
        os.write(2, f"{message}\n".encode())
    except OSError:
        pass  # nobody listens
