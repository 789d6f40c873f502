"""Traces on disk: lines, kills, the lock, the order, and the configs that may continue a file."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from rolltune import config
from rolltune.config.schema import WriteTracesConfig
from rolltune.errors import ConfigError
from rolltune.traces import Trace
from rolltune.traces.record import from_line, read_traces, to_line, trace_file
from rolltune.types import Problem
from rolltune.writers.records import save_config

PROBLEM = Problem(
    id="sums/0",
    messages=({"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2 ?"}),
    answer="4",
    solution=None,
)
TRACE = Trace(
    problem=PROBLEM,
    sample=0,
    response="<think>é \u2028 \x00</think>\n<answer>4</answer>",
    correct=True,
    condition="backtracking",
    provenance={"writer": "w"},
)


def trace(name: str, sample: int = 0, **changes) -> Trace:
    return replace(TRACE, problem=replace(PROBLEM, id=name), sample=sample, **changes)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "out" / "traces.jsonl"


def test_a_line_is_one_line_of_json():
    line = to_line(TRACE)
    assert line.count(b"\n") == 1 and line.endswith(b"\n")
    assert json.loads(line) == {
        "problem": {
            "id": "sums/0",
            "messages": [{"role": "system", "content": "Add."}, {"role": "user", "content": "2 + 2 ?"}],
            "answer": "4",
            "solution": None,
        },
        "sample": 0,
        "response": TRACE.response,
        "correct": True,
        "condition": "backtracking",
        "provenance": {"writer": "w"},
    }


TEXT = st.text(st.characters(exclude_categories=["Cs"]), min_size=1)


@settings(max_examples=50, deadline=None)
@given(TEXT, TEXT, TEXT | st.none(), st.sampled_from([True, False, None]), st.dictionaries(TEXT, TEXT, max_size=2))
def test_what_is_written_is_read(name, text, answer, correct, provenance):
    problem = Problem(id=name, messages=({"role": "user", "content": text},), answer=answer, solution=answer)
    whole = Trace(problem=problem, sample=3, response=text, correct=correct, condition=name, provenance=provenance)
    line = to_line(whole)
    assert from_line(line) == whole and b"\n" not in line[:-1]


GOOD = json.loads(to_line(TRACE))
PROBLEM_FIELDS = GOOD["problem"]


@pytest.mark.parametrize(
    ("record", "says"),
    [
        ("{", "Invalid JSON"),
        ("[]", ""),
        ({k: v for k, v in GOOD.items() if k != "sample"}, "sample: "),
        (GOOD | {"more": 1}, "more: "),
        (GOOD | {"sample": "0"}, "sample: .*integer"),
        (GOOD | {"sample": -1}, "sample: .*greater"),
        (GOOD | {"correct": 1}, "correct: "),
        (GOOD | {"response": ""}, "response: "),
        (GOOD | {"problem": PROBLEM_FIELDS | {"messages": []}}, "problem.messages: "),
        (
            GOOD | {"problem": PROBLEM_FIELDS | {"messages": [{"role": "robot", "content": ""}]}},
            "problem.messages.0.role: ",
        ),
        (GOOD | {"problem": PROBLEM_FIELDS | {"answer": 4}}, "problem.answer: "),
        (GOOD | {"provenance": {"t": 0.5}}, "provenance.t: "),
    ],
)
def test_a_broken_line_is_named(path, record, says):
    path.parent.mkdir()
    path.write_text(f"{to_line(TRACE).decode()}{record if isinstance(record, str) else json.dumps(record)}\n")
    with pytest.raises(ValueError, match=f"^{path}:2: {says}"):
        read_traces(path)


def test_append_and_go_on(path):
    with trace_file(path) as file:
        assert file.done == set()
        file.append(trace("a"))
        assert read_traces(path) == [trace("a")]  # written at once
        file.append(trace("a", 1))
    with trace_file(path) as file:
        assert file.done == {("a", 0), ("a", 1)}
        file.append(trace("b"))
        assert file.read() == [trace("a"), trace("a", 1), trace("b")]


def test_lines_are_synced(path, monkeypatch):
    sizes = []
    monkeypatch.setattr(os, "fsync", lambda number: sizes.append(os.fstat(number).st_size))
    with trace_file(path) as file:
        file.append(trace("a"))
        file.append(trace("b"))
    assert sizes == [len(to_line(trace("a"))), 2 * len(to_line(trace("a")))]


@pytest.mark.parametrize("kept", [0, 1, 40, -2])
def test_a_line_that_was_cut_is_dropped(path, kept):
    path.parent.mkdir()
    path.write_bytes(to_line(trace("a")) + to_line(trace("b"))[:kept])
    assert read_traces(path) == [trace("a")]
    with trace_file(path) as file:
        assert file.done == {("a", 0)}
        file.append(trace("c"))
    assert path.read_bytes() == to_line(trace("a")) + to_line(trace("c"))


def test_a_line_that_lacks_only_its_newline_is_kept(path):
    path.parent.mkdir()
    path.write_bytes(to_line(trace("a")) + to_line(trace("b"))[:-1])
    with trace_file(path) as file:
        assert file.done == {("a", 0), ("b", 0)}
        file.append(trace("c"))
    assert read_traces(path) == [trace("a"), trace("b"), trace("c")]


def test_empty_lines_count_and_harm_nothing(path):
    path.parent.mkdir()
    path.write_bytes(b"\n" + to_line(trace("a")) + b"  \n")
    assert read_traces(path) == [trace("a")]
    path.write_bytes(b"\n" + to_line(trace("a")) + b"oops\n")
    with pytest.raises(ValueError, match=r"traces\.jsonl:3: Invalid JSON"):
        read_traces(path)


def test_the_same_trace_twice(path):
    path.parent.mkdir()
    path.write_bytes(to_line(trace("a")) + to_line(trace("b")) + to_line(trace("a", response="other")))
    with pytest.raises(ValueError, match=r"traces\.jsonl:3: a, sample 0\b.*line 1"):
        read_traces(path)


def test_sorting(path):
    with trace_file(path) as file:
        for name, sample in (("b", 1), ("gone", 0), ("a", 0), ("b", 0), ("a", 1)):
            file.append(trace(name, sample))
        file.sort([replace(PROBLEM, id=name) for name in ("b", "a")])
        order = [("b", 0), ("b", 1), ("a", 0), ("a", 1), ("gone", 0)]
        assert [(t.problem.id, t.sample) for t in file.read()] == order
        file.append(trace("c"))  # goes to the new file
    assert [(t.problem.id, t.sample) for t in read_traces(path)] == [*order, ("c", 0)]
    assert sorted(p.name for p in path.parent.iterdir()) == ["traces.jsonl", "traces.jsonl.lock"]


HOLD = """
import sys
from pathlib import Path
from rolltune.traces.record import trace_file
file = trace_file(Path(sys.argv[1]))
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time(path):
    """A lock ends with its process, even if that is killed."""
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=rf"traces\.jsonl: another process .*\(process {holder.pid} on "):
        trace_file(path)
    holder.kill()
    holder.communicate()
    with trace_file(path) as file:
        file.append(TRACE)
        with pytest.raises(ValueError, match="another process"):
            trace_file(path)
    trace_file(path).close()


