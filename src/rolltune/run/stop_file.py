"""The file that asks a run to stop: ``<output_dir>/stop``.

A run looks for it before each step, saves a checkpoint and ends. The next start removes it.
"""

from __future__ import annotations

from pathlib import Path

from rolltune.files import write_text_atomic

NAME = "stop"


def request_stop(output_dir: str | Path) -> Path:
    """Write the file, and return its path."""
    path = Path(output_dir) / NAME
    write_text_atomic(path, "The run stops before its next step, with a checkpoint.\n")
    return path


def is_requested(output_dir: str | Path) -> bool:
    return (Path(output_dir) / NAME).exists()


def clear(output_dir: str | Path) -> None:
    """Remove the file of an earlier request."""
    (Path(output_dir) / NAME).unlink(missing_ok=True)
