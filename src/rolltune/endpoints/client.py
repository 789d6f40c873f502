"""A client of any OpenAI-compatible chat endpoint: a server of one's own (vLLM, SGLang, llama.cpp) or a service.

What fails and may pass (no connection, no reply in time, 408, 409, 429, 5xx, a body that is no chat completion)
is asked again, later each time and never before the server's ``Retry-After``. What is spent is counted before it is
spent, so that a cap holds. The key comes from the environment, and stands in no repr, log or exception.
"""

from __future__ import annotations

import asyncio
import math
import os
import random
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import tenacity
from pydantic import BaseModel, Field, ValidationError

from rolltune.endpoints.budget import Budget
from rolltune.types import Message

if TYPE_CHECKING:
    import openai

# A failed call is repeated after so long, times 2 with each attempt; the half of it is drawn, so that calls that failed
# together do not come back together.
BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF = 60.0
_LONGEST_RETRY_AFTER = 120.0  # a server that asks for more is asked again all the same
_LARGEST_BODY = 8 * 2**20  # bytes; a reply of 100,000 tokens has half a MiB
_PASSING = frozenset({408, 409, 429})  # and 5xx
_MESSAGE_CHARS = 300  # of what a server says, in an error
_NO_KEY = "none"  # servers without keys take any


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """What the endpoint wrote.

    Attributes:
        text: of the first choice; empty where it has none.
        model: as the server names it, which may be more exact than the name that was asked for.
        finish_reason: "stop", "length" for a reply cut at ``max_tokens``, or what else the server says; empty where it
            says nothing.
        prompt_tokens: as the server counts them; 0 where it does not.
        completion_tokens: the same.
    """

    text: str
    model: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Usage:
    """What an endpoint has cost in this process.

    Attributes:
        calls: requests sent, those in flight and those that failed included.
        prompt_tokens: as the server counts them.
        completion_tokens: the same.
        dollars: by the prices that the endpoint was given; 0 without prices.
        retries: calls that were sent because an earlier one had failed.
        failures: calls that brought no reply.
    """

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    dollars: float = 0.0
    retries: int = 0
    failures: int = 0


class BudgetExceeded(RuntimeError):
    """A cap is reached, and the call was not sent.

    Attributes:
        key: the argument that sets the cap: "max_calls", "max_tokens" or "max_dollars".
        limit: the cap.
        spent: what was spent by then.
    """

    def __init__(self, key: str, limit: float, spent: Usage) -> None:
        tokens = spent.prompt_tokens + spent.completion_tokens
        super().__init__(
            f"{key}: the cap of {limit:,} is reached: {spent.calls:,} calls, {tokens:,} tokens and "
            f"${spent.dollars:.2f} are spent; a higher {key} goes further"
        )
        self.key = key
        self.limit = limit
        self.spent = spent


class EndpointDown(RuntimeError):
    """All attempts at a call failed; the message says how the last one did."""


class Refused(ValueError):
    """The server does not take a call, and would not if it came again.

    Attributes:
        status: of the HTTP response. 401, 402, 403 and 404 are about who asks for what; 400, 413 and 422 may be about
            this call's text alone.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TransientError(Exception):
    """A failure that may pass."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


# --- what a server sends ----------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=0, le=10**9)]


class _Message(BaseModel):
    content: str | None = None


class _Choice(BaseModel):
    message: _Message
    finish_reason: str | None = None


class _Usage(BaseModel):
    prompt_tokens: Count = 0
    completion_tokens: Count = 0


class _Completion(BaseModel):
    """The part of a chat completion that is read. Further fields are passed over."""

    model: str = ""
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class _Connection:
    client: openai.AsyncOpenAI
    slots: asyncio.Semaphore


