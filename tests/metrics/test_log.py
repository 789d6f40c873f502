"""The metrics log: valid JSON, exact resume, real wandb and TensorBoard files."""

import importlib
import json
import math
import os
import signal
import struct
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.metrics.log import MetricsLog, read_metrics
from rolltune.types import Completion, Group, Problem, Prompt, Score


def strict_json(text: str):
    """json.loads that refuses NaN and Infinity, which are not JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


# Two completions of one problem.
GROUP = Group(
    problem=Problem(id="sums/0", messages=({"role": "user", "content": "2 + 2?"},), answer="4"),
    prompt=Prompt(token_ids=(1, 2)),
    completions=tuple(
        Completion(token_ids=(7,), logprobs=(-0.5,), finish_reason="stop", policy_version=3, text=text)
        for text in ("4", "line\nbreak")
    ),
    scores=(Score(total=1.0, notes={"judge": "r"}), Score(total=0.0, failure="no_answer")),
)


# --- metrics.jsonl ----------------------------------------------------------------------------------------------------


def test_lines_are_json_and_readable_at_once(tmp_path):
    log = MetricsLog(tmp_path / "new" / "run")
    log.log(1, {"reward/mean": 0.25, "kl": math.nan, "ratio/max": math.inf, "lr": 1})
    # Read before close(): a killed run keeps every line.
    (line,) = (tmp_path / "new" / "run" / "metrics.jsonl").read_text().splitlines()
    record = strict_json(line)
    assert record.pop("time") > 1.7e9
    assert record == {"step": 1, "reward/mean": 0.25, "kl": None, "ratio/max": None, "lr": 1.0}
    log.close()


def test_resume_drops_later_steps_and_a_torn_line(tmp_path):
    log = MetricsLog(tmp_path)
    for step in (0, 1, 2, 2, 3, 4):
        log.log(step, {"kl": step / 10})
    log.close()
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step": 1, "time": 17')
    log = MetricsLog(tmp_path, resume_step=2)
    assert [record["step"] for record in read_metrics(tmp_path)] == [0, 1, 2, 2]
    log.log(3, {"kl": 0.7})
    log.close()
    records = read_metrics(tmp_path)
    assert [(record["step"], record["kl"]) for record in records] == [(0, 0.0), (1, 0.1), (2, 0.2), (2, 0.2), (3, 0.7)]
    assert not list(tmp_path.glob("*.tmp"))


@given(cut=st.integers(0, 10_000))
def test_resume_after_a_kill_at_any_byte(tmp_path_factory, cut):
    folder = tmp_path_factory.mktemp("run")
    log = MetricsLog(folder)
    for step in range(5):
        log.log(step, {"reward/mean": 0.5, "kl": math.nan})
    log.close()
    path = folder / "metrics.jsonl"
    whole = path.read_bytes()
    left = whole[: cut % (len(whole) + 1)]
    path.write_bytes(left)
    MetricsLog(folder, resume_step=4).close()
    assert [record["step"] for record in read_metrics(folder)] == list(range(left.count(b"\n")))
    assert path.read_bytes() == left[: left.rfind(b"\n") + 1]


def test_a_killed_process_leaves_its_lines(tmp_path):
    program = textwrap.dedent("""
        import os, signal, sys
        from rolltune.metrics.log import MetricsLog
        log = MetricsLog(sys.argv[1])
        log.log(1, {"kl": 0.5})
        os.kill(os.getpid(), signal.SIGKILL)
    """)
    done = subprocess.run([sys.executable, "-c", program, str(tmp_path)], timeout=60)
    assert done.returncode == -signal.SIGKILL
    assert read_metrics(tmp_path)[0]["kl"] == 0.5


def test_a_new_run_starts_an_empty_file(tmp_path):
    for value in (0.1, 0.2):
        log = MetricsLog(tmp_path)
        log.log(1, {"kl": value})
        log.close()
    assert [record["kl"] for record in read_metrics(tmp_path)] == [0.2]


def test_damaged_lines_are_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2\n{"step": 3}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: not JSON"):
        MetricsLog(tmp_path, resume_step=5)
    assert path.read_text().count("\n") == 3
    path.write_text('{"kl": 1}\n')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:1: .*'step'"):
        read_metrics(tmp_path)
    with pytest.raises(ValueError, match=r"nowhere.*no such file"):
        read_metrics(tmp_path / "nowhere")


def test_null_log_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    log = MetricsLog.null()
    log.log(1, {"kl": 0.5})
    log.log_samples(1, [GROUP], [[1.0, -1.0]])
    log.close()
    assert list(tmp_path.iterdir()) == []


# --- wandb and TensorBoard --------------------------------------------------------------------------------------------


def clean_wandb(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("WANDB_CONFIG_DIR", "WANDB_CACHE_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "home" / name.lower()))


@pytest.mark.slow
def test_wandb_runs_offline_without_a_key_and_resumes_its_run(tmp_path, monkeypatch, capfd):
    clean_wandb(tmp_path, monkeypatch)
    import wandb

    run_dir = tmp_path / "run"
    log = MetricsLog(run_dir, wandb=True, wandb_project="tests", config={"num_steps": 2})
    log.log(1, {"kl": 0.5})
    log.log_samples(1, [GROUP], [[1.0, -1.0]])
    log.close()
    time.sleep(1.1)  # wandb names a folder by the second
    log = MetricsLog(run_dir, wandb=True, resume_step=1)
    log.log(2, {"kl": 0.25})
    log.close()
    wandb.teardown()  # waits for the process that writes the end of the file after finish()
    run_id = (run_dir / "wandb_run_id").read_text().strip()
    files = sorted((run_dir / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and {file.name for file in files} == {f"run-{run_id}.wandb"}
    records = [record for file in files for record in wandb_history(file)]
    assert [(r["step"], r["kl"]) for r in records if "kl" in r] == [(1, 0.5), (2, 0.25)]
    assert [(r["step"], r["samples/nrows"]) for r in records if "samples/nrows" in r] == [(1, 2)]
    MetricsLog(run_dir, wandb=True).close()
    assert (run_dir / "wandb_run_id").read_text().strip() != run_id, "a new run has a new id"
    assert capfd.readouterr().out == "", "stdout is for the progress lines"


def wandb_history(file: Path) -> list[dict]:
    """Read the history of an offline run: protobuf records in LevelDB's log format, after a header of 7 bytes."""
    pb = importlib.import_module("wandb.proto.wandb_internal_pb2")
    data = file.read_bytes()
    assert data[:4] == b":W&B"
    history, position, record = [], 7, b""
    while position + 7 <= len(data):
        left_in_block = 32768 - position % 32768
        if left_in_block < 7:
            position += left_in_block
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + 7])
        record += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # whole, or the last part
            message = pb.Record.FromString(record)
            if message.WhichOneof("record_type") == "history":
                items = message.history.item
                history.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
            record = b""
    return history


