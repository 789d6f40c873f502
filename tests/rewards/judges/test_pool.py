"""Waiting for judges: what is late, what has stopped for good, and what is a bug."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Iterator

import pytest

from rolltune.endpoints import background
from rolltune.rewards.judges import pool as bench_module
from rolltune.rewards.judges.judge import Answer, JudgeStopped, Question
from rolltune.rewards.judges.pool import LATE, STOPPED, JudgePool
from rolltune.rewards.rubric.questions import Rating

JUDGE = {
    "_component_": "rolltune.rewards.judges.endpoint.EndpointJudge",
    "base_url": "http://localhost:1/v1",
    "model": "m",
}
QUESTION = Question(messages=({"role": "user", "content": "?"},), answer=Rating)


@pytest.fixture
def bench() -> Iterator[JudgePool]:
    made = JudgePool([JUDGE], combine="mean", quorum=None, wait_seconds=0.05)
    yield made
    made.close()


def test_what_comes_too_late_is_counted_once(bench):
    """Two turns wait for one comparison."""
    never = bench.submit(asyncio.sleep(60, result="answer"))
    assert [bench.wait(never, lambda word: word) for _ in range(2)] == [LATE, LATE]
    assert bench.metrics()["late"] == 1


def test_an_answer_that_is_there_is_taken_however_late(bench):
    done = bench.submit(asyncio.sleep(0, result="answer"))
    time.sleep(0.1)  # past the time limit
    assert bench.wait(done, lambda word: word) == "answer"
    assert bench.metrics()["late"] == 0


@pytest.mark.parametrize("error", [TimeoutError("of its own"), ValueError("zip() arguments differ"), KeyError("x")])
def test_a_bug_goes_through(bench, error):
    async def broken() -> str:
        raise error

    with pytest.raises(type(error)):
        bench.wait(bench.submit(broken()), lambda word: word)
    assert bench.stop_reason is None


def test_a_judge_that_refuses_for_good_stops(bench, monkeypatch):
    async def refuses(question: Question) -> Answer:
        raise ValueError("api_key_env: KEY is refused")

    monkeypatch.setattr(bench.panel.judges[0], "ask", refuses)
    assert bench.wait(bench.submit(bench.panel.ask(QUESTION)), lambda word: word) == STOPPED
    assert bench.stop_reason == "api_key_env: KEY is refused"
    with pytest.raises(JudgeStopped):
        asyncio.run(bench.panel.ask(QUESTION))


@pytest.mark.parametrize("fault", ["hangs", "raises"])
def test_closing_ends_whatever_happens(bench, monkeypatch, caplog, fault):
    """It may be called while another exception is on its way, which must not be lost."""
    monkeypatch.setattr(bench_module, "_SECONDS_TO_CLOSE", 0.1)
    monkeypatch.setattr(background, "SECONDS_TO_END", 0.1)

    async def never_ends() -> None:
        while True:
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.sleep(0.2)

    async def close() -> None:
        if fault == "raises":
            raise RuntimeError("the socket is gone")
        await asyncio.sleep(60)

    monkeypatch.setattr(bench.panel.judges[0], "aclose", close)
    bench.submit(never_ends())
    thread = next(thread for thread in threading.enumerate() if thread.name == "judge")
    started = time.monotonic()
    bench.close()
    assert time.monotonic() - started < 5 and not thread.is_alive()
    assert "could not be closed properly" in caplog.text
