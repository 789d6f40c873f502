# ruff: noqa: E501, RUF001
"""Pairs of gold answer and answer, by what is compared. ``|`` separates the answers."""

from __future__ import annotations

import math_verify
import pytest

from rolltune.rewards.answer import grade

SAME = [
    # spelling
    ("x^2+1", "x^2 + 1.|x² + 1|1 + x**2|$x^{2}+1$|x^2+1 units"),
    (r"2\sqrt{3}", r"2\sqrt{3} cm|2\sqrt{3}\text{ cm}|2√3|2 * sqrt(3)|\sqrt{12}|2\sqrt3|\boxed{2\sqrt{3}}|\left(2\sqrt{3}\right)|2√3 m|2√3 km/h|2√{3} m²"),
    (r"36 \pi", r"36π|36\pi \text{ cm}^2|36*pi|36π m²|36\pi~\text{m}^{2}"),
    (r"\dfrac{\pi}{2}", r"π/2|\frac{2\pi}4|{\pi \over 2}"),
    (r"\frac{x}{y}", r"x/y|\frac xy|x \div y"),
    (r"1.5\times10^6", "1,500,000|1.5 × 10⁶|1.5e6|1500000"),
    # values
    ("(x+1)^2", "x^2+2x+1|(x+1)(x+1)|(1+x)^{2}"),
    (r"\sin^2 x + \cos^2 x", "1"),
    (r"\dbinom{5}{2}", r"10|\tbinom{5}{2}|\frac{5!}{2!3!}"),
    (r"\binom{n}{2}", r"\frac{n(n-1)}{2}"),
    (r"10\sin 30^\circ", r"5|10\cos(60°)|10\sin\frac{\pi}{6}"),
    (r"\tan^{-1} x", r"\arctan x"),
    (r"8\sqrt[3]{2}", r"8∛2|8 \cdot 2^{1/3}"),
    (r"36\pi\text{ cm}^3", r"36\pi|36\pi cm^3|36π cm³|36\pi \text{ cubic centimeters}"),
    (r"\frac{5\sqrt{3}}{2}\text{ units}", r"\frac{5\sqrt3}{2}|2.5\sqrt{3} units"),
    (r"\log_2 8", r"3|\frac{\ln 8}{\ln 2}"),
    (r"e^{i\pi}", "-1"),
    (r"\sqrt[3]{8}x", "2x"),
    (r"\frac{x+2}{7}", r"\frac{x}{7}+\frac{2}{7}"),
    ("2^{10}", "1024"),
    (r"\ln\frac{a}{b}", r"\ln a - \ln b"),
    (r"\sqrt[3]{-8}y", "-2y"),
    ("5!", "120"),
    (r"\lfloor \pi \rfloor + \lceil 1/2 \rceil", "4"),
    (r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}", r"F_n = \sum_{k=0}^{n-1} F_{n-k-1} F_k"),
    # names of values
    ("k=1/3", r"1/3|\frac13|k = \frac{1}{3}"),
    (r"\frac{NO}{BO}=\frac{1}{\sqrt{6}}", r"\frac{1}{\sqrt{6}}"),
    ("|AB|=1", "1"),
    ("y=2x+1", "2x+1|y = 1+2x|y-2x-1=0"),
    ("S_{MBCN}:S=7:32", "7:32|7 : 32"),
    ("36\\pi", r"A = \pi \cdot 6^2 = 36\pi|36\pi \approx 113.1|The area is 36\pi \approx 113 cm^2."),
    ("2x+1", "f'(x) = 2x + 1|y' = 1 + 2x|f^{-1}(x) = 2x+1"),
    # lists, tuples, sets, intervals
    ("1,22", "1.22|1, 22|1,22"),
    ("x=2,y=3", r"(x, y) = (2, 3)|\boxed{(y,x)=(3,2)}|y = 3 and x = 2"),
    ("(x,y)=(2,3)", "x=2, y=3|y = 3, x = 2|(2,3)"),
    (r"\{1,2\}\cup\{3\}", r"\{1,2,3\}|\{3\} \cup \{2, 1\}"),
    (r"\{x \mid -1<x<2\}", r"(-1,2)|-1 < x < 2|\{x : -1 < x < 2\}"),
    (r"x\equiv 3\pmod 5", r"x \equiv 3 \pmod{5}"),
    ("(2,-1)", r"\langle 2, -1 \rangle|\begin{pmatrix} 2 \\ -1 \end{pmatrix}|\begin{pmatrix} 2 & -1 \end{pmatrix}"),
    ("(1,\\frac{9}{2})", r"(1, \frac{9}{2})|(1,4.5)|\left(1, 9/2\right)|(x,y) = (1, 4.5)"),
    ("0,1", "(0,1)|0, 1"),
    ("3,11,33", "3, 11, 33|3;11;33|3, 11 and 33"),
    (r"\{1,2,3\}", r"3,2,1|\{3, 1, 2\}|1, 2 and 3|{1,2,3}|\lbrace 1,2,3\rbrace"),
    ("(11,7)or(7,11)", r"\boxed{(7,11),\ (11,7)}"),
    ("(1,2),(3,4)", "(3,4),(1,2)|(1,2) and (3,4)|(1,2), (3,4), (1,2)"),
    ("a_3 = 2, a_{37} = 19", r"a_{37} = 19, \quad a_3 = 2"),
    (r"\boxed{1}\boxed{2}", "1,2"),
    (r"3 \pm 2\sqrt{2}", r"3-2\sqrt2, 3+2\sqrt2|3\pm\sqrt8"),
    (r"(-\infty, 3]", r"(-\infty,3]|(-∞, 3]|x \le 3|x <= 3|3 \ge x"),
    (r"-2 \le x \le 7", r"x \in [-2,7]|[-2, 7]|7 \ge x \ge -2"),
    (r"(-\infty,-1)\cup(1,\infty)", r"(1,\infty)\cup(-\infty,-1)|x<-1 or x>1|(-inf, -1) U (1, inf)"),
    (r"(30^\circ, 60^\circ)", "(30, 60)|(30°,60°)|30 degrees, 60 degrees"),
    (r"\emptyset", r"\varnothing|∅"),
    # equations, inequalities, matrices
    ("2x+4y-3=0", r"y=-\frac{1}{2}x+\frac{3}{4}|4x+8y=6"),
    ("34x+45y-20z+100=0", "-34x-45y+20z-100=0"),
    ("x < 3", r"x \lt 3|3 > x|2x < 6|-x > -3"),
    (r"x \neq 5", r"x != 5|x ≠ 5"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{bmatrix} 1 & 2 \\ 3 & \frac{8}{2} \end{bmatrix}"
        r"|\left[\begin{array}{cc} 1 & 2 \\ 3 & 4 \end{array}\right]|A^{-1} = \begin{pmatrix}1&2\\3&4\end{pmatrix}"
        r"|[[1, 2], [3, 4]]|\begin{pmatrix}1&2\\[2pt]3&4\end{pmatrix}|\begin{smallmatrix}1&2\\3&4\end{smallmatrix}"),
]  # fmt: skip

