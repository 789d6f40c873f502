"""vLLM's engine in the training process, delimited in: it leaves the process as it found it."""

from __future__ import annotations

import gc
import os
import random
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from rolltune.endpoints import serving
from rolltune.errors import EngineError
from rolltune.samplers.engine import EngineOutput, EngineRequest, buckets

WORKER = "rolltune.samplers.vllm_worker"
_ENVIRONMENT = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # in this process: five times as fast to load, half as fast again to write
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
}
# Compiling takes a minute at each start, for 10 % of speed. A prompt that is read in parts winds its generator back,
# which those of a CPU cannot do: vLLM 0.32 ends with "CPU Generator does not use offset".
_CPU = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": serving.CPU_BLOCK}


class LocalEngine:
    """A vLLM ``LLM`` with a model of no particular weights. See :class:`rolltune.samplers.engine.Engine`."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_gib: float,
        sleeps: bool,
        options: dict[str, Any],
    ):
        """
        Args:
            folder: config and tokenizer in Hugging Face format; removed when the engine is closed.
            dtype: of weights and activations.
            max_model_len: tokens of a prompt and its completion.
            max_num_seqs: completions written at the same time.
            kv_cache_gib: memory for keys and values.
            sleeps: whether :meth:`sleep` frees memory (GPUs alone).
            options: further arguments of vLLM's ``LLM``.
        """
        self._folder = folder
        self._sleeps = sleeps
        self._requests = 0
        arguments: dict[str, Any] = {
            "dtype": dtype,
            "load_format": "dummy",
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
            "gpu_memory_utilization": 0.01,  # the cache's size is given; what is left of this is a check
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,
            "generation_config": "vllm",  # a model's own would add a top_p or a penalty
            "weight_transfer_config": {"backend": serving.TRANSFERS["files"]},
            "worker_extension_cls": f"{WORKER}.WorkerExtension",
            "enable_sleep_mode": sleeps,
            "disable_log_stats": True,
        }
        if torch.cuda.is_available():
            arguments["device_ids"] = [torch.cuda.current_device()]  # it would take the first one, in every rank
        if serving.installed_version().endswith("+cpu"):
            arguments |= _CPU | {"max_num_batched_tokens": max(8192, max_model_len)}
        with fence(), _shared_groups.joined():
            from vllm import LLM

            self._llm = LLM(str(folder), **arguments | options)

    @property
    def replicas(self) -> int:
        return 1

    def is_asleep(self) -> bool:
        return self._llm.llm_engine.is_sleeping()

    def load(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        with fence(), _failures_told():
            self._llm.start_weight_update()
            try:
                for bucket in buckets(weights):
                    self._llm.update_weights({"update_info": {"items": bucket}})
            except BaseException:
                self._llm.finish_weight_update()  # or the next could not be started
                raise
            self._llm.finish_weight_update(version)
            self._llm.collective_rpc("repack_tied_head")

    def reset_cache(self) -> bool:
        return self._llm.reset_prefix_cache()

    def fingerprints(self, version: int) -> dict[str, str]:
        with fence(), _failures_told():
            (prints,) = self._llm.collective_rpc("weight_fingerprints", args=(str(version),))
        return prints

    def write(self, requests: Sequence[EngineRequest], on_done: Callable[[int, EngineOutput], None]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        numbers = {}
        with fence():
            for number, request in enumerate(requests):
                self._requests += 1
                numbers[name := str(self._requests)] = number
                params = SamplingParams(**request.params, output_kind=RequestOutputKind.FINAL_ONLY)  # pyright: ignore
                engine.add_request(
                    name, {"prompt_token_ids": list(request.token_ids), "cache_salt": request.salt}, params
                )
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        on_done(numbers.pop(output.request_id), _output(output))
            finally:
                if numbers:  # the caller gives up; the next call is not to meet them
                    engine.abort_request(list(numbers))

    def sleep(self) -> None:
        if self._sleeps and not self.is_asleep():
            with fence():
                self._llm.sleep(level=1)

    def wake(self) -> None:
        if self._sleeps and self.is_asleep():
            with fence():
                self._llm.wake_up()

    def close(self) -> None:
        if hasattr(self, "_llm"):
            with fence(), _shared_groups.left():
                self._llm.llm_engine.engine_core.shutdown()
                del self._llm
                gc.collect()
        shutil.rmtree(self._folder, ignore_errors=True)


def _output(output: Any) -> EngineOutput:
    (written,) = output.outputs
    return EngineOutput(
        token_ids=tuple(written.token_ids),
        candidates=tuple(
            {token: c.logprob for token, c in candidates.items()} for candidates in written.logprobs or ()
        ),
        finish_reason=written.finish_reason,
        versions=tuple(span.version for span in written.weight_versions or ()),
        cached_tokens=output.num_cached_tokens,
    )


@contextmanager
def fence() -> Iterator[None]:
    """Undo afterwards what vLLM does to the process that it runs in.

    It draws from and seeds the global generators, rewrites environment variables (LOCAL_WORLD_SIZE among them), takes
    ``torch.set_num_threads`` away, and takes all objects out of the garbage collector's sight. On a CPU it would
    compile a part of its sampler at the first request, which takes longer than it ever gains there.
    """
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()
    cuda_states = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    device = torch.cuda.current_device() if torch.cuda.is_available() else None
    environment, set_num_threads, threads = dict(os.environ), torch.set_num_threads, torch.get_num_threads()
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore", FutureWarning)  # of torch, at vLLM's own import
        if not torch.cuda.is_available():
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        try:
            yield
        finally:
            for key in os.environ.keys() - environment.keys():
                del os.environ[key]
            # Value by value: other threads look for theirs meanwhile.
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


@contextmanager
def _failures_told() -> Iterator[None]:
    """vLLM's own errors (out of memory, a weight that it does not know) as the sampler's."""
    try:
        yield
    except RuntimeError as error:
        raise EngineError(f"vLLM: {type(error).__name__}: {error}") from error


class _SharedGroups:
    """vLLM's process groups are globals, which it takes down with any engine: here they last as long as the last one.

    Where torch.distributed was there before the first engine, it is the training's, and outlives all of them.
    """

    def __init__(self) -> None:
        self._engines = 0
        self._are_of_the_training = False

    @contextmanager
    def joined(self) -> Iterator[None]:
        if self._engines == 0:
            self._are_of_the_training = dist.is_initialized()
        yield
        self._engines += 1

    @contextmanager
    def left(self) -> Iterator[None]:
        from vllm.v1.engine import core

        self._engines -= 1
        with ExitStack() as stack:
            if self._engines:
                stack.enter_context(patch.object(core, "cleanup_dist_env_and_memory", gc.collect))
            if self._are_of_the_training:
                stack.enter_context(patch.object(dist, "destroy_process_group"))
            yield


_shared_groups = _SharedGroups()
