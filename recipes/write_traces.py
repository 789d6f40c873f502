"""Write traces: worked responses that show chosen reasoning behaviours, for priming a model before RL.

After "Cognitive Behaviors that Enable Self-Improving Reasoners" (arXiv 2503.01307), sections 4 and 5:

  - kept: its five behaviour sets and its negative control. Wrong traces stay in, with the verifier's verdict, so that
    the paper's other controls can be selected from the same file (rolltune.data.traces);
  - changed: the writer is a component, either a program that solves the problem or a model behind an endpoint with our
    own prompts. A reply without the layout is asked for again, and finally left out;
  - dropped: the batch API. Calls run a few at a time, with caps on calls, tokens and dollars.

``<output_dir>/traces.jsonl`` grows by one line per trace; a stopped run continues with the same command. The seed of a
trace depends only on ``seed``, the problem's id and the sample's number.

    tune run write_traces --config countdown_traces_api.yaml
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rolltune import config
from rolltune.config.components import component, instantiate
from rolltune.config.schema import WriteTracesConfig
from rolltune.data.dataset import Dataset
from rolltune.endpoints.client import Endpoint
from rolltune.errors import ConfigError
from rolltune.run import checks
from rolltune.seeding import derive_seed
from rolltune.traces import Trace, TraceWriter
from rolltune.traces.record import trace_file
from rolltune.types import Problem, Score
from rolltune.writers.records import save_config
from rolltune.writers.writing import Work, show_dry_run, show_summary, write_missing

PREVIEWS = 3
PROBE = "<think>No idea.</think>\n<answer>0</answer>"  # response that the verifier is tested on


@dataclass(kw_only=True)
class Job:
    """The config's components."""

    cfg: WriteTracesConfig
    problems: Dataset
    writer: TraceWriter
    score: Callable[[Problem, str], Score]

    @property
    def endpoint(self) -> Endpoint | None:
        return getattr(self.writer, "endpoint", None)

    @property
    def wanted(self) -> list[tuple[Problem, int]]:
        """First samples of all problems before any second sample, so that a stopped run has covered most problems."""
        return [(problem, sample) for sample in range(self.cfg.traces_per_problem) for problem in self.problems]


def run(cfg: WriteTracesConfig) -> None:
    """Write the traces that ``<output_dir>/traces.jsonl`` lacks."""
    job = build(cfg)
    if cfg.dry_run:
        asyncio.run(dry_run(job))
        return

    async def write(problem: Problem, sample: int) -> Trace:
        return await write_one(job, problem, sample)

    with trace_file(Path(cfg.output_dir) / "traces.jsonl") as file:
        save_config(cfg, file, job.writer.provenance)
        work = Work(recipe="write_traces", file=file, wanted=job.wanted, write=write, endpoint=job.endpoint)
        write_missing(work, max_concurrency=cfg.max_concurrency)
        report(work)


def build(cfg: WriteTracesConfig) -> Job:
    """Build problems, writer and verifier, and test the verifier before anything is paid for."""
    problems, writer, score = instantiate(cfg.data), instantiate(cfg.writer), component(cfg.correct)
    if not len(problems):
        raise ConfigError(["data: contains no problems"])
    score(problems[0], PROBE)
    return Job(cfg=cfg, problems=Dataset(problems), writer=writer, score=score)


async def dry_run(job: Job) -> None:
    """Show the request for the first problem; or the first traces, if a program writes them."""
    if preview := getattr(job.writer, "preview", None):
        shown = {job.problems[0].id: preview(job.problems[0])}
    else:
        shown = {}
        for problem in job.problems[: 10 * PREVIEWS]:
            with suppress(ValueError):  # a run also leaves out a problem that the program cannot solve
                shown[problem.id] = await job.writer.write(problem, seed=seed_of(job, problem, 0))
            if len(shown) == PREVIEWS:
                break
    show_dry_run(shown, f"{len(job.wanted)} traces")


async def write_one(job: Job, problem: Problem, sample: int) -> Trace:
    """Write one trace, with the verifier's verdict."""
    response = await job.writer.write(problem, seed=seed_of(job, problem, sample))
    total = job.score(problem, response).total
    return Trace(
        problem=problem,
        sample=sample,
        response=response,
        correct=None if total is None else total == 1.0,
        condition=job.writer.condition,
        provenance=job.writer.provenance,
    )


def seed_of(job: Job, problem: Problem, sample: int) -> int:
    return derive_seed(job.cfg.seed, "trace", problem.id, sample)


def report(work: Work[Trace]) -> None:
    """Print what the file contains and what it cost."""
    traces = work.file.read()
    if not traces:
        raise ConfigError([f"writer: no trace was written, all {len(work.left_out)} left out: {work.left_out[-1]}"])
    verified = [trace.correct for trace in traces if trace.correct is not None]
    summary: dict[str, float | None] = {
        "traces": len(traces),
        "correct": sum(verified) / len(verified) if verified else None,
        "unscored": len(traces) - len(verified),
        "mean_words": sum(len(trace.response.split()) for trace in traces) / len(traces),
        "malformed" if work.endpoint else "not_worked": len(work.left_out),
    }
    show_summary(work, summary | (asdict(work.endpoint.usage) if work.endpoint else {}))


if __name__ == "__main__":
    config.main(WriteTracesConfig, run, check=checks.check_write_traces)
