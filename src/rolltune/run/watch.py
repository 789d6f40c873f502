"""End a run that is asked to stop, and one in which nothing moves.

Both need threads of their own. The main thread may be inside a collective, waiting for a rank that is gone, and there
Python handles no signal.
"""

from __future__ import annotations

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

from rolltune.distributed import World, connected
from rolltune.errors import RankLost, StopRequested
from rolltune.run import stop_file
from rolltune.run.stacks import print_stacks

STALLED = 1  # exit status
_REPEATED = 2.0  # seconds within which a signal counts once: torchrun and a terminal may both send it
_LOOKS = 20  # looks within stall_seconds, and looks without a sign of a rank after which the run ends
_LONGEST_LOOK = 15.0  # seconds, so that a lost rank ends the run within minutes
_UNANSWERED = 3  # looks after which a rank does not answer
_PULSE = 2.0  # most seconds between two signs of a rank
_ROLL_CALL = 4  # pulses that a rank has to give signs after a collective has failed
_REPORT = 20.0  # most seconds that a report takes: nobody may read stderr
_ENDED = "ended"  # the phase of a rank that has left the run
_AGAIN = "the last checkpoint is whole: continue with the same command and resume=true"


@dataclass(frozen=True)
class _Sign:
    """What a rank says of itself.

    Attributes:
        pulses: signs that it has given. They go on while its main thread waits for another rank.
        beats: things that have moved.
        step: steps taken.
        phase: what it does.
    """

    pulses: int = 0
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
        pulse: time between two signs of life.
        step: steps taken.
    """

    world: World
    grace_seconds: float
    output_dir: Path | None = None
    pulse: float = _PULSE
    step: int = 0
    _beats: int = 0
    _phase: str = "set-up"
    _request: str | None = None
    _asked_at: float = 0.0
    _over: threading.Event = field(default_factory=threading.Event)
    _signs: dict[int, _Sign] = field(default_factory=dict)  # by rank

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

    # --- other ranks

    def exchange(self) -> None:
        """Tell the other ranks of this one, and learn of them, through the store by which they have met."""
        store = dist.PrefixStore(  # pyright: ignore[reportPrivateImportUsage]
            "rolltune/watch", dist.distributed_c10d._get_default_store()
        )
        ranks = [str(rank) for rank in range(self.world.size)]
        is_over, pulses = False, 0
        while not is_over:
            is_over, pulses = self._over.wait(self.pulse), pulses + 1
            phase = _ENDED if is_over else self._phase
            try:
                store.set(str(self.world.rank), f"{pulses} {self._beats} {self.step} {phase}")
                if store.check(ranks):
                    self._signs = dict(enumerate(map(_read_sign, store.multi_get(ranks))))
            except RuntimeError:  # the store has gone with its process
                return

    def roll_call(self) -> str:
        """Wait for signs of all ranks, and say which gave none, or had ended before."""
        first = self._signs
        deadline = time.monotonic() + max(_ROLL_CALL * self.pulse, _PULSE)
        # Two new signs, as the last one of a rank that is gone may not have been read yet.
        while (silent := self._without_new_sign(first, signs=2)) and time.monotonic() < deadline:
            time.sleep(0.1)
        return "\n  ".join(self._describe_missing(silent) or ["all ranks answer"])

    def _without_new_sign(self, before: dict[int, _Sign], signs: int = 1) -> set[int]:
        """Return the ranks with fewer new signs than ``signs``; this rank too, if it cannot reach the others."""
        return {
            rank
            for rank in range(self.world.size)
            if self._pulses(rank, self._signs) < self._pulses(rank, before) + signs and not self._has_ended(rank)
        }

    @staticmethod
    def _pulses(rank: int, signs: dict[int, _Sign]) -> int:
        return signs[rank].pulses if rank in signs else 0

    def _has_ended(self, rank: int) -> bool:
        return rank in self._signs and self._signs[rank].phase == _ENDED

    def _describe_missing(self, silent: set[int]) -> list[str]:
        if self.world.rank in silent:
            place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
            others = ", ".join(str(rank) for rank in range(self.world.size) if rank != self.world.rank)
            return [
                f"no sign of rank {others}: the store at {place} does not answer; this machine is cut off from it, or "
                "its process or machine is gone"
            ]
        lost = [f"rank {r} does not answer: it is stopped, or its process or machine is gone" for r in sorted(silent)]
        ended = [rank for rank in range(self.world.size) if self._has_ended(rank)]
        return lost or [f"rank {rank} has ended; its own output says why" for rank in ended]

    # --- stalls

    def look(self, stall_seconds: float) -> None:
        """Look again and again whether all ranks are there and anything moves; end the process otherwise.

        Looks are counted instead of seconds, so that a process that was stopped as a whole is not blamed.
        """
        interval = _seconds_between_looks(stall_seconds)
        idle, quiet = 0, dict.fromkeys(range(self.world.size), 0)
        signs, beats = self._signs, self._all_beats()
        while not self._over.wait(interval):
            silent = self._without_new_sign(signs) if dist.is_initialized() else set()
            quiet = {rank: looks + 1 if rank in silent else 0 for rank, looks in quiet.items()}
            idle = 0 if self._all_beats() != beats else idle + 1
            signs, beats = self._signs, self._all_beats()
            missing = {rank for rank, looks in quiet.items() if looks > _UNANSWERED}
            if idle * interval >= stall_seconds:
                self._report(f"nothing has moved for {idle * interval:.0f} s (stall_seconds)", missing)
            elif max(quiet.values()) >= _LOOKS:
                self._report(f"a rank has given no sign for {_LOOKS * interval:.0f} s", missing)

    def _all_beats(self) -> list[int]:
        """Return the beats of this rank, and those that are known of all ranks."""
        return [self._beats, *(sign.beats for sign in self._signs.values())]

    def _report(self, what: str, missing: set[int]) -> NoReturn:
        """Say where the ranks are, show the stacks of this one, and end the process. Each rank does so for itself."""
        late = threading.Timer(_REPORT, os._exit, [STALLED])
        late.daemon = True
        late.start()
        rank = self.world.rank
        prefix = f"rank {rank}: " if self.world.size > 1 else ""
        _say(f"{prefix}{what}, in {self._phase} after step {self.step}")
        if rank in missing or rank == min(set(range(self.world.size)) - missing):
            for line in self._describe_missing(missing):
                _say(line)
            for other, sign in () if rank in missing else self._signs.items():
                if other not in missing | {rank} and sign.phase != _ENDED:
                    _say(f"rank {other} is in {sign.phase} after step {sign.step}")
        print_stacks()
        time.sleep(_REPEATED)  # torchrun ends the others as soon as one has ended, and they show their stacks too
        self._end(STALLED, f"stopped; {_AGAIN}")


def _read_sign(text: bytes) -> _Sign:
    pulses, beats, step, phase = text.decode().split(" ", 3)
    return _Sign(int(pulses), int(beats), int(step), phase)


def _seconds_between_looks(stall_seconds: float) -> float:
    return min(max(stall_seconds / _LOOKS, 0.1), _LONGEST_LOOK)


@contextmanager
def watch(
    world: World, *, stall_seconds: float, grace_seconds: float, output_dir: str | Path | None = None
) -> Iterator[Watch]:
    """Watch a run, from set-up to its end.

    Args:
        world: all ranks enter this.
        stall_seconds: time without any movement after which the process ends; 0: never. A rank that gives no sign of
            life ends the others after this time too, or after 5 minutes.
        grace_seconds: time after SIGTERM (Slurm, Kubernetes) or Ctrl-C after which the process ends, whatever it does.
        output_dir: the run's folder, where a stop file may appear.

    Raises:
        RankLost: a collective has failed; the message names the ranks that do not answer.
    """
    pulse = min(_seconds_between_looks(stall_seconds), _PULSE) if stall_seconds else _PULSE
    watching = Watch(world, grace_seconds, None if output_dir is None else Path(output_dir), pulse=pulse)
    threads = []
    if world.size > 1 and dist.is_initialized():
        threads.append(threading.Thread(target=watching.exchange, daemon=True))
    if stall_seconds:
        threads.append(threading.Thread(target=watching.look, args=(stall_seconds,), daemon=True))
    for thread in threads:
        thread.start()
    try:
        with _signals(watching.on_signal), connected():  # FSDP communicates by itself
            yield watching
    except RankLost as error:
        where = f"rank {world.rank}: step {watching.step + 1}"
        raise RankLost(f"{where}: {error}\n  {watching.roll_call()}\n  {_AGAIN}") from error
    finally:
        watching._over.set()
        for thread in threads:
            thread.join(_REPEATED)  # they use the store of the process group, which is closed next


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
