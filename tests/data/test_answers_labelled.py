"""Labelled answers: the packaged set is as documented, and errors name the mistakes in your own file."""

import json
from collections import Counter

import pytest

from rolltune.data.answers_labelled import answers_labelled
from rolltune.rewards.answer import gold_kind

ANSWERS = answers_labelled()
RECORD = {
    "id": "sum",
    "question": "What is 1 + 1?",
    "gold": "2",
    "working": "One and one are two.",
    "answers": [
        {"answer": "2", "right": True, "kind": "plain"},
        {"answer": "3", "right": False, "kind": "slip", "working": "I count three."},
        {"answer": None, "right": False, "kind": "cut off"},
    ],
}


@pytest.fixture
def write(tmp_path):
    def write(*records) -> str:
        (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n")
        return str(tmp_path / "own.jsonl")

    return write


def test_the_packaged_set_is_what_the_docstring_says():
    problems = {answer.problem.id for answer in ANSWERS}
    assert answers_labelled.__doc__ is not None
    assert f"{len(ANSWERS)} answers to {len(problems)} problems" in answers_labelled.__doc__
    assert {name.partition("/")[0] for name in problems} == {"gsm8k", "math", "aime", "dapo", "choice"}
    pairs = Counter((answer.problem.id, answer.answer, answer.problem.solution) for answer in ANSWERS)
    assert max(pairs.values()) == 1


def test_every_problem_has_right_and_wrong_answers_and_a_gold_answer_that_can_be_earned():
    for name in {answer.problem.id for answer in ANSWERS}:
        of_problem = [answer for answer in ANSWERS if answer.problem.id == name]
        assert {answer.right for answer in of_problem} == {True, False}
        gold_kind(of_problem[0].problem)
        same_as_gold = [answer.right for answer in of_problem if answer.answer == of_problem[0].problem.answer]
        assert same_as_gold in ([], [True])
    assert all(answer.answer is not None for answer in ANSWERS if answer.right)


def test_a_file_of_your_own(write):
    right, wrong, cut = answers_labelled(path=write(RECORD))
    assert (right.problem.id, right.problem.answer, right.kind, right.right) == ("sum", "2", "plain", True)
    layout = "<think>{solution}</think> <answer>{answer}</answer>"
    assert right.response(layout) == "<think>One and one are two.</think> <answer>2</answer>"
    assert wrong.response(layout) == "<think>I count three.</think> <answer>3</answer>"
    assert cut.response(layout) == "<think>One and one are two."


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (RECORD | {"gold": " "}, "gold: "),
        (RECORD | {"answers": []}, "answers: "),
        (RECORD | {"answers": [{"answer": "2", "right": "yes", "kind": "plain"}]}, "right: .*'yes'"),
        (RECORD | {"answers": [{"answer": 2, "right": True, "kind": "plain"}]}, "answer: "),
        (RECORD | {"label": 1}, "label: "),
        (RECORD, "the id 'sum' is already at .*own.jsonl:1"),
    ],
)
def test_a_mistake_is_named_with_its_line(write, record, says):
    with pytest.raises(ValueError, match=f"own.jsonl:2: .*{says}"):
        answers_labelled(path=write(RECORD, {"id": "b"} | record if record is RECORD else record | {"id": "b"}))


def test_a_missing_or_empty_file(tmp_path):
    with pytest.raises(ValueError, match="path='nowhere.jsonl' is not a file"):
        answers_labelled(path="nowhere.jsonl")
    (tmp_path / "own.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="no records"):
        answers_labelled(path=str(tmp_path / "own.jsonl"))
