"""Data sets with rubrics: your own files, the published ones, and the packaged tasks."""

import json
import re

import pytest

from rolltune.data.dataset import overlap
from rolltune.data.rubrics import healthbench, rar, rubric_jsonl, rubric_tasks
from rolltune.rewards.checks.rubric_lint import lint
from rolltune.rewards.rubric.schema import CATEGORIES, Criterion, Rubric

UNIT = {"title": "Unit", "description": "Names the unit.", "category": "essential"}
SHORT = {"title": "Short", "description": "Is short.", "weight": 2}


def write_jsonl(path, records) -> str:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), "utf-8")
    return str(path)


def records(count: int) -> list[dict]:
    return [{"question": f"How long is river {i}?", "answer": str(i), "criteria": [UNIT, SHORT]} for i in range(count)]


# --- rubric_jsonl -----------------------------------------------------------------------------------------------------


def test_a_file_of_both_kinds_of_lines(tmp_path):
    messages = [{"role": "user", "content": "How deep?"}]
    written = {
        "problem": {"id": "deep", "messages": messages, "answer": "3", "solution": None},
        "rubric": {"criteria": [SHORT]},
        "provenance": {"model": "m", "host": "h"},
    }
    data = rubric_jsonl(path=write_jsonl(tmp_path / "own.jsonl", [*records(2), "", written]))
    assert [p.id for p in data] == ["own/1", "own/2", "deep"]
    assert [p.answer for p in data] == ["0", "1", "3"]
    assert data[0].rubric == Rubric.of(Criterion(**UNIT), Criterion(**SHORT))
    assert data[2].rubric == Rubric.of(Criterion(**SHORT)) and data[2].messages == tuple(messages)


def test_a_slice_keeps_ids(tmp_path):
    path = write_jsonl(tmp_path / "own.jsonl", records(5))
    assert [p.id for p in rubric_jsonl(path=path, start=3)] == ["own/4", "own/5"]
    assert [p.id for p in rubric_jsonl(path=path, start=1, count=2)] == ["own/2", "own/3"]
    with pytest.raises(ValueError, match="start=5"):
        rubric_jsonl(path=path, start=5)


def test_wrong_lines_are_all_named(tmp_path):
    bad = [{"question": "?"}, *records(1), {"question": "?", "criteria": [{**UNIT, "category": "vital"}]}]
    path = write_jsonl(tmp_path / "own.jsonl", bad)
    with pytest.raises(ValueError) as caught:
        rubric_jsonl(path=path)
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{path}:1: ") and "'criteria'" in first
    assert second.startswith(f"{path}:3: criteria[0].category: ") and second.endswith("not 'vital'")


@pytest.mark.parametrize(
    "lines, message",
    [
        ([], "own.jsonl: .*no records"),
        (["{"], "own.jsonl:1: not JSON"),
        (["[]"], "own.jsonl:1: .*not list"),
        ([record | {"id": "twin"} for record in records(2)], r"own.jsonl:2: id: 'twin' .*own.jsonl:1"),
    ],
)
def test_files_that_cannot_be_read(tmp_path, lines, message):
    with pytest.raises(ValueError, match=message):
        rubric_jsonl(path=write_jsonl(tmp_path / "own.jsonl", lines))


def test_no_file():
    with pytest.raises(ValueError, match="rubric_jsonl: path='nowhere.jsonl'"):
        rubric_jsonl(path="nowhere.jsonl")


# --- rar --------------------------------------------------------------------------------------------------------------


def published(i: int, pitfall: str = "Recommends surgery.") -> dict:
    return {
        "question": f"What of case {i}?",
        "reference_answer": "" if i == 1 else f"It is {i}.",
        "question_source": "s",
        "rubric": [
            {"title": "Cause", "description": "Essential Criteria: Names the cause.", "weight": 5},
            {"title": "Reason", "description": "Important Criteria: Gives a reason.", "weight": 3},
            {"title": "Pitfall", "description": f"Pitfall Criteria: {pitfall}", "weight": -1},
        ],
        "rubric_list": ["a", "b", "c"],
        "rubric_count": 3,
    }


