"""Warn of runs that learn from less than it seems. Each warning is one line, and rank 0 prints it once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence

from rolltune.metrics.summary import has_signal
from rolltune.prompts import PromptRenderer
from rolltune.terminal import printable
from rolltune.types import Problem

MANY_EPOCHS = 4  # of supervised training on the same examples
STEPS_WITHOUT_SIGNAL = 5


def show(lines: Iterable[str], *, is_main: bool = True) -> None:
    for line in lines if is_main else ():
        print(printable(f"note: {line}"), flush=True)


def about_data(
    train: Sequence[Problem], heldout: Sequence[Problem], *, max_heldout: int, per_step: int, key: str
) -> Iterator[str]:
    """Yield what is unusual in the data of a training run.

    Args:
        train: the training problems.
        heldout: the held-out problems that are used.
        max_heldout: ``eval.max_problems``.
        per_step: problems taken in a step.
        key: the config key of ``per_step``.
    """
    if len(train) < per_step:
        yield f"data.train: {len(train)} problems; fewer than {key}, {per_step}, so that some come twice in a step"
    for name, problems in (("data.train", train), ("data.heldout", heldout)):
        repeated = _repeated(problems)
        if repeated:
            first, again = repeated[0]
            yield (
                f"{name}: {len(repeated)} of {len(problems)} problems repeat an earlier one, such as {again}, which "
                f"repeats {first}"
            )
    if len(heldout) < max_heldout:
        yield f"data.heldout: {len(heldout)} problems; fewer than eval.max_problems, {max_heldout}"


def about_prompts(render: PromptRenderer) -> Iterator[str]:
    """Yield a line if prompts depend on the day."""
    if render.writes_date():
        yield (
            "the chat template writes today's date, so a run that is resumed on another day sees other prompts; if the "
            "template has a variable for it, set it: prompt.chat_template_kwargs={date_string: ...}"
        )


def about_epochs(num_examples: int, trained: int) -> Iterator[str]:
    """Yield a line if a supervised run sees its examples often, since it may learn them by heart."""
    if trained > MANY_EPOCHS * num_examples:
        yield f"data.train: each of the {num_examples} examples is trained on {trained / num_examples:.1f} times"


class SignalWatch:
    """Notices steps in a row that have nothing to learn from."""

    def __init__(self) -> None:
        self._steps = 0
        self._is_told = False

    def after(self, metrics: Mapping[str, float]) -> list[str]:
        """Return the lines to show after a step with these metrics."""
        self._steps = 0 if has_signal(metrics) else self._steps + 1
        if self._is_told or self._steps < STEPS_WITHOUT_SIGNAL:
            return []
        self._is_told = True
        reward = f"; the mean reward is {metrics['reward/mean']:.3g}" if "reward/mean" in metrics else ""
        return [
            f"{self._steps} steps in a row had nothing to learn from: all rewards of a group were equal, in every group"
            f"{reward}. The problems are too hard or too easy, or the reward is constant"
        ]


def _repeated(problems: Sequence[Problem]) -> list[tuple[str, str]]:
    """(id of the first, id of the repetition) of problems with the same messages, answer and solution."""
    first: dict[object, str] = {}
    found = []
    for problem in problems:
        messages = tuple((message["role"], message["content"]) for message in problem.messages)
        key = (messages, problem.answer, problem.solution)
        if key in first:
            found.append((first[key], problem.id))
        first.setdefault(key, problem.id)
    return found
