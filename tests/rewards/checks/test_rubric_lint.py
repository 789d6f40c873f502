"""What the lint finds, and what it lets pass."""

import pytest

from rolltune.rewards.checks.rubric_lint import Finding, lint
from rolltune.rewards.rubric.schema import Criterion, Rubric
from rolltune.rewards.rubric.wording import holds_for_silence, is_doubly_negated, pitfall_direction, wording

GOOD = [
    Criterion(title="Cause", description="Says that air scatters blue light most.", category="essential"),
    Criterion(title="Angle", description="Says that the light comes from everywhere.", category="essential"),
    Criterion(title="Name", description="Names Rayleigh.", category="important"),
    Criterion(title="Sunset", description="Tells why sunsets are red.", category="important"),
    Criterion(title="Violet", description="Tells why it is not violet.", category="optional"),
    Criterion(title="Words", description="Can be understood by a child.", category="important"),
    Criterion(title="Sea", description="Avoids the sea as a reason.", category="pitfall", satisfied_is_good=True),
]


def found(*criteria: Criterion, **options) -> list[tuple[str, str, int | None]]:
    """Findings of the seven good criteria and these behind them, numbered from 8."""
    return [(f.severity, f.rule, f.criterion) for f in lint(Rubric.of(*GOOD, *criteria), **options)]


def one(description: str, **fields) -> Criterion:
    category = "important" if fields.get("weight", 1) > 0 else None
    return Criterion(**({"title": "Tested", "description": description, "category": category} | fields))


def test_a_good_rubric_has_no_findings():
    assert found() == []


# --- direction --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "description, reads",
    [
        ("Avoids confusing mass and weight.", "good"),
        ("Refrains from guessing.", "good"),
        ("The response should not confuse mass and weight.", "good"),
        ("Must name the unit.", "good"),
        ("Does not misapply the gas law.", "good"),
        ("Does not fail to name the unit.", "good"),
        ("Doesn\u2019t include irrelevant history.", "good"),
        ("Never claims false certainty.", "good"),
        ("Does not invent facts.", "good"),
        ("Correctly names the unit.", "good"),
        ("Fails to mention the risk.", "bad"),
        ("The answer omits the unit.", "bad"),
        ("Lacks a conclusion.", "bad"),
        ("Incorrectly states the sign.", "bad"),
        ("States wrongly that mass is a force.", "bad"),
        ("Misapplies the gas law.", "bad"),
        ("Recommends surgery at once.", "act"),
        ("Relies on jargon.", "act"),
        ("Neglects air resistance.", "act"),
        ("Does not mention exploring alternatives with the patient.", "unsaid"),
        ("Does not suggest delaying fluids despite signs of shock.", "unsaid"),
        ("Does not address the incorrect premise.", "unsaid"),
        ("Remains concise and avoids detail.", "unsaid"),
        ("Shoulder pain is named.", "unsaid"),
        ("\u907f\u514d\u4f7f\u7528\u672f\u8bed", "unsaid"),
        ("", "unsaid"),
    ],
)
def test_wording(description, reads):
    assert wording(description) == reads
    assert pitfall_direction(description) == {"good": True, "bad": False, "act": False, "unsaid": None}[reads]


@pytest.mark.parametrize(
    "description, fields, rule",
    [
        ("Avoids jargon.", {"category": "pitfall", "satisfied_is_good": False}, "polarity"),
        ("Avoids jargon.", {"weight": -1}, "polarity"),
        ("Avoids jargon.", {"satisfied_is_good": False}, "polarity"),
        ("Correctly names the gas.", {"satisfied_is_good": False}, "polarity"),
        ("Does not confuse sea and sky.", {"weight": -2}, "polarity"),
        ("Recommends goggles.", {"category": "pitfall", "satisfied_is_good": True}, "polarity"),
        ("Recommends goggles.", {"category": "pitfall", "weight": 1, "satisfied_is_good": True}, "polarity"),
        ("Fails to name a gas.", {"category": "pitfall", "satisfied_is_good": True}, "polarity"),
        ("Fails to name a gas.", {}, "polarity"),
        ("Fails to name a gas.", {"satisfied_is_good": True}, "polarity"),
    ],
)
def test_a_direction_against_the_wording_is_an_error(description, fields, rule):
    assert found(one(description, **fields)) == [("error", rule, 8)]


