"""benchmarks/answer_checkers.py with checkers of known weaknesses, and the numbers in the docs."""

from __future__ import annotations

import importlib
import re
import sys

from repo import ROOT

from rolltune.data.answers_labelled import answers_labelled
from rolltune.rewards.checks.reward_audit import LabelledAnswer
from rolltune.types import Problem

sys.path.insert(0, str(ROOT / "benchmarks"))  # as when the script runs
script = importlib.import_module("answer_checkers")

SUM = Problem(id="gsm8k/1", messages=(), answer="18", solution="9 + 9.")
ANSWERS = [
    LabelledAnswer(problem=SUM, answer=answer, right=right, kind="k")
    for answer, right in (("18", True), ("$18$", True), ("17", False), (None, False))
]


def test_layouts():
    assert [script.response(answer, "box") for answer in ANSWERS] == [
        "9 + 9.\n\n\\boxed{18}", "9 + 9.\n\nThe final answer is $18$", "9 + 9.\n\n\\boxed{17}", "9 + 9.",
    ]  # fmt: skip
    assert script.response(ANSWERS[0], "####") == "9 + 9.\n#### 18"
    assert [script.response(answer, "answer only") for answer in ANSWERS[2:]] == ["17", "9 + 9."]


def test_each_checker_is_shown_with_its_best_layout():
    def hashes(golds, responses):
        return ["#### " in text for text in responses]

    found = script.measure(ANSWERS, {"hashes": hashes, "none": lambda golds, responses: [False] * len(golds)})
    assert found["rolltune"] == ("tags", {"fn": 0, "fp": 0})
    assert found["hashes"] == ("####", {"fn": 0, "fp": 1, "gsm8k/fp": 1})
    assert found["none"] == ("box", {"fn": 2, "fp": 0, "gsm8k/fn": 2})
    assert script.table(ANSWERS, found).splitlines()[-2:] == [
        "| hashes | #### | 0 / 1 | 0 / 1 |",
        "| none | box | 2 / 0 | 2 / 0 |",
    ]


def test_the_docs_show_what_is_measured():
    answers = answers_labelled()
    head, _, ours = script.table(answers, script.measure(answers, {})).splitlines()
    page = (ROOT / "docs/rewards.md").read_text()
    assert head in page and ours in page
    problems = len({answer.problem.id for answer in answers})
    assert f"{len(answers)} answers to {problems} problems" in re.sub(r"\s+", " ", page)
