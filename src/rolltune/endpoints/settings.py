"""Where an endpoint is, and what a run may spend there: the ``endpoint`` key of judges, writers and the classifier."""

from __future__ import annotations

import contextlib
import ipaddress
import math
import re
import socket
from dataclasses import dataclass, field, fields
from typing import Literal, get_args
from urllib.parse import urlsplit

MaxTokensKey = Literal["max_tokens", "max_completion_tokens"]
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_LOOPBACK = ("localhost.localdomain", "ip6-localhost", "ip6-loopback")  # names in usual /etc/hosts
_OWN_HEADERS = ("authorization", "content-type", "accept-encoding", "content-length", "host")


@dataclass(frozen=True, kw_only=True, slots=True)
class EndpointSettings:
    """An OpenAI-compatible chat endpoint and the limits on its use.

    Example:
        >>> EndpointSettings(base_url="http://localhost:8000/v1", model="llama-3.3-70b-instruct", max_calls=100).host
        'localhost:8000'

    Attributes:
        base_url: address up to and including ``/v1``; without user name, password or query.
        model: the server's name of the model.
        api_key_env: environment variable with the key, which is sent to ``base_url``, over plain http too. None: no key
            is sent, except to https://api.openai.com: that in OPENAI_API_KEY, with OPENAI_ORG_ID and OPENAI_PROJECT_ID.
        headers_env: further header fields, each with the environment variable that has its value, such as
            ``{api-key: AZURE_OPENAI_API_KEY}``.
        api_version: sent as the query ``api-version``, which Azure needs.
        max_tokens_key: name under which the limit on a reply is sent; newer OpenAI models want
            ``max_completion_tokens``.
        send_seed: whether a seed is sent; false for servers that refuse it, such as Mistral's.
        timeout_seconds: limit for one whole reply.
        max_attempts: calls for one reply, at most, when calls fail.
        max_calls: cap on the calls, including repeated ones. Never exceeded.
        max_total_tokens: cap on the tokens, prompts included. Once it is reached no call starts, but calls in flight
            may exceed it. What the server does not report is counted by an upper estimate: a token for each byte of the
            request and of the reply, at most ``max_tokens`` for the latter. So is an unreadable reply.
        max_dollars: cap on the price, as with ``max_total_tokens``. A call without any reply (an error, or none in
            time) counts as free.
        dollars_per_million_input: price of prompt tokens.
        dollars_per_million_output: price of completion tokens.

    Raises:
        ValueError: a value is out of range; or ``max_dollars`` without prices.
    """

    base_url: str
    model: str
    api_key_env: str | None = None
    headers_env: dict[str, str] = field(default_factory=dict)
    api_version: str | None = None
    max_tokens_key: MaxTokensKey = "max_tokens"
    send_seed: bool = True
    timeout_seconds: float = 120.0
    max_attempts: int = 6
    max_calls: int | None = None
    max_total_tokens: int | None = None
    max_dollars: float | None = None
    dollars_per_million_input: float = 0.0
    dollars_per_million_output: float = 0.0

    def __post_init__(self) -> None:
        check_url(self.base_url)
        if not self.model.strip():
            raise ValueError("model: is empty; give the server's name of the model")
        # The values are not shown: they may be the keys themselves.
        if self.api_key_env is not None and not _VARIABLE.fullmatch(self.api_key_env):
            raise ValueError("api_key_env: not the name of an environment variable; give its name, never the key")
        for name, variable in self.headers_env.items():
            if not re.fullmatch(r"[A-Za-z0-9-]+", name) or name.casefold() in _OWN_HEADERS:
                raise ValueError("headers_env: not the name of a header field, or one that is set already")
            if not _VARIABLE.fullmatch(variable):
                raise ValueError(f"headers_env.{name}: not the name of an environment variable; give its name")
        if self.max_tokens_key not in get_args(MaxTokensKey):
            raise ValueError(f"max_tokens_key: {self.max_tokens_key!r}; use {' or '.join(get_args(MaxTokensKey))}")
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
    def account(self) -> str:
        """The model and its server, whatever the spelling of the URL: caps are counted by it."""
        url = urlsplit(self.base_url)
        port = url.port or (443 if url.scheme == "https" else 80)
        return f"{self.model.strip()} {_canonical_host(url.hostname or '')}:{port}"

    @property
    def is_local(self) -> bool:
        """Whether the server is reached by this machine's loopback address."""
        return _canonical_host(urlsplit(self.base_url).hostname or "") == "localhost"

    @property
    def is_openai(self) -> bool:
        url = urlsplit(self.base_url)
        return url.scheme == "https" and url.hostname == "api.openai.com" and url.port in (None, 443)

    @property
    def key_variable(self) -> str | None:
        """The environment variable whose value is sent as the key; None if none is."""
        return self.api_key_env or ("OPENAI_API_KEY" if self.is_openai else None)

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


def can_be_sent(key: str) -> bool:
    """Whether a key can be sent in a header field: not empty, ASCII, without spaces and control characters."""
    return bool(key) and key.isascii() and key.isprintable() and " " not in key


def check_url(base_url: str, key: str = "base_url") -> None:
    """Raise ValueError unless an address is one of http or https, without anything that may be secret.

    Args:
        base_url: the address.
        key: its config key, for the message.
    """
    try:
        url = urlsplit(base_url)
        _ = url.port  # raises for a port out of range
    except ValueError:
        url = urlsplit("")
    if any(sign in base_url for sign in "@?#"):
        raise ValueError(  # the value is not shown: it may contain a password
            f"{key}: contains a user name, password, query or fragment; give only the address, the key in the "
            "environment variable that api_key_env names, and Azure's version as api_version"
        )
    is_one_word = base_url.isprintable() and " " not in base_url
    if url.scheme not in ("http", "https") or not url.hostname or not is_one_word:
        raise ValueError(f"{key}: {base_url!r}; must be an address such as http://localhost:8000/v1")
    if url.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"{key}: {base_url!r}; leave out /chat/completions, which is appended to it")


def _canonical_host(host: str) -> str:
    """One spelling for each host; "localhost" for all addresses of this machine's loopback."""
    host = host.casefold().rstrip(".")
    with contextlib.suppress(UnicodeError):  # a name that is none fails when it is called
        host = host.encode("idna").decode()
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        try:
            address = ipaddress.ip_address(socket.inet_aton(host))  # 127.1
        except OSError:
            return "localhost" if host.endswith(".localhost") or host in _LOOPBACK else host
    address = getattr(address, "ipv4_mapped", None) or address
    return "localhost" if address.is_loopback or address.is_unspecified else str(address)
