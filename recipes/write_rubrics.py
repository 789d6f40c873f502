"""Write rubrics: for each problem the criteria that a judge is to score its responses by.

After "Rubrics as Rewards" (arXiv 2507.17746):

  - kept: a large model writes 7 to 20 self-contained criteria for each prompt, in four categories, guided by a
    reference answer (``writer.with_reference: false`` goes without one, as in the paper's ablation);
  - changed: the prompt is our own, each criterion states its direction, and what the lint finds wrong is asked for
    again, twice at most; then the problem is left out, and counted;
  - dropped: numbers as weights. The paper's own experiments replace them by one weight a category.

``<output_dir>/rubrics.jsonl`` grows by a line a problem; a run that was stopped goes on with the same command. The seed
of a rubric depends on ``seed`` and the problem's id alone. ``rolltune.data.rubrics.rubric_jsonl`` reads the file.

    tune run write_rubrics --config rubrics_api.yaml
"""

from __future__ import annotations

import asyncio
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

from rolltune import config
from rolltune.config.components import instantiate
from rolltune.config.schema import WriteRubricsConfig
from rolltune.data.dataset import Dataset
from rolltune.endpoints.client import Endpoint
from rolltune.errors import ConfigError
from rolltune.rewards.rubric.schema import CATEGORIES
from rolltune.run import checks
from rolltune.seeding import derive_seed
from rolltune.types import Problem
from rolltune.writers.records import save_config
from rolltune.writers.rubric_records import RubricRecord, rubric_file
from rolltune.writers.rubrics import RubricWriter, lint_for
from rolltune.writers.writing import Work, show_dry_run, show_summary, write_missing


@dataclass(kw_only=True)
class Job:
    """What the config names, built."""

    cfg: WriteRubricsConfig
    problems: Dataset
    writer: RubricWriter

    @property
    def endpoint(self) -> Endpoint | None:
        return getattr(self.writer, "endpoint", None)


def run(cfg: WriteRubricsConfig) -> None:
    """Write the rubrics that ``<output_dir>/rubrics.jsonl`` does not have yet."""
    job = build(cfg)
    if cfg.dry_run:
        asyncio.run(dry_run(job))
        return

    async def write(problem: Problem, sample: int) -> RubricRecord:
        return await write_one(job, problem)

    with rubric_file(Path(cfg.output_dir) / "rubrics.jsonl") as file:
        save_config(cfg, file, job.writer.provenance)
        wanted = [(problem, 0) for problem in job.problems]
        work = Work(recipe="write_rubrics", file=file, wanted=wanted, write=write, endpoint=job.endpoint)
        write_missing(work, max_concurrency=cfg.max_concurrency)
        report(work)


def build(cfg: WriteRubricsConfig) -> Job:
    """Problems and writer; that each problem has what the writer needs is found out before anything is paid for."""
    problems, writer = instantiate(cfg.data), instantiate(cfg.writer)
    if not len(problems):
        raise ConfigError(["data: holds no problems"])
    for problem in problems:
        try:
            writer.check(problem)
        except ValueError as error:
            raise ConfigError([f"writer.{error}"]) from None
    return Job(cfg=cfg, problems=Dataset(problems), writer=writer)


async def dry_run(job: Job) -> None:
    """What an endpoint would be sent for the first problem; or the first rubric, where a program writes them."""
    first, shown = job.problems[0], {}
    if preview := getattr(job.writer, "preview", None):
        shown[first.id] = preview(first)
    else:
        with suppress(ValueError):  # a problem that the program cannot work is left out of a run, too
            record = await write_one(job, first)
            shown[first.id] = record.rubric.model_dump_json(indent=2, exclude_none=True)
    show_dry_run(shown, f"{len(job.problems)} rubrics")


async def write_one(job: Job, problem: Problem) -> RubricRecord:
    rubric = await job.writer.write(problem, seed=derive_seed(job.cfg.seed, "rubric", problem.id))
    return RubricRecord(problem=problem, rubric=rubric, provenance=job.writer.provenance)


def report(work: Work[RubricRecord]) -> None:
    """What the file holds, and what it has cost."""
    records = work.file.read()
    if not records:
        raise ConfigError([f"writer: no rubric was written, all {len(work.left_out)} left out: {work.left_out[-1]}"])
    criteria = [criterion for record in records for criterion in record.rubric.criteria]
    summary: dict[str, float | None] = {
        "rubrics": len(records),
        "left_out": len(work.left_out),
        "criteria_each": len(criteria) / len(records),
        **{
            f"{category}_each": sum(criterion.category == category for criterion in criteria) / len(records)
            for category in CATEGORIES
        },
        "lint_warnings": sum(len(lint_for(record.problem, record.rubric)) for record in records),
    }
    show_summary(work, summary | (asdict(work.endpoint.usage) if work.endpoint else {}))


if __name__ == "__main__":
    config.main(WriteRubricsConfig, run, check=checks.check_write_rubrics)
