"""The rubric as a reward, against judges behind real sockets."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from endpoint_options import as_config
from fault_server import FaultServer, Response, error, ok

from rolltune.rewards.combine import JudgedReward, WeightedReward
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.reward import RubricReward
from rolltune.rewards.rubric.schema import Criterion, Rubric
from rolltune.types import Completion, Problem, Score

CRITERIA = (
    Criterion(title="Says four", description="States that the sum is four.", category="essential"),
    Criterion(title="Is brief", description="Uses one sentence.", category="optional"),
    Criterion(title="Guesses", description="Says that it is guessing.", category="pitfall", satisfied_is_good=False),
)
PROBLEM = Problem(
    id="p", messages=({"role": "user", "content": "2 + 2?"},), answer="4", rubric=Rubric(criteria=CRITERIA)
)
TEXT = "Two and two is four."


def verdicts(*grades: int | None) -> str:
    graded = [{"number": i, "reason": f"r{i}", "grade": g} for i, g in enumerate(grades, start=1) if g is not None]
    return json.dumps({"verdicts": graded})


@pytest.fixture
def pool() -> Iterator[JudgePool]:
    made = JudgePool()
    yield made
    made.close()


@pytest.fixture
def make_reward(pool):
    """A reward whose judges are servers, and which has joined the pool."""
    keys = (f"rewards.r{i}" for i in itertools.count())

    def make(*servers: FaultServer, judge: dict[str, Any] | None = None, **options: Any) -> RubricReward:
        nodes = [node(server, model=f"judge{i}", **(judge or {})) for i, server in enumerate(servers)]
        reward = RubricReward(judges=nodes, **options)
        reward.join(pool, next(keys), PROBLEM)
        return reward

    return make


def node(server: FaultServer, **options: Any) -> dict[str, Any]:
    return {
        "_component_": "rolltune.rewards.judges.endpoint.EndpointJudge",
        **as_config(**{"base_url": server.base_url, "model": "m", "max_attempts": 2} | options),
    }


def always(text: str) -> Callable[[int, dict[str, Any]], Response]:
    return lambda call, request: ok(text)


def test_explicit_by_hand(make_reward):
    """Essential 1.0 satisfied, optional 0.3 not, pitfall 0.9 not done: (1.0 + 0.9) / 2.2."""
    with FaultServer(always(verdicts(1, 0, 0))) as server:
        score = make_reward(server, criterion_curves=True)(PROBLEM, TEXT)
    assert score.total == pytest.approx(1.9 / 2.2) and score.failure is None
    assert score.parts == {
        "scored_share": 1.0,
        "category/essential": 1.0,
        "category/optional": 0.0,
        "category/pitfall": 1.0,
        "criterion/says_four": 1.0,
        "criterion/is_brief": 0.0,
        "criterion/guesses": 1.0,
    }
    host = server.base_url.split("/")[2]
    assert score.notes["is_brief"] == f"0: judge0@{host} 0: r2"
    assert len(server.calls) == 1


def test_one_question_for_each_criterion(make_reward):
    def judge(call: int, request: dict[str, Any]) -> Response:
        asked = request["messages"][-1]["content"]
        return ok(json.dumps({"reason": "r", "grade": int("Says four" in asked)}))

    with FaultServer(judge) as server:
        score = make_reward(server, one_call=False)(PROBLEM, TEXT)
    assert score.total == pytest.approx(1.9 / 2.2) and len(server.calls) == 3


def one_by_one(pitfall: Response) -> Callable[[int, dict[str, Any]], Response]:
    """A script that grades the three criteria 1 and 0, and answers the pitfall as given."""

    def judge(call: int, request: dict[str, Any]) -> Response:
        asked = request["messages"][1]["content"]
        return pitfall if "Guesses" in asked else ok(json.dumps({"reason": "r", "grade": int("Says four" in asked)}))

    return judge


def test_a_criterion_whose_judge_is_down_leaves_the_mean(make_reward):
    """The pitfall (0.9 of 2.2) is unscored: 1.0 / 1.3 of what is left where 0.5 of the weight is enough."""
    with FaultServer(one_by_one(error(500, "down"))) as server:
        lenient = make_reward(server, min_scored=0.5, one_call=False)(PROBLEM, TEXT)
        strict = make_reward(server, min_scored=0.7, one_call=False)(PROBLEM, TEXT)
    assert lenient.total == pytest.approx(1.0 / 1.3)
    assert lenient.parts["scored_share"] == pytest.approx(1.3 / 2.2)
    assert lenient.parts["category/pitfall"] is None
    assert strict.total is None and strict.notes["guesses"].startswith("unscored: ")
    assert strict.failure == "judge_down"


PARTIAL = {
    "missing": verdicts(1, 0, None),
    "null": verdicts(1, 0, 0).replace('"grade": 0}]', '"grade": null}]'),
    "unreadable": verdicts(1, 0, 0).replace('"grade": 0}]', '"grade": "perhaps"}]'),
    "from 0": verdicts(1, 0, 0)
    .replace("number", "x")
    .replace('"x": 1', '"number": 0')
    .replace('"x": 2', '"number": 1'),
}


@pytest.mark.parametrize("name", PARTIAL)
def test_a_partial_reply_leaves_the_response_unscored(make_reward, name: str):
    """If only the unreadable criterion were left out, a bad response could gain by making it unreadable."""
    with FaultServer(always(PARTIAL[name])) as server:
        score = make_reward(server, min_scored=0.1)(PROBLEM, TEXT)
    assert (score.total, score.failure, score.parts["scored_share"]) == (None, "judge_unparseable", 0.0)


@pytest.mark.parametrize("reply", [ok("no"), ok("{}", finish_reason="length"), ok("", finish_reason="content_filter")])
def test_so_does_one_criterion_of_several_questions(make_reward, reply: Response):
    with FaultServer(one_by_one(reply)) as server:
        assert make_reward(server, min_scored=0.1, one_call=False)(PROBLEM, TEXT).total is None


def test_judges_that_disagree(make_reward):
    with FaultServer(always(verdicts(1, 1, 0))) as a, FaultServer(always(verdicts(0, 1, 0))) as b:
        score = make_reward(a, b, combine="majority", min_scored=0.9)(PROBLEM, TEXT)
    assert score.total is None and score.failure == "judge_disagrees"


def test_a_rating(make_reward):
    with FaultServer(always('{"reason": "fine", "rating": 7}')) as server:
        score = make_reward(server, aggregation="implicit")(PROBLEM, TEXT)
    assert score.total == pytest.approx(6 / 9)
    assert "7 of 10. fine" in score.notes["rating"]
    asked = server.calls[0].request["messages"][-1]["content"]
    assert "Says four" in asked and "reference" not in asked


def test_a_reference_is_shown_where_it_is_asked_for(make_reward):
    with FaultServer(always('{"reason": "", "rating": 1}')) as server:
        assert make_reward(server, aggregation="implicit", with_reference=True)(PROBLEM, TEXT).total == 0.0
    assert "reference" in server.calls[0].request["messages"][-1]["content"]


def test_a_panel_takes_the_mean_and_leaves_out_who_is_down(make_reward):
    with FaultServer(always(verdicts(1, 1, 0))) as a, FaultServer(always(verdicts(0, 1, 0))) as b:
        assert make_reward(a, b)(PROBLEM, TEXT).total == pytest.approx((0.5 + 0.3 + 0.9) / 2.2)
        with FaultServer(lambda call, request: error(500, "down")) as c:
            score = make_reward(a, c, quorum=1)(PROBLEM, TEXT)
            assert score.total == pytest.approx(1.0) and "judge_down" in score.notes["says_four"]
            assert make_reward(a, c)(PROBLEM, TEXT).failure == "judge_down"


@pytest.mark.parametrize("reply", [ok("no"), ok("{}", finish_reason="length"), ok("", finish_reason="content_filter")])
@pytest.mark.parametrize(
    ("options", "kind"),
    [({}, verdicts(1, 1, 0)), ({"aggregation": "implicit"}, '{"reason": "", "rating": 9}')],
    ids=["explicit", "implicit"],
)
def test_a_response_cannot_leave_out_its_strictest_judge(make_reward, reply: Response, options, kind: str):
    with FaultServer(always(kind)) as a, FaultServer(lambda call, request: reply) as strict:
        score = make_reward(a, strict, quorum=1, **options)(PROBLEM, TEXT)
    assert score.total is None and score.failure in ("judge_unparseable", "judge_cut", "judge_refused")


@pytest.mark.parametrize(
    ("script", "failure"),
    [
        (lambda call, request: error(500, "oops"), "judge_down"),
        (lambda call, request: ok("", delay=5), "judge_down"),
        (always('{"verdicts": "all good"}'), "judge_unparseable"),
        (always(""), "judge_unparseable"),
        (lambda call, request: ok(verdicts(1, 1, 1), finish_reason="length"), "judge_cut"),
        (lambda call, request: ok(verdicts(1, 1, 1), cut=True), "judge_down"),
    ],
)
def test_no_fault_is_a_zero(make_reward, pool, script, failure):
    with FaultServer(script) as server:
        reward = make_reward(server, judge={"timeout_seconds": 0.3})
        score = reward(PROBLEM, TEXT)
    assert score.total is None and score.failure == failure
    assert not [part for name, part in score.parts.items() if part is not None and name != "scored_share"]
    assert pool.stop_reason is None


@pytest.mark.parametrize("text", ["", ":", "Solution", "Thought process:", "the " * 200, "\u200b\u200b"])
def test_nothing_said_is_worth_nothing_and_costs_nothing(make_reward, text):
    with FaultServer(always(verdicts(1, 1, 0))) as server:
        assert make_reward(server)(PROBLEM, text) == Score(total=0.0, failure="degenerate")
    assert server.calls == []


def test_a_gate(make_reward):
    gate = {"_component_": "rolltune.rewards.answer.answer_reward"}
    with FaultServer(always(verdicts(1, 1, 0))) as server:
        reward = make_reward(server, gate=gate)
        assert reward(PROBLEM, "<think>w</think><answer>5</answer>").total == 0.0
        assert server.calls == []
        assert reward(PROBLEM, "<think>w</think><answer>4</answer>").total == 1.0


class Passes:
    """A gate that is a class, built once. It cannot judge a text without a word."""

    def __init__(self, *, word: str) -> None:
        self.word = word

    def __call__(self, problem: Problem, text: str) -> Score:
        return Score(total=float(self.word in text) if text.split() else None)


def test_a_gate_may_be_a_class_and_leave_a_response_unscored(make_reward, monkeypatch):
    monkeypatch.setattr("rolltune.rewards.answer.Passes", Passes, raising=False)
    with FaultServer(always(verdicts(1, 1, 0))) as server:
        reward = make_reward(server, gate={"_component_": "rolltune.rewards.answer.Passes", "word": "four"})
        assert [reward(PROBLEM, text).total for text in (TEXT, "Five it is.")] == [1.0, 0.0]
        assert reward(PROBLEM, " ") == Score(total=None, failure="gate_unscored")


@pytest.mark.parametrize(
    ("gate", "message"),
    [
        (
            {"_component_": "rolltune.rewards.length.soft_overlong_reward", "max_tokens": 8, "cache_tokens": 4},
            "takes the completion",
        ),
        ({"_component_": "rolltune.rewards.rubric.reward.RubricReward"}, "is judged itself"),
    ],
)
def test_a_gate_that_cannot_be_one(make_reward, gate, message):
    with FaultServer(always("")) as server:
        with pytest.raises(ValueError, match=f"gate: .*{message}"):
            make_reward(server, gate=gate | ({"judges": [node(server)]} if "rubric" in gate["_component_"] else {}))


def test_the_answer_alone(make_reward):
    with FaultServer(always(verdicts(1, 1, 0))) as server:
        reward = make_reward(server, judged="answer")
        assert reward(PROBLEM, "<think>secret</think><answer>It is four.</answer>").total == 1.0
        assert reward(PROBLEM, "It is four.").failure == "degenerate"
    asked = server.calls[0].request["messages"][-1]["content"]
    assert "It is four." in asked and "secret" not in asked


@pytest.mark.slow
def test_many_are_judged_at_once_and_the_late_are_unscored(make_reward, pool):
    """Seven answers wait for each other, so they come only if all were asked for at once; the eighth never does."""
    together = threading.Barrier(7)

    def judge(call: int, request: dict[str, Any]) -> Response:
        asked = request["messages"][-1]["content"]
        if "slow" in asked:
            return ok(verdicts(1, 1, 0), delay=60.0)
        if "four," in asked:
            together.wait(60)
        return ok(verdicts(1, 1, 0))

    with FaultServer(judge) as server:
        reward = make_reward(server, wait_seconds=8.0)
        pool.smoke_test()  # the library is imported by now
        pending = [reward.begin(PROBLEM, f"It is four, {i}, {'slow' if i == 3 else 'fast'}.") for i in range(8)]
        totals = [reward.finish(each).total for each in pending]
    assert [total for i, total in enumerate(totals) if i != 3] == [1.0] * 7
    assert totals[3] is None and pool.metrics()["judge/r0/late"] == 1


def test_what_nobody_waits_for_any_more_keeps_nothing_else_from_being_judged(make_reward, pool):
    """Both places are taken by calls that hang when their step is over."""

    def judge(call: int, request: dict[str, Any]) -> Response:
        return ok(verdicts(1, 1, 0), delay=60.0 if "hang" in request["messages"][-1]["content"] else 0.0)

    with FaultServer(judge) as server:
        reward = make_reward(server, judge={"max_concurrency": 2}, wait_seconds=1.0)
        pool.smoke_test()
        first = [reward.begin(PROBLEM, f"It is four, {i}, hang.") for i in range(4)]
        assert [reward.finish(each).failure for each in first] == ["judge_late"] * 4
        pool._members["rewards.r0"].wait_seconds = 30.0
        assert reward(PROBLEM, TEXT).total == 1.0


def test_a_cap_stops_and_says_so(make_reward, pool):
    with FaultServer(always(verdicts(1, 1, 0))) as server:
        reward = make_reward(server, judge={"max_calls": 1})
        assert reward(PROBLEM, TEXT).total == 1.0 and pool.stop_reason is None
        assert reward(PROBLEM, f"{TEXT} Yes.").failure == "judge_budget"
    assert re.match(r"rewards\.r0: judge0@.*max_calls: the cap of 1 is reached", str(pool.stop_reason))


def test_a_server_that_refuses_everything_stops_and_says_so(make_reward, pool):
    with FaultServer(lambda call, request: error(401, "bad key")) as server:
        reward = make_reward(server)
        assert reward(PROBLEM, TEXT) == Score(total=None, failure="judge_stopped")
    assert str(pool.stop_reason).startswith("rewards.r0: api_key_env")


def test_what_cannot_be_judged_shows_before_anything_is_sampled(make_reward):
    with FaultServer(always(verdicts(1, 1, 0))) as server:
        reward = make_reward(server)
        reward.check([PROBLEM])
        with pytest.raises(ValueError, match="data: bare has no rubric"):
            reward.check([PROBLEM, Problem(id="bare", messages=PROBLEM.messages)])
        with pytest.raises(ValueError, match="data: bare has no answer"):
            unanswered = Problem(id="bare", messages=PROBLEM.messages, rubric=PROBLEM.rubric)
            make_reward(server, with_reference=True).check([unanswered])
        assert server.calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregation": "best"}, "aggregation: 'best' is unknown"),
        ({"aggregation": "implicit", "criterion_curves": True}, "criterion_curves: has no effect"),
        ({"min_scored": 0.0}, "min_scored: 0.0"),
        ({"wait_seconds": 0.0}, "wait_seconds: 0.0"),
        ({"category_weights": {"vital": 1.0}}, "category_weights.vital"),
        ({"template": "nowhere.md"}, "prompt: nowhere.md"),
        ({"judges": []}, "judges: the list is empty"),
        ({"temperature": 3}, "judges[0].temperature: 3"),
        ({"base_url": "h/v1"}, "judges[0].endpoint.base_url: 'h/v1'"),
    ],
)
def test_bad_options(options, message):
    with FaultServer(always("")) as server:
        judge = {name: options[name] for name in options if name in ("temperature", "base_url")}
        rest = {name: value for name, value in options.items() if name not in judge}
        with pytest.raises(ValueError, match=re.escape(message)):
            RubricReward(**({"judges": [node(server, **judge)]} | rest))


def test_it_is_a_judged_reward_and_composes_by_weight(pool):
    completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text=TEXT)
    with FaultServer(always(verdicts(1, 0, 0))) as server:
        judged = RubricReward(judges=[node(server)])
        assert isinstance(judged, JudgedReward)
        reward = WeightedReward(
            rewards={"rubric": (judged, 2.0), "plain": (lambda problem, text: Score(total=0.25), 1.0)}
        )
        reward.join(pool, "rewards", [PROBLEM])
        pending = reward.begin(PROBLEM, completion)
        assert list(pending.judged) == ["rubric"] and pending.completion is completion
        score = reward.finish(pending)
    assert score.total == pytest.approx(2 * 1.9 / 2.2 + 0.25)
    assert score.parts["rubric/category/essential"] == 1.0 and "rubric/says_four" in score.notes
    assert pool.metrics()["judge/rubric/calls"] == 1 and list(reward.text_rewards) == ["plain"]


def test_a_rubric_of_pitfalls_only_is_warned_about(make_reward, caplog):
    only = Problem(id="only", messages=PROBLEM.messages, rubric=Rubric(criteria=CRITERIA[2:]))
    with FaultServer(always("")) as server:
        make_reward(server).check([PROBLEM, only])
    assert "1 rubrics, the first of 'only', list pitfalls only" in caplog.text
