"""Where an endpoint is, and what a run may spend there: the ``endpoint`` key of judges, writers and the classifier."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, fields
from urllib.parse import urlsplit


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointSettings:
    """An OpenAI-compatible chat endpoint and the limits on its use.

    Example:
        >>> EndpointSettings(base_url="http://localhost:8000/v1", model="llama-3.3-70b-instruct", max_calls=100).host
        'localhost:8000'

    Attributes:
        base_url: address up to and including ``/v1``; without user name, password or query.
        model: the server's name of the model.
        api_key_env: environment variable with the key. A server without keys needs none.
        timeout_seconds: limit for one whole reply.
        max_attempts: calls for one reply, at most, when calls fail.
        max_calls: cap on the calls, including repeated ones. Never exceeded.
        max_total_tokens: cap on the tokens, prompts included. Once it is reached no call starts, but calls in flight
            may exceed it.
        max_dollars: cap on the price, as with ``max_total_tokens``. A failed call counts as free, since its tokens are
            unknown.
        dollars_per_million_input: price of prompt tokens.
        dollars_per_million_output: price of completion tokens.

    Raises:
        ValueError: a value is out of range; or ``max_dollars`` without prices.
    """

    base_url: str
    model: str
    api_key_env: str = "OPENAI_API_KEY"
    timeout_seconds: float = 120.0
    max_attempts: int = 6
    max_calls: int | None = None
    max_total_tokens: int | None = None
    max_dollars: float | None = None
    dollars_per_million_input: float = 0.0
    dollars_per_million_output: float = 0.0

    def __post_init__(self) -> None:
        _check_url(self.base_url)
        if not self.model.strip():
            raise ValueError("model: is empty; give the server's name of the model")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", self.api_key_env):
            # The value is not shown: it may be the key itself.
            raise ValueError("api_key_env: not the name of an environment variable; give its name, never the key")
        if self.max_attempts < 1:
            raise ValueError(f"max_attempts: {self.max_attempts}; must be >= 1")
        for name in ("timeout_seconds", "max_calls", "max_total_tokens", "max_dollars"):
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value}; must be > 0")
        prices = ("dollars_per_million_input", "dollars_per_million_output")
        for name in prices:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name}: {getattr(self, name)}; must be >= 0")
        if self.max_dollars is not None and not any(getattr(self, name) for name in prices):
            raise ValueError(f"max_dollars: {self.max_dollars}; needs prices: set {' and '.join(prices)}")

    @property
    def host(self) -> str:
        """Host, and port if there is one, of the base URL."""
        url = urlsplit(self.base_url)
        return f"{url.hostname}" if url.port is None else f"{url.hostname}:{url.port}"

    @property
    def caps(self) -> dict[str, float]:
        """The caps that are set, by name."""
        caps = {name: getattr(self, name) for name in ("max_calls", "max_total_tokens", "max_dollars")}
        return {name: cap for name, cap in caps.items() if cap is not None}

    def price(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Dollars for so many tokens; 0 without prices."""
        dollars = prompt_tokens * self.dollars_per_million_input + completion_tokens * self.dollars_per_million_output
        return dollars / 1e6


# Settings that may change when a run is resumed, since answers depend on the model only.
FREE_ON_RESUME = frozenset(field.name for field in fields(EndpointSettings)) - {"model"}


def check_sampling(*, temperature: float, max_tokens: int) -> None:
    """Raise ValueError if a temperature or a limit on a reply's tokens is out of range."""
    if not 0 <= temperature <= 2:
        raise ValueError(f"temperature: {temperature}; must be in 0 .. 2")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}; must be >= 1")


def _check_url(base_url: str) -> None:
    try:
        url = urlsplit(base_url)
        _ = url.port  # raises for a port out of range
    except ValueError:
        url = urlsplit("")
    if "@" in base_url or url.query or url.fragment:
        raise ValueError(  # the value is not shown: it may contain a password
            "base_url: contains a user name, password, query or fragment; give only the address, and the key in the "
            "environment variable that api_key_env names"
        )
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"base_url: {base_url!r}; must be an address such as http://localhost:8000/v1")
    if url.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"base_url: {base_url!r}; leave out /chat/completions, which is appended to it")
