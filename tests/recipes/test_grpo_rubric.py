"""GRPO with rubric rewards: whole runs against a judge behind a real socket, that works, fails, dies and comes back."""

from __future__ import annotations

import json
import random
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from endpoint_options import as_config
from fault_server import FaultServer, Response, error, ok
from judge_server import grade
from tiny_run import read_rows

from rolltune.errors import RunStopped

Script = Callable[[int, dict[str, Any]], Response]


def options(server: FaultServer, cache: Path | None, *, judge: dict[str, Any] | None = None, **rubric: Any) -> dict:
    """Changes to the tiny run: 2 problems of 4 completions a step, judged by ``server``."""
    given = {
        "base_url": server.base_url,
        "model": "m",
        "api_key_env": "OPENAI_API_KEY",
        "max_attempts": 1,
        "max_concurrency": 4,
        "timeout_seconds": 20.0,
        "cache": None if cache is None else str(cache),
    }
    node = {
        "_component_": "rolltune.rewards.judges.endpoint.EndpointJudge",
        **as_config(**given | (judge or {})),
    }
    tasks = {"_component_": "rolltune.data.rubrics.rubric_tasks"}
    low = {"_component_": "tiny_reward.low_bytes"}
    return {
        "data": {"train": tasks, "heldout": tasks | {"split": "heldout", "count": 4}},
        "rewards": {
            "rubric": {
                "_component_": "rolltune.rewards.rubric.reward.RubricReward",
                "judges": [node],
                "criterion_curves": True,
            }
            | rubric
        },
        "num_steps": 3,
        "batch": {"prompts_per_step": 2, "microbatch_tokens": 256},
        "eval": {"every_n_steps": 3, "max_problems": 4, "correct": low, "lenient": None},
    }


def samples(output_dir: Path) -> list[dict[str, Any]]:
    files = sorted((output_dir / "samples").glob("*.jsonl"))
    return [json.loads(line) for file in files for line in file.read_text().splitlines()]


def learnt(output_dir: Path) -> list[dict[str, Any]]:
    """The rows without what judging cost, which a cache changes."""
    return [{k: v for k, v in row.items() if not k.startswith("judge/")} for row in read_rows(output_dir)]


def test_a_run_leaves_curves_verdicts_and_costs(run_grpo, tmp_path):
    with FaultServer(grade) as server:
        output_dir = run_grpo(**options(server, tmp_path / "cache.sqlite"))
        asked = len(server.calls)
    rows = read_rows(output_dir)
    assert [row["step"] for row in rows] == [0, 1, 2, 3]
    for row in rows[1:]:
        assert 0 < row["reward/mean"] < 1 and row["reward/unscored"] == 0.0
        assert row["reward/rubric/scored_share/mean"] == 1.0
        assert any(name.startswith("reward/rubric/category/") for name in row)
        assert any(name.startswith("reward/rubric/criterion/") for name in row)
    assert rows[-1]["judge/rubric/calls"] == asked <= 1 + 3 * 8
    assert rows[-1]["judge/rubric/prompt_tokens"] == 10 * asked
    assert 0 < rows[-1]["heldout/score"] < 1 and "heldout/lenient_accuracy" not in rows[-1]
    host = server.base_url.split("/")[2]
    judged = [sample for sample in samples(output_dir) if sample["failure"] != "degenerate"]
    assert len(judged) > 12
    for sample in judged:
        assert sample["notes"] and all(f"m@{host} " in note and "because" in note for note in sample["notes"].values())


@pytest.mark.slow
def test_the_judge_dies_and_comes_back(run_grpo, tmp_path):
    """The run stops with a checkpoint; resumed, it has the numbers of a run without the accident, and pays nothing
    twice."""
    with FaultServer(grade) as server:
        whole = run_grpo("whole", **options(server, None))
        needed = len({json.dumps(call.request["messages"]) for call in server.calls})
    lives = needed // 2
    answered: list[str] = []

    def mortal(call: int, request: dict[str, Any]) -> Response:
        if len(answered) >= lives:
            return error(503, "gone for good")
        answered.append(json.dumps(request["messages"]))
        return grade(call, request)

    with FaultServer(mortal) as server:
        changes = options(server, tmp_path / "cache.sqlite")
        changes["batch"]["max_unscored"] = 0.0
        with pytest.raises(
            RunStopped, match=r"step [23]: batch\.max_unscored: \d of 8 .*judge_down \d.*\n.*resume=true"
        ):
            run_grpo("broken", **changes)
        broken = tmp_path / "broken"
        assert [path.name for path in (broken / "checkpoints").iterdir() if path.name.startswith("step_")]
        assert all(sample["reward"] is not None for sample in samples(broken))
        lives = 1000
        answered.clear()
        run_grpo("broken", overrides=("resume=true",), **changes)
        # Asked again are only those that failed and those that come later.
        assert len(answered) == needed - needed // 2
    assert learnt(broken) == learnt(whole)


FAULTS: list[Callable[[], Response]] = [
    lambda: error(500, "oops"),
    lambda: error(429, "slower", Retry_After="0"),
    lambda: ok('{"verdicts": [', finish_reason="length"),
    lambda: ok('{"scores": [1, 0, 1]}'),
    lambda: ok("I will not judge this."),
    lambda: ok("{}", cut=True),
    lambda: ok(None),
    lambda: ok('{"verdicts": [{"number": 1, "reason": "", "grade": 100}]}'),
    lambda: ok("{}", delay=30.0),
]