def test_a_broken_file_is_not_held(path):
    path.parent.mkdir()
    path.write_text("oops\n\n")
    for _ in range(2):
        with pytest.raises(ValueError, match="Invalid JSON"):
            trace_file(path)


# --- the config beside it ---------------------------------------------------------------------------------------------


@pytest.fixture
def load(tmp_path):
    def load(*overrides: str) -> WriteTracesConfig:
        file = tmp_path / "config-in.yaml"
        tree = {
            "output_dir": str(tmp_path / "out"),
            "data": {"_component_": "rolltune.data.countdown.countdown", "count": 4},
            "writer": {
                "_component_": "rolltune.traces.endpoint.EndpointTraceWriter",
                "task": "countdown",
                "condition": "backtracking",
                "endpoint": {"base_url": "http://localhost:1/v1", "model": "m"},
            },
            "correct": {"_component_": "rolltune.rewards.countdown.countdown_reward"},
        }
        file.write_text(yaml.safe_dump(tree))
        return config.load(WriteTracesConfig, file, overrides)

    return load


@pytest.fixture
def started(path, load):
    with trace_file(path) as file:
        save_config(load(), file, TRACE.provenance)
        file.append(TRACE)
        yield file


def test_the_config_is_saved(started, load):
    assert yaml.safe_load((started.path.parent / "config.yaml").read_text()) == yaml.safe_load(config.dump(load()))


