"""Records become rubrics, or an error that names field and value."""

import re

import pytest

from rolltune.rewards.rubric.load import collect, problem_record, rar_problem
from rolltune.rewards.rubric.schema import Criterion, Rubric

UNIT = {"title": "Unit", "description": "Names the unit.", "category": "essential"}
SHORT = {"title": "Short", "description": "Is short.", "weight": 2}
RUBRIC = Rubric.of(Criterion(**UNIT), Criterion(**SHORT))

# --- a user's own ------------------------------------------------------------------------------------------------


def test_a_flat_record():
    row = {"id": "p", "question": "How long?", "answer": 7.0, "solution": " So 7. ", "criteria": [UNIT, SHORT], "x": 1}
    problem = problem_record(row).to_problem("other")
    assert (problem.id, problem.answer, problem.solution) == ("p", "7", "So 7.")
    assert problem.messages == ({"role": "user", "content": "How long?"},)
    assert problem.rubric == RUBRIC


def test_a_record_as_write_rubrics_writes_it():
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How long?"}]
    row = {
        "problem": {"id": "p", "messages": messages, "answer": None, "solution": None},
        "rubric": {"criteria": [UNIT, SHORT]},
        "provenance": {"model": "m"},
    }
    problem = problem_record(row).to_problem("other")
    assert (problem.id, problem.answer, problem.solution) == ("p", None, None)
    assert problem.messages == tuple(messages)
    assert problem.rubric == RUBRIC


@pytest.mark.parametrize(
    "answer, canonical", [("7", "7"), (7, "7"), (7.5, "7.5"), (-2.0, "-2"), (" ", None), (None, None)]
)
def test_answers(answer, canonical):
    row = {"question": "How long?", "answer": answer, "criteria": [UNIT]}
    assert problem_record(row).to_problem("file/3").answer == canonical
    assert problem_record(row).to_problem("file/3").id == "file/3"


def test_ids_may_be_numbers():
    assert problem_record({"id": 3, "question": "How long?", "criteria": [UNIT]}).to_problem("x").id == "3"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"criteria": None}, "either 'criteria', a list, or 'rubric'"),
        ({"rubric": {"criteria": [UNIT]}}, "either 'criteria', a list, or 'rubric'"),
        ({"criteria": []}, "criteria: .*at least 1 item"),
        ({"criteria": "x"}, "criteria: .*list, not 'x'"),
        ({"criteria": [[UNIT]]}, r"criteria\[0\]: "),
        ({"criteria": [UNIT] * 101}, "criteria: .*at most 100 items"),
        ({"criteria": [UNIT, {**SHORT, "weight": 0}]}, r"criteria\[1\]: 'Short' has weight 0"),
        ({"criteria": [{**UNIT, "weigth": 3}]}, r"criteria\[0\]\.weigth: Extra inputs are not permitted, not 3"),
        ({"criteria": [{**UNIT, "category": "vital"}]}, r"criteria\[0\]\.category: .*'pitfall', not 'vital'"),
        ({"criteria": [{**UNIT, "category": "pitfall"}]}, r"criteria\[0\]: 'Unit' is a pitfall without satisfied_is"),
        ({"criteria": [{"title": "Unit", "category": "essential"}]}, r"criteria\[0\]\.description: Field required"),
        ({"question": None}, "either 'question', a string, or 'messages'"),
        ({"question": " "}, "question: .* not ' '"),
        ({"messages": [{"role": "user", "content": "x"}]}, "either 'question', a string, or 'messages'"),
        ({"question": None, "messages": []}, "messages: .*at least 1 item"),
        ({"question": None, "messages": [{"role": "robot", "content": "x"}]}, r"messages\[0\]\.role: .*not 'robot'"),
        (
            {"question": None, "messages": [{"role": "assistant", "content": "x"}]},
            "messages: must end with a user",
        ),
        ({"answer": True}, "answer.*not True"),
        ({"answer": ["7"]}, "answer.*not \\['7'\\]"),
        ({"id": ""}, "id.*not ''"),
        ({"id": 1.5}, "id.*not 1.5"),
        ({"problem": "p"}, "'problem' must be an object, not 'p'"),
    ],
)
def test_a_wrong_record(change, message):
    with pytest.raises(ValueError, match=message) as caught:
        problem_record({"question": "How long?", "criteria": [UNIT]} | change)
    assert "\n" not in str(caught.value)


