"""Checksums of the weights in a vLLM worker, by the names of a checkpoint. Runs in vLLM's worker process.

vLLM renames weights, fuses them (q, k and v; gate and up; the experts of a layer), pads them, splits them between
tensor-parallel workers, and packs some for its kernels. Each part of a checkpoint's weight that this worker holds
becomes one :class:`~rolltune.samplers.fingerprints.Piece`.

Packing cannot be undone. So :func:`record_packing` has vLLM take the checksums of a weight just before it packs it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers import utils as vllm_layers
from vllm.model_executor.layers.fused_moe.routed_experts import RoutedExperts
from vllm.model_executor.layers.fused_moe.unquantized_fused_moe_method import UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import RowParallelLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.model_executor.models.utils import WeightsMapper

from rolltune.samplers.fingerprints import (
    PACKED,
    Piece,
    Shapes,
    checksum,
    column_sums,
    dtype_name,
    row_sums,
    sampled_columns,
)

_RECORD = "_rolltune_record"  # attribute of a module: {parameter: its _Held before it was packed}


@dataclass(frozen=True, kw_only=True, slots=True)
class _Held:
    """Row sums of a parameter of vLLM, or of one expert's matrix in it.

    Attributes:
        sums: int64 [R], or [E, R] of all experts.
        dtype: of the values.
        column: index of the first column in the whole weight.
        width: number of columns.
        label: ends the name of its fingerprint.
    """

    sums: Tensor
    dtype: str
    column: int
    width: int
    label: str = ""


class WeightReader:
    """Reads the pieces of the policy's weights that a worker holds."""

    def __init__(self, model: nn.Module, version: int, shapes: Shapes):
        """
        Args:
            model: vLLM's.
            version: selects the columns that are compared of packed copies.
            shapes: dtype and shape of each weight of the policy.
        """
        self._model = model
        self._version = version
        self._shapes = shapes
        self._parts = checkpoint_names(model, shapes)

    def pieces(self) -> dict[str, list[Piece]]:
        """Return the pieces of each weight that this worker holds; those of packed copies as "name (packed)"."""
        parts = [
            (name + held.label, held, rows, row)
            for parameter, module, held in self._held()
            for name, rows, row in self._split(parameter, module, held.sums)
        ]
        sums = torch.stack([checksum(rows, row) for _, _, rows, row in parts]).tolist()  # read all at once
        pieces: dict[str, list[Piece]] = defaultdict(list)
        for (key, held, rows, row), value in zip(parts, sums, strict=True):
            pieces[key].append(Piece(held.dtype, row, held.column, len(rows) * held.width, value))
        return dict(pieces)

    def _held(self) -> Iterator[tuple[str, nn.Module, _Held]]:
        """Yield (vLLM's name, module, row sums) of each parameter, expert and packed copy."""
        for path, module in self._model.named_modules():
            path = path.removesuffix(".base_layer")  # of a layer that may have a LoRA adapter
            tensors = dict(module.named_parameters(recurse=False))
            tensors |= {n: t for n, t in module.named_buffers(recurse=False) if f"{path}.{n}" in self._parts}
            for name, tensor in tensors.items():
                if isinstance(module, RoutedExperts) and name.startswith(("w13_", "w2_")):
                    yield from _experts(path, module, name)
                    continue
                if tensor.numel():
                    yield f"{path}.{name}", module, _read(module, self._as_sent(f"{path}.{name}", tensor))
                elif name in getattr(module, _RECORD, {}):
                    yield f"{path}.{name}", module, getattr(module, _RECORD)[name]
                if name == "weight" and hasattr(module, "cpu_linear"):
                    yield f"{path}.{name}", module, _read_packed(module, tensor.dtype, self._version)

    def _as_sent(self, name: str, tensor: Tensor) -> Tensor:
        """Return a tensor in the precision that it was sent in, if vLLM keeps it in a higher one."""
        sent = self._shapes[self._parts[name][0]][0] if name in self._parts else dtype_name(tensor)
        if sent == dtype_name(tensor):
            return tensor
        lowered = tensor.to(getattr(torch, sent))
        return lowered if torch.equal(lowered.to(tensor.dtype), tensor) else tensor

    def _split(self, name: str, module: nn.Module, sums: Tensor) -> Iterator[tuple[str, Tensor, int]]:
        """Yield (checkpoint's name, row sums, index of the first row) of each part of a fused parameter."""
        names = self._parts.get(name, [name])
        if isinstance(module, VocabParallelEmbedding):
            indices = module.shard_indices
            yield names[0], sums[: indices.num_org_elements], indices.org_vocab_start_index  # the rest is padding
            return
        sizes = [len(sums)] if len(names) == 1 else list(module.output_partition_sizes)  # pyright: ignore
        for part, rows in zip(names, sums.split(sizes), strict=True):
            whole = self._shapes[part][1] if part in self._shapes else ()
            yield part, rows, _first_row(module, len(rows), whole[0] if whole else len(rows))


