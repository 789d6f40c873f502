from __future__ import annotations

import json
import sys
import threading
import time
from fractions import Fraction

import math_verify
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from repo import GSM8K, needs_gsm8k

from rolltune.rewards import answer as answer_module
from rolltune.rewards.answer import (
    MAX_ANSWER_CHARS,
    Grade,
    answer_reward,
    gold_kind,
    grade,
    lenient_answer_reward,
    lenient_number,
    voted_answer,
)
from rolltune.rewards.answers.evaluate import OutOfTime
from rolltune.rewards.answers.kind import read_gold
from rolltune.rewards.answers.normalise import normalise
from rolltune.types import Problem, Score


def problem(answer: str | None) -> Problem:
    return Problem(id="p/7", messages=({"role": "user", "content": "?"},), answer=answer)


def response(answer: str, working: str = "Working gives 18.") -> str:
    return f"<think>{working}</think>\n<answer>{answer}</answer>"


def is_correct(gold: str, text: str) -> bool:
    return grade(gold, text).correct


RIGHT = [
    ("18", "18"), ("18", " 18\n"), ("18", "18."), ("18", "18.0"), ("18", "18.00"), ("18", "+18"), ("0", "0"),
    ("18", "$18"), ("18", "$18.00"), ("18", "$ 18"), ("18", "18$"), ("18", r"\$18"), ("18", "€18"), ("18", "18%"),
    ("18", r"18\%"), ("18", "18 %"), ("18", "18 dollars"), ("18", "18 dollars."), ("18", "18dollars"), ("18", "18 cm"),
    ("18", "18kg"), ("18", "18 m"), ("60", "60 miles per hour"), ("60", "60 miles/hour"), ("18", "$18/hour"),
    ("18", "$18 per hour."), ("18", "18 square feet per minute"), ("18", "18°"), ("18", "18 °C"),
    ("18", "18 years old"),
    ("18", "**18**"), ("18", "**18.**"), ("18", "**$18**"), ("18", "`18`"), ("18", "$18$"), ("18", "$$18$$"),
    ("18", r"\boxed{18}"), ("18", r"$\boxed{18}$."), ("18", r"\(18\)"), ("18", r"\[ 18 \]"), ("18", r"\text{18}"),
    ("18", r"18\text{ dollars}"), ("18", r"$\boxed{18\text{ cm}}$"), ("18", r"\boxed{\textbf{18}}"),
    ("18", "x = 18"), ("18", "x=18"), ("18", "$x = 18$"), ("18", "x_1 = 18"), ("18", "total = $18"), ("18", "a = 18"),
    ("18", "The answer is 18."), ("18", "the final answer is: 18"), ("18", "Answer: 18"), ("18", "Answer: **$18.00**"),
    ("1800", "1,800"), ("1800", "$1,800.00"), ("1800", "1{,}800"), ("1800", r"1\,800"), ("1234567.5", "1,234,567.5"),
    ("1,800", "1800"), ("$1,800", "1800"),
    ("-3", "-3"), ("-3", "-$3"), ("-3", "$-3"), ("-3", "\u22123"), ("-3", "x = -3"), ("-3", "-3.0"),
    ("0.5", ".5"), ("0.75", "3/4"), ("0.75", "6/8"), ("0.75", "3 / 4"), ("3/4", "0.75"), ("-0.75", "-3/4"),
    ("0.75", r"\frac{3}{4}"), ("0.75", r"$\frac{3}{4}$"), ("0.75", r"\dfrac{3}{4}"), ("0.75", r"\frac34"),
    ("-0.75", r"-\frac{3}{4}"), ("-0.75", r"\frac{-3}{4}"), (r"\frac{3}{4}", "3/4"), ("0.75", "3/4 cup"),
    ("12345678901234567890", "12,345,678,901,234,567,890"),
    ("18", "kr 18"), ("18", "Rp18"), ("18", "Rs. 18"),
    ("1800", "1 800"), ("1234567", "1 234 567 people"), ("-1800.5", "-1 800.5"),
    ("18", "m + n = 18"), ("18", "$a+b-c=18$"), ("18", r"$m+n=\boxed{18}$"),
    ("18", "The total cost is $18."), ("60", "Her average speed is 60 miles per hour."),
    ("18", "There are 18 such pairs."),
    ("18", "Hence the sum of the squares of the roots is 18."),
    ("7/12", r"$\frac{7}{12} \approx 0.583$"), ("7/12", "7/12 \u2248 0.58"), ("7/12", r"P = 7/12 \approx 0.6"),
    ("999", r"Final Answer: The final answer is $\boxed{999}$. I hope it is correct."),
]  # fmt: skip


