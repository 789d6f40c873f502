# ruff: noqa: E501
from __future__ import annotations

import pytest

from rolltune.rewards.answer import gold_kind, grade
from rolltune.rewards.answers.kind import Kind, read_choice, read_gold, read_stated_choice
from rolltune.types import Problem

KINDS = {
    "number": [
        "18", "-3.5", "1,800", "$29", "016", "007", r"10,\!000", r"-1,\!000", r"11,\! 111,\! 111,\! 100", "1e-07", "6.02e23",
        r"1.6\times10^{-19}", "10^6", "5 inches", r"5\text{ inches}", "3/4", r"\frac{11}3", "4 4/9", r"90^\circ", "28%",
        "x = 18", r"\boxed{000}", "18th", "36/2", "60 miles per hour",
    ],
    "choice": ["B", "(C)", r"\text{E}", r"\boxed{\text{(A)}}."],
    "expression": [
        r"2\sqrt{3}", "x^2+1", "2x", "2xy", "ab/2", "x-1", "n/2", "x+y", r"\frac{\pi}{2}", "f(x)=x^2", "2x+4y-3=0", "x < 3",
        r"k \ge 2", "2+2", "5!", "12.0 - 1.0i", r"\log_2 8", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", "y=2x+1", "x", r"36\pi\text{ cm}^2",
        "D = (0, 1)",
    ],
    "list": ["(1, 2)", "0,1", "3,11,33", r"(-\infty, 3]", "[1,2]", r"(1,\frac{9}{2})", "n=2, 3, 4"],
    "set": [r"\{1, 2\}", "6 and 8", r"(-\infty,-1)\cup(1,\infty)", "(11,7) or (7,11)", "x=5 and y=3"],
    "text": [
        "12/25/2024", "2024/03/05", "2024-03-05", "1/2/3", "7-11", "[1-9]", "1999-2000", "1101-1010", "555-0123", "12:00",
        "3:4", "W-L-W", "Q-K-J", "a b c", "A B C", "N E", "AB", "(AB)", "(no)", "(ix)", "DC/AB", "A, C", "1ba", "3 pm", "Yes",
        "no solution", "March 5, 2024", "H_2O", "C_6H_{12}O_6", "192.168.0.1", "Paris", "18 million", "{}", "**",
    ],
}  # fmt: skip


@pytest.mark.parametrize(("kind", "gold"), [(kind, gold) for kind, golds in KINDS.items() for gold in golds])
def test_a_gold_answer_has_one_kind_and_is_earned_by_writing_it_down(kind: str, gold: str) -> None:
    assert gold_kind(Problem(id="p", messages=(), answer=gold)) == kind


@pytest.mark.parametrize(
    ("gold", "kind", "right", "wrong"),
    [
        ("0110", "text", "0110", "110"),
        ("3, -2", "set", "-2, 3", "2, 3"),
        ("12/25", "text", "12/25", "0.48"),
        ("AB+C", "text", "ab+c", "C+AB"),
        ("ab", "expression", "ba", "a"),
        ("7-11", "expression", "-4", "11-7"),
        ("B", "expression", "B", "b"),
        ("18", "expression", "12 + 6", "12 + 7"),
        ("1,5", "number", "1.5", "1, 5"),
    ],
)
def test_the_config_overrides_the_kind(gold: str, kind: Kind, right: str, wrong: str) -> None:
    assert read_gold(gold, kind).kind == kind
    assert grade(gold, f"<answer>{right}</answer>", kind=kind).correct
    assert not grade(gold, f"<answer>{wrong}</answer>", kind=kind).correct


@pytest.mark.parametrize(
    ("gold", "kind", "message"),
    [
        ("Monday", "number", "'Monday' is not of the kind 'number'; kind: auto reads it as text"),
        ("18", "choice", "reads it as number"),
        ("two words here", "expression", "reads it as text"),
        ("18", "algebra", "kind: 'algebra'; must be one of auto, number, choice, expression, list, set, text"),
    ],
)
def test_a_gold_answer_of_another_kind_is_refused(gold: str, kind: Kind, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_gold(gold, kind)


@pytest.mark.parametrize("text", ["B", "(B)", "B)", "B.", "[B]", "Option B", "choice B:"])
def test_a_letter_is_stated_with_or_without_brackets(text: str) -> None:
    assert read_choice(text) == "B"


@pytest.mark.parametrize("text", ["b", "(b)", "A or B", "AB", "A, B", "not B", "B?", "B C", "B) 42"])
def test_no_letter_is_stated(text: str) -> None:
    assert read_choice(text) is None


@pytest.mark.parametrize(
    "text",
    ["B", "(B) 42", "B) 42", "B. abundant", "B: 60 J", "B - Goethe", "B (no)", "B, carbon dioxide", "(B)", "Option B is correct",
     "(B), because it does not change", "B. 2x + 1"],
)  # fmt: skip
def test_an_answer_may_add_the_text_of_the_choice(text: str) -> None:
    assert read_stated_choice(text) == "B"


@pytest.mark.parametrize(
    "text",
    ["b", "A or B", "B) or C)", "(A) yes (B) no", "B. No wait, A.", "B, D", "B 42", "Both", "A function of x", "B is wrong", "B. maybe",
     "(B) is not correct", "B, I think", "B isn't it", "B is not correct", "not (B) 42"],
)  # fmt: skip
def test_but_not_another_letter_or_a_doubt(text: str) -> None:
    assert read_stated_choice(text) is None
