"""Sample files of training steps."""

import json
import math
from dataclasses import replace

import pytest

from rolltune.metrics import samples
from rolltune.metrics.samples import write_samples
from rolltune.types import Completion, Group, Problem, Prompt, Score

GROUP = Group(
    problem=Problem(id="sums/0", messages=({"role": "user", "content": "2 + 2?"},), answer="4"),
    prompt=Prompt(token_ids=(1, 2)),
    completions=(
        Completion(
            token_ids=(19, 2), logprobs=(-0.1, -0.2), finish_reason="stop", policy_version=3, text="4 \u00e9 \ud800"
        ),
        Completion(token_ids=(7,), logprobs=(-0.5,), finish_reason="length", policy_version=3, text="line\nbreak"),
    ),
    scores=(
        Score(total=1.0, parts={"answer": 1.0, "judge": None}, notes={"judge": "r"}),
        Score(total=0.0, failure="no_answer"),
    ),
)
UNSCORED = replace(GROUP, scores=(Score(total=None), GROUP.scores[1]))


def test_samples_of_a_step(tmp_path):
    path = write_samples(tmp_path, 10, [GROUP, UNSCORED, GROUP], [[0.7, math.nan], [-1.0], None])
    assert path == tmp_path / "samples" / "step_000010.jsonl"
    text = path.read_bytes().decode("utf-8")
    assert "é" in text
    records = [json.loads(line) for line in text.split("\n")[:-1]]
    assert records[0] == {
        "step": 10,
        "group": 0,
        "problem": "sums/0",
        "messages": [{"role": "user", "content": "2 + 2?"}],
        "answer": "4",
        "text": "4 é \ud800",
        "tokens": 2,
        "finish_reason": "stop",
        "policy_version": 3,
        "reward": 1.0,
        "parts": {"answer": 1.0, "judge": None},
        "failure": None,
        "notes": {"judge": "r"},
        "advantage": 0.7,
    }
    assert (records[1]["tokens"], records[1]["finish_reason"], records[1]["failure"]) == (1, "length", "no_answer")
    # NaN, unscored, scored with its own value, and a skipped group.
    assert [record["advantage"] for record in records[1:]] == [None, None, -1.0, None, None]
    assert [record["reward"] for record in records] == [1.0, 0.0, None, 0.0, 1.0, 0.0]


def test_samples_need_one_advantage_per_scored_completion(tmp_path):
    with pytest.raises(AssertionError, match="one advantage"):
        write_samples(tmp_path, 1, [UNSCORED], [[1.0, -1.0]])
    with pytest.raises(ValueError):
        write_samples(tmp_path, 1, [GROUP, GROUP], [[1.0, -1.0]])


def test_the_first_completions_have_their_tokens(tmp_path, monkeypatch):
    monkeypatch.setattr(samples, "MAX_TOKENS_SHOWN", 4)
    asked = []
    records = samples.sample_records(
        1, [GROUP, GROUP], [[1.0, 0.0], None], token_text=lambda token: asked.append(token) or f"<{token}>"
    )
    assert [record.get("token_texts") for record in records] == [["<19>", "<2>"], ["<7>"], None, None]
    assert records[0]["token_logprobs"] == [-0.1, -0.2] and sorted(asked) == [2, 7, 19]
    assert [record["group"] for record in records] == [0, 0, 1, 1]