@pytest.mark.parametrize(("gold", "answer"), RIGHT)
def test_right(gold: str, answer: str) -> None:
    score = answer_reward(problem(gold), response(answer))
    assert (score.total, score.failure) == (1.0, None)


# Wrong for gold 18, and what is said of it; None: a number, but another one.
WRONG = [
    ("118", None), ("181", None), ("8", None), ("1", None), ("-18", None), ("180", None), ("17", None), ("19", None),
    ("18.5", None), ("18.01", None), ("0.18", None), ("18,000", None), ("1.8", None), ("18/5", None), ("180%", None),
    ("18.000000001", None), ("17.9999999999", None),
    ("17, 18", "ambiguous"), ("18, 19", "ambiguous"), ("18 or 19", "ambiguous"), ("17 18 19", "ambiguous"),
    ("18 19", "ambiguous"), ("18\n19", "ambiguous"), ("17; 18", "ambiguous"), ("17 and 18", "ambiguous"),
    ("18 18", "ambiguous"), ("either 17 or 18", "ambiguous"), ("18 dollars or 19 dollars", "ambiguous"),
    ("18 dollars and 50 cents", "ambiguous"), (r"\boxed{17}\boxed{18}", "ambiguous"), ("$17$ $18$", "ambiguous"),
    ("**17** **18**", "ambiguous"), ("{17, 18}", "ambiguous"), ("[18]", "unparseable"), ("(18)", "unparseable"),
    ("x = 17, 18", "ambiguous"), ("17|18", "ambiguous"), ("17-18", "unparseable"), ("18 +/- 1", "unparseable"),
    ("18±1", "ambiguous"), ("17 = 18", "unparseable"), ("x = 17 = 18", "unparseable"), ("18 eighteen", "unparseable"),
    ("18 nineteen", "unparseable"), ("18 or nineteen", "ambiguous"),
    ("maybe 18", "ambiguous"), ("about 18", "ambiguous"), ("probably 18", "ambiguous"), ("18?", "ambiguous"),
    ("18, I think", "ambiguous"), ("18 I think", "ambiguous"), ("18 maybe", "ambiguous"), ("18ish", "ambiguous"),
    ("~18", "ambiguous"), ("\u224818", "ambiguous"), ("I guess 18", "ambiguous"), ("maybe = 18", "ambiguous"),
    ("18 or so", "ambiguous"), ("at least 18", "unparseable"), ("> 18", "unparseable"), ("18+", "unparseable"),
    ("not 18", "ambiguous"), ("18 is wrong", "ambiguous"), ("18 wrong", "ambiguous"), ("not = 18", "ambiguous"),
    ("The answer is not 18", "ambiguous"), ("never 18", "ambiguous"), ("18 is not it", "ambiguous"),
    ("x \u2260 18", "unparseable"), ("!18", "unparseable"), ("18!", "unparseable"), ("18 false", "ambiguous"),
    (r"\text{not }18", "ambiguous"),
    ("12 + 6", "unparseable"), ("12+6", "unparseable"), ("12 + 6 = 18", "unparseable"), ("6 * 3", "unparseable"),
    ("36/2", "unparseable"), ("18/1", "unparseable"), (r"\frac{36}{2}", "unparseable"), (r"\sqrt{324}", "unparseable"),
    ("18^1", "unparseable"), ("18 + 0", "unparseable"), ("18 squared", "unparseable"), ("18/0", "unparseable"),
    ("1 8", "ambiguous"), ("1,8", None), ("1,8,", "ambiguous"), ("0,018", "ambiguous"),
    ("18..", "unparseable"), ("18.0.0", "unparseable"),
    ("18 1/2", None), ("0x12", "ambiguous"),
    ("1_8", "ambiguous"), ("--18", "unparseable"), ("- 18", None), ("-$-18", "unparseable"),
    ("'18'", "unparseable"),
    ("18k", "unparseable"), ("18 k", "unparseable"), ("18M", "unparseable"), ("18 million", "unparseable"),
    ("18 thousand", "unparseable"), ("18 dozen", "unparseable"), ("18 halves", "unparseable"), ("18x", "unparseable"),
    ("18 pi", "unparseable"), ("18 hundredths", "unparseable"),
    ("\u0661\u0668", "unparseable"),
    ("\u2461\u2467", "unparseable"),
    ("18\u00b2", "unparseable"), ("nan", "unparseable"), ("inf", "unparseable"), ("-inf", "unparseable"),
    ("infinity", "unparseable"), ("eighteen", "unparseable"), ("XVIII", "unparseable"), ("I do not know.", "ambiguous"),
    ("9**9**9", "unparseable"), ("9^9^9^9", "unparseable"), ("factorial(18)", "unparseable"), ("%", "unparseable"),
    ("__import__('os')", "unparseable"), ("(" * 100 + "18" + ")" * 100, "unparseable"), ("dollars", "unparseable"),
    ("{" * 250, "unparseable"), ("$" * 250, "unparseable"), ("*" * 250, "unparseable"),
    (r"\boxed{" * 30, "unparseable"),
    ("Natalia sold 18 clips", "unparseable"), ("18 <answer", "unparseable"), (".", "unparseable"), ("-", "unparseable"),
    ("", "empty"), (" \n\t", "empty"),
    ("18 = 18", "unparseable"), ("x + 2 = 18", "unparseable"), 
    ("The wrong answer is 18", "ambiguous"), ("The answer is maybe 18", "ambiguous"),
    ("There are 18 or 19", "ambiguous"), ("There are not 18", "ambiguous"), ("Half the total is 18", "ambiguous"),
    ("The half is 18", "ambiguous"), ("The total is 17 and the rest is 18", "ambiguous"),
    (r"x \approx 18", "ambiguous"), (r"18 \approx 19", "ambiguous"), (r"18 \approx 18.2", "ambiguous"),
    (r"17.9 \approx 18", None), (r"\sqrt{324} \approx 18.0", "unparseable"),
    (r"18 \approx 18.0 \approx 18", "ambiguous"),
    (r"18 \approx x", "ambiguous"), ("1 8 000", "ambiguous"), ("0 018", "ambiguous"), ("18 0000", "ambiguous"),
    ("18" * 200, "too_long"), ("18" + " " * 300 + "dollars", "too_long"),
]  # fmt: skip


