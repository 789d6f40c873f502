"""The quickstart's sums: right, in range, and never held out and trained on at once."""

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rolltune.data.dataset import overlap
from rolltune.data.sums import sums
from rolltune.types import Problem

LESS = r"gives away|loses|sells|takes"


def numbers_of(problem: Problem) -> list[int]:
    """The signed numbers, read from the question alone."""
    text = problem.messages[0]["content"]
    if "has now" not in text and not text.endswith("have now?"):
        return [int(sign + digits) for sign, digits in re.findall(r"([+-]?) ?(\d+)", text)]
    first, *others = [s for s in re.split(r"(?<=[.?]) ", text) if re.search(r"\d", s)]
    read = [int(re.findall(r"\d+", first)[0])]
    return read + [int(re.findall(r"\d+", s)[0]) * (-1 if re.search(LESS, s) else 1) for s in others]


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    split=st.sampled_from(["train", "heldout"]),
    terms=st.integers(2, 5),
    bounds=st.tuples(st.integers(1, 20), st.integers(10, 100)).filter(lambda b: b[1] >= b[0] + 9),
    wording=st.sampled_from(["plain", "story", "mixed"]),
)
def test_answers_are_right(seed, split, terms, bounds, wording):
    low, high = bounds
    for problem in sums(count=5, seed=seed, split=split, terms=terms, low=low, high=high, wording=wording):
        numbers = numbers_of(problem)
        assert len(numbers) == terms
        assert all(low <= abs(n) <= high for n in numbers)
        assert problem.answer == str(sum(numbers))
        assert all(sum(numbers[:k]) >= 0 for k in range(1, terms + 1))
        steps = re.findall(r"(-?\d+) ([+-]) (\d+) = (-?\d+)\.", problem.solution or "")
        assert len(steps) == terms - 1
        assert [int(after) for *_, after in steps] == [sum(numbers[:k]) for k in range(2, terms + 1)]
        for before, sign, number, after in steps:
            assert int(before) + int(sign + number) == int(after)


def test_wording_by_hand():
    plain, story = (sums(count=1, wording=wording)[0] for wording in ("plain", "story"))
    assert (plain.messages[0]["content"], plain.answer) == ("What is 29 - 22 + 23?", "30")
    assert plain.solution == "29 - 22 = 7. 7 + 23 = 30."
    assert story.messages[0]["content"] == (
        "Ben has 29 pencils. Ben gives away 22. Ben buys 23 more. How many pencils does Ben have now?"
    )
    assert (story.answer, story.id) == ("30", "sums/train/seed0/0")


def test_one_thing_is_singular():
    texts = [p.messages[0]["content"] for p in sums(count=300, high=3, terms=2, wording="story")]
    ones = [text for text in texts if re.match(r"\w+ has 1 ", text)]
    assert ones and all(re.match(r"\w+ has 1 [a-z]+[^s]\. ", text) for text in ones)


def test_many_wordings():
    plain = {re.sub(r"\d.*\d", "N", p.messages[0]["content"]) for p in sums(count=200)}
    assert len(plain) == 6
    mixed = [p.messages[0]["content"] for p in sums(count=400, wording="mixed")]
    assert 150 < sum(text.endswith("have now?") for text in mixed) < 250


@pytest.mark.parametrize("wording", ["plain", "story"])
def test_splits_are_disjoint_whatever_the_seeds(wording):
    """So few sums (terms=2, up to 12) that thousands of draws would meet if they could."""
    options = {"terms": 2, "high": 12, "wording": wording}
    train = [p for seed in range(3) for p in sums(count=1000, seed=seed, **options)]
    heldout = [p for seed in range(3) for p in sums(count=300, seed=seed, split="heldout", **options)]
    in_train, in_heldout = ({tuple(numbers_of(p)) for p in part} for part in (train, heldout))
    assert not in_train & in_heldout
    assert overlap(train, heldout) == []
    # 12 * 12 additions and 12 * 13 / 2 differences, all of them in one split.
    assert len(in_train | in_heldout) == 144 + 78
    assert 0.04 < len(in_heldout) / 222 < 0.16


def test_wordings_share_the_partition():
    plain = {tuple(numbers_of(p)) for p in sums(count=2000, terms=2, high=12)}
    story = {tuple(numbers_of(p)) for p in sums(count=300, terms=2, high=12, wording="story", split="heldout")}
    assert not plain & story


def test_problems_depend_only_on_their_index():
    assert list(sums(count=5, seed=3)) == list(sums(count=50, seed=3))[:5]
    assert [p.answer for p in sums(count=20, seed=3)] != [p.answer for p in sums(count=20, seed=4)]


def test_negative_results_where_asked_for():
    data = sums(count=300, terms=2, allow_negative=True)
    assert any((p.answer or "").startswith("-") for p in data)
    assert all(p.answer == str(sum(numbers_of(p))) for p in data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"count": 0}, "count=0"),
        ({"terms": 1}, "terms=1"),
        ({"low": 0}, "low=0"),
        ({"low": 5, "high": 4}, "high=4"),
        ({"split": "test"}, "split='test'"),
        ({"wording": "poem"}, "wording='poem'"),
        ({"wording": "story", "allow_negative": True}, "allow_negative=true"),
        ({"low": 1, "high": 1, "terms": 2, "split": "heldout"}, "no heldout sum"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        sums(**({"count": 1} | options))


def test_worked_share_decides_how_many_solutions_are_worked():
    def worked(share):
        return [" = " in (problem.solution or "") for problem in sums(count=400, worked_share=share)]

    assert all(worked(1.0)) and not any(worked(0.0))
    assert 150 < sum(worked(0.5)) < 250
    half = sums(count=50, worked_share=0.5)
    assert [p.messages for p in half] == [p.messages for p in sums(count=50)]  # the questions stay as they were
    assert all(p.solution == f"It is {p.answer}." for p in half if " = " not in (p.solution or ""))
    with pytest.raises(ValueError, match="worked_share=1.5"):
        sums(count=1, worked_share=1.5)
