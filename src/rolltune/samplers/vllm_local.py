"""A vLLM engine in the training process."""

from __future__ import annotations

import gc
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rolltune.endpoints import serving
from rolltune.endpoints.serving import AdapterRoom
from rolltune.errors import EngineError
from rolltune.samplers.engine import EngineOutput, EngineRequest, weight_buckets
from rolltune.samplers.fingerprints import Piece, Shapes
from rolltune.samplers.vllm_adapters import write_adapter
from rolltune.samplers.vllm_process import preserve_process_state, process_groups

# Compiling takes a minute at each start and gains 10 % of speed. Chunked prefill rewinds a random generator, which
# generators of a CPU do not support: vLLM 0.32 fails with "CPU Generator does not use offset".
_CPU_ARGUMENTS = {"enforce_eager": True, "enable_chunked_prefill": False, "block_size": serving.CPU_BLOCK}


class LocalEngine:
    """A vLLM ``LLM``, created without weights. See :class:`rolltune.samplers.engine.Engine`."""

    def __init__(
        self,
        folder: Path,
        *,
        dtype: str,
        max_model_len: int,
        max_num_seqs: int,
        kv_cache_gib: float,
        sleeps: bool,
        adapter: AdapterRoom | None,
        options: dict[str, Any],
    ):
        """
        Args:
            folder: config and tokenizer in Hugging Face format; removed when the engine is closed.
            dtype: dtype of weights and activations.
            max_model_len: longest prompt with its completion, in tokens.
            max_num_seqs: completions generated at the same time.
            kv_cache_gib: memory for keys and values.
            sleeps: whether :meth:`sleep` frees memory (only on GPUs).
            adapter: room for a LoRA adapter; None: the policy's weights come merged.
            options: further arguments of vLLM's ``LLM``.
        """
        self._folder = folder
        self._adapter: Any = None  # vLLM's LoRARequest
        self._sleeps = sleeps
        self._num_requests = 0
        arguments: dict[str, Any] = {
            "dtype": dtype,
            "load_format": "dummy",
            "max_model_len": max_model_len,
            "max_num_seqs": max_num_seqs,
            "kv_cache_memory_bytes": int(kv_cache_gib * 2**30),
            "gpu_memory_utilization": 0.01,  # only checked at the start: kv_cache_memory_bytes sets the cache's size
            "enable_prefix_caching": True,
            "logprobs_mode": "processed_logprobs",
            "max_logprobs": -1,
            "generation_config": "vllm",  # the model's could add a top_p or a penalty
            "weight_transfer_config": {"backend": serving.TRANSFERS["files"]},
            "worker_extension_cls": "rolltune.samplers.vllm_worker.WorkerExtension",
            "enable_sleep_mode": sleeps,
            "disable_log_stats": True,
        }
        if adapter is not None:
            arguments |= {"enable_lora": True, "max_lora_rank": adapter.max_rank}
            arguments["lora_target_modules"] = list(adapter.targets)
        if torch.cuda.is_available():
            arguments["device_ids"] = [torch.cuda.current_device()]  # or every rank would take the first one
        if serving.installed_version().endswith("+cpu"):
            arguments |= _CPU_ARGUMENTS | {"max_num_batched_tokens": max(8192, max_model_len)}
        with preserve_process_state(), process_groups.engine_start():
            from vllm import LLM

            self._llm = LLM(str(folder), **arguments | options)

    @property
    def num_replicas(self) -> int:
        return 1

    def is_asleep(self) -> bool:
        return self._llm.llm_engine.is_sleeping()

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        with preserve_process_state(), _as_engine_error():
            self._llm.start_weight_update()
            try:
                for bucket in weight_buckets(weights):
                    self._llm.update_weights({"update_info": {"items": bucket}})
            except BaseException:
                self._llm.finish_weight_update()  # or the next update could not start
                raise
            self._llm.finish_weight_update(version)
            self._llm.collective_rpc("repack_tied_head")

    def adapter_problems(self, rank: int, layers: Sequence[str]) -> list[str]:
        with preserve_process_state():
            return self._llm.collective_rpc("adapter_problems", args=(str(rank), json.dumps(layers)))[0]

    def load_adapter(self, tensors: Mapping[str, Tensor], name: str) -> None:
        from vllm.lora.request import LoRARequest

        number = self._adapter.lora_int_id + 1 if self._adapter else 1
        request = LoRARequest(name, number, str(self._folder / f"adapter_{number}.safetensors"))
        write_adapter(Path(request.lora_path), tensors, name)
        try:
            with preserve_process_state(), _as_engine_error():
                self._llm.llm_engine.add_lora(request)
        except BaseException:
            Path(request.lora_path).unlink()
            raise
        if self._adapter is not None:
            self._llm.llm_engine.remove_lora(self._adapter.lora_int_id)
            Path(self._adapter.lora_path).unlink()
        self._adapter = request

    def reset_cache(self) -> bool:
        return self._llm.reset_prefix_cache()

    def fingerprints(self, version: int, shapes: Shapes) -> list[list[dict[str, list[Piece]]]]:
        with preserve_process_state(), _as_engine_error():
            return [self._llm.collective_rpc("weight_fingerprints", args=(str(version), json.dumps(shapes)))]

    def adapter_fingerprints(self, name: str, shapes: Shapes) -> list[list[dict[str, list[Piece]]]]:
        with preserve_process_state(), _as_engine_error():
            return [self._llm.collective_rpc("adapter_fingerprints", args=(name, json.dumps(shapes)))]

    def generate(self, requests: Sequence[EngineRequest], on_output: Callable[[int, EngineOutput], None]) -> None:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        engine = self._llm.llm_engine
        unfinished: dict[str, int] = {}
        with preserve_process_state():
            for number, request in enumerate(requests):
                self._num_requests += 1
                unfinished[request_id := str(self._num_requests)] = number
                params = SamplingParams(**request.params, output_kind=RequestOutputKind.FINAL_ONLY)  # pyright: ignore
                engine.add_request(
                    request_id,
                    {"prompt_token_ids": list(request.token_ids), "cache_salt": request.cache_salt},
                    params,
                    lora_request=self._adapter if request.adapter else None,
                )
            try:
                while engine.has_unfinished_requests():
                    for output in engine.step():
                        on_output(unfinished.pop(output.request_id), _output(output))
            finally:
                if unfinished:  # an exception; the next call must not receive their outputs
                    engine.abort_request(list(unfinished))

    def sleep(self) -> None:
        if self._sleeps and not self.is_asleep():
            with preserve_process_state():
                self._llm.sleep(level=1)

    def wake(self) -> None:
        if self._sleeps and self.is_asleep():
            with preserve_process_state():
                self._llm.wake_up()

    def close(self) -> None:
        if hasattr(self, "_llm"):
            with preserve_process_state(), process_groups.engine_shutdown():
                self._llm.llm_engine.engine_core.shutdown()
                del self._llm
                gc.collect()
        shutil.rmtree(self._folder, ignore_errors=True)


def _output(output: Any) -> EngineOutput:
    (completion,) = output.outputs
    return EngineOutput(
        token_ids=tuple(completion.token_ids),
        logprobs=tuple(
            {token: entry.logprob for token, entry in logprobs.items()} for logprobs in completion.logprobs or ()
        ),
        finish_reason=completion.finish_reason,
        weight_versions=tuple(span.version for span in completion.weight_versions or ()),
        cached_tokens=output.num_cached_tokens,
        adapter=output.lora_request and output.lora_request.lora_name,
    )


@contextmanager
def _as_engine_error() -> Iterator[None]:
    """Raise vLLM's errors (out of memory, an unknown weight) as EngineError."""
    try:
        yield
    except (RuntimeError, ValueError) as error:
        raise EngineError(f"vLLM: {type(error).__name__}: {error}") from error