@pytest.mark.parametrize(("answer", "failure"), WRONG)
def test_wrong(answer: str, failure: str | None) -> None:
    score = answer_reward(problem("18"), response(answer))
    assert (score.total, score.failure) == (0.0, failure)


@pytest.mark.parametrize(
    ("text", "failure"),
    [
        ("18", "no_answer"),
        ("The answer is 18.", "no_answer"),
        (r"\boxed{18}", "no_answer"),
        ("#### 18", "no_answer"),
        ("", "no_answer"),
        ("<think>18</think>", "no_answer"),
        ("<think>It is <answer>18</answer></think>", "no_answer"),
        ("<answer>18", "no_answer"),
        ("18</answer>", "no_answer"),
        ("<think>18</think><answer>17</answer>", None),
        ("<answer>18</answer> No: <answer>17</answer>", None),
        ("<answer>17</answer>18</answer>", "unparseable"),
        ("<answer>18</answer><answer></answer>", "empty"),
    ],
)
def test_only_the_last_block_counts(text: str, failure: str | None) -> None:
    score = answer_reward(problem("18"), text)
    assert (score.total, score.failure) == (0.0, failure)


def test_a_block_is_enough_without_the_rest_of_the_format() -> None:
    assert answer_reward(problem("18"), "Hm. <answer>17</answer> No: <answer>18</answer> That is it.").total == 1.0


