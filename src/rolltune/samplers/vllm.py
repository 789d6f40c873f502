"""Samplers that write with vLLM (arXiv 2309.06180), in this process or in servers, and check every sync.

On-policy training holds only while the engine has the policy's weights and the policy's distribution. So after each
sync, and before the next optimizer step:

  - columns of every weight that the engine has loaded are compared with the policy's, bit for bit
    (:mod:`rolltune.samplers.fingerprints`): a tensor that was dropped, swapped, old or left out by a reload is named;
  - the engine must not know the keys and values of the probe, a fixed prompt that it has read at the last sync;
  - the probe's continuation is scored by the trainer: log-probs of one distribution, within the precision of both;
  - and every completion, the probe's too, carries the version of the weights that wrote it as the engine reports it.

Log-probs are of the distribution that is sampled from (vLLM's "processed" ones): logits / temperature, top-k and top-p
applied, renormalised. Under top-k the tokens that were kept come back with each token, for the trainer to take
its softmax over the same ones. vLLM does not tell them for top-p alone, which is refused.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune import serving
from rolltune.models import DTYPES, unwrapped
from rolltune.samplers import EngineError, SyncError, probe
from rolltune.samplers.engine import Engine, EngineOutput, EngineRequest
from rolltune.samplers.fingerprints import differences, weight_fingerprint
from rolltune.samplers.native import check_params, eos_token_ids
from rolltune.types import Completion, SampleRequest, SamplingParams
from rolltune.weights import policy_weights, tied_names, weight_shapes

T = TypeVar("T")
MAX_TEMPERATURE = 2.0
MAX_TOP_K = 1024  # candidates of a token that vLLM is asked for
_TIES = 16  # further ones: of equally probable tokens at the border of a top-k, vLLM keeps all


@dataclass(frozen=True, kw_only=True, slots=True)
class SyncReport:
    """What a sync took.

    Attributes:
        load_seconds: until the weights were in the engine.
        check_seconds: of fingerprints and probe.
        probe_gap: mean |dlogp| of the probe, engine against trainer.
    """

    load_seconds: float
    check_seconds: float
    probe_gap: float


class VLLMSampler:
    """Samples from a vLLM engine that is given the policy's weights.

    Configs name :func:`colocated` or :func:`served`, which make one.

    Attributes:
        last_sync: what it took; None before the first.
    """

    def __init__(
        self,
        model: PreTrainedModel | PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        engine: Engine,
        *,
        dtype: torch.dtype,
        max_model_len: int,
        sends: bool = True,
    ):
        """
        Args:
            model: whose weights are sent; never changed.
            tokenizer: decodes completions. Its EOS token ends them, as do those of the model's generation config.
            engine: has a model of the same architecture, of any weights.
            dtype: of the engine's weights.
            max_model_len: tokens that the engine takes, prompt and completion.
            sends: False where another rank gives its weights to the engine.
        """
        self.last_sync: SyncReport | None = None
        self._model = model
        self._causal_lm = causal_lm = unwrapped(model)
        self._tokenizer = tokenizer
        self._engine = engine
        self._dtype = dtype
        self._max_model_len = max_model_len
        self._sends = sends
        self._eos = sorted(eos_token_ids(causal_lm, tokenizer))
        self._prompt = probe.probe_prompt(tokenizer, max_model_len)
        self._version = -1  # that the engine has for certain
        # Part of the weights' name in the engine: another run that gives its weights to the same server has another.
        self._run = _from_rank_0(uuid.uuid4().hex[:8])

    def sync(self, version: int) -> None:
        """See :class:`rolltune.samplers.Sampler`. Nothing is sent where the engine has this version already."""
        if version == self._version:
            return
        self._version, self.last_sync = -1, None
        started = time.perf_counter()
        expected = self._together(version, lambda: self._load(version))
        loaded = time.perf_counter()
        gap = self._together(version, lambda: self._check(expected, version))
        self.last_sync = SyncReport(
            load_seconds=loaded - started, check_seconds=time.perf_counter() - loaded, probe_gap=gap
        )
        self._version = version

    def _together(self, version: int, stage: Callable[[], T]) -> T:
        """A stage of a sync; where it fails on one rank, all raise. No rank goes on before the others."""
        result, wrong = None, ""
        try:
            result = stage()
        except (SyncError, EngineError) as error:
            wrong = str(error)
        if wrong := _first_message(wrong):
            raise SyncError(f"the weights after {version} optimizer steps did not reach the sampler: {wrong}")
        return result  # pyright: ignore[reportReturnType]  there is one where nothing is wrong

    def _load(self, version: int) -> dict[str, str]:
        """Send the weights; returns the fingerprints that the engine's should have."""
        expected: dict[str, str] = {}

        def noted() -> Iterator[tuple[str, Tensor]]:
            for name, tensor in policy_weights(self._model, self._dtype):
                expected[name] = weight_fingerprint(tensor, version)
                yield name, tensor

        self._engine.wake()
        if self._sends:
            if self._engine.is_asleep():
                raise SyncError("the engine is asleep: what it is given now would be lost when it wakes")
            self._engine.load(noted(), self._name(version))
            if not self._engine.forget():
                raise SyncError("the engine cannot drop its keys and values, which are of the old weights")
        return expected

    def _check(self, expected: dict[str, str], version: int) -> float:
        """Compare weights and probe; returns the mean |dlogp| of the probe's new tokens."""
        if not self._sends:
            return 0.0  # the rank that does looks for all
        found = self._engine.fingerprints(version)
        # A tied head is one module with the embeddings in some of vLLM's models, a module of its own in others.
        tied = {head: expected[name] for head, name in tied_names(self._model).items() if name in expected}
        expected = expected | {head: value for head, value in tied.items() if head in found}
        if lines := differences(expected, found):
            more = [f"and {len(lines) - 10} more"] if len(lines) > 10 else []
            raise SyncError("\n  ".join(["it has other weights than the policy", *lines[:10], *more]))
        return max(self._check_probe(output, version) for output in self._probe(version))

    def _check_probe(self, output: EngineOutput, version: int) -> float:
        if self._version_of(output) != version:
            raise SyncError(
                f"it says that it writes with the weights {', '.join(output.versions)}; does another run give its "
                "weights to the same server?"
            )
        if output.cached_tokens:
            raise SyncError(
                f"it knows keys and values of {output.cached_tokens} of the probe's tokens, made by older weights: its "
                "prefix cache was not reset"
            )
        theirs = [c[t] for c, t in zip(output.candidates, output.token_ids, strict=True)]
        ours = probe.trainer_logprobs(self._model, self._prompt, output.token_ids)
        gap = (ours - torch.tensor(theirs)).abs().mean().item()
        tolerance = max(probe.TOLERANCE[dtype] for dtype in (self._dtype, self._causal_lm.dtype))
        if not gap <= tolerance:
            raise SyncError(
                f"its log-probs of the probe's {len(theirs)} new tokens are {gap:.3g} from the trainer's in the mean, "
                f"more than {tolerance:g}"
            )
        return gap

    def _probe(self, version: int) -> list[EngineOutput]:
        """What each replica writes after the probe."""
        params = SamplingParams(max_new_tokens=probe.NEW_TOKENS)
        request = EngineRequest(
            token_ids=self._prompt, params=self._params(params, seed=version), salt=self._salt(version)
        )
        outputs: list[EngineOutput] = []
        self._engine.write([request] * self._engine.replicas, lambda _, output: outputs.append(output))
        return outputs

    def generate(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """See :class:`rolltune.samplers.Sampler`.

        Raises:
            ValueError: params out of range or of a support that vLLM does not tell; an empty prompt, or one too long.
            EngineError: a server does not answer as it should.
        """
        assert self._version >= 0, "sync() comes first"
        check_params(params)
        if problem := sampling_problem(params.temperature, params.top_p, params.top_k):
            raise ValueError(problem)
        self._check_lengths(requests, params.max_new_tokens)
        self._engine.wake()
        places = [(i, j) for i, request in enumerate(requests) for j in range(len(request.seeds))]
        written: dict[tuple[int, int], Completion] = {}

        def keep(number: int, output: EngineOutput) -> None:
            i, j = places[number]
            written[i, j] = self._completion(output, params, requests[i].prompt.prefill)
            if on_completion is not None:
                on_completion(i, j, written[i, j])
            if on_progress is not None:
                on_progress(len(written), len(places))

        salt = self._salt(self._version)
        wanted = [
            EngineRequest(
                token_ids=requests[i].prompt.token_ids, params=self._params(params, requests[i].seeds[j]), salt=salt
            )
            for i, j in places
        ]
        self._engine.write(wanted, keep)
        self._engine.sleep()
        return [tuple(written[i, j] for j in range(len(request.seeds))) for i, request in enumerate(requests)]

    def close(self) -> None:
        self._engine.close()

    def _name(self, version: int) -> str:
        return f"{self._run}:{version}"

    def _salt(self, version: int) -> str:
        """So that a request never meets keys and values of other weights, were the prefix cache not reset."""
        return self._name(version)

    def _version_of(self, output: EngineOutput) -> int:
        """Of the weights that wrote a completion, as the engine has it; -1 for those of another run, or for several."""
        run, _, version = output.versions[0].partition(":") if len(set(output.versions)) == 1 else ("", "", "")
        return int(version) if run == self._run else -1

    def _params(self, params: SamplingParams, seed: int) -> dict:
        vocabulary = self._causal_lm.config.get_text_config().vocab_size
        return {
            "temperature": params.temperature,
            "top_p": params.top_p,
            "top_k": params.top_k,
            "max_tokens": params.max_new_tokens,
            "seed": seed,
            "logprobs": min(params.top_k + _TIES, vocabulary) if params.truncates else 0,  # besides the sampled token's
            "stop": list(params.stop),
            "stop_token_ids": self._eos,
            "ignore_eos": True,  # the model's EOS tokens are among those above
            "detokenize": bool(params.stop),
        }

    def _completion(self, output: EngineOutput, params: SamplingParams, prefill: str) -> Completion:
        if output.finish_reason not in ("stop", "length"):
            raise EngineError(f"vLLM ended a completion with {output.finish_reason!r}")
        greedy = params.temperature == 0
        text = self._tokenizer.decode(list(output.token_ids), skip_special_tokens=True)
        return Completion(
            token_ids=output.token_ids,
            logprobs=tuple(0.0 if greedy else c[t] for c, t in zip(output.candidates, output.token_ids, strict=True)),
            finish_reason=output.finish_reason,
            policy_version=self._version_of(output),
            text=f"{prefill}{text}",
            support=tuple(map(_kept, output.candidates)) if params.truncates else None,
        )

    def _check_lengths(self, requests: Sequence[SampleRequest], max_new_tokens: int) -> None:
        lengths = [len(request.prompt.token_ids) for request in requests]
        if 0 in lengths:
            raise ValueError(f"prompt: request {lengths.index(0)} has no tokens; a prompt needs one at least")
        if max(lengths, default=0) + max_new_tokens > self._max_model_len:
            raise ValueError(
                f"sampling.max_new_tokens: {max_new_tokens}; with a prompt of {max(lengths)} tokens that is more than "
                f"sampler.max_model_len, {self._max_model_len}"
            )


def sampling_problem(temperature: float, top_p: float, top_k: int) -> str | None:
    """Why completions cannot be sampled so; None where they can."""
    if temperature > MAX_TEMPERATURE:
        return f"sampling.temperature: {temperature}; with vLLM it is {MAX_TEMPERATURE:g} at most"
    if temperature > 0 and top_p < 1 and not top_k:
        return (
            f"sampling.top_p: {top_p}; vLLM does not tell which tokens it kept but under top-k: give sampling.top_k "
            f"too (up to {MAX_TOP_K}), or take rolltune.samplers.native.NativeSampler"
        )
    if temperature > 0 and top_k > MAX_TOP_K:
        return f"sampling.top_k: {top_k}; with vLLM it is {MAX_TOP_K} at most"
    return None


def colocated(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    dtype: str | None = None,
    max_rows: int = 256,
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
        max_rows: completions written at the same time.
        max_model_len: tokens of a prompt and its completion; None: the model's context.
        kv_cache_gib: memory for keys and values.
        sleep: on a GPU, leave weights and cache to the CPU's memory while the policy is trained.
        options: further arguments of vLLM's ``LLM``, such as ``{gpu_memory_utilization: 0.5}``.

    Raises:
        ValueError: vLLM is not installed, or in another version than the supported one; an option is out of range.
    """
    from rolltune.samplers.vllm_local import LocalEngine

    serving.installed_version()
    length = _check_options(model, dtype, max_rows, max_model_len, kv_cache_gib)
    engine_dtype = DTYPES[dtype] if dtype else _dtype(model)
    engine = LocalEngine(
        model_folder(model, tokenizer),
        dtype=str(engine_dtype).removeprefix("torch."),
        max_model_len=length,
        max_rows=max_rows,
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
    transfer: str = "files",
    folder: str | None = None,
    dtype: str | None = None,
    max_rows: int = 256,
    max_model_len: int | None = None,
    kv_cache_gib: float = 4.0,
    options: list[str] | None = None,
    log: str = "outputs/vllm_server.log",
) -> VLLMSampler:
    """Servers apart from the training; all ranks share them.

    Example:
        >>> sampler = served(model, tokenizer, base_urls=["http://10.0.0.5:8123"])  # doctest: +SKIP

    Args:
        model: the policy.
        tokenizer: its tokenizer.
        base_urls: of servers that ``tune run serve ... takes_weights=files`` has started with the policy's model; None:
            one is started on this machine, and ends with the run.
        transfer: the way of the weights, see :mod:`rolltune.samplers.vllm_server`.
        folder: for "files", one that trainer and servers see; None: this machine's memory.
        dtype: of the servers' weights; None: as the policy's. Servers that were found must have it.
        max_rows: completions written at the same time by each.
        max_model_len: tokens of a prompt and its completion; None: the model's context.
        kv_cache_gib: memory for keys and values; of the server that is started, like ``options`` and ``log``.
        options: further ones of vLLM's server: ``["--tensor-parallel-size", "2"]``.
        log: the file that takes what it writes.

    Raises:
        ValueError: vLLM is not installed, or in another version than the supported one; an option is out of range.
        EngineError: the server did not start, or one that was named does not answer.
    """
    from rolltune.samplers.vllm_server import ServerEngine

    length = _check_options(model, dtype, max_rows, max_model_len, kv_cache_gib)
    if transfer not in serving.TRANSFERS:
        raise ValueError(f"sampler.transfer: {transfer}; one of {', '.join(serving.TRANSFERS)} is wanted")
    engine_dtype = DTYPES[dtype] if dtype else _dtype(model)
    exits = ExitStack()
    is_main = _rank() == 0
    server = None
    try:
        if base_urls is None and is_main:
            source = model_folder(model, tokenizer)
            exits.callback(shutil.rmtree, source, ignore_errors=True)
            server = exits.enter_context(
                serving.serve(
                    str(source),
                    log=log,
                    name="policy",
                    dtype=str(engine_dtype).removeprefix("torch."),
                    max_model_len=length,
                    max_num_seqs=max_rows,
                    kv_cache_gib=kv_cache_gib,
                    takes_weights=transfer,
                    options=options or [],
                )
            )
            base_urls = [server.base_url.removesuffix("/v1")]
        urls = _from_rank_0([url.rstrip("/").removesuffix("/v1") for url in base_urls or []])
        engine = ServerEngine(
            urls,
            transfer=transfer,
            folder=folder,
            max_rows=max_rows,
            shapes=lambda: weight_shapes(model, engine_dtype),
            server=server,
            exits=exits,
            sends=is_main,
        )
    except BaseException as error:
        exits.close()
        if isinstance(error, serving.ServerFailed):
            raise EngineError(str(error)) from error
        raise
    return VLLMSampler(model, tokenizer, engine, dtype=engine_dtype, max_model_len=length, sends=is_main)


def _dtype(model: PreTrainedModel | PeftModel) -> torch.dtype:
    """Of the weights that are not an adapter's."""
    causal_lm = unwrapped(model)
    return causal_lm.get_input_embeddings().weight.dtype  # pyright: ignore[reportReturnType]


def _check_options(
    model: PreTrainedModel | PeftModel,
    dtype: str | None,
    max_rows: int,
    max_model_len: int | None,
    kv_cache_gib: float,
) -> int:
    """Raise ValueError for a value out of range; returns the tokens of a prompt and its completion."""
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"sampler.dtype: {dtype}; one of {', '.join(DTYPES)} is wanted")
    for name, value, is_right, wanted in (
        ("max_rows", max_rows, max_rows >= 1, ">= 1"),
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


def _kept(candidates: dict[int, float]) -> tuple[int, ...]:
    """The tokens that top-k and top-p have kept; their probabilities have to add up to 1, or some were not told."""
    kept = sorted(token for token, logprob in candidates.items() if logprob > float("-inf"))
    mass = torch.tensor([candidates[token] for token in kept], dtype=torch.float64).exp().sum().item()
    if abs(mass - 1) > 1e-3:
        raise RuntimeError(f"the {len(kept)} tokens that vLLM says it kept have a probability of {mass:.4f} together")
    return tuple(kept)


def _ranks() -> int:
    """Processes of the training. vLLM makes a group of one where there is none, which does not count."""
    return int(os.environ.get("WORLD_SIZE", 1)) if dist.is_initialized() else 1


def _first_message(message: str) -> str:
    """The first rank's message that is not empty, on every rank; a barrier, too."""
    if _ranks() == 1:
        return message
    messages: list[str] = [""] * _ranks()
    dist.all_gather_object(messages, message)
    return next((m for m in messages if m), "")


def _rank() -> int:
    return dist.get_rank() if _ranks() > 1 else 0


def _from_rank_0(value: T) -> T:
    if _ranks() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values)
    return values[0]


def model_folder(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> Path:
    """A temporary folder with all of a model but its weights, which an engine is given by the first sync."""
    causal_lm = unwrapped(model)
    folder = Path(tempfile.mkdtemp(prefix="rolltune-engine-"))
    config = type(causal_lm.config).from_dict(causal_lm.config.to_dict())
    config.architectures = [type(causal_lm).__name__]
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
