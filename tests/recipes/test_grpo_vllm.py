"""GRPO with completions from the real vLLM: in the process, in two processes, and from a server."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from tiny_run import ROOT, read_rows, tiny_grpo

from rolltune.endpoints.serving import AdapterRoom, serve
from rolltune.errors import RunStopped
from rolltune.run.checkpoint import load_state
from rolltune.samplers import vllm_local
from rolltune.samplers.vllm_sampler import VLLMSampler

pytestmark = pytest.mark.vllm

COLOCATED = {
    "_component_": "rolltune.samplers.vllm.colocated",
    "kv_cache_gib": 0.05,
    "max_num_seqs": 16,
    "max_model_len": 256,
}
SERVED = COLOCATED | {"_component_": "rolltune.samplers.vllm.served"}


@pytest.fixture(scope="module")
def model(make_tiny_llama: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """vLLM's kernels for CPUs want heads of 32."""
    return make_tiny_llama(tmp_path_factory.mktemp("tiny") / "model", hidden_size=128)


@pytest.fixture
def write_config(model: Path, tmp_path: Path, reward_module: Path) -> Callable[..., Path]:
    def write(name: str, **changes) -> Path:
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tiny_grpo(model, tmp_path / name, **changes)))
        return file

    return write


def start(config: Path, *overrides: str, processes: int = 1) -> subprocess.Popen:
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "recipes/grpo.py"), "--config", str(config), *overrides],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "passive"},
    )


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate()
    assert process.returncode == 0, output[-5000:]
    return output


def check_mismatch(output_dir: Path, steps: int) -> None:
    rows = [row for row in read_rows(output_dir) if "mismatch/max_abs" in row]
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    for row in rows:
        assert row["mismatch/max_abs"] < 1e-3 and row["mismatch/mean_ratio"] == pytest.approx(1, abs=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0}], ids=["full", "adapter"])