def test_percent_is_a_unit_and_never_a_second_reading() -> None:
    assert is_correct("18", response("18%"))
    assert not is_correct("0.18", response("18%"))
    assert is_correct("18%", response("18"))


@pytest.mark.parametrize("gold", [None, "", " "])
def test_a_problem_without_gold_answer_is_named(gold: str | None) -> None:
    with pytest.raises(ValueError, match="'p/7'"):
        answer_reward(problem(gold), response("18"))


@pytest.mark.parametrize(("gold", "message"), [("1" * 300, "300"), ("\u200b", "shows nothing")])
def test_a_gold_answer_that_nothing_can_match_is_refused(gold: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        grade(gold, response("18"))


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        ("Monday", "Monday", True), ("Monday", "**Monday**", True), ("Monday", "The answer is Monday.", True),
        ("Monday", "monday", True), ("Monday", "Monday or Tuesday", False), ("Monday", "not Monday", False),
        ("B", "B", True), ("B", r"\boxed{B}", True), ("B", "A", False), ("B", "(B)", True),
        ("0110", "0110", True), ("0110", "110", True), ("1ba", "1ab", False), ("1e5", "5e1", False),
        ("(1, 2)", "(1, 2)", True), ("(1, 2)", "(2, 1)", False), ("a.b.", "a.b", True),
    ],
)  # fmt: skip
def test_text_must_be_repeated(gold: str, answer: str, right: bool) -> None:
    assert grade(gold, response(answer)) == Grade(correct=right)


@pytest.mark.parametrize(
    ("gold", "answer", "right"),
    [
        (r"2\sqrt{3}", r"$2\sqrt{3}$", True), (r"2\sqrt{3}", r"\sqrt{12}", True), (r"2\sqrt{3}", r"\sqrt{13}", False),
        ("x^2+1", "1 + x**2", True), ("x^2+1", "x^2 - 1", False), ("(x+1)^2", "x^2 + 2x + 1", True),
        ("2x", "x*2", True), ("2x", "2", False), ("2x", "x", False), ("y = 2x", "2x", True), ("2^{10}", "1024", True),
        ("2^{10}", "1025", False), (r"\frac{\pi}{2}", "pi/2", True), (r"\frac{\pi}{2}", r"\frac{2\pi}{4}", True),
        ("x^{1/2}", r"\sqrt{x}", True), ("x^(1/2)", "x^{1/2}", True), ("36/2", "18", True),
    ],
)  # fmt: skip
def test_expressions_are_compared_by_value(gold: str, answer: str, right: bool) -> None:
    assert grade(gold, response(answer)) == Grade(correct=right)


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        ("2x, 3x", "ambiguous"), ("2x or 3x", "ambiguous"), ("maybe 2x", "ambiguous"), ("2x?", "ambiguous"),
        ("2 3", "ambiguous"), ("x 3", "unparseable"), ("{2}3", "ambiguous"), ("9^9^9", "unparseable"),
        ("9**9**9", "unparseable"), ("9^{9^9}", "no_value"), ("((9^{99})^{99})^{99}", "no_value"),
        ("9^{9}{^9}", "unparseable"), ("9^{9}{}^{9}", "unparseable"), ("9^{99999}", "no_value"),
        ("x^{99999}", "no_value"), ("e^{e^{e^{e^9}}}", "no_value"), ("2000!", "no_value"), ("9!!!", "no_value"),
        (r"\sin(10^{99})", "no_value"), ("1/0", "no_value"), (r"\frac{x}{x-x}", "no_value"),
        ("(" * 30 + "x" + ")" * 30, "unparseable"), ("system(x)", "unparseable"), ("(" * 250, "unparseable"),
        (r"\sqrt{" * 40, "unparseable"), (r"\input{x}", "unparseable"), ("lambda: x", "unparseable"),
        (r"\begin{pmatrix}" * 12, "unparseable"), ("|" * 250, "unparseable"), (r"\vec" * 60, "unparseable"),
        ("sin " * 60, "unparseable"), (r"\frac" * 50, "unparseable"), ("-" * 250 + "x", "unparseable"),
        ("x" + "!" * 250, "unparseable"), ("x" + "%" * 250, "unparseable"), ("3" + "^2" * 120, "unparseable"),
    ],
)  # fmt: skip
def test_an_expression_without_a_value_is_wrong_and_never_unscored(answer: str, failure: str) -> None:
    assert grade("3x", response(answer)) == Grade(correct=False, failure=failure)