def test_long_values_are_cut_in_messages():
    with pytest.raises(ValueError) as caught:
        problem_record({"question": "How long?", "criteria": [{**UNIT, "category": "x" * 10_000}]})
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("criteria", [{}, "x", [None], [[UNIT]], [UNIT] * 101])
def test_criteria_are_a_list_of_criteria(criteria):
    with pytest.raises(ValueError, match="criteria"):
        problem_record({"question": "How long?", "criteria": criteria})


def test_the_mistakes_of_all_records_are_told_up_to_twenty():
    def read(where: str, row: int) -> int:
        if row % 2:
            raise ValueError(f"{row} is odd")
        return row

    assert collect([("f:1", 2), ("f:2", 4)], read) == [2, 4]
    with pytest.raises(ValueError, match=r"^f:1: 1 is odd\nf:3: 3 is odd$"):
        collect([("f:1", 1), ("f:2", 2), ("f:3", 3)], read)
    with pytest.raises(ValueError) as caught:
        collect([(f"f:{i}", i) for i in range(50)], read)
    lines = str(caught.value).splitlines()
    assert len(lines) == 21 and lines[0] == "f:1: 1 is odd" and lines[-1] == "... and 5 more records"


# --- rows of Rubrics as Rewards ---------------------------------------------------------------------------------------


def item(description: str, weight: int, title: str = "Title") -> dict:
    return {"title": title, "description": description, "weight": weight}


def rar(*items: dict, **options):
    row = {"question": " Why? ", "reference_answer": " Because. ", "question_source": "s", "rubric": list(items)}
    return rar_problem(row, "rar/0", **options)


def only(*items: dict, **options) -> Criterion:
    (criterion,) = rar(*items, **options).rubric.criteria
    return criterion


def test_a_published_record():
    problem = rar(
        item("Essential Criteria: Names the cause.", 5, "Cause"),
        item("Important Criteria: Gives a reason.", 3),
        item("Optional Criteria: Is short.", 1),
        item("Pitfall Criteria: Recommends surgery.", -1),
        item("Pitfall Criteria: Avoids jargon.", -2),
    )
    assert (problem.id, problem.answer) == ("rar/0", "Because.")
    assert problem.messages == ({"role": "user", "content": "Why?"},)
    criteria = problem.rubric.criteria
    assert criteria[0] == Criterion(title="Cause", description="Names the cause.", category="essential")
    assert [c.category for c in criteria] == ["essential", "important", "optional", "pitfall", "pitfall"]
    assert [c.magnitude() for c in criteria] == [1.0, 0.7, 0.3, 0.9, 0.9]
    assert [c.is_good for c in criteria] == [True, True, True, False, True]


def test_the_published_numbers():
    """Without their sign: it is the same for both kinds of pitfalls."""
    problem = rar(
        item("Essential Criteria: Names the cause.", 5),
        item("Pitfall Criteria: Recommends surgery.", -2),
        item("Pitfall Criteria: Avoids jargon.", -1),
        weights="numbers",
    )
    assert [(c.magnitude(), c.is_good) for c in problem.rubric.criteria] == [(5, True), (2, False), (1, True)]


@pytest.mark.parametrize(
    "description, good",
    [
        ("Recommends antibiotics for a viral cold.", False),
        ("Fails to mention the risk of bleeding.", False),
        ("Claims that the reaction is endothermic.", False),
        ("Avoids confusing mass with weight.", True),
        ("The response should not assume an ideal gas.", True),
        ("Does not misapply the ideal gas law.", True),
        ("Does not include irrelevant details of the history.", True),
    ],
)
def test_the_direction_of_a_pitfall_is_its_wordings(description, good):
    assert only(item(f"Pitfall Criteria: {description}", -1)).is_good is good


@pytest.mark.parametrize(
    "description",
    ["Does not mention alternatives to surgery.", "Does not suggest delaying fluids.", "Surgery without need."],
)
def test_a_pitfall_that_does_not_say(description):
    unsaid, sure = item(f"Pitfall Criteria: {description}", -1), item("Essential Criteria: Names the cause.", 5)
    message = rf"rubric\[1\]\.description: 'Pitfall Criteria: {re.escape(description)}' does not say .*unsure: drop"
    with pytest.raises(ValueError, match=message):
        rar(sure, unsaid)
    assert len(rar(sure, unsaid, unsure="drop").rubric.criteria) == 1
    assert rar(sure, unsaid, unsure="bad").rubric.criteria[1].is_good is False
    assert rar(sure, unsaid, unsure="good").rubric.criteria[1].is_good is True
    assert rar(unsaid, unsure="drop") is None


