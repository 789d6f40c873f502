"""The endpoint client against a real server that misbehaves: what is asked again, what is not, and what it may cost."""

import asyncio
import base64
import gc
import gzip
import html
import json
import logging
import resource
import time
import traceback
import urllib.parse
import zlib
from email.utils import formatdate

import pytest
from fault_server import FaultServer, Response, error, ok

from rolltune.endpoints import client as endpoint_module
from rolltune.endpoints import responses
from rolltune.endpoints.budget import Usage
from rolltune.endpoints.client import BudgetExceeded, Endpoint, EndpointDown
from rolltune.endpoints.responses import retry_seconds
from rolltune.endpoints.settings import EndpointSettings

KEY = "sk-secret/0123456789"
ASK = [{"role": "user", "content": "2 + 2?"}]


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """Attempts follow each other without a pause, unless the server asks for one."""
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def chat(endpoint: Endpoint, times: int = 1, **options):
    """So many replies, asked for at once."""

    async def ask():
        try:
            return await asyncio.gather(*(endpoint.chat(ASK, **options) for _ in range(times)))
        finally:
            await endpoint.aclose()

    replies = asyncio.run(ask())
    return replies[0] if times == 1 else replies


def in_turn(*responses: Response):
    """A script that sends these, then the last one for ever."""
    return lambda call, request: responses[min(call, len(responses) - 1)]


def connect(server: FaultServer, *, max_concurrency: int | None = None, **options) -> Endpoint:
    named = {"base_url": server.base_url, "model": "tiny", "api_key_env": "OPENAI_API_KEY"}
    settings = EndpointSettings(**{**named, **options})
    return Endpoint(settings, max_concurrency=max_concurrency)


def test_a_reply():
    with FaultServer(in_turn(ok("4", prompt_tokens=12, completion_tokens=3))) as server:
        endpoint = connect(server, dollars_per_million_input=2.0, dollars_per_million_output=10.0)
        reply = chat(endpoint, temperature=0.5, max_tokens=7, seed=3, response_format={"type": "json_object"})
    assert (reply.text, reply.model, reply.finish_reason) == ("4", "tiny-1", "stop")
    assert (reply.prompt_tokens, reply.completion_tokens) == (12, 3)
    assert endpoint.usage == Usage(
        calls=1, prompt_tokens=12, completion_tokens=3, dollars=pytest.approx((12 * 2 + 3 * 10) / 1e6)
    )
    (call,) = server.calls
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.request == {
        "model": "tiny",
        "messages": ASK,
        "temperature": 0.5,
        "max_tokens": 7,
        "seed": 3,
        "response_format": {"type": "json_object"},
    }


def test_what_is_not_asked_for_is_not_sent():
    with FaultServer(in_turn(ok("4"))) as server:
        chat(connect(server))
    assert set(server.calls[0].request) == {"model", "messages", "temperature", "max_tokens"}
    assert (server.calls[0].request["temperature"], server.calls[0].request["max_tokens"]) == (0.0, 1024)


@pytest.mark.parametrize(
    ("response", "text", "finish_reason"),
    [(ok("", finish_reason="length"), "", "length"), (ok(None), "", "stop"), (ok("x", finish_reason=None), "x", "")],
)
def test_replies_with_little_in_them(response, text, finish_reason):
    with FaultServer(in_turn(response)) as server:
        reply = chat(connect(server))
    assert (reply.text, reply.finish_reason, len(server.calls)) == (text, finish_reason, 1)