@pytest.mark.parametrize(
    "description, fields",
    [
        ("Avoids jargon.", {"category": "pitfall", "satisfied_is_good": True}),
        ("Avoids jargon.", {"category": "pitfall", "weight": 1, "satisfied_is_good": True}),
        ("Avoids jargon.", {}),
        ("Recommends goggles.", {"category": "pitfall", "satisfied_is_good": False}),
        ("Recommends goggles.", {"category": "pitfall", "weight": -1}),
        ("Recommends goggles.", {}),
        ("Recommends goggles.", {"satisfied_is_good": False}),
        ("Neglects the ozone.", {}),
        ("Does not mention the ozone.", {"category": "pitfall", "satisfied_is_good": False}),
        ("Does not mention the ozone.", {"category": "pitfall", "satisfied_is_good": True}),
        ("Does not mention the ozone.", {"category": "pitfall", "weight": -1}),
        ("Fails to name a gas.", {"weight": -1}),
    ],
)
def test_a_direction_with_the_wording_or_where_there_is_none_passes(description, fields):
    assert found(one(description, **fields)) == []


@pytest.mark.parametrize(
    "description", ["Does not fail to name a gas.", "Doesn't avoid numbers.", "Avoids omitting the gas."]
)
def test_a_denied_denial_is_a_warning(description):
    assert ("warning", "double_negation", 8) in found(one(description))


@pytest.mark.parametrize("description", ["Avoids jargon.", "Does not name the sea.", "Knots do not hold."])
def test_one_denial_is_none(description):
    assert not is_doubly_negated(description)


# --- repetitions ------------------------------------------------------------------------------------------------------


def test_a_repeated_criterion_is_an_error():
    """Also where its weight or title is another: it would be judged, and count, twice."""
    assert found(one("Names  Rayleigh", weight=3)) == [("error", "repeated", 8)]


def test_the_same_in_both_directions_cancels_out():
    assert found(one("Names Rayleigh.", weight=-0.7)) == [("error", "polarity", 8)]


@pytest.mark.parametrize(
    "description",
    [
        "Says that the air scatters most blue light.",
        "Fails to tell why the sunsets are red.",  # a pitfall that mirrors a good criterion
    ],
)
def test_nearly_the_same_is_a_warning(description):
    bad = description.startswith("Fails")
    assert found(one(description, weight=-0.9 if bad else 0.9)) == [("warning", "near_duplicate", 8)]


def test_other_numbers_are_other_criteria():
    first = one("Dates the start of the war to July 1914.")
    assert found(first, one("Dates the start of the war to July 1918.")) == []
    assert found(first, one("Dates the very start of the war to July 1914.")) == [("warning", "near_duplicate", 9)]


# --- the reference, and what is elsewhere -----------------------------------------------------------------------------

ANSWER = "Air scatters short waves more than long ones, and so the light from all over the sky is blue, not white."


@pytest.mark.parametrize(
    "description, answer, findings",
    [
        (f"Says: {ANSWER.upper()}", ANSWER, [("error", "answer_copied", 8)]),
        ("Gives 1,800 dollars.", "1800 dollars", []),
        ("Gives 42.", "42", []),
        ("Says that short waves scatter more.", ANSWER, []),
        (f"Says that {ANSWER[4:80]} ...", ANSWER, []),
        (f"Says that {ANSWER[4:90]} ...", ANSWER, [("warning", "answer_copied", 8)]),
        ("Calls it pneumonoultramicroscopicsilicovolcanoconiosis.", "pneumonoultramicroscopicsilicovolcanoconiosis",
         [("error", "answer_copied", 8)]),
        ("Anything.", "", []),
    ],
)  # fmt: skip
def test_the_answer_is_not_to_be_copied(description, answer, findings):
    assert found(one(description), answer=answer) == findings


@pytest.mark.parametrize(
    "description, severity",
    [
        ("Names the gas as above.", "error"),
        ("Gives the figure listed below.", "error"),
        ("Satisfies criterion 2 too.", "error"),
        ("Goes beyond the previous criterion.", "error"),
        ("Names the aforementioned gas.", "error"),
        ("Agrees with the reference answer.", "warning"),
        ("Says that it rises as above 5 degrees.", None),
        ("Names the mountain above the village.", None),
        ("Names Koch's criteria.", None),
        ("Calls it an ideal solution.", None),
        ("Meets the following criteria of a haiku.", None),
        ("Numbers step 2 of the recipe.", None),
    ],
)
def test_criteria_stand_by_themselves(description, severity):
    expected = [(severity, "not_self_contained", 8)] if severity else []
    assert found(one(description)) == expected


