"""The part of a vLLM sampler that runs in vLLM's worker: loading weights, and checksums of the loaded weights.

vLLM imports this module by name, in this process or in those of a server, through two supported interfaces: a
weight-transfer backend and a worker extension.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rolltune.samplers.fingerprints import Piece
from rolltune.samplers.vllm_adapters import AdapterReader, accept_only_sent_adapters, adapter_problems
from rolltune.samplers.vllm_weights import WeightReader, record_packing

BACKEND = "rolltune_buckets"


@dataclass
class BucketsInit(WeightTransferInitInfo):
    """Empty: the transfer needs no set-up."""


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """A part of the weights of an update.

    Attributes:
        items: names and tensors, if trainer and engine are one process.
        path: otherwise, a safetensors file that both can read.
    """

    items: list[tuple[str, Tensor]] = field(default_factory=list)
    path: str | None = None


class BucketReceiver(WeightTransferEngine[BucketsInit, Bucket]):
    """Loads weights bucket by bucket, in checkpoint format, so that at most one bucket is in memory twice."""

    init_info_cls = BucketsInit
    update_info_cls = Bucket

    def init_transfer_engine(self, init_info: BucketsInit) -> None:
        pass

    def start_weight_update(self) -> None:
        initialize_layerwise_reload(self.model)

    def update_weights(self, update_info: dict) -> None:
        self.receive_weights(self.parse_update_info(update_info))
        if self.device.type != "cpu":
            torch.accelerator.synchronize()

    def receive_weights(self, update_info: Bucket) -> None:
        path = update_info.path
        self.model.load_weights(update_info.items if path is None else load_file(Path(path)).items())  # pyright: ignore

    def finish_weight_update(self) -> None:
        finalize_layerwise_reload(self.model, self.model_config)

    def shutdown(self) -> None:
        pass


WeightTransferEngineFactory.register_engine(BACKEND, __name__, BucketReceiver.__name__)
record_packing()
accept_only_sent_adapters()


class WorkerExtension:
    """Methods that vLLM adds to its worker. They are called through ``collective_rpc``."""

    def repack_tied_head(self) -> None:
        """Repack a tied LM head after a reload.

        On CPUs vLLM multiplies by packed copies of weights. A reload does not repack a tied head, which would keep the
        old weights.
        """
        head = getattr(self.model_runner.get_model(), "lm_head", None)  # pyright: ignore[reportAttributeAccessIssue]
        if head is not None and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

    def weight_fingerprints(self, version: str, shapes: str) -> dict[str, list[Piece]]:
        """Return the pieces of each weight that this worker holds, by its name in a checkpoint.

        A packed copy has its own entry, "name (packed)". vLLM's HTTP interface passes only strings.

        Args:
            version: the version's digits.
            shapes: JSON of :attr:`rolltune.samplers.fingerprints.Recorder.shapes`.
        """
        model: nn.Module = self.model_runner.get_model()  # pyright: ignore[reportAttributeAccessIssue]
        return WeightReader(model, int(version), json.loads(shapes)).pieces()

    def adapter_problems(self, rank: str, layers: str) -> list[str]:
        """Return why this worker cannot take an adapter.

        Args:
            rank: the adapter's rank, in digits.
            layers: JSON of the names of the adapted layers in a checkpoint.
        """
        manager = getattr(self.model_runner, "lora_manager", None)  # pyright: ignore[reportAttributeAccessIssue]
        if manager is None:
            return ["takes no adapters"]
        return list(adapter_problems(manager, int(rank), json.loads(layers)))

    def adapter_fingerprints(self, name: str, shapes: str) -> dict[str, list[Piece]]:
        """Return the pieces of an adapter in the slots of this worker, by the names of its matrices.

        Args:
            name: the adapter's.
            shapes: JSON of :attr:`rolltune.samplers.fingerprints.Recorder.shapes`.
        """
        manager = self.model_runner.lora_manager  # pyright: ignore[reportAttributeAccessIssue]
        return AdapterReader(manager, json.loads(shapes)).pieces(name)
