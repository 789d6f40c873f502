"""What ``run.json`` says of a run."""

from __future__ import annotations

import json
import sys

import torch
from repo import ROOT

from rolltune.distributed import World
from rolltune.run.record import write_record


def test_the_command_as_typed_without_secrets(tmp_path, monkeypatch):
    monkeypatch.setenv("DEMO_API_KEY", "sk-123456")
    config = ROOT / "configs" / "quickstart.yaml"
    arguments = ["--config", str(config), "output_dir=a b", "judge.headers=sk-123456"]
    monkeypatch.setattr(sys, "argv", [str(ROOT / "recipes/grpo.py"), *arguments])
    write_record(tmp_path, World(rank=0, size=2, device=torch.device("cpu")))
    written = json.loads((tmp_path / "run.json").read_text())
    shown = "'judge.headers=${oc.env:DEMO_API_KEY}'"
    assert written["command"] == f"tune run grpo --config quickstart.yaml 'output_dir=a b' {shown}"
    assert written["processes"] == 2 and written["versions"]["torch"] == torch.__version__
    assert written["hardware"]["cores"] >= 1 and written["hardware"]["memory_gib"] > 0