FAULTS = {
    "500": (error(500, "boom"), "500: boom"),
    "503": (Response(status=503, body=b"<html>busy</html>"), "503: <html>busy</html>"),
    "429": (error(429, "slow down"), "429: slow down"),
    "408": (error(408, "late"), "408: late"),
    "409": (error(409, "locked"), "409: locked"),
    "late": (ok("4", delay=30), "no reply within 0.3 s"),
    "drip": (ok("4", drip=0.05), "no reply within 0.3 s"),
    "cut body": (ok("4", cut=True), "no connection"),
    "cut JSON": (Response(body=ok("4").body[:-9]), "not a chat completion (Invalid JSON: Unterminated"),
    "no JSON": (
        Response(body=b"hello"),
        "not a chat completion (Invalid JSON: Expecting value: line 1 column 1 (char 0)): hello",
    ),
    "nothing": (Response(), "not a chat completion (Invalid JSON: Expecting value"),
    "another object": (Response(body=b'{"id": 1}'), "not a chat completion (choices: Field required)"),
    "an error with status 200": (Response(body=error(500, "oops").body), "500: oops"),
    "a code of many digits": (
        Response(body=b'{"error": {"code": "000000500' + b"0" * 5000 + b'", "message": "busy"}}'),
        "500: busy",
    ),
    "an overload with status 200": (Response(body=b'{"error": {"code": 503, "message": "busy"}}'), "503: busy"),
    "an error in the reply": (ok("4", finish_reason="error"), "the server ended the reply with an error"),
    "no choices": (Response(body=b'{"choices": []}'), "not a chat completion (choices: is empty)"),
    "no message": (Response(body=b'{"choices": [{}]}'), "not a chat completion (choices.0.message: Field required)"),
    "parts": (
        Response(body=b'{"choices": [{"message": {"content": [1]}}]}'),
        "choices.0.message.content: Input should",
    ),
    "deep": (Response(body=b"[" * 100_000), "not a chat completion (Invalid JSON: "),
    "a number of many digits": (
        Response(body=b'{"id": ' + b"9" * 9999 + b"}"),
        "not a chat completion (Invalid JSON: Exceeds",
    ),
    "another compression": (Response(body=b"x", headers={"Content-Encoding": "br"}), "a reply compressed as 'br'"),
    "broken compression": (
        Response(body=b"xyz", headers={"Content-Encoding": "gzip"}),
        "a reply that cannot be unpacked",
    ),
}


# The others have the whole default: a slow machine must not fail them.
TIMEOUTS = {name: {"timeout_seconds": 0.3} for name in ("late", "drip")}


@pytest.mark.parametrize("name", FAULTS)
def test_what_may_pass_is_asked_again(name):
    fault, _ = FAULTS[name]
    with FaultServer(in_turn(fault, fault, ok("4"))) as server:
        endpoint = connect(server, **TIMEOUTS.get(name, {}))
        assert chat(endpoint).text == "4"
    assert len(server.calls) == 3
    usage = endpoint.usage
    assert (usage.calls, usage.retries, usage.failures) == (3, 2, 2)


@pytest.mark.parametrize("name", FAULTS)
def test_attempts_are_used_up(name):
    fault, says = FAULTS[name]
    with FaultServer(in_turn(fault)) as server:
        endpoint = connect(server, max_attempts=2, **TIMEOUTS.get(name, {}))
        with pytest.raises(EndpointDown) as down:
            chat(endpoint)
    assert len(server.calls) == 2
    assert says in str(down.value) and str(down.value).startswith(
        f"{server.base_url}: 2 attempts failed, the last with:"
    )
    assert len(str(down.value)) < 600 and "\n" not in str(down.value)
    assert (endpoint.usage.calls, endpoint.usage.retries, endpoint.usage.failures) == (2, 1, 2)


def test_no_server():
    with FaultServer(in_turn(ok("4"))) as server:
        pass
    with pytest.raises(EndpointDown, match=r"2 attempts failed, the last with: no connection \(ConnectError: "):
        chat(connect(server, max_attempts=2))


def test_too_much(monkeypatch):
    monkeypatch.setattr(responses, "_LARGEST_BODY", 1000)
    with FaultServer(in_turn(ok("4" * 1000), error(500, "5" * 1000), ok("4"))) as server:
        assert chat(connect(server)).text == "4"
    assert len(server.calls) == 3


def peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@pytest.mark.parametrize("status", [200, 500])
def test_a_small_reply_that_unpacks_to_a_large_one(status: int):
    """400 MB of zeros in 0.4 MB: reading stops at the limit."""
    packer = zlib.compressobj(9, zlib.DEFLATED, zlib.MAX_WBITS | 16)
    body = b"".join([packer.compress(b" " * 10**6) for _ in range(400)]) + packer.flush()
    with FaultServer(in_turn(Response(status=status, body=body, headers={"Content-Encoding": "gzip"}))) as server:
        before = peak_mib()
        with pytest.raises(EndpointDown, match="a reply of more than 8,388,608 bytes"):
            chat(connect(server, max_attempts=1))
        assert peak_mib() - before < 100


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "identity"])
def test_compressed_replies(encoding: str):
    pack = {"gzip": gzip.compress, "deflate": zlib.compress, "identity": bytes}[encoding]
    with FaultServer(in_turn(Response(body=pack(ok("4").body), headers={"Content-Encoding": encoding}))) as server:
        assert chat(connect(server)).text == "4"


