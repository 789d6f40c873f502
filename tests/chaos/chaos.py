"""Hit real runs with random faults, resume them, and compare their end with that of an unbroken run, bit for bit.

A trial is one run in one folder. It is started, hit by a fault at a random moment between the start of the process and
its end, and resumed with ``resume=true``, until it has had its faults or has finished. Then its metrics (without clocks
and judging costs), the SHA-256 of its final weights and its best step must be those of an unbroken run.

    .venv/bin/python tests/chaos/chaos.py --faults 100              # the long form
    .venv/bin/python tests/chaos/chaos.py --seed 0 --trials 3 17    # two of its trials again

The seed and a trial's number decide its faults and their moments, as shares of the time that the run still takes. The
results go to ``<out>/chaos.json`` and ``<out>/chaos.md``, beside the output of the starts that failed. The exit status
is 1 if anything hung, differed or ended without an explanation.

A new kind of fault is a function in ``FAULTS``. It takes the trial to the fault's moment (``trial.hit``), does the
damage, and returns the result; it raises Failure where the run must not do what it did.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "recipes"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import yaml
from runs import JOBS, Hang, Job, Judge, Result, Run, prepare_inputs, result_of, send
from tiny_run import read_rows

STALL_SECONDS = 20  # after which the ranks give up on one that is frozen
DISK_MIB = 64  # size of the disk of a trial

# Results of a fault. A trial's last start is SAME if nothing failed.
BEFORE, STOPPED, KILLED = "finished before the fault", "stopped with checkpoint", "killed"
WENT_ON, REFUSED, SAME = "went on", "refused and named", "same"
HANG, DIFFERS, UNEXPLAINED = "hang", "differs", "unexplained"
RESULTS = (BEFORE, STOPPED, KILLED, WENT_ON, REFUSED, SAME, HANG, DIFFERS, UNEXPLAINED)
FAILURES = (HANG, DIFFERS, UNEXPLAINED)
TO_THE_END = "(resumed to the end)"


class Failure(Exception):
    """A result of ``FAILURES``, and what was seen."""


class FinishedBefore(Exception):
    """The run has ended with status 0 before the fault."""


@dataclass(frozen=True, kw_only=True)
class Whole:
    """An unbroken run: its result, its seconds from the start of the process to the first metrics, and to its end."""

    result: Result
    setup: float
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A fault, and its result.

    Attributes:
        moment: share of the time that the run still took when the fault hit it.
        detail: why the result is a failure; "" if it is none.
        log: name of the output of the last start.
    """

    trial: int
    job: str
    kind: str
    moment: float
    result: str
    detail: str
    log: str


@dataclass(kw_only=True)
class Trial:
    """A run that is hit and resumed."""

    number: int
    name: str
    folder: Path
    rng: random.Random
    judge: Judge
    whole: Whole | None = None  # None: this is the unbroken run
    moment: float = 0.0  # of the next fault
    starts: list[Run] = field(default_factory=list)

    @property
    def job(self) -> Job:
        return JOBS[self.name]

    @property
    def output_dir(self) -> Path:
        return self.folder / "disk/run"

    @property
    def checkpoints(self) -> list[Path]:
        """The checkpoints that can be resumed from, the newest last."""
        return sorted(path.parent for path in self.output_dir.glob("checkpoints/step_*/trainer.pt"))

    def resume(self, *overrides: str, **options) -> Run:
        """Start the run, or continue it."""
        launcher = ["--nproc_per_node", str(self.job.processes)] if self.job.processes > 1 else []
        command = [sys.executable, "-m", "rolltune.cli", "run", *launcher, self.job.recipe]
        command += ["--config", str(self.folder / "config.yaml"), *overrides]
        starts_over = self.starts and "start over without resume=true" in self.starts[-1].text  # as it was told to
        command += [] if starts_over else ["resume=true"]
        limit = 90 + 5 * self.whole.seconds if self.whole else 300
        log = self.folder / f"start_{len(self.starts)}.txt"
        self.starts.append(Run([*command, f"stall_seconds={STALL_SECONDS}"], log, limit=limit, **options))
        return self.starts[-1]

    def hit(self, *overrides: str, **options) -> Run:
        """Resume the run, and return it at the fault's moment.

        Raises:
            FinishedBefore: it has ended with status 0 by then.
            Failure: it has ended with another status by then.
        """
        assert self.whole is not None
        done = int(self.checkpoints[-1].name.removeprefix("step_")) if self.checkpoints else 0
        share = 1 - done / self.whole.result.metrics[-1]["step"]
        lifetime = self.whole.setup + (self.whole.seconds - self.whole.setup) * share
        run = self.resume(*overrides, **options)
        try:
            run.process.wait(timeout=self.moment * lifetime)
        except subprocess.TimeoutExpired:
            return run
        if (code := run.wait()) != 0:
            raise Failure(UNEXPLAINED, f"exit status {code} before the fault: {run.last_line}")
        raise FinishedBefore

    def victim(self, run: Run) -> int:
        """Choose the run's process; under torchrun that, or one of the ranks."""
        return self.rng.choice([run.process.pid, *run.ranks()])


