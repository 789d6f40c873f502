"""GSM8K: grade-school word problems with integer answers (Cobbe et al. 2021, arXiv 2110.14168)."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from rolltune.data.dataset import Dataset, take_slice
from rolltune.data.records import HUB_ID, Located, file_records, hub_records
from rolltune.files import home_path
from rolltune.types import Problem

_CALCULATOR = re.compile(r"<<.*?>>")
_INTEGER = re.compile(r"-?([0-9]+|[0-9]{1,3}(,[0-9]{3})+)")  # 1,5 may be a decimal comma

_LONGEST_ANSWER = 1000


def gsm8k(
    *,
    split: Literal["train", "test"],
    path: str = "openai/gsm8k",
    start: int = 0,
    count: int | None = None,
) -> Dataset:
    """Load GSM8K: 7,473 problems in the train split, 1,319 in the test split.

    The user message is only the question. The gold answer is the text after the last ``####``, without commas. The
    solution is the text before it, without the calculator annotations (``<<48/2=24>>``).

    Args:
        split: "train" or "test".
        path: a Hub id; or a .jsonl or .parquet file with the columns ``question`` and ``answer``; or a folder with
            ``<split>.jsonl``, ``<split>.parquet`` or ``main/<split>-00000-of-00001.parquet``.
        start: index of the first record.
        count: number of records; None takes all from ``start`` on.

    Raises:
        ValueError: the data cannot be found or loaded, a record is malformed, or the slice is out of range.
    """
    if split not in ("train", "test"):
        raise ValueError(f'gsm8k: split={split!r} must be "train" or "test"')
    records = enumerate(_records(path, split))
    problems = [_problem(f"gsm8k/{split}/{i}", where, record) for i, (where, record) in records]
    return Dataset(take_slice(problems, start=start, count=count, source=f"gsm8k {split} ({path})"))


def _problem(problem_id: str, where: str, record: dict[str, Any]) -> Problem:
    for key in ("question", "answer"):
        if not isinstance(record.get(key), str) or not record[key].strip():
            raise ValueError(f"{where}: {key!r} must be a non-empty string, not {record.get(key)!r:.60}")
    solution, marker, answer = record["answer"].rpartition("####")
    if not marker:
        raise ValueError(f"{where}: 'answer' must end with '#### ' and the final answer")
    if not _INTEGER.fullmatch(answer.strip()) or len(answer) > _LONGEST_ANSWER:
        raise ValueError(
            f"{where}: the final answer after '####' must be an integer such as 1800 or 1,800, "
            f"not {answer.strip()!r:.60}"
        )
    return Problem(
        id=problem_id,
        messages=({"role": "user", "content": record["question"].strip()},),
        answer=str(int(answer.replace(",", ""))),
        solution=_CALCULATOR.sub("", solution).strip() or None,
    )


def _records(path: str, split: str) -> Iterable[Located]:
    local = home_path(path)
    if local.exists():
        return file_records(local if local.is_file() else _file_of_split(local, split))
    if HUB_ID.fullmatch(path) and local.suffix not in (".jsonl", ".json", ".parquet"):
        return hub_records(
            path,
            split,
            config="main",
            loader="gsm8k",
            without_network="Set `path` to a local copy (a folder with train.jsonl and test.jsonl), or use "
            "rolltune.data.gsm_symbolic.gsm_symbolic, which needs no network.",
        )
    raise ValueError(f"gsm8k: path={path!r}: no such file or folder")


def _file_of_split(folder: Path, split: str) -> Path:
    names = (f"{split}.jsonl", f"{split}.parquet", f"main/{split}-00000-of-00001.parquet")
    for name in names:
        if (folder / name).is_file():
            return folder / name
    raise ValueError(f"gsm8k: path={folder}: the folder has none of {', '.join(names)}")
