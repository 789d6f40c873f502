# ruff: noqa: E501
"""Send made-up completions through every built-in reward that needs no judge, and replies through the judge's parser.

    .venv/bin/python tests/rewards/fuzz_rewards.py --completions 100000

A completion must not crash a reward, leave its range, or keep it busy for more than a second. A good completion must
earn full marks. The seed and a completion's number make it, so ``--start 4711 --completions 1`` does one of them again.
The exit status is 1 if anything failed. Seconds are CPU time of the thread; wall-clock time is shown beside it.

Completions are random characters, pieces of tags, LaTeX and numbers, expressions from a grammar, good completions with
random edits, deep nesting, huge numbers, half-open tags, and long texts. They are as long as a reward will parse in
half of the cases, and up to 200,000 characters in a few.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from rolltune.rewards.answer import answer_reward, lenient_answer_reward, voted_answer
from rolltune.rewards.behaviours import behaviour_counts
from rolltune.rewards.countdown import countdown_reward, lenient_countdown_reward
from rolltune.rewards.format import format_reward
from rolltune.rewards.judges.judge import read_answer
from rolltune.rewards.length import cosine_length_reward, soft_overlong_reward
from rolltune.rewards.repetition import repetition_reward
from rolltune.rewards.rubric.degenerate import is_degenerate
from rolltune.rewards.rubric.questions import explicit_questions, implicit_question
from rolltune.rewards.rubric.schema import Criterion
from rolltune.types import Completion, Problem

MAX_SECONDS = 1.0
GOLDS = [
    "18", "-3.5", "1,800", "0", "3/4", r"\frac{7}{12}", "5 inches", "28%", "024", r"1.6\times10^{-19}", "B", "(C)",
    r"2\sqrt{3}", "x^2+6x+9", "y = 2x + 1", "x < 3", r"36\pi", r"60^\circ", r"\sin^2 x", "5!", "7+i", "2, 3", "(-3, 5)",
    r"[2,\infty)", r"\{1, 2\}", r"\pm\sqrt{3}", r"\begin{pmatrix} 1 & -1 \\ 0 & 1 \end{pmatrix}", "1,22", "113_6",
    r"(-\infty,-2)\cup(2,\infty)", "no real solution", "12:00", "W-L-W", "Paris", r"\log_2 x", r"\binom{n}{2}", "f(x)=x^2",
]  # fmt: skip
COUNTDOWN = ["(95 - 19) / 4", "2 * 5 + 3", "(3 + 5) * 2", "25 * 4 - 7 + 2"]
PIECES = [
    *"0123456789+-*/^_=<>(){}[]|,.;:!?%$&#~'\"\\ \n\t`",
    *("<think>", "</think>", "<answer>", "</answer>", "<answer", "</answer", "<|im_end|>", "</s>", "&lt;", "&minus;"),
    *(r"\frac{", r"\frac12", r"\dfrac", r"\sqrt{", r"\sqrt[3]{", r"\boxed{", r"\text{", r"\left(", r"\right)", r"\le "),
    *(r"\cdot ", r"\times ", r"\div ", r"\pm ", r"\cup ", r"\in ", r"\approx ", r"\{", r"\}", r"\pi", r"\infty", r"\\"),
    *(r"\begin{pmatrix}", r"\end{pmatrix}", r"\begin{array}{cc}", r"\langle ", r"\sum_{", r"\lfloor ", r"\binom{", r"\("),
    *("**", "__", "$$", "####", "10^", "e9", "999999", "1 800", "1,800", "0.5", ".5", "sin ", "log_", "x", "y", "i", "e"),
    *("The answer is ", "maybe ", "not ", "or ", "and ", " dollars", " cm^2", "Wait, ", "let me check", "B) ", "(A) "),
    *("\u00d7", "\u00f7", "\u2212", "\u00b7", "\u221a", "\u00b2", "\u2084", "\u00bd", "\u00b0", "\u221e", "\u2248", "\u200b"),
    *("\ufeff", "\u00a0", "\u2028", "\u0301", "\U0001f34e", "\ud800", "\x00", "\uff11", "\u3002", "\u54c8", "\u0661", "\u2800"),
]  # fmt: skip
CRITERIA = [Criterion(title=f"c{n}", description=f"Does thing {n}.", category="essential") for n in range(2)]
VERDICTS = {"verdicts": [{"number": n, "reason": "Looks good.", "grade": n % 2} for n in (1, 2)]}


# --- completions ------------------------------------------------------------------------------------------------------


def characters(rng: random.Random) -> str:
    ranges = ((32, 126), (32, 126), (0, 0x24F), (0x2000, 0x2BFF), (0x3000, 0x9FFF), (0, 0x10FFFF))
    return "".join(chr(rng.randint(*rng.choice(ranges))) for _ in range(rng.randint(0, 400)))


def pieces(rng: random.Random) -> str:
    return "".join(rng.choices(PIECES, k=rng.randint(0, 60)))


def expression(rng: random.Random, depth: int = 6) -> str:
    if depth == 0 or rng.random() < 0.15:
        return rng.choice(["x", "y", "n", r"\pi", "e", "i", "2", "3", "-1", "0", "0.5", "12", "99", "k_1", r"\theta"])
    a, b = (expression(rng, depth - 1 - (rng.random() < 0.4 and depth > 1)) for _ in range(2))
    forms = (
        "{a}+{b}", "{a}-{b}", "({a})({b})", "{a}*{b}", "{a}/({b})", r"\frac{{{a}}}{{{b}}}", r"({a})^{{{b}}}", "({a})^2",
        r"\sqrt{{{a}}}", r"\sqrt[{b}]{{{a}}}", r"\sin({a})", r"\ln {a}", r"\log_{{{b}}} ({a})", "({a})!", "|{a}|",
        r"\binom{{{a}}}{{{b}}}", r"\lfloor {a} \rfloor", "f({a})", "{a}={b}", "{a}, {b}", "({a}, {b})", r"\{{{a}, {b}\}}",
        "{a} < {b}", r"[{a}, {b})\cup({b}, \infty)", r"{a} \pm {b}", r"\begin{{pmatrix}} {a} & {b} \\ {b} & 1 \end{{pmatrix}}",
        r"\sum_{{k=1}}^{{{a}}} {b}", r"{a} \approx {b}", "{a} : {b}", r"e^{{{a}}}", r"\tan^{{-1}} {a}", r"\max({a}, {b})",
    )  # fmt: skip
    return rng.choice(forms).format(a=a, b=b)


def good(rng: random.Random, gold: str) -> str:
    thoughts = pieces(rng) if rng.random() < 0.3 else "Let me see."
    return f"<think>{thoughts.replace('think', '')} So it is {gold}.</think>\n<answer>{gold}</answer>"


def edited(rng: random.Random, gold: str) -> str:
    """Edit the answer of a good completion in two thirds of the cases, else any of it."""
    before, tag, text = good(rng, gold).rpartition("<answer>") if rng.random() < 0.67 else ("", "", good(rng, gold))
    for _ in range(rng.randint(1, 6)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 1, 1, 3, 12]))
        cut = text[start:end]
        new = rng.choice([rng.choice(PIECES), "", cut * 2, cut[::-1], cut.upper(), expression(rng, 2)])
        text = text[:start] + new + text[end:]
    return before + tag + text


def nested(rng: random.Random) -> str:
    opening, closing = rng.choice(
        [("(", ")"), ("{", "}"), ("[", "]"), (r"\frac{1}{", "}"), (r"\sqrt{", "}"), (r"\boxed{", "}"), ("|", "|"), ("-(", ")"),
         (r"\sin(", ")"), (r"\left(", r"\right)"), ("<answer>", "</answer>"), ("<think>", "</think>"), ("f(", ")"), ("2^{", "}"),
         (r"\text{", "}"), ("**", "**"), ("$", "$"), (r"\{", r"\}"), ('{"a": ', "}"), ("<b>", "</b>"), ("(1, ", ")"), ("x_{", "}")]
    )  # fmt: skip
    times = rng.choice([3, 12, 23, 24, 25, 40, 120, 2_000, 20_000])
    return opening * times + rng.choice(["x", "18", "", "1, 2"]) + closing * rng.choice([times, times - 1, 0])


def huge(rng: random.Random) -> str:
    digits = rng.choice([10, 50, 250, 5_000, 100_000])
    number = "".join(rng.choices("0123456789", k=digits))
    forms = ["{n}", "-{n}", "0.{n}", "1/{n}", "{n}/{n}", "1e{n}", "10^{{{n}}}", "{n}!", "9^{{9^{{{n}}}}}", r"\sqrt{{{n}}}",
             "9" * 9 + "!", "1e999", "2^{{9999}}", "((9^{{99}})^{{99}})^{{99}}", r"\binom{{{n}}}{{{n}}}", "{n}%", "{n} inches",
             r"\sin({n})", "{n} + {n}", "{n}_{{{n}}}", "1" + ",000" * 20_000, "1.{n}e{n}", r"\pi^{{{n}}}", "x^{{{n}}}"]  # fmt: skip
    return rng.choice(forms).format(n=number)


def half_open(rng: random.Random) -> str:
    tags = [
        "<think>",
        "</think>",
        "<answer>",
        "</answer>",
        "<answer",
        "answer>",
        "</",
        "<think",
        "18",
        "B",
        "\n",
        "3 + 5",
    ]
    return "".join(rng.choices(tags, k=rng.randint(1, 12)))


def long(rng: random.Random) -> str:
    unit = rng.choice(
        [pieces(rng), expression(rng, 3), characters(rng), "so it is ", "Wait, let me check. 3 * 5 = 15. "]
    )
    return unit * (rng.randint(1_000, 200_000) // max(len(unit), 1))


MAKERS: list[tuple[int, Callable[..., str]]] = [
    (12, characters), (16, pieces), (24, expression), (6, good), (22, edited), (5, nested), (6, huge), (8, half_open), (1, long),
]  # fmt: skip


def completion(rng: random.Random) -> tuple[str, str, str]:
    """Return the kind of a completion, a gold answer (the one in its working, if there is one), and its text."""
    (make,) = rng.choices([make for _, make in MAKERS], [weight for weight, _ in MAKERS])
    gold = rng.choice(GOLDS + COUNTDOWN)
    if make in (good, edited):
        return make.__name__, gold, make(rng, gold)
    text = make(rng)
    if rng.random() < 0.5:
        text = text[: rng.choice([64, 256])]  # as long as it is parsed
    if rng.random() < 0.75:
        text = f"<think>{rng.choice(['', 'hm', pieces(rng)])}</think>{rng.choice(['', ' '])}<answer>{text}</answer>"
    return make.__name__, gold, text


def reply(rng: random.Random) -> str:
    """Return a judge's reply: a verdict with random edits, or anything."""
    if rng.random() < 0.3:
        return completion(rng)[-1]
    text = json.dumps(rng.choice([VERDICTS, VERDICTS["verdicts"], {"reason": "Good.", "rating": rng.randint(-1, 11)}]))
    for _ in range(rng.randint(0, 4)):
        at = rng.randrange(len(text) + 1)
        new = rng.choice([rng.choice(PIECES), "{", "}", '"', ",", "null", "NaN", text, "</think>", "\\u0022"])
        text = text[:at] + new + text[at + rng.randint(0, 2) :]
    return text