# --- what a run may do ------------------------------------------------------------------------------------------------


def ended(run: Run, *codes: int, traceback: bool = False) -> int:
    """Wait for the end of a run, and return its exit status, which must be one of ``codes``, without a traceback."""
    code = run.wait()
    if code not in codes or (not traceback and "Traceback (most recent call last)" in run.text):
        raise Failure(UNEXPLAINED, f"exit status {code}: {run.last_line}")
    return code


def goes_on(run: Run) -> str:
    ended(run, 0)
    return WENT_ON


def goes_on_or_stops(run: Run) -> str:
    """Let the run finish, stop with a message, or refuse to start."""
    return (WENT_ON, STOPPED, REFUSED)[ended(run, 0, 1, 2)]


# --- faults -----------------------------------------------------------------------------------------------------------


def sigkill(trial: Trial) -> str:
    run = trial.hit()
    send(trial.victim(run), signal.SIGKILL)
    ended(run, -9, 128 + 9, traceback=True)  # a rank may see that its peer is gone
    return KILLED


def request_to_stop(trial: Trial, number: signal.Signals) -> str:
    """SIGTERM or SIGINT: between its first and last steps the run saves and says so, else it just ends."""
    run = trial.hit()
    send(trial.victim(run), number)
    code = ended(run, 0, 1, -number, 128 + number, traceback=True)  # Python shows one while it imports
    kept = ("a checkpoint of step", "nothing was trained yet", "the last checkpoint is")
    is_saved = f"stopped by {number.name}" in run.text and any(text in run.text for text in kept)
    if (code == 1 and not is_saved) or (code == 0 and is_saved):
        raise Failure(UNEXPLAINED, f"exit status {code}: {run.last_line}")
    return STOPPED if is_saved else KILLED if code else WENT_ON


def paused(trial: Trial) -> str:
    """SIGSTOP, and SIGCONT after a while."""
    run = trial.hit()
    victim = trial.victim(run)
    send(victim, signal.SIGSTOP)
    time.sleep(trial.rng.uniform(0.5, 3.0))
    send(victim, signal.SIGCONT)
    return goes_on(run)


def frozen(trial: Trial) -> str:
    """SIGSTOP for good, to the last rank: the other ranks end the run. A single process just stays."""
    run = trial.hit()
    ranks = run.ranks()
    send((ranks or [run.process.pid])[-1], signal.SIGSTOP)
    if len(ranks) > 1:
        ended(run, 1, 128 + 9)
        return STOPPED
    time.sleep(1.0)
    run.kill()
    return KILLED


def damaged_checkpoint(trial: Trial) -> str:
    """A kill, and a file of the newest checkpoint is cut or lost. The checkpoint is deleted as the message says."""
    trial.hit().kill()
    if not trial.checkpoints:
        return KILLED
    newest = trial.checkpoints[-1]
    file = trial.rng.choice(sorted(path for path in newest.rglob("*") if path.is_file()))
    length = trial.rng.randrange(file.stat().st_size)
    if is_cut := trial.rng.random() < 0.7:
        os.truncate(file, length)
    else:
        file.unlink()
    run = trial.resume()
    code = run.wait()
    if code:
        shutil.rmtree(newest)
    if code != 2 or str(newest) not in run.text or "Traceback" in run.text:
        what = f"{file.relative_to(newest)} {f'cut to {length} bytes' if is_cut else 'deleted'}"
        raise Failure(UNEXPLAINED, f"{what}: exit status {code}: {run.last_line}")
    return REFUSED


def disk_full(trial: Trial) -> str:
    """Something else fills the disk, and is deleted when the run has ended."""
    run = trial.hit()
    filler = trial.folder / "disk/filler"
    try:
        with filler.open("wb", buffering=0) as file:
            while file.write(bytes(4096)):
                pass
    except OSError:
        pass
    try:
        return goes_on_or_stops(run)
    finally:
        filler.unlink()


