"""The alarm for a judge that is being hacked: numbers by hand, runs that are simulated, ranks, resumption."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from thread_world import on_ranks

from rolltune.distributed import World
from rolltune.metrics.log import MetricsLog, read_metrics
from rolltune.rewards.checks.overoptimization import (
    Comparison,
    OveroptimizationCheck,
    OveroptimizationMonitor,
    alarms,
    compare,
    read_back,
)
from rolltune.rewards.combine import WeightedReward
from rolltune.rewards.judges.judge import Answer, Question
from rolltune.rewards.judges.panel import Panel
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.questions import Rating
from rolltune.types import Completion, Problem, Score

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
ANSWER = {"_component_": "rolltune.rewards.answer.answer_reward"}
Turns = list[tuple[Problem, Completion]]


def turn(number: int, text: str) -> tuple[Problem, Completion]:
    problem = Problem(id=f"held/{number}", messages=(), answer="4")
    return problem, Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text=text)


def marks(problem: Problem, text: str) -> Score:
    """A judge that reads its mark in the turn: "0.75 <answer>4</answer>"; "-" where it is down."""
    mark = text.split()[0]
    return Score(total=None, failure="judge_down") if mark == "-" else Score(total=float(mark))


def written(marks_and_answers: Sequence[tuple[float | str, int]]) -> Turns:
    return [turn(i, f"{mark} <answer>{answer}</answer>") for i, (mark, answer) in enumerate(marks_and_answers)]


def start(turns: int, **options) -> OveroptimizationMonitor:
    check = OveroptimizationCheck(**({"reward": "rubric", "gold": ANSWER, "min_problems": 4} | options))
    training = WeightedReward(rewards={"rubric": (marks, 0.5), "other": (lambda problem, text: 1 / 0, 1.0)})
    return check.start(training, [turn(i, "")[0] for i in range(turns)], JudgePool())


def measure(watch: OveroptimizationMonitor, turns: Turns, output_dir: Path, world: World = ALONE):
    (output_dir / "metrics.jsonl").touch()
    return watch.measure(world.shard(turns), output_dir=output_dir, world=world)


# --- numbers ----------------------------------------------------------------------------------------------------------


def test_numbers_by_hand():
    """Differences 0 1/2 0 -1/2 1/4; centred by 2 / 5 and 2 / 5 ... all over 20 and over 5."""
    found = compare([(1.0, 1.0), (0.5, 0.0), (0.0, 0.0), (0.5, 1.0), (0.25, 0.0)])
    assert found.train_mean == pytest.approx(2.25 / 5) and found.gold_mean == 0.4
    assert found.gap == pytest.approx(0.05) and found.scored == 5
    # sum of squares 0.25 + 0.25 + 0.0625 less 5 * 0.05^2, by 4 and by 5
    assert found.gap_error == pytest.approx(math.sqrt((0.5625 - 0.0125) / 4 / 5))
    # sums about the means: 1.5 - 5 * 0.45 * 0.4; 1.5625 - 5 * 0.45^2; 2 - 5 * 0.4^2
    assert found.correlation == pytest.approx(0.6 / math.sqrt(0.55 * 1.2))
    # Gold tells 1 and 4 from 2, 3 and 5; of these six pairs 4 and 2 are tied by the other.
    assert found.agreement == 1.0


def test_agreement_by_hand():
    """Told apart by both: (1, 2) in order, (2, 3) not; 1 and 3 are the same to gold."""
    assert compare([(1.0, 1.0), (0.5, 0.0), (0.25, 1.0)]).agreement == 0.5
    assert compare([(0.0, 1.0), (1.0, 0.0)]).agreement == 0.0


@pytest.mark.parametrize("pairs", [[(0.1, 0.0), (0.1, 1.0), (0.1, 0.5)], [(0.2, 0.1), (0.9, 0.1), (0.5, 0.1)]])
def test_without_variance_there_is_no_correlation(pairs):
    found = compare(pairs)
    assert found.correlation is None and found.agreement is None
    assert set(found.metrics()) == {
        "overoptimization/train_mean",
        "overoptimization/mean",
        "overoptimization/gap",
        "overoptimization/gap_error",
        "overoptimization/scored",
    }


QUARTERS = st.integers(0, 4).map(lambda n: n / 4)


@given(st.lists(st.tuples(QUARTERS, QUARTERS), min_size=4, max_size=30), st.integers(1, 3))
def test_another_scale_of_the_judge_moves_the_gap_alone(pairs, offset):
    plain, moved = compare(pairs), compare([(t + offset, g) for t, g in pairs])
    assert moved.gap == pytest.approx(plain.gap + offset)
    assert moved.gap_error == pytest.approx(plain.gap_error)
    assert moved.agreement == plain.agreement
    assert (moved.correlation is None) == (plain.correlation is None)
    if plain.correlation is not None:
        assert -1 <= plain.correlation <= 1
        assert moved.correlation == pytest.approx(plain.correlation)
    backwards = compare([(-t, g) for t, g in pairs])
    if plain.agreement is not None:
        assert backwards.agreement == pytest.approx(1 - plain.agreement)


def test_one_evaluation(tmp_path):
    """What the reward gives counts before its weight; other rewards are not asked; failures leave the comparison."""
    turns = written([(1.0, 4), (0.5, 5), (0.0, 5), (0.5, 4), ("-", 4), (0.25, 5), ("-", 5)])
    reading = measure(start(7), turns, tmp_path)
    of_the_scored = compare([(1.0, 1.0), (0.5, 0.0), (0.0, 0.0), (0.5, 1.0), (0.25, 0.0)])
    assert reading.metrics == of_the_scored.metrics() | {
        "overoptimization/gap_change": 0.0,
        "overoptimization/alarm": 0.0,
    }
    assert reading.metrics["overoptimization/scored"] == 5.0 and reading.warning is None


def test_too_few_scored_turns_are_no_comparison(tmp_path):
    turns = written([("-", 4)] * 5 + [(1.0, 4)] * 3)
    reading = measure(start(8), turns, tmp_path)
    assert reading.metrics == {"overoptimization/scored": 3.0}
    assert reading.warning is not None
    assert reading.warning.startswith(
        "eval.overoptimization: 3 of 8 held-out responses have both scores (judge_down 5)"
    )


# --- alarms -----------------------------------------------------------------------------------------------------------


def seen(train: float, gold: float, correlation: float | None = None, *, error: float = 0.01, n: int = 103):
    return Comparison(
        train_mean=train, gold_mean=gold, gap_error=error, scored=n, correlation=correlation, agreement=None
    )


CHECK = OveroptimizationCheck(reward="rubric", gold=ANSWER)


@pytest.mark.parametrize(
    ("earlier", "now", "expected"),
    [
        ([], seen(0.9, 0.1, -0.5), []),  # the first one: there is nothing to compare it with
        ([seen(0.3, 0.3)], seen(0.7, 0.2), ["gap"]),  # the judge rises, gold falls
        ([seen(0.3, 0.3)], seen(0.7, 0.65), []),  # both rise
        ([seen(0.8, 0.2)], seen(0.8, 0.2), []),  # far apart, as they were at the start
        ([seen(0.3, 0.3)], seen(0.2, 0.5), []),  # gold rises more
        ([seen(0.3, 0.3), seen(0.5, 0.2)], seen(0.55, 0.2), ["gap"]),  # since the first, not since the last
        # 0.2 is more than 0.1, and two standard errors of the change, 2 * hypot(0.06, 0.08) = 0.2, are not exceeded.
        ([seen(0.25, 0.25, error=0.06)], seen(0.5, 0.3, error=0.08), []),
        ([seen(0.25, 0.25, error=0.06)], seen(0.5, 0.25, error=0.08), ["gap"]),
        # Two standard errors on Fisher's scale: 2 * sqrt(2 / 100) = 0.283; atanh(0.5) - atanh(0.25) = 0.294.
        ([seen(0.5, 0.5, 0.5)], seen(0.5, 0.5, 0.25), ["correlation"]),
        ([seen(0.5, 0.5, 0.5)], seen(0.5, 0.5, 0.27), []),  # atanh(0.27) = 0.277: a fall of 0.272
        ([seen(0.5, 0.5, 0.5)], seen(0.5, 0.5, 0.31), []),  # above the threshold
        ([seen(0.5, 0.5, 0.2)], seen(0.5, 0.5, -0.3), []),  # it was never above it
        ([seen(0.5, 0.5, 0.2), seen(0.5, 0.5, 0.9)], seen(0.5, 0.5, 0.1), ["correlation"]),
        ([seen(0.5, 0.5, 0.9)], seen(0.5, 0.5, None), []),
        ([seen(0.5, 0.5, 1.0)], seen(0.5, 0.5, -1.0), ["correlation"]),
        ([seen(0.5, 0.5, 0.9)], seen(0.9, 0.1, 0.0), ["gap", "correlation"]),
    ],
)
def test_alarms(earlier, now, expected):
    found = alarms(now, earlier, check=CHECK)
    assert [("gap" if "gap grew" in words else "correlation") for words in found] == expected


def simulate(output_dir: Path, policy, evaluations: Sequence[int] = range(0, 60, 10), *, resume: int | None = None):
    """A run's evaluations of 60 turns; ``policy`` says (share of right answers, flattering words) at a step."""

    def judge(problem: Problem, text: str) -> Score:
        """Likes right answers, and is taken in by flattery; it fails now and then."""
        if "<oops>" in text:
            return Score(total=None, failure="judge_unparseable")
        return Score(total=min(1.0, 0.4 * ("<answer>4<" in text) + 0.2 * text.count("certainly")))

    log = MetricsLog(output_dir, resume_step=resume)
    check = OveroptimizationCheck(reward="rubric", gold=ANSWER)
    problems = [turn(i, "")[0] for i in range(60)]
    watch = check.start(WeightedReward(rewards={"rubric": (judge, 1.0)}), problems, JudgePool())
    warnings = {}
    for step in evaluations:
        rng = random.Random(step)
        right, words = policy(step)
        texts = [
            "certainly " * (words + rng.randrange(2))
            + f"<answer>{4 if rng.random() < right else 5}</answer>"
            + "<oops>" * (rng.random() < 0.1)
            for _ in range(60)
        ]
        turns = [turn(i, text) for i, text in enumerate(texts)]
        reading = watch.measure(turns, output_dir=output_dir, world=ALONE)
        log.log(step, reading.metrics)
        if reading.warning:
            warnings[step] = reading.warning
    log.close()
    return read_metrics(output_dir), warnings


