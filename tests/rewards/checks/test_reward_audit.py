from __future__ import annotations

import json
import random
from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from repo import GSM8K, needs_gsm8k

from rolltune.rewards.answer import answer_reward
from rolltune.rewards.checks.reward_audit import (
    Tally,
    audit,
    mutations,
    render,
    render_response,
    right_responses,
    variants,
)
from rolltune.rewards.format import format_reward
from rolltune.types import Problem, Score

FORMAT = "<think>{solution}</think>\n<answer>{answer}</answer>"


def problem(answer: str | None, *, name: str = "p", solution: str | None = None) -> Problem:
    return Problem(id=name, messages=({"role": "user", "content": "?"},), answer=answer, solution=solution)


PROBLEMS = [problem(a, name=f"p{i}") for i, a in enumerate(["18", "1800", "-3", "0", "7", "0.75", "-1234567", "10"])]


def by_kind(tallies: tuple[Tally, ...]) -> dict[str, Tally]:
    found = {tally.kind: tally for tally in tallies}
    assert len(found) == len(tallies)
    return found


def test_the_answer_reward_passes_on_numbers_words_and_expressions() -> None:
    problems = [
        *PROBLEMS,
        problem("Monday", name="text"),
        problem("3/4", name="fraction"),
        problem("3x^2", name="poly"),
    ]
    report = audit(problems, answer_reward, FORMAT, seed=0)
    assert (report.false_negatives, report.false_positives) == (0, 0), render(report)


NUMBERS = st.one_of(
    st.integers(-(10**9), 10**9).map(str),
    st.decimals(-1000, 1000, places=2, allow_nan=False).filter(lambda d: d != 0).map(str),
)


@given(NUMBERS, st.integers(0, 10**6))
def test_the_answer_reward_passes_on_any_number(answer: str, seed: int) -> None:
    report = audit([problem(answer)], answer_reward, FORMAT, seed=seed)
    assert (report.false_negatives, report.false_positives) == (0, 0), render(report)


@given(NUMBERS, st.integers(0, 10**6))
def test_no_mutation_is_the_gold_answer(answer: str, seed: int) -> None:
    wrong = mutations(answer, random.Random(seed))
    assert len({kind for kind, _ in wrong}) == len(wrong)
    for kind, text in wrong:
        try:
            value = Decimal(text)
        except ArithmeticError:
            continue
        assert value != Decimal(answer), kind


def test_kinds_for_a_plain_number() -> None:
    wrong = dict(mutations("18", random.Random(1)))
    assert wrong["off_by_one"] in ("17", "19")
    assert wrong["digit_in_front"][1:] == "18" and wrong["digit_in_front"][0] in "123456789"
    assert wrong["digit_dropped"] in ("1", "8")
    assert wrong["sign_flipped"] == "-18"
    assert wrong["times_ten"] == "180"
    assert wrong["split"] == "1 8"
    assert wrong["unworked"] == "17 + 1"
    assert wrong["guess_list"] == f"{wrong['off_by_one']}, 18"
    assert wrong["guess_or"] == f"18 or {wrong['off_by_one']}"
    assert "18" in wrong["hedge"] and wrong["hedge"] != "18"
    assert wrong["denial"] == "not 18"
    assert wrong["empty"] == ""
    assert dict(variants("-1800")) == {
        "gold": "-1800", "spaced": "\n -1800 \n", "bold": "**-1800**", "boxed": r"\boxed{-1800}",
        "math_mode": "$-1800$",
        "full_stop": "-1800.", "currency": "-$1800", "unit": "-1800 dollars", "equation": "x = -1800",
        "sentence": "The answer is -1800.", "cents": "-1800.00", "commas": "-1,800",
    }  # fmt: skip


def test_a_reward_that_looks_anywhere_in_the_turn_is_caught() -> None:
    def substring(problem: Problem, text: str) -> Score:
        return Score(total=1.0 if (problem.answer or "") in text else 0.0)

    report = audit(PROBLEMS, substring, FORMAT, seed=0)
    tallies = by_kind(report.tallies)
    # Every wrong turn has the right answer in its working.
    assert report.false_positives == sum(t.checked for t in report.tallies if t.verdict == "wrong")
    assert tallies["off_by_one"].missed == len(PROBLEMS)
    assert tallies["commas"].missed == 0
    example = tallies["empty"].examples[0]
    assert (example.problem_id, example.total) == ("p0", 1.0)
    assert example.text.endswith("So it is 18.</think>\n<answer></answer>")
    assert len(tallies["empty"].examples) == 3