DIFFERENT = [
    # however small, however large, whatever the sign
    (r"1.6\times10^{-19}", r"1.7\times10^{-19}|1.6\times10^{-18}|-1.6\times10^{-19}"),
    (r"6.63\times10^{-34}", r"1.6\times10^{-19}"),
    (r"\frac{1}{10^{20}}", r"\frac{1}{10^{21}}"),
    (r"\frac{\pi}{10^{40}}", r"\frac{\pi}{10^{41}}|0|-\frac{\pi}{10^{40}}"),
    (r"\frac{1}{2^{90}}", r"\frac{1}{2^{91}}"),
    ("2^{90}", "2^{91}|-2^{90}"),
    ("3^{50}", "3^{50}+1"),
    ("1-2^{-40}", "1"),
    (r"\sqrt{10^{40}+1}", "10^{20}"),
    (r"\sqrt{10^{400}+1}", "10^{200}"),
    (r"x+10^{-60}", "x"),
    # no decimal for a surd or a fraction
    (r"\sqrt{2}", "1.414214|1.41421356237309504880"),
    (r"\pi", "3.14|3.141593"),
    (r"36\pi", r"113.1|A \approx 36\pi|36\pi \approx 112.1|12\pi = 36\pi|36\pi = 12\pi|36\pi = 113.1|36\pi + x \approx 113"),
    ("x+1", "x^2 = x+1|x^{-1} = x+1"),
    ("1,22", "1.23|1.2|2.2"),
    (r"\begin{pmatrix}1/3\\1/5\end{pmatrix}", r"\begin{pmatrix}0.33\\0.2\end{pmatrix}"),
    # identities that hold for some values only
    (r"\lfloor x \rfloor", "0|1|2|x"),
    ("x", r"\sqrt{x^2}"),
    (r"\sqrt{xy}", r"\sqrt{x}\sqrt{y}"),
    # parts
    ("(1,2)", "(2,1)|[1,2]|(1,2]|1|(1,2,3)|x=1, y=2"),
    ("[0,1)", "(0,1)|[0,1]|0,1"),
    ("10, 4, -2", "4, 10, -2|10, 4|10, 4, -2, 1"),
    (r"\{1,2\}", r"\{1\}|\{x \mid 1, 2\}|\{1,2,3\}|(1,2)"),
    ("(37,3,3),(17,3,3,7)", "(37,3,3,13),(17,3,3,7)"),
    (r"\pm 2021", "2021"),
    ("(2,-1)", r"\langle -1, 2 \rangle|\begin{pmatrix} 2 & 0 \\ -1 & 0 \end{pmatrix}|\begin{pmatrix} -1 \\ 2 \end{pmatrix}"),
    ("x=2,y=3", "(x,y)=(3,2)|(y,x)=(2,3)|(x,y,z)=(2,3,4)|(x,z)=(2,3)"),
    (r"\{1,2\}\cup\{3\}", r"\{1,2\}|\{1,2,3,4\}|(1,2,3)"),
    (r"\{x \mid -1<x<2\}", r"(-1,2]|\{-1, 2\}|\{x \mid -1<x<3\}"),
    (r"x\equiv 3\pmod 5", r"x \equiv 3 \pmod{15}|x \equiv 35 \pmod{}"),
    ("[2,-1]", r"\begin{pmatrix} 2 \\ -1 \end{pmatrix}"),
    (r"[-3,2]", r"(-\infty, -3] \cup [2, \infty)"),
    ("x < 1", "x > -1|x > 1|x \\le 1|x < 2|y < 1"),
    ("7 = 11a+c", "11a+c|7"),
    ("3x-y+13=0", "3x + 4y + 14=0"),
    ("n=2, 3, 4", "n=1, 2, 3"),
    ("D = (0, 1)", "D = (0, 1.5)"),
    ("1112112_3", "1112122_3|1112112"),
    (r"\begin{pmatrix}1&2\\3&4\end{pmatrix}", r"\begin{pmatrix}1&3\\2&4\end{pmatrix}|1, 2, 3, 4|[[1, 3], [2, 4]]|[1, 2, 3, 4]"),
    (r"36\pi\text{ cm}^3", r"36\pi cm^2|12\pi|36|36\pi m^3"),
    (r"2\pi r", r"2\pi r h|2 \pi r m"),
    ("x+2n+1", "x+1|x+2n|X+2n+1"),
    ("3x", "2x, 3x|2x or 3x|3x, 3x|maybe 3x|3x?|not 3x|3x + 1 - 2"),
    (r"F_n = \sum_{k=0}^{n-1} F_k F_{n-k-1}", r"F_n = \sum_{k=0}^{n-2} F_k F_{n-k-2}"),
]  # fmt: skip


