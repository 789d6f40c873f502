"""The command line of a recipe."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from rolltune import config
from rolltune.config.command_line import Arguments
from rolltune.errors import ConfigError


def test_command_line():
    parsed = config.parse_args(["a=1", "--config", "x.yaml", "--dry-run", "b=--c"])
    assert parsed == Arguments(config="x.yaml", overrides=("a=1", "dry_run=true", "b=--c"), help=False)
    assert config.parse_args(["--config=x.yaml", "-h"]) == Arguments(config="x.yaml", overrides=(), help=True)


@pytest.mark.parametrize(
    ("argv", "fragments"),
    [
        (["--config"], ["--config: no value"]),
        (["--config="], ["--config: no value"]),
        (["--num-steps", "3"], ["--num-steps: unknown flag", "num_steps=..."]),
        (["--num_steps=3"], ["--num_steps: unknown flag", "num_steps=3"]),
        (["--dryrun"], ["--dryrun: unknown flag", "--dry-run"]),
    ],
)
def test_command_line_mistakes(argv: list[str], fragments: list[str]):
    with pytest.raises(ConfigError) as error:
        config.parse_args(argv)
    assert all(fragment in str(error.value) for fragment in fragments)


RECIPE = """\
from dataclasses import dataclass
from rolltune import config

@dataclass(kw_only=True)
class TinyConfig:
    count: int = 1
    dry_run: bool = False
    fail: str = ""

def run(cfg):
    print("ran", cfg.count, cfg.dry_run)
    if cfg.fail == "config":
        raise config.ConfigError(["count: 1; two"])
    if cfg.fail == "value":
        raise ValueError("count: 1; three")
    if cfg.fail == "bug":
        int("x" * len({}) + "y")
    if cfg.fail == "torch":
        __import__("json").loads("{")
    if cfg.fail == "interrupt":
        raise KeyboardInterrupt

if __name__ == "__main__":
    config.main(TinyConfig, run)
"""


@pytest.mark.parametrize(
    ("arguments", "status", "out", "err"),
    [
        ([], 0, "ran 3 False", ""),
        (["count=4", "--dry-run"], 0, "ran 4 True", ""),
        (["cuont=4"], 2, "", "tiny: 1 mistake\n  cuont: no such key; did you mean count?"),
        (["count=x", "y=1"], 2, "", "tiny: 2 mistakes"),
        (["--count", "3"], 2, "", "--count: unknown flag"),
        (["fail=config"], 2, "ran", "count: 1; two"),
        (["fail=value"], 2, "ran", "tiny.py:15"),
        (["fail=interrupt"], 130, "ran", "interrupted"),
        (["fail=torch"], 1, "ran", "JSONDecodeError"),
        (["--help"], 0, "count: 1", ""),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_main_as_a_process(tmp_path: Path, arguments: list[str], status: int, out: str, err: str):
    (tmp_path / "tiny.py").write_text(RECIPE)
    (tmp_path / "tiny.yaml").write_text("count: 3\n")
    done = subprocess.run(
        [sys.executable, "tiny.py", "--config", "tiny.yaml", *arguments], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == status, done.stderr
    assert out in done.stdout and err in done.stderr
    assert ("Traceback" in done.stderr) == (status == 1)