def checkpoint_names(model: nn.Module, names: Mapping[str, object]) -> dict[str, list[str]]:
    """Return the names in a checkpoint of the parts of each of vLLM's parameters, in the order of the parameter's rows.

    An expert's matrix counts as a parameter; its name has vLLM's prefix and the checkpoint's end.
    """
    mapper = getattr(model, "hf_to_vllm_mapper", None) or WeightsMapper()
    fused = {  # of models whose mapper renames only; others have their parts in both
        part: whole
        for whole, parts in getattr(model, "packed_modules_mapping", {}).items()
        for part in parts
        if part != whole
    }
    order = [*mapper.orig_to_new_stacked, *(f".{part}." for part in fused)]
    parts: dict[str, list[str]] = defaultdict(list)
    for name in names:
        target = mapper.map_name(name)
        path, _, last = (target or "").rpartition(".")
        parent, _, module = path.rpartition(".")
        if target is not None:
            parts[f"{parent}.{fused[module]}.{last}" if module in fused else target].append(name)
    for held in parts.values():
        held.sort(key=lambda name: next((i for i, part in enumerate(order) if part in name), 0))
    return dict(parts)


def record_packing() -> None:
    """From now on, take the checksums of each weight that vLLM packs before it does so.

    Without this, a packed weight could be compared by a few columns only. Also packs experts again after a reload: on
    CPUs vLLM 0.32 packs them only the first time, and would compute with numbers in the wrong order.
    """
    dispatch, set_up = vllm_layers.dispatch_cpu_unquantized_gemm, UnquantizedFusedMoEMethod._setup_kernel

    def recorded_dispatch(layer: nn.Module, remove_weight: bool) -> None:
        if remove_weight and layer.weight.ndim == 2 and not layer.weight.is_meta:  # pyright: ignore
            setattr(layer, _RECORD, {"weight": _read(layer, layer.weight)})  # pyright: ignore
        dispatch(layer, remove_weight)

    def recorded_set_up(method: UnquantizedFusedMoEMethod, layer: RoutedExperts, w13: Tensor, w2: Tensor) -> None:
        before = {name: _read_experts(layer, name, values) for name, values in (("w13_weight", w13), ("w2_weight", w2))}
        is_reload = method.moe_kernel is not None
        set_up(method, layer, w13, w2)
        if is_reload and w13.device.type == "cpu":
            method.moe_kernel.fused_experts.process_weights_after_loading(layer)  # pyright: ignore
        setattr(layer, _RECORD, {name: held for name, held in before.items() if _is_packed(layer, name, held)})

    vllm_layers.dispatch_cpu_unquantized_gemm = recorded_dispatch
    UnquantizedFusedMoEMethod._setup_kernel = recorded_set_up  # pyright: ignore[reportAttributeAccessIssue]


def _read(module: nn.Module, values: Tensor) -> _Held:
    width = values[0].numel() if values.ndim else 1
    column = module.tp_rank * width if isinstance(module, RowParallelLinear) and values.ndim == 2 else 0
    return _Held(sums=row_sums(values.reshape(-1, width), column), dtype=dtype_name(values), column=column, width=width)