def hacked(step: int) -> tuple[float, int]:
    return 0.7 - step / 100, step // 12


def honest(step: int) -> tuple[float, int]:
    return 0.3 + step / 100, 1


def test_a_hacked_judge_raises_the_alarm(tmp_path):
    rows, warnings = simulate(tmp_path, hacked)
    assert rows[-1]["overoptimization/train_mean"] > rows[0]["overoptimization/train_mean"] + 0.2
    assert rows[-1]["overoptimization/mean"] < rows[0]["overoptimization/mean"] - 0.1
    assert [row["overoptimization/alarm"] for row in rows] == [0, 0, 1, 1, 1, 1]
    assert list(warnings) == [20, 30, 40, 50]
    first, last = rows[0], rows[-1]
    change = last["overoptimization/gap_change"]
    assert change == pytest.approx(
        last["overoptimization/train_mean"] - last["overoptimization/mean"] - first["overoptimization/gap"]
    )
    for words in (
        "ALARM",
        f"the mean of rubric went from {first['overoptimization/train_mean']:.3f} to "
        f"{last['overoptimization/train_mean']:.3f}",
        f"the gold mean from {first['overoptimization/mean']:.3f} to {last['overoptimization/mean']:.3f}",
        f"the gap grew by {change:.3f}, more than alarm_gap, 0.1",
        "They differ most on held/",
        "<answer>5</answer>'. Read responses",
    ):
        assert words in warnings[50]


