"""Countdown problems: solvable, in disjoint splits, and reproducible."""

from __future__ import annotations

import json

import pytest

from rolltune.data.countdown import Term, combine, countdown, countdown_records, given, solve, steps
from rolltune.rewards.countdown import countdown_reward, parse_expression
from rolltune.types import Problem

EASY = {"sizes": [3], "low": 1, "high": 12, "min_target": 5, "max_target": 40, "operations": "+-*"}


def test_the_gold_answer_reaches_the_target_with_the_numbers():
    for problem in countdown(count=200, seed=1):
        question = problem.messages[0]["content"]
        numbers = [int(n) for n in question.split("numbers ")[1].split(", create")[0].replace(" and", ",").split(", ")]
        target = int(question.split("equals ")[1].split(".")[0])
        gold = parse_expression(problem.answer)
        assert gold.value == target and gold.numbers == tuple(sorted(numbers))
        assert (sorted(given(problem)[0]), given(problem)[1]) == (sorted(numbers), target)
        assert countdown_reward(problem, f"<answer>{problem.answer}</answer>").total == 1.0
        assert 10 <= target <= 100 and all(1 <= n <= 99 for n in numbers) and len(numbers) in (3, 4)


def test_the_steps_of_a_solution_add_up():
    for problem in countdown(count=100, seed=2):
        *equations, end = problem.solution.split(".")
        assert end == ""
        for equation in equations:
            left, right = equation.split(" = ")
            assert parse_expression(left).value == int(right)


def test_short_wording():
    (problem,) = countdown(count=1, wording="short", **EASY)
    numbers, target = given(problem)
    assert problem.messages[0]["content"].startswith(f"Make {target} from ")
    assert len(numbers) == 3


def test_no_problem_is_in_both_splits_or_twice():
    def keys(**options):
        return {(tuple(sorted(given(p)[0])), given(p)[1]) for p in countdown(**options, **EASY)}

    train, heldout, test = (
        keys(count=800, seed=0),
        keys(count=100, seed=7, split="heldout"),
        keys(count=100, seed=7, split="test"),
    )
    assert not train & heldout and not train & test and not heldout & test
    assert (len(train), len(heldout), len(test)) == (800, 100, 100)


def test_the_same_seed_gives_the_same_problems():
    assert list(countdown(count=20, seed=3)) == list(countdown(count=30, seed=3))[:20]
    assert list(countdown(count=20, seed=3)) != list(countdown(count=20, seed=4))


