"""Write traces: worked turns that show chosen reasoning behaviours, to prime a model with before RL.

After "Cognitive Behaviors that Enable Self-Improving Reasoners" (arXiv 2503.01307), sections 4 and 5:

  - kept: its five behaviour sets and its negative control; wrong traces stay in, with the verifier's verdict beside
    them, so that the paper's other controls come out of the same file (rolltune.data.traces);
  - changed: the writer is a component, a program that works the problem or a model behind an endpoint, whose prompts
    are our own; a reply without the layout is asked for again, and left out at last;
  - dropped: the batch API. Calls are made a few at a time, with caps on calls, tokens and dollars.

``<output_dir>/traces.jsonl`` grows by a line a trace; a run that was stopped goes on with the same command. The seed of
a trace depends on ``seed``, the problem's id and the sample's number alone.

    tune run write_traces --config countdown_traces_api.yaml
"""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from rolltune import config
from rolltune.components import ConfigError, component, instantiate
from rolltune.data.dataset import Dataset
from rolltune.endpoint import BudgetSpent, Endpoint, EndpointDown
from rolltune.metrics import write_json_atomic
from rolltune.progress import Progress
from rolltune.schema import WriteTracesConfig
from rolltune.seeding import derive_seed
from rolltune.traces import Trace, TraceWriter
from rolltune.traces.endpoint import Malformed
from rolltune.traces.record import TraceFile, save_config
from rolltune.types import Problem, Score

FAILED, INTERRUPTED = 1, 130
PREVIEWS = 3
PROBE = "<think>No idea.</think>\n<answer>0</answer>"  # what the verifier is tried on


@dataclass(kw_only=True)
class Job:
    """What the config names, built, and what has come of it in this process."""

    cfg: WriteTracesConfig
    problems: Dataset
    writer: TraceWriter
    score: Callable[[Problem, str], Score]
    written: int = 0
    left_out: list[str] = field(default_factory=list)  # why, one for each trace
    stopped_by: BudgetSpent | None = None

    @property
    def endpoint(self) -> Endpoint | None:
        return getattr(self.writer, "endpoint", None)

    @property
    def wanted(self) -> int:
        return len(self.problems) * self.cfg.traces_per_problem


def run(cfg: WriteTracesConfig) -> None:
    """Write the traces that ``<output_dir>/traces.jsonl`` does not have yet."""
    job = build(cfg)
    if cfg.dry_run:
        asyncio.run(dry_run(job))
        return
    with TraceFile(Path(cfg.output_dir) / "traces.jsonl") as file:
        save_config(cfg, file, job.writer.provenance)
        try:
            asyncio.run(write_all(job, file))
        except asyncio.CancelledError:
            give_up(job, file, "interrupted", INTERRUPTED)
        except EndpointDown as error:
            give_up(job, file, str(error), FAILED)
        if stop := job.stopped_by:
            if job.endpoint:  # what is spent now, with the calls that were in flight then
                stop = BudgetSpent(stop.key, stop.limit, job.endpoint.spent)
            give_up(job, file, str(stop), FAILED)
        file.sort(job.problems)
        report(job, file)


def build(cfg: WriteTracesConfig) -> Job:
    """Problems, writer and verifier; the verifier is tried on one problem before anything is paid for."""
    problems, writer, score = instantiate(cfg.data), instantiate(cfg.writer), component(cfg.correct)
    if not len(problems):
        raise ConfigError(["data: holds no problems"])
    score(problems[0], PROBE)
    return Job(cfg=cfg, problems=Dataset(problems), writer=writer, score=score)


async def dry_run(job: Job) -> None:
    """What an endpoint would be sent for the first problem; or the first traces, where a program writes them."""
    console = Console()
    if preview := getattr(job.writer, "preview", None):
        shown = {job.problems[0].id: preview(job.problems[0])}
    else:
        shown = {}
        for problem in job.problems[: 10 * PREVIEWS]:
            with suppress(ValueError):  # a problem that the program cannot work is left out of a run, too
                shown[problem.id] = await job.writer.write(problem, seed=seed_of(job, problem, 0))
            if len(shown) == PREVIEWS:
                break
    for name, text in shown.items():
        console.rule(name)
        console.print(text, markup=False, highlight=False)
    console.rule()
    console.print(f"dry run: everything resolves; {job.wanted} traces were to be written, nothing was")


