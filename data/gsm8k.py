"""GSM8K: grade-school word problems whose answers are integers (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

from rolltune.data.dataset import Dataset, take_slice
from rolltune.data.jsonl import read_jsonl
from rolltune.types import Problem

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_CALCULATOR = re.compile(r"<<.*?>>")
_INTEGER = re.compile(r"-?[0-9][0-9,]*")


def gsm8k(
    *,
    split: Literal["train", "test"],
    path: str = "openai/gsm8k",
    start: int = 0,
    count: int | None = None,
) -> Dataset:
    """Rows of GSM8K: 7,473 in the train split, 1,319 in the test split.

    The question alone is the user turn. The gold answer is what follows the last ``####``, without commas. The
    solution is what stands before it, without the calculator notes (``<<48/2=24>>``).

    Args:
        split: "train" or "test".
        path: a Hub id; or a .jsonl or .parquet file with the columns ``question`` and ``answer``; or a folder that
            holds ``<split>.jsonl``, ``<split>.parquet`` or ``main/<split>-00000-of-00001.parquet``.
        start: first row taken.
        count: number of rows taken; None takes all from ``start`` on.

    Raises:
        ValueError: the data cannot be found or reached, a row is malformed, or the slice is out of range.
    """
    if split not in ("train", "test"):
        raise ValueError(f'gsm8k: split={split!r} must be "train" or "test"')
    problems = [_problem(f"gsm8k/{split}/{i}", where, row) for i, (where, row) in enumerate(_rows(path, split))]
    return Dataset(take_slice(problems, start=start, count=count, source=f"gsm8k {split} ({path})"))


def _problem(problem_id: str, where: str, row: dict[str, Any]) -> Problem:
    for key in ("question", "answer"):
        if not isinstance(row.get(key), str) or not row[key].strip():
            raise ValueError(f"{where}: {key!r} must be a non-empty string, not {row.get(key)!r:.60}")
    solution, marker, answer = row["answer"].rpartition("####")
    if not marker:
        raise ValueError(f"{where}: 'answer' has no line with '#### ' and the final answer")
    if not _INTEGER.fullmatch(answer.strip()):
        raise ValueError(f"{where}: the final answer {answer.strip()!r:.60} is not an integer")
    return Problem(
        id=problem_id,
        messages=({"role": "user", "content": row["question"].strip()},),
        answer=str(int(answer.replace(",", ""))),
        solution=_CALCULATOR.sub("", solution).strip() or None,
    )


def _rows(path: str, split: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows with the place that an error message names."""
    local = Path(path).expanduser()
    if local.exists():
        file = local if local.is_file() else _file_of_split(local, split)
        if file.suffix == ".jsonl":
            for line, row in read_jsonl(file):
                yield f"{file}:{line}", row
        elif file.suffix == ".parquet":
            yield from _numbered(file, _parquet_rows(file))
        else:
            raise ValueError(f"gsm8k: path={path!r} must be a .jsonl or .parquet file, a folder or a Hub id")
    elif _HUB_ID.fullmatch(path) and local.suffix not in (".jsonl", ".json", ".parquet"):
        yield from _numbered(f"{path}, split {split}", _hub_rows(path, split))
    else:
        raise ValueError(f"gsm8k: path={path!r}: no such file or folder")


def _numbered(source: Path | str, rows: Iterable[Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for number, row in enumerate(rows):
        yield f"{source}, row {number}", row


def _file_of_split(folder: Path, split: str) -> Path:
    names = (f"{split}.jsonl", f"{split}.parquet", f"main/{split}-00000-of-00001.parquet")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"gsm8k: the folder {folder} holds none of {', '.join(names)}")


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
        return datasets.load_dataset(path, "main", split=split)
    # datasets raises OSError (its subclasses for "not found" and "not reached" included) or ValueError (no such
    # configuration or split, or not in the cache when offline).
    except (OSError, ValueError) as error:
        raise ValueError(
            f"gsm8k: path={path!r} is neither a local file nor a data set that could be loaded from the Hub "
            f"({type(error).__name__}: {error}).\n"
            "Set `path` to a local copy (a folder with train.jsonl and test.jsonl), or use "
            "rolltune.data.gsm_symbolic.gsm_symbolic, which needs no network."
        ) from error
