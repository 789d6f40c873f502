"""Warn of runs that learn from less than it seems. Each warning is one line.

Rank 0 prints those about the data and about missing signal once. Those about a run's metrics are in its report.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence

from rolltune.metrics.log import Record
from rolltune.metrics.summary import has_signal
from rolltune.prompts import PromptRenderer
from rolltune.terminal import printable
from rolltune.types import Problem

MANY_EPOCHS = 4  # of supervised training on the same examples
STEPS_WITHOUT_SIGNAL = 5
MANY_TRUNCATED = 0.1  # share of completions, as are the next
MANY_UNSCORED = 0.05
LENGTH_CORRELATION = 0.5
MISMATCH_GROWTH = 2.0  # last fifth of the steps over the first
SMALL_MISMATCH = 1e-3  # mean difference of log-probs below which growth is rounding


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


def about_metrics(records: Sequence[Record]) -> Iterator[str]:
    """Yield what the metrics of a training run warn of.

    Args:
        records: the lines of ``metrics.jsonl``.
    """
    steps = [record for record in records if record["step"] > 0]
    idle = sum(record.get("updates") == 0 or record.get("skipped_step") == 1 for record in steps)
    if idle:
        yield f"no optimizer step was taken in {idle} of {len(steps)} steps"
    signal = SignalWatch()
    for record in steps:
        yield from signal.after({name: value for name, value in record.items() if value is not None})
    truncated = _last_fifth(steps, "completions/truncated")
    if truncated is not None and truncated > MANY_TRUNCATED:
        yield (
            f"{truncated:.0%} of the completions of the last steps were cut at sampling.max_new_tokens; a cut response "
            "often has no answer"
        )
    unscored = _last_fifth(steps, "reward/unscored")
    if unscored is not None and unscored > MANY_UNSCORED:
        yield f"{unscored:.0%} of the completions of the last steps are unscored, so they are not trained on"
    correlation = _last_fifth(steps, "reward/length_correlation")
    if correlation is not None and abs(correlation) > LENGTH_CORRELATION:
        longer = "longer" if correlation > 0 else "shorter"
        yield f"reward and length are correlated ({correlation:+.2f} in the last steps): {longer} completions earn more"
    alarms = [record["step"] for record in records if record.get("overoptimization/alarm")]
    if alarms:
        yield f"the training reward and the gold measure came apart, first at step {alarms[0]}: read the samples"
    first, last = _first_fifth(steps, "mismatch/mean_abs"), _last_fifth(steps, "mismatch/mean_abs")
    if first is not None and last is not None and last > max(SMALL_MISMATCH, MISMATCH_GROWTH * first):
        yield (
            f"the mismatch of sampler and trainer grew from {first:.2g} to {last:.2g}, in mean difference of log-probs "
            "per token"
        )


def _first_fifth(records: Sequence[Record], name: str) -> float | None:
    values = [record[name] for record in records if record.get(name) is not None]
    return statistics.fmean(values[: max(1, len(values) // 5)]) if values else None


def _last_fifth(records: Sequence[Record], name: str) -> float | None:
    return _first_fifth(records[::-1], name)


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