def test_a_question_is_held_out_wherever_it_stands(tmp_path):
    """500 questions, each of them twice: every one is in one part, once."""
    path = write_jsonl(tmp_path / "RaR.jsonl", [published(i % 500) for i in range(1000)])
    parts = {part: [p.messages[-1]["content"] for p in rar(path=path, part=part)] for part in ("train", "heldout")}
    assert len(parts["train"]) + len(parts["heldout"]) == 500 == len({*parts["train"], *parts["heldout"]})
    assert 2 <= len(parts["heldout"]) <= 25 and len(rar(path=path)) == 1000
    again = [p.messages[-1]["content"] for p in rar(path=path, part="heldout", start=500)]
    assert again == parts["heldout"]
    with pytest.raises(ValueError, match="part='heldout'"):
        rar(path=path, part="heldout", count=1)


def write_parquet(path, table) -> str:
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(table), path)
    return str(path)


@pytest.mark.parametrize("write, name", [(write_jsonl, "RaR.jsonl"), (write_parquet, "RaR.parquet")])
def test_published_rows_from_a_file(tmp_path, write, name):
    data = rar(path=write(tmp_path / name, [published(i) for i in range(3)]))
    assert [p.id for p in data] == ["RaR/0", "RaR/1", "RaR/2"]
    assert [p.answer for p in data] == ["It is 0.", None, "It is 2."]
    assert [(c.magnitude(), c.is_good) for c in data[0].rubric.criteria] == [(1.0, True), (0.7, True), (0.9, False)]
    numbers = rar(path=str(tmp_path / name), weights="numbers", start=2)
    assert [p.id for p in numbers] == ["RaR/2"]
    assert [(c.magnitude(), c.is_good) for c in numbers[0].rubric.criteria] == [(5, True), (3, True), (1, False)]


def test_published_pitfalls_that_do_not_say(tmp_path):
    table = [published(0), published(1, "Does not mention x."), published(2, "Does not mention y.")]
    path = write_jsonl(tmp_path / "m.jsonl", table)
    with pytest.raises(ValueError) as caught:
        rar(path=path)
    lines = str(caught.value).splitlines()
    assert [line.partition(" ")[0] for line in lines] == [f"{path}:2:", f"{path}:3:"]
    assert "rubric[2].description: 'Pitfall Criteria: Does not mention x.' does not say" in lines[0]
    assert [len(p.rubric.criteria) for p in rar(path=path, unsure="drop")] == [3, 2, 2]
    assert [p.rubric.criteria[2].is_good for p in rar(path=path, unsure="bad")] == [False, False, False]
    assert [p.rubric.criteria[2].is_good for p in rar(path=path, unsure="good")] == [False, True, True]
    assert len(rar(path=path, count=1)) == 1  # what is not taken is not looked at


def test_a_rubric_of_which_nothing_is_left_leaves_the_data(tmp_path):
    empty = published(1, "Does not mention x.")
    empty["rubric"] = empty["rubric"][2:]
    path = write_jsonl(tmp_path / "m.jsonl", [published(0), empty])
    assert [p.id for p in rar(path=path, unsure="drop")] == ["m/0"]
    with pytest.raises(ValueError, match="unsure=drop"):
        rar(path=path, unsure="drop", start=1)


def test_rows_of_the_hub(monkeypatch):
    """The loader's own call, with its answer put in its place: there is no network here."""
    import datasets

    asked = []

    def load_dataset(path, config, *, split):
        asked.append((path, config, split))
        return datasets.Dataset.from_list([published(i) for i in range(2)])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    data = rar(path="anisha2102/RaR-Science", split="val")
    assert asked == [("anisha2102/RaR-Science", None, "val")]
    assert [p.id for p in data] == ["rar_science/val/0", "rar_science/val/1"]
    assert data[0].rubric is not None and len(data[0].rubric.criteria) == 3