@pytest.mark.parametrize(
    ("override", "key"),
    [
        ("seed=1", "seed: 1\\b.*output_dir"),
        ("data.count=5", "data.count: 5\\b.*4"),
        ("data.seed=5", "data.seed: 5\\b"),
        ("writer.endpoint.model=n", "writer.endpoint.model: n\\b"),
        ("writer.condition=all_strategies", "writer.condition: all_strategies\\b.*backtracking"),
        ("~writer.task", "writer.task: .*countdown"),
        ("writer.temperature=0.6", "writer.temperature: 0.6"),
        ("writer.max_tokens=5", "writer.max_tokens: 5"),
        ("correct=rolltune.rewards.answer.answer_reward", "correct._component_: rolltune.rewards.answer.answer_reward"),
        ("data.base_url=x", "data.base_url: x"),  # free only in the writer
    ],
)
def test_another_run_is_refused(started, load, override, key):
    before = (started.path.parent / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=f"^{key}"):
        save_config(load(override), started, TRACE.provenance)
    assert (started.path.parent / "config.yaml").read_text() == before


def test_what_traces_do_not_depend_on_may_change(started, load):
    writer = {
        "base_url": "http://localhost:2/v1",
        "api_key_env": "OTHER",
        "timeout_seconds": "1.0",
        "max_attempts": "2",
        "max_calls": "3",
        "max_total_tokens": "4",
        "max_dollars": "5.0",
        "dollars_per_million_input": "6.0",
        "dollars_per_million_output": "7.0",
    }
    changes = [f"writer.endpoint.{name}={value}" for name, value in writer.items()]
    save_config(load(*changes, "max_concurrency=3", "traces_per_problem=2"), started, TRACE.provenance)
    saved = yaml.safe_load((started.path.parent / "config.yaml").read_text())
    assert saved["writer"]["endpoint"]["max_calls"] == 3 and saved["traces_per_problem"] == 2


def test_another_writer_behind_the_same_config_is_refused(started, load):
    """For example because the text of a prompt has changed, in your own file or in the package."""
    before = (started.path.parent / "config.yaml").read_text()
    message = "^writer: .*sums/0, sample 0"
    with pytest.raises(ConfigError, match=message):
        save_config(load("max_concurrency=3"), started, {"writer": "v"})
    with pytest.raises(ConfigError, match="^writer: .*prompt.*0123456789ab"):
        save_config(load(), started, {"writer": "w", "prompt": "0123456789ab"})
    started.append(trace("b", provenance={"writer": "w", "prompt": "ba9876543210"}))
    with pytest.raises(ConfigError, match="^writer: .*prompt.*b, sample 0.*ba9876543210"):
        save_config(load(), started, {"writer": "w"})
    assert (started.path.parent / "config.yaml").read_text() == before


def test_the_same_writer_may_be_elsewhere(path, load):
    with trace_file(path) as file:
        save_config(load(), file, {"writer": "w"})
        file.append(trace("a", provenance={"writer": "w", "host": "a.test", "base_url": "http://a.test/v1"}))
        save_config(load(), file, {"writer": "w", "host": "b.test"})


def test_a_broken_config_is_named(started, load):
    (started.path.parent / "config.yaml").write_text("seed: 0\nwriter: {\n")
    with pytest.raises(ConfigError, match=r"out/config\.yaml.*line 3"):
        save_config(load(), started, TRACE.provenance)


def test_before_the_first_trace_anything_may_change(path, load):
    with trace_file(path) as file:
        save_config(load(), file, TRACE.provenance)
        save_config(load("seed=1"), file, TRACE.provenance)


def test_folders_of_other_runs(path, load):
    with trace_file(path) as file:
        (path.parent / "config.yaml").write_text("num_steps: 3\n")
        with pytest.raises(ConfigError, match="output_dir: .*another run"):
            save_config(load(), file, TRACE.provenance)
        (path.parent / "config.yaml").unlink()
        file.append(TRACE)
        with pytest.raises(ConfigError, match=r"output_dir: .*config\.yaml"):
            save_config(load(), file, TRACE.provenance)