UNUSUAL = {
    "a byte order mark": (b"\xef\xbb\xbf" + ok("4").body, "4"),
    "Latin-1": (ok("XX").body.replace(b"XX", "gr\u00fcn".encode("latin-1")), "gr\u00fcn"),
    "half a surrogate pair": (ok("a\ud800b").body, "a\ufffdb"),
    "a whole pair": (ok("\U0001f600").body, "\U0001f600"),
    "parts": (
        b'{"choices": [{"message": {"content": [{"type": "thinking", "thinking": []}, {"type": "text", "text": "4"},'
        b' "2"]}}]}',
        "42",
    ),
    "a part of thoughts with a text": (
        b'{"choices": [{"message": {"content": [{"type": "reasoning", "text": "5"}, {"type": "text", "text": "4"}]}}]}',
        "4",
    ),
    "one part": (b'{"choices": [{"message": {"content": {"type": "text", "text": "4"}}}]}', "4"),
    "thoughts of an unknown form": (b'{"choices": [{"message": {"content": "4", "reasoning": {"steps": 2}}}]}', "4"),
    "null in all places": (
        b'{"model": null, "choices": [{"message": {"content": "4"}, "finish_reason": null}],'
        b' "usage": {"prompt_tokens": 3, "completion_tokens": null, "total_tokens": null}}',
        "4",
    ),
}


@pytest.mark.parametrize("name", UNUSUAL)
def test_unusual_replies_are_read_at_once(name: str):
    body, text = UNUSUAL[name]
    with FaultServer(in_turn(Response(body=body))) as server:
        assert chat(connect(server)).text == text
    assert len(server.calls) == 1


ACCOUNT = {
    "no quota": (
        Response(status=429, body=b'{"error": {"code": "insufficient_quota", "message": "Buy."}}'),
        "no quota",
    ),
    "no quota, in words": (error(429, "You exceeded your current quota, check your plan"), "no quota left"),
    "no quota, with 200": (
        Response(body=b'{"error": {"type": "insufficient_quota", "message": "x"}}'),
        "no quota left",
    ),
    "a bad key, with 200": (
        Response(body=b'{"error": {"code": 401, "message": "No auth"}}'),
        r"is refused by .*401: No",
    ),
    "no quota, with 403": (Response(status=403, body=b'{"error": {"code": "insufficient_quota"}}'), "no quota left"),
    "in arrears": (error(429, "Your account is in arrears, please recharge"), "no quota left"),
    "a bad key, without an error object": (Response(body=b'{"code": 401, "message": "No auth"}'), "401: No auth"),
    "a bad key, in words": (Response(body=b'{"error": {"code": "invalid_api_key"}}'), "is refused by"),
    "a list": (Response(status=401, body=b'[{"error": {"code": 401, "message": "No auth"}}]'), "401: No auth"),
}


@pytest.mark.parametrize("name", ACCOUNT)
def test_an_account_that_cannot_pay_stops_at_once(name: str):
    response, says = ACCOUNT[name]
    with FaultServer(in_turn(response)) as server:
        with pytest.raises(ValueError, match=rf"^api_key_env: .*{says}"):
            chat(connect(server))
    assert len(server.calls) == 1


def test_options_that_servers_want(monkeypatch):
    monkeypatch.setenv("TEAM", "blue")
    options = {"max_tokens_key": "max_completion_tokens", "send_seed": False, "headers_env": {"X-Team": "TEAM"}}
    with FaultServer(in_turn(ok("4"))) as server:
        chat(connect(server, **options), max_tokens=7, seed=3)
    (call,) = server.calls
    assert call.request["max_completion_tokens"] == 7 and not {"max_tokens", "seed"} & set(call.request)
    assert call.headers["x-team"] == "blue"
    with FaultServer(in_turn(ok("4"))) as server:  # the server knows no path with a query
        with pytest.raises(ValueError, match=r"no /v1/chat/completions\?api-version=2024-10-21 here"):
            chat(connect(server, api_version="2024-10-21"))
        with pytest.raises(ValueError, match="headers_env.X-Team: NO_TEAM is not set"):
            chat(connect(server, headers_env={"X-Team": "NO_TEAM"}))