def test_a_run_goes_on_to_the_numbers_of_an_unbroken_one(run_grpo, model, lora):
    sampler = COLOCATED | {"lora": "adapter" if lora else "merged"}
    options = {"model": model, "sampler": sampler, "lora": lora, "checkpoint": {"every_n_steps": 1, "keep_last": 9}}
    whole = run_grpo("whole", **options)
    check_mismatch(whole, 4)
    rewards = [row["reward/mean"] for row in read_rows(whole) if "reward/mean" in row]
    assert len(set(rewards)) > 1
    run_grpo("halves", **options, num_steps=4)
    checkpoints = sorted((whole.parent / "halves" / "checkpoints").glob("step_*"))
    assert len(checkpoints) >= 2
    for late in checkpoints[1:]:  # as a kill after the first of them would leave it
        for file in sorted(late.rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        late.rmdir()
    resumed = run_grpo("halves", **options, overrides=("resume=true",))
    assert read_rows(resumed) == read_rows(whole)


@pytest.mark.slow
def test_an_adapter_apart_gives_the_run_of_merged_weights(run_grpo, model, tmp_path, monkeypatch):
    """In the process and on a server, with the same seeds."""
    room = AdapterRoom(rank=4, targets=("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"))
    options = {"dtype": "float32", "max_model_len": 256, "kv_cache_gib": 0.05, "takes_weights": "files"}
    runs = {}
    with serve(str(model), log=tmp_path / "server.log", adapters=room, quiet=True, **options) as server:
        monkeypatch.setenv("VLLM_API_KEY", server.key)
        at = SERVED | {"base_urls": [server.base_url], "api_key_env": "VLLM_API_KEY"}
        for sampler, lora in itertools.product((COLOCATED, at), ("merged", "adapter")):
            name = f"{sampler['_component_'].rpartition('.')[2]}_{lora}"
            runs[name] = run_grpo(
                name,
                model=model,
                sampler=sampler | {"lora": lora},
                lora={"rank": 4, "alpha": 2.0, "rslora": True},
                num_steps=2,
                eval={"every_n_steps": 2, "max_problems": 4},
            )
    for run in runs.values():
        check_mismatch(run, 2)
        for row, expected in zip(read_rows(run), read_rows(runs["colocated_merged"]), strict=True):
            for key in ("reward/mean", "length/mean", "loss", "grad_norm"):
                if key in expected:
                    assert row[key] == pytest.approx(expected[key], rel=1e-3, abs=1e-5), key


@pytest.mark.slow
def test_the_temperature_is_the_trainers(run_grpo, model):
    sampling = {"group_size": 4, "max_new_tokens": 12, "temperature": 0.6}
    check_mismatch(run_grpo("cool", model=model, sampler=COLOCATED, num_steps=2, sampling=sampling), 2)


@pytest.mark.slow
def test_a_fault_of_a_sync_stops_the_run_before_the_next_step(run_grpo, model, monkeypatch, tmp_path):
    load = vllm_local.LocalEngine.load_weights

    def faulty(self, weights, version):
        kept = (item for item in weights if not version.endswith(":2") or "o_proj" not in item[0])
        load(self, kept, version)

    monkeypatch.setattr(vllm_local.LocalEngine, "load_weights", faulty)
    with pytest.raises(RunStopped, match=r"step 3: the weights after 2 .*(?s:.)*o_proj") as stopped:
        run_grpo("faulty", model=model, sampler=COLOCATED, eval={"every_n_steps": 4, "max_problems": 4})
    assert "a checkpoint of step 2" in str(stopped.value)
    state = load_state(max((tmp_path / "faulty" / "checkpoints").glob("step_*")))
    assert (state.step, state.policy_version) == (2, 2)
    monkeypatch.setattr(vllm_local.LocalEngine, "load_weights", load)
    check_mismatch(
        run_grpo(
            "faulty",
            model=model,
            sampler=COLOCATED,
            eval={"every_n_steps": 4, "max_problems": 4},
            overrides=("resume=true",),
        ),
        4,
    )


@pytest.mark.slow
def test_an_ignored_adapter_stops_the_run_before_the_next_step(run_grpo, model, monkeypatch, tmp_path):
    """An engine that reports the adapter of version 2, but samples from the base model."""
    generate = vllm_local.LocalEngine.generate

    def faulty(self, requests, on_output):
        names = [request.adapter for request in requests]
        asked = [replace(r, adapter=None if (r.adapter or "").endswith(":2") else r.adapter) for r in requests]
        generate(self, asked, lambda n, output: on_output(n, replace(output, adapter=names[n])))

    monkeypatch.setattr(vllm_local.LocalEngine, "generate", faulty)
    sampler, lora = COLOCATED | {"lora": "adapter"}, {"rank": 4, "alpha": 8.0}
    with pytest.raises(RunStopped, match=r"step 3: the weights after 2 .*(apply the adapter|of the probes' .* differ)"):
        run_grpo("ignored", model=model, sampler=sampler, lora=lora, eval={"every_n_steps": 4, "max_problems": 4})
    assert load_state(max((tmp_path / "ignored" / "checkpoints").glob("step_*"))).step == 2


@pytest.mark.slow
def test_completions_of_another_version_are_not_trained_on(run_grpo, model, monkeypatch):
    """As where another run gives its weights to the same server between a sync and the sampling."""
    make = VLLMSampler._completion

    def stray(self, output, params, prefill):
        completion = make(self, output, params, prefill)
        return replace(completion, policy_version=-1) if params.temperature > 0 else completion

    monkeypatch.setattr(VLLMSampler, "_completion", stray)
    said = r"step 1: 16 completions were not written by the policy's weights, which are version 0: 16 by version -1"
    with pytest.raises(RunStopped, match=said):
        run_grpo("older", model=model, sampler=COLOCATED)


@pytest.mark.slow
def test_two_processes_have_an_engine_each(write_config, tmp_path):
    finish(start(write_config("two", sampler=COLOCATED, num_steps=3), processes=2))
    check_mismatch(tmp_path / "two", 3)
    finish(start(write_config("one", sampler=COLOCATED, num_steps=3)))
    ones, twos = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    for one, two in zip(ones, twos, strict=True):
        for name in ("reward/mean", "heldout/length_mean", "length/mean"):
            if name in one:
                assert one[name] == pytest.approx(two[name], abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("sampler", "changes"),
    [(COLOCATED, {}), (SERVED, {"lora": {"rank": 4, "alpha": 8.0}})],
    ids=["engine in each process", "server, lora"],
)
def test_sharded_weights_reach_the_engines(write_config, tmp_path, sampler, changes):
    if sampler is SERVED:
        sampler = SERVED | {"log": str(tmp_path / "server.log")}
    config = write_config("sharded", sampler=sampler, num_steps=3, **changes)
    finish(start(config, "parallel.weights=fsdp", processes=2))
    check_mismatch(tmp_path / "sharded", 3)


@pytest.mark.slow
def test_evaluate_samples_with_it(model, tmp_path):
    config = tmp_path / "evaluate.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "output_dir": str(tmp_path / "evaluated"),
                "models": [{"name": "a", "path": str(model)}, {"name": "b", "path": str(model)}],
                "data": {"_component_": "rolltune.data.sums.sums", "count": 4, "high": 9},
                "sampling": {"samples": 2, "max_new_tokens": 8},
                "sampler": COLOCATED,
                "resamples": 100,
            }
        )
    )
    done = subprocess.run(
        [sys.executable, str(ROOT / "recipes/evaluate.py"), "--config", str(config)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    results = json.loads((tmp_path / "evaluated" / "results.json").read_text())
    assert list(results["models"]) == ["a", "b"]


@pytest.mark.slow
def test_a_server_of_the_runs_own(write_config, tmp_path):
    """It ends with the run, however that ends; and two processes share one: one gives it the weights, both sample."""
    sampler = SERVED | {"log": str(tmp_path / "server.log")}
    config = write_config("served", sampler=sampler, num_steps=3, checkpoint={"every_n_steps": 1, "keep_last": 1})
    run = start(config)
    metrics = tmp_path / "served" / "metrics.jsonl"
    while run.poll() is None and (not metrics.exists() or len(metrics.read_text().splitlines()) < 2):
        time.sleep(0.2)
    assert run.poll() is None, run.communicate()[0][-5000:]
    (server,) = servers(tmp_path)
    os.kill(server, signal.SIGKILL)
    output, _ = run.communicate(timeout=120)
    assert run.returncode != 0
    assert re.search(r"grpo: stopped: .*http://127\.0\.0\.1:\d+: the server has ended", output), output[-5000:]
    finish(start(config, "resume=true", processes=2))
    check_mismatch(tmp_path / "served", 3)
    assert not servers(tmp_path)


def servers(tmp_path: Path) -> list[int]:
    """API servers of vLLM whose log is in ``tmp_path``."""
    found = []
    for entry in Path("/proc").iterdir():
        try:
            command = (entry / "cmdline").read_bytes().split(b"\0")
            log = os.readlink(entry / "fd" / "1")
        except OSError:
            continue
        if b"vllm.entrypoints.openai.api_server" in command and b"supervisor.py" not in b" ".join(command):
            found += [int(entry.name)] if log.startswith(str(tmp_path)) else []
    return found
