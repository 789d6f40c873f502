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

MAX_SAMPLE_BYTES = 256 * 2**20  # of the sample files that go into one page

Record = dict[str, Any]


@dataclass
class Tally:
    """The grades of one criterion of a rubric.

    Attributes:
        responses: number of graded responses.
        total: sum of their grades.
        unscored: number of responses without a grade.
        judged_twice: number of responses that several judges have graded.
        agreed: number of these to which all judges gave the same grade.
    """

    responses: int = 0
    total: float = 0.0
    unscored: int = 0
    judged_twice: int = 0
    agreed: int = 0

    def add(self, grade: float | None, by_judge: Sequence[float | None]) -> None:
        known = [of_judge for of_judge in by_judge if of_judge is not None]
        self.responses += grade is not None
        self.total += grade or 0.0
        self.unscored += grade is None
        self.judged_twice += len(known) > 1
        self.agreed += len(known) > 1 and len(set(known)) == 1

    def __iadd__(self, other: Tally) -> Tally:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)
        return self


@dataclass(frozen=True)
class Pack:
    """The groups of one step.

    Attributes:
        place: label of the step.
        data: gzipped JSON, a list of groups.
        index: for each group what the page's index holds.
        criteria: grades of the rubric's criteria, by criterion.
    """

    place: str
    data: bytes
    index: list[Record]
    criteria: dict[str, Tally]


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
    groups = [
        make_group(of_group[0]["problem"], of_group[0].get("messages", ()), of_group[0].get("answer"), of_group)
        for of_group in _grouped(read_records(path))
    ]
    return make_pack(path.stem.removeprefix("step_").lstrip("0") or "0", groups)


def _grouped(records: Iterable[Record]) -> list[list[Record]]:
    return [list(group) for _, group in groupby(records, key=lambda record: (record.get("group"), record["problem"]))]


def read_records(path: Path, *, header: bool = False) -> list[Record]:
    """Read a file of samples or problems; a last line without its newline was cut by a kill and is ignored.

    Args:
        path: the file, in JSON lines.
        header: whether the first line is something else.

    Raises:
        ValueError: a line is not an object about a problem.
    """
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
    records = []
    for number, line in list(enumerate(lines, start=1))[int(header) :]:
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}:{number}: not JSON ({error.msg}); remove the file") from None
        if not isinstance(records[-1], dict) or not isinstance(records[-1].get("problem"), str):
            raise ValueError(f"{path}:{number}: not an object with a 'problem'; remove the file")
    return records


def make_group(problem: str, messages: Sequence[Any], answer: str | None, completions: Sequence[Record]) -> Record:
    """Make a group as the page shows it: the prompt once, and its completions."""
    shown = (
        *("text", "tokens", "finish_reason", "reward", "parts", "failure", "notes", "advantage", "label"),
        *("token_texts", "token_logprobs", "token_gaps"),
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
    tallies: dict[str, Tally] = defaultdict(Tally)
    for group in groups:
        for completion in group["completions"]:
            for criterion, grade, by_judge in _grades(completion):
                tallies[criterion].add(grade, by_judge)
    return Pack(place, data, index, dict(tallies))


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


def criteria(packs: Iterable[Pack]) -> dict[str, Tally]:
    """Add up the grades of a rubric's criteria, the most often met first."""
    tallies: dict[str, Tally] = defaultdict(Tally)
    for pack in packs:
        for criterion, tally in pack.criteria.items():
            tallies[criterion] += tally
    return dict(sorted(tallies.items(), key=lambda item: -item[1].total / max(1, item[1].responses)))