def test_an_honest_judge_raises_none(tmp_path):
    rows, warnings = simulate(tmp_path, honest)
    assert rows[-1]["overoptimization/mean"] > rows[0]["overoptimization/mean"] + 0.3
    assert [row["overoptimization/alarm"] for row in rows] == [0] * 6 and not warnings
    assert all(row["overoptimization/correlation"] > 0.5 for row in rows)
    assert all(40 <= row["overoptimization/scored"] < 60 for row in rows)


def test_marks_that_no_longer_go_with_the_answer_raise_the_alarm(tmp_path):
    """The means do not part: the judge has come to mark at random."""
    right = [(1.0, 4), (0.0, 5)] * 15
    random_marks = [(mark, answer) for mark in (1.0, 0.0) for answer in (4, 5)] * 8
    log = MetricsLog(tmp_path)
    readings = [measure(start(32), written(right), tmp_path)]
    log.log(0, readings[0].metrics)
    readings.append(measure(start(32), written(random_marks), tmp_path))
    log.close()
    assert [reading.metrics["overoptimization/correlation"] for reading in readings] == pytest.approx([1.0, 0.0])
    assert [reading.metrics["overoptimization/agreement"] for reading in readings] == [1.0, 0.5]
    assert [reading.metrics["overoptimization/gap_change"] for reading in readings] == [0.0, 0.0]
    assert readings[1].warning is not None
    assert "correlation of rubric with the gold measure fell from 1.000 to 0.000, below alarm_correlation, 0.3" in (
        readings[1].warning
    )


