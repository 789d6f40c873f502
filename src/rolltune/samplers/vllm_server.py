"""vLLM servers behind URLs, started by the run or before it, that receive the run's weights.

Control uses vLLM's routes for RL (``VLLM_SERVER_DEV_MODE=1``), and completions its tokens-in, tokens-out route. Weights
travel by one of vLLM's weight-transfer backends:

  - "files": a safetensors file for each bucket, in a folder that trainer and servers share. Works everywhere.
  - "nccl": vLLM's own, from GPU to GPU. This project has not run it yet.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import httpx
import torch
from safetensors.torch import save_file
from torch import Tensor

from rolltune.endpoints import serving
from rolltune.endpoints.redaction import redacted
from rolltune.errors import EngineError
from rolltune.files import home_path
from rolltune.samplers.engine import EngineOutput, EngineRequest, weight_buckets
from rolltune.samplers.fingerprints import Piece, Shapes
from rolltune.samplers.vllm_adapters import write_adapter
from rolltune.samplers.vllm_process import preserve_process_state

_MINUS_INFINITY = -9999.0  # vLLM's value for it in JSON
_TIMEOUT = 1800.0  # seconds; a request waits in a queue with all others of a step


class ServerEngine:
    """One or more servers with the same model. See :class:`rolltune.samplers.engine.Engine`."""

    def __init__(
        self,
        base_urls: Sequence[str],
        *,
        key: str,
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
            base_urls: URLs of the servers, without a path.
            key: sent to each of them; empty for servers without a key.
            transfer: key of :data:`rolltune.endpoints.serving.TRANSFERS`, with which the servers were started.
            folder: for "files"; None: this machine's memory (/dev/shm), or its folder for temporary files.
            max_num_seqs: requests in flight at each engine.
            shapes: returns names, dtypes and shapes of the weights, in sending order.
            is_sender: whether this rank calls :meth:`load_weights`.
            server: the server, if the run has started it.
            exits: closed with the engine.
        """
        self._urls = list(base_urls)
        self._key = key
        self._headers = {"Authorization": f"Bearer {key}"} if key else {}
        self._transfer = transfer
        self._max_num_seqs = max_num_seqs
        self._server = server
        self._exits = exits or ExitStack()
        self._adapter: tuple[str, Path] | None = None  # name and file of the one that is loaded
        self._num_adapters = 0  # that were sent
        self._weights: Iterator[tuple[str, Tensor]] = iter(())  # in transfer
        # No proxy, which could lead a request for this machine elsewhere. No keep-alive, because servers close
        # connections that are idle during a training step.
        limits = httpx.Limits(max_keepalive_connections=0)
        self._client = self._exits.enter_context(
            httpx.Client(timeout=_TIMEOUT, trust_env=False, headers=self._headers, limits=limits)
        )
        if is_sender:
            self._init_transfer(folder, shapes)
        self._replicas = [(url, rank) for url in self._urls for rank in range(self._data_parallel_size(url))]

    def _init_transfer(
        self, folder: str | None, shapes: Callable[[], list[tuple[str, torch.dtype, torch.Size]]]
    ) -> None:
        if self._transfer == "files":
            parent = home_path(folder) if folder else ("/dev/shm" if Path("/dev/shm").is_dir() else None)
            self._folder = Path(tempfile.mkdtemp(prefix="rolltune-weights-", dir=parent))
            self._exits.callback(shutil.rmtree, self._folder, ignore_errors=True)
            self._post_all("init_weight_transfer_engine", {"init_info": {}})
        else:
            self._senders = [self._nccl_sender(url, shapes) for url in self._urls]

    @property
    def num_replicas(self) -> int:
        return len(self._replicas)

    def _data_parallel_size(self, url: str) -> int:
        """Return the number of engines with all weights behind a URL."""
        of_all, of_one = (
            self._request("GET", url, f"get_world_size?include_dp={include}")["world_size"]
            for include in ("true", "false")
        )
        return of_all // of_one

    def is_asleep(self) -> bool:
        return any(self._request("GET", url, "is_sleeping")["is_sleeping"] for url in self._urls)

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        self._post_all("pause?mode=wait")  # lets other clients' requests finish
        try:
            if self._transfer == "files":
                self._send_files(weights, version)
            else:
                self._weights = weights
                for sender in self._senders:
                    sender.send_weights()
                self._post_all("update_weight_version", {"new_version": version})
            self._post_all("collective_rpc", {"method": "repack_tied_head"})
        except BaseException:
            with suppress(EngineError):  # it would hide the first error
                self._post_all("resume")
            raise
        self._post_all("resume")

    def _send_files(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        try:
            self._post_all("start_weight_update")
        except EngineError:  # a run that was killed may have left an update open
            self._post_all("finish_weight_update")
            self._post_all("start_weight_update")
        for number, bucket in enumerate(weight_buckets(weights)):
            path = self._folder / f"{number}.safetensors"
            save_file({name: tensor.contiguous() for name, tensor in bucket}, path)
            self._post_all("update_weights", {"update_info": {"path": str(path)}})
            path.unlink()
        self._post_all("finish_weight_update", {"weight_version": version})

    def _nccl_sender(self, url: str, shapes: Callable[[], list[tuple[str, torch.dtype, torch.Size]]]) -> Any:
        """Create the trainer's side of vLLM's NCCL transfer, which splits weights into its own buckets."""
        from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
        from vllm.distributed.weight_transfer.clients import HTTPVLLMWeightSyncClient
        from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
        from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
        from vllm.utils.network_utils import get_ip, get_open_port

        engine = self

        class Client(HTTPVLLMWeightSyncClient):  # vLLM's own sends no key
            def _post(self, path: str, json: dict[str, Any] | None = None) -> None:
                engine._request("POST", url, path, json)

        class Weights(WeightSource):
            def metadata(self) -> list[ParamMeta]:
                return [ParamMeta(name, dtype, tuple(shape)) for name, dtype, shape in shapes()]

            def __iter__(self) -> Iterator[tuple[str, Tensor]]:
                return engine._weights

        workers = self._request("GET", url, "get_world_size")["world_size"]
        with preserve_process_state():
            return WeightTransferTrainerFactory.trainer_init(
                NCCLTrainerInitInfo(get_ip(), get_open_port(), workers + 1, rank=0),
                client=Client(url),
                source=Weights(),
            )

    def adapter_problems(self, rank: int, layers: Sequence[str]) -> list[str]:
        body = {"method": "adapter_problems", "args": [str(rank), json.dumps(layers)]}
        answers = self._post_all("collective_rpc", body)
        return [
            f"{url} {problem}"
            for url, answer in zip(self._urls, answers, strict=True)
            for problem in answer["results"][0]
        ]

    def load_adapter(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """See :class:`rolltune.samplers.engine.Engine`. The file stays until the next: the server may read it again."""
        self._num_adapters += 1
        adapter = name, self._folder / f"adapter_{self._num_adapters}.safetensors"
        write_adapter(adapter[1], tensors, name)
        try:
            self._post_all("v1/load_lora_adapter", {"lora_name": name, "lora_path": str(adapter[1])})
        except BaseException:
            self._unload(adapter)
            raise
        previous, self._adapter = self._adapter, adapter
        if previous is not None:
            self._unload(previous)

    def _unload(self, adapter: tuple[str, Path]) -> None:
        name, path = adapter
        with suppress(EngineError):  # some server has not loaded it, or has been started again
            self._post_all("v1/unload_lora_adapter", {"lora_name": name})
        path.unlink()

    def reset_cache(self) -> bool:
        return all(self._request("POST", url, "reset_prefix_cache")["success"] for url in self._urls)

    def fingerprints(self, version: int, shapes: Shapes) -> list[list[dict[str, list[Piece]]]]:
        """See :class:`rolltune.samplers.engine.Engine`.

        Raises:
            EngineError: the data-parallel engines of one server have different weights.
        """
        body = {"method": "weight_fingerprints", "args": [str(version), json.dumps(shapes)]}
        answers = self._post_all("collective_rpc", body)
        for url in self._urls:
            self._compare_data_parallel(url)
        return [answer["results"] for answer in answers]

    def adapter_fingerprints(self, name: str, shapes: Shapes) -> list[list[dict[str, list[Piece]]]]:
        body = {"method": "adapter_fingerprints", "args": [name, json.dumps(shapes)]}
        return [answer["results"] for answer in self._post_all("collective_rpc", body)]

    def _compare_data_parallel(self, url: str) -> None:
        """Compare the engines behind a URL with each other by vLLM's own checksums; its RPC asks only the first."""
        if self._replicas.count((url, 1)) == 0:
            return
        checksums = self._request("POST", url, "weight_checker", {"action": "checksum"})["checksums"]
        engines: dict[str, dict[str, str]] = {}
        for key, value in checksums.items():  # "dp0:pp0:pcp0:tp0:name"
            rank, _, name = key.partition(":")
            engines.setdefault(rank, {})[name] = value
        first, *others = engines.values()
        if different := sorted({name for other in others for name in first if other.get(name) != first[name]}):
            raise EngineError(f"{url}: the data-parallel engines have different weights: {', '.join(different[:10])}")

    def generate(self, requests: Sequence[EngineRequest], on_output: Callable[[int, EngineOutput], None]) -> None:
        asyncio.run(self._generate(requests, on_output))

    async def _generate(
        self, requests: Sequence[EngineRequest], on_output: Callable[[int, EngineOutput], None]
    ) -> None:
        in_flight = asyncio.Semaphore(self._max_num_seqs * len(self._replicas))
        limits = httpx.Limits(max_connections=None)

        async def send(number: int, request: EngineRequest) -> tuple[int, EngineOutput]:
            url, rank = self._replicas[number % len(self._replicas)]
            body = {
                "token_ids": list(request.token_ids),
                "sampling_params": request.params,
                "cache_salt": request.cache_salt,
                "model": request.adapter,
            }
            async with in_flight:
                try:
                    response = await client.post(
                        f"{url}/inference/v1/generate", json=body, headers={"X-data-parallel-rank": str(rank)}
                    )
                except httpx.HTTPError as error:
                    raise self._unreachable(url, f"{type(error).__name__}: {error}") from error
            answer = self._parse(url, response)
            return number, _output(answer, adapter=answer["model"] if request.adapter else None)

        async with httpx.AsyncClient(timeout=_TIMEOUT, trust_env=False, headers=self._headers, limits=limits) as client:
            tasks = [asyncio.create_task(send(number, request)) for number, request in enumerate(requests)]
            try:
                for task in asyncio.as_completed(tasks):
                    on_output(*await task)
            finally:  # after an exception; a server aborts a request when its client disconnects
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def sleep(self) -> None:
        """Do nothing: servers have their own memory."""

    def wake(self) -> None:
        pass

    def close(self) -> None:
        if self._server is None and self._adapter is not None:
            self._unload(self._adapter)
            self._adapter = None
        self._exits.close()

    def _post_all(self, path: str, body: dict | None = None) -> list[Any]:
        """Send the same request to all servers at once, and return their answers."""
        with ThreadPoolExecutor(len(self._urls)) as pool:
            return list(pool.map(lambda url: self._request("POST", url, path, body), self._urls))

    def _request(self, method: str, url: str, path: str, body: dict | None = None) -> Any:
        try:
            response = self._client.request(method, f"{url}/{path}", json=body)
        except httpx.HTTPError as error:
            raise self._unreachable(url, f"{path}: {type(error).__name__}: {error}") from error
        return self._parse(url, response)

    def _parse(self, url: str, response: httpx.Response) -> Any:
        if response.status_code == 404 and "does not exist" not in response.text:  # which it says of adapters
            raise EngineError(
                f"{url}: the server has no route {response.url.path}; start it with `tune run serve ... "
                f"takes_weights={self._transfer}`"
            )
        if response.status_code == 401:
            said = "refuses the key" if self._key else "wants a key"
            raise EngineError(f"{url}: {response.url.path}: 401: the server {said} in sampler.api_key_env")
        if response.is_error:
            said = redacted(response.text, [self._key])[:500]
            raise EngineError(f"{url}: {response.url.path}: {response.status_code}: {said}")
        is_text = response.url.path.endswith("_lora_adapter")
        return response.json() if response.content and not is_text else None

    def _unreachable(self, url: str, problem: str) -> EngineError:
        with suppress(subprocess.TimeoutExpired):
            if self._server is not None:
                self._server.process.wait(timeout=2)  # its supervisor ends shortly after it
                problem = f"the server has ended{self._server.log_end()}"
        return EngineError(f"{url}: {problem}")


def _output(answer: dict, adapter: str | None = None) -> EngineOutput:
    (choice,) = answer["choices"]
    logprobs = []
    for content in choice["logprobs"]["content"]:
        entries = (*content["top_logprobs"], content)
        logprobs.append({e["token_id"]: e["logprob"] if e["logprob"] > _MINUS_INFINITY else -math.inf for e in entries})
    details = (answer.get("usage") or {}).get("prompt_tokens_details") or {}
    return EngineOutput(
        token_ids=tuple(choice["token_ids"]),
        logprobs=tuple(logprobs),
        finish_reason=choice["finish_reason"],
        weight_versions=tuple(span["version"] for span in choice["weight_versions"] or ()),
        cached_tokens=details.get("cached_tokens"),
        adapter=adapter,
    )
