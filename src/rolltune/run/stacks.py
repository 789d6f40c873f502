"""Where a process is: the stacks of its threads, and its last collectives."""

from __future__ import annotations

import faulthandler
import os
import pickle
import re
from pathlib import Path

import torch.distributed as dist
from torch._C import _distributed_c10d

_COLLECTIVES = 8  # shown, the last ones


def print_stacks() -> None:
    """Print the stacks of all threads and the last collectives of this rank to stderr, without Python's own streams."""
    faulthandler.dump_traceback(file=2, all_threads=True)
    for line in last_collectives():
        os.write(2, f"{line}\n".encode())


def last_collectives() -> list[str]:
    """Describe the last collectives that this rank has started, from torch's flight recorder.

    A rank that has started fewer than the others is the one that they wait for.
    """
    name = "_dump_nccl_trace" if dist.is_initialized() and dist.get_backend() == "nccl" else "_dump_fr_trace"
    dump = getattr(_distributed_c10d, name, None)
    if not dist.is_initialized() or dump is None:
        return []
    recorded = pickle.loads(dump(includeCollectives=True, includeStackTraces=True, onlyActive=False))
    return [_describe(entry) for entry in recorded.get("entries", [])[-_COLLECTIVES:]]


def _describe(entry: dict) -> str:
    frames = [f for f in entry["frames"] if not re.search(r"/torch/|/rolltune/distributed\.py", f["filename"])]
    caller = f" by {frames[0]['name']} ({Path(frames[0]['filename']).name}:{frames[0]['line']})" if frames else ""
    return f"collective {entry['record_id'] + 1}: {entry['profiling_name']} {entry['input_sizes']}{caller}"
