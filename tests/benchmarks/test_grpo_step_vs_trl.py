"""The benchmark script: its command line and its summary of measurements. Nothing is measured here."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
from repo import ROOT

SCRIPT = ROOT / "benchmarks" / "grpo_step_vs_trl.py"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("grpo_step_vs_trl", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_of(bench: ModuleType, trainer: str, *seconds: float, peak: float, trained: int = 64):
    steps = tuple(
        bench.Step(seconds=s, sample_seconds=s / 4, sampled_tokens=64, trained_tokens=trained) for s in seconds
    )
    return bench.Run(trainer=trainer, steps=steps, peak_gib=peak, threads=1)


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    # The parent process must not import PyTorch: a child's peak memory starts from its parent's.
    code = (
        "import runpy, sys\n"
        f"sys.argv = [{str(SCRIPT)!r}, '--help']\n"
        "try:\n"
        f"    runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
        "finally:\n"
        "    print(sorted({'torch', 'numpy', 'transformers', 'rolltune'} & set(sys.modules)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
    for option in ("--data", "--steps", "--pairs", "--prompts", "--completions", "--max-new-tokens", "--trl-"):
        assert option in done.stdout


def test_defaults(bench: ModuleType) -> None:
    conditions, settings, pairs = bench.parse_args([])
    assert (conditions.prompts, conditions.completions, conditions.max_new_tokens, conditions.steps) == (4, 8, 128, 1)
    assert pairs == 2
    assert list(map(str, settings)) == [
        "TRL, 32 a pass, checkpointing off",
        "TRL, 32 a pass, checkpointing on",
        "TRL, 8 a pass, checkpointing off",
        "TRL, 8 a pass, checkpointing on",
    ]


def test_equal_settings_are_measured_once(bench: ModuleType) -> None:
    _, settings, _ = bench.parse_args(["--prompts", "1", "--trl-gradient-checkpointing", "on", "on"])
    assert list(map(str, settings)) == ["TRL, 8 a pass, checkpointing on"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--completions", "1"], "--completions: 1; must be 2"),
        (["--steps", "0"], "--steps: 0; must be 1"),
        (["--max-new-tokens", "-1"], "--max-new-tokens: -1"),
        (["--trl-micro-batch", "32", "5"], "--trl-micro-batch: 5; must divide the 32"),
        (["--trl-micro-batch", "0"], "--trl-micro-batch: 0"),
    ],
)
def test_mistakes(bench: ModuleType, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        bench.parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_summary(bench: ModuleType) -> None:
    # A ratio compares the medians of the steps of one pair. Setting "a" is fastest, "b" is leanest.
    pairs = [
        (run_of(bench, "rolltune", 2.0, 9.0, 3.0, peak=2.0), run_of(bench, "a", 12.0, peak=10.0)),
        (run_of(bench, "rolltune", 5.0, peak=3.0), run_of(bench, "b", 20.0, peak=4.0)),
        (run_of(bench, "rolltune", 4.0, peak=2.0), run_of(bench, "a", 8.0, peak=8.0)),
        (run_of(bench, "rolltune", 6.0, peak=2.0), run_of(bench, "b", 30.0, peak=4.0)),
    ]
    summary = bench.summarise(pairs)
    assert summary["settings"] == {
        "a": {
            "seconds_ratio": [0.25, 0.5],
            "seconds_ratio_median": 0.375,
            "peak_ratio": [0.2, 0.25],
            "peak_ratio_median": 0.225,
        },
        "b": {
            "seconds_ratio": [0.25, 0.2],
            "seconds_ratio_median": 0.225,
            "peak_ratio": [0.75, 0.5],
            "peak_ratio_median": 0.625,
        },
    }
    assert (summary["fastest"], summary["seconds_ratio"]) == ("a", 0.375)
    assert (summary["leanest"], summary["peak_ratio"]) == ("b", 0.625)
    assert summary["same_tokens"] is True
    text = bench.format_summary(summary)
    assert "time against a: 0.375" in text and "peak memory against b: 0.625" in text
    assert "NOT" not in text


def test_summary_sees_one_step_with_other_tokens(bench: ModuleType) -> None:
    pairs = [(run_of(bench, "rolltune", 1.0, 1.0, peak=1.0), run_of(bench, "a", 2.0, peak=2.0, trained=63))]
    summary = bench.summarise(pairs)
    assert summary["same_tokens"] is False
    assert "NOT every step" in bench.format_summary(summary)


def test_table_row(bench: ModuleType) -> None:
    row = bench.table_row(3, run_of(bench, "TRL, 8 a pass, checkpointing off", 4.0, 8.0, 100.0, peak=1.5))
    assert row.split()[-6:] == ["64", "64", "8.00", "2.00", "6.00", "1.50"]
    assert len(row) == len(bench.HEADER)


@pytest.mark.slow
def test_the_mismatch_grid_is_a_table_and_a_picture(make_tiny_llama: Callable[..., Path], tmp_path: Path) -> None:
    """Runs the vLLM engine and the native sampler in every precision."""
    model, picture = make_tiny_llama(tmp_path / "model", hidden_size=128), tmp_path / "grid.png"
    arguments = ("--prompts", "2", "--completions", "2", "--tokens", "16", "--picture", str(picture))
    done = subprocess.run(
        [sys.executable, str(SCRIPT.with_name("mismatch_grid.py")), "--model", str(model), *arguments],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = {(cell["trainer"], cell["sampler"]): cell["mismatch"] for cell in json.loads(done.stdout.splitlines()[-1])}
    assert len(found) == 5 + 9 and picture.read_bytes().startswith(b"\x89PNG")
    for sampler in ("native", "vllm float32"):
        assert found["float32", sampler]["mean_abs"] < 1e-5
    for trainer, sampler in found:
        assert found[trainer, sampler]["mean_ratio"] == pytest.approx(1, abs=0.02)
    assert found["float16", "vllm float16"]["mean_abs"] < found["bfloat16", "vllm bfloat16"]["mean_abs"]