def wandb_killed(trial: Trial) -> str:
    """Kill wandb's service process, as soon as there is one."""
    run = trial.hit("logging.wandb=true")
    while not (services := run.living("wandb-core")) and run.process.poll() is None:
        time.sleep(0.02)
    for pid in services:
        send(pid, signal.SIGKILL)
    # wandb shows the traceback of its own thread
    return WENT_ON if ended(run, 0, 2, traceback=True) == 0 else REFUSED  # wandb may still be starting


def stdout_closed(trial: Trial) -> str:
    """The reader of a pipe goes away, as with ``tune run ... | head``."""
    run = trial.hit(stdout=subprocess.PIPE)
    assert run.process.stdout is not None
    run.process.stdout.close()
    return goes_on(run)


def judge_killed(trial: Trial) -> str:
    run = trial.hit()
    trial.judge.kill()
    time.sleep(trial.rng.uniform(0.2, 3.0))
    trial.judge.start()
    return goes_on_or_stops(run)


def judge_ill(trial: Trial, mode: str) -> str:
    run = trial.hit()
    trial.judge.set_mode(mode)
    time.sleep(trial.rng.uniform(0.5, 4.0))
    trial.judge.set_mode("grade")
    return goes_on_or_stops(run)


FAULTS: dict[str, Callable[[Trial], str]] = {
    "SIGKILL": sigkill,
    "SIGTERM": partial(request_to_stop, number=signal.SIGTERM),
    "SIGINT": partial(request_to_stop, number=signal.SIGINT),
    "paused": paused,
    "frozen": frozen,
    "damaged checkpoint": damaged_checkpoint,
    "disk full": disk_full,
    "wandb killed": wandb_killed,
    "stdout closed": stdout_closed,
    "judge killed": judge_killed,
    "judge slow": partial(judge_ill, mode="slow"),
    "judge answers 500": partial(judge_ill, mode="500"),
}


# --- trials -----------------------------------------------------------------------------------------------------------


@contextmanager
def opened(number: int, name: str, folder: Path, model: Path, *, seed: int, whole: Whole | None) -> Iterator[Trial]:
    """Prepare a trial, and end in whatever way everything that it has started."""
    disk = folder / "disk"
    disk.mkdir(parents=True)
    if has_mounts():
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={DISK_MIB}m", "none", disk], check=True)
    judge = Judge(folder)
    rng = random.Random(f"{seed}/{number}")
    trial = Trial(number=number, name=name, folder=folder, rng=rng, judge=judge, whole=whole)
    (folder / "config.yaml").write_text(yaml.safe_dump(trial.job.config(model, trial.output_dir, judge)))
    try:
        if trial.job.has_judge:
            judge.start()
        yield trial
    finally:
        for run in trial.starts:
            run.kill()
        judge.kill()
        if has_mounts():
            subprocess.run(["umount", disk], check=True)


def run_whole(name: str, folder: Path, model: Path) -> Whole:
    """Do a job without faults, and time it."""
    with opened(0, name, folder, model, seed=0, whole=None) as trial:
        run = trial.resume()
        ended(run, 0)
        seconds = time.time() - run.began
        setup = read_rows(trial.output_dir, timeless=False)[0]["time"] - run.began
        print(f"{name}: {seconds:.1f} s, of which set-up took {setup:.1f} s", flush=True)
        return Whole(result=result_of(trial.output_dir), setup=setup, seconds=seconds)


def run_trial(trial: Trial, kinds: list[str], hits: int) -> Iterator[Outcome]:
    """Hit a run until it has finished or has had ``hits`` faults; then let it finish, and compare."""
    for kind in trial.rng.sample(kinds, k=min(hits, len(kinds))):
        trial.moment = trial.rng.random()
        yield (outcome := observe(trial, kind, FAULTS[kind]))
        if outcome.result in (BEFORE, WENT_ON):
            break
    trial.moment = 1.0
    yield observe(trial, TO_THE_END, finish)


def observe(trial: Trial, kind: str, act: Callable[[Trial], str]) -> Outcome:
    detail = ""
    try:
        result = act(trial)
    except FinishedBefore:
        result = BEFORE
    except Failure as failure:
        result, detail = failure.args
    except Hang as hang:
        result, detail = HANG, str(hang)
    print(f"trial {trial.number} ({trial.name}): {kind} at {trial.moment:.2f}: {result} {detail}", flush=True)
    return Outcome(
        trial=trial.number,
        job=trial.name,
        kind=kind,
        moment=trial.moment,
        result=result,
        detail=detail,
        log=trial.starts[-1].log.name,
    )


