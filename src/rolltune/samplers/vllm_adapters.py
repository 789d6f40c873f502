"""LoRA adapters in a vLLM worker: loading those that a run has sent, and checksums of the slots that they are in.

Runs in vLLM's worker process. The trainer only calls :func:`write_adapter`, so vLLM is imported where it is used.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from rolltune.model.adapter import A, B
from rolltune.samplers.fingerprints import Piece, Shapes, checksum, dtype_name, row_sums

if TYPE_CHECKING:
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA
    from vllm.lora.worker_manager import WorkerLoRAManager

_NAME = "rolltune_adapter"  # key of a file's metadata


def write_adapter(path: Path, tensors: Mapping[str, Tensor], name: str) -> None:
    """Write the matrices of an adapter to a file that :func:`read_adapter` reads under the same name."""
    save_file({key: tensor.contiguous() for key, tensor in tensors.items()}, path, metadata={_NAME: name})


def read_adapter(path: str, name: str) -> dict[str, Tensor]:
    """Read the matrices of an adapter that a run has written.

    Raises:
        ValueError: the path is not that of a file, or the file is not that of an adapter of this name.
    """
    try:
        if not Path(path).is_absolute():
            raise ValueError("the path is not absolute")
        with safe_open(path, framework="pt") as file:  # no folders, no Hub ids, no pickles
            if (file.metadata() or {}).get(_NAME) != name:
                raise ValueError("the file was not written by a run under this name")
            return {key: file.get_tensor(key) for key in file.keys()}
    except (OSError, SafetensorError, ValueError) as error:
        raise ValueError(f"adapter {name}: {path}: {error}") from error


def accept_only_sent_adapters() -> None:
    """Let vLLM's workers load adapters that :func:`write_adapter` has written, and no others.

    vLLM itself would read any folder, or download from the Hub, for whoever may load adapters.
    """
    from vllm.lora.worker_manager import WorkerLoRAManager

    WorkerLoRAManager._load_adapter = _load  # pyright: ignore[reportAttributeAccessIssue]


def _load(manager: WorkerLoRAManager, request: Any) -> Any:
    """Read an adapter as vLLM does, but from :func:`read_adapter`. B contains the scale, so vLLM's is 1."""
    from vllm.lora.peft_helper import PEFTHelper

    tensors = read_adapter(request.lora_path, request.lora_name)
    rank = max(len(tensor) for name, tensor in tensors.items() if name.endswith(A))
    helper = PEFTHelper(r=rank, lora_alpha=rank, target_modules=[])
    helper.validate_legal(manager.lora_config)
    lora = manager._lora_model_cls.from_lora_tensors(
        request.lora_int_id,
        tensors,
        helper,
        device="cpu",
        dtype=manager.lora_config.lora_dtype,  # pyright: ignore[reportArgumentType]
        weights_mapper=_mapper(manager),
    )
    lora.name = request.lora_name  # pyright: ignore[reportAttributeAccessIssue]
    return lora


def adapter_problems(manager: WorkerLoRAManager, rank: int, layers: Sequence[str]) -> Iterator[str]:
    """Yield why a worker cannot take an adapter of this rank on these layers, named as in a checkpoint."""
    config, slots = manager.lora_config, _slots(manager)
    if rank > config.max_lora_rank:
        yield f"takes adapters of rank {config.max_lora_rank} at most, not {rank}"
    unserved = sorted({layer.rpartition(".")[2] for layer in layers if _vllm_name(manager, layer) not in slots})
    if unserved:
        yield f"has no place for adapters on {', '.join(unserved)}"
    if config.fully_sharded_loras:
        yield "splits adapters by --fully-sharded-loras, which cannot be checked"


