"""What a criterion is allowed to be, and what two that say the same come to."""

import re

import pytest
from pydantic import ValidationError

from rolltune.rewards.rubric.schema import CATEGORY_WEIGHTS, Criterion, Rubric, check_category_weights, slugs


def make(description: str = "Names the unit.", **fields) -> Criterion:
    return Criterion(**({"title": "Unit", "description": description, "category": "essential"} | fields))


@pytest.mark.parametrize(
    "fields, is_good, magnitude",
    [
        ({}, True, 1.0),
        ({"category": "important"}, True, 0.7),
        ({"category": "optional"}, True, 0.3),
        ({"category": "pitfall", "satisfied_is_good": True}, True, 0.9),
        ({"category": "pitfall", "satisfied_is_good": False}, False, 0.9),
        ({"satisfied_is_good": False}, False, 1.0),
        ({"weight": 5}, True, 5.0),
        ({"category": None, "weight": -2}, False, 2.0),
        ({"weight": 2, "satisfied_is_good": False}, False, 2.0),
        ({"category": None, "weight": 0.5}, True, 0.5),
        ({"category": "pitfall", "weight": -2}, False, 2.0),
    ],
)
def test_direction_and_weight(fields, is_good, magnitude):
    criterion = make(**fields)
    assert (criterion.is_good, criterion.magnitude()) == (is_good, magnitude)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"category": None}, "neither a category nor a weight"),
        ({"weight": 0}, "has weight 0"),
        ({"weight": -1, "satisfied_is_good": True}, "a negative weight already"),
        ({"weight": -1, "satisfied_is_good": False}, "a negative weight already"),
        ({"weight": -5}, "'Unit' is essential and has the weight -5, .*category: pitfall"),
        ({"category": "optional", "weight": -0.1}, "is optional and has the weight -0.1"),
        ({"category": "pitfall"}, "pitfall without satisfied_is_good"),
        ({"category": "pitfall", "weight": 3}, "pitfall without satisfied_is_good"),
        ({"category": "vital"}, "'essential', 'important', 'optional' or 'pitfall'"),
        ({"weight": float("nan")}, "finite number"),
        ({"weight": float("inf")}, "finite number"),
        ({"weight": 1e7}, "less than or equal to 1000000"),
        ({"weight": "heavy"}, "valid number"),
        ({"title": "  "}, "at least 1 character"),
        ({"description": ""}, "at least 1 character"),
        ({"importance": 3}, "Extra inputs are not permitted"),
    ],
)
def test_what_is_refused(fields, message):
    with pytest.raises(ValidationError, match=message):
        make(**fields)


def test_a_rubric_holds_1_to_100_criteria():
    with pytest.raises(ValidationError, match="at least 1 item"):
        Rubric(criteria=())
    with pytest.raises(ValidationError, match="at most 100 items"):
        Rubric(criteria=tuple(make(f"Names unit {i}.") for i in range(101)))


def test_of_the_same_the_heaviest_stays_in_its_place():
    first, light, other = make("Names the unit."), make("Names  the unit", category="optional"), make("Is short.")
    heavy = make("Names the\nunit. ", weight=3)
    assert Rubric.of(light, other, first, light).merged() == Rubric.of(first, other)
    assert Rubric.of(first, other, heavy).merged() == Rubric.of(heavy, other)


def test_which_is_heaviest_depends_on_the_weights_of_the_categories():
    first, light = make(), make(category="optional")
    assert Rubric.of(first, light).merged(CATEGORY_WEIGHTS) == Rubric.of(first)
    assert Rubric.of(first, light).merged(dict(CATEGORY_WEIGHTS) | {"optional": 2.0}) == Rubric.of(light)


def test_the_other_direction_is_not_the_same():
    rubric = Rubric.of(make(), make(satisfied_is_good=False))
    assert rubric.merged() == rubric


def test_a_repeated_single_criterion_is_one():
    assert Rubric.of(make(), make(), make()).merged() == Rubric.of(make())


def test_width_spaces_and_a_full_stop_do_not_tell_criteria_apart():
    assert make("Names  the unit.").key == make("\uff2eames the unit").key == "Names the unit"
    assert make("Names the unit.").key != make("Names a unit.").key


@pytest.mark.parametrize(
    ("one", "other"),
    [("States x > 3.", "States x < 3."), ("The sum is -5.", "The sum is 5."), ("a+b", "a-b"), ("a + b", "a * b"),
     ("n!", "n"), ("5 mW", "5 MW"), ("x\u00b2", "x2"), ("\u00acp", "p"), ("f'(x)", "f(x)"), ("10%", "10"),
     ("\u2264 3", "\u2265 3"), ("is C++", "is C"), ("a=b", "a\u2260b"), ("Uses \U0001f600", "Uses \U0001f622"),
     ("$5", "\u20ac5"), ("is it?", "is it")],
)  # fmt: skip
def test_signs_and_symbols_tell_criteria_apart(one: str, other: str):
    assert len(Rubric.of(make(one), make(other)).merged().criteria) == 2


def test_category_weights():
    assert check_category_weights({}) == {"essential": 1.0, "important": 0.7, "optional": 0.3, "pitfall": 0.9}
    assert check_category_weights({"pitfall": 2})["pitfall"] == 2
    with pytest.raises(ValueError, match="category_weights.vital: unknown"):
        check_category_weights({"vital": 1})
    for weight in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="category_weights.pitfall: .*; must be > 0"):
            check_category_weights({"pitfall": weight})


def test_a_numbered_title_does_not_collide():
    assert slugs([make(title="A"), make(title="A"), make(title="A 2")]) == ["a", "a.2", "a_2"]


def test_two_titles_never_share_a_name():
    titles = [
        *(
            "Right Unit",
            "right unit!",
            "right-unit",
            "x > 3",
            "x < 3",
            "\u5355\u4f4d",
            "\u901f\u5ea6",
            "\u0415\u0434",
            "\u0418\u0434",
        ),
        *(
            "\U0001f600",
            "\U0001f622",
            "!",
            "?",
            "a" * 50,
            "a" * 60,
            "caf\u00e9",
            "cafe",
            "C",
            "C++",
            "C#",
            "a_b",
            "a b",
        ),
    ]
    names = [slugs([make(title=title)])[0] for title in titles]  # each in a rubric of its own
    assert len(set(names)) == len(titles)
    assert names[0] == "right_unit" and names[5] == "\u5355\u4f4d" and names[3].startswith("x_3.")
    assert all(re.fullmatch(r"[\w.]+", name) and len(name) < 60 for name in names)


def test_a_rubric_of_pitfalls_only_rewards_silence():
    pitfalls = [make(category="pitfall", satisfied_is_good=good) for good in (True, False)]
    assert Rubric.of(*pitfalls).rewards_silence and Rubric.of(make(category=None, weight=-1)).rewards_silence
    assert not Rubric.of(*pitfalls, make()).rewards_silence
