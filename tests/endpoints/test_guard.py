"""The middleware that asks for the key, without vLLM."""

from __future__ import annotations

import asyncio

import pytest

from rolltune.endpoints.guard import RequireKey


async def application(scope, receive, send) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": [(b"a", b"b")]})
    await send({"type": "http.response.body", "body": b"secret"})


def answer(path: str, *keys: str, type: str = "http", root: str = "") -> list[dict]:
    sent: list[dict] = []

    async def send(message) -> None:
        sent.append(message)

    headers = [(b"authorization", key.encode("latin-1")) for key in keys]
    scope = {"type": type, "path": path, "root_path": root, "headers": headers, "method": "GET"}
    asyncio.run(RequireKey(application)(scope, None, send))  # pyright: ignore[reportArgumentType]
    return sent


@pytest.fixture(autouse=True)
def environment(monkeypatch):
    monkeypatch.setenv("VLLM_API_KEY", "sk-0123456789")
    monkeypatch.setenv("ROLLTUNE_SERVER_START", "this-start")


def test_only_health_is_open_and_tells_the_start():
    assert answer("/update_weights", "bearer sk-0123456789")[0]["status"] == 200
    for path in ("/update_weights", "/v1/completions", "/healthy", "/health/", "/x/health", "health", ""):
        for keys in ((), ("Bearer sk-012345678",), ("Bearer  sk-0123456789",), ("sk-0123456789",), ("Bearer \xfc",)):
            start, body = answer(path, *keys)
            assert start["status"] == 401 and b"sk-" not in body["body"] and b"secret" not in body["body"]
    for path, root in (("/health", ""), ("/x/health", "/x")):
        (start, _) = answer(path, root=root)
        assert start["headers"] == [(b"a", b"b"), (b"x-rolltune-start", b"this-start")]
    assert answer("/v1/realtime", type="websocket") == [{"type": "websocket.close", "code": 1008}]
    assert len(answer("", type="lifespan")) == 2, "no request"


def test_a_server_without_a_key_does_not_start(monkeypatch):
    monkeypatch.delenv("VLLM_API_KEY")
    with pytest.raises(KeyError, match="VLLM_API_KEY"):
        RequireKey(application)
