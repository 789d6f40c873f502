"""Problems with rubrics, for responses that a judge must read: your own, the published ones, and a packaged set.

A rubric for each prompt works better than one rubric for all of them. Rubrics as Rewards (arXiv 2507.17746v2, its main
table) trains Qwen2.5-7B to 29.7 (explicit) and 31.2 (implicit) on HealthBench with a rubric per prompt, but only to
12.5 with one predefined rubric; the Instruct model without this training is at 22.7.
"""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StringConstraints

from rolltune.data.dataset import Dataset, take_slice
from rolltune.data.records import HUB_ID, Located, file_records, hub_records
from rolltune.files import home_path
from rolltune.rewards.rubric.load import Unsure, Weights, collect, parse, problem_record, rar_problem
from rolltune.types import Problem

_TASKS = Path(__file__).with_name("rubric_tasks.jsonl")
_ONE_HELD_OUT_IN = 50  # questions of published data, by a hash of their text

# --- your own ---------------------------------------------------------------------------------------------------------


def rubric_jsonl(*, path: str, start: int = 0, count: int | None = None) -> Dataset:
    """Load problems with rubrics from a .jsonl or .parquet file.

    A record is what ``tune run write_rubrics`` writes, ``{"problem": {"id": ..., "messages": [...], "answer": ...},
    "rubric": {"criteria": [...]}}``, or flat: ``question`` or ``messages``, ``criteria`` (or ``rubric``), and
    optionally ``id``, ``answer`` and ``solution``. A criterion has the fields of
    :class:`rolltune.rewards.rubric.schema.Criterion`. The default id is "<file name>/<line number>".

    Args:
        path: the file; in JSONL one record per line.
        start: index of the first problem.
        count: number of problems; None takes all from ``start`` on.

    Raises:
        ValueError: no such file, wrong records (the message names each with its fields), a repeated id, or a slice out
            of range.
    """
    records = _read(path, "rubric_jsonl")
    stem = Path(path).stem
    places: dict[str, str] = {}

    def read(where: str, record: dict[str, Any]) -> Problem:
        problem = problem_record(record).to_problem(f"{stem}/{where.rpartition(':')[2]}")
        if (first := places.setdefault(problem.id, where)) != where:
            raise ValueError(f"id: {problem.id!r} is already used at {first}")
        return problem

    problems = collect(records, read)
    return Dataset(take_slice(problems, start=start, count=count, source=path))


def _read(path: str, loader: str) -> list[Located]:
    source = home_path(path)
    if not source.is_file():
        raise ValueError(f"{loader}: path={path!r} is not a file")
    records = list(file_records(source))
    if not records:
        raise ValueError(f"{source}: the file has no records")
    return records


# --- published --------------------------------------------------------------------------------------------------------


def rar(
    *,
    path: str = "anisha2102/RaR-Medicine",
    split: Literal["train", "val", "test"] = "train",
    start: int = 0,
    count: int | None = None,
    weights: Weights = "categories",
    unsure: Unsure = "error",
    part: Literal["all", "train", "heldout"] = "all",
) -> Dataset:
    """Load RaR-Medicine or RaR-Science, the data of Rubrics as Rewards (arXiv 2507.17746).

    The reference answer becomes the problem's answer, for judges that see it. The data has two peculiarities. Questions
    repeat, also across splits, so take held-out problems with ``part``. And pitfalls are phrased as failures or as
    errors avoided, both with negative weights; see ``unsure``. Without pitfalls the paper's ablation loses nothing
    (37.2 with and without them).

    Args:
        path: a Hub id ("anisha2102/RaR-Science" is the other one), or a .jsonl or .parquet file with the columns
            ``question``, ``reference_answer`` and ``rubric``, a list of {title, description, weight}.
        split: split of the data set on the Hub.
        start: index of the first record to read.
        count: number of records to read; None reads all from ``start`` on.
        weights: "categories" replaces the published numbers by the paper's weights of the four categories, as its
            experiments do; "numbers" keeps the numbers, 1 to 5, without sign, because the wording gives the direction.
        unsure: treatment of a pitfall whose wording does not say whether satisfying it is good ("Does not mention
            ..."): "error" reports them all, "drop" leaves them out, "bad" reads them as failures, as most in
            RaR-Medicine are, "good" as errors avoided.
        part: "all" keeps every record. "train" and "heldout" keep each question once; a hash of its text holds out one
            in fifty, so that no question is in both parts, whatever the split or slice.

    Raises:
        ValueError: the data cannot be found or loaded, records are malformed (the message names each with its fields),
            or the slice is out of range.
    """
    for name, value, known in (
        ("split", split, ("train", "val", "test")),
        ("weights", weights, ("categories", "numbers")),
        ("unsure", unsure, ("error", "drop", "bad", "good")),
        ("part", part, ("all", "train", "heldout")),
    ):
        if value not in known:
            raise ValueError(f"rar: {name}={value!r} must be one of {', '.join(known)}")
    name, records = _rar_records(path, split)
    numbered = [(where, (number, record)) for number, (where, record) in enumerate(records)]
    taken = take_slice(numbered, start=start, count=count, source=f"rar {split} ({path})")

    def read(where: str, numbered: tuple[int, Any]) -> Problem | None:
        number, record = numbered
        return rar_problem(record, f"{name}/{number}", weights=weights, unsure=unsure)

    problems = collect(taken, read)
    kept = [problem for problem in problems if problem is not None]
    if part != "all":
        once = {problem.messages[-1]["content"]: problem for problem in reversed(kept)}  # keeps the first of each
        kept = [p for p in kept if once[p.messages[-1]["content"]] is p and _is_heldout(p) == (part == "heldout")]
        if not kept:
            raise ValueError(f"rar: part={part!r} of {path} has no records; take a larger slice")
    if not kept:
        raise ValueError(f"rar: unsure={unsure} leaves no criteria in the {len(problems)} rubrics of {path}")
    return Dataset(kept)