@pytest.mark.parametrize(
    "options, message",
    [
        ({"count": 0}, "count=0"),
        ({"split": "dev"}, "split='dev'"),
        ({"sizes": [7]}, r"sizes=\[7\]"),
        ({"sizes": []}, r"sizes=\[\]"),
        ({"low": 0}, "low=0"),
        ({"high": 0}, "high=0"),
        ({"max_target": 9}, "max_target=9"),
        ({"operations": "+^"}, r"operations='\+\^'"),
        ({"wording": "long"}, "wording='long'"),
        ({"sizes": [2], "high": 3, "min_target": 3, "count": 50}, "count=50 is too many"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        countdown(**({"count": 5} | options))


@pytest.mark.parametrize(
    "left, operation, right, result",
    [
        (Term(3, "3"), "+", Term(5, "5"), (8, "3 + 5")),
        (Term(8, "3 + 5", 2), "*", Term(2, "2"), (16, "(3 + 5) * 2")),
        (Term(9, "9"), "-", Term(8, "3 + 5", 2), (1, "9 - (3 + 5)")),
        (Term(9, "9"), "+", Term(2, "5 - 3", 2), (11, "9 + 5 - 3")),
        (Term(9, "9"), "-", Term(6, "3 * 2", 1), (3, "9 - 3 * 2")),
        (Term(12, "12"), "/", Term(6, "3 * 2", 1), (2, "12 / (3 * 2)")),
        (Term(6, "3 * 2", 1), "/", Term(6, "6"), (1, "3 * 2 / 6")),
        (Term(6, "3 * 2", 1), "*", Term(2, "8 / 4", 1), (12, "3 * 2 * 8 / 4")),
        (Term(7, "7"), "/", Term(2, "2"), None),
        (Term(3, "3"), "-", Term(3, "3"), None),
        (Term(3, "3"), "-", Term(4, "4"), None),
        (Term(500, "500"), "*", Term(3, "3"), None),
    ],
)
def test_combine(left, operation, right, result):
    step = combine(left, operation, right)
    assert (step and (step.result.value, step.result.text)) == result
    if step:
        assert parse_expression(step.result.text).value == step.result.value


def test_steps_come_once_each():
    found = [(s.left.value, s.operation, s.right.value) for s, _ in steps([Term(6, "6"), Term(3, "3"), Term(3, "3")])]
    assert len(found) == len(set(found))
    assert set(found) == {(6, "+", 3), (6, "-", 3), (6, "*", 3), (6, "/", 3), (3, "+", 3), (3, "*", 3), (3, "/", 3)}


def test_solve_finds_a_solution_or_says_that_there_is_none():
    path = solve([3, 5, 2], 16)
    assert path is not None and path[-1].result.value == 16
    assert parse_expression(path[-1].result.text).numbers == (2, 3, 5)
    assert solve([1, 1, 1], 50) is None
    assert solve([24], 24) == []


# --- records of a file ------------------------------------------------------------------------------------------------


def write_records(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(path)


def test_records_are_solved_and_unsolvable_and_repeated_ones_are_left_out(tmp_path):
    path = write_records(
        tmp_path / "records.jsonl",
        [
            {"nums": [44, 19, 35], "target": 98},
            {"nums": [1, 1, 1], "target": 50},
            {"nums": [3, 5, 2], "target": 16},
            {"nums": [2, 5, 3], "target": 16},  # the third again
        ],
    )
    splits = [countdown_records(path=path, count=4, split=split) for split in splits_with_records(path)]
    first, second = sorted((problem for dataset in splits for problem in dataset), key=lambda problem: problem.id)
    assert (first.id, second.id) == ("countdown/train/0", "countdown/train/2")
    assert "numbers 44, 19 and 35, create an equation that equals 98" in first.messages[0]["content"]
    assert parse_expression(first.answer).value == 98


def splits_with_records(path: str) -> list[str]:
    found = []
    for split in ("train", "heldout", "test"):
        try:
            countdown_records(path=path, count=4, split=split)
        except ValueError as error:
            assert f"no {split} problem" in str(error)
        else:
            found.append(split)
    return found


def test_the_order_of_the_numbers_does_not_change_the_split(tmp_path):
    drawn = [countdown(count=30, seed=5, split=split) for split in ("train", "heldout", "test")]
    records = [{"nums": given(p)[0][::-1], "target": given(p)[1]} for problems in drawn for p in problems]
    path = write_records(tmp_path / "records.jsonl", records)
    for split, problems in zip(("train", "heldout", "test"), drawn, strict=True):
        found = countdown_records(path=path, count=len(records), split=split)
        assert sorted(map(given, found)) == sorted(map(given, problems))


@pytest.mark.parametrize(
    "records, options, message",
    [
        ([{"nums": [1], "target": 1}], {}, r"record 0: nums=\[1\]"),
        ([{"nums": [1, 2], "target": 0}], {}, "target=0"),
        ([{"numbers": [1, 2], "target": 3}], {}, "nums=None"),
        ([{"nums": [1, 2], "target": 3}], {"count": 2}, "count=2"),
    ],
)
def test_bad_records(records, options, message, tmp_path):
    path = write_records(tmp_path / "records.jsonl", records)
    with pytest.raises(ValueError, match=message):
        countdown_records(path=path, **({"count": 1} | options))


def test_numbers_that_pandas_wrote_as_floats(tmp_path):
    path = write_records(tmp_path / "records.jsonl", [{"nums": [3.0, 4.0, 5.0], "target": 12.0}])
    found = [p for split in ("train", "heldout", "test") for p in _any(path, split)]
    assert [given(problem)[1] for problem in found] == [12]
    path = write_records(tmp_path / "half.jsonl", [{"nums": [3.5, 4], "target": 7}])
    with pytest.raises(ValueError, match=r"nums=\[3.5"):
        countdown_records(path=path, count=1)


def _any(path: str, split: str) -> list:
    try:
        return list(countdown_records(path=path, count=1, split=split))
    except ValueError as error:
        assert "have no" in str(error)
        return []


def test_a_path_that_is_nothing():
    with pytest.raises(ValueError, match="neither a .jsonl or .parquet file nor a Hub id"):
        countdown_records(path="nowhere")
    with pytest.raises(ValueError, match="path='nowhere.jsonl'"):
        countdown_records(path="nowhere.jsonl")


@pytest.mark.parametrize(
    "answer, message", [("2 / 3", "is not a positive integer"), ("Monday", "is not an expression")]
)
def test_numbers_and_target_come_from_the_gold_answer(answer, message):
    assert given(Problem(id="p", messages=(), answer="(3 + 5) * 2")) == ([2, 3, 5], 16)
    with pytest.raises(ValueError, match=f"p: the gold answer '{answer}' {message}"):
        given(Problem(id="p", messages=(), answer=answer))
