"""Audit a judge before training on it: compare its verdicts with labelled ones.

  - The judge gets every criterion of every labelled response in the way the rubric reward asks it: all of a response in
    one call or each by itself (``one_call``), with the same prompt and the same parsing of replies.
  - The audit reports accuracy, Cohen's kappa and both error rates with 95 % intervals. It also reports what a policy
    would exploit (whether padding pays, whether instructions to the judge do, whether a criterion's position in the
    list matters), how noisy the verdicts are (``repeats``), and the cost.
  - Missing verdicts are counted by failure word, and are in no rate.

Writes ``<output_dir>/audit.json``, and ``verdicts.jsonl`` with the judge's reasons: read those of the wrong verdicts.
With ``judge.cache`` a stopped run continues with the same command. The exit status is 1 below ``min_accuracy`` or
``min_kappa``, if a cap stopped the judge, and if there was no verdict.

    tune run audit_judge --config audit_judge_api.yaml
"""

from __future__ import annotations

import asyncio
import json
import math
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rolltune import config
from rolltune.config.components import instantiate
from rolltune.config.schema import AuditJudgeConfig
from rolltune.errors import ConfigError
from rolltune.files import make_folder, write_json_atomic, write_text_atomic
from rolltune.metrics.progress import Progress
from rolltune.rewards.checks.judge_audit import JudgeAudit, Measured, measure
from rolltune.rewards.checks.labels import LabelledResponse, LabelledVerdict
from rolltune.rewards.judges.judge import Judge, Question
from rolltune.rewards.rubric.questions import explicit_questions, read_grades
from rolltune.rewards.rubric.templates import JudgePrompt, load_prompt
from rolltune.run import checks
from rolltune.terminal import printable
from rolltune.writers.writing import shown_messages


@dataclass(frozen=True, kw_only=True)
class Pass:
    """One pass over all responses."""

    judge: Judge
    repeat: int
    is_reversed: bool


@dataclass(frozen=True, kw_only=True)
class Job:
    """The config's components."""

    cfg: AuditJudgeConfig
    responses: Sequence[LabelledResponse]
    judges: Sequence[Judge]  # one per repeat, with its own seed
    template: JudgePrompt | None

    @property
    def passes(self) -> list[Pass]:
        listed = [Pass(judge=judge, repeat=repeat, is_reversed=False) for repeat, judge in enumerate(self.judges)]
        return listed + [Pass(judge=self.judges[0], repeat=0, is_reversed=True)] * self.cfg.reversed

    def questions(self, response: LabelledResponse, *, is_reversed: bool) -> list[Question]:
        return explicit_questions(
            response.problem,
            response.text,
            [label.criterion for label in response.labels][:: -1 if is_reversed else 1],
            one_call=self.cfg.one_call,
            template=self.template,
        )


def run(cfg: AuditJudgeConfig) -> None:
    """Ask the judge, print the tables, and write ``audit.json`` and ``verdicts.jsonl``."""
    job = build(cfg)
    if cfg.dry_run:
        dry_run(job)
        return
    given = asyncio.run(ask_all(job))
    audit = measure(given, resamples=cfg.resamples, seed=cfg.seed)
    cost = costs(job)
    folder = Path(cfg.output_dir)
    make_folder(folder)
    config.save(cfg, folder)
    write_text_atomic(folder / "verdicts.jsonl", "".join(map(line, given)))
    write_json_atomic(folder / "audit.json", {"judge": job.judges[0].name, **asdict(audit), "cost": cost})
    report(job, audit, cost)
    if wrong := list(shortcomings(job, audit)):
        print("\n".join(f"audit_judge: {what}" for what in wrong), file=sys.stderr)
        sys.exit(1)


def build(cfg: AuditJudgeConfig) -> Job:
    """Build the responses, the judge of each repeat, and the template."""
    responses = instantiate(cfg.data)
    if not responses or not all(isinstance(response, LabelledResponse) for response in responses):
        raise ConfigError(
            [
                f"data._component_: {cfg.data['_component_']} does not return a list of "
                "rolltune.rewards.checks.labels.LabelledResponse; choose another data set"
            ]
        )
    seeds = [{"seed": cfg.judge.get("seed", 0) + repeat} if repeat else {} for repeat in range(cfg.repeats)]
    kind = "explicit" if cfg.one_call else "explicit_one"
    return Job(
        cfg=cfg,
        responses=responses,
        judges=[instantiate(cfg.judge | seed) for seed in seeds],
        template=None if cfg.template is None else load_prompt(cfg.template, kind),
    )