@pytest.mark.parametrize(
    "answer",
    [
        "(a+b+c+d)^{99}", "(((a+b+c+d)^{99}+1)^{99}+x)^{99}", "x^{9999}-x^{9998}+x^{9997}-x^{9996}", "9^{9999}",
        "1000!" + "+1000!" * 40, r"\sin(" * 20 + "x" + ")" * 20, "+".join([r"\tan(7x)^{99}"] * 18),
        r"\binom{999}{499}" * 15, r"(\frac{k}{10e}+0.5)^{(AB)^{7!}}", r"0.9^{e^{9999}}", "-".join(["x"] * 120),
    ],
)  # fmt: skip
@pytest.mark.parametrize("gold", [r"\sqrt{2}", "3x", "x=3y", r"\{1, x\}"])
def test_the_work_for_an_answer_is_bounded(gold: str, answer: str) -> None:
    started = time.thread_time()
    assert not is_correct(gold, response(answer))
    assert time.thread_time() - started < 1.0


def test_an_answer_that_takes_too_long_is_wrong_and_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def late(gold: object, answer: object, *, timeout: float) -> bool:
        calls.append(timeout)
        raise OutOfTime

    read_gold("3x+5")
    monkeypatch.setattr(answer_module, "same", late)
    for _ in range(2):
        score = answer_reward(problem("3x+5"), response("5+3x+0"), timeout=0.25)
        assert (score.total, score.failure) == (0.0, "timeout")
    assert calls == [0.25]


def test_the_clock_stops_a_comparison() -> None:
    answer = "+".join([rf"\sin({n}x)^2+\cos({n}x)^2" for n in range(1, 9)])
    assert grade("8+x-x", response(answer)) == Grade(correct=True)
    assert grade("8+x-x", response(answer + "+0"), timeout=0.0) == Grade(correct=False, failure="timeout")


def test_an_unreadable_expression_is_wrong() -> None:
    assert grade("3x", response("((x")) == Grade(correct=False, failure="unparseable")


