"""Shield the training process from vLLM's side effects: global state and process groups."""

from __future__ import annotations

import gc
import os
import random
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist

_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: loads 5 times, generates 1.5 times as fast
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}


@contextmanager
def preserve_process_state() -> Iterator[None]:
    """Undo vLLM's changes to the process when the context ends.

    vLLM draws from and seeds the global random generators, rewrites environment variables (LOCAL_WORLD_SIZE among
    them), replaces ``torch.set_num_threads``, and freezes all objects for the garbage collector. On a CPU it would also
    compile a part of its sampler at the first request, which takes longer than it ever saves; eager mode prevents that.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    environment, set_num_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # torch's, when vLLM is imported
        if not torch.cuda.is_available():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for key in os.environ.keys() - environment.keys():
                del os.environ[key]
            # Only changed values: other threads may read theirs meanwhile.
            os.environ.update({key: value for key, value in environment.items() if os.environ.get(key) != value})
            torch.set_num_threads = set_num_threads
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            torch.set_rng_state(states[0])
            random.setstate(states[1])
            np.random.set_state(states[2])
            if device is not None:
                torch.cuda.set_rng_state_all(cuda_states)
                torch.cuda.set_device(device)
            gc.unfreeze()


class _ProcessGroups:
    """Keeps vLLM's process groups, which are global, until the last engine of the process shuts down.

    vLLM itself destroys them with any engine. A process group that existed before the first engine is the training's
    and outlives all engines.
    """

    def __init__(self) -> None:
        self._engines = 0
        self._training_has_group = False

    @contextmanager
    def engine_start(self) -> Iterator[None]:
        """Create an engine in this context."""
        if self._engines == 0:
            self._training_has_group = dist.is_initialized()
        yield
        self._engines += 1

    @contextmanager
    def engine_shutdown(self) -> Iterator[None]:
        """Shut an engine down in this context."""
        from vllm.v1.engine import core

        self._engines -= 1
        with ExitStack() as stack:
            if self._engines:
                stack.enter_context(patch.object(core, "cleanup_dist_env_and_memory", gc.collect))
            if self._training_has_group:
                stack.enter_context(patch.object(dist, "destroy_process_group"))
            yield


process_groups = _ProcessGroups()