def test_every_pitfall_that_does_not_say_is_named():
    unsaid = item("Pitfall Criteria: Does not mention x.", -1)
    with pytest.raises(ValueError, match=r"rubric\[0\]\.description: .*; rubric\[2\]\.description: "):
        rar(unsaid, item("Essential Criteria: Names the cause.", 5), unsaid)


@pytest.mark.parametrize(
    "description, weight, category, kept",
    [
        ("Names the cause.", 5, "essential", "Names the cause."),
        ("Names the cause.", 4, "important", "Names the cause."),
        ("Names the cause.", 3, "important", "Names the cause."),
        ("Names the cause.", 2, "optional", "Names the cause."),
        ("Avoids jargon.", -1, "pitfall", "Avoids jargon."),
        ("Esssential Criteria: Names the cause.", 5, "essential", "Names the cause."),
        ("optional criteria : Names the cause.", 3, "optional", "Names the cause."),
        ("Important Criterion: Names the cause.", 5, "important", "Names the cause."),
        ("Pitfall Criteria: Avoids jargon.", -2, "pitfall", "Avoids jargon."),
        ("Essential Criteria: ", 5, "essential", "Title"),
        ("**Essential Criteria**: Names the cause.", 1, "essential", "Names the cause."),
        ("- [Important] Names the cause.", 5, "important", "Names the cause."),
        ("Optional \u2013 Names the cause.", 5, "optional", "Names the cause."),
        ("Pitfalls Criteria\uff1aAvoids jargon.", -2, "pitfall", "Avoids jargon."),
        ("Essential-oil use is discouraged.", 3, "important", "Essential-oil use is discouraged."),
    ],
)
def test_category_by_prefix_else_by_number(description, weight, category, kept):
    criterion = only(item(description, weight))
    assert (criterion.category, criterion.description) == (category, kept)


@pytest.mark.parametrize("reference", ["", "  ", None])
def test_records_without_a_reference(reference):
    row = {"question": "Why?", "reference_answer": reference, "rubric": [item("Essential Criteria: x.", 5)]}
    assert rar_problem(row, "rar/0").answer is None


@pytest.mark.parametrize(
    "change, message",
    [
        ({"question": ""}, "question: .*not ''"),
        ({"rubric": []}, "rubric: .*at least 1 item"),
        ({"rubric": "[]"}, "rubric: .*list, not '\\[\\]'"),
        ({"rubric": [item("x", 5) | {"weight": 2.5}]}, r"rubric\[0\]\.weight: .*integer, not 2.5"),
        ({"rubric": [item("x", 5) | {"weight": True}]}, r"rubric\[0\]\.weight: .*integer, not True"),
        ({"rubric": [{"title": "x", "weight": 5}]}, r"rubric\[0\]\.description: Field required"),
        ({"reference_answer": 4}, "reference_answer: .*string, not 4"),
    ],
)
def test_a_wrong_published_record(change, message):
    row = {"question": "Why?", "reference_answer": "x", "rubric": [item("Essential Criteria: x.", 5)]}
    with pytest.raises(ValueError, match=message):
        rar_problem(row | change, "rar/0")


@pytest.mark.parametrize("weights", ["categories", "numbers"])
@pytest.mark.parametrize(
    ("description", "weight", "says"),
    [
        ("Essential Criteria: Names the cause.", -5, "'Title' is essential and has the weight -5; must be above 0"),
        ("Optional Criteria: Is short.", -1, "'Title' is optional and has the weight -1; must be above 0"),
        ("Pitfall Criteria: Avoids jargon.", 2, "'Title' is pitfall and has the weight 2; must be below 0"),
        ("Essential Criteria: x.", 0, "'Title' has weight 0"),
        ("x.", 0, "'Title' has weight 0"),
    ],
)
def test_a_number_that_contradicts_the_category(description: str, weight: int, says: str, weights):
    with pytest.raises(ValueError, match=rf"rubric\[1\]\.weight: {says}"):
        rar(item("Essential Criteria: Names the cause.", 5), item(description, weight), weights=weights)