def test_threads_do_not_disturb_each_other() -> None:
    # mpmath keeps precision and constants in shared objects.
    wrong: list[int] = []

    def run(start: int) -> None:
        for n in range(start, start + 20):
            gold = rf"\sqrt{{{n}}}\pi+\ln {n}"
            right = is_correct(gold, response(rf"\ln({n})+\pi\sqrt{{{n}}}"))
            if not right or is_correct(gold, response(rf"\ln({n})+\pi\sqrt{{{n + 1}}}")):
                wrong.append(n)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        threads = [threading.Thread(target=run, args=(100 * i + 2,), daemon=True) for i in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
    finally:
        sys.setswitchinterval(interval)
    assert not wrong and not any(thread.is_alive() for thread in threads)


@pytest.mark.parametrize("gold", ["18", "3x", "Monday"])
@pytest.mark.parametrize(
    "text",
    [
        "<answer>" * 125_000,
        "<answer>18</answer" * 60_000,
        "<answer></answer>" * 60_000,
        f"<answer>{'9' * 1_000_000}</answer>",
        f"<answer>{'(' * 1_000_000}</answer>",
        f"<answer>{' ' * 1_000_000}18</answer",
        "\x00\ud800" * 100_000,
    ],
)
def test_megabytes_reach_no_parser(gold: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    monkeypatch.setattr(answer_module, "normalise", lambda block: seen.append(len(block)) or normalise(block))
    assert answer_reward(problem(gold), text).total == 0.0
    assert all(length <= MAX_ANSWER_CHARS for length in seen)


@given(st.text(alphabet="0123456789.,/$%*-+= (){}\\abfrcx?^<>\n", max_size=MAX_ANSWER_CHARS))
def test_a_number_is_right_only_where_its_digits_are_in_the_block(block: str) -> None:
    if grade("18", f"<think>18</think><answer>{block}</answer>").correct:
        assert "18" in block.replace(",", "").replace("{,}", "") or "/" in block or "frac" in block or "e" in block


PIECES = st.sampled_from(
    [
        *"\u00a0\u2212\u00bd\u00b2\u221a\u03c0\uff11\u200b\u2003\u00b0\x00\ud800 \n",
        *r"""1 23 0.5 .5 x y n e i AB word sin or and not cm % $ + - * / ^ _ ( ) [ ] { } | < > = , ; : ! & . ** 10^
        \frac \sqrt \boxed{ \text{ \left( \right) \le \in \cup \pm \{ \} \pi \infty \sum \log \binom \circ
        \begin{pmatrix} \end{pmatrix} \\""".split(),
    ]
)  # fmt: skip
GOLDS = st.sampled_from(
    ["18", "-1/2", "5 inches", "28%", r"2\sqrt{3}", "x^2+1", "y=2x+1", "x < 3", "(1, 2)", r"\{1, 2\}", "[0,1)",
     "3, 5, 7", r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"3 \pm \sqrt{2}", "B", "no solution", "12:00", "W-L-W"]
)  # fmt: skip


@settings(max_examples=1500, deadline=2000)
@given(GOLDS, st.lists(PIECES, max_size=20).map("".join))
def test_any_answer_to_any_kind_of_gold_gets_0_or_1_in_time(gold: str, block: str) -> None:
    started = time.thread_time()
    score = answer_reward(problem(gold), f"<answer>{block}</answer>")
    assert score.total in (0.0, 1.0)
    assert time.thread_time() - started < 1.5
    assert lenient_answer_reward(problem(gold), block).total in (0.0, 1.0)


ATOMS = st.sampled_from(
    ["x", "n", "2", "0", "0.5", "99", "9999", "7!", r"\pi", "e", "i", r"\infty", "AB", "x_1", "12_7"]
)
FORMS = st.sampled_from(
    [
        "{}+{}", "{}-{}", "{}/{}", "({}){}", "({})^{{{}}}", r"\frac{{{}}}{{{}}}", r"\sqrt[{}]{{{}}}",
        r"\log_{{{}}}({})", r"\binom{{{}}}{{{}}}", r"\sin({}^{})", "|{}|!{}", "f({},{})",
        r"{}\pm {}", "({}, {})", r"\{{{}, {}\}}",
        "{} = {}", "{} < {}", r"[{}, {}) \cup \{{0\}}", r"\sum_{{k=1}}^{{{}}} {}",
        r"\begin{{pmatrix}}{}&{}\end{{pmatrix}}",
    ]
)  # fmt: skip
EXPRESSIONS = st.recursive(ATOMS, lambda parts: st.builds(str.format, FORMS, parts, parts), max_leaves=14)


@settings(max_examples=500, deadline=2000)
@given(GOLDS | EXPRESSIONS.filter(lambda text: len(text) <= MAX_ANSWER_CHARS), EXPRESSIONS)
def test_any_mathematics_gets_0_or_1_in_time(gold: str, block: str) -> None:
    started = time.thread_time()
    assert answer_reward(problem(gold), response(block)).total in (0.0, 1.0)
    assert time.thread_time() - started < 1.5


@settings(max_examples=500)
@given(st.lists(PIECES, min_size=1, max_size=12).map("".join))
def test_any_gold_is_earned_by_writing_it_down_or_refused(gold: str) -> None:
    try:
        gold_kind(problem(gold))
    except ValueError:
        return
    assert is_correct(gold, response(gold))


INTEGERS = st.integers(min_value=-(10**15), max_value=10**15)


@given(INTEGERS, INTEGERS)
def test_two_integers_match_exactly_where_they_are_equal(gold: int, said: int) -> None:
    assert is_correct(str(gold), response(f"{gold:,}")) and is_correct(str(gold), response(f"{gold}.00"))
    assert is_correct(str(gold), response(str(said))) == (gold == said)
    assert not is_correct(str(gold), response(f"{said} {gold}"))
    assert not is_correct(str(gold), response(f"{gold}, {said}"))


@given(st.integers(-999, 999), st.integers(2, 999))
def test_a_fraction_equals_its_decimals_exactly_or_not_at_all(top: int, bottom: int) -> None:
    value = Fraction(top, bottom)
    if value.denominator == 1:
        assert not is_correct(str(value), response(f"{top}/{bottom}"))
        return
    assert is_correct(f"{top}/{bottom}", response(str(value)))
    assert is_correct(str(value), response(rf"\frac{{{top}}}{{{bottom}}}"))
    decimals = f"{top / bottom:.6f}"
    assert is_correct(f"{top}/{bottom}", response(decimals)) == (Fraction(decimals) == value)


@pytest.mark.parametrize(
    ("gold", "answer"),
    [
        ("0.75", "3/4"), ("0.75", "0.750"), ("0.75", r"\frac{3}{4}"), ("0.75", "4/3"), ("0.75", "0.76"),
        ("0.75", "0.7"),
        ("1/8", "0.125"), ("1/8", "0.126"), ("-1/8", "-0.125"), ("-1/8", "0.125"), ("18", "18.0"), ("18", "18.5"),
        ("18", "118"), ("1800", "1,800"), ("1800", "1,801"), ("2.5", "5/2"), ("2.5", "-5/2"), ("0.3", "3/10"),
        ("0.3", "1/3"),
    ],
)  # fmt: skip
def test_agrees_with_math_verify_on_exact_numbers(gold: str, answer: str) -> None:
    theirs = math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(f"${answer}$"))
    assert is_correct(gold, response(answer)) == theirs


@pytest.mark.parametrize(("gold", "answer"), [("1/3", "0.333333"), ("18", "12 + 6"), ("0.18", "18%")])
def test_is_stricter_than_math_verify_where_it_says_so(gold: str, answer: str) -> None:
    latex = answer.replace("%", r"\%")
    assert math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(f"${latex}$"))
    assert not is_correct(gold, response(answer))


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It costs $1,800.50 in all.", "1800.5"), ("9 * 2 = 18.", "18"), ("<answer>18.00</answer>", "18"),
        ("x = -3", "-3"), ("-$3.50", "-3.5"), ("21-3", "3"), ("(1)-3", "3"), ("17, 18", "18"), ("17 or 18?", "18"),
        ("1,8", "1.8"), ("12,34", "12.34"), ("-.5", "-0.5"), ("= \u2212$5", "-5"), (r"-\frac{3}{4}", "-0.75"),
        ("2/3", "2/3"),
        ("1.5e6", "1500000"), (r"1.5\times10^6", "1500000"), ("10^6", "1000000"), ("2^{10}", "1024"), ("18 m^2", "18"),
        ("18 cm2", "18"), ("18 m**2", "18"), ("10\u2076", "1000000"), ("2**10", "1024"), ("2^{-1}", "0.5"),
        ("12 \u00bd", "12.5"), ("2 1/2", "2.5"), ("\u2212\u00be", "-0.75"), ("\u20137", "-7"), (r"\frac34", "0.75"),
        ("1 000 000", "1000000"), ("1'000", "1000"), (r"10,\!000", "10000"), ("1,2,3", "3"),
        ("18 x^{-3}", "18"), ("0x12", "0"), ("- 18", "18"), ("5 - 3", "3"), (r"\boxed{-5}", "-5"),
        ("99999999^999", None), ("007", "7"), ("-0.0", "0"), ("0.50", "0.5"), ("3/4", "0.75"), ("none", None),
        ("", None),
        ("\u0661\u0668", None), ("7 " + "9" * 1_000_000, None), ("9," * 500_000, "9"),
        ("9" + ",999" * 250_000 + "9", "9999"), ("-" * 1_000_000 + "5", "-5"),
    ],
)  # fmt: skip
def test_lenient_number_is_the_last_one(text: str, number: str | None) -> None:
    assert lenient_number(text) == number


