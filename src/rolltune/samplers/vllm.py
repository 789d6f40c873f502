"""Samplers that write with vLLM: in the training process, or in servers apart from it.

    sampler: {_component_: rolltune.samplers.vllm.colocated, kv_cache_gib: 8.0}
    sampler: {_component_: rolltune.samplers.vllm.served, base_urls: ["http://127.0.0.1:8123"]}

What both do, and what is checked of them, is in :mod:`rolltune.samplers.vllm_sampler`.
"""

from __future__ import annotations

import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.endpoints import serving
from rolltune.errors import EngineError
from rolltune.model.fp32_head import FP32Head
from rolltune.model.load import DTYPES, unwrapped
from rolltune.model.weights import check_mergeable, weight_shapes
from rolltune.samplers import probe
from rolltune.samplers.ranks import from_rank_0, this_rank
from rolltune.samplers.vllm_sampler import VLLMSampler


def colocated(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str | None = None,
    max_num_seqs: int = 256,
    max_model_len: int | None = None,
    kv_cache_gib: float = 4.0,
    sleep: bool = True,
    options: dict[str, Any] | None = None,
) -> VLLMSampler:
    """An engine in the training process, one in each rank.

    Example:
        >>> sampler = colocated(model, tokenizer, kv_cache_gib=1.0)  # doctest: +SKIP

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        dtype: of the engine's weights and activations; None: as the policy's.
        max_num_seqs: completions written at the same time.
        max_model_len: tokens of a prompt and its completion; None: the model's context.
        kv_cache_gib: memory for keys and values.
        sleep: on a GPU, leave weights and cache to the CPU's memory while the policy is trained.
        options: further arguments of vLLM's ``LLM``, such as ``{enforce_eager: true}``.

    Raises:
        ValueError: vLLM is not installed, or in another version than the supported one; an option is out of range.
    """
    from rolltune.samplers.vllm_local import LocalEngine

    serving.installed_version()
    length = _check_options(model, dtype, max_num_seqs, max_model_len, kv_cache_gib)
    engine_dtype = DTYPES[dtype] if dtype else unwrapped(model).dtype
    if (parts := (options or {}).get("tensor_parallel_size", 1)) != 1:
        raise ValueError(
            f"sampler.options.tensor_parallel_size: {parts}; in the process each rank has an engine of its own: take "
            "rolltune.samplers.vllm.served"
        )
    engine = LocalEngine(
        _model_folder(model, tokenizer),
        dtype=str(engine_dtype).removeprefix("torch."),
        max_model_len=length,
        max_num_seqs=max_num_seqs,
        kv_cache_gib=kv_cache_gib,
        sleeps=sleep and torch.cuda.is_available(),
        options=options or {},
    )
    return VLLMSampler(model, tokenizer, engine, dtype=engine_dtype, max_model_len=length)


