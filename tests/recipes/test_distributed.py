"""One process and two give the same prompts, completions and losses."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tiny_run import ROOT, assert_same_numbers, read_rows, tiny_grpo

from rolltune.errors import ConfigError
from rolltune.torchrun import process_place


def samples(output_dir, step):
    lines = (output_dir / f"samples/step_{step:06d}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.slow
@pytest.mark.parametrize(("minibatches", "truncation"), [(1, {}), (2, {}), (2, {"top_k": 20, "top_p": 0.9})])
def test_two_processes_equal_one(tiny_llama, tmp_path, reward_module, minibatches, truncation):
    for name, launcher in (
        ("one", [sys.executable]),
        ("two", [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]),
    ):
        config = tmp_path / f"{name}.yaml"
        batch = {"prompts_per_step": 4, "microbatch_tokens": 128, "minibatches": minibatches}
        settings = {"batch": batch, "sampling": {"group_size": 4, "max_new_tokens": 12} | truncation}
        config.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / name, num_steps=5, **settings)))
        done = subprocess.run(
            [*launcher, str(ROOT / "recipes/grpo.py"), "--config", str(config)],
            capture_output=True,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        assert done.returncode == 0, done.stderr
    one, two = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    assert len(one) == 6
    assert_same_numbers(one, two)
    for step in range(1, 6):
        first = {(s["problem"], s["text"]) for s in samples(tmp_path / "one", step)}
        # Rank 0 writes the samples of its own prompts.
        assert {(s["problem"], s["text"]) for s in samples(tmp_path / "two", step)} <= first


def by_hand(config, *, overrides=((), ()), folders=None, timeout=120, **environment):
    """Start two ranks without torchrun, as two nodes would; returns (exit status, stderr) of each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(config), *overrides[rank]],
            env=os.environ | shared | {"RANK": str(rank), "OMP_NUM_THREADS": "1"} | environment,
            cwd=folders[rank] if folders else None,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=timeout)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    return [(rank.returncode, error) for rank, error in zip(ranks, errors, strict=True)]


@pytest.mark.slow
def test_ranks_that_differ_are_refused_before_the_first_step(tiny_llama, tmp_path, reward_module):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / "run", num_steps=2)))
    for overrides, said in (
        (("optimizer.lr=1e-1", "sampling.temperature=0.5"), "optimizer.lr: 0.001 on rank 0, 0.1 on rank 1"),
    ):
        (first, errors), (second, silent) = by_hand(config, overrides=((), overrides))
        assert (first, second) == (2, 2), errors + silent
        assert said in errors and "Traceback" not in errors + silent and "mistake" not in silent
    assert not (tmp_path / "run/metrics.jsonl").exists()


@pytest.mark.slow
def test_a_bug_on_one_rank_keeps_its_traceback_and_holds_up_no_other(tiny_llama, tmp_path, reward_module):
    with (reward_module / "tiny_reward.py").open("a") as file:
        file.write("""
import os

def broken(problem, text):
    return Score(total={"0": 1.0}[os.environ["RANK"]])

broken.full_marks = None
""")
    config = tmp_path / "run.yaml"
    rewards = {"broken": {"_component_": "tiny_reward.broken"}}
    config.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / "run", rewards=rewards)))
    (first, told), (second, traceback) = by_hand(config)
    assert (first, second) == (1, 1), told + traceback
    assert "stopped: rank 1: KeyError: '1'" in told and "Traceback" not in told
    assert traceback.rstrip().endswith("KeyError: '1'")


@pytest.mark.slow
def test_other_weights_under_the_same_path_are_refused(tiny_llama, tmp_path, reward_module):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_grpo(Path("model"), Path("out"), num_steps=2)))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        shutil.copytree(tiny_llama, folder / "model")
    file = folders[1] / "model/model.safetensors"
    weights = load_file(file)
    name = min(weights)
    save_file(weights | {name: weights[name] + 1e-3}, file, metadata={"format": "pt"})
    (first, errors), (second, silent) = by_hand(config, folders=folders)
    assert (first, second) == (2, 2), errors + silent
    assert "weights: " in errors and "on rank 1" in errors


@pytest.mark.slow
def test_a_checkpoint_that_only_one_node_has_is_not_resumed(tiny_llama, tmp_path, reward_module):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, Path("out"), num_steps=2)))
    folders = [tmp_path / "a", tmp_path / "b"]
    for folder in folders:
        folder.mkdir()
    assert [status for status, _ in by_hand(config, folders=folders)] == [0, 0]
    (first, errors), (second, _) = by_hand(config, folders=folders, overrides=(("resume=true",),) * 2)
    assert (first, second) == (2, 2)
    assert "rank 1 does not have the checkpoint" in errors


@pytest.mark.parametrize(
    ("variables", "said"),
    [
        ({"WORLD_SIZE": "2"}, "RANK, MASTER_ADDR, MASTER_PORT not set"),
        ({"WORLD_SIZE": ""}, "WORLD_SIZE: ''"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE: 'two'"),
        ({"WORLD_SIZE": "2", "RANK": "2", "MASTER_ADDR": "x", "MASTER_PORT": "1"}, "RANK: 2"),
    ],
)
def test_variables_of_a_cluster_without_torchrun_are_named(monkeypatch, variables, said):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=said) as refused:
        process_place()
    assert "tune run --nproc_per_node" in str(refused.value)