class AdapterReader:
    """Reads the pieces of an adapter that a worker holds."""

    def __init__(self, manager: WorkerLoRAManager, shapes: Shapes):
        """
        Args:
            manager: vLLM's.
            shapes: dtype and shape of each matrix of the adapter.
        """
        self._manager = manager
        self._shapes = shapes

    def pieces(self, name: str) -> dict[str, list[Piece]]:
        """Return the pieces of each matrix of an adapter, and those of other slots that are not empty."""
        manager = self._manager._adapter_manager
        numbers = [number for number, lora in manager.list_adapters().items() if getattr(lora, "name", "") == name]
        if not numbers:
            return {}
        manager.activate_adapter(numbers[0])  # another run's may have taken its slot
        slot = manager.lora_index_to_id.index(numbers[0])
        names = [key.removesuffix(A) for key in self._shapes if key.endswith(A)]
        layers = {_vllm_name(self._manager, name): name for name in names}
        parts = []
        for held, (layer, index) in _slots(self._manager).items():
            for end, piece, sums in _read(layer, index, slot):
                parts.append((layers.get(held, held) + end, piece, sums))
        sums = torch.stack([checksum(sums, piece.row) for _, piece, sums in parts]).tolist()  # read all at once
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for (key, piece, _), value in zip(parts, sums, strict=True):
            if key in self._shapes:
                rank = self._shapes[key][1][0 if key.endswith(A) else 1]
                pieces[key].append(piece._replace(count=piece.count * rank, checksum=value))
            elif value:
                pieces[key].append(piece._replace(checksum=value))
        return dict(pieces)


def _read(layer: BaseLinearLayerWithLoRA, index: int, slot: int) -> Iterator[tuple[str, Piece, Tensor]]:
    """Yield (end of the name, piece, row sums) of A and B in a slot.

    The rows of A and the columns of B after the adapter's rank are zeros, which add nothing to a checksum. The pieces'
    counts leave the rank out.
    """
    a, b = layer.lora_a_stacked[index][slot, 0], layer.lora_b_stacked[index][slot, 0]
    row, column = _first(layer, index, len(b), a.shape[1])
    yield A, Piece(dtype_name(a), 0, column, a.shape[1], 0), row_sums(a, column)
    yield B, Piece(dtype_name(b), row, 0, len(b), 0), row_sums(b)


def _first(layer: BaseLinearLayerWithLoRA, index: int, rows: int, columns: int) -> tuple[int, int]:
    """Return the indices of this worker's first row of B, and first column of A, in the whole matrices."""
    from vllm.model_executor.layers.linear import ColumnParallelLinear, RowParallelLinear

    if isinstance(layer.base_layer, RowParallelLinear):
        return 0, layer.tp_rank * columns
    if isinstance(layer.base_layer, ColumnParallelLinear):
        parts = getattr(layer, "output_ids", (layer.tp_rank,))  # of q, k and v: several workers may hold the same heads
        return parts[index] * rows, 0
    return 0, 0


def _slots(manager: WorkerLoRAManager) -> dict[str, tuple[BaseLinearLayerWithLoRA, int]]:
    """Return {vLLM's name of a linear layer that may be a part of a fused one: (the fused layer, index of the part)}.

    Layers whose parts vLLM splits in another way than checkpoints are left out.
    """
    from vllm.lora.layers.base_linear import BaseLinearLayerWithLoRA

    adapters = manager._adapter_manager
    slots = {}
    for path, layer in adapters.modules.items():
        parts = adapters.packed_modules.get(path) or [path]
        is_split = layer.tp_size > 1 and getattr(layer, "is_merged_col_linear", False) and len(parts) == 1
        if isinstance(layer, BaseLinearLayerWithLoRA) and layer.n_slices == len(parts) and not is_split:
            slots |= {part: (layer, index) for index, part in enumerate(parts)}
    return slots


def _vllm_name(manager: WorkerLoRAManager, layer: str) -> str:
    """Return vLLM's name of a layer of a checkpoint, before it is fused with others."""
    from vllm.lora.utils import parse_fine_tuned_lora_name

    return parse_fine_tuned_lora_name(layer + A, _mapper(manager))[0]


def _mapper(manager: WorkerLoRAManager) -> Any:
    mapper = getattr(manager._adapter_manager.model, "hf_to_vllm_mapper", None)
    return mapper and mapper.get_rename_mapper()
