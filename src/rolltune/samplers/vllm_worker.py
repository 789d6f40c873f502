"""The part of a vLLM sampler that lives where vLLM has its model: loading weights, and showing what was loaded.

vLLM imports this module by name, in this process or in those of a server. Both are by its supported ways in: a
weight-transfer backend, and an extension of the worker.
"""

from __future__ import annotations

from collections.abc import Iterator
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
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

from rolltune.samplers.fingerprints import chosen, fingerprint

BACKEND = "rolltune_buckets"


@dataclass
class BucketsInit(WeightTransferInitInfo):
    """Nothing has to be agreed on."""


@dataclass
class Bucket(WeightTransferUpdateInfo):
    """Some weights of an update.

    Attributes:
        items: names and tensors, where trainer and engine are one process.
        path: else a safetensors file that both can read.
    """

    items: list[tuple[str, Tensor]] = field(default_factory=list)
    path: str | None = None


class BucketReceiver(WeightTransferEngine[BucketsInit, Bucket]):
    """Loads weights bucket by bucket, in checkpoint format: what is held twice is one bucket at most."""

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


class WorkerExtension:
    """Methods that vLLM adds to its worker, called through ``collective_rpc``."""

    def repack_tied_head(self) -> None:
        """On CPUs vLLM multiplies by packed copies of weights, and a reload leaves out that of a tied LM head, which
        then goes on with the old weights."""
        head = getattr(self.model_runner.get_model(), "lm_head", None)  # pyright: ignore[reportAttributeAccessIssue]
        if head is not None and hasattr(head, "cpu_linear"):
            head.quant_method.process_weights_after_loading(head)

    def weight_fingerprints(self, version: str) -> dict[str, str]:
        """Of every weight, by its name in a checkpoint; a packed copy has an entry of its own, "name (packed)".

        Args:
            version: a number in digits, as vLLM's HTTP interface passes strings alone.
        """
        model: nn.Module = self.model_runner.get_model()  # pyright: ignore[reportAttributeAccessIssue]
        fused = getattr(model, "packed_modules_mapping", {})
        prints: dict[str, str] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                for label, value in _readings(module, name, parameter, int(version)):
                    for part, rows in _unfuse(path, module, value, fused):
                        key = f"{part}.{name}{label}"
                        prints[key] = fingerprint(rows)
        return prints


def _readings(module: nn.Module, name: str, parameter: Tensor, version: int) -> Iterator[tuple[str, Tensor]]:
    """What can be seen of a parameter: columns [N, C] of a matrix, all of a vector; and the packed copy's columns."""
    packed = hasattr(module, "cpu_linear") and name == "weight"
    if hasattr(module, "cpu_linear") and name == "bias":
        parameter = parameter.to(module.params_dtype)  # pyright: ignore  some kernels for CPUs have made it fp32
    if parameter.numel():
        matrix = parameter.ndim == 2
        yield "", parameter[:, chosen(parameter.shape[1], version)] if matrix else parameter
    if packed:
        width = module.embedding_dim if isinstance(module, VocabParallelEmbedding) else module.input_size_per_partition
        columns = chosen(int(width), version)  # pyright: ignore[reportArgumentType]
        rows = torch.zeros(len(columns), int(width), dtype=parameter.dtype)  # pyright: ignore[reportArgumentType]
        rows[range(len(columns)), columns] = 1.0
        method = module.quant_method
        yield " (packed)", method.apply(module, rows, None).T  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def _unfuse(path: str, module: nn.Module, value: Tensor, fused: dict[str, list[str]]) -> Iterator[tuple[str, Tensor]]:
    """The rows of each weight of a checkpoint that vLLM has put into one, with its module's name there."""
    parent, _, last = path.rpartition(".")
    parts = fused.get(last, [])
    if isinstance(module, VocabParallelEmbedding):
        yield path, value[: module.org_vocab_size]  # the rest is padding
    elif len(parts) > 1:
        for part, rows in zip(parts, value.split(module.output_partition_sizes), strict=True):  # pyright: ignore
            yield f"{parent}.{part}", rows
    else:
        yield path, value