@pytest.mark.parametrize("wait", ["0.3", "1"])
def test_retry_after_is_waited_for(wait):
    with FaultServer(in_turn(error(429, Retry_After=wait), ok("4"))) as server:
        assert chat(connect(server)).text == "4"
    first, second = server.calls
    assert second.time - first.time >= float(wait)


def test_retry_after():
    assert retry_seconds("2.5") == 2.5
    assert retry_seconds(formatdate(time.time() + 60, usegmt=True)) == pytest.approx(60, abs=2)
    assert retry_seconds(formatdate(time.time() - 60, usegmt=True)) == 0
    assert (
        retry_seconds("86400")
        == retry_seconds("inf")
        == retry_seconds(formatdate(time.time() + 86400, usegmt=True))
        == 120
    )
    assert (
        retry_seconds(None)
        == retry_seconds("-5")
        == retry_seconds("soon")
        == retry_seconds("nan")
        == retry_seconds("")
        == 0
    )


def test_pauses_grow_and_are_drawn(monkeypatch):
    """Half of each pause is drawn, the other doubles; Retry-After is the least."""
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.5)

    class State:
        def __init__(self, attempt, retry_after=0.0):
            self.attempt_number = attempt
            self.outcome = self
            self.exception = lambda: responses.TransientError("", retry_after)

    for attempt, longest in ((1, 0.5), (2, 1.0), (5, 8.0), (8, 60.0), (10**6, 60.0)):
        drawn = [endpoint_module._pause(State(attempt)) for _ in range(200)]
        assert longest / 2 <= min(drawn) < 0.6 * longest < 0.9 * longest < max(drawn) <= longest
    assert endpoint_module._pause(State(1, retry_after=7.0)) == 7.0
    assert endpoint_module._pause(State(8, retry_after=7.0)) >= 30


@pytest.mark.parametrize(
    ("status", "says"),
    [
        (400, "model or base_url: {url} refuses a call for 'tiny' (400: no)"),
        (401, "api_key_env: OPENAI_API_KEY is refused by {host} (401: no)"),
        (402, "api_key_env: {host} asks for payment (402: no)"),
        (403, "api_key_env: OPENAI_API_KEY is refused by {host} (403: no)"),
        (307, "base_url: {url} redirects to another address; give that one (307: no)"),
        (404, "model or base_url: {url} has no 'tiny' (404: no)"),
        (422, "model or base_url: {url} refuses a call for 'tiny' (422: no)"),
    ],
)
def test_what_would_fail_again_is_not_asked_again(status, says):
    with FaultServer(in_turn(error(status, "no"))) as server:
        endpoint = connect(server)
        with pytest.raises(ValueError) as refused:
            chat(endpoint)
    host = server.base_url.removeprefix("http://").removesuffix("/v1")
    assert str(refused.value) == says.format(url=server.base_url, host=host)
    assert len(server.calls) == 1 and endpoint.usage.failures == 1


def test_a_path_that_is_not_there():
    with FaultServer(in_turn(ok("4"))) as server:
        with pytest.raises(ValueError, match=r"has no 'tiny' \(404: no /v2/chat/completions here\)"):
            chat(connect(server, base_url=server.base_url.replace("v1", "v2")))


def test_no_key(monkeypatch):
    monkeypatch.setenv("OTHER_KEY", "  ")
    with FaultServer(in_turn(ok("4"), ok("4"), error(401, "who are you?"))) as server:
        endpoint = connect(server, api_key_env="OTHER_KEY")
        assert chat(endpoint).text == "4"
        assert server.calls[0].headers["authorization"] == "Bearer none"
        assert chat(connect(server, api_key_env=None)).text == "4"
        assert server.calls[1].headers["authorization"] == "Bearer none"
        with pytest.raises(ValueError, match=r"api_key_env: OTHER_KEY is not set, .*127\.0\.0\.1:"):
            chat(endpoint)


# --- caps -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 4, 32])
def test_no_call_beyond_the_cap(at_once):
    with FaultServer(in_turn(ok("4", delay=0.02))) as server:
        endpoint = connect(server, max_calls=10, max_concurrency=at_once)

        async def ask():
            return await asyncio.gather(*(endpoint.chat(ASK) for _ in range(30)), return_exceptions=True)

        outcomes = asyncio.run(ask())
    assert len(server.calls) == 10 and endpoint.usage.calls == 10
    assert sum(isinstance(o, BudgetExceeded) for o in outcomes) == 20