class Endpoint:
    """A model behind ``<base_url>/chat/completions``.

    Event loops may come and go (one ``asyncio.run`` after the other): each has connections of its own. Not for several
    threads at once.

    Example:
        >>> endpoint = Endpoint(base_url="http://localhost:8000/v1", model="llama-3.3-70b-instruct", max_calls=100)
        >>> endpoint.spent.calls
        0

    Args:
        base_url: up to and with ``/v1``; without user name, password or query.
        model: as the server names it.
        api_key_env: the environment variable with the key. Where it is not set, a placeholder is sent, which is enough
            for a server without keys.
        max_concurrency: calls in flight at once, those that wait for another attempt included.
        timeout_seconds: for a whole reply.
        max_attempts: calls for one reply, at most.
        max_calls: cap on the calls of this process, repeated ones included. Never exceeded.
        max_tokens: cap on the tokens of this process, prompts included. No call is begun once it is reached; calls in
            flight, ``max_concurrency`` at most, may run over it.
        max_dollars: cap on the price of this process; as with ``max_tokens``. A call that fails counts as free, since
            its tokens are not known.
        dollars_per_million_input: price of prompt tokens.
        dollars_per_million_output: price of completion tokens.

    Raises:
        ValueError: an argument is out of range; ``max_dollars`` has no prices to go by.
    """

    def __init__(
        self,
        *,
        base_url: str,
        model: str,
        api_key_env: str = "OPENAI_API_KEY",
        max_concurrency: int = 16,
        timeout_seconds: float = 120.0,
        max_attempts: int = 6,
        max_calls: int | None = None,
        max_tokens: int | None = None,
        max_dollars: float | None = None,
        dollars_per_million_input: float = 0.0,
        dollars_per_million_output: float = 0.0,
    ) -> None:
        self.host = _host(base_url)
        if not model.strip():
            raise ValueError("model: is empty; give the name that the server has for it")
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", api_key_env):
            # Not shown: what stands there may be the key itself.
            raise ValueError("api_key_env: is no name of an environment variable; give the name, never the key")
        for name, value in (("max_concurrency", max_concurrency), ("max_attempts", max_attempts)):
            if value < 1:
                raise ValueError(f"{name}: {value}; must be >= 1")
        caps = {"max_calls": max_calls, "max_tokens": max_tokens, "max_dollars": max_dollars}
        for name, value in {"timeout_seconds": timeout_seconds, **caps}.items():
            if value is not None and not 0 < value < math.inf:
                raise ValueError(f"{name}: {value}; must be > 0")
        prices = {
            "dollars_per_million_input": dollars_per_million_input,
            "dollars_per_million_output": dollars_per_million_output,
        }
        for name, value in prices.items():
            if not 0 <= value < math.inf:
                raise ValueError(f"{name}: {value}; must be >= 0")
        if max_dollars is not None and not any(prices.values()):
            raise ValueError(f"max_dollars: {max_dollars}; needs prices to go by: set {' and '.join(prices)}")
        self.base_url = base_url.rstrip("/")
        self.model = model
        self._api_key_env = api_key_env
        self._max_concurrency = max_concurrency
        self._timeout_seconds = timeout_seconds
        self._max_attempts = max_attempts
        self._caps = {name: cap for name, cap in caps.items() if cap is not None}
        self._prices = tuple(prices.values())
        self._calls = self._prompt_tokens = self._completion_tokens = self._retries = self._failures = 0
        self._connections: dict[asyncio.AbstractEventLoop, _Connection] = {}
        self._ledger: Budget | None = None

    def __repr__(self) -> str:
        return f"Endpoint(base_url={self.base_url!r}, model={self.model!r})"

    @property
    def spent(self) -> Usage:
        return Usage(
            calls=self._calls,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            dollars=self._price(self._prompt_tokens, self._completion_tokens),
            retries=self._retries,
            failures=self._failures,
        )

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        temperature: float = 0.0,
        max_tokens: int = 1024,
        seed: int | None = None,
        response_format: dict[str, Any] | None = None,
    ) -> Reply:
        """One reply to a conversation.

        Args:
            messages: up to the turn that is asked for.
            temperature: 0 for the likeliest reply.
            max_tokens: of the reply; one that reaches it has finish reason "length".
            seed: for servers that sample by it; others take no notice.
            response_format: as the protocol has it, such as ``{"type": "json_object"}``.

        Raises:
            BudgetExceeded: a cap was reached before the call, or before another attempt at it.
            EndpointDown: all attempts failed.
            Refused: a ValueError: the server refuses the call, and would again (400, 401, 403, 404 ...).
            ValueError: there is a cap on tokens or dollars, and the server does not say how many tokens it took.
        """
        request: dict[str, Any] = {
            "model": self.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if seed is not None:
            request["seed"] = seed
        if response_format is not None:
            request["response_format"] = response_format
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self._max_attempts),
            wait=_pause,
            retry=tenacity.retry_if_exception_type(TransientError),
            reraise=True,
        )
        connection = self._connect()
        try:
            async with connection.slots:
                async for attempt in attempts:
                    with attempt:
                        return await self._call(connection.client, request, attempt.retry_state.attempt_number)
        except TransientError as error:
            failure = str(error)
        else:
            raise AssertionError("the last attempt returns or raises")
        raise EndpointDown(f"{self.base_url}: {self._max_attempts} attempts failed, the last with: {failure}")

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection.client.close()

    def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            import openai  # a second to import, which a run without an endpoint need not wait for

            key = self._key() or _NO_KEY
            if not (key.isascii() and key.isprintable() and " " not in key):
                # The HTTP library would refuse the header, and show it.
                raise ValueError(f"api_key_env: what {self._api_key_env} holds is no key; keys have no spaces")
            client = openai.AsyncOpenAI(
                api_key=key,
                base_url=self.base_url,
                timeout=self._timeout_seconds,
                max_retries=0,
                # The client's own one closes itself when it is collected, which fails aloud if its loop has ended.
                http_client=openai.DefaultAsyncHttpxClient(),
            )
            self._connections = {old: kept for old, kept in self._connections.items() if not old.is_closed()}
            self._connections[loop] = _Connection(client, asyncio.Semaphore(self._max_concurrency))
        return self._connections[loop]

    def _key(self) -> str:
        """The key, or nothing where the variable is not set."""
        return os.environ.get(self._api_key_env, "").strip()

    async def _call(self, client: openai.AsyncOpenAI, request: dict[str, Any], attempt: int) -> Reply:
        """Send a request once."""
        import openai

        self._check_caps()
        self._enter_call()
        self._retries += attempt > 1
        failure: Exception
        try:
            # The client's own time limit is for each read: a server that drips would hold it for ever.
            async with asyncio.timeout(self._timeout_seconds):
                response = await client.chat.completions.with_raw_response.create(**request)
            return self._read(response.content)
        except openai.APIStatusError as error:
            failure = self._refusal(error)
        except (TimeoutError, openai.APITimeoutError):
            failure = TransientError(f"no reply within {self._timeout_seconds:g} s")
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            failure = TransientError(f"no connection ({type(cause).__name__}: {self._shown(str(cause))})")
        except TransientError as error:
            failure = error
        self._failures += 1
        # Raised here, not above: the library's error would hang on as the context, with the request and so the key.
        raise failure

    def share_budget(self, ledger: Budget) -> None:
        """From now on the caps hold for all that share the ledger: the processes of a run, and all its starts."""
        self._ledger = ledger

    def _enter_call(self) -> None:
        """Count a call before it is sent. Of several processes that have one call left in common, one gets it."""
        if self._ledger is not None:
            most = self._caps.get("max_calls")
            if self._ledger.add(calls=1).calls > (math.inf if most is None else most):
                self._ledger.add(calls=-1)
                raise BudgetExceeded("max_calls", most or 0, self._spent_in_all())
        self._calls += 1

    def _spent_in_all(self) -> Usage:
        """By this process; with a ledger, by all that share it."""
        if self._ledger is None:
            return self.spent
        account = self._ledger.read()
        return replace(
            self.spent,
            calls=account.calls,
            prompt_tokens=account.prompt_tokens,
            completion_tokens=account.completion_tokens,
            dollars=self._price(account.prompt_tokens, account.completion_tokens),
        )

    def _price(self, prompt_tokens: int, completion_tokens: int) -> float:
        return (prompt_tokens * self._prices[0] + completion_tokens * self._prices[1]) / 1e6

    def _check_caps(self) -> None:
        if not self._caps:
            return
        spent = self._spent_in_all()
        counts = {
            "max_calls": spent.calls,
            "max_tokens": spent.prompt_tokens + spent.completion_tokens,
            "max_dollars": spent.dollars,
        }
        for name, cap in self._caps.items():
            if counts[name] >= cap:
                raise BudgetExceeded(name, cap, spent)

    def _read(self, body: bytes) -> Reply:
        """The reply in a response's body.

        Raises:
            TransientError: it is not whole, or no chat completion.
            ValueError: it lacks the token counts that a cap needs.
        """
        if len(body) > _LARGEST_BODY:
            raise TransientError(f"a reply of {len(body)} bytes; {_LARGEST_BODY} are read at most")
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            said = self._shown(body.decode("utf-8", errors="replace"))
            problem = f"no chat completion ({where}{': ' if where else ''}{first['msg']}): {said}"
        else:
            if completion.usage is not None:
                self._prompt_tokens += completion.usage.prompt_tokens
                self._completion_tokens += completion.usage.completion_tokens
                if self._ledger is not None:
                    self._ledger.add(
                        prompt_tokens=completion.usage.prompt_tokens,
                        completion_tokens=completion.usage.completion_tokens,
                    )
            elif unkept := [name for name in ("max_tokens", "max_dollars") if name in self._caps]:
                raise ValueError(
                    f"{unkept[0]}: cannot be kept, as {self.host} does not say how many tokens a reply took (usage); "
                    "leave it out, and set max_calls"
                )
            if completion.choices:
                choice, usage = completion.choices[0], completion.usage or _Usage()
                return Reply(
                    text=choice.message.content or "",
                    model=completion.model,
                    finish_reason=choice.finish_reason or "",
                    prompt_tokens=usage.prompt_tokens,
                    completion_tokens=usage.completion_tokens,
                )
            problem = "no chat completion (choices: is empty)"
        raise TransientError(problem)

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        """What a response of status 3xx, 4xx or 5xx comes to."""
        status, body = error.status_code, error.body
        message = body.get("message") if isinstance(body, dict) else None
        said = f"{status}: {self._shown(message if isinstance(message, str) else error.response.text)}"
        if status in _PASSING or status >= 500:
            return TransientError(said, _seconds(error.response.headers.get("retry-after")))
        if status in (401, 403):
            problem = "is refused by" if self._key() else "is not set, and a key is wanted by"
            return Refused(f"api_key_env: {self._api_key_env} {problem} {self.host} ({said})", status)
        if status == 404:
            return Refused(f"model or base_url: {self.base_url} has no {self.model!r} ({said})", status)
        return Refused(f"model or base_url: {self.base_url} refuses a call for {self.model!r} ({said})", status)

    def _shown(self, text: str) -> str:
        """What a server says, for an error: one short line, without the key, without control characters."""
        text = text.replace(self._key() or "\0", "***")[: 10 * _MESSAGE_CHARS]
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= _MESSAGE_CHARS else f"{text[: _MESSAGE_CHARS - 3]}..."