def test_a_reward_that_takes_the_last_number_is_caught() -> None:
    def last_number(problem: Problem, text: str) -> Score:
        words = text.replace("</answer>", " ").replace("<answer>", " ").split()
        return Score(total=1.0 if words and words[-1].strip(".") == problem.answer else 0.0)

    report = audit(PROBLEMS, last_number, FORMAT, seed=0)
    tallies = by_kind(report.tallies)
    assert tallies["guess_list"].missed == tallies["no_tags"].missed == len(PROBLEMS)
    assert tallies["off_by_one"].missed == tallies["changed_mind"].missed == 0
    assert tallies["currency"].missed == len(PROBLEMS)  # a false negative
    assert report.false_negatives > 0


def test_unscored_counts_as_missed_on_both_sides() -> None:
    report = audit([problem("18")], lambda problem, text: Score(total=None, failure="timeout"), FORMAT, seed=0)
    assert all(tally.missed == tally.checked == 1 for tally in report.tallies)
    assert "unscored (timeout)" in render(report)


def test_a_format_reward_is_asked_for_full_marks_on_right_responses_alone() -> None:
    report = audit(PROBLEMS, format_reward, FORMAT, seed=0, wrong_responses=False)
    assert (report.false_negatives, report.false_positives) == (0, 0)
    assert {tally.verdict for tally in report.tallies} == {"right"}
    missing = audit(PROBLEMS, format_reward, "{solution} <answer>{answer}</answer>", seed=0, wrong_responses=False)
    assert missing.false_negatives == sum(tally.checked for tally in missing.tallies) > 0


def test_is_the_same_for_the_same_seed_whatever_the_order() -> None:
    texts: list[list[tuple[str, str]]] = []

    def record(problem: Problem, text: str) -> Score:
        texts[-1].append((problem.id, text))
        return Score(total=0.0)

    for problems, seed in ((PROBLEMS, 3), (PROBLEMS[::-1], 3), (PROBLEMS, 4)):
        texts.append([])
        audit(problems, record, FORMAT, seed=seed)
    assert sorted(texts[0]) == sorted(texts[1])
    assert sorted(texts[0]) != sorted(texts[2])


def test_each_problem_has_its_own_stream() -> None:
    same_answer = [problem("500", name=f"p{i}") for i in range(20)]
    said: set[str] = set()

    def record(problem: Problem, text: str) -> Score:
        said.add(text)
        return Score(total=0.0)

    audit(same_answer, record, "{answer}", seed=0)
    assert {"499", "501"} <= said


def test_turns_follow_the_format() -> None:
    turns = dict(right_responses(problem("18", solution="9 * 2 {answer}"), FORMAT))
    assert turns["gold"] == "<think>9 * 2 {answer}\nSo it is 18.</think>\n<answer>18</answer>"
    assert render_response(r"\boxed{{answer}} {x}", solution="s", answer="1") == r"\boxed{1} {x}"
    tallies = by_kind(audit([problem("18")], answer_reward, "Answer: {answer}", seed=0).tallies)
    assert not {"no_tags", "cut_off", "swapped"} & set(tallies)  # no tags, no room for working
    assert tallies["gold"].missed == 1


@pytest.mark.parametrize(("answer", "answer_format", "message"), [
    (None, FORMAT, "'p' has no gold answer"),
    ("18", "<answer>18</answer>", r"must contain \{answer\}"),
])  # fmt: skip
def test_refuses_what_cannot_be_audited(answer: str | None, answer_format: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        audit([problem(answer)], answer_reward, answer_format, seed=0)


def test_render_shows_counts_and_the_end_of_a_missed_response() -> None:
    report = audit([problem("18")], lambda problem, text: Score(total=0.5), FORMAT, seed=0)
    lines = render(report).splitlines()
    assert lines[0].split() == ["label", "kind", "checked", "missed"]
    assert lines[1].split() == ["right", "gold", "1", "1"]
    assert f"false negatives: {report.false_negatives}, false positives: {report.false_positives}" in lines
    example = next(line for line in lines if line.startswith("wrong guess_or, p: scored 0.5: '..."))
    assert example.endswith("</answer>'")
    assert render(audit([], answer_reward, FORMAT, seed=0)).endswith("false negatives: 0, false positives: 0")


@needs_gsm8k
def test_the_answer_reward_passes_on_gsm8k() -> None:
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()][::10]
    problems = []
    for i, row in enumerate(rows):
        solution, _, gold = row["answer"].rpartition("#### ")
        problems.append(problem(gold.replace(",", ""), name=f"gsm8k/{i}", solution=solution))
    report = audit(problems, answer_reward, FORMAT, seed=0)
    assert (report.false_negatives, report.false_positives) == (0, 0), render(report)
    assert by_kind(report.tallies)["gold"].checked == 748
