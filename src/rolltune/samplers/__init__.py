"""Samplers generate completions and their log-probs. They all implement one protocol, :class:`Sampler`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rolltune.types import Completion, SampleRequest, SamplingParams


class Sampler(Protocol):
    """Generates completions of prompts.

    A config builds one with ``(model, tokenizer, **options)``: the policy's model and its tokenizer.
    """

    def sync(self, version: int) -> None:
        """Take over the policy's current weights, those after ``version`` optimizer steps.

        All ranks call this, and they call it before the first :meth:`generate`.

        Raises:
            SyncError: the weights did not arrive unchanged. All ranks raise it.
        """
        ...

    def generate(
        self,
        requests: Sequence[SampleRequest],
        params: SamplingParams,
        *,
        on_progress: Callable[[int, int], None] | None = None,
        on_completion: Callable[[int, int, Completion], None] | None = None,
    ) -> list[tuple[Completion, ...]]:
        """Generate one completion for each seed of each request.

        Completions carry their support if ``params`` truncate, because the trainer's softmax must run over the same
        tokens. A sampler that does not know the support raises ValueError, or leaves it None, which training refuses.

        Args:
            requests: prompts of any lengths, with any number of seeds.
            params: the sampling distribution and the stopping conditions.
            on_progress: called with (completions done, completions in all) as they finish.
            on_completion: called once with each completion as (request index, seed index, completion), as soon as it
                is finished, so that scoring can start while others are still generated. It must return at once.

        Returns:
            One tuple a request, in order, with one completion a seed, in order.
        """
        ...

    def close(self) -> None:
        """Free all resources and stop all processes that the sampler started. It cannot be used afterwards."""
        ...