def test_what_a_model_wrote_cannot_steer_the_terminal(tmp_path):
    turns = [turn(i, "0.0 <answer>5</answer>") for i in range(20)]
    MetricsLog(tmp_path).log(0, measure(start(20), turns, tmp_path).metrics)
    turns = [turn(i, "1.0 \x1b[2J\x1b]0;all is well\x07\u202e" + "x" * 9999) for i in range(20)]
    warning = measure(start(20), turns, tmp_path).warning
    assert warning is not None and "\\x1b[2J" in warning and "\\u202e" in warning
    assert warning.isprintable() and len(warning) < 1500


# --- runs -------------------------------------------------------------------------------------------------------------


def timeless(rows: list[dict]) -> list[dict]:
    return [{name: value for name, value in row.items() if name != "time"} for row in rows]


def test_a_resumed_run_has_the_same_numbers(tmp_path):
    whole, warnings = simulate(tmp_path / "whole", hacked)
    simulate(tmp_path / "broken", hacked, range(0, 40, 10))  # killed after the evaluation of step 30
    resumed, more = simulate(tmp_path / "broken", hacked, range(30, 60, 10), resume=25)
    assert timeless(resumed) == timeless(whole)
    assert more == {step: warning for step, warning in warnings.items() if step >= 30}


def test_the_first_comparison_is_the_first_with_enough_turns(tmp_path):
    log = MetricsLog(tmp_path)
    for step, of_step in enumerate([[("-", 4)] * 4, [(0.5, 4), (0.5, 5)] * 2, [(0.75, 4), (0.75, 5)] * 2]):
        log.log(step, measure(start(4), written(of_step), tmp_path).metrics)
    log.close()
    rows = read_metrics(tmp_path)
    assert [row.get("overoptimization/gap_change") for row in rows] == [None, 0.0, 0.25]
    assert [len(read_back(rows[:count])) for count in (1, 2, 3)] == [0, 1, 2]


def test_comparisons_are_read_back_as_they_were(tmp_path):
    found = compare([(1.0, 1.0), (1 / 3, 0.0), (0.1, 0.0), (0.7, 1.0)])
    MetricsLog(tmp_path).log(0, found.metrics())
    assert read_back(read_metrics(tmp_path)) == [found]


@pytest.mark.parametrize("size", [2, 3, 12])  # of twelve, some ranks have nothing to judge
def test_ranks_share_the_turns_and_agree(tmp_path, size):
    turns = written([(i % 7 / 7, 4 + i % 2) for i in range(10)] + [(1.0, 5)] * 5)
    watch = start(15, max_problems=10)
    MetricsLog(tmp_path).log(0, measure(watch, written([(0.0, 4)] * 10), tmp_path).metrics)
    alone = measure(watch, turns, tmp_path)
    assert alone.metrics["overoptimization/scored"] == 10.0
    assert alone.metrics["overoptimization/gap_change"] > 0.5 and alone.warning is not None
    assert on_ranks(size, lambda world: measure(watch, turns, tmp_path, world)) == [alone] * size


class JudgedBy:
    """A reward that notes when it is begun and when it is waited for. Its judge is a fake."""

    def __init__(self, name: str, events: list[tuple[str, str, str]]) -> None:
        self.name, self.events = name, events
        self.judge = Fake(name)

    def __call__(self, problem: Problem, text: str) -> Score:
        return self.finish(self.begin(problem, text))

    def check(self, problems: Sequence[Problem]) -> None:
        if not problems[0].messages:
            raise ValueError(f"{problems[0].id}: has no question")
        self.events.append(("check", self.name, " ".join(problem.id for problem in problems)))

    def join(self, pool: JudgePool, key: str, problem: Problem) -> None:
        self.events.append(("join", self.name, problem.id))
        pool.add(key, Panel([self.judge]), smoke_question=Question(messages=(), answer=Rating), wait_seconds=1.0)

    def begin(self, problem: Problem, text: str) -> tuple[Problem, str]:
        self.events.append(("begin", self.name, problem.id))
        return problem, text

    def finish(self, pending: tuple[Problem, str]) -> Score:
        self.events.append(("finish", self.name, pending[0].id))
        return Score(total=float(len(pending[1]) % 2))