def pairs(table: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [
        (gold, answer) for gold, answers in table for answer in ([answers] if gold == "|AB|=1" else answers.split("|"))
    ]


@pytest.mark.parametrize(("gold", "answer"), pairs(SAME))
def test_the_same(gold: str, answer: str) -> None:
    assert grade(gold, f"<answer>{answer}</answer>").correct


@pytest.mark.parametrize(("gold", "answer"), pairs(DIFFERENT))
def test_different(gold: str, answer: str) -> None:
    assert not grade(gold, f"<answer>{answer}</answer>").correct


AGREED = ["(x+1)^2", r"\sin^2 x + \cos^2 x", r"\dbinom{5}{2}", r"\frac{x+2}{7}", "2^{10}"]


@pytest.mark.parametrize(("gold", "answer"), pairs([row for row in SAME if row[0] in AGREED]))
def test_agrees_with_math_verify_on_identities(gold: str, answer: str) -> None:
    assert math_verify.verify(math_verify.parse(f"${gold}$"), math_verify.parse(f"${answer}$"))


def test_the_bars_of_an_absolute_value() -> None:
    assert grade(r"\sqrt{4x^2}", "<answer>2|x|</answer>").correct
    assert not grade("x", "<answer>|x|</answer>").correct


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        ("2024/03/05", "2024/05/03|2024"), ("12/25/2024", "12/2024/25|24/50/2024"), ("555-0123", "432|-432|554-0122"),
        ("W-L-W", "W-W-L|L"), ("7-11", "-4|11-7"), ("DC/AB", "CD/BA"), ("(AB)", "(BA)"), ("a b c", "c b a|b c"),
        ("[1-9]", "-8"), ("1999-2000", "-1"), ("12:00", "1:00"), ("1:2:3", "1:4:9"), ("3:4", "6:8|0.75|4:3"),
        ("(no)", "on"), ("(ix)", "(xi)"), ("A, C", "C, A"), ("10:30 AM", "10:30 PM"), ("3 pm", "3 am|3"),
    ],
)  # fmt: skip
def test_text_is_never_algebra(gold: str, answers: str) -> None:
    for answer in answers.split("|"):
        assert not grade(gold, f"<answer>{answer}</answer>").correct


@pytest.mark.parametrize(
    ("gold", "answers"),
    [
        ("Yes", "yes|**Yes**|YES."), (r"\text{no solution}", "No solution|no  solution."), ("8:00 PM", "8:00 pm|8:00pm|8:00 p.m."),
        ("elephant", "The elephant|an elephant"), ("A-B-C", "A - B - C|a-b-c"), ("1945-1946", "1945–1946|1945 - 1946"),
        ("12_{7}", "12_7|12₇"), ("hello world", "hello\tworld\n|Hello World"), ("H_2O", "H₂O|h_2o"),
    ],
)  # fmt: skip
def test_case_articles_and_spaces_around_signs_do_not_count_in_text(gold: str, answers: str) -> None:
    for answer in answers.split("|"):
        assert grade(gold, f"<answer>{answer}</answer>").correct
