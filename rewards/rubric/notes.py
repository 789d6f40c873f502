"""A criterion's note in the sample tables: its grade, and each judge's grade with the reason."""

from __future__ import annotations

import re
from collections.abc import Sequence

_JUDGE = re.compile(r"(\S+) (unscored|[\d.]+(?:e-?\d+)?): ")  # how a judge's part begins


def write_note(grade: float | None, given: Sequence[tuple[str, float | None, str]]) -> str:
    """Format a grade and the judges' (name, grade, reason).

    Example:
        >>> write_note(0.5, [("judge-a", 1.0, "It does."), ("judge-b", 0.0, "It does not.")])
        '0.5: judge-a 1: It does. | judge-b 0: It does not.'
    """
    reasons = " | ".join(f"{judge} {_number(of_judge)}: {reason}" for judge, of_judge, reason in given)
    return f"{_number(grade)}: {reasons}"


def read_note(note: str) -> tuple[float | None, list[float | None]] | None:
    """Read the combined grade and the judges' grades back; None stands for unscored.

    The reasons are text of models, which may imitate a judge's part. Use the result for display only.

    Returns:
        None for a text that :func:`write_note` did not write.
    """
    grade, colon, rest = note.partition(": ")
    judges = [match[2] for part in rest.split(" | ") if (match := _JUDGE.match(part))]
    try:
        return (_grade(grade), [_grade(judge) for judge in judges]) if colon and judges else None
    except ValueError:
        return None


def _number(grade: float | None) -> str:
    return "unscored" if grade is None else f"{grade:g}"


def _grade(text: str) -> float | None:
    return None if text == "unscored" else float(text)
