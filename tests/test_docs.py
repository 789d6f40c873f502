"""README and docs keep their promises: commands run or dry-run, YAML is valid, Python executes."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from repo import ROOT
from torch.distributed.run import get_args_parser

from rolltune import cli
from rolltune.config import schema
from rolltune.config.load import read_yaml
from rolltune.rewards.combine import WeightedReward
from rolltune.run import checks
from rolltune.types import Completion, Problem

PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "AGENTS.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_" not in path.parts[-2]),
]
SCHEMAS = {
    "grpo": schema.GRPOConfig,
    "sft": schema.SFTConfig,
    "evaluate": schema.EvaluateConfig,
    "write_traces": schema.WriteTracesConfig,
    "write_rubrics": schema.WriteRubricsConfig,
    "audit_rewards": schema.AuditRewardsConfig,
    "audit_judge": schema.AuditJudgeConfig,
    "lint_rubrics": schema.LintRubricsConfig,
    "serve": schema.ServeConfig,
}
# A snippet of YAML is put into one of these configs, the first whose recipe has its keys, and validated.
SNIPPET_BASES = {"grpo": "quickstart", "sft": "quickstart_sft", "evaluate": "quickstart_eval"}
# Commands that are not run here, and why.
EXEMPT = {
    "git clone": "needs a network",
    "export": "sets variables of the other lines, which need a cluster or a server",
    "cd": "part of the line above",
    "pip install": "changes the environment; CI installs the package by the Makefile",
    ".venv/bin/python -m pytest": "would run the tests from a test",
    "tune report": "needs the folders of finished runs; tests/report runs it",
    "tune watch": "serves until Ctrl-C; tests/report runs its server",
    "pre-commit": "is the reader's choice, and changes .git",
    ".ci/run": "runs these tests",
}


def code_blocks(path: Path, *languages: str) -> list[str]:
    blocks = re.findall(r"^```(\S*)[^\n]*\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
    return [code for language, code in blocks if language in languages]


def commands(path: Path) -> list[str]:
    """Lines of shell blocks, fenced or indented, without comments; a line that ends with a backslash goes on."""
    text = path.read_text()
    indented = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    indented = "\n".join(
        re.findall(r"^    ((?:\.venv/|\.ci/|tune |make |pip |git |python ).*)$", indented, re.MULTILINE)
    )
    lines = "\n".join([*code_blocks(path, "bash"), indented]).replace("\\\n", " ").splitlines()
    found = [part.strip() for line in lines for part in re.sub(r"\s#\s.*", "", line).split("&&")]
    return [" ".join(command.split()) for command in found if command and not command.startswith("#")]


ALL_COMMANDS = [
    pytest.param(command, marks=pytest.mark.vllm if "_vllm" in command else (), id=f"{path.stem}: {command}")
    for path in PAGES
    for command in dict.fromkeys(commands(path))
]
ALL_YAML = [
    pytest.param(path, block, marks=pytest.mark.vllm if "samplers.vllm" in block else (), id=f"{path.stem}-{number}")
    for path in PAGES
    for number, block in enumerate(code_blocks(path, "yaml"))
]
WITH_PYTHON = [path for path in PAGES if code_blocks(path, "python")]


@pytest.mark.parametrize("command", ALL_COMMANDS)
@pytest.mark.usefixtures("earlier_stages")
def test_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    if any(command == known or command.startswith(f"{known} ") for known in EXEMPT):
        return
    program, *words = shlex.split(command)
    if program == "make":
        makefile = (ROOT / "Makefile").read_text()
        for target in (word for word in words if "=" not in word and not word.startswith("-")):
            assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"the Makefile has no {target}"
    elif program == "python" and words[0].startswith(("benchmarks/", "tests/")):
        source = (ROOT / words[0]).read_text()
        for flag in (word for word in words if word.startswith("--")):
            assert f'"{flag}"' in source, f"{words[0]} has no {flag}"
    elif program == "tune" and words[0] == "run":
        check_run(words[1:], tmp_path)
    else:
        assert program == "tune", f"no check is known for this command; add one, or a reason to {Path(__file__).name}"
        monkeypatch.setattr(sys, "argv", ["tune", *words])
        monkeypatch.chdir(tmp_path)
        try:
            cli.main()
        except SystemExit as ended:
            assert not ended.code, capsys.readouterr().err
    capsys.readouterr()


def check_run(words: list[str], tmp_path: Path) -> None:
    """Validate what ``tune run`` would run; ``--dry-run`` and the like add nothing to check."""
    recipe = next(word for word in words if word in SCHEMAS)
    rest = words[words.index(recipe) + 1 :]
    if "--help" in rest:
        return
    assert rest[0] == "--config"
    name, overrides = rest[1].removesuffix(".yaml"), [word for word in rest[2:] if word != "--dry-run"]
    for override in overrides:
        for file in re.findall(r"path: (\w+\.jsonl)", override):
            (tmp_path / file).write_text('{"question": "2 + 2?", "answer": "4"}\n')
    if recipe == "serve":
        overrides = [word for word in overrides if not word.startswith("command=")]  # of a shell that has `tune`
    checks.validate(SCHEMAS[recipe], str(ROOT / "configs" / f"{name}.yaml"), overrides)


@pytest.mark.parametrize("path, block", ALL_YAML)
@pytest.mark.usefixtures("earlier_stages")
def test_yaml(path: Path, block: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for code in code_blocks(path, "python"):
        if name := re.match(r"# (my_\w+\.py)\n", code):
            (tmp_path / name[1]).write_text(code)
            monkeypatch.delitem(sys.modules, name[1].removesuffix(".py"), raising=False)
    monkeypatch.syspath_prepend(str(tmp_path))
    snippet = yaml.safe_load(block)
    fields = {name: SCHEMAS[name].__dataclass_fields__.keys() for name in SNIPPET_BASES}
    recipe = next((name for name in SNIPPET_BASES if snippet.keys() <= fields[name]), None)
    assert recipe, f"no recipe has all of the keys {', '.join(snippet)}"
    config = merged(read_yaml(ROOT / "configs" / f"{SNIPPET_BASES[recipe]}.yaml"), snippet)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    checks.validate(SCHEMAS[recipe], str(file))


def merged(base: Any, snippet: Any) -> Any:
    """Sections are merged; components, and what names them, are replaced."""
    if not (isinstance(base, dict) and isinstance(snippet, dict)) or "_component_" in snippet:
        return snippet
    return base | {key: merged(base.get(key), value) for key, value in snippet.items()}


@pytest.mark.parametrize("path", WITH_PYTHON, ids=lambda path: path.stem)
def test_python(path: Path):
    namespace: dict[str, Any] = {}
    for code in code_blocks(path, "python"):
        exec(compile(code, str(path), "exec"), namespace)
    if "brevity" in namespace:
        reward = WeightedReward(rewards={"brevity": (namespace["brevity"], 0.1)})
        problem = Problem(id="p", messages=({"role": "user", "content": "?"},))
        completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text="short")
        assert reward(problem, completion).total == pytest.approx(0.1)


@pytest.mark.slow
def test_tutorial(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    """Run the cells of the notebook, with the two magics of IPython that it uses."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    for code in code_blocks(ROOT / "docs/tutorial.md", "{code-cell}"):
        first, _, rest = code.partition("\n")
        if name := re.fullmatch(r"%%writefile (\S+)", first):
            (tmp_path / name[1]).write_text(rest)
        elif first.startswith("!tune "):
            tune = [sys.executable, "-m", "rolltune.cli", *shlex.split(first)[1:]]
            done = subprocess.run(tune, capture_output=True, text=True)
            assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        else:
            exec(compile(code, "tutorial.md", "exec"), namespace)
    means = [step["reward/mean"] for step in namespace["steps"][1:]]
    assert len(means) == 6 and means[-1] > means[0] + 0.2
    assert "answer:" in capsys.readouterr().out