def test_long_ones():
    assert found(one("Tells " + "much " * 80)) == [("warning", "long", 8)]
    assert found(one("Tells much.", title="Much " * 20)) == [("warning", "long", 8)]


# --- numbers and weights ----------------------------------------------------------------------------------------------


def numbered(count: int) -> Rubric:
    return Rubric(criteria=tuple(one(f"Names river {i}.") for i in range(count)))


@pytest.mark.parametrize("count, severity", [(1, "error"), (2, "warning"), (6, "warning"), (7, None), (20, None)])
def test_how_many(count, severity):
    assert [(f.severity, f.rule) for f in lint(numbered(count))] == ([(severity, "count")] if severity else [])


def test_too_many():
    assert [(f.severity, f.rule, f.message) for f in lint(numbered(21))] == [
        ("warning", "count", "the rubric has 21 criteria, each of them judged for every response")
    ]


def test_how_many_is_an_option():
    assert lint(numbered(3), fewest=3) == [] and lint(numbered(21), most=21) == []
    assert [f.rule for f in lint(numbered(4), fewest=2, most=3)] == ["count"]


def test_one_that_outweighs_all_others():
    """5.3 is the weight of the seven."""
    assert found(one("Names the gas.", weight=5.4)) == [("warning", "weight", 8)]
    assert found(one("Names the gas.", weight=5.2)) == []


def test_pitfalls_that_outweigh_what_is_essential():
    pitfalls = [
        one(f"Avoids phrase {i}.", category="pitfall", satisfied_is_good=True, title=f"Phrase {i}") for i in range(2)
    ]
    assert found(pitfalls[0]) == []  # 1.8 of pitfalls, 2.0 of essential ones
    assert found(*pitfalls) == [("warning", "weight", None)]
    heavy = {"category_weights": {"essential": 2.0, "important": 0.7, "optional": 0.3, "pitfall": 0.9}}
    assert found(*pitfalls, **heavy) == []


def test_marks_for_saying_nothing():
    avoid = [one(f"Avoids phrase {i}.", title=f"Phrase {i}") for i in range(7)]
    does = [one(f"Uses phrase {i}.", weight=-1.0, title=f"Phrase {i}") for i in range(7)]
    omits = [one(f"Omits phrase {i}.", weight=-1.0, title=f"Phrase {i}") for i in range(7)]
    assert [(f.severity, f.rule) for f in lint(Rubric(criteria=tuple(avoid)))] == [("error", "free_marks")]
    assert [(f.severity, f.rule) for f in lint(Rubric(criteria=tuple(does)))] == [("error", "free_marks")]
    assert lint(Rubric(criteria=tuple(omits))) == []
    assert found(*does) == [("warning", "free_marks", None)]  # 7.9 of 11.9


@pytest.mark.parametrize(
    "description, holds",
    [("Avoids jargon.", True), ("Does not name it.", True), ("Misses the unit.", True), ("Misstates it.", False)],
)
def test_what_holds_of_an_empty_response(description, holds):
    assert holds_for_silence(description) is holds


# --- what a finding says ----------------------------------------------------------------------------------------------


def test_a_finding_names_rubric_and_criterion_and_mends():
    (finding,) = lint(Rubric.of(*GOOD, one("Avoids jargon.", weight=-1)), name="sky/1")
    assert finding == Finding(
        severity="error",
        rule="polarity",
        rubric="sky/1",
        criterion=8,
        message="criterion 8, 'Tested': reads as good to satisfy and is marked bad: 'Avoids jargon.'",
        mend="give the weight 1, or say what the response does wrong",
    )
    assert str(finding) == (
        "error: sky/1: criterion 8, 'Tested': reads as good to satisfy and is marked bad: 'Avoids jargon.'; "
        "give the weight 1, or say what the response does wrong"
    )


def test_text_that_was_written_to_be_slow_to_read():
    """20 criteria of 100,000 characters; the time limit is the suite's patience."""
    nasty = ["not " * 25_000, "a" * 100_000, "does not " * 10_000, "as above " * 10_000, "\u0301" * 100_000]
    rubric = Rubric(criteria=tuple(one(text) for text in nasty for _ in range(4)))
    assert {finding.rule for finding in lint(rubric, answer="avoid " * 20_000)} >= {"long", "repeated"}