def dry_run(job: Job) -> None:
    """Print the first question and the number of questions."""
    console = make_console()
    console.rule(Text(printable(job.responses[0].labels[0].id, keep="")))
    first = job.questions(job.responses[0], is_reversed=False)[0]
    console.print(printable(shown_messages(first.messages)), markup=False, highlight=False)
    console.rule()
    questions = [q for p in job.passes for r in job.responses for q in job.questions(r, is_reversed=p.is_reversed)]
    tokens = sum(len(message["content"]) for question in questions for message in question.messages) // 4
    labels = [label for response in job.responses for label in response.labels]
    console.print(
        f"dry run: the config is complete and valid; a run would ask {job.judges[0].name} {len(questions)} questions "
        f"about {len(labels)} labelled verdicts ({sum(label.satisfied for label in labels)} satisfied) on "
        f"{len(job.responses)} responses, about {tokens:,} tokens; nothing was asked",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


# --- asking -----------------------------------------------------------------------------------------------------------


async def ask_all(job: Job) -> list[LabelledVerdict]:
    """Run one pass after another. The judge limits its own concurrency."""
    given: list[LabelledVerdict] = []
    with Progress(len(job.passes) * len(job.responses)) as progress:
        show = progress_reporter(progress, len(job.passes) * len(job.responses))
        for one in job.passes:
            tasks = [asyncio.create_task(ask(job, one, i, show)) for i in range(len(job.responses))]
            try:
                for verdicts in await asyncio.gather(*tasks):
                    given += verdicts
            finally:
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                await one.judge.aclose()
    return given


async def ask(job: Job, one: Pass, number: int, show: Callable[[list[LabelledVerdict]], None]) -> list[LabelledVerdict]:
    """Return the verdicts on one response, in the order of its labels."""
    response = job.responses[number]
    count = len(response.labels)
    asked = job.questions(response, is_reversed=one.is_reversed)
    answers = await asyncio.gather(*(one.judge.ask(question) for question in asked))
    grades = read_grades(answers, count, one_call=job.cfg.one_call)
    places = range(1, count + 1) if job.cfg.one_call else [1] * count
    listed = response.labels[:: -1 if one.is_reversed else 1]
    given = [
        LabelledVerdict(
            label=label,
            response=number,
            words=response.words,
            place=place,
            places=count if job.cfg.one_call else 1,
            repeat=one.repeat,
            is_reversed=one.is_reversed,
            passed=None if grade is None else grade == 1.0,
            reason=reason,
            judge=answers[0].judge,
        )
        for label, place, (grade, reason) in zip(listed, places, grades, strict=True)
    ][:: -1 if one.is_reversed else 1]
    show(given)
    return given


def progress_reporter(progress: Progress, total: int) -> Callable[[list[LabelledVerdict]], None]:
    """Return a function that reports progress: each response on a terminal, else every 5 %."""
    counts: Counter[str] = Counter()
    every = 1 if sys.stdout.isatty() else max(1, total // 20)

    def show(given: list[LabelledVerdict]) -> None:
        counts["responses"] += 1
        counts["right"] += sum(g.is_right for g in given if g.passed is not None)
        counts["scored"] += sum(g.passed is not None for g in given)
        counts["unscored"] += sum(g.passed is None for g in given)
        if counts["responses"] % every == 0 or counts["responses"] == total:
            accuracy = counts["right"] / counts["scored"] if counts["scored"] else math.nan
            progress.step(counts["responses"], {"accuracy": accuracy, "unscored": counts["unscored"]})

    return show


def costs(job: Job) -> dict[str, float]:
    """Sum the judges' totals over all repeats, and add the mean time of a reply."""
    found: dict[str, float] = {}
    for judge in job.judges:
        for name, value in judge.metrics().items():
            found[name] = found.get(name, 0) + value
    if found.get("replies"):
        found["seconds_a_reply"] = found["latency_seconds"] / found["replies"]
    return found


# --- what is shown ----------------------------------------------------------------------------------------------------


def line(g: LabelledVerdict) -> str:
    """Encode a verdict as a line of verdicts.jsonl."""
    record = {
        "id": g.label.id,
        "criterion": g.label.criterion.description,
        "satisfied": g.label.satisfied,
        "passed": g.passed,
        "right": None if g.passed is None else g.is_right,
        "reason": g.reason if g.passed is not None else None,
        "failure": g.reason if g.passed is None else None,
        "note": g.label.note,
        "injection": g.label.injection,
        "words": g.words,
        "place": g.place,
        "repeat": g.repeat,
        "reversed": g.is_reversed,
        "judge": g.judge,
    }
    return json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n"


def report(job: Job, audit: JudgeAudit, cost: dict[str, float]) -> None:
    """Print all tables."""
    console = make_console()
    show_table(
        console,
        [job.judges[0].name, "", "verdicts"],
        [
            ("accuracy", audit.accuracy),
            ("Cohen's kappa", audit.kappa),
            ("false positives: passed, not satisfied", audit.false_positive_rate),
            ("false negatives: failed, satisfied", audit.false_negative_rate),
            ("unscored, all passes", audit.unscored),
            ("accuracy where satisfying is good", audit.accuracy_where_good),
            ("accuracy where satisfying is bad", audit.accuracy_where_bad),
            ("false positives where the response addresses the judge", audit.injection_passed),
            ("false positives elsewhere", audit.other_passed),
            ("correlation of false positives with length", audit.length_false_pass),
            ("correlation of the error's sign with length", audit.length_error_sign),
            *([("verdicts that depend on the order", audit.orders.flipped)] if audit.orders else []),
            *([("verdicts that all repeats agree on", audit.repeats.unanimous)] if audit.repeats else []),
        ],
    )
    show_table(
        console,
        ["words", "passed, not satisfied", "verdicts", "passed, satisfied", "verdicts"],
        [(f"{b.words[0]} .. {b.words[1]}", b.unsatisfied_passed, b.satisfied_passed) for b in audit.length],
    )
    if audit.places:
        show_table(
            console,
            ["place in the list", "passed", "verdicts", "accuracy", "verdicts"],
            [(f"{p.place} ({p.satisfied:.2f} satisfied)", p.passed, p.accuracy) for p in audit.places],
        )
    if orders := audit.orders:
        console.print(
            f"of the verdicts that depend on the order, {orders.passed_when_earlier} pass when the criterion comes "
            f"earlier, {orders.passed_when_later} when it comes later (McNemar's p {orders.p:.3g})",
            soft_wrap=True,
        )
    if audit.failures:
        console.print("unscored: " + ", ".join(f"{count} {word}" for word, count in audit.failures.items()))
    shown = {name: value for name, value in cost.items() if value or name in ("calls", "cache_hits")}
    console.print("cost: " + ", ".join(f"{name} {value:,.4g}" for name, value in shown.items()), soft_wrap=True)
    console.print(f"verdicts: {Path(job.cfg.output_dir) / 'verdicts.jsonl'}", markup=False, highlight=False)


def make_console() -> Console:
    """As wide as the terminal; without one, wide enough that no cell is wrapped."""
    return Console() if sys.stdout.isatty() else Console(width=200)


def show_table(console: Console, columns: list[str], rows: Sequence[tuple[str | Measured, ...]]) -> None:
    """Print names, and two cells for each measure: its value with the interval, and its number of verdicts."""
    table = Table(*columns, show_edge=False, pad_edge=False)
    if not console.is_terminal:
        table.box, table.show_edge, table.pad_edge = box.MARKDOWN, True, True
    for row in rows:
        cells: list[str] = []
        for cell in row:
            cells += [cell] if isinstance(cell, str) else [shown(cell), str(cell.of)]
        table.add_row(*cells)
    console.print(table)
    console.print()


def shown(measured: Measured) -> str:
    if math.isnan(measured.value):
        return "-"
    return f"{measured.value:.3f} ({measured.low:.3f} to {measured.high:.3f})"


def shortcomings(job: Job, audit: JudgeAudit) -> Iterator[str]:
    """Yield the reasons for exit status 1."""
    for reason in dict.fromkeys(judge.stop_reason for judge in job.judges if judge.stop_reason is not None):
        yield f"{reason}; the audit covers the answers before that"
    if not audit.accuracy.of:
        failures = ", ".join(f"{count} {word}" for word, count in audit.failures.items())
        yield f"there was no verdict ({failures})"
        return
    for name, found in (("accuracy", audit.accuracy), ("kappa", audit.kappa)):
        least = getattr(job.cfg, f"min_{name}")
        if least is not None and math.isnan(found.value):
            yield f"min_{name}: {least:g}; {name} is undefined here: label both satisfied and unsatisfied criteria"
        elif least is not None and found.value < least:
            yield f"min_{name}: {least:g}; {name} is {found.value:.3f}: do not train on this judge"


if __name__ == "__main__":
    config.main(AuditJudgeConfig, run, check=checks.check_audit_judge)
