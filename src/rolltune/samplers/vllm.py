"""Build samplers that generate with vLLM, in the training process or on servers.

    sampler: {_component_: rolltune.samplers.vllm.colocated, kv_cache_gib: 8.0}
    sampler: {_component_: rolltune.samplers.vllm.served, base_urls: ["http://127.0.0.1:8123"]}

Both are a :class:`rolltune.samplers.vllm_sampler.VLLMSampler`; :mod:`rolltune.samplers.vllm_sync` checks their weights.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.endpoints import serving
from rolltune.endpoints.serving import ADAPTER_RANKS, AdapterRoom
from rolltune.endpoints.settings import can_be_sent, check_url
from rolltune.errors import EngineError
from rolltune.model.adapter import adapted_layers, adapter_rank
from rolltune.model.fp32_head import FP32Head
from rolltune.model.load import DTYPES, unwrapped
from rolltune.model.weights import check_mergeable, weight_shapes
from rolltune.samplers.engine import Engine
from rolltune.samplers.probe import MIN_MODEL_LEN
from rolltune.samplers.ranks import broadcast, this_rank
from rolltune.samplers.vllm_sampler import VLLMSampler


def colocated(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str | None = None,
    lora: Literal["merged", "adapter"] = "merged",
    max_num_seqs: int = 256,
    max_model_len: int | None = None,
    kv_cache_gib: float = 4.0,
    sleep: bool = True,
    options: dict[str, Any] | None = None,
) -> VLLMSampler:
    """Build a sampler with an engine in the training process, one in each rank.

    Example:
        >>> sampler = colocated(model, tokenizer, kv_cache_gib=1.0)  # doctest: +SKIP

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        dtype: dtype of the engine's weights and activations; None: the policy's.
        lora: what each sync sends of a policy with LoRA: all weights with the adapter "merged", or only the "adapter".
        max_num_seqs: completions generated at the same time.
        max_model_len: longest prompt with its completion, in tokens; None: the model's context.
        kv_cache_gib: memory for keys and values.
        sleep: on a GPU, free the engine's GPU memory while the policy is trained; its weights move to CPU memory.
        options: further arguments of vLLM's ``LLM``, such as ``{enforce_eager: true}``.

    Raises:
        ValueError: vLLM is not installed or has an unsupported version, an option is out of range, or vLLM has no
            implementation of the model of its own.
    """
    from rolltune.samplers.vllm_local import LocalEngine

    serving.installed_version()
    length = _check_options(model, dtype, max_num_seqs, max_model_len, kv_cache_gib)
    room = _adapter_room(model, lora)
    engine_dtype = DTYPES[dtype] if dtype else unwrapped(model).dtype
    if (parts := (options or {}).get("tensor_parallel_size", 1)) != 1:
        raise ValueError(
            f"sampler.options.tensor_parallel_size: {parts}; must be 1, because each rank has its own engine; use "
            "rolltune.samplers.vllm.served"
        )
    try:
        engine = LocalEngine(
            _model_folder(model, tokenizer),
            dtype=str(engine_dtype).removeprefix("torch."),
            max_model_len=length,
            max_num_seqs=max_num_seqs,
            kv_cache_gib=kv_cache_gib,
            sleeps=sleep and torch.cuda.is_available(),
            adapter=room,
            options=options or {},
        )
    except ValueError as error:
        if room is None or "LoRA" not in str(error):
            raise
        raise ValueError(f"sampler.lora: adapter; vLLM: {error}; set it to merged") from error
    decoder = type(unwrapped(model).base_model)
    if any(base.__module__.startswith("vllm.") for base in decoder.__mro__):
        engine.close()
        raise ValueError(
            f"sampler: vLLM runs {decoder.__name__} by transformers' code and changes it for the whole process, so the "
            "trainer could not run it; use rolltune.samplers.vllm.served"
        )
    _check_room(model, engine, room)
    return VLLMSampler(
        model, tokenizer, engine, dtype=engine_dtype, max_model_len=length, only_adapter=room is not None
    )


def served(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    base_urls: list[str] | None = None,
    api_key_env: str | None = None,
    transfer: Literal["files", "nccl"] = "files",
    folder: str | None = None,
    dtype: str | None = None,
    lora: Literal["merged", "adapter"] = "merged",
    max_num_seqs: int = 256,
    max_model_len: int | None = None,
    kv_cache_gib: float = 4.0,
    options: list[str] | None = None,
    log: str = "outputs/vllm_server.log",
) -> VLLMSampler:
    """Build a sampler whose engines are servers outside of the training process, shared by all ranks.

    Example:
        >>> sampler = served(model, tokenizer, base_urls=["http://127.0.0.1:8123"])  # doctest: +SKIP

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        base_urls: URLs of servers started by ``tune run serve ... takes_weights=files`` with the policy's model; None:
            start a server on this machine that ends with the run, and has a random key that only the run knows.
        api_key_env: environment variable with the key of the servers in ``base_urls``, such as VLLM_API_KEY; None: no
            key is sent.
        transfer: how weights travel, see :mod:`rolltune.samplers.vllm_server`.
        folder: for "files", a folder that trainer and servers share; None: this machine's memory.
        dtype: dtype of the servers' weights; None: the policy's. Servers in ``base_urls`` must have it.
        lora: what each sync sends of a policy with LoRA: all weights with the adapter "merged", or only the "adapter".
            Servers in ``base_urls`` must have been started with a ``lora_rank``. Runs with the same base model can then
            share them.
        max_num_seqs: completions generated at the same time by each server.
        max_model_len: longest prompt with its completion, in tokens; None: the model's context.
        kv_cache_gib: memory for keys and values. Like ``options`` and ``log``, only for a server that is started here.
        options: further options of vLLM's server, such as ``["--tensor-parallel-size", "2"]``.
        log: path of the server's log.

    Raises:
        ValueError: vLLM is not installed or has an unsupported version, or an option is out of range.
        EngineError: the server did not start, or a server in ``base_urls`` does not answer.
    """
    from rolltune.samplers.vllm_server import ServerEngine

    length = _check_options(model, dtype, max_num_seqs, max_model_len, kv_cache_gib)
    room = _adapter_room(model, lora)
    if base_urls is not None and not base_urls:
        raise ValueError("sampler.base_urls: []; give at least one URL, or null to start a server for this run")
    for i, url in enumerate(base_urls or []):
        check_url(url, f"sampler.base_urls[{i}]")
    if transfer not in serving.TRANSFERS:
        raise ValueError(f"sampler.transfer: {transfer}; must be one of {', '.join(serving.TRANSFERS)}")
    if transfer == "nccl" and base_urls is not None and len(base_urls) > 1:
        raise ValueError(
            f"sampler.base_urls: {len(base_urls)} servers; nccl supports only one: give one, or set sampler.transfer "
            "to files"
        )
    if room is not None and transfer != "files":
        raise ValueError(f"sampler.lora: adapter; needs sampler.transfer files, not {transfer}")
    key = _key(api_key_env) if base_urls else ""
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
                    adapters=room,
                    options=options or [],
                )
            )
            base_urls, key = [server.base_url], server.key
        urls, key = broadcast(([url.rstrip("/").removesuffix("/v1") for url in base_urls or []], key))
        engine = ServerEngine(
            urls,
            key=key,
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
    _check_room(model, engine, room)
    return VLLMSampler(
        model,
        tokenizer,
        engine,
        dtype=engine_dtype,
        max_model_len=length,
        is_sender=is_main,
        only_adapter=room is not None,
    )


def _key(variable: str | None) -> str:
    """Return the key in an environment variable; empty if none is named."""
    if variable is None:
        return ""
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ValueError(f"sampler.api_key_env: {variable} is not set; export it, or give null to send no key")
    if not can_be_sent(key):
        raise ValueError(f"sampler.api_key_env: the value of {variable} contains spaces or special characters")
    return key


def _adapter_room(model: PreTrainedModel | PeftModel, lora: str) -> AdapterRoom | None:
    """Return the room that the engine needs for the policy's adapter; None if weights are sent merged."""
    if lora not in ("merged", "adapter"):
        raise ValueError(f"sampler.lora: {lora}; must be merged or adapter")
    if lora == "merged":
        check_mergeable(model)
        return None
    layers = adapted_layers(model)
    if (rank := adapter_rank(layers)) > ADAPTER_RANKS[-1]:
        raise ValueError(f"lora.rank: {rank}; must be <= {ADAPTER_RANKS[-1]} with sampler.lora: adapter")
    return AdapterRoom(rank=rank, targets=tuple(sorted({name.rpartition(".")[2] for name in layers})))


