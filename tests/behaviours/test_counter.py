"""The counter of behaviours: what it counts sentence by sentence, and how well it agrees with counts by hand."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.behaviours import BEHAVIOURS, BehaviourCounts, agreement, count_behaviours, labelled_traces
from rolltune.behaviours.counter import MAX_CHARS, MAX_COUNT
from rolltune.data.countdown import countdown
from rolltune.data.gsm_symbolic import gsm_symbolic
from rolltune.traces.countdown import CountdownTraceWriter


def counted(text: str) -> tuple[int, ...]:
    """Verification, backtracking, subgoals, backward chaining."""
    return tuple(count_behaviours(text).as_dict().values())


@pytest.mark.parametrize(
    ("text", "verification"),
    [
        ("3 * 8 = 24. Let me check: 24 / 8 = 3.", 1),
        ("3 * 8 = 24.\n**Check:** 24 / 8 = 3 \N{CHECK MARK}", 1),
        ("x = 6. Plugging x = 6 back into the equation gives 19, which holds.", 1),
        ("63 - 35 = 28, which is not 60.", 1),
        ("63 - 35 = 28. Not 60.", 1),
        ("9 + 4 = 13 (too low)\n9 * 4 = 36 (too high)\n(9 - 4) * 5 = 25", 2),
        ("So x = 6. Let me double-check. 2 * 6 + 7 is 19. Yes, that is right.", 1),  # announced, done, concluded
        ("5 * 4 = 20. Does that equal 24? No.", 1),
        ("5 * 4 = 20. That matches the target. 20 is 5 * 4, and every number is used once.", 1),
        ("8 + 2 = 10, not 24. 8 * 2 = 16, not 24. 8 / 2 = 4, not 24.", 3),
        ("3 * 8 \N{NOT EQUAL TO} 25", 1),
        ("3 * 8 = 24. LET ME CHECK: 24 / 8 = 3.", 1),
        ("3 * 8 = 24. Let\N{RIGHT SINGLE QUOTATION MARK}s check: 24 / 8 = 3.", 1),
        ("3 * 8 = 24. The answer is 24.", 0),
        ("He wrote a check for 3 * 8 = 24 dollars and checked in two bags.", 0),
        ("The team verified 40 of 3 * 8 = 24 accounts.", 0),
        ('3 * 8 = 24. "Let me check," she said.', 0),
        ("I must use each number exactly once. 3 * 8 = 24.", 0),  # the rule, not a check of it
        ("From y = 2x we get 3 * 2x = 6. Substituting this back into the first equation, we get x = 1.", 0),
        ("Check on the sauce. If it is too thick, add 2 spoons of water.", 0),
    ],
)
def test_verification(text, verification):
    assert counted(text) == (verification, 0, 0, 0)


@pytest.mark.parametrize(
    ("text", "backtracking"),
    [
        ("That does not work. Wait, let me go back. I will try another way.", 1),
        ("3 + 8 = 11. Dead end. 3 * 8 = 24. Let me start over. 8 - 3 = 5.", 2),
        ("Let me try 3 * 8 = 24 instead. This leads nowhere.", 2),  # a new path, and its end
        ("It takes 2 hours, wait, no, it leaves at 9:40.", 1),
        ("Wait, I misread the question.", 1),
        ("Use the law of sines. Let me use the law of cosines instead.", 1),
        ("Wait, let me double-check that.", 0),  # a check
        ("Hmm, wait. Let me double-check that.", 0),
        ("Wait, is that the radius?", 0),
        ("She went back to the store and tries again.", 0),
        ("Go back home and wait 10 minutes.", 0),
        ("If it does not work, go back to the start.", 0),
        ("The house is on a dead end street.", 0),
        ("Instead of 6 books she buys 5.", 0),
        ("The elevator does not work on Sundays.", 0),
    ],
)
def test_backtracking(text, backtracking):
    assert count_behaviours(text).backtracking == backtracking


@pytest.mark.parametrize(
    ("text", "subgoals"),
    [
        ("Step 1: Find the cost of the pens.\n### Step 2: Add both.", 2),
        ("First, I need to find the cost of the pens. Next, let's calculate the cost of the books.", 2),
        ("First goal: make 17 from 21 and 4.", 1),
        ("If I can make 8 then I am done.", 1),
        ("I want to get 12 from these.", 1),
        ("Let me break this into 2 parts. Step 1: Add. Step 2: Subtract.", 2),  # the plan is its stages
        ("Let me break this into 2 parts. Adding comes early.", 1),
        ("I need to find how much money she has left.", 0),
        ("Then 3 * 4 = 12. Now I multiply both.", 0),
        ("First he buys 6 books. Her goal is to save 300 dollars.", 0),
        ("Step 1 of the stairs is 20 cm high.", 0),
    ],
)
def test_subgoal_setting(text, subgoals):
    assert count_behaviours(text).subgoal_setting == subgoals


@pytest.mark.parametrize(
    ("text", "links"),
    [
        ("72 / 8 = 9, so I need 9 from 3, 5 and 1.", 1),
        ("To get 24 I need 8 from 5 and 3.", 1),
        ("Working backwards from 36: 36 / 9 = 4. So I need 4 from 8 and 5.", 1),
        ("If the last step is adding 19, it takes 41.", 1),
        ("The question asks for the profit, so I need the income.", 1),
        ("It is enough to show that n is even.", 1),
        ("Let me work backwards.", 1),
        ("To find the total, we multiply 3 by 4.", 0),
        ("To make 5 cakes we need 5 * 3 = 15 eggs.", 0),
        ("He walks backwards for 3 miles. She needs 5 more from the store.", 0),
        ("4 * 3 = 12, so we need 12 chairs.", 0),
    ],
)
def test_backward_chaining(text, links):
    assert count_behaviours(text).backward_chaining == links


def test_a_loop_counts_once_and_the_same_words_of_other_sums_do_not():
    """A model that repeats itself must not look reflective."""
    assert counted("20 + 6 = 26, which is not 31. That does not work, let me try again.\n" * 50) == (1, 1, 0, 0)
    assert counted("Wait, I made an error. " * 50) == (0, 1, 0, 0)
    assert counted("8 + 5 = 13. Not 42. Go back.\n8 * 5 = 40. Not 42. Go back.") == (2, 2, 0, 0)


def test_what_is_bounded():
    many = "".join(f"{n} + 1 = {n + 1}, not 7.\n" for n in range(10, 1000))
    assert counted(many) == (MAX_COUNT, 0, 0, 0)
    assert counted(" " * MAX_CHARS + "3 * 8 = 24. Let me check: 24 / 8 = 3.") == (0, 0, 0, 0)


def test_the_counts_by_name():
    counts = BehaviourCounts(verification=1, backtracking=2, subgoal_setting=3, backward_chaining=4)
    assert tuple(counts.as_dict()) == BEHAVIOURS
    assert list(counts.as_dict().values()) == [1, 2, 3, 4]


CUES = [
    "wait",
    "let me check",
    "not 24",
    "go back",
    "3 * 8 = 24",
    "so I need 8",
    "first",
    "\n",
    ". ",
    '"',
    "<",
    "**",
    "\\(",
]


@given(st.lists(st.one_of(st.sampled_from(CUES), st.text(max_size=5)), max_size=40).map(" ".join))
def test_takes_any_text(text):
    assert all(0 <= count <= MAX_COUNT for count in counted(text))


# --- against counts by hand -------------------------------------------------------------------------------------------

# Presence (precision, recall) and counts (precision, recall), a little under what is measured.
FLOORS = {
    "dev": {
        "verification": (0.95, 0.80, 0.95, 0.78),
        "backtracking": (0.95, 0.86, 0.93, 0.86),
        "subgoal_setting": (0.95, 0.73, 0.93, 0.68),
        "backward_chaining": (0.95, 0.78, 0.95, 0.60),
    },
    "test": {
        "verification": (0.90, 0.80, 0.93, 0.78),
        "backtracking": (0.95, 0.80, 0.95, 0.70),
        "subgoal_setting": (0.88, 0.80, 0.90, 0.70),
        "backward_chaining": (0.85, 0.95, 0.90, 0.70),
    },
}


@pytest.mark.parametrize("split", ["dev", "test"])
def test_agrees_with_the_labelled_traces(split):
    traces = labelled_traces(split)
    found = agreement([count_behaviours(trace.text) for trace in traces], [trace.counts for trace in traces])
    for name, floors in FLOORS[split].items():
        measured = found[name]
        shares = (measured.precision, measured.recall, measured.count_precision, measured.count_recall)
        assert all(share and share >= floor for share, floor in zip(shares, floors, strict=True)), (name, shares)


def test_worked_solutions_of_people_show_no_behaviour_but_subgoals():
    solutions = [problem.solution for problem in gsm_symbolic(count=100)]
    counts = [count_behaviours(solution) for solution in solutions]
    assert sum(c.verification + c.backtracking + c.backward_chaining for c in counts) == 0


@pytest.mark.parametrize("wording", ["varied", "terse"])
@pytest.mark.parametrize(
    ("condition", "shown"),
    [
        ("negative_control", ()),
        ("backtracking_verification", ("verification",)),
        ("backtracking_subgoals", ("subgoal_setting",)),
        ("backtracking_backward", ("backward_chaining",)),
    ],
)
def test_traces_of_a_condition_show_its_behaviours_alone(condition, shown, wording):
    writer = CountdownTraceWriter(condition=condition, wording=wording)
    problems = countdown(count=20, sizes=(3, 4), operations="+-*")
    for seed, problem in enumerate(problems):
        counts = count_behaviours(writer.compose(problem, seed=seed)).as_dict()
        others = {name for name in BEHAVIOURS if counts[name]} - {"backtracking"}  # not every trace has a dead end
        assert others == set(shown), problem.id
        assert condition != "negative_control" or counts["backtracking"] == 0


def test_needs_no_torch():
    code = "import sys, rolltune.behaviours; assert 'torch' not in sys.modules and 'openai' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
