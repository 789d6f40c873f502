"""The interface between a vLLM sampler and its engine, in this process or behind a URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from rolltune.errors import EngineError
from rolltune.samplers.fingerprints import Piece, Shapes
from rolltune.types import SamplingParams

BUCKET_BYTES = 256 * 2**20  # weights in transfer at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """A request for one completion.

    Attributes:
        token_ids: the prompt.
        params: fields of vLLM's SamplingParams, as JSON values.
        cache_salt: requests share keys and values only with requests of the same salt.
        adapter: name of a loaded LoRA adapter; None: the model without one.
    """

    token_ids: tuple[int, ...]
    params: dict[str, int | float | bool | list[int] | list[str]]
    cache_salt: str
    adapter: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOutput:
    """One completion.

    Attributes:
        token_ids: sampled tokens.
        logprobs: for each token, the requested log-probs by token id, the sampled token's included.
        finish_reason: vLLM's.
        weight_versions: versions of the weights that generated it, as reported by the engine; more than one if an
            update came in between.
        cached_tokens: prompt tokens whose keys and values were in the cache; None if not reported.
        adapter: name of the LoRA adapter that the engine applied, as it reports it; None without one.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[dict[int, float], ...]
    finish_reason: str | None
    weight_versions: tuple[str, ...]
    cached_tokens: int | None
    adapter: str | None = None

    @property
    def token_logprobs(self) -> tuple[float, ...]:
        """Log-prob of each sampled token."""
        return tuple(logprobs[token] for logprobs, token in zip(self.logprobs, self.token_ids, strict=True))

    @property
    def support(self) -> tuple[tuple[int, ...], ...]:
        """The tokens that top-k and top-p kept for each sampled token, ascending.

        Raises:
            EngineError: their probabilities do not add up to 1, so some were not reported.
        """
        return tuple(map(_kept, self.logprobs))


def _kept(logprobs: dict[int, float]) -> tuple[int, ...]:
    kept = sorted(token for token, logprob in logprobs.items() if logprob > float("-inf"))
    mass = torch.tensor([logprobs[token] for token in kept], dtype=torch.float64).exp().sum().item()
    if abs(mass - 1) > 1e-4:
        raise EngineError(
            f"the {len(kept)} tokens that vLLM reports as kept have a total probability of {mass:.5f}, not 1: too many "
            "tokens are equally probable at the end of the top-k; use a smaller sampling.top_k"
        )
    return tuple(kept)


class Engine(Protocol):
    """A vLLM engine. Its methods are called one at a time, from one thread.

    Attributes:
        num_replicas: engines behind this one; request i goes to replica i modulo ``num_replicas``.
    """

    @property
    def num_replicas(self) -> int: ...

    def is_asleep(self) -> bool:
        """Whether weights cannot be loaded or requests would not be scheduled."""
        ...

    def load_weights(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Load the weights of :func:`rolltune.model.weights.policy_weights` under the name ``version``."""
        ...

    def adapter_problems(self, rank: int, layers: Sequence[str]) -> list[str]:
        """Return why the engine cannot take a LoRA adapter of this rank on these layers, named as in a checkpoint."""
        ...

    def load_adapter(self, tensors: Mapping[str, Tensor], name: str) -> None:
        """Load the matrices of :func:`rolltune.model.adapter.adapter_weights` in place of the adapter before."""
        ...

    def reset_cache(self) -> bool:
        """Drop the keys and values of earlier requests. Return False if some are still in use."""
        ...

    def fingerprints(self, version: int, shapes: Shapes) -> list[list[dict[str, list[Piece]]]]:
        """Return the pieces of the weights in each worker of each engine.

        Args:
            version: selects the columns that are compared of packed copies.
            shapes: dtype and shape of each weight that was sent.

        See :meth:`rolltune.samplers.vllm_worker.WorkerExtension.weight_fingerprints`.
        """
        ...

    def adapter_fingerprints(self, name: str, shapes: Shapes) -> list[list[dict[str, list[Piece]]]]:
        """Return the pieces of an adapter in the slots of each worker of each engine."""
        ...

    def generate(self, requests: Sequence[EngineRequest], on_output: Callable[[int, EngineOutput], None]) -> None:
        """Generate all completions. Calls ``on_output`` with (request index, output) as soon as each is finished."""
        ...

    def sleep(self) -> None:
        """Free memory for training, if the engine can, until :meth:`wake`."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def engine_params(params: SamplingParams, *, seed: int, eos: Sequence[int], vocab_size: int) -> dict:
    """Translate sampling parameters into fields of vLLM's SamplingParams."""
    return {
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        # Sent although they are the defaults: a server may have others.
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "max_tokens": params.max_new_tokens,
        "seed": seed,
        # In addition to the sampled token's. vLLM keeps all of several equally probable tokens at the end of a top-k.
        "logprobs": min(params.top_k + max(16, params.top_k // 4), vocab_size) if params.truncates else 0,
        "stop": list(params.stop),
        "stop_token_ids": list(eos),
        "ignore_eos": True,  # the model's EOS tokens are in stop_token_ids
        "detokenize": bool(params.stop),
    }


def weight_buckets(
    weights: Iterator[tuple[str, Tensor]], max_bytes: int = BUCKET_BYTES
) -> Iterator[list[tuple[str, Tensor]]]:
    """Split weights into buckets of at most ``max_bytes``; a larger weight has its own bucket."""
    bucket: list[tuple[str, Tensor]] = []
    size = 0
    for name, tensor in weights:
        if bucket and size + tensor.nbytes > max_bytes:
            yield bucket
            bucket, size = [], 0
        bucket.append((name, tensor))
        size += tensor.nbytes
    if bucket:
        yield bucket