def test_retries_count_against_the_cap():
    with FaultServer(in_turn(error(500))) as server:
        endpoint = connect(server, max_calls=3)
        with pytest.raises(BudgetExceeded) as stopped:
            chat(endpoint)
    assert len(server.calls) == 3
    assert str(stopped.value).startswith("max_calls: the cap of 3 is reached after 3 calls, 0 tokens and $0.00")
    assert (stopped.value.key, stopped.value.limit, stopped.value.usage.failures) == ("max_calls", 3, 3)


@pytest.mark.parametrize(
    ("caps", "key"),
    [
        ({"max_total_tokens": 45}, "max_total_tokens"),
        ({"max_total_tokens": 31}, "max_total_tokens"),
        ({"max_dollars": 0.00024, "dollars_per_million_input": 1, "dollars_per_million_output": 14}, "max_dollars"),
    ],
)
def test_tokens_and_dollars(caps, key):
    """Each reply has 10 + 5 tokens, and costs 0.00008 dollars: three are within the caps."""
    with FaultServer(in_turn(ok("4"))) as server:
        endpoint = connect(server, **caps)
        for _ in range(3):
            chat(endpoint)
        with pytest.raises(BudgetExceeded, match=rf"^{key}: the cap of .* is reached after 3 calls, 45 tokens"):
            chat(endpoint)
    assert len(server.calls) == 3


def test_no_proxy_gets_requests_for_this_machine(monkeypatch):
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with FaultServer(in_turn(ok("4"))) as server, FaultServer(in_turn(error(502, "proxy"))) as proxy:
        for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
            monkeypatch.setenv(name, proxy.base_url.removesuffix("/v1"))
        assert chat(connect(server)).text == "4" and not proxy.calls


def test_the_default_key_goes_to_openai_only(monkeypatch):
    monkeypatch.setenv("OPENAI_ORG_ID", "org")
    for url in ("https://api.openai.com/v1", "https://API.openai.com:443/v1/"):
        sent = Endpoint(EndpointSettings(base_url=url, model="m"))._headers()
        assert (sent["Authorization"], sent["OpenAI-Organization"]) == (f"Bearer {KEY}", "org")
    for url in ("http://api.openai.com/v1", "https://api.openai.com.evil.example/v1", "https://evil.example/api.openai.com",
                "https://api.openai.com:8443/v1", "http://localhost:8000/v1", "https://h.example/v1"):  # fmt: skip
        sent = Endpoint(EndpointSettings(base_url=url, model="m"))._headers()
        assert sent["Authorization"] == "Bearer none" and "OpenAI-Organization" not in sent
    named = EndpointSettings(base_url="http://h.example/v1", model="m", api_key_env="OPENAI_API_KEY")
    assert Endpoint(named)._headers()["Authorization"] == f"Bearer {KEY}"