def _read_packed(module: nn.Module, dtype: torch.dtype, version: int) -> _Held:
    """Read columns of a packed copy of a matrix: the kernel's products with unit rows."""
    names = ("embedding_dim", "input_size_per_partition", "input_size")  # of vocabularies, split layers, other layers
    width = next(getattr(module, name) for name in names if hasattr(module, name))
    rank, size = (module.tp_rank, module.tp_size) if isinstance(module, RowParallelLinear) else (0, 1)
    columns = sampled_columns(size * width, version)
    columns = columns[(columns >= rank * width) & (columns < (rank + 1) * width)]
    unit_rows = nn.functional.one_hot(columns - rank * width, width).to(dtype)
    values = module.quant_method.apply(module, unit_rows, None).T  # pyright: ignore
    return _Held(
        sums=column_sums(values, columns),
        dtype=dtype_name(values),
        column=rank * width,
        width=len(columns),
        label=PACKED,
    )


def _experts(path: str, layer: RoutedExperts, name: str) -> Iterator[tuple[str, nn.Module, _Held]]:
    """Yield (name, module, row sums) of each matrix or bias of this worker's experts, without padding."""
    held = getattr(layer, _RECORD, {}).get(name) or _read_experts(layer, name, getattr(layer, name))
    prefix, (fused, _, last) = path.removesuffix(".routed_experts"), name.partition("_")
    inner, hidden = _expert_sizes(layer)
    if fused == "w2":
        matrices = {layer.ckpt_down_proj_name: held.sums[:, :hidden]}
    elif layer.ckpt_up_proj_name is None:
        matrices = {layer.ckpt_gate_proj_name: held.sums[:, :inner]}
    else:
        gates, ups = held.sums.chunk(2, dim=1)
        matrices = {layer.ckpt_gate_proj_name: gates[:, :inner], layer.ckpt_up_proj_name: ups[:, :inner]}
    for expert in range(layer.global_num_experts):
        if (local := layer._map_global_expert_id_to_local_expert_id(expert)) >= 0:
            for matrix, sums in matrices.items():
                yield f"{prefix}.{expert}.{matrix}.{last}", layer, replace(held, sums=sums[local])


def _read_experts(layer: RoutedExperts, name: str, values: Tensor) -> _Held:
    """Read the matrices [E, R, C] or biases [E, R] of all experts, without the padding of columns."""
    is_down = name == "w2_weight"
    values = values if values.ndim == 3 else values[..., None]
    width = min(_expert_sizes(layer)[0 if is_down else 1], values.shape[2])
    column = layer.moe_config.moe_parallel_config.tp_rank * width if is_down else 0
    sums = row_sums(values[..., :width].reshape(-1, width), column)
    return _Held(sums=sums.view(values.shape[:2]), dtype=dtype_name(values), column=column, width=width)


def _expert_sizes(layer: RoutedExperts) -> tuple[int, int]:
    """Return (features between an expert's matrices in this worker, features of its input), without padding."""
    config = layer.moe_config
    inner, hidden = config.intermediate_size_per_partition_unpadded, config.hidden_dim_unpadded
    assert inner is not None and hidden is not None
    return inner, hidden


def _is_packed(layer: RoutedExperts, name: str, before: _Held) -> bool:
    """Whether vLLM has put other bits, or the same in another order, into a parameter."""
    values = getattr(layer, name)
    is_alike = values.ndim == 3 and values.shape[:2] == before.sums.shape and values.shape[2] >= before.width
    return not (is_alike and torch.equal(_read_experts(layer, name, values).sums, before.sums))


def _first_row(module: nn.Module, count: int, whole: int) -> int:
    """Return the index of a part's first row in a weight of ``whole`` rows that is split between workers.

    Several workers hold the same rows of keys and values if there are fewer heads than workers.
    """
    if count >= whole:
        return 0
    if isinstance(module, RoutedExperts):
        parallel = module.moe_config.moe_parallel_config
        rank, size = parallel.tp_rank, parallel.tp_size
    else:
        rank = getattr(module, "tp_rank", get_tensor_model_parallel_rank())
        size = getattr(module, "tp_size", get_tensor_model_parallel_world_size())
    copies = max(1, size * count // whole)
    return rank // copies * count