_jitter = random.Random()  # of its own: nothing that is seeded moves on by a retry


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt."""
    assert state.outcome is not None
    failure = state.outcome.exception()
    assert isinstance(failure, TransientError)
    longest = min(BACKOFF_SECONDS * 2 ** min(state.attempt_number - 1, 30), _LONGEST_BACKOFF)
    return max(_jitter.uniform(longest / 2, longest), failure.retry_after)


def _seconds(retry_after: str | None) -> float:
    """A Retry-After header, seconds or an HTTP date, as seconds from now; 0 where there is none or it says nothing."""
    if retry_after is None:
        return 0.0
    try:
        seconds = float(retry_after)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(retry_after).timestamp() - time.time()
        except (ValueError, OverflowError):
            return 0.0
    return min(max(seconds, 0.0), _LONGEST_RETRY_AFTER) if not math.isnan(seconds) else 0.0


def _host(base_url: str) -> str:
    """Host and port of a base URL.

    Raises:
        ValueError: it is no HTTP URL, or holds more than host and path.
    """
    try:
        url = urlsplit(base_url)
        port = url.port
    except ValueError:
        url, port = urlsplit(""), None
    if "@" in base_url or url.query or url.fragment:
        raise ValueError(  # not shown: it may hold a password
            "base_url: holds a user name, password, query or fragment; give the address alone, and the key in the "
            "environment variable that api_key_env names"
        )
    if url.scheme not in ("http", "https") or not url.hostname:
        raise ValueError(f"base_url: {base_url!r}; an address such as http://localhost:8000/v1 is wanted")
    if url.path.rstrip("/").endswith("/completions"):
        raise ValueError(f"base_url: {base_url!r}; leave out /chat/completions, which is put behind it")
    return url.hostname if port is None else f"{url.hostname}:{port}"