def _is_heldout(problem: Problem) -> bool:
    digest = hashlib.blake2b(problem.messages[-1]["content"].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _ONE_HELD_OUT_IN == 0


def _rar_records(path: str, split: str) -> tuple[str, list[Located]]:
    """Return the prefix of the ids, and the records."""
    source = home_path(path)
    if source.suffix in (".jsonl", ".parquet"):
        return source.stem, _read(path, "rar")
    if source.exists() or not HUB_ID.fullmatch(path):
        raise ValueError(f"rar: path={path!r} must be a .jsonl or .parquet file or a Hub id")
    name = path.rpartition("/")[2].casefold().replace("-", "_")
    records = hub_records(
        path,
        split,
        loader="rar",
        without_network="Set `path` to a local .jsonl or .parquet copy, or use rolltune.data.rubrics.rubric_tasks, "
        "which needs no network.",
    )
    return f"{name}/{split}", records


class _HealthBenchItem(BaseModel):
    criterion: Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
    points: float
    tags: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Its axis, such as "completeness"."""
        axes = [tag.removeprefix("axis:") for tag in self.tags if tag.startswith("axis:")]
        return axes[0].replace("_", " ") if axes else "criterion"


class _HealthBenchRecord(BaseModel):
    prompt_id: str | None = None
    prompt: list[dict[str, Any]]
    rubrics: Annotated[tuple[_HealthBenchItem, ...], Field(min_length=1, max_length=100)]


def healthbench(*, path: str, start: int = 0, count: int | None = None) -> Dataset:
    """Load rubrics in the layout of HealthBench (arXiv 2505.08775) from a file.

    A record has ``prompt``, a list of messages, and ``rubrics``, a list of {criterion, points, tags}. A criterion of
    negative points is bad when it is met. Its title is the axis among its tags.

    Args:
        path: a .jsonl or .parquet file.
        start: index of the first record.
        count: number of records; None takes all from ``start`` on.

    Raises:
        ValueError: no such file, wrong records (the message names each with its fields), or the slice is out of range.
    """
    records = take_slice(_read(path, "healthbench"), start=start, count=count, source=path)

    def read(where: str, record: Any) -> Problem:
        parsed = parse(_HealthBenchRecord, record)
        criteria = [
            {"title": item.title, "description": item.criterion, "weight": item.points} for item in parsed.rubrics
        ]
        default_id = f"{Path(path).stem}/{re.split(r':|record ', where)[-1]}"
        return problem_record(
            {"id": parsed.prompt_id or default_id, "messages": parsed.prompt, "criteria": criteria}
        ).to_problem(default_id)

    return Dataset(collect(records, read))


# --- packaged ---------------------------------------------------------------------------------------------------------


def rubric_tasks(*, split: Literal["train", "heldout"] = "train", start: int = 0, count: int | None = None) -> Dataset:
    """Load the packaged tasks with rubrics: short everyday writing and explaining, 48 to train on and 12 held out.

    They show that a run works without a network. They are too few and too simple to show that a model improved.

    Example:
        >>> rubric_tasks(split="heldout", count=1)[0].rubric is not None
        True

    Args:
        split: "train" or "heldout".
        start: index of the first task.
        count: number of tasks; None takes all from ``start`` on.

    Raises:
        ValueError: an unknown split, or the slice is out of range.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"rubric_tasks: split={split!r} must be one of train, heldout")
    records = [(where, record) for where, record in _read(str(_TASKS), "rubric_tasks") if record["split"] == split]
    problems: list[Problem] = collect(records, lambda where, record: problem_record(record).to_problem(where))
    return Dataset(take_slice(problems, start=start, count=count, source=f"rubric_tasks {split}"))
