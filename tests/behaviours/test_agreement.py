"""Agreement of two counts, by hand; the file of labelled traces."""

from __future__ import annotations

import json
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.behaviours import BEHAVIOURS, Agreement, BehaviourCounts, agreement, labelled_traces


def verified(*counts: int) -> list[BehaviourCounts]:
    return [BehaviourCounts(verification=count) for count in counts]


def test_by_hand():
    found = agreement(verified(2, 1, 0, 0, 3), verified(1, 0, 1, 0, 3))["verification"]
    # Presence: both in texts 1 and 5, predicted alone in 2, labelled alone in 3, neither in 4.
    assert (found.precision, found.recall) == (2 / 3, 2 / 3)
    # Observed 3/5; by chance (3/5)(3/5) + (2/5)(2/5) = 13/25: (15 - 13) / (25 - 13).
    assert found.kappa == pytest.approx(2 / 12)
    # Counts: 1 + 0 + 0 + 0 + 3 agreed on, of 6 predicted and 5 labelled.
    assert (found.count_precision, found.count_recall) == (4 / 6, 4 / 5)


def test_opposites_are_worse_than_chance():
    found = agreement(verified(1, 0), verified(0, 1))["verification"]
    assert found == Agreement(precision=0.0, recall=0.0, kappa=-1.0, count_precision=0.0, count_recall=0.0)


def test_what_is_no_number():
    nothing = Agreement(precision=None, recall=None, kappa=None, count_precision=None, count_recall=None)
    assert agreement(verified(0, 0), verified(0, 0)) == dict.fromkeys(BEHAVIOURS, nothing)
    found = agreement(verified(0, 0), verified(1, 0))["verification"]
    assert found == Agreement(precision=None, recall=0.0, kappa=0.0, count_precision=None, count_recall=0.0)


def test_each_behaviour_is_compared_with_itself():
    predicted = [BehaviourCounts(verification=1, backtracking=2, subgoal_setting=0, backward_chaining=4)]
    labelled = [BehaviourCounts(verification=1, backtracking=1, subgoal_setting=3, backward_chaining=5)]
    found = {name: (a.count_precision, a.count_recall) for name, a in agreement(predicted, labelled).items()}
    assert found == {
        "verification": (1.0, 1.0),
        "backtracking": (0.5, 1.0),
        "subgoal_setting": (None, 0.0),
        "backward_chaining": (1.0, 0.8),
    }


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), min_size=1, max_size=30))
def test_the_two_sides_mirror_each_other(pairs):
    left, right = verified(*(a for a, _ in pairs)), verified(*(b for _, b in pairs))
    one, other = agreement(left, right)["verification"], agreement(right, left)["verification"]
    assert (one.precision, one.count_precision) == (other.recall, other.count_recall)
    assert one.kappa == other.kappa
    assert one.kappa is None or -1.0 <= one.kappa <= 1.0
    same = agreement(left, left)["verification"]
    assert {same.precision, same.recall, same.kappa, same.count_precision, same.count_recall} <= {1.0, None}


@pytest.mark.parametrize(("predicted", "labelled"), [(0, 0), (1, 2), (2, 0)])
def test_needs_as_many_of_both(predicted, labelled):
    with pytest.raises(ValueError, match=f"{predicted} predicted and {labelled} labelled"):
        agreement(verified(*[1] * predicted), verified(*[1] * labelled))


# --- the labelled traces ----------------------------------------------------------------------------------------------


def test_the_labelled_traces_are_many_and_of_all_kinds():
    dev, test = labelled_traces("dev"), labelled_traces("test")
    assert len(test) >= 24 and len(dev) + len(test) >= 60
    assert [trace.id for trace in labelled_traces()] == [trace.id for trace in (*dev, *test)]
    for split in (dev, test):
        texts = Counter(trace.text for trace in split)
        assert max(texts.values()) == 1
        for name in BEHAVIOURS:
            shown = sum(getattr(trace.counts, name) > 0 for trace in split)
            assert 8 <= shown <= 0.7 * len(split), name
        assert sum(trace.counts == BehaviourCounts() for trace in split) >= 8
    assert not {trace.text for trace in dev} & {trace.text for trace in test}


RECORD = {"id": "a", "split": "dev", "text": "3 * 8 = 24", "counts": dict.fromkeys(BEHAVIOURS, 0)}


def test_reads_your_own_file(tmp_path):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(RECORD | {"id": "b", "split": "test", "note": "why"}) + "\n")
    assert [trace.note for trace in labelled_traces(path=path)] == ["", "why"]
    assert [trace.id for trace in labelled_traces("test", path=path)] == ["b"]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (RECORD, ":2: .*'a'"),
        (RECORD | {"id": ""}, ":2: id:"),
        (RECORD | {"split": "train"}, ":2: split:"),
        (RECORD | {"text": ""}, ":2: text:"),
        (RECORD | {"counts": {"verification": 1}}, ":2: counts.backtracking:"),
        (RECORD | {"counts": dict.fromkeys(BEHAVIOURS, -1)}, ":2: counts.verification:"),
        (RECORD | {"counts": dict.fromkeys(BEHAVIOURS, 1.5)}, ":2: counts.verification:"),
        (RECORD | {"label": 1}, ":2: label:"),
        ([], ":2: the line:"),
    ],
)
def test_names_the_line_that_is_wrong(tmp_path, record, message):
    path = tmp_path / "mine.jsonl"
    path.write_text(json.dumps(RECORD) + "\n" + json.dumps(record) + "\n")
    with pytest.raises(ValueError, match=f"^{path}{message}"):
        labelled_traces(path=path)
