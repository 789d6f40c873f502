"""The embedded word problems: no network, no repeated questions, gold answers that agree with their solutions."""

import re
from functools import lru_cache

import pytest

from rolltune.data.dataset import overlap
from rolltune.data.gsm_symbolic import gsm_symbolic


@lru_cache
def many():
    return gsm_symbolic(count=5000, seed=0)


def test_answers_are_canonical_integers():
    assert len(many()) == 5000
    assert all(re.fullmatch(r"0|[1-9][0-9]*", p.answer or "") for p in many())


def test_questions_are_different_and_clean():
    texts = [p.messages[0]["content"] for p in many()]
    assert len(set(texts)) == len(texts)
    assert all(p.messages[0]["role"] == "user" and len(p.messages) == 1 for p in many())
    for text in texts:
        assert "Do not include units" not in text
        assert not re.search(r"\d\.\d{4}|\d\.0(?!\d)", text)


def test_solutions_end_with_the_answer():
    """The answer stands in the solution, as a number of its own (its last line may go on with a unit)."""
    for problem in many():
        solution = problem.solution or ""
        assert "####" not in solution and not re.search(r"\d\.\d{4}|\d\.0(?!\d)", solution)
        numbers = [number.replace(",", "") for number in re.findall(r"\d[\d,]*(?:\.\d+)?", solution)]
        assert problem.answer in numbers[-4:], (problem.id, problem.answer, solution)


NUMBER = r"(\d+(?:\.\d+)?)"
PRODUCT = re.compile(rf"(?<![\d.,÷(+*/x-])(?<![÷(+*/x-] )({NUMBER}(?: ?[*/] ?{NUMBER})+) ?= ?{NUMBER}(?![\d,/%])")


def wrong_products(solutions):
    """Steps such as "17 * 0.5 = 8", which hold for no rounding error; and how many steps were read."""
    wrong, read = [], 0
    for solution in solutions:
        for match in PRODUCT.finditer(solution):
            first, *others = re.findall(rf"([*/]?) ?{NUMBER}", match[1])
            value = float(first[1])
            for sign, number in others:
                value = value * float(number) if sign == "*" else value / float(number)
            read += 1
            if abs(value - float(match.groups()[-1])) > 1e-6:
                wrong.append(match[0])
    return wrong, read


def test_gold_answers_do_not_cut_fractions_off():
    """The templates left out are those that compute 17 * 0.5 = 8."""
    wrong, read = wrong_products(p.solution or "" for p in many())
    assert (wrong, read > 2000) == ([], True)


def test_the_templates_left_out_do_cut_fractions_off(monkeypatch):
    monkeypatch.setattr("rolltune.data.gsm_symbolic._WRONG_TEMPLATES", frozenset())
    wrong, _ = wrong_products(p.solution or "" for p in gsm_symbolic(count=1000))
    assert len(wrong) >= 10


def test_longer_lists_begin_with_the_shorter_ones():
    assert list(gsm_symbolic(count=30, seed=5)) == list(gsm_symbolic(count=200, seed=5))[:30]
    assert list(gsm_symbolic(count=30, start=100, seed=5)) == list(gsm_symbolic(count=200, seed=5))[100:130]


def test_slices_of_one_seed_have_no_question_in_common():
    assert overlap(gsm_symbolic(count=2000), gsm_symbolic(start=2000, count=500)) == []


def test_neighbouring_seeds_do_share_questions():
    """Why the docstring says to cut slices: reasoning-gym draws item i of seed 0 and item i - 1 of seed 1 alike."""
    assert overlap(gsm_symbolic(count=2000, seed=0), gsm_symbolic(count=300, seed=1)) != []


def test_seeds_differ():
    assert [p.answer for p in gsm_symbolic(count=20, seed=0)] != [p.answer for p in gsm_symbolic(count=20, seed=1000)]


def test_many_templates_are_used():
    """Questions without their numbers and capitalised words: at least 70 kinds among 5,000."""
    kinds = {re.sub(r"\W", "", re.sub(r"[A-Z]\w*|\d\S*", "", p.messages[0]["content"]))[-12:] for p in many()}
    assert len(kinds) >= 70


@pytest.mark.parametrize("options", [{"count": 0}, {"count": 5, "seed": -1}, {"count": 5, "start": -1}])
def test_options_out_of_range(options):
    with pytest.raises(ValueError, match=r"gsm_symbolic: \w+=(0|-1)"):
        gsm_symbolic(**options)