def _check_room(model: PreTrainedModel | PeftModel, engine: Engine, room: AdapterRoom | None) -> None:
    """Close the engine and raise ValueError if it cannot take the policy's adapter."""
    if room is None:
        return
    try:
        problems = engine.adapter_problems(room.rank, list(adapted_layers(model)))
    except BaseException:
        engine.close()
        raise
    if problems:
        engine.close()
        raise ValueError(
            f"sampler.lora: adapter; the engine {problems[0]}; start a server with lora_rank={room.rank}, or set "
            "sampler.lora to merged"
        )


def _check_options(
    model: PreTrainedModel | PeftModel,
    dtype: str | None,
    max_num_seqs: int,
    max_model_len: int | None,
    kv_cache_gib: float,
) -> int:
    """Raise ValueError for a value out of range, and return the longest prompt with its completion, in tokens."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"sampler.dtype: {dtype}; must be one of {', '.join(DTYPES)}")
    for name, value, is_valid, accepted in (
        ("max_num_seqs", max_num_seqs, max_num_seqs >= 1, ">= 1"),
        ("kv_cache_gib", kv_cache_gib, kv_cache_gib > 0, "> 0"),
    ):
        if not is_valid:
            raise ValueError(f"sampler.{name}: {value}; must be {accepted}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)  # pyright: ignore
    length = max_model_len or context
    if length is None:
        raise ValueError("sampler.max_model_len: null; the model's config has no context length, so give one")
    if length < MIN_MODEL_LEN or (context is not None and length > context):
        raise ValueError(f"sampler.max_model_len: {length}; must be in {MIN_MODEL_LEN} .. {context}")
    return length


def _model_folder(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """Write config and tokenizer to a temporary folder. The weights come with the first sync."""
    causal_lm = unwrapped(model)
    folder = Path(tempfile.mkdtemp(prefix="rolltune-engine-"))
    config = type(causal_lm.config).from_dict(causal_lm.config.to_dict())
    config.architectures = [type(causal_lm).__name__.removeprefix("FSDP")]  # of sharded models
    vars(config).pop("quantization_config", None)  # weights in 4 bits are sent decoded
    if isinstance(causal_lm.get_output_embeddings(), FP32Head):
        config.head_dtype = "float32"  # vLLM's name for it
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