def test_wandb_goes_online_only_with_a_key_and_never_shows_it(tmp_path, monkeypatch, capfd):
    clean_wandb(tmp_path, monkeypatch)
    import wandb

    asked = []

    class Run:
        def define_metric(self, *args, **kwargs): ...
        def log(self, values): ...
        def finish(self): ...

    def init(**kwargs):
        asked.append(kwargs)
        return Run()

    monkeypatch.setattr(wandb, "init", init)
    key = "0123456789" * 4
    MetricsLog(tmp_path, wandb=True).close()
    monkeypatch.setenv("WANDB_API_KEY", key)
    MetricsLog(tmp_path, wandb=True, wandb_project="own", config={"seed": 0}).close()
    monkeypatch.setenv("WANDB_MODE", "disabled")
    MetricsLog(tmp_path, wandb=True).close()
    assert [call["mode"] for call in asked] == ["offline", "online", "disabled"]
    assert [call["resume"] for call in asked] == [None, "allow", None]
    assert asked[1]["project"] == "own" and asked[1]["config"] == {"seed": 0}
    assert key not in repr(asked) + "".join(capfd.readouterr())
    assert not any(key in file.read_text("utf-8", "replace") for file in tmp_path.rglob("*") if file.is_file())


def test_tensorboard_events_can_be_read_back(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog(tmp_path, tensorboard=True)
    for step in (1, 2, 3):
        log.log(step, {"reward/mean": step / 2, "kl": 0.25})
    log.close()
    log = MetricsLog(tmp_path, tensorboard=True, resume_step=1)
    log.log(2, {"reward/mean": 4.0})
    log.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    # Steps 2 and 3 of the first process are gone.
    assert [(e.step, e.value) for e in events.Scalars("reward/mean")] == [(1, 0.5), (2, 4.0)]
    assert [(e.step, e.value) for e in events.Scalars("kl")] == [(1, 0.25)]


@pytest.mark.parametrize("name", ["wandb", "tensorboard"])
def test_a_log_that_fails_is_said_once_and_metrics_go_on(tmp_path, capsys, name):
    class Broken:
        def __getattr__(self, method):
            def fail(*args, **kwargs):
                raise BrokenPipeError("the backend is gone")

            return fail

    log = MetricsLog(tmp_path)
    setattr(log, {"wandb": "_wandb_run", "tensorboard": "_tensorboard"}[name], Broken())
    for step in (1, 2):
        log.log(step, {"kl": 0.5})
        log.log_samples(step, [GROUP], [[1.0, -1.0]])
    log.close()
    assert [record["step"] for record in read_metrics(tmp_path)] == [1, 2]
    assert capsys.readouterr().err.count(f"logging.{name}: BrokenPipeError: the backend is gone") == 1


def test_wandb_that_does_not_start_names_the_key_and_the_way_out(tmp_path, monkeypatch):
    clean_wandb(tmp_path, monkeypatch)
    import wandb

    def init(**kwargs):
        raise wandb.errors.CommError("no network")

    monkeypatch.setattr(wandb, "init", init)
    with pytest.raises(ValueError, match="logging.wandb: true: CommError: no network; set WANDB_MODE=offline"):
        MetricsLog(tmp_path, wandb=True)
