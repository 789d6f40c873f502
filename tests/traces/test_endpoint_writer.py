"""Traces from a model behind an endpoint: the requests, the replies that are kept, and the packaged prompts."""

import asyncio
import hashlib
import re

import pytest
from endpoint_options import as_arguments
from fault_server import FaultServer, error, ok

from rolltune.endpoints import client as endpoint_module
from rolltune.endpoints.client import BudgetExceeded, EndpointDown
from rolltune.rewards.answer import answer_reward
from rolltune.rewards.countdown import countdown_reward
from rolltune.rewards.format import format_reward
from rolltune.traces.conditions import CONDITIONS
from rolltune.traces.endpoint import EndpointTraceWriter, Malformed, packaged_prompt
from rolltune.types import Problem

GOOD = "<think>3 + 5 = 8, and 8 * 2 = 16.</think>\n<answer>(3 + 5) * 2</answer>"
ASKED = "Using the numbers 3, 5 and 2, create an equation that equals 16."
PROBLEM = Problem(id="c/0", messages=({"role": "user", "content": ASKED},), answer="(3 + 5) * 2")


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(endpoint_module, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")


def make(base_url="http://h:1/v1", **options):
    return EndpointTraceWriter(
        **as_arguments(
            **{"condition": "backtracking", "task": "countdown", "base_url": base_url, "model": "m", **options}
        )
    )


def write(writer, problem=PROBLEM, seed=7):
    async def ask():
        try:
            return await writer.write(problem, seed=seed)
        finally:
            await writer.endpoint.aclose()

    return asyncio.run(ask())


def test_what_is_sent():
    with FaultServer(lambda call, request: ok(f"\n{GOOD}\n")) as server:
        assert write(make(server.base_url, temperature=0.7, max_tokens=99)) == GOOD
    (request,) = [call.request for call in server.calls]
    system = packaged_prompt("countdown", "backtracking")
    assert request["messages"] == [{"role": "system", "content": system}, {"role": "user", "content": ASKED}]
    assert (request["model"], request["temperature"], request["max_tokens"]) == ("m", 0.7, 99)
    assert 0 <= request["seed"] < 2**31


def test_the_papers_settings_are_the_defaults():
    with FaultServer(lambda call, request: ok(GOOD)) as server:
        write(make(server.base_url))
    assert (server.calls[0].request["temperature"], server.calls[0].request["max_tokens"]) == (0.5, 1024)


def test_the_seed_is_the_callers():
    with FaultServer(lambda call, request: ok(GOOD)) as server:
        writer = make(server.base_url)
        for seed in (7, 7, 8):
            write(writer, seed=seed)
    first, again, other = (call.request["seed"] for call in server.calls)
    assert first == again != other


BAD = {
    "no tags": ok("The answer is 16."),
    "no answer": ok("<think>3 + 5 = 8</think>"),
    "empty thinking": ok("<think> </think>\n<answer>(3 + 5) * 2</answer>"),
    "text in front": ok(f"Sure!\n{GOOD}"),
    "twice": ok(f"{GOOD}\n{GOOD}"),
    "cut": ok(GOOD, finish_reason="length"),  # a reply may end in an answer and be cut for all that
    "nothing": ok(None),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_reply_is_asked_for_again(name):
    with FaultServer(lambda call, request: BAD[name] if call < 2 else ok(GOOD)) as server:
        assert write(make(server.base_url)) == GOOD
    seeds = [call.request["seed"] for call in server.calls]
    assert len(seeds) == len(set(seeds)) == 3
    others = [{**call.request, "seed": 0} for call in server.calls]
    assert others[0] == others[1] == others[2]


@pytest.mark.parametrize("name", BAD)
def test_and_left_out_at_last(name):
    with FaultServer(lambda call, request: BAD[name]) as server:
        with pytest.raises(Malformed) as bad:
            write(make(server.base_url, max_tokens=50))
    assert len(server.calls) == 3
    assert str(bad.value).startswith("c/0: ")
    assert ("cut at 50 tokens" in str(bad.value)) == (name == "cut")


def test_a_wrong_answer_is_kept():
    wrong = GOOD.replace("(3 + 5) * 2<", "3 + 5 + 2<")
    with FaultServer(lambda call, request: ok(wrong)) as server:
        assert write(make(server.base_url)) == wrong
    assert len(server.calls) == 1


def test_failures_are_not_malformed():
    with FaultServer(lambda call, request: error(500)) as server:
        with pytest.raises(EndpointDown):
            write(make(server.base_url, max_attempts=2))
    with FaultServer(lambda call, request: error(401)) as server:
        with pytest.raises(ValueError, match="api_key_env") as refused:
            write(make(server.base_url))
    assert not isinstance(refused.value, Malformed)


@pytest.mark.parametrize(
    ("cap", "key"),
    [
        ({"max_calls": 2}, "max_calls"),
        ({"max_total_tokens": 30}, "max_total_tokens"),
        ({"max_dollars": 2e-5, "dollars_per_million_input": 1.0}, "max_dollars"),
    ],
)
def test_caps_hold_and_go_by_their_names_here(cap, key):
    with FaultServer(lambda call, request: ok("no tags")) as server:
        with pytest.raises(BudgetExceeded, match=f"^{key}: .*2 calls, 30 tokens"):
            write(make(server.base_url, **cap))
    assert len(server.calls) == 2


def test_provenance_and_preview(tmp_path):
    writer = make("https://h.example:8443/v1", temperature=0.25)
    digest = hashlib.sha256(packaged_prompt("countdown", "backtracking").encode()).hexdigest()[:12]
    assert writer.provenance == {
        "writer": "rolltune.traces.endpoint",
        "model": "m",
        "host": "h.example:8443",
        "prompt": digest,
        "temperature": "0.25",
    }
    assert writer.condition == "backtracking"
    shown = writer.preview(PROBLEM)
    assert shown.startswith("[system]\nYou write worked examples of a number game") and shown.endswith(
        f"[user]\n{ASKED}"
    )
    own = tmp_path / "own.md"
    own.write_text("Think like a pirate, é.", encoding="utf-8")
    mine = make(condition="pirate", prompt=str(own))
    assert mine.condition == "pirate" and mine.provenance["prompt"] != digest
    assert mine.preview(PROBLEM).startswith("[system]\nThink like a pirate, é.\n")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (
            {"condition": "backtrackin"},
            "condition: 'backtrackin' .*did you mean 'backtracking'.*all_",
        ),
        ({"condition": "xyz"}, "condition: 'xyz' .*all_strategies, backtracking, "),
        ({"condition": "../countdown/backtracking"}, "condition: '../countdown/backtracking'"),
        ({"task": "maths"}, "task: 'maths' .*did you mean 'math'.*countdown, math"),
        ({"temperature": 2.5}, "temperature: 2.5"),
        ({"max_tokens": 0}, "max_tokens: 0"),
        ({"max_total_tokens": 0}, "max_total_tokens: 0"),
        ({"base_url": "h/v1"}, "base_url: 'h/v1'"),
        ({"prompt": "nowhere.md"}, "prompt: nowhere.md"),
    ],
)
def test_bad_arguments(options, says):
    with pytest.raises(ValueError, match=f"^{says}"):
        make(**options)


