"""vLLM behind URLs: servers that a run starts for itself, or finds, and gives its weights to.

Control goes over the routes that vLLM has for RL (``VLLM_SERVER_DEV_MODE=1``), completions over its route of tokens in,
tokens out. Weights go by one of vLLM's weight-transfer backends:

  - "files": a safetensors file for each bucket, in a folder that trainer and servers both see. Works everywhere.
  - "nccl": vLLM's own, from GPU to GPU. This project has not run it yet.
"""

from __future__ import annotations

import asyncio
import math
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from torch import Tensor

from rolltune.endpoints import serving
from rolltune.errors import EngineError
from rolltune.samplers.engine import EngineOutput, EngineRequest, buckets
from rolltune.samplers.vllm_local import fence

_MINUS_INFINITY = -9999.0  # as vLLM writes it in JSON
_SECONDS = 1800.0  # the longest that a request may take, in a queue with all others of a step


class ServerEngine:
    """One or more servers with the same model. See :class:`rolltune.samplers.engine.Engine`."""

    def __init__(
        self,
        base_urls: Sequence[str],
        *,
        transfer: str,
        folder: str | None,
        max_num_seqs: int,
        shapes: Callable[[], list[tuple[str, torch.dtype, torch.Size]]],
        is_sender: bool = True,
        server: serving.Server | None = None,
        exits: ExitStack | None = None,
    ):
        """
        Args:
            base_urls: of the servers, without a path.
            transfer: one of :data:`rolltune.endpoints.serving.TRANSFERS`, as the servers were started with.
            folder: for "files"; None: memory of this machine (/dev/shm), or its folder for temporary files.
            max_num_seqs: requests in flight at each server.
            shapes: names, types and shapes of the weights, in the order that they are sent in.
            is_sender: whether :meth:`load` will be called, by one rank of all.
            server: the one that was started for this engine.
            exits: what is to be closed with the engine.
        """
        self._urls = list(base_urls)
        self._transfer = transfer
        self._max_num_seqs = max_num_seqs
        self._server = server
        self._exits = exits or ExitStack()
        self._weights: Iterator[tuple[str, Tensor]] = iter(())  # those that are being sent
        # Never by a proxy's way, which would lead a request to this machine elsewhere; and each on a connection of its
        # own, as a server closes those that it has not heard of during a step of training.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = self._exits.enter_context(
            httpx.Client(timeout=_SECONDS, trust_env=False, headers=_headers(), limits=limits)
        )
        if not is_sender:
            return
        if transfer == "files":
            parent = folder or ("/dev/shm" if Path("/dev/shm").is_dir() else None)
            self._folder = Path(tempfile.mkdtemp(prefix="rolltune-weights-", dir=parent))
            self._exits.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._all("init_weight_transfer_engine", {"init_info": {}})
        else:
            self._senders = [self._sender(url, shapes) for url in self._urls]

    @property
    def replicas(self) -> int:
        return len(self._urls)

    def is_asleep(self) -> bool:
        return any(self._ask("GET", url, "is_sleeping")["is_sleeping"] for url in self._urls)

    def load(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        self._all("pause?mode=wait")  # another client's requests
        try:
            if self._transfer == "files":
                try:
                    self._all("start_weight_update")
                except EngineError:  # a run that was killed may have left one open
                    self._all("finish_weight_update")
                    self._all("start_weight_update")
                for number, bucket in enumerate(buckets(weights)):
                    path = self._folder / f"{number}.safetensors"
                    save_file({name: tensor.contiguous() for name, tensor in bucket}, path)
                    self._all("update_weights", {"update_info": {"path": str(path)}})
                    path.unlink()
                self._all("finish_weight_update", {"weight_version": version})
            else:
                self._weights = weights
                for sender in self._senders:
                    sender.send_weights()
                self._all("update_weight_version", {"new_version": version})
            self._all("collective_rpc", {"method": "repack_tied_head"})
        except BaseException:
            with suppress(EngineError):  # which would take the place of what went wrong
                self._all("resume")
            raise
        self._all("resume")

    def _sender(self, url: str, shapes: Callable[[], list[tuple[str, torch.dtype, torch.Size]]]) -> Any:
        """vLLM's trainer side of a transfer by NCCL, which packs weights into buckets of its own."""
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        engine = self

        class Weights(WeightSource):
            def metadata(self) -> list[ParamMeta]:
                return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in shapes()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return engine._weights

        workers = self._ask("GET", url, "get_world_size")["world_size"]
        with fence():
            return WeightTransferTrainerFactory.trainer_init(
                NCCLTrainerInitInfo(get_ip(), get_open_port(), workers + 1, rank=0),
                client=HTTPVLLMWeightSyncClient(url, timeout=_SECONDS),
                source=Weights(),
            )

    def reset_cache(self) -> bool:
        return all(self._ask("POST", url, "reset_prefix_cache")["success"] for url in self._urls)

    def fingerprints(self, version: int) -> dict[str, str] | None:
        """Of the first server that has others than the rest, or of any."""
        if any(self._ask("GET", url, "get_world_size?include_dp=false")["world_size"] > 1 for url in self._urls):
            return None
        body = {"method": "weight_fingerprints", "args": [str(version)]}
        found = [prints for url in self._urls for prints in self._ask("POST", url, "collective_rpc", body)["results"]]
        return next((prints for prints in found if prints != found[0]), found[0])

    def write(self, requests: Sequence[EngineRequest], on_done: Callable[[int, EngineOutput], None]) -> None:
        asyncio.run(self._write(requests, on_done))

    async def _write(self, requests: Sequence[EngineRequest], on_done: Callable[[int, EngineOutput], None]) -> None:
        places = asyncio.Semaphore(self._max_num_seqs * len(self._urls))
        limits = httpx.Limits(max_connections=None)

        async def one(number: int, request: EngineRequest) -> tuple[int, EngineOutput]:
            url = self._urls[number % len(self._urls)]
            body = {
                "token_ids": list(request.token_ids),
                "sampling_params": request.params,
                "cache_salt": request.salt,
            }
            async with places:
                try:
                    response = await client.post(f"{url}/inference/v1/generate", json=body)
                except httpx.HTTPError as error:
                    raise self._unreachable(url, f"{type(error).__name__}: {error}") from error
            return number, _output(self._answer(url, response))

        async with httpx.AsyncClient(timeout=_SECONDS, trust_env=False, headers=_headers(), limits=limits) as client:
            tasks = [asyncio.create_task(one(number, request)) for number, request in enumerate(requests)]
            try:
                for task in asyncio.as_completed(tasks):
                    on_done(*await task)
            finally:  # the server ends a request when its client goes away
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def sleep(self) -> None:
        """Servers have memory of their own."""

    def wake(self) -> None:
        pass

    def close(self) -> None:
        self._exits.close()

    def _all(self, path: str, body: dict | None = None) -> None:
        """The same request to all servers at once."""
        with ThreadPoolExecutor(len(self._urls)) as pool:
            list(pool.map(lambda url: self._ask("POST", url, path, body), self._urls))

    def _ask(self, method: str, url: str, path: str, body: dict | None = None) -> Any:
        try:
            response = self._client.request(method, f"{url}/{path}", json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(url, f"{path}: {type(error).__name__}: {error}") from error
        return self._answer(url, response)

    def _answer(self, url: str, response: httpx.Response) -> Any:
        if response.status_code == 404:
            raise EngineError(
                f"{url}: has no {response.url.path}; `tune run serve` with takes_weights={self._transfer} starts a "
                "server that has"
            )
        if response.is_error:
            raise EngineError(f"{url}: {response.url.path}: {response.status_code}: {response.text[:500]}")
        return response.json() if response.content else None

    def _unreachable(self, url: str, what: str) -> EngineError:
        with suppress(subprocess.TimeoutExpired):
            if self._server is not None:
                self._server.process.wait(timeout=2)  # its guard ends a moment after it
                what = f"the server has ended{serving.log_end(self._server.log)}"
        return EngineError(f"{url}: {what}")


def _output(answer: dict) -> EngineOutput:
    (choice,) = answer["choices"]
    candidates = []
    for content in choice["logprobs"]["content"]:
        told = (*content["top_logprobs"], content)
        candidates.append({c["token_id"]: c["logprob"] if c["logprob"] > _MINUS_INFINITY else -math.inf for c in told})
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return EngineOutput(
        token_ids=tuple(choice["token_ids"]),
        candidates=tuple(candidates),
        finish_reason=choice["finish_reason"],
        versions=tuple(span["version"] for span in choice["weight_versions"] or ()),
        cached_tokens=details.get("cached_tokens"),
    )


def _headers() -> dict[str, str]:
    key = os.environ.get("VLLM_API_KEY")
    return {"Authorization": f"Bearer {key}"} if key else {}
