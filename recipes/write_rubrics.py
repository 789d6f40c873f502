"""Write rubrics: for each problem, the criteria by which a judge will score responses.

After "Rubrics as Rewards" (arXiv 2507.17746):

  - kept: a large model writes 7 to 20 self-contained criteria for each prompt, in four categories, guided by a
    reference answer (``writer.with_reference: false`` goes without it, as in the paper's ablation);
  - changed: the prompt is our own, each criterion states its direction, and a rubric with lint errors is asked for
    again, at most twice; then the problem is left out and counted;
  - dropped: numeric weights. The paper's own experiments replace them with one weight per category.

``<output_dir>/rubrics.jsonl`` grows by one line per problem; a stopped run continues with the same command. The seed of
a rubric depends only on ``seed`` and the problem's id. ``rolltune.data.rubrics.rubric_jsonl`` reads the file.

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
    """The config's components."""

    cfg: WriteRubricsConfig
    problems: Dataset
    writer: RubricWriter

    @property
    def endpoint(self) -> Endpoint | None:
        return getattr(self.writer, "endpoint", None)


def run(cfg: WriteRubricsConfig) -> None:
    """Write the rubrics that ``<output_dir>/rubrics.jsonl`` lacks."""
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
    """Build problems and writer, and check each problem before anything is paid for."""
    problems, writer = instantiate(cfg.data), instantiate(cfg.writer)
    if not len(problems):
        raise ConfigError(["data: contains no problems"])
    for problem in problems:
        try:
            writer.check(problem)
        except ValueError as error:
            raise ConfigError([f"writer.{error}"]) from None
    return Job(cfg=cfg, problems=Dataset(problems), writer=writer)


async def dry_run(job: Job) -> None:
    """Show the request for the first problem; or the first rubric, if a program writes them."""
    first, shown = job.problems[0], {}
    if preview := getattr(job.writer, "preview", None):
        shown[first.id] = preview(first)
    else:
        with suppress(ValueError):  # a run also leaves out a problem that the program cannot solve
            record = await write_one(job, first)
            shown[first.id] = record.rubric.model_dump_json(indent=2, exclude_none=True)
    show_dry_run(shown, f"{len(job.problems)} rubrics")


async def write_one(job: Job, problem: Problem) -> RubricRecord:
    rubric = await job.writer.write(problem, seed=derive_seed(job.cfg.seed, "rubric", problem.id))
    return RubricRecord(problem=problem, rubric=rubric, provenance=job.writer.provenance)


def report(work: Work[RubricRecord]) -> None:
    """Print what the file contains and what it cost."""
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