def finish(trial: Trial) -> str:
    """Let the run finish, and compare it with the unbroken one."""
    ended(trial.resume(), 0)  # also if it had finished: its last checkpoint may have been damaged since
    return compare(trial)


def compare(trial: Trial) -> str:
    assert trial.whole is not None
    found, right = result_of(trial.output_dir), trial.whole.result
    if differ := [name for name, value in asdict(found).items() if value != asdict(right)[name]]:
        raise Failure(DIFFERS, f"{' and '.join(differ)} are not those of the unbroken run")
    return SAME


def kinds_for(job: Job, wanted: list[str]) -> list[str]:
    """Return the kinds of fault that a job can be hit with here."""
    impossible = {kind for kind in FAULTS if kind.startswith("judge") and not job.has_judge}
    return [kind for kind in wanted if kind not in impossible and (kind != "disk full" or has_mounts())]


# --- the program ------------------------------------------------------------------------------------------------------


def has_mounts() -> bool:
    return bool(os.environ["CHAOS_MOUNTS"])


def seek_mounts() -> None:
    """Start this program again in a namespace where it may mount small disks, if the system allows that."""
    if "CHAOS_MOUNTS" in os.environ:
        return
    tried = subprocess.run(["unshare", "-Urm", "mount", "-t", "tmpfs", "none", "/mnt"], capture_output=True)
    os.environ["CHAOS_MOUNTS"] = "" if tried.returncode else "yes"
    if has_mounts():
        os.execvp("unshare", ["unshare", "-Urm", sys.executable, *sys.argv])
    print("no small disk can be mounted here, so 'disk full' is left out", flush=True)


def table(outcomes: list[Outcome]) -> str:
    """Count the results by kind of fault, as a table in Markdown."""
    seen = [result for result in RESULTS if any(outcome.result == result for outcome in outcomes)]
    lines = [["fault", *seen], ["---"] * (1 + len(seen))]
    for kind in (*FAULTS, TO_THE_END):
        counts = Counter(outcome.result for outcome in outcomes if outcome.kind == kind)
        if counts:
            lines.append([kind, *(str(counts[result] or "") for result in seen)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Hit real runs with random faults, and compare their ends.")
    parser.add_argument("--faults", type=int, default=100, help="start no further trial after so many faults")
    parser.add_argument("--hits", type=int, default=4, help="faults of a trial, at most")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trials", type=int, nargs="+", help="numbers of the trials; default: as --faults needs")
    parser.add_argument("--jobs", nargs="+", choices=JOBS, default=list(JOBS), help="runs that are hit, in turn")
    parser.add_argument("--kinds", nargs="+", choices=FAULTS, default=list(FAULTS), help="kinds of fault")
    parser.add_argument("--workers", type=int, default=1, help="trials at a time")
    parser.add_argument("--out", type=Path, default=Path("outputs/chaos"))
    return parser.parse_args()


def main() -> int:
    args = parse_arguments()
    seek_mounts()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell may ignore it, and runs would inherit that
    args.out.mkdir(parents=True, exist_ok=True)
    print(f"seed {args.seed}", flush=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(args.workers) as pool:
        folder = Path(name)
        model = prepare_inputs(folder)
        wholes = dict(zip(args.jobs, pool.map(lambda job: run_whole(job, folder / job, model), args.jobs), strict=True))

        def go(number: int) -> None:
            if args.trials is None and sum(outcome.kind != TO_THE_END for outcome in outcomes) >= args.faults:
                return
            job, place = args.jobs[number % len(args.jobs)], folder / f"trial_{number}"
            with opened(number, job, place, model, seed=args.seed, whole=wholes[job]) as trial:
                for outcome in run_trial(trial, kinds_for(JOBS[job], args.kinds), args.hits):
                    outcomes.append(outcome)
                    if outcome.result in FAILURES:
                        shutil.copy(place / outcome.log, args.out / f"trial_{number}_{outcome.log}")

        list(pool.map(go, args.trials or range(args.faults)))
    outcomes.sort(key=lambda outcome: outcome.trial)
    (args.out / "chaos.json").write_text(json.dumps([asdict(outcome) for outcome in outcomes], indent=1) + "\n")
    (args.out / "chaos.md").write_text(table(outcomes))
    print(table(outcomes), end="")
    return 1 if any(outcome.result in FAILURES for outcome in outcomes) else 0


if __name__ == "__main__":
    sys.exit(main())