@given(INTEGERS, st.text(alphabet="abc .,$-\n", max_size=20))
def test_lenient_number_reads_what_it_writes(value: int, tail: str) -> None:
    assert lenient_number(f"so {value:,}{tail}") == str(value)


@pytest.mark.parametrize(
    ("gold", "text", "score"),
    [
        ("18", "So she makes $18.00 a day.", Score(total=1.0)),
        ("18", response("18") + " and not 17", Score(total=0.0)),
        ("1800", "17, 18 or 1,800", Score(total=1.0)),
        ("-3", "x = -3", Score(total=1.0)),
        ("18", "eighteen", Score(total=0.0, failure="no_answer")),
        ("18", "", Score(total=0.0, failure="no_answer")),
    ],
)
def test_lenient_reward_takes_the_last_number(gold: str, text: str, score: Score) -> None:
    assert lenient_answer_reward(problem(gold), text) == score


@pytest.mark.parametrize("text", ["18", "no number"])
def test_lenient_reward_needs_a_gold_answer(text: str) -> None:
    with pytest.raises(ValueError, match="'p/7'"):
        lenient_answer_reward(problem(None), text)


@pytest.mark.parametrize(
    ("gold", "answers", "vote"),
    [
        ("1800", ["1800", "$1,800", "1800.0", "**1800 dollars**", "x = 1800"], "1800"),
        ("1800", ["1801", "1,801"], "1801"),  # a wrong answer votes as well
        ("0.75", ["3/4", ".75", r"\frac{3}{4}", "75/100"], "3/4"),
        ("18", ["17, 18", "18 or 19", "maybe 18", "", " ", "Monday", "1" * 300, "12 + 6"], None),
        ("(3 + 5) * 2", ["(3+5)*2", "( 3 + 5 ) * 2.", "(3 + 5) \u00d7 2"], "(3+5)*2"),
        ("(3 + 5) * 2", ["2 * (5 + 3)"], "2*(5+3)"),  # of the same value, but another expression
        ("New York", ["New  York", "New York."], "new york"),
        ("18 dollars", ["18 dollars", "**18  dollars**", "$18"], "18"),
        ("x" * 300, ["y"], "y"),
    ],
)
def test_one_vote_for_one_answer(gold: str, answers: list[str], vote: str | None) -> None:
    assert [voted_answer(problem(gold), response(answer)) for answer in answers] == [vote] * len(answers)