@pytest.fixture
def start_two(tiny_llama, tmp_path, reward_module):
    """Start or resume a long run on two processes by `tune run`, and return it with the process ids of its ranks."""

    def begin(*options, **changes) -> tuple[subprocess.Popen, list[int]]:
        config = tmp_path / "run.yaml"
        config.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / "run", num_steps=500) | changes))
        command = ["-m", "rolltune.cli", "run", "--nproc_per_node", "2", *options, "grpo", "--config", str(config)]
        run = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        metrics = tmp_path / "run/metrics.jsonl"
        before = len(metrics.read_text().splitlines()) if metrics.exists() else 0
        deadline = time.monotonic() + 120
        while not metrics.exists() or len(metrics.read_text().splitlines()) < before + 4:
            assert time.monotonic() < deadline and run.poll() is None
            time.sleep(0.05)
        children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
        ranks = [int(pid) for pid in children if b"grpo.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        assert len(ranks) == 2
        return run, ranks

    return begin


@pytest.mark.slow
def test_torchrun_that_is_asked_to_stop_saves_the_last_step(start_two, tmp_path):
    run, _ = start_two(checkpoint={"every_n_steps": 400, "keep_last": 2})
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert run.returncode != 0 and "stopped by SIGTERM" in errors and "a checkpoint of step" in errors
    rows = read_rows(tmp_path / "run")
    assert (tmp_path / f"run/checkpoints/step_{rows[-1]['step']:06d}").is_dir() and 0 < rows[-1]["step"] < 400


@pytest.mark.slow
def test_ranks_end_with_a_torchrun_that_is_killed(start_two, tmp_path):
    run, ranks = start_two(checkpoint={"every_n_steps": 400, "keep_last": 2})
    run.kill()
    run.wait()
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{pid}").exists() for pid in ranks):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    assert list((tmp_path / "run/checkpoints").iterdir())


@pytest.mark.slow
def test_a_sharded_run_resumes_after_one_of_its_ranks_was_killed(start_two, tmp_path):
    sharded = {"parallel": {"weights": "fsdp"}, "checkpoint": {"every_n_steps": 1, "keep_last": 2}}
    run, ranks = start_two(**sharded)
    os.kill(ranks[1], signal.SIGKILL)
    run.communicate(timeout=120)
    assert run.returncode != 0 and not any(Path(f"/proc/{pid}").exists() for pid in ranks)
    run, _ = start_two(**sharded, resume=True)
    run.send_signal(signal.SIGTERM)
    _, errors = run.communicate(timeout=120)
    assert "stopped by SIGTERM" in errors and "a checkpoint of step" in errors
    steps = [row["step"] for row in read_rows(tmp_path / "run")]
    assert steps == list(range(len(steps))) and (tmp_path / f"run/checkpoints/step_{steps[-1]:06d}").is_dir()


@pytest.mark.slow
def test_a_rank_that_is_frozen_is_named_by_the_others(start_two):
    run, ranks = start_two(stall_seconds=4.0, checkpoint={"every_n_steps": 1, "keep_last": 1})
    os.kill(ranks[1], signal.SIGSTOP)
    deadline = time.monotonic() + 60
    while Path(f"/proc/{ranks[0]}").exists() and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(ranks[1], signal.SIGKILL)  # torchrun would do it, in 30 seconds
    _, errors = run.communicate(timeout=60)
    assert run.returncode != 0
    assert re.search(r"rank 0: (nothing has moved|a rank has given no sign) for 4 s.*, in \w+ after step \d", errors)
    assert "rank 1 does not answer: it is stopped, or its process or machine is gone" in errors
    assert "Current thread" in errors or "Thread 0x" in errors
    assert re.search(r"collective \d+: gloo:all_\w+ \[\[\d+\]\] by \w+ \(\w+\.py:\d+\)", errors)


@pytest.mark.slow
def test_processes_that_torchrun_starts_again_resume_by_themselves(start_two, tmp_path):
    settings = {"num_steps": 24, "checkpoint": {"every_n_steps": 3, "keep_last": 1}}
    run, ranks = start_two("--max_restarts", "1", **settings)
    os.kill(ranks[1], signal.SIGKILL)
    _, errors = run.communicate(timeout=180)
    assert run.returncode == 0, errors
    assert "restart 1 by torchrun: resuming from the last checkpoint, as with resume=true" in errors
    shutil.move(tmp_path / "run", tmp_path / "killed")
    whole, _ = start_two(**settings)
    assert whole.wait(timeout=180) == 0
    assert read_rows(tmp_path / "killed") == read_rows(tmp_path / "run")
    # The folder of a finished run is refused before any process starts: started again, they would resume in it.
    again = [*whole.args[:-3], "--max_restarts", "1", *whole.args[-3:]]
    done = subprocess.run(again, capture_output=True, text=True)
    assert done.returncode == 2 and "holds the checkpoints of an earlier run" in done.stderr
    assert "torch/distributed" not in done.stderr


@pytest.mark.slow
def test_processes_that_never_come_are_not_waited_for(tiny_llama, tmp_path, reward_module):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(tiny_grpo(tiny_llama, tmp_path / "run", stall_seconds=5.0)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes/grpo.py"), "--config", str(config)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | place,
    )
    assert done.returncode == 1 and f"waiting for 2 processes at 127.0.0.1:{port}" in done.stdout
    assert f"127.0.0.1:{port}: the 2 processes did not meet there; start all of them" in done.stderr
