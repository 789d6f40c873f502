"""GRPO with an LLM that counts behaviours beside the training: the curves come, and nothing waits or changes."""

from __future__ import annotations

import pytest
from fault_server import FaultServer, Response, error, ok
from tiny_run import read_rows

from rolltune.behaviours import BEHAVIOURS


def logging_of(server: FaultServer) -> dict:
    classifier = {
        "_component_": "rolltune.behaviours.BehaviourClassifier",
        "endpoint": {"base_url": server.base_url, "model": "judge", "max_attempts": 1},
    }
    return {"classifier": classifier, "classified_samples": 3}


def counting(call: int, request: dict) -> Response:
    return ok('{"count": 2}')


def test_the_counts_stand_under_the_steps_that_they_are_of(run_grpo):
    with FaultServer(counting) as server:
        output_dir = run_grpo(num_steps=2, logging=logging_of(server))
        assert len(server.calls) == 2 * 3 * 4  # steps, completions, behaviours
    rows = [row for row in read_rows(output_dir) if "behaviours_llm/unscored" in row]
    assert [row["step"] for row in rows] == [1, 2]
    for row in rows:
        assert {row[f"behaviours_llm/{name}"] for name in BEHAVIOURS} == {2.0}


def test_a_judge_that_is_down_ends_no_run_and_changes_no_number(run_grpo):
    def refuse(call: int, request: dict) -> Response:
        return error(500, "overloaded")

    plain = read_rows(run_grpo("plain", num_steps=2))
    with FaultServer(refuse) as server:
        rows = read_rows(run_grpo(num_steps=2, logging=logging_of(server)))
    assert [row for row in rows if "behaviours_llm/unscored" not in row] == plain
    assert [row["behaviours_llm/unscored"] for row in rows if "behaviours_llm/unscored" in row] == [1.0, 1.0]


def test_prime_has_nothing_to_classify(tmp_path):
    from rolltune.config.schema import SFTConfig
    from rolltune.errors import ConfigError
    from rolltune.run import checks

    path = tmp_path / "sft.yaml"
    path.write_text("output_dir: out\nlogging: {classifier: {_component_: rolltune.behaviours.BehaviourClassifier}}\n")
    with pytest.raises(ConfigError, match=r"logging.classifier: does nothing in sft"):
        checks.validate(SFTConfig, path)
