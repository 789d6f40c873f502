"""The samples of a report: an index of all completions, and packed texts that the page unpacks when it shows them.

A pack holds the groups of one step (or of a slice of an evaluation's problems) as gzipped JSON. The index says for each
group which pack it is in, and has the numbers that the page sorts and filters by.
"""

from __future__ import annotations

import gzip
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import groupby
from pathlib import Path
from typing import Any

from rolltune.rewards.rubric.notes import read_note

MAX_SAMPLE_BYTES = 160 * 2**20  # of the sample files that go into one page

Record = dict[str, Any]
Grades = list[tuple[str, float | None, list[float | None]]]  # a criterion, its grade, the judges' grades


@dataclass(frozen=True)
class Pack:
    """The groups of one step.

    Attributes:
        place: label of the step.
        data: gzipped JSON, a list of groups.
        index: for each group what the page's index holds.
        grades: of the rubric's criteria.
    """

    place: str
    data: bytes
    index: list[Record]
    grades: Grades


@dataclass(frozen=True)
class Samples:
    """All samples of a page.

    Attributes:
        axis: what a place is: "step" or "model".
        packs: by key.
        note: what was left out, for the reader.
    """

    axis: str
    packs: dict[str, Pack]
    note: str = ""

    def index(self) -> Record:
        """Return what the page needs to sort and filter, in columns."""
        rows = [
            row | {"pack": key, "place": pack.place, "at": at}
            for key, pack in self.packs.items()
            for at, row in enumerate(pack.index)
        ]
        problems = list(dict.fromkeys(row["problem"] for row in rows))
        number = {problem: i for i, problem in enumerate(problems)}
        columns = {name: [row[name] for row in rows] for name in ("pack", "at", "place", "rewards", "tokens", "cut")}
        return {
            "axis": self.axis,
            "note": self.note,
            "places": list(dict.fromkeys(pack.place for pack in self.packs.values())),
            "problems": problems,
            "groups": columns | {"problem": [number[row["problem"]] for row in rows]},
        }


def run_samples(output_dir: Path) -> Samples:
    """Pack the sample files of a training run, or evenly chosen ones if there is too much for a page.

    Raises:
        ValueError: a file is not one of samples.
    """
    paths = sorted((output_dir / "samples").glob("step_*.jsonl"))
    sizes = [path.stat().st_size for path in paths]
    every = max(1, -(-sum(sizes) // MAX_SAMPLE_BYTES))
    chosen = [path for i, path in enumerate(reversed(paths)) if i % every == 0][::-1]  # the last one is always there
    note = ""
    if every > 1:
        note = f"{len(chosen)} of {len(paths)} steps are in this page, the others are in {output_dir / 'samples'}"
    packs = {}
    for path in chosen:
        status = path.stat()
        packs[path.stem] = _pack_step(path, status.st_mtime_ns, status.st_size)
    return Samples("step", packs, note)


@lru_cache(maxsize=10_000)
def _pack_step(path: Path, changed_ns: int, size: int) -> Pack:
    """Pack a file. A run writes its report again and again, and only new files are read."""
    records = read_records(path)
    groups = [
        make_group(of_group[0]["problem"], of_group[0]["messages"], of_group[0].get("answer"), of_group)
        for of_group in _grouped(records)
    ]
    return make_pack(str(int(path.stem.removeprefix("step_"))), groups)


def _grouped(records: Iterable[Record]) -> list[list[Record]]:
    return [list(group) for _, group in groupby(records, key=lambda record: (record.get("group"), record["problem"]))]


def read_records(path: Path) -> list[Record]:
    """Read a JSON lines file; a last line without its newline was cut by a kill and is ignored."""
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    try:
        return [json.loads(line) for line in lines]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: a line is not JSON ({error.msg}); remove the file") from None


def make_group(problem: str, messages: Sequence[Any], answer: str | None, completions: Sequence[Record]) -> Record:
    """Make a group as the page shows it: the prompt once, and its completions."""
    shown = (
        *("text", "tokens", "finish_reason", "reward", "parts", "failure", "notes", "advantage", "label"),
        *("token_texts", "token_logprobs"),
    )
    return {
        "problem": problem,
        "messages": list(messages),
        "answer": answer,
        "completions": [{name: c[name] for name in shown if c.get(name) not in (None, {})} for c in completions],
    }


def make_pack(place: str, groups: Sequence[Record]) -> Pack:
    """Pack groups made by :func:`make_group`."""
    index = [
        {
            "problem": group["problem"],
            "rewards": [_rounded(c.get("reward")) for c in group["completions"]],
            "tokens": [c.get("tokens", 0) for c in group["completions"]],
            "cut": sum(c.get("finish_reason") == "length" for c in group["completions"]),
        }
        for group in groups
    ]
    data = gzip.compress(json.dumps(list(groups)).encode(), compresslevel=6, mtime=0)
    return Pack(place, data, index, [grade for group in groups for c in group["completions"] for grade in _grades(c)])


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)


def _grades(completion: Record) -> Iterator[tuple[str, float | None, list[float | None]]]:
    parts = completion.get("parts", {})
    for name, note in completion.get("notes", {}).items():
        reward, _, criterion = name.partition("/")
        if f"{reward}/scored_share" not in parts or re.fullmatch(r"rating|match_\d+", criterion):
            continue
        read = read_note(note)
        if read is not None:
            yield criterion, *read


def criteria(packs: Iterable[Pack]) -> list[Record]:
    """Summarise a rubric's criteria.

    Returns:
        For each criterion: "criterion", "responses" that were graded, "unscored" ones, "mean" grade, and "agreement":
        the share of responses graded by several judges to which all gave the same grade (None without any).
    """
    by_name: dict[str, Grades] = defaultdict(list)
    for pack in packs:
        for grade in pack.grades:
            by_name[grade[0]].append(grade)
    rows = []
    for name, grades in by_name.items():
        known = [grade for _, grade, _ in grades if grade is not None]
        several = [judges for _, _, judges in grades if sum(grade is not None for grade in judges) > 1]
        same = [len({grade for grade in judges if grade is not None}) == 1 for judges in several]
        rows.append(
            {
                "criterion": name,
                "responses": len(known),
                "unscored": len(grades) - len(known),
                "mean": _mean(known),
                "agreement": _mean(same),
            }
        )
    return sorted(rows, key=lambda row: -1.0 if row["mean"] is None else row["mean"], reverse=True)


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