def test_who_states_no_answer_does_not_vote() -> None:
    assert voted_answer(problem("18"), "So it is 18.") is None
    assert voted_answer(problem("18"), f"{response('17')}\n{response('18')}") == "18"
    with pytest.raises(ValueError, match="no gold answer"):
        voted_answer(problem(None), response("18"))


@given(INTEGERS, INTEGERS)
def test_votes_are_the_same_exactly_where_the_verdicts_are(gold: int, other: int) -> None:
    """Of two numbers: the one that is right votes with the gold answer, the one that is not against it."""
    votes = [voted_answer(problem(str(gold)), response(f"{number:,}")) for number in (gold, other)]
    assert votes[0] == str(gold) and (votes[1] == votes[0]) == is_correct(str(gold), response(str(other)))


@needs_gsm8k
def test_every_gold_answer_of_gsm8k_is_right_and_its_neighbours_are_wrong() -> None:
    rows = [json.loads(line) for line in (GSM8K / "train.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == 7473
    for row in rows:
        working, _, as_written = row["answer"].rpartition("#### ")
        gold = as_written.replace(",", "")
        assert is_correct(gold, response(gold, working)) and is_correct(gold, response(f"${as_written}", working))
        for wrong in (int(gold) - 1, int(gold) + 1):
            assert not is_correct(gold, response(str(wrong), working))
        assert lenient_number(row["answer"]) == gold
