"""Rubrics on disk: lines, what is refused, and the file that is shared with traces."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolltune.rewards.rubric.schema import CATEGORIES, Criterion, Rubric
from rolltune.types import Problem
from rolltune.writers.rubric_records import RubricRecord, from_line, read_rubrics, rubric_file, to_line

PROBLEM = Problem(id="q/0", messages=({"role": "user", "content": "Why?"},), answer="So.", solution=None)
RUBRIC = Rubric.of(
    Criterion(title="Reason", description="Names a reason.", category="essential", satisfied_is_good=True),
    Criterion(title="Blame", description="Blames others.", category="pitfall", satisfied_is_good=False),
)
RECORD = RubricRecord(problem=PROBLEM, rubric=RUBRIC, provenance={"writer": "w", "reference": "yes"})


def record(name: str) -> RubricRecord:
    return RubricRecord(
        problem=Problem(id=name, messages=PROBLEM.messages), rubric=RUBRIC, provenance=RECORD.provenance
    )


def test_a_line():
    line = to_line(RECORD)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert json.loads(line) == {
        "problem": {"id": "q/0", "messages": [{"role": "user", "content": "Why?"}], "answer": "So.", "solution": None},
        "rubric": {
            "criteria": [
                {
                    "title": "Reason",
                    "description": "Names a reason.",
                    "category": "essential",
                    "satisfied_is_good": True,
                },
                {
                    "title": "Blame",
                    "description": "Blames others.",
                    "category": "pitfall",
                    "satisfied_is_good": False,
                },
            ]
        },
        "provenance": {"writer": "w", "reference": "yes"},
    }


def test_the_problem_s_own_rubric_is_not_written():
    mine = Problem(id="q/0", messages=PROBLEM.messages, answer="So.", rubric=Rubric.of(RUBRIC.criteria[1]))
    assert to_line(RubricRecord(problem=mine, rubric=RUBRIC, provenance=RECORD.provenance)) == to_line(RECORD)


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)
WORDS = TEXT.filter(lambda text: text.strip() == text)
CRITERION = st.builds(
    Criterion,
    title=WORDS,
    description=WORDS,
    category=st.sampled_from(CATEGORIES),
    weight=st.floats(0.1, 9) | st.none(),
    satisfied_is_good=st.booleans(),
)


@settings(max_examples=50, deadline=None)
@given(TEXT, TEXT, TEXT | st.none(), st.lists(CRITERION, min_size=1, max_size=3))
def test_what_is_written_is_read(name, text, answer, criteria):
    problem = Problem(id=name, messages=({"role": "user", "content": text},), answer=answer, solution=answer)
    whole = RubricRecord(problem=problem, rubric=Rubric.of(*criteria), provenance={"writer": text})
    line = to_line(whole)
    assert from_line(line) == whole and b"\n" not in line[:-1]


GOOD = json.loads(to_line(RECORD))


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ("{", "Invalid JSON"),
        ({k: v for k, v in GOOD.items() if k != "rubric"}, "rubric: Field required"),
        (GOOD | {"more": 1}, "more: Extra inputs are not permitted"),
        (GOOD | {"rubric": {"criteria": []}}, "rubric.criteria: Tuple should have at least 1 item"),
        (
            GOOD | {"rubric": {"criteria": [{"title": "A", "description": "Is x."}]}},
            "rubric.criteria.0: Value error, 'A' has neither a category",
        ),
        (GOOD | {"problem": GOOD["problem"] | {"id": ""}}, "problem.id: String should have at least 1 character"),
        (GOOD | {"provenance": {"t": 0.5}}, "provenance.t: Input should be a valid string"),
    ],
)
def test_a_broken_line_is_named(tmp_path, row, says):
    path = tmp_path / "rubrics.jsonl"
    path.write_text(f"{to_line(record('a')).decode()}{row if isinstance(row, str) else json.dumps(row)}\n")
    with pytest.raises(ValueError) as broken:
        read_rubrics(path)
    assert str(broken.value).startswith(f"{path}:2: {says}")


def test_a_problem_has_one_rubric(tmp_path):
    path = tmp_path / "rubrics.jsonl"
    path.write_bytes(to_line(record("a")) + to_line(record("b")) + to_line(record("a")))
    with pytest.raises(ValueError, match=r"rubrics\.jsonl:3: a is also in line 1"):
        read_rubrics(path)


def test_append_cut_and_sort(tmp_path):
    path = tmp_path / "out" / "rubrics.jsonl"
    with rubric_file(path) as file:
        file.append(record("b"))
        file.append(record("a"))
    path.write_bytes(path.read_bytes() + to_line(record("c"))[:-20])
    with rubric_file(path) as file:
        assert file.done == {("b", 0), ("a", 0)}
        file.sort([record("a").problem, record("b").problem])
    assert [r.problem.id for r in read_rubrics(path)] == ["a", "b"]
