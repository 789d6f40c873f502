"""Models whose weights take no memory until they are sharded. Each process then reads its own slices from the files.

A hollow model has its modules, names, shapes, dtypes and buffers, so adapters can be put on it. Each weight is a view
of one number. :func:`rolltune.model.parallel.shard_model` replaces the weights by slices and fills them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file, get_checkpoint_shard_files


@dataclass(frozen=True, kw_only=True)
class Source:
    """Where the weights of a hollow model are.

    Attributes:
        path: folder or Hub id.
        files: the file of each tensor, by its name.
        dtype: dtype of the model's weights.
    """

    path: str
    files: dict[str, str]
    dtype: torch.dtype


def source_of(model: PreTrainedModel) -> Source | None:
    """Return where the weights of a hollow model are; None for a model that has them."""
    return getattr(model, "rolltune_source", None)


def hollow_model(auto_class: Any, config: PreTrainedConfig, path: str, dtype: torch.dtype) -> PreTrainedModel | None:
    """Build a model without its weights; None if transformers has to load it.

    That is so where its weights are not in safetensors files under the names and in the layout that the model has (as
    the experts of most mixtures), or where these files hold other state, or where it keeps some weights in another
    precision.

    Args:
        auto_class: class of transformers that builds the model from its config.
        config: of the model.
        path: folder or Hub id of the weights.
        dtype: dtype of the weights.
    """
    files = _tensor_files(path)
    if files is None or hasattr(config, "quantization_config"):
        return None
    with init_empty_weights(include_buffers=False):
        model = auto_class.from_config(config, dtype=dtype)
    _replace_parameters(model, lambda parameter: torch.zeros((), dtype=parameter.dtype).expand(parameter.shape))
    model.tie_weights()
    shapes = {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - shapes.keys()
    persistent = model.state_dict().keys() - shapes.keys() - tied
    is_mixed = model._keep_in_fp32_modules_strict and dtype != torch.float32
    if persistent or is_mixed or tied & files.keys() or () in shapes.values():
        return None
    if shapes != {name: tuple(tensor.get_shape()) for name, tensor in _stored(files, shapes.keys() & files.keys())}:
        return None
    model.name_or_path = path
    if _file(path, "generation_config.json"):
        model.generation_config = GenerationConfig.from_pretrained(path)
    object.__setattr__(model, "rolltune_source", Source(path=path, files=files, dtype=dtype))
    return model.eval()


def _tensor_files(path: str) -> dict[str, str] | None:
    """Return the safetensors file of each tensor of a folder or Hub id, by name; None if there are no such files."""
    found: dict[str, str] = {}
    if single := _file(path, SAFE_WEIGHTS_NAME):
        files = [single]
    elif index := _file(path, SAFE_WEIGHTS_INDEX_NAME):
        files, _ = get_checkpoint_shard_files(path, index)
    else:
        return None
    for file in files or ():
        with safe_open(file, "pt") as tensors:
            found |= dict.fromkeys(tensors.keys(), file)
    return found


def _file(path: str, name: str) -> str | None:
    """Return the place of a file of a folder or Hub id; None if it has no such file."""
    return cached_file(path, name, _raise_exceptions_for_missing_entries=False)


def _stored(files: dict[str, str], names: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Yield name and tensor of what the files hold. A tensor is read only when it is sliced."""
    with ExitStack() as stack:
        opened = {file: stack.enter_context(safe_open(file, "pt")) for file in {files[name] for name in names}}
        for name in names:
            yield name, opened[files[name]].get_slice(name)


def _replace_parameters(model: nn.Module, make: Callable[[nn.Parameter], Tensor]) -> None:
    """Replace the parameters of a model by what ``make`` returns for them; tied ones stay tied."""
    made: dict[int, nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(make(parameter), requires_grad=parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]


def _is_hollow(parameter: Tensor) -> bool:
    return not any(parameter.stride())


def to_meta(model: PreTrainedModel) -> None:
    """Replace the hollow weights of a model by such on the meta device, which can be sharded."""
    _replace_parameters(
        model, lambda parameter: torch.empty_like(parameter, device="meta") if _is_hollow(parameter) else parameter.data
    )


@torch.no_grad()
def fill(model: PreTrainedModel, source: Source, device: torch.device) -> None:
    """Give memory to a model's slices on the meta device, and read them.

    Args:
        model: sharded.
        source: of the model.
        device: where the slices go.
    """
    names = {
        name.replace(".base_layer.", "."): parameter
        for name, parameter in model.named_parameters()
        if parameter.is_meta
    }
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    parameters = {name.replace(".base_layer.", "."): parameter for name, parameter in model.named_parameters()}
    for name, stored in _stored(source.files, names):
        parameter = parameters[name]
        assert isinstance(parameter, DTensor)
        shape, offset = compute_local_shape_and_global_offset(
            parameter.shape, parameter.device_mesh, parameter.placements
        )
        own = tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))
        if parameter.to_local().numel():
            parameter.to_local().copy_(stored[own].to(source.dtype))


def first_rows(model: PreTrainedModel) -> Iterator[Tensor]:
    """Yield the first row of each weight of a hollow model as it is in the files, and the other parameters whole."""
    source = source_of(model)
    for name, parameter in model.named_parameters():
        if source is None or not _is_hollow(parameter):
            yield parameter
        else:
            name = name.replace(".base_layer.", ".")
            yield from (stored[:1] for _, stored in _stored(source.files, {name}))
