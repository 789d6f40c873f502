"""Samplers write completions and their log-probs; all of them follow one protocol."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from rolltune.types import Completion, SampleRequest, SamplingParams


class Sampler(Protocol):
    """Prompts in, completions out.

    A config builds one with ``(model, tokenizer, **options)``: the policy that is trained, and its tokenizer.
    """

    def sync(self, version: int) -> None:
        """Take on the policy's current weights, which are those after ``version`` optimizer steps.

        All ranks call this. Nothing may be sampled before the first call.

        Raises:
            SyncError: the weights did not arrive as they are; all ranks raise it.
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
        """One tuple a request, in its order, with one completion a seed, in the order of the seeds.

        Completions carry their support wherever ``params`` truncate: the trainer's softmax has to be over the same
        tokens. A sampler that cannot tell it raises ValueError, or leaves it None, which training refuses.

        Args:
            requests: prompts of any lengths, with any number of seeds.
            params: the distribution that is sampled from, and when to stop.
            on_progress: called with (completions done, completions in all) when some are done.
            on_completion: called once with each completion, (request's number, seed's number, completion), as early as
                it is there, so that a judge can read it while others are still being written. Returns at once.
        """
        ...

    def close(self) -> None:
        """Free what it holds and stop what it has started. Nothing is sampled afterwards."""
        ...
