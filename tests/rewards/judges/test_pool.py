"""The pool of judges: waiting, what stops a run, smoke tests, budgets, names of metrics, closing."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from rolltune.endpoints import background
from rolltune.rewards.judges import pool as pool_module
from rolltune.rewards.judges.judge import Answer, JudgeStopped, Question
from rolltune.rewards.judges.panel import Panel
from rolltune.rewards.judges.pool import LATE, STOPPED, JudgePool
from rolltune.rewards.rubric.questions import Rating

QUESTION = Question(messages=({"role": "user", "content": "?"},), answer=Rating)
KEY = "rewards.r"


class Fake:
    """A judge that gives one rating, or fails."""

    def __init__(self, name: str, failure=None) -> None:
        self.name, self.failure = name, failure
        self.stop_reason: str | None = None
        self.asked = 0
        self.budget: Path | None = None
        self.closed = False

    async def ask(self, question: Question) -> Answer:
        self.asked += 1
        value = None if self.failure else Rating(rating=5)
        return Answer(value=value, failure=self.failure, text="out of memory", judge=self.name, cached=False)

    def share_budget(self, path: Path) -> None:
        self.budget = path

    def metrics(self) -> dict[str, float]:
        return {"calls": self.asked, "dollars": 0.5}

    async def aclose(self) -> None:
        self.closed = True


@pytest.fixture
def judge() -> Fake:
    return Fake("m")


@pytest.fixture
def pool(judge) -> Iterator[JudgePool]:
    made = JudgePool()
    made.add(KEY, Panel([judge]), smoke_question=QUESTION, wait_seconds=0.05)
    yield made
    made.close()


def test_what_comes_too_late_is_counted_once(pool):
    """Two responses wait for one comparison."""
    never = pool.submit(asyncio.sleep(60, result="answer"))
    assert [pool.wait(KEY, never, lambda word: word) for _ in range(2)] == [LATE, LATE]
    assert pool.metrics()["judge/r/late"] == 1


def test_an_answer_that_is_there_is_taken_however_late(pool):
    done = pool.submit(asyncio.sleep(0, result="answer"))
    time.sleep(0.1)  # past the time limit
    assert pool.wait(KEY, done, lambda word: word) == "answer"
    assert pool.metrics()["judge/r/late"] == 0


@pytest.mark.parametrize("error", [TimeoutError("of its own"), ValueError("zip() arguments differ"), KeyError("x")])
def test_a_bug_goes_through(pool, error):
    async def broken() -> str:
        raise error

    with pytest.raises(type(error)):
        pool.wait(KEY, pool.submit(broken()), lambda word: word)
    assert pool.stop_reason is None


def test_a_judge_that_refuses_for_good_stops(pool, judge, monkeypatch):
    async def refuses(question: Question) -> Answer:
        raise ValueError("api_key_env: KEY is refused")

    monkeypatch.setattr(judge, "ask", refuses)
    panel = Panel([judge])
    assert pool.wait(KEY, pool.submit(panel.ask(QUESTION)), lambda word: word) == STOPPED
    assert pool.stop_reason == "rewards.r: api_key_env: KEY is refused"
    with pytest.raises(JudgeStopped):
        asyncio.run(panel.ask(QUESTION))


def test_only_rewards_that_are_trained_on_stop_a_run(pool, judge):
    gold = Fake("g")
    pool.add("eval.overoptimization.gold", Panel([gold]), smoke_question=QUESTION, wait_seconds=1.0)
    gold.stop_reason = "g: max_dollars"
    assert pool.stop_reason is None and pool.stop_reasons == {"eval.overoptimization.gold": "g: max_dollars"}
    judge.stop_reason = "m: max_calls"
    assert pool.stop_reason == "rewards.r: m: max_calls"


def test_each_section_has_its_own_budget_and_each_reward_its_metrics(pool, judge, tmp_path):
    others = {"eval.correct": [Fake("a"), Fake("b")], "eval.overoptimization.gold": [Fake("c")]}
    for key, judges in others.items():
        pool.add(key, Panel(judges), smoke_question=QUESTION, wait_seconds=1.0)
    pool.keep_budgets(tmp_path)
    pool.smoke_test()
    assert judge.budget == tmp_path / "rewards.sqlite"
    assert [fake.budget for fake in others["eval.correct"]] == [tmp_path / "eval.sqlite"] * 2
    assert pool.metrics() == {
        "judge/r/calls": 1,
        "judge/r/dollars": 0.5,
        "judge/r/late": 0,
        "heldout/judge/correct/calls": 2,
        "heldout/judge/correct/dollars": 1.0,
        "heldout/judge/correct/late": 0,
        "overoptimization/judge/calls": 1,
        "overoptimization/judge/dollars": 0.5,
        "overoptimization/judge/late": 0,
    }
    pool.close()
    assert all(fake.closed for judges in others.values() for fake in judges) and judge.closed


@pytest.mark.parametrize("failure", ["judge_down", "judge_refused", "judge_unparseable"])
def test_a_judge_that_cannot_judge_fails_the_smoke_test(pool, judge, failure):
    """One whose answer cannot be read can be reached."""
    judge.failure = failure
    expected = contextlib.nullcontext()
    if failure != "judge_unparseable":
        expected = pytest.raises(ValueError, match=f"^rewards.r: judge m .*{failure} .*out of memory.*base_url")
    with expected:
        pool.smoke_test()


def test_a_judge_at_its_cap_fails_the_smoke_test(pool, judge):
    judge.stop_reason = "m: max_calls"
    with pytest.raises(ValueError, match=r"^rewards\.r: m: max_calls"):
        pool.smoke_test()


@pytest.mark.parametrize("fault", ["hangs", "raises"])
def test_closing_ends_whatever_happens(pool, judge, monkeypatch, caplog, fault):
    """It may be called while another exception is on its way, which must not be lost."""
    monkeypatch.setattr(pool_module, "_SECONDS_TO_CLOSE", 0.1)
    monkeypatch.setattr(background, "SECONDS_TO_END", 0.1)

    async def never_ends() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.2)

    async def close() -> None:
        if fault == "raises":
            raise RuntimeError("the socket is gone")
        await asyncio.sleep(60)

    monkeypatch.setattr(judge, "aclose", close)
    pool.submit(never_ends())
    thread = next(thread for thread in threading.enumerate() if thread.name == "judge")
    started = time.monotonic()
    pool.close()
    assert time.monotonic() - started < 5 and not thread.is_alive()
    assert "could not be closed properly" in caplog.text
