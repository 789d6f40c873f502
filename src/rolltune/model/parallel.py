"""Sharded training with PyTorch's FSDP2: a process holds a slice of every weight, its gradient and its optimizer state.

The weights of a layer are gathered for its forward pass and again for its backward pass. Gradients are summed over the
processes and cut back to slices. Only this module knows FSDP; its functions leave tensors and models that are not
sharded as they are.

A pass of a sharded model communicates. So all processes must make the same passes in the same order, and a process with
fewer microbatches makes up for them with :func:`idle_microbatches`. Sampling has another number of passes on each
process; it runs on weights that are :func:`gathered` once, and does not communicate.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import HashStore  # pyright: ignore[reportPrivateImportUsage]
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel
from transformers.modeling_layers import GradientCheckpointingLayer

from rolltune.batch import TokenSequence, TrainGroup, pack_examples
from rolltune.errors import RunStopped
from rolltune.model import hollow
from rolltune.model.forward import forward_of, packed_logprobs
from rolltune.model.hollow import source_of
from rolltune.types import Microbatch, Prompt

REPLICATE, SHARD = "replicate", "shard"  # dimensions of the mesh of processes
_LOGPROBS = "rolltune_logprobs"  # name of packed_logprobs as a method of a sharded model


def make_mesh(device: torch.device, shard: int | None) -> DeviceMesh:
    """Arrange the processes in rows, each of which shares one copy of the weights; all processes call this.

    Args:
        device: device of this process.
        shard: processes that share one copy, a divisor of their number; None: all.
    """
    if not dist.is_initialized():  # one process that torchrun has not started
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    size = dist.get_world_size()
    shard = shard or size
    return init_device_mesh(device.type, (size // shard, shard), mesh_dim_names=(REPLICATE, SHARD))


def unshardable(model: PreTrainedModel) -> str | None:
    """Return why a model cannot be sharded; None if it can.

    Models that are not trained packed make several passes per microbatch, whose number depends on the sequences.
    """
    forward = forward_of(model)
    if forward.packed and forward.plain_head and forward.rope_limit is None:
        return None
    return f"{type(model).__name__} makes several passes per microbatch: {forward.note}"


def shard_model(
    model: PreTrainedModel, mesh: DeviceMesh, *, compute_dtype: torch.dtype | None = None, cpu_offload: bool = False
) -> None:
    """Shard a causal LM in place, layer by layer; all processes call this, with the same weights.

    Each process reads the slices of a hollow model (:mod:`rolltune.model.hollow`) from its files.

    Embeddings, LM head and whatever else is outside of the layers form the last group. The head may be tied to the
    embeddings, so both must be in one group, and the root must be the causal LM.

    Args:
        model: on its device, or hollow; not the wrapper of peft.
        mesh: see :func:`make_mesh`.
        compute_dtype: dtype of weights in passes. Slices of trained weights are float32 then, and gradients are summed
            in float32. None: all weights keep their dtypes.
        cpu_offload: keep slices, gradients and optimizer state in host memory.
    """
    precision = MixedPrecisionPolicy(cast_forward_inputs=False)
    if compute_dtype is not None:
        precision = MixedPrecisionPolicy(compute_dtype, torch.float32, cast_forward_inputs=False)
    offload = CPUOffloadPolicy(pin_memory=mesh.device_type == "cuda") if cpu_offload else OffloadPolicy()
    if source := source_of(model):
        hollow.to_meta(model)
    for module in [*_layers(model), model]:
        if compute_dtype is not None:
            _to_float32(module)  # one group at a time, so that the whole model never is float32
        group = fully_shard(
            module,
            mesh=mesh if mesh[REPLICATE].size() > 1 else mesh[SHARD],
            mp_policy=precision,
            offload_policy=offload,
            reshard_after_forward=True,  # also the root's: outside of a pass, parameters are slices
        )
        # A sum, as losses are divided by global totals; gloo has no other way to leave out the division.
        group.set_force_sum_reduction_for_comms(True)
        group.set_gradient_divide_factor(1.0)
        group.set_reduce_scatter_unused_params(True, recurse=False)  # such as experts that got no token on some process
    if source:
        hollow.fill(model, source, torch.device("cpu" if cpu_offload else mesh.device_type))
    setattr(model, _LOGPROBS, partial(packed_logprobs, model))
    register_fsdp_forward_method(model, _LOGPROBS)


def _layers(model: PreTrainedModel) -> list[nn.Module]:
    """Return the layers of a model; those inside of another layer are part of it."""
    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    inner = {id(module) for layer in layers for module in layer.modules() if module is not layer}
    return [layer for layer in layers if id(layer) not in inner]


def _to_float32(module: nn.Module) -> None:
    for parameter in module.parameters():
        if parameter.requires_grad and not isinstance(parameter, DTensor):
            parameter.data = parameter.data.float()


def logprobs(model: PreTrainedModel, microbatch: Microbatch, *, temperature: float) -> tuple[Tensor, Tensor]:
    """Compute :func:`rolltune.model.forward.packed_logprobs` with a model that may be sharded."""
    compute = getattr(model, _LOGPROBS, None) or partial(packed_logprobs, model)
    return compute(microbatch, temperature=temperature)


@contextmanager
def gathered(model: PreTrainedModel) -> Iterator[None]:
    """Hold the whole weights on each process, for passes without gradients that do not communicate.

    All processes enter together. They may leave when they want.
    """
    groups = [module for module in model.modules() if isinstance(module, FSDPModule)]
    for group in groups:
        group.set_reshard_after_forward(False, recurse=False)
        group.unshard()
    try:
        yield
    finally:
        for group in groups:
            group.reshard()
            group.set_reshard_after_forward(True, recurse=False)


def gather_ends(model: PreTrainedModel) -> None:
    """Hold embeddings and LM head of a sharded model on each process from now on; all processes call this."""
    assert isinstance(model, FSDPModule)
    model.set_reshard_after_forward(False, recurse=False)
    model.unshard()


def idle_microbatches(phase: str, count: int, device: torch.device) -> list[Microbatch]:
    """Return what this process computes, to no effect, while others still have microbatches: one token each.

    Args:
        phase: name of the passes that follow; all processes must be at the same.
        count: microbatches of this process.
        device: where the tensors go.

    Raises:
        RunStopped: a process is at another phase, which would be a hang.
    """
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (phase, count))
    others = sorted({name for name, _ in everyone})
    if len(others) > 1:
        raise RunStopped(f"the processes are at different passes of a sharded model: {', '.join(others)}")
    example = TrainGroup(prompt=Prompt(token_ids=(0,)), sequences=(TokenSequence(token_ids=(0,)),))
    return pack_examples([example], max_tokens=1, device=device) * (max(n for _, n in everyone) - count)


# --- tensors ----------------------------------------------------------------------------------------------------------


def is_sharded(tensors: Iterable[Tensor]) -> bool:
    return any(isinstance(tensor, DTensor) for tensor in tensors)


def local(tensor: Tensor) -> Tensor:
    """Return this process's slice of a tensor."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor as a whole; all processes call this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def slice_like(tensor: Tensor, parameter: Tensor) -> Tensor:
    """Return this process's slice of a whole tensor, cut as a parameter of the same shape is."""
    if not isinstance(parameter, DTensor) or tensor.shape != parameter.shape:
        return tensor
    tensor = tensor.to(parameter.to_local().device)
    return distribute_tensor(tensor, parameter.device_mesh, parameter.placements, src_data_rank=None)


def collect(tree: Any) -> Any:
    """Replace the slices in nested containers by whole tensors on the CPU, on rank 0; all processes call this.

    Other processes get empty tensors in their place.
    """

    def on_rank_0(tensor: DTensor) -> Tensor:
        everything = tensor.full_tensor()
        return everything.cpu() if dist.get_rank() == 0 else everything.new_empty(0)

    return tree_map_only(DTensor, on_rank_0, tree)


def replica(mesh: DeviceMesh) -> int:
    """Return the number of the copy of the weights that this process has a slice of."""
    return mesh.get_local_rank(REPLICATE)
