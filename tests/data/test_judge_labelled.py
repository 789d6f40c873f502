"""Labelled verdicts: the packaged set is as documented, and errors name the mistakes in your own file."""

import json
import re
from collections import Counter

import pytest

from rolltune.data.judge_labelled import judge_labelled

RESPONSES = judge_labelled()
LABELS = [(response, label) for response in RESPONSES for label in response.labels]
RECORD = {
    "id": "sky/blue",
    "problem": "Why is the sky blue?",
    "response": "Air scatters blue light most.",
    "criterion": {"title": "Cause", "description": "Names scattering.", "category": "essential"},
    "satisfied": True,
}


@pytest.fixture
def write(tmp_path):
    def write(*records) -> str:
        lines = [r if isinstance(r, str) else json.dumps(r) for r in records]
        (tmp_path / "own.jsonl").write_text("\n".join(lines) + "\n")
        return str(tmp_path / "own.jsonl")

    return write


# --- the packaged set -------------------------------------------------------------------------------------------------


def test_its_size_is_what_the_docstring_says():
    says = f"{len(LABELS)} verdicts on {len(RESPONSES)} everyday responses"
    assert judge_labelled.__doc__ is not None and says in judge_labelled.__doc__
    assert len(LABELS) == 225 and all(2 <= len(response.labels) <= 4 for response in RESPONSES)
    assert all(label.note for _, label in LABELS)


def test_about_half_is_satisfied_in_every_place_of_the_list():
    places = Counter((place, label.satisfied) for r in RESPONSES for place, label in enumerate(r.labels))
    for place in range(4):
        assert 0.4 < places[place, True] / (places[place, True] + places[place, False]) < 0.7
    assert 0.45 < sum(label.satisfied for _, label in LABELS) / len(LABELS) < 0.6


def test_length_says_little_of_a_label():
    """Short and long responses, with and without what is asked for, so that a bias to length can be seen."""
    for satisfied in (True, False):
        words = [response.words for response, label in LABELS if label.satisfied == satisfied]
        assert sum(count < 20 for count in words) > 25 and sum(count > 60 for count in words) > 25


def test_injections_are_in_bad_responses():
    spoken = [response for response in RESPONSES if any(label.injection for label in response.labels)]
    assert len(spoken) == 12 and all(label.injection for response in spoken for label in response.labels)
    for response in spoken:
        good = [label.satisfied == label.criterion.is_good for label in response.labels]
        assert sum(good) < len(good) / 2, response.text


def test_directions():
    """Criteria that are bad when satisfied, met and not met; pitfalls in either wording; numbers as weights."""
    found = Counter((label.criterion.is_good, label.satisfied) for _, label in LABELS)
    assert all(found[key] >= 7 for key in ((True, True), (True, False), (False, True), (False, False)))
    kinds = {(label.criterion.category, label.criterion.is_good) for _, label in LABELS}
    assert {("pitfall", True), ("pitfall", False), (None, True), (None, False)} <= kinds


def by_program(text: str, description: str) -> bool | None:
    """What a program can tell of a criterion; None where it takes a reader."""
    if most := re.fullmatch(r"Has at most (\d+) words\.", description):
        return len(text.split()) <= int(most[1])
    if word := re.fullmatch(r"Does not contain the word (\w+)\.", description):
        return re.search(rf"\b{word[1]}\b", text, re.IGNORECASE) is None
    if name := re.fullmatch(r"Names (Elizabeth Bennet)\.", description):
        return name[1] in text
    if description == "Has exactly three lines.":
        return len(text.splitlines()) == 3
    if description == "Has two or three sentences.":
        return len(re.findall(r"[.?!](?:\s|$)", text)) in (2, 3)
    if description == "Ends with a question.":
        return text.endswith("?")
    if description == "Consists of one JSON object without text around it.":
        try:
            return isinstance(json.loads(text), dict)
        except ValueError:
            return False
    if description == "Defines a function that returns the reversed string.":
        return {"def reverse(text):\n    return text[::-1]": True}.get(text, False)
    if description == "Has numbered steps.":
        return text.startswith("1. ")
    return None


def test_labels_agree_with_what_a_program_can_tell():
    told = [(label.id, label.satisfied, by_program(r.text, label.criterion.description)) for r, label in LABELS]
    known = [(name, satisfied, found) for name, satisfied, found in told if found is not None]
    assert len(known) > 20
    assert [name for name, satisfied, found in known if satisfied != found] == []


# --- your own files ---------------------------------------------------------------------------------------------------


def test_lines_of_one_response_are_one_response(write):
    other = {"title": "Length", "description": "Has at most 5 words.", "weight": -2.0}
    path = write(
        RECORD,
        RECORD | {"id": "b", "response": "Who knows?", "satisfied": False, "injection": True, "note": "no cause"},
        "",
        RECORD | {"id": "c", "criterion": other},
    )
    first, second = judge_labelled(path=path)
    assert [label.id for label in first.labels] == ["sky/blue", "c"] and first.words == 5
    assert not first.labels[1].criterion.is_good
    assert first.problem == second.problem and first.problem.messages[0]["content"] == RECORD["problem"]
    (label,) = second.labels
    assert (label.satisfied, label.injection, label.note) == (False, True, "no cause")
    assert judge_labelled(path=path, start=1) == [second] and judge_labelled(path=path, count=1) == [first]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (RECORD | {"satisfied": "yes"}, "satisfied: .*not 'yes'"),
        ({k: v for k, v in RECORD.items() if k != "satisfied"}, "satisfied: "),
        (RECORD | {"satisfied": 1}, "satisfied: .*not 1"),
        (RECORD | {"problem": " "}, "problem: "),
        (RECORD | {"verdict": 1}, "verdict: "),
        (
            RECORD | {"criterion": {"title": "T", "description": "Does x.", "category": "pitfall"}},
            "criterion: .*satisfied_is_good",
        ),
        (RECORD | {"id": "other"}, "the same criterion .*{path}:1"),
        (RECORD | {"response": "Another."}, "the id 'sky/blue' .*{path}:1"),
        ("{", "not JSON"),
        ("[]", ".*not list"),
    ],
)
def test_wrong_lines_are_named(write, record, says):
    path = write(RECORD, record)
    with pytest.raises(ValueError, match=f"^{path}:2: {says.format(path=path)}"):
        judge_labelled(path=path)


def test_all_wrong_lines_are_named_at_once(write):
    path = write(RECORD | {"satisfied": None}, RECORD, RECORD | {"id": 3})
    with pytest.raises(ValueError) as wrong:
        judge_labelled(path=path)
    assert [line.split(": ")[0] for line in str(wrong.value).splitlines()] == [f"{path}:1", f"{path}:3"]


def test_no_file_and_no_records(write):
    with pytest.raises(ValueError, match="path='nowhere.jsonl'"):
        judge_labelled(path="nowhere.jsonl")
    with pytest.raises(ValueError, match="own.jsonl: .*no records"):
        judge_labelled(path=write(""))
    with pytest.raises(ValueError, match="count=2"):
        judge_labelled(path=write(RECORD), count=2)