async def write_all(job: Job, file: TraceFile) -> None:
    """Write what is missing, so many at once; SIGINT and SIGTERM cancel what is in flight."""
    todo = [  # one of each problem before a second of any: a run that is stopped has them all once
        (problem, sample)
        for sample in range(job.cfg.traces_per_problem)
        for problem in job.problems
        if (problem.id, sample) not in file.done
    ]
    already = job.wanted - len(todo)
    if already:
        print(f"{already} of {job.wanted} traces are there; {len(todo)} are missing", flush=True)
    this = asyncio.current_task()
    assert this is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, this.cancel)
    with Progress(job.wanted, already) as progress:
        show = shower(progress, job, already)
        rest = iter(todo)
        workers = [
            asyncio.create_task(work(job, file, rest, show)) for _ in range(min(job.cfg.max_concurrency, len(todo)))
        ]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            if job.endpoint:
                await job.endpoint.aclose()


async def work(job: Job, file: TraceFile, todo: Iterator[tuple[Problem, int]], show: Callable[[], None]) -> None:
    """Write one trace after the other, until none is left or a cap is reached."""
    for problem, sample in todo:
        await asyncio.sleep(0)  # a program that writes would let nobody else have a turn, signals included
        if job.stopped_by:
            return
        try:
            response = await job.writer.write(problem, seed=seed_of(job, problem, sample))
        except BudgetSpent as error:  # calls in flight are paid for: the other workers finish theirs
            job.stopped_by = error
            return
        except ValueError as error:
            if job.endpoint and not isinstance(error, Malformed):
                raise  # the endpoint refuses all calls alike; a program refuses a problem that it cannot work
            job.left_out.append(str(error))
        else:
            total = job.score(problem, response).total
            file.append(
                Trace(
                    problem=problem,
                    sample=sample,
                    response=response,
                    correct=None if total is None else total == 1.0,
                    condition=job.writer.condition,
                    provenance=job.writer.provenance,
                )
            )
            job.written += 1
        show()


def seed_of(job: Job, problem: Problem, sample: int) -> int:
    return derive_seed(job.cfg.seed, "trace", problem.id, sample)


def shower(progress: Progress, job: Job, already: int) -> Callable[[], None]:
    """What shows each trace on a terminal, and every twentieth part of them where lines are printed."""
    every = 1 if sys.stdout.isatty() else max(1, job.wanted // 20)

    def show() -> None:
        done = already + job.written + len(job.left_out)
        if done % every == 0 or done == job.wanted:
            spent = {"dollars": job.endpoint.spent.dollars} if job.endpoint else {}
            progress.step(done, {"written": job.written, "left out": len(job.left_out), **spent})

    return show


def give_up(job: Job, file: TraceFile, why: str, status: int) -> None:
    """Say how far it got, and end the process."""
    anew = " (caps count anew)" if job.endpoint else ""
    there = f"{len(file.done)} of {job.wanted} traces are in {file.path}; go on with the same command{anew}"
    print(f"write_traces: {why}\n  {there}", file=sys.stderr)
    sys.exit(status)


def report(job: Job, file: TraceFile) -> None:
    """The table, and ``summary.json`` with the same numbers."""
    traces = file.read()
    if not traces:
        raise ConfigError([f"writer: no trace was written, all {len(job.left_out)} left out: {job.left_out[-1]}"])
    judged = [trace.correct for trace in traces if trace.correct is not None]
    summary: dict[str, float | None] = {
        "traces": len(traces),
        "correct": sum(judged) / len(judged) if judged else None,
        "unscored": len(traces) - len(judged),
        "mean_words": sum(len(trace.response.split()) for trace in traces) / len(traces),
        "malformed" if job.endpoint else "not_worked": len(job.left_out),
    }
    if job.endpoint:
        summary |= asdict(job.endpoint.spent)
    write_json_atomic(file.path.with_name("summary.json"), summary)
    table = Table("summary", "", show_edge=False, pad_edge=False)
    for name, value in summary.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
        table.add_row(name.replace("_", " "), shown)
    console = Console()
    console.print(table)
    if job.left_out:
        console.print(f"left out, the last: {job.left_out[-1]}", markup=False, highlight=False)
    console.print(f"traces: {file.path}", markup=False, highlight=False)


if __name__ == "__main__":
    config.main(WriteTracesConfig, run)
