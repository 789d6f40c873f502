"""A key in the environment reaches the server, and nothing else: no log, repr, exception, answer, metric or file."""

from __future__ import annotations

import asyncio
import json
import logging
import traceback

import pytest
from fault_server import FaultServer, error, ok

from rolltune.endpoints import client as endpoint_module
from rolltune.endpoints.settings import EndpointSettings
from rolltune.rewards.judges.endpoint import EndpointJudge
from rolltune.rewards.judges.panel import Panel
from rolltune.rewards.rubric.questions import implicit_question
from rolltune.rewards.rubric.schema import Criterion
from rolltune.types import Problem

KEY = "sk-judge-0123456789abcdefghij"
QUESTION = implicit_question(
    Problem(id="p", messages=({"role": "user", "content": "2 + 2?"},)),
    "4",
    [Criterion(title="Right", description="Says four.", category="essential")],
)
# The server echoes the key in all that it says: answers, reasons and errors.
ECHO = json.dumps({"reason": f"You sent {KEY}.", "rating": 8})
SCRIPTS = {
    "answer": lambda call, request: ok(ECHO),
    "malformed": lambda call, request: ok(f"your key is {KEY}"),
    "500": lambda call, request: error(500, f"bad key {KEY}"),
    "400": lambda call, request: error(400, f"bad key {KEY}"),
    "401": lambda call, request: error(401, f"bad key {KEY}"),
    "404": lambda call, request: error(404, f"bad key {KEY}"),
    "cut": lambda call, request: ok(f"{KEY}", finish_reason="length"),
}


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_key_stays_where_it_belongs(name: str, monkeypatch, tmp_path, caplog, capfd):
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setenv("JUDGE_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    caplog.set_level(logging.DEBUG)
    said: list[str] = []
    with FaultServer(SCRIPTS[name]) as server:
        judge = EndpointJudge(
            endpoint=EndpointSettings(base_url=server.base_url, model="tiny", api_key_env="JUDGE_KEY", max_attempts=2),
            cache=str(tmp_path / "judge.sqlite"),
        )
        panel = Panel([judge])

        async def ask():
            try:
                return await panel.ask(QUESTION)
            finally:
                await judge.aclose()

        try:
            said.append(repr(asyncio.run(ask())))
        except ValueError as problem:
            said += ["".join(traceback.format_exception(problem)), repr(problem)]
        assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"  # it was there to be leaked
        assert KEY not in json.dumps([call.request for call in server.calls])  # nor in a repair
    said += [repr(judge), repr(judge.endpoint), judge.name, repr(judge.metrics())]
    said += [repr(record.__dict__) for record in caplog.records] + [caplog.text, *capfd.readouterr()]
    assert caplog.records and all(KEY not in text for text in said)
    assert name != "answer" or "You sent ***" in said[0]
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert files and all(KEY.encode() not in path.read_bytes() for path in files)