def test_bad_prompt_files(tmp_path):
    (tmp_path / "empty.md").write_text(" \n")
    (tmp_path / "latin.md").write_bytes(b"caf\xe9")
    with pytest.raises(ValueError, match=r"prompt: .*empty\.md"):
        make(prompt=str(tmp_path / "empty.md"))
    with pytest.raises(ValueError, match=r"prompt: .*latin\.md.*UTF-8"):
        make(prompt=str(tmp_path / "latin.md"))


# --- the prompts ------------------------------------------------------------------------------------------------------

NAMED = {
    "**Backtracking**": lambda behaviours: behaviours.backtrack,
    "**Verification**": lambda behaviours: behaviours.verify,
    "**Subgoals**": lambda behaviours: "subgoal" in behaviours.kinds,
    "**Backward chaining**": lambda behaviours: "backward" in behaviours.kinds,
}


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("task", ["countdown", "math"])
def test_prompts_ask_only_for_their_behaviours(task, condition):
    text = packaged_prompt(task, condition)
    for name, is_asked in NAMED.items():
        assert (name in text) == is_asked(CONDITIONS[condition]), name
    assert len({packaged_prompt(t, c) for t in ("countdown", "math") for c in CONDITIONS}) == 12


@pytest.mark.parametrize("condition", CONDITIONS)
@pytest.mark.parametrize("task", ["countdown", "math"])
def test_the_examples_are_right(task, condition):
    """In the layout, with the right answer, and every equation in the working holds."""
    asked, _, response = packaged_prompt(task, condition).partition("Problem: ")[2].partition("\n\n")
    response = response.strip()
    if task == "countdown":
        numbers, target = re.fullmatch(
            r"Using the numbers (.*), create an equation that equals (\d+)\.", asked
        ).groups()
        (given,) = re.findall(r"<answer>(.*)</answer>", response)
        assert sorted(re.findall(r"\d+", given)) == sorted(re.findall(r"\d+", numbers))
        assert eval(given) == int(target)  # our own text
        problem, reward = Problem(id="p", messages=(), answer=given), countdown_reward
    else:
        problem, reward = Problem(id="p", messages=(), answer="12"), answer_reward
    assert format_reward(problem, response).total == 1.0
    assert reward(problem, response).total == 1.0
    equations = re.findall(r"(\d+(?: [-+*/] \d+)+) = (\d+)", response)
    assert len(equations) >= (0 if condition == "negative_control" and task == "countdown" else 3)
    assert all(eval(left) == int(right) for left, right in equations), equations
