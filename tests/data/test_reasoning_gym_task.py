"""reasoning-gym tasks: scalar answers, no repeated questions, mistakes in names and options."""

import re

import pytest

from rolltune.data.dataset import overlap
from rolltune.data.reasoning_gym import reasoning_gym_task


def test_gold_answers_are_right():
    """Checked on a task whose answer a reader can work out."""
    data = reasoning_gym_task(task="chain_sum", size=50, min_terms=2, max_terms=3, min_digits=1, max_digits=2)
    for problem in data:
        terms = re.findall(r"([+-]?) ?(\d+)", problem.messages[0]["content"].split(":")[1])
        assert len(terms) in (2, 3)
        assert str(sum(int(sign + digits) for sign, digits in terms)) == problem.answer
    assert data[0].id == "chain_sum/seed0/0"


def test_same_arguments_same_problems():
    first, second = (reasoning_gym_task(task="gcd", size=20, seed=3) for _ in range(2))
    assert list(first) == list(second)
    assert list(first) != list(reasoning_gym_task(task="gcd", size=20, seed=500))


def test_repeated_questions_are_left_out_and_slices_are_disjoint():
    options = {"task": "chain_sum", "size": 300, "max_terms": 2, "min_digits": 1, "max_digits": 1}
    whole = reasoning_gym_task(**options)
    questions = [p.messages[0]["content"] for p in whole]
    assert len(set(questions)) == len(questions) < 300
    train = reasoning_gym_task(**options, count=100)
    heldout = reasoning_gym_task(**options, start=100)
    assert [*train, *heldout] == list(whole)
    assert overlap(train, heldout) == []
    with pytest.raises(ValueError, match="reasoning-gym chain_sum: start=300"):
        reasoning_gym_task(**options, start=300)


def test_neighbouring_seeds_are_no_held_out_set():
    train = reasoning_gym_task(task="chain_sum", size=100, seed=0)
    assert len(overlap(train, reasoning_gym_task(task="chain_sum", size=50, seed=1))) == 50


@pytest.mark.parametrize("task", ["leg_counting", "dice", "course_schedule", "spell_backward", "number_sequence"])
def test_tasks_with_one_number_fraction_or_word(task):
    assert all(p.answer for p in reasoning_gym_task(task=task, size=10))


@pytest.mark.parametrize("task", ["mini_sudoku", "rush_hour", "list_functions", "palindrome_generation", "sokoban"])
def test_tasks_with_other_answers_are_refused(task):
    with pytest.raises(ValueError, match=f"task='{task}' has answers"):
        reasoning_gym_task(task=task, size=10)


def test_unknown_names_get_the_nearest():
    with pytest.raises(ValueError, match="task='chain_sums'; did you mean 'chain_sum'"):
        reasoning_gym_task(task="chain_sums", size=10)
    with pytest.raises(ValueError, match=r"task='zzzz'; .*chain_sum"):
        reasoning_gym_task(task="zzzz", size=10)
    with pytest.raises(ValueError, match="'min_number'; did you mean 'min_numbers'"):
        reasoning_gym_task(task="gcd", size=10, min_number=2)


def test_options_that_the_task_refuses():
    with pytest.raises(ValueError, match=r"'chain_sum' .*'min_terms': 0"):
        reasoning_gym_task(task="chain_sum", size=10, min_terms=0)
    with pytest.raises(ValueError, match="size=0"):
        reasoning_gym_task(task="chain_sum", size=0)