# --- checks -----------------------------------------------------------------------------------------------------------


@dataclass
class Tally:
    """Calls of one function."""

    calls: int = 0
    paid: int = 0  # calls that returned their highest value
    seconds: float = 0.0
    worst: float = 0.0
    worst_wall: float = 0.0
    worst_number: int = 0


@dataclass
class Report:
    """Results: tallies by function, and a line for each failure."""

    tallies: dict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    failures: list[str] = field(default_factory=list)
    kinds: dict[str, int] = field(default_factory=lambda: defaultdict(int))


def problem(answer: str) -> Problem:
    return Problem(id="p", messages=({"role": "user", "content": "2 + 2?"},), answer=answer)


QUESTIONS = [
    *explicit_questions(problem("4"), "5", CRITERIA, one_call=True),
    *explicit_questions(problem("4"), "5", CRITERIA[:1], one_call=False),
    implicit_question(problem("4"), "5", CRITERIA),
]


def calls(rng: random.Random, answer: str, text: str) -> dict[str, tuple[Callable[[], float | None], float, float]]:
    """Return a call for each function under test, with the lowest and the highest value that it may return."""
    gold, sums = problem(answer), problem(answer if answer in COUNTDOWN else rng.choice(COUNTDOWN))
    sampled = Completion(
        token_ids=(1,) * rng.randint(1, 40), logprobs=(), finish_reason="stop", policy_version=0, text=text
    )
    options = {"correct_start": 1.0, "correct_end": 0.5, "wrong_start": 0.0, "wrong_end": 0.0, "exceed": 0.0}
    rewards = {
        "answer": (partial(answer_reward, gold), 0, 1),
        "lenient answer": (partial(lenient_answer_reward, gold), 0, 1),
        "countdown": (partial(countdown_reward, sums), 0, 1),
        "lenient countdown": (partial(lenient_countdown_reward, sums), 0, 1),
        "format": (partial(format_reward, gold), 0, 1),
        "repetition": (partial(repetition_reward, gold, n=rng.randint(1, 5)), -1, 0),
        "behaviours": (partial(behaviour_counts, gold), 0, math.inf),
        "cosine length": (partial(cosine_length_reward, gold, completion=sampled, max_tokens=32, **options), 0, 1),
        "overlong": (partial(soft_overlong_reward, gold, completion=sampled, max_tokens=32, cache_tokens=8), -1, 0),
    }
    found = {name: (lambda r=r: r(text).total, low, high) for name, (r, low, high) in rewards.items()}
    found["degenerate"] = (lambda: float(is_degenerate(text)), 0, 1)
    found["vote"] = (lambda: float(voted_answer(gold, text) is not None), 0, 1)
    found["judge reply"] = (partial(_read_reply, rng), 0, 1)
    return found


