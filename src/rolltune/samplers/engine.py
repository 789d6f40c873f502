"""What a vLLM sampler asks of an engine, be it in this process or behind a URL."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

BUCKET_BYTES = 256 * 2**20  # of weights that are on their way at a time


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineRequest:
    """One completion that is wanted.

    Attributes:
        token_ids: of the prompt.
        params: fields of vLLM's SamplingParams; JSON values alone.
        salt: keys and values are shared among requests of one salt, never across.
    """

    token_ids: tuple[int, ...]
    params: dict[str, int | float | bool | list[int] | list[str]]
    salt: str


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineOutput:
    """One completion.

    Attributes:
        candidates: for each token the log-probs that were asked for, by token id; the sampled one is among them.
        finish_reason: vLLM's.
        versions: of the weights that wrote it, as the engine itself has them; one, but for an update in between.
        cached_tokens: tokens of the prompt whose keys and values were there before; None where it is not told.
    """

    token_ids: tuple[int, ...]
    candidates: tuple[dict[int, float], ...]
    finish_reason: str | None
    versions: tuple[str, ...]
    cached_tokens: int | None


class Engine(Protocol):
    """All calls are one at a time, from one thread.

    Attributes:
        replicas: engines behind this one, of which request i goes to number i modulo that.
    """

    @property
    def replicas(self) -> int: ...

    def is_asleep(self) -> bool:
        """Whether weights are not where they can be loaded to, or nothing would be scheduled."""
        ...

    def load(self, weights: Iterator[tuple[str, Tensor]], version: str) -> None:
        """Take on weights, as :func:`rolltune.model.weights.policy_weights` gives them, under the name ``version``."""
        ...

    def reset_cache(self) -> bool:
        """Drop all keys and values of earlier requests; False if some are still in use."""
        ...

    def fingerprints(self, version: int) -> dict[str, str] | None:
        """See :meth:`rolltune.samplers.vllm_worker.WorkerExtension.weight_fingerprints`.

        None where several workers hold parts of the weights, which cannot be compared with whole ones.
        """
        ...

    def write(self, requests: Sequence[EngineRequest], on_done: Callable[[int, EngineOutput], None]) -> None:
        """Write all of them; ``on_done`` is called with each one's number and output as soon as it is there."""
        ...

    def sleep(self) -> None:
        """Make room for the training, where the engine can; the next :meth:`wake` brings all back."""
        ...

    def wake(self) -> None: ...

    def close(self) -> None: ...


def buckets(weights: Iterator[tuple[str, Tensor]], max_bytes: int = BUCKET_BYTES) -> Iterator[list[tuple[str, Tensor]]]:
    """Weights in lists of at most ``max_bytes``; a larger one has a list of its own."""
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