def served(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_urls: list[str] | None = None,
    transfer: Literal["files", "nccl"] = "files",
    folder: str | None = None,
    dtype: str | None = None,
    max_num_seqs: int = 256,
    max_model_len: int | None = None,
    kv_cache_gib: float = 4.0,
    options: list[str] | None = None,
    log: str = "outputs/vllm_server.log",
) -> VLLMSampler:
    """Servers apart from the training; all ranks share them.

    Example:
        >>> sampler = served(model, tokenizer, base_urls=["http://127.0.0.1:8123"])  # doctest: +SKIP

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        base_urls: of servers that ``tune run serve ... takes_weights=files`` has started with the policy's model; None:
            one is started on this machine, and ends with the run. A server listens for its own machine, unless
            ``options=[--host, 0.0.0.0]`` lets others reach it, who may change its weights then.
        transfer: the way of the weights, see :mod:`rolltune.samplers.vllm_server`.
        folder: for "files", one that trainer and servers see; None: this machine's memory.
        dtype: of the servers' weights; None: as the policy's. Servers that were found must have it.
        max_num_seqs: completions written at the same time by each.
        max_model_len: tokens of a prompt and its completion; None: the model's context.
        kv_cache_gib: memory for keys and values; of the server that is started, like ``options`` and ``log``.
        options: further ones of vLLM's server: ``["--tensor-parallel-size", "2"]``. Where workers hold parts of the
            weights, a sync is checked by its probe and version alone.
        log: the file that takes what it writes.

    Raises:
        ValueError: vLLM is not installed, or in another version than the supported one; an option is out of range.
        EngineError: the server did not start, or one that was named does not answer.
    """
    from rolltune.samplers.vllm_server import ServerEngine

    length = _check_options(model, dtype, max_num_seqs, max_model_len, kv_cache_gib)
    if base_urls is not None and not base_urls:
        raise ValueError("sampler.base_urls: none; give one at least, or null for a server of the run's own")
    if transfer not in serving.TRANSFERS:
        raise ValueError(f"sampler.transfer: {transfer}; one of {', '.join(serving.TRANSFERS)} is wanted")
    if transfer == "nccl" and base_urls is not None and len(base_urls) > 1:
        raise ValueError(
            f"sampler.base_urls: {len(base_urls)} servers; weights go by nccl to one alone: give one, or take files"
        )
    engine_dtype = DTYPES[dtype] if dtype else unwrapped(model).dtype
    exits = ExitStack()
    is_main = this_rank() == 0
    server = None
    try:
        if base_urls is None and is_main:
            source = _model_folder(model, tokenizer)
            exits.callback(shutil.rmtree, source, ignore_errors=True)
            server = exits.enter_context(
                serving.serve(
                    str(source),
                    log=log,
                    name="policy",
                    dtype=str(engine_dtype).removeprefix("torch."),
                    max_model_len=length,
                    max_num_seqs=max_num_seqs,
                    kv_cache_gib=kv_cache_gib,
                    takes_weights=transfer,
                    options=options or [],
                )
            )
            base_urls = [server.base_url.removesuffix("/v1")]
        urls = from_rank_0([url.rstrip("/").removesuffix("/v1") for url in base_urls or []])
        engine = ServerEngine(
            urls,
            transfer=transfer,
            folder=folder,
            max_num_seqs=max_num_seqs,
            shapes=lambda: weight_shapes(model, engine_dtype),
            server=server,
            exits=exits,
            is_sender=is_main,
        )
    except BaseException as error:
        exits.close()
        if isinstance(error, serving.ServerFailed):
            raise EngineError(str(error)) from error
        raise
    return VLLMSampler(model, tokenizer, engine, dtype=engine_dtype, max_model_len=length, is_sender=is_main)


def _check_options(
    model: PreTrainedModel | PeftModel,
    dtype: str | None,
    max_num_seqs: int,
    max_model_len: int | None,
    kv_cache_gib: float,
) -> int:
    """Raise ValueError for a value out of range; returns the tokens of a prompt and its completion."""
    check_mergeable(model)
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"sampler.dtype: {dtype}; one of {', '.join(DTYPES)} is wanted")
    for name, value, is_right, wanted in (
        ("max_num_seqs", max_num_seqs, max_num_seqs >= 1, ">= 1"),
        ("kv_cache_gib", kv_cache_gib, kv_cache_gib > 0, "> 0"),
    ):
        if not is_right:
            raise ValueError(f"sampler.{name}: {value}; must be {wanted}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # pyright: ignore
    length = max_model_len or context
    if length is None:
        raise ValueError("sampler.max_model_len: null; the model's config has no context length: give one")
    if length <= 2 * probe.NEW_TOKENS or (context is not None and length > context):
        raise ValueError(f"sampler.max_model_len: {length}; must be in {2 * probe.NEW_TOKENS + 1} .. {context}")
    return length


def _model_folder(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A temporary folder with all of a model but its weights, which an engine is given by the first sync."""
    causal_lm = unwrapped(model)
    folder = Path(tempfile.mkdtemp(prefix="rolltune-engine-"))
    config = type(causal_lm.config).from_dict(causal_lm.config.to_dict())
    config.architectures = [type(causal_lm).__name__]
    if isinstance(causal_lm.get_output_embeddings(), FP32Head):
        config.head_dtype = "float32"  # vLLM's name for it
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