def _read_reply(rng: random.Random) -> float:
    question, text = rng.choice(QUESTIONS), reply(rng)
    try:
        read_answer(question, text)
    except ValueError:
        return 0.0
    return 1.0


def fuzz(seed: int, start: int, count: int, report: Report) -> None:
    """Check completions ``start`` to ``start + count - 1``."""
    for number in range(start, start + count):
        rng = random.Random(f"{seed}/{number}")
        kind, gold, text = completion(rng)
        report.kinds[kind] += 1
        for name, (call, low, high) in calls(rng, gold, text).items():
            wall, cpu = time.perf_counter(), time.thread_time()
            try:
                value = call()
            except Exception as error:  # whatever a reward may raise is a failure
                report.failures.append(f"{number} ({kind}), {name}: {type(error).__name__}: {str(error)[:200]}")
                continue
            cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
            tally = report.tallies[name]
            tally.calls += 1
            tally.paid += value == high
            tally.seconds += cpu
            tally.worst_wall = max(tally.worst_wall, wall)
            if cpu > tally.worst:
                tally.worst, tally.worst_number = cpu, number
            if value is None or not low <= value <= high:
                report.failures.append(f"{number} ({kind}), {name}: {value} is not in [{low}, {high}]")
            if cpu > MAX_SECONDS:
                report.failures.append(f"{number} ({kind}), {name}: {cpu:.2f} s")
        if kind == "good":
            _check_good(number, gold, text, report)


