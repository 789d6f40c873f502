"""Problems with rubrics, for answers that a judge has to read: one's own, the published ones, and a small set to try.

Rubrics for each prompt are what the paper found to work. Rubrics as Rewards (arXiv 2507.17746v2, its main table) has
Qwen2.5-7B at 12.5 on HealthBench with one predefined rubric for all prompts, below the 22.7 of the Instruct model that
was not trained on any, and at 29.7 (explicit) and 31.2 (implicit) with rubrics of each prompt's own.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from rolltune.data.dataset import Dataset, take_slice
from rolltune.data.jsonl import read_jsonl
from rolltune.rewards.rubric.load import Unsure, Weights, collect, problem_record, rar_problem
from rolltune.types import Problem

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_TASKS = Path(__file__).with_name("rubric_tasks.jsonl")
_ONE_HELD_OUT_IN = 50  # questions of published data, by a hash of their text

# --- one's own --------------------------------------------------------------------------------------------------------


def rubric_jsonl(*, path: str, start: int = 0, count: int | None = None) -> Dataset:
    """Problems with rubrics from a file, one JSON object a line.

    A line is what ``tune run write_rubrics`` writes, ``{"problem": {"id": ..., "messages": [...], "answer": ...},
    "rubric": {"criteria": [...]}}``, or flat: ``question`` or ``messages``, ``criteria`` (or ``rubric``), and where
    there are any ``id``, ``answer`` and ``solution``. A criterion has the fields of
    :class:`rolltune.rewards.rubric.schema.Criterion`. Without an id it is "<file name>/<line number>".

    Args:
        path: the file.
        start: first problem taken.
        count: number of problems taken; None takes all from ``start`` on.

    Raises:
        ValueError: there is no such file, lines are wrong (each is named with its fields), an id stands twice, or the
            slice is out of range.
    """
    source = _file(path, "rubric_jsonl")
    places: dict[str, str] = {}

    def read(where: str, row: dict[str, Any]) -> Problem:
        problem = problem_record(row).to_problem(f"{source.stem}/{where.rpartition(':')[2]}")
        _check_new(problem.id, where, places)
        return problem

    problems = collect(_lines(source), read)
    return Dataset(take_slice(problems, start=start, count=count, source=str(source)))


def _check_new(name: str, where: str, places: dict[str, str]) -> None:
    """Note the place of an id; ValueError where it has one already."""
    if (first := places.setdefault(name, where)) != where:
        raise ValueError(f"id: {name!r} is taken by {first}")


def _file(path: str, name: str, key: str = "path") -> Path:
    source = Path(path).expanduser()
    if not source.is_file():
        raise ValueError(f"{name}: {key}={path!r} is not a file")
    return source


def _lines(source: Path) -> list[tuple[str, dict[str, Any]]]:
    """Rows with the place that an error message names."""
    rows = [(f"{source}:{line}", row) for line, row in read_jsonl(source)]
    if not rows:
        raise ValueError(f"{source}: the file has no rows")
    return rows


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
    """Rows of RaR-Medicine or RaR-Science, the data of Rubrics as Rewards (arXiv 2507.17746).

    The reference answer becomes the problem's answer, for judges that are shown it. Two things to know of the data:
    questions stand in it more than once and in several splits, so held-out ones are best taken by ``part``; and
    pitfalls are phrased both ways under the same negative weights, see ``unsure``. Leaving pitfalls out costs
    nothing in the paper's ablation (37.2 with and without them).

    Args:
        path: a Hub id ("anisha2102/RaR-Science" is the other one), or a .jsonl or .parquet file with the columns
            ``question``, ``reference_answer`` and ``rubric``, a list of {title, description, weight}.
        split: of the data set on the Hub.
        start: first row looked at.
        count: number of rows looked at; None takes all from ``start`` on.
        weights: "categories" puts the paper's weights of the four categories in the place of the published numbers, as
            its experiments do; "numbers" keeps these, 1 to 5 (without sign: directions are the wording's).
        unsure: what becomes of a pitfall whose wording does not say whether it is good to satisfy ("Does not mention
            ..."): "error" names them all, "drop" leaves them out, "bad" takes them for failures, which most of
            RaR-Medicine's are, "good" for errors avoided.
        part: "all" rows as they are; "train" or "heldout" for each question once, one in fifty of them held out by a
            hash of its text, so that no question is in both, whatever the split or slice.

    Raises:
        ValueError: the data cannot be found or reached, rows are malformed (each is named with its fields), or the
            slice is out of range.
    """
    for name, value, known in (
        ("split", split, ("train", "val", "test")),
        ("weights", weights, ("categories", "numbers")),
        ("unsure", unsure, ("error", "drop", "bad", "good")),
        ("part", part, ("all", "train", "heldout")),
    ):
        if value not in known:
            raise ValueError(f"rar: {name}={value!r} must be one of {', '.join(known)}")
    name, rows = _rar_rows(path, split)
    numbered = [(where, (number, row)) for number, (where, row) in enumerate(rows)]
    taken = take_slice(numbered, start=start, count=count, source=f"rar {split} ({path})")
    problems = collect(
        taken, lambda where, row: rar_problem(row[1], f"{name}/{row[0]}", weights=weights, unsure=unsure)
    )
    kept = [problem for problem in problems if problem is not None]
    if part != "all":
        once = {problem.messages[-1]["content"]: problem for problem in reversed(kept)}  # the first of each stays
        kept = [p for p in kept if once[p.messages[-1]["content"]] is p and _is_heldout(p) == (part == "heldout")]
        if not kept:
            raise ValueError(f"rar: part={part!r} of {path} has no rows; take a larger slice")
    if not kept:
        raise ValueError(f"rar: unsure={unsure} leaves nothing of the {len(problems)} rubrics of {path}")
    return Dataset(kept)


def _is_heldout(problem: Problem) -> bool:
    digest = hashlib.blake2b(problem.messages[-1]["content"].encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") % _ONE_HELD_OUT_IN == 0


def _rar_rows(path: str, split: str) -> tuple[str, list[tuple[str, Any]]]:
    """What ids begin with, and the rows with the places that an error message names."""
    source = Path(path).expanduser()
    if source.suffix == ".jsonl":
        return source.stem, _lines(_file(path, "rar"))
    if source.suffix == ".parquet":
        return source.stem, _numbered(str(source), _parquet_rows(_file(path, "rar")))
    if source.exists() or not _HUB_ID.fullmatch(path):
        raise ValueError(f"rar: path={path!r} must be a .jsonl or .parquet file or a Hub id")
    name = path.rpartition("/")[2].casefold().replace("-", "_")
    return f"{name}/{split}", _numbered(f"{path}, split {split}", _hub_rows(path, split))


def _numbered(source: str, rows: Iterable[Any]) -> list[tuple[str, Any]]:
    return [(f"{source}, row {number}", row) for number, row in enumerate(rows)]


def _parquet_rows(file: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        return pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowInvalid as error:
        raise ValueError(f"{file}: not a Parquet file ({error})") from None


def _hub_rows(path: str, split: str) -> Iterable[Any]:
    import datasets

    try:
        return datasets.load_dataset(path, split=split)
    except (OSError, ValueError) as error:  # see rolltune.data.gsm8k
        raise ValueError(
            f"rar: path={path!r} is neither a local file nor a data set that could be loaded from the Hub "
            f"({type(error).__name__}: {error}).\n"
            "Set `path` to a local .jsonl or .parquet copy, or use rolltune.data.rubrics.rubric_tasks, which needs no "
            "network."
        ) from error


# --- to try -----------------------------------------------------------------------------------------------------------


def rubric_tasks(*, split: Literal["train", "heldout"] = "train", start: int = 0, count: int | None = None) -> Dataset:
    """Short everyday writing and explaining tasks with rubrics: 48 to train on, 12 held out. No network.

    Enough to see a run work, too few and too plain to show that a model got better.

    Example:
        >>> rubric_tasks(split="heldout", count=1)[0].rubric is not None
        True

    Args:
        split: "train" or "heldout".
        start: first task taken.
        count: number of tasks taken; None takes all from ``start`` on.

    Raises:
        ValueError: an unknown split, or the slice is out of range.
    """
    if split not in ("train", "heldout"):
        raise ValueError(f"rubric_tasks: split={split!r} must be one of train, heldout")
    rows = [(where, row) for where, row in _lines(_TASKS) if row["split"] == split]
    problems: list[Problem] = collect(rows, lambda where, row: problem_record(row).to_problem(where))
    return Dataset(take_slice(problems, start=start, count=count, source=f"rubric_tasks {split}"))