def test_a_hub_that_cannot_be_reached(monkeypatch):
    import datasets

    def load_dataset(path, config, *, split):
        raise ConnectionError("offline")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(ValueError, match=r"(?s)rar: path=.*offline.*local \.jsonl"):
        rar()


@pytest.mark.parametrize(
    "options, message",
    [
        ({"part": "test"}, "part='test'"),
        ({"split": "dev"}, "split='dev'"),
        ({"weights": "sign"}, "weights='sign'"),
        ({"unsure": "keep"}, "unsure='keep'"),
        ({"path": "gone.jsonl"}, "path='gone.jsonl' is not a file"),
        ({"path": "gone.parquet"}, "path='gone.parquet' is not a file"),
        ({"path": "a/b/c"}, "path='a/b/c'"),
    ],
)
def test_wrong_options_of_rar(options, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        rar(**options)


def test_a_parquet_file_that_is_none(tmp_path):
    (tmp_path / "x.parquet").write_text("x")
    with pytest.raises(ValueError, match="x.parquet: not a Parquet file"):
        rar(path=str(tmp_path / "x.parquet"))


# --- rubric_tasks -----------------------------------------------------------------------------------------------------


def test_the_embedded_tasks():
    train, heldout = rubric_tasks(), rubric_tasks(split="heldout")
    assert (len(train), len(heldout)) == (48, 12)
    assert not overlap(train, heldout)
    assert len({problem.id for problem in (*train, *heldout)}) == 60
    criteria = [c for problem in (*train, *heldout) for c in problem.rubric.criteria]
    assert all(4 <= len(problem.rubric.criteria) <= 8 for problem in (*train, *heldout))
    assert {c.category for c in criteria} == set(CATEGORIES)
    pitfalls = [c.is_good for c in criteria if c.category == "pitfall"]
    assert pitfalls.count(True) >= 10 and pitfalls.count(False) >= 10


def test_the_embedded_tasks_are_clean():
    for problem in (*rubric_tasks(), *rubric_tasks(split="heldout")):
        assert lint(problem.rubric, name=problem.id, fewest=4) == []


def test_slices_of_the_embedded_tasks():
    assert [p.id for p in rubric_tasks(start=2, count=3)] == [p.id for p in rubric_tasks()][2:5]
    with pytest.raises(ValueError, match="count=13"):
        rubric_tasks(split="heldout", count=13)
    with pytest.raises(ValueError, match="split='test'"):
        rubric_tasks(split="test")


# --- HealthBench ------------------------------------------------------------------------------------------------------


def test_the_layout_of_healthbench(tmp_path):
    row = {
        "prompt_id": "abc",
        "prompt": [{"role": "user", "content": "My ankle is swollen."}],
        "rubrics": [
            {"criterion": "Asks how it happened.", "points": 5, "tags": ["level:example", "axis:context_seeking"]},
            {"criterion": "Prescribes opioids.", "points": -8, "tags": []},
        ],
        "canary": "x",
    }
    (problem,) = healthbench(path=write_jsonl(tmp_path / "hb.jsonl", [row]))
    assert (problem.id, problem.messages[0]["content"]) == ("abc", "My ankle is swollen.")
    asks, prescribes = problem.rubric.criteria
    assert (asks.title, asks.weight, asks.is_good) == ("context seeking", 5.0, True)
    assert (prescribes.magnitude(), prescribes.is_good) == (8.0, False)
    bad = row | {"rubrics": [{"criterion": "Asks.", "points": 0}]}
    with pytest.raises(ValueError, match=r"hb\.jsonl:2: .*has weight 0"):
        healthbench(path=write_jsonl(tmp_path / "hb.jsonl", [row, bad]))
