"""The part of a vLLM sampler that runs in vLLM's worker: loading weights, and fingerprints of the loaded weights.

vLLM imports this module by name, in this process or in those of a server, through two supported interfaces: a
weight-transfer backend and a worker extension.
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

from rolltune.samplers.fingerprints import fingerprint, sampled_columns

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

    def weight_fingerprints(self, version: str) -> dict[str, str]:
        """Return the fingerprint of every weight by its name in a checkpoint.

        A packed copy has its own entry, "name (packed)".

        Args:
            version: the version's digits, because vLLM's HTTP interface passes only strings.
        """
        model: nn.Module = self.model_runner.get_model()  # pyright: ignore[reportAttributeAccessIssue]
        fused = getattr(model, "packed_modules_mapping", {})
        prints: dict[str, str] = {}
        for path, module in model.named_modules():
            for name, parameter in module.named_parameters(recurse=False):
                for label, values in _compared_values(module, name, parameter, int(version)):
                    for part, part_values in _unfuse(path, module, values, fused):
                        prints[f"{part}.{name}{label}"] = fingerprint(part_values)
        return prints


def _compared_values(module: nn.Module, name: str, parameter: Tensor, version: int) -> Iterator[tuple[str, Tensor]]:
    """Yield (label, values): columns [N, C] of a matrix or a whole vector, and the columns of a packed copy."""
    packed = hasattr(module, "cpu_linear") and name == "weight"
    if hasattr(module, "cpu_linear") and name == "bias":
        parameter = parameter.to(module.params_dtype)  # pyright: ignore  some CPU kernels convert it to fp32
    if parameter.numel():
        matrix = parameter.ndim == 2
        yield "", parameter[:, sampled_columns(parameter.shape[1], version)] if matrix else parameter
    if packed:
        width = module.embedding_dim if isinstance(module, VocabParallelEmbedding) else module.input_size_per_partition
        columns = sampled_columns(int(width), version)  # pyright: ignore[reportArgumentType]
        unit_rows = torch.zeros(len(columns), int(width), dtype=parameter.dtype)  # pyright: ignore[reportArgumentType]
        unit_rows[range(len(columns)), columns] = 1.0
        method = module.quant_method
        yield " (packed)", method.apply(module, unit_rows, None).T  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]


def _unfuse(path: str, module: nn.Module, values: Tensor, fused: dict[str, list[str]]) -> Iterator[tuple[str, Tensor]]:
    """Split a weight that vLLM has fused into those of the checkpoint, with the names of their modules there."""
    parent, _, last = path.rpartition(".")
    parts = fused.get(last, [])
    if isinstance(module, VocabParallelEmbedding):
        yield path, values[: module.org_vocab_size]  # the rest is padding
    elif len(parts) > 1:
        for part, part_values in zip(parts, values.split(module.output_partition_sizes), strict=True):  # pyright: ignore
            yield f"{parent}.{part}", part_values
    else:
        yield path, values
