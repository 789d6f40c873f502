"""Shared by the samplers' ``generate``: checks of prompts, EOS tokens, and collecting results."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.prompts import special_token_in, special_tokens, turn_end
from rolltune.types import Completion, SampleRequest


class PromptTooLong(ValueError):
    """A prompt does not fit a sampler's limit together with its completion."""


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
    """Raise ValueError for an empty prompt, PromptTooLong for one that does not fit with its completion.

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
        raise PromptTooLong(
            f"sampling.max_new_tokens: {max_new_tokens}; with a prompt of {longest} tokens this exceeds the "
            f"{max_length} tokens of {limited_by}"
        )


def eos_token_ids(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return every token that ends a text: the model's, the tokenizer's, and the one that ends a turn in the chat
    template."""
    sources = (getattr(model.generation_config, "eos_token_id", None), tokenizer.eos_token_id, turn_end(tokenizer))
    return frozenset(int(i) for ids in sources if ids is not None for i in (ids if isinstance(ids, list) else [ids]))


def split_stop(stop: Sequence[str], tokenizer: PreTrainedTokenizerBase) -> tuple[tuple[str, ...], frozenset[int]]:
    """Split stop strings into those to look for in the text, and special tokens, which the text does not have.

    Raises:
        ValueError: a stop string holds a special token and more.
    """
    special = {token: int(tokenizer.convert_tokens_to_ids(token)) for token in special_tokens(tokenizer)}  # pyright: ignore
    strings = tuple(text for text in stop if text not in special)
    for text in strings:
        if token := special_token_in(text, tokenizer):
            raise ValueError(
                f"sampling.stop: {text!r}: {token!r} is a special token of the tokenizer and not part of the text; "
                "give it as a stop string of its own"
            )
    return strings, frozenset(special[text] for text in stop if text in special)
