"""Test a correctness reward before training on it: it must accept right answers and reject wrong ones.

For every problem of a data set the audit builds responses with a known verdict: the gold answer in its usual spellings,
which must all score 1, and answers that are wrong in the ways of models and reward hackers, which must all score 0. A
reward that fails here teaches the failure. :func:`audit_labelled` does the same with answers that somebody labelled.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Literal

from rolltune.rewards.answer import gold_answer
from rolltune.types import Problem, Reward

MAX_EXAMPLES = 3  # of a kind, where the responses are generated

Labelled = tuple[str, str]  # (kind, text)
Verdict = Literal["right", "wrong"]
_Response = tuple[Problem, Verdict, str, str]  # problem, verdict, kind, text


@dataclass(frozen=True, kw_only=True, slots=True)
class LabelledAnswer:
    """An answer with a known verdict.

    Attributes:
        problem: its ``solution`` is the working before this answer.
        answer: final answer as a model writes it; None for a response that ends in the working.
        right: whether it is right.
        kind: what it is an example of, e.g. "rounded".
    """

    problem: Problem
    answer: str | None
    right: bool
    kind: str

    def response(self, answer_format: str) -> str:
        """Return the whole response, in the layout of :func:`audit`."""
        solution = self.problem.solution or ""
        if self.answer is None:
            return render_response(answer_format.partition("{solution}")[0], solution="", answer="") + solution
        return render_response(answer_format, solution=solution, answer=self.answer)


@dataclass(frozen=True, kw_only=True, slots=True)
class Example:
    """A response with the wrong score."""

    problem_id: str
    text: str
    total: float | None
    failure: str | None


@dataclass(kw_only=True, slots=True)
class Tally:
    """Results for the responses of one kind.

    Attributes:
        kind: e.g. "guess_list".
        verdict: "right" responses must score 1, "wrong" ones 0.
        checked: number of responses.
        missed: number of those with any other score, unscored ones included.
        examples: missed ones; of generated responses the first few.
    """

    kind: str
    verdict: Verdict
    checked: int = 0
    missed: int = 0
    examples: list[Example] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True, slots=True)
class AuditReport:
    """One tally for each kind of response: right ones first, each in the order of appearance."""

    tallies: tuple[Tally, ...]

    @property
    def false_negatives(self) -> int:
        """Number of right responses that did not score 1."""
        return sum(tally.missed for tally in self.tallies if tally.verdict == "right")

    @property
    def false_positives(self) -> int:
        """Number of wrong responses that did not score 0."""
        return sum(tally.missed for tally in self.tallies if tally.verdict == "wrong")


def audit(
    problems: Iterable[Problem], reward: Reward, answer_format: str, *, seed: int, wrong_responses: bool = True
) -> AuditReport:
    """Score right and wrong responses to every problem.

    Args:
        problems: with gold answers.
        reward: must give 1 to right responses and 0 to wrong ones, as :func:`rolltune.rewards.answer.answer_reward`
            does.
        answer_format: a whole response, with ``{answer}`` and optionally ``{solution}`` as placeholders:
            ``"<think>{solution}</think>\\n<answer>{answer}</answer>"``.
        seed: of the mutations. Each problem has its own stream, so their order does not matter.
        wrong_responses: False leaves wrong responses out, for a reward of something other than correctness, such as the
            format: it must still give full marks to right responses.

    Raises:
        ValueError: a problem without a gold answer, or a format without ``{answer}``.
    """
    _check_format(answer_format)

    def responses() -> Iterator[_Response]:
        for problem in problems:
            rng = random.Random(f"{seed}/{problem.id}")
            for kind, text in right_responses(problem, answer_format):
                yield problem, "right", kind, text
            for kind, text in _wrong_responses(problem, answer_format, rng) if wrong_responses else ():
                yield problem, "wrong", kind, text

    return _tally(responses(), reward, max_examples=MAX_EXAMPLES)


def audit_labelled(
    answers: Iterable[LabelledAnswer], reward: Reward, answer_format: str, *, wrong_responses: bool = True
) -> AuditReport:
    """Score labelled answers, and keep every missed one as an example.

    Args:
        answers: from :func:`rolltune.data.answers_labelled.answers_labelled`.
        reward: as in :func:`audit`.
        answer_format: as in :func:`audit`.
        wrong_responses: as in :func:`audit`.

    Raises:
        ValueError: a format without ``{answer}``.
    """
    _check_format(answer_format)
    responses: Iterator[_Response] = (
        (answer.problem, "right" if answer.right else "wrong", answer.kind, answer.response(answer_format))
        for answer in answers
        if answer.right or wrong_responses
    )
    return _tally(responses, reward, max_examples=None)


def _check_format(answer_format: str) -> None:
    if "{answer}" not in answer_format:
        raise ValueError(f"answer_format is {answer_format!r}; it must contain {{answer}}")


def _tally(responses: Iterable[_Response], reward: Reward, *, max_examples: int | None) -> AuditReport:
    tallies: dict[tuple[Verdict, str], Tally] = {}
    for problem, verdict, kind, text in responses:
        tally = tallies.setdefault((verdict, kind), Tally(kind=kind, verdict=verdict))
        score = reward(problem, text)
        tally.checked += 1
        if score.total == (1.0 if verdict == "right" else 0.0):
            continue
        tally.missed += 1
        if max_examples is None or len(tally.examples) < max_examples:
            tally.examples.append(Example(problem_id=problem.id, text=text, total=score.total, failure=score.failure))
    return AuditReport(tallies=tuple(sorted(tallies.values(), key=lambda tally: tally.verdict)))


# --- responses --------------------------------------------------------------------------------------------------------


def render_response(answer_format: str, *, solution: str, answer: str) -> str:
    """Fill in ``{solution}`` and ``{answer}``. Other braces, in the format or in the values, stay as they are."""
    filling = {"{solution}": solution, "{answer}": answer}
    return re.sub(r"\{solution\}|\{answer\}", lambda slot: filling[slot[0]], answer_format)


def right_responses(problem: Problem, answer_format: str) -> Iterator[Labelled]:
    """Responses that must score 1: the gold answer in its spellings."""
    for kind, answer in variants(gold_answer(problem)):
        yield kind, render_response(answer_format, solution=_working(problem), answer=answer)


def _wrong_responses(problem: Problem, answer_format: str, rng: random.Random) -> Iterator[Labelled]:
    """Responses that must score 0. The working of each contains the right answer."""
    gold, working = gold_answer(problem), _working(problem)
    wrong = mutations(gold, rng)
    for kind, answer in wrong:
        yield kind, render_response(answer_format, solution=working, answer=answer)
    right_response = render_response(answer_format, solution=working, answer=gold)
    yield "changed_mind", right_response + "\n" + render_response(answer_format, solution=working, answer=wrong[0][1])
    # The next kinds break the tags around the answer, if the format has any.
    untagged = re.sub(r"</?\w+>", "", right_response)
    if untagged != right_response:
        yield "no_tags", untagged
        yield "cut_off", right_response[: right_response.rindex("</")]
    if "{solution}" in answer_format:
        yield "swapped", render_response(answer_format, solution=gold, answer=working)


def _working(problem: Problem) -> str:
    gold = gold_answer(problem)
    return f"{problem.solution or 'Step 1 and step 2 lead there.'}\nSo it is {gold}."


# --- answers ----------------------------------------------------------------------------------------------------------

_GROUPED = re.compile(r"[1-9][0-9]{0,2} [0-9]{3}(\.[0-9]+)?")  # 1 800 is 1,800
_PLAIN_NUMBER = re.compile(r"-?[0-9]+(\.[0-9]+)?")


def variants(answer: str) -> list[Labelled]:
    """The gold answer in right spellings, as (kind, text inside the answer block)."""
    spelled = [("gold", answer), ("spaced", f"\n {answer} \n"), ("bold", f"**{answer}**")]
    spelled += [("boxed", f"\\boxed{{{answer}}}"), ("math_mode", f"${answer}$")]
    if not _PLAIN_NUMBER.fullmatch(answer):
        return spelled
    sign, digits = _split_sign(answer)
    whole, dot, decimals = digits.partition(".")
    spelled += [("full_stop", f"{answer}."), ("currency", f"{sign}${digits}"), ("unit", f"{answer} dollars")]
    spelled += [("equation", f"x = {answer}"), ("sentence", f"The answer is {answer}.")]
    spelled.append(("cents", f"{answer}00" if dot else f"{answer}.00"))
    if len(whole) > 3:
        spelled.append(("commas", f"{sign}{int(whole):,}{dot}{decimals}"))
    return spelled


def mutations(answer: str, rng: random.Random) -> list[Labelled]:
    """Wrong answers that look like the gold one, as (kind, text inside the answer block)."""
    numeric = _PLAIN_NUMBER.fullmatch(answer) is not None
    wrong = _wrong_numbers(answer, rng) if numeric else [("other", f"not {answer} but something else")]
    other = wrong[0][1]
    wrong += [
        ("guess_list", f"{other}, {answer}"),
        ("guess_or", f"{answer} or {other}"),
        ("guess_lines", f"{other}\n{answer}"),
        ("hedge", rng.choice(("maybe {}", "about {}", "probably {}", "{}?", "{}, I think")).format(answer)),
        ("denial", f"not {answer}"),
        ("retraction", f"{answer} is wrong"),
        ("empty", ""),
        ("blank", "\n"),
        ("no_answer", "I do not know."),
    ]
    return wrong


def _wrong_numbers(answer: str, rng: random.Random) -> list[Labelled]:
    value, (sign, digits) = Decimal(answer), _split_sign(answer)
    wrong = [
        ("off_by_one", _plain(value + rng.choice((-1, 1)))),
        ("digit_in_front", f"{sign}{rng.randint(1, 9)}{digits}"),
        ("digit_behind", f"{answer}{rng.randint(1, 9)}"),
        ("unworked", f"{_plain(value - 1)} + 1"),
    ]
    if value != 0:
        wrong += [("sign_flipped", _plain(-value)), ("times_ten", _plain(value * 10))]
    shorter = [digits[:i] + digits[i + 1 :] for i in range(len(digits))]
    shorter = [sign + d for d in shorter if _PLAIN_NUMBER.fullmatch(d) and Decimal(sign + d) != value]
    if shorter:
        wrong.append(("digit_dropped", rng.choice(shorter)))
    split = [f"{digits[:cut]} {digits[cut:]}" for cut in range(1, len(digits))]
    split = [text for text in split if not _GROUPED.fullmatch(text)]
    if split:
        wrong.append(("split", sign + rng.choice(split)))
    return wrong


def _split_sign(number: str) -> tuple[str, str]:
    return ("-", number[1:]) if number.startswith("-") else ("", number)


def _plain(value: Decimal) -> str:
    return format(value, "f")


# --- the report -------------------------------------------------------------------------------------------------------


def render(report: AuditReport) -> str:
    """Render the report as a plain-text table, with the first examples of each miss below it."""
    width = max([len(tally.kind) for tally in report.tallies], default=0)
    lines = [f"{'label':5}  {'kind':{width}}  {'checked':>7}  {'missed':>6}"]
    lines += [f"{t.verdict:5}  {t.kind:{width}}  {t.checked:7}  {t.missed:6}" for t in report.tallies]
    lines.append(f"false negatives: {report.false_negatives}, false positives: {report.false_positives}")
    for tally in report.tallies:
        lines += [_example_line(tally, example) for example in tally.examples]
    return "\n".join(lines)


def _example_line(tally: Tally, example: Example) -> str:
    scored = "unscored" if example.total is None else f"scored {example.total:g}"
    reason = f" ({example.failure})" if example.failure else ""
    # The answer is at the end of a response.
    text = example.text if len(example.text) <= 80 else "..." + example.text[-77:]
    return f"{tally.verdict} {tally.kind}, {example.problem_id}: {scored}{reason}: {text!r}"