USAGES = {
    "all zero but the sum": ({"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 1500}, 1500),
    "the sum only": ({"total_tokens": 1500}, 1500),
    "the sum holds thoughts": ({"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 1500}, 1500),
    "Anthropic": ({"input_tokens": 900, "output_tokens": 600}, 1500),
    "Gemini": ({"promptTokenCount": 900, "candidatesTokenCount": 100, "totalTokenCount": 1500}, 1500),
    "floats": ({"prompt_tokens": 900.0, "completion_tokens": 600.0}, 1500),
    "thoughts apart": (
        {"prompt_tokens": 10, "completion_tokens": 5, "completion_tokens_details": {"reasoning_tokens": 1485}},
        1500,
    ),
    "a cached prompt apart": ({"input_tokens": 5, "cache_read_input_tokens": 1490, "output_tokens": 5}, 1500),
}
UNKNOWN = {
    "missing": None,
    "empty": {},
    "zeros": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0},
    "nulls": {"prompt_tokens": None, "completion_tokens": None, "total_tokens": None},
    "negative": {"prompt_tokens": -5, "completion_tokens": -5},
    "words": {"prompt_tokens": "many", "completion_tokens": True},
    "a list": [1, 2],
    "too large": {"prompt_tokens": 10**30, "completion_tokens": 1e300},
    "cost": {"cost": 0.0},
}


def with_usage(usage: object, content: object = "4") -> Response:
    body = json.loads(ok("4").body)
    body["choices"][0]["message"]["content"] = content
    return Response(body=json.dumps(body | {"usage": usage}).encode())


@pytest.mark.parametrize("name", USAGES)
def test_tokens_by_other_names(name: str):
    usage, total = USAGES[name]
    with FaultServer(in_turn(with_usage(usage))) as server:
        endpoint = connect(server, max_total_tokens=3000)
        for _ in range(2):
            chat(endpoint)
        with pytest.raises(BudgetExceeded):
            chat(endpoint)
    assert endpoint.usage.total_tokens == 2 * total


def test_ollama_counts_beside_the_choices():
    body = json.loads(ok("4", usage=False).body) | {"prompt_eval_count": 900, "eval_count": 600}
    with FaultServer(in_turn(Response(body=json.dumps(body).encode()))) as server:
        endpoint = connect(server)
        chat(endpoint)
    assert (endpoint.usage.prompt_tokens, endpoint.usage.completion_tokens) == (900, 600)


@pytest.mark.parametrize("name", UNKNOWN)
@pytest.mark.parametrize("content", ["4", [1]])  # readable, or not
@pytest.mark.parametrize(
    "cap",
    [{"max_total_tokens": 200}, {"max_dollars": 2e-4, "dollars_per_million_input": 1.0}],
    ids=["tokens", "dollars"],
)
def test_unknown_tokens_are_counted_by_their_bytes(name: str, content, cap):
    with FaultServer(in_turn(with_usage(UNKNOWN[name], content))) as server:
        endpoint = connect(server, **cap)
        with pytest.raises(BudgetExceeded):
            for _ in range(10):
                chat(endpoint, max_tokens=50)
    sent = len(json.dumps(server.calls[0].request))
    assert endpoint.usage.prompt_tokens == sent * len(server.calls) and len(server.calls) <= 3


@pytest.mark.parametrize(
    "response",
    [Response(body=b"hello"), ok("4", cut=True), Response(), Response(body=b"[]")],
    ids=["text", "cut", "empty", "list"],
)
def test_an_unreadable_reply_is_counted(response: Response):
    with FaultServer(in_turn(response)) as server:
        with pytest.raises(BudgetExceeded):
            chat(connect(server, max_total_tokens=150, max_attempts=100), max_tokens=50)
    assert len(server.calls) <= 2


def test_a_reported_price_counts_if_it_is_higher():
    usage = {"prompt_tokens": 10, "completion_tokens": 5, "cost": 0.01}
    with FaultServer(in_turn(with_usage(usage))) as server:
        endpoint = connect(server, max_dollars=0.02, dollars_per_million_input=1.0)
        for _ in range(2):
            chat(endpoint)
        with pytest.raises(BudgetExceeded, match="max_dollars"):
            chat(endpoint)
    assert endpoint.usage.dollars == pytest.approx(0.02)


def test_a_useless_reply_costs_all_the_same():
    empty = ok("4")
    empty = Response(body=empty.body.replace(empty.body[empty.body.index(b"[") : empty.body.index(b"]") + 1], b"[]"))
    with FaultServer(in_turn(empty, ok("4"))) as server:
        endpoint = connect(server)
        chat(endpoint)
    assert (endpoint.usage.prompt_tokens, endpoint.usage.completion_tokens) == (20, 10)


def test_concurrency_is_bounded():
    with FaultServer(in_turn(ok("4", delay=0.05))) as server:
        chat(connect(server, max_concurrency=3), times=9)
    assert server.most_at_once == 3


@pytest.mark.slow
def test_event_loops_come_and_go(capfd):
    async def ask():
        reply = await endpoint.chat(ASK)  # not closed, as a caller may forget
        gc.collect()
        await asyncio.sleep(0.01)
        return reply

    with FaultServer(in_turn(ok("4", delay=0.02))) as server:
        endpoint = connect(server, max_concurrency=1)
        for _ in range(3):
            asyncio.run(ask())
            assert len(endpoint._connections) == 1  # those of loops that have ended are dropped
            assert len(chat(endpoint, times=3)) == 3
            asyncio.run(ask())
    assert endpoint.usage.calls == 15 and server.most_at_once == 1
    assert capfd.readouterr() == ("", "")


# --- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"base_url": "localhost:8000/v1"}, "base_url: 'localhost:8000/v1'; must be an address such as http"),
        ({"base_url": "http://h /v1"}, "base_url: 'http://h /v1'; must be an address such as http"),
        ({"base_url": "http:///v1"}, "base_url: 'http:///v1'; must be an address such as http"),
        ({"base_url": "http://[::1/v1"}, "such as http"),
        ({"base_url": "http://h:99999/v1"}, "such as http"),
        ({"base_url": "http://h:99999/v1?key=pass-word"}, "base_url: contains a user name"),
        ({"base_url": "http://h/v1/chat/completions/"}, "leave out /chat/completions"),
        ({"base_url": "http://me:pass-word@h/v1"}, "base_url: contains a user name"),
        ({"base_url": "http://h/v1?key=pass-word"}, "base_url: contains a user name"),
        ({"base_url": "me:pass-word@h/v1"}, "base_url: contains a user name"),
        ({"model": " "}, "model: is empty"),
        ({"api_key_env": "sk-pass-word"}, "api_key_env: not the name of an environment variable"),
        ({"headers_env": {"X-Key": "sk-pass-word"}}, "headers_env.X-Key: not the name of an environment variable"),
        ({"headers_env": {"Authorization": "KEY"}}, "headers_env: not the name of a header field, or one that is set"),
        ({"max_tokens_key": "n"}, "max_tokens_key: 'n'; use max_tokens or max_completion_tokens"),
        ({"max_attempts": 0}, "max_attempts: 0; must be >= 1"),
        ({"timeout_seconds": 0}, "timeout_seconds: 0; must be > 0"),
        ({"max_calls": 0}, "max_calls: 0; must be > 0"),
        ({"max_total_tokens": -1}, "max_total_tokens: -1; must be > 0"),
        ({"max_dollars": float("nan"), "dollars_per_million_input": 1}, "max_dollars: nan; must be > 0"),
        ({"dollars_per_million_output": -1}, "dollars_per_million_output: -1; must be >= 0"),
        ({"max_dollars": 5}, "max_dollars: 5; needs prices"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError) as wrong:
        EndpointSettings(**{"base_url": "http://h/v1", "model": "m", **options})
    assert says in str(wrong.value) and "pass-word" not in str(wrong.value)


def test_no_calls_at_all_are_no_concurrency():
    with pytest.raises(ValueError, match="max_concurrency: 0"):
        Endpoint(EndpointSettings(base_url="http://h/v1", model="m"), max_concurrency=0)


@pytest.mark.parametrize(
    "url",
    ["http://localhost/v1", "http://127.0.0.1:80/v1", "http://[::1]:80/v1/", "HTTP://LOCALHOST//v1", "http://127.1/v1",
     "http://localhost./v1", "http://[::ffff:127.0.0.1]/v1", "http://0.0.0.0/v1", "http://a.localhost/v1",
     "http://ip6-localhost/v1", "http://localhost.localdomain/v1"],
)  # fmt: skip
def test_one_account_for_each_server(url: str):
    assert EndpointSettings(base_url=url, model="m").account == "m localhost:80"
    umlaut = EndpointSettings(base_url="http://b\u00fccher.example/v1", model="m").account
    assert umlaut == EndpointSettings(base_url="http://XN--bcher-kva.example/v1", model="m").account
    others = ("http://localhost:81/v1", "https://localhost/v1", "http://h/v1", "http://10.0.0.1/v1")
    accounts = {EndpointSettings(base_url=other, model="m").account for other in others}
    assert len(accounts) == 4 and "m localhost:80" not in accounts
    names = ("https://b\u00fccher.example/v1", "https://xn--bcher-kva.example:443/v1")
    assert len({EndpointSettings(base_url=name, model="m").account for name in names}) == 1


def test_hosts():
    assert EndpointSettings(base_url="https://h.example/v1/", model="m").host == "h.example"
    assert EndpointSettings(base_url="http://localhost:8000/v1", model="m").host == "localhost:8000"


# --- the key ----------------------------------------------------------------------------------------------------------


def everything_about(problem: BaseException, seen: set[int] | None = None) -> str:
    """What any handler could print of an exception: messages, attributes, causes and contexts."""
    seen = set() if seen is None else seen
    if id(problem) in seen:
        return ""
    seen.add(id(problem))
    texts = [repr(problem), str(problem), repr(vars(problem)), "".join(traceback.format_exception(problem))]
    for other in (problem.__cause__, problem.__context__):
        if other is not None:
            texts.append(everything_about(other, seen))
            request = getattr(other, "request", None)
            texts.append("" if request is None else str(dict(request.headers)))
    return "".join(texts)


TELLTALES = {
    "401": error(401, f"Incorrect API key provided: {KEY}."),
    "404": Response(status=404, body=f"no route for {KEY}".encode()),
    "500": error(500, "x" * 290 + KEY),
    "late": ok("4", delay=30),
    "no completion": Response(body=f'{{"key": "{KEY}"}}'.encode()),
    "cut": ok("4", cut=True),
}


@pytest.mark.parametrize("name", TELLTALES)
def test_the_key_is_nowhere(name, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    with FaultServer(in_turn(TELLTALES[name])) as server:
        endpoint = connect(server, max_attempts=2, **TIMEOUTS.get(name, {}))
        with pytest.raises((ValueError, EndpointDown)) as failed:
            chat(endpoint)
    assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"  # it was there to be told
    shown = (
        everything_about(failed.value) + repr(endpoint) + str(vars(endpoint)) + caplog.text + str(capsys.readouterr())
    )
    assert KEY not in shown and "sk-secret" not in shown
    if name in ("401", "404", "no completion"):
        assert "***" in str(failed.value)


ESCAPES = {
    "JSON": "".join(f"\\u{ord(char):04x}" for char in KEY),
    "JSON, a part": KEY.replace("s", "\\u0073").replace("/", "\\/"),
    "JSON in JSON": "".join(f"\\\\u{ord(char):04X}" for char in KEY),
    "a URL": urllib.parse.quote(KEY, safe=""),
    "a URL, all of it": "".join(f"%{ord(char):02X}" for char in KEY),
    "HTML": html.escape(KEY).replace("/", "&#x2F;").replace("s", "&#115;"),
    "HTML, by name": KEY.replace("/", "&sol;"),
    "octal": "".join(f"\\{ord(char):03o}" for char in KEY),
    "Python, long": "".join(f"\\U{ord(char):08x}" for char in KEY),
    "CSS": "".join(f"\\{ord(char):x} " for char in KEY),
    "quoted-printable": "".join(f"={ord(char):02X}" for char in KEY),
    "hex": KEY.encode().hex(":"),
    "capitals": KEY.upper(),
    "wrapped": f"{KEY[:7]}\n  {KEY[7:]}",
    "zero width": "\u200b".join(KEY),
    "base64": base64.b64encode(KEY.encode()).decode(),
    "base64 with more": base64.b64encode(f"Bearer {KEY}".encode()).decode(),
}


@pytest.mark.parametrize("name", ESCAPES)
def test_an_escaped_key_is_removed_too(name: str):
    with FaultServer(in_turn(Response(status=400, body=f"bad: {ESCAPES[name]}!".encode()))) as server:
        with pytest.raises(ValueError) as refused:
            chat(connect(server))
    said = str(refused.value)
    assert "***" in said and ESCAPES[name][8:-4] not in said, said


def test_a_key_that_is_none(monkeypatch):
    """The HTTP library shows a header that it refuses."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret\nsecond line")
    with FaultServer(in_turn(ok("4"))) as server:
        with pytest.raises(ValueError, match="api_key_env: .*OPENAI_API_KEY") as wrong:
            chat(connect(server))
    assert "secret" not in everything_about(wrong.value)
    monkeypatch.setenv("OPENAI_API_KEY", f" {KEY}\n")
    with FaultServer(in_turn(ok("4"))) as server:
        chat(connect(server))
    assert server.calls[0].headers["authorization"] == f"Bearer {KEY}"


def test_what_a_server_says_cannot_drive_a_terminal():
    with FaultServer(in_turn(error(400, "a\x1b[2Jb\r\nc\u202e" + "d" * 1000))) as server:
        with pytest.raises(ValueError) as refused:
            chat(connect(server))
    assert str(refused.value).isprintable() and len(str(refused.value)) < 450
    assert "a [2Jb c" in str(refused.value)