def _check_good(number: int, gold: str, text: str, report: Report) -> None:
    """Check that a good completion earns full marks for its gold answer."""
    reward = countdown_reward if gold in COUNTDOWN else answer_reward
    if reward(problem(gold), text).total != 1.0:
        report.failures.append(f"{number} (good): {gold!r} is not earned by writing it down")


def render(report: Report) -> str:
    lines = [", ".join(f"{count} {kind}" for kind, count in sorted(report.kinds.items()))]
    lines.append(
        f"{'function':<18}{'calls':>9}{'highest':>9}{'mean ms':>9}{'worst s':>9}{'wall s':>8}  worst completion"
    )
    for name, t in report.tallies.items():
        mean = 1000 * t.seconds / t.calls
        lines.append(
            f"{name:<18}{t.calls:>9}{t.paid:>9}{mean:>9.3f}{t.worst:>9.3f}{t.worst_wall:>8.3f}  {t.worst_number}"
        )
    return "\n".join([*lines, f"{len(report.failures)} failures", *report.failures[:50]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--completions", type=int, default=100_000, help="how many (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the completions (default: %(default)s)")
    parser.add_argument("--start", type=int, default=0, help="number of the first one (default: %(default)s)")
    args = parser.parse_args()
    report, step = Report(), 5_000
    for start in range(args.start, args.start + args.completions, step):
        print(f"{start - args.start} done, {len(report.failures)} failures", file=sys.stderr, flush=True)
        fuzz(args.seed, start, min(step, args.start + args.completions - start), report)
    print(render(report))
    sys.exit(bool(report.failures))


if __name__ == "__main__":
    main()
