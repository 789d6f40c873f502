"""Shared by the samplers' ``generate``: checks of prompts, EOS tokens, and collecting results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.types import Completion, SampleRequest


class Results:
    """The completions of one ``generate`` call, reported to its callbacks as they are added."""

    def __init__(
        self,
        requests: Sequence[SampleRequest],
        on_progress: Callable[[int, int], None] | None,
        on_completion: Callable[[int, int, Completion], None] | None,
    ) -> None:
        self._counts = [len(request.seeds) for request in requests]
        self._total = sum(self._counts)
        self._on_progress = on_progress
        self._on_completion = on_completion
        self._completions: dict[tuple[int, int], Completion] = {}

    def add(self, request: int, sample: int, completion: Completion) -> None:
        """Add the completion of seed number ``sample`` of a request."""
        self._completions[request, sample] = completion
        if self._on_completion is not None:
            self._on_completion(request, sample, completion)
        if self._on_progress is not None:
            self._on_progress(len(self._completions), self._total)

    def by_request(self) -> list[tuple[Completion, ...]]:
        """Return all completions in the order of requests and seeds."""
        return [tuple(self._completions[i, j] for j in range(count)) for i, count in enumerate(self._counts)]


def check_lengths(
    requests: Sequence[SampleRequest], max_new_tokens: int, max_length: int | None, limited_by: str
) -> None:
    """Raise ValueError for an empty prompt, or one too long for ``max_length`` tokens with its completion.

    Args:
        requests: the prompts.
        max_new_tokens: longest completion.
        max_length: longest prompt with its completion; None: no limit.
        limited_by: source of the limit, for the message.
    """
    lengths = [len(request.prompt.token_ids) for request in requests]
    if 0 in lengths:
        raise ValueError(f"prompt: request {lengths.index(0)} has no tokens; a prompt needs at least one")
    longest = max(lengths, default=0)
    if max_length is not None and longest + max_new_tokens > max_length:
        raise ValueError(
            f"sampling.max_new_tokens: {max_new_tokens}; with a prompt of {longest} tokens this exceeds the "
            f"{max_length} tokens of {limited_by}"
        )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends a text: chat models often have more of them than the tokenizer names."""
    sources = (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id)
    return frozenset(int(i) for ids in sources if ids is not None for i in (ids if isinstance(ids, list) else [ids]))