@pytest.mark.slow
def test_no_fault_of_the_judge_is_a_score(run_grpo, tmp_path):
    """A third of all calls go wrong, each in its own way."""
    rng = random.Random(0)

    def unreliable(call: int, request: dict[str, Any]) -> Response:
        return rng.choice(FAULTS)() if call > 0 and rng.random() < 0.35 else grade(call, request)

    with FaultServer(unreliable) as server:
        changes = options(server, None, judge={"timeout_seconds": 0.7})
        output_dir = run_grpo(**changes | {"batch": changes["batch"] | {"max_unscored": 1.0}})
    found = samples(output_dir)
    unscored = [sample for sample in found if sample["reward"] is None]
    assert len(found) == 24 and 0 < len(unscored) < 24
    assert {sample["failure"] for sample in unscored} <= {"judge_down", "judge_cut", "judge_unparseable"}
    assert len({sample["failure"] for sample in unscored}) >= 2
    assert all(sample["advantage"] is None for sample in unscored)
    for sample in found:
        if sample["reward"] is not None and sample["failure"] != "degenerate":
            # What has a score has all of its verdicts, so no 0 comes from a fault.
            grades = [note.split(":")[0] for note in sample["notes"].values()]
            assert sample["failure"] is None and set(grades) <= {"0", "1"}
    rows = read_rows(output_dir)
    assert sum(8 * row.get("reward/unscored", 0.0) for row in rows) == pytest.approx(len(unscored))
    for group in {(sample["step"], sample["problem"]) for sample in found}:
        members = [sample for sample in found if (sample["step"], sample["problem"]) == group]
        advantages = [sample["advantage"] for sample in members if sample["advantage"] is not None]
        assert sum(advantages) == pytest.approx(0.0, abs=1e-5), "the mean is that of the scored ones alone"


def test_a_cap_ends_the_run_clearly_and_holds_for_the_run(run_grpo):
    """A new start has not the whole of it again; with a higher one the run goes on."""
    before = threading.active_count()
    with FaultServer(grade) as server:
        changes = options(server, None, judge={"max_calls": 12})
        with pytest.raises(RunStopped, match=r"step 2: rewards\.rubric: m@.*max_calls: the cap of 12 is reached"):
            run_grpo(**changes)
        assert len(server.calls) == 12
        with pytest.raises(ValueError, match="rewards.rubric: .*max_calls: the cap of 12 is reached after 12 calls"):
            run_grpo(overrides=("resume=true",), **changes)
        assert len(server.calls) == 12
        changes["rewards"]["rubric"]["judges"][0]["endpoint"]["max_calls"] = 100
        output_dir = run_grpo(overrides=("resume=true",), **changes)
    assert threading.active_count() == before, "the judge's loop has ended with each run"
    assert [row["step"] for row in read_rows(output_dir)] == [0, 1, 2, 3]


def test_what_judging_held_out_turns_costs_is_logged(run_grpo):
    with FaultServer(grade) as server:
        changes = options(server, None)
        changes["eval"] |= {"correct": changes["rewards"]["rubric"]}
        rows = read_rows(run_grpo(**changes | {"num_steps": 1}))
        asked = len(server.calls)
    assert rows[-1]["heldout/judge/correct/calls"] > 1
    assert rows[-1]["judge/rubric/calls"] + rows[-1]["heldout/judge/correct/calls"] == asked


def test_a_judge_that_is_not_there_shows_at_once(run_grpo, monkeypatch):
    with FaultServer(grade) as server:
        changes = options(server, None)
    monkeypatch.setattr("rolltune.model.policy.load_model", lambda *args, **kwargs: pytest.fail("weights were loaded"))
    with pytest.raises(ValueError, match="rewards.rubric: judge m@127.*judge_down.*base_url"):
        run_grpo(**changes)


def test_the_key_is_nowhere(run_grpo, tmp_path, monkeypatch, capsys, caplog):
    key = "sk-not-for-any-file-1234567890"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def echo(call: int, request: dict[str, Any]) -> Response:
        return error(500, f"bad key {key}") if call % 5 == 4 else grade(call, request)

    with FaultServer(echo) as server:
        run_grpo(**options(server, tmp_path / "cache.sqlite") | {"num_steps": 1})
        assert server.calls[0].headers["authorization"] == f"Bearer {key}"
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(written) > 10
    assert [path for path in written if key.encode() in path.read_bytes()] == []
    assert key not in capsys.readouterr().out + caplog.text


def test_the_policy_judges_itself(run_grpo, long_llama):
    """A random model says nothing that can be read: all is unscored, and the run says so."""
    judge = {"_component_": "rolltune.rewards.judges.policy.PolicyJudge", "max_new_tokens": 8}
    with FaultServer(grade) as server:
        changes = options(server, None)
    changes["rewards"]["rubric"] |= {"judges": [judge], "max_chars": 100}
    with pytest.raises(
        RunStopped, match=r"step 1: batch.max_unscored: [5-8] of 8 .*judge_.*\n  nothing was trained yet"
    ):
        run_grpo(model=long_llama, **changes)
