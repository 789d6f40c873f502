"""Read the tokens of a call from a server's reply, so that caps hold whatever its usage looks like.

Servers name the counts differently, report only their sum, report null or 0, or nothing. A count that is missing is
replaced by an upper estimate: a token has at least one byte, and a reply at most ``max_tokens``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Objects with counts; or the reply itself.
_PLACES = ("usage", "usagemetadata", "xgroq", "meta", "metrics", "timings", "completiontokensdetails")
# Names in lower case, without underscores.
_PROMPT = ("prompttokens", "inputtokens", "prompttokencount", "inputtokencount", "promptevalcount", "promptn")
_COMPLETION = (
    "completiontokens", "outputtokens", "candidatestokencount", "completiontokencount", "outputtokencount", "evalcount",
    "generatedtokens", "tokenspredicted", "predictedn",
)  # fmt: skip
_CACHED = ("cachereadinputtokens", "cachecreationinputtokens")  # Anthropic's: not among the prompt's tokens
_THOUGHTS = ("reasoningtokens", "thoughtstokencount")  # among the reply's tokens, or apart from them
_TOTAL = ("totaltokens", "totaltokencount", "tokens")
_COST = ("cost", "totalcost", "costusd", "costinusd", "estimatedcost")
_LARGEST = 10**9
_MAX_DEPTH = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Tokens:
    """Use of one call.

    Attributes:
        prompt: tokens of the prompt.
        completion: tokens of the reply.
        total: their sum as reported; larger than both together if the server does not say which is which, or does not
            count thoughts among the reply's tokens.
        dollars: price as the server reports it; 0 without one.
        is_estimate: whether a count is an upper estimate.
    """

    prompt: int
    completion: int
    total: int
    dollars: float
    is_estimate: bool


def read_usage(reply: Any, prompt_bytes: int, most_completion: int) -> Tokens:
    """Read the counts in a parsed reply.

    Example:
        >>> read_usage({"usage": {"input_tokens": 12, "output_tokens": None}}, 400, 1024).completion
        1024

    Args:
        reply: parsed JSON of any shape; None if it cannot be parsed.
        prompt_bytes: size of the request, an upper bound on the prompt's tokens.
        most_completion: upper bound on the reply's tokens.
    """
    counts = dict(_numbers(reply)) if isinstance(reply, Mapping) else {}
    prompt, completion, total = (_first(counts, names) for names in (_PROMPT, _COMPLETION, _TOTAL))
    if prompt:
        prompt += sum(_first(counts, (name,)) for name in _CACHED)
    if completion and (thoughts := _first(counts, _THOUGHTS)) > completion:
        completion += thoughts
    dollars = max((counts[name] for name in _COST if name in counts), default=0.0)
    if total and not (prompt and completion):
        return Tokens(
            prompt=prompt, completion=completion, total=max(total, prompt + completion), dollars=dollars,
            is_estimate=False,
        )  # fmt: skip
    return Tokens(
        prompt=prompt or prompt_bytes,
        completion=completion or most_completion,
        total=total,
        dollars=dollars,
        is_estimate=not (prompt and completion),
    )


def _numbers(value: Mapping[Any, Any], depth: int = 0) -> list[tuple[str, float]]:
    """Usable numbers by simplified name. Those of the outer objects come last and so win."""
    inner: list[tuple[str, float]] = []
    outer: list[tuple[str, float]] = []
    for key, item in value.items():
        name = str(key).replace("_", "").replace("-", "").casefold()
        if isinstance(item, Mapping) and name in _PLACES and depth < _MAX_DEPTH:
            inner += _numbers(item, depth + 1)
        elif isinstance(item, int | float) and not isinstance(item, bool) and 0 < item <= _LARGEST:
            outer.append((name, item))
    return inner + outer


def _first(counts: Mapping[str, float], names: tuple[str, ...]) -> int:
    return max((math.ceil(counts[name]) for name in names if name in counts), default=0)