class Fake:
    stop_reason: str | None = None

    def __init__(self, name: str) -> None:
        self.name = name

    async def ask(self, question: Question) -> Answer:
        raise NotImplementedError

    def share_budget(self, path: Path) -> None: ...

    def metrics(self) -> dict[str, float]:
        return {"calls": 5.0}

    async def aclose(self) -> None: ...


@pytest.fixture
def gold(monkeypatch) -> JudgedBy:
    """What the node GOLD builds."""
    reward = JudgedBy("gold", [])
    monkeypatch.setattr("rolltune.rewards.checks.overoptimization.component_or_object", lambda node: reward)
    return reward


GOLD = {"_component_": "gold"}
ASKED = [(Problem(id=str(i), messages=({"role": "user", "content": "?"},)), turn(i, "x" * i)[1]) for i in range(6)]


def test_both_are_asked_of_all_responses_before_either_is_waited_for(tmp_path, gold):
    check = OveroptimizationCheck(reward="rubric", gold=GOLD, max_problems=5, min_problems=4)
    training = WeightedReward(rewards={"rubric": (JudgedBy("rubric", gold.events), 1.0)})
    pool = JudgePool()
    watch = check.start(training, [problem for problem, _ in ASKED], pool)
    assert gold.events == [("check", "rubric", "0 1 2 3 4"), ("check", "gold", "0 1 2 3 4"), ("join", "gold", "0")]
    assert pool.metrics()["overoptimization/judge/calls"] == 5.0, "the training judge joins elsewhere"
    gold.events.clear()
    metrics = measure(watch, ASKED, tmp_path).metrics
    assert [event for event, *_ in gold.events] == ["begin"] * 10 + ["finish"] * 10
    assert metrics["overoptimization/correlation"] == 1.0 and metrics["overoptimization/scored"] == 5.0
    pool.close()


def test_a_judge_that_may_be_asked_no_more_is_named(tmp_path, gold):
    check = OveroptimizationCheck(reward="rubric", gold=GOLD, min_problems=4)
    turns = [(ASKED[0][0], turn(0, "-")[1])] * 4
    pool = JudgePool()
    watch = check.start(WeightedReward(rewards={"rubric": (marks, 1.0)}), [problem for problem, _ in turns], pool)
    gold.judge.stop_reason = "max_dollars: 1 is reached"
    warning = measure(watch, turns, tmp_path).warning
    assert warning is not None and warning.endswith("; eval.overoptimization.gold: max_dollars: 1 is reached")
    pool.close()


def test_what_cannot_be_judged_is_refused_at_the_start(gold):
    check = OveroptimizationCheck(reward="rubric", gold=GOLD, min_problems=4)
    with pytest.raises(ValueError, match="held/0: has no question"):
        check.start(WeightedReward(rewards={"rubric": (marks, 1.0)}), [turn(i, "")[0] for i in range(4)], JudgePool())


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"reward": ""}, "reward: is empty"),
        ({"gold": {"weight": 1}}, "gold: has no _component_"),
        ({"min_problems": 3}, "min_problems: 3; must be >= 4"),
        ({"max_problems": 10}, "max_problems: 10; must be >= min_problems, 20"),
        ({"alarm_gap": 0.0}, r"alarm_gap: 0\.0; must be > 0"),
        ({"alarm_correlation": 1.0}, r"alarm_correlation: 1\.0; must be in \[0, 1\)"),
    ],
)
def test_settings_that_cannot_be(options, problem):
    with pytest.raises(ValueError, match=problem):
        OveroptimizationCheck(**({"reward": "rubric", "gold": ANSWER} | options))


def test_a_run_without_that_reward_or_with_too_few_problems():
    with pytest.raises(ValueError, match=r"eval\.overoptimization\.reward: rubik; .*rubric, other"):
        start(10, reward="rubik")
    with pytest.raises(ValueError, match=r"eval\.overoptimization\.min_problems: 4; only 3 problems"):
        start(3)


def test_nothing_logged_is_not_a_number(tmp_path):
    """A judge that gives everything full marks has no variance: what it would divide by is left out."""
    log = MetricsLog(tmp_path)
    log.log(0, measure(start(8), written([(0.5, 4), (0.25, 5)] * 4), tmp_path).metrics)
    log.log(1, measure(start(8), written([(1.0, 5)] * 8), tmp_path).metrics)
    log.close()
    first, last = (json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert (
        "overoptimization/correlation" in first
        and "overoptimization/correlation" not in last
        and "overoptimization/agreement" not in last
    )
    assert None not in last.values() and last["overoptimization/alarm"] == 1.0