def test_the_pages_are_read():
    assert len(PAGES) >= 20 and len(ALL_COMMANDS) >= 40 and len(ALL_YAML) >= 10
    assert {path.stem for path in WITH_PYTHON} >= {"rewards", "data"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)
def test_nothing_is_left_to_fill_in(path: Path):
    assert not re.search(r"@@|TODO|TBD|FIXME", path.read_text())


def test_make_targets_in_prose_exist():
    makefile = (ROOT / "Makefile").read_text()
    for path in PAGES:
        for target in set(re.findall(r"`make ([\w-]+)", path.read_text())):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{path.name}: make {target}"


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_config_says_what_it_is_for(path: Path):
    """The docs list every config by the comment that it opens with."""
    first, second, third, *_ = path.read_text().splitlines()
    assert re.fullmatch(rf"# tune run ({'|'.join(SCHEMAS)}) --config {re.escape(path.name)}", first)
    assert second == "#" and re.match(r"# \w", third)


EXAMPLES = {
    "slurm.sbatch": {
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_ID": "123456",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_NODEID": "0",
    },
    "skypilot.yaml": {
        "INTERFACE": "eth0",
        "SKYPILOT_NODE_IPS": "node1\nnode2",
        "SKYPILOT_NUM_NODES": "2",
        "SKYPILOT_NUM_GPUS_PER_NODE": "8",
        "SKYPILOT_NODE_RANK": "0",
        "SKYPILOT_TASK_ID": "sky-1",
    },
}
# Programs of a cluster, and `tune`, as it is called on the first node.
STUBS = {"srun": 'shift; exec "$@"', "scontrol": "printf 'node1\\nnode2\\n'", "tune": "printf '%s\\0' \"$@\""}


@pytest.mark.parametrize("path", sorted((ROOT / "examples").iterdir()), ids=lambda path: path.name)
def test_cluster_examples_start_a_valid_run(path: Path, tmp_path: Path):
    text = path.read_text()
    script = yaml.safe_load(text)["run"] if path.suffix == ".yaml" else text
    for name, body in STUBS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    environment = {"PATH": f"{tmp_path}:{os.environ['PATH']}"} | EXAMPLES[path.name]
    done = subprocess.run(["bash", "-eu", "-c", script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    words = done.stdout.rstrip("\0").split("\0")
    launch = get_args_parser().parse_args(words[1:])
    assert (launch.nnodes, launch.nproc_per_node, launch.rdzv_conf) == ("2", "8", "is_host=1")
    assert launch.rdzv_endpoint.startswith("node1:") and launch.rdzv_id and launch.training_script == "grpo"
    check_run(words[1:], tmp_path)
