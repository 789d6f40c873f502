"""A client of any OpenAI-compatible chat endpoint: your own server (vLLM, SGLang, llama.cpp) or a service.

Transient failures (no connection, no reply in time, 408, 409, 429, 5xx, a body that is not a chat completion) are
retried with growing pauses, and never before the server's ``Retry-After``. Each call is counted before it is sent, so a
cap on calls holds. The key comes from the environment and appears in no repr, log or exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import time
from collections.abc import Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Annotated, Any

import tenacity
from pydantic import BaseModel, Field, ValidationError

from rolltune.endpoints.budget import Budget, Usage
from rolltune.endpoints.settings import EndpointSettings
from rolltune.types import Message

if TYPE_CHECKING:
    import openai

# Pause before the first retry; it doubles with each attempt. Half of it is random, so that calls that failed together
# are not retried together.
BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF = 60.0
_LONGEST_RETRY_AFTER = 120.0  # a longer Retry-After is cut to this
_LARGEST_BODY = 8 * 2**20  # bytes; a reply of 100,000 tokens takes half a MiB
_TRANSIENT = frozenset({408, 409, 429})  # and 5xx
_MESSAGE_CHARS = 300  # of a server's message that an error quotes
_NO_KEY = "none"  # sent to servers without keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A reply of the model.

    Attributes:
        text: of the first choice; empty if it has none.
        model: the server's name of the model, which may be more exact than the name in the settings.
        finish_reason: "stop", "length" for a reply cut at ``max_tokens``, or another word of the server; may be empty.
        prompt_tokens: as the server counts them; 0 if it does not.
        completion_tokens: as the server counts them; 0 if it does not.
    """

    text: str
    model: str
    finish_reason: str
    prompt_tokens: int
    completion_tokens: int


class BudgetExceeded(RuntimeError):
    """A cap is reached, and the call was not sent.

    Attributes:
        key: the setting: "max_calls", "max_total_tokens" or "max_dollars".
        limit: the cap.
        usage: when it was reached.
    """

    def __init__(self, key: str, limit: float, usage: Usage) -> None:
        super().__init__(
            f"{key}: the cap of {limit:,} is reached after {usage.calls:,} calls, {usage.total_tokens:,} tokens and "
            f"${usage.dollars:.2f}; raise {key} to continue"
        )
        self.key = key
        self.limit = limit
        self.usage = usage


class EndpointDown(RuntimeError):
    """All attempts at a call failed. The message has the last failure."""


class Refused(ValueError):
    """The server refuses a call, and would refuse it again.

    Attributes:
        status: of the HTTP response. 401, 402, 403 and 404 concern the key, model or address; 400, 413 and 422 may
            concern only the text of this call.
    """

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class TransientError(Exception):
    """A failure after which a retry may succeed."""

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
    """The fields of a chat completion that are read. Others are ignored."""

    model: str = ""
    choices: list[_Choice]
    usage: _Usage | None = None


@dataclass(frozen=True, slots=True)
class _Connection:
    client: openai.AsyncOpenAI
    slots: AbstractAsyncContextManager[None]


class Endpoint:
    """A model behind ``<base_url>/chat/completions``.

    Each event loop gets its own connections, so one ``asyncio.run`` may follow another. Not thread-safe.

    Example:
        >>> endpoint = Endpoint(EndpointSettings(base_url="http://localhost:8000/v1", model="llama-3.3-70b-instruct"))
        >>> endpoint.usage.calls
        0

    Args:
        settings: address, model and limits. Caps apply to this process, or to all that share a budget
            (:meth:`share_budget`).
        max_concurrency: calls in flight at once, including those that wait for a retry; None: no limit.

    Raises:
        ValueError: ``max_concurrency`` is out of range.
    """

    def __init__(self, settings: EndpointSettings, *, max_concurrency: int | None = None) -> None:
        if max_concurrency is not None and max_concurrency < 1:
            raise ValueError(f"max_concurrency: {max_concurrency}; must be >= 1")
        self.settings = settings
        self.base_url = settings.base_url.rstrip("/")
        self._max_concurrency = max_concurrency
        self._calls = self._prompt_tokens = self._completion_tokens = self._retries = self._failures = 0
        self._connections: dict[asyncio.AbstractEventLoop, _Connection] = {}
        self._budget: Budget | None = None

    def __repr__(self) -> str:
        return f"Endpoint(base_url={self.base_url!r}, model={self.settings.model!r})"

    @property
    def usage(self) -> Usage:
        """Usage by this process."""
        return Usage(
            calls=self._calls,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
            dollars=self.settings.price(self._prompt_tokens, self._completion_tokens),
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
        """Ask for one reply to a conversation.

        Args:
            messages: ending with the message to reply to.
            temperature: 0 for the likeliest reply.
            max_tokens: of the reply. A reply cut there has the finish reason "length".
            seed: for servers that sample by a seed; others ignore it.
            response_format: as in the protocol, such as ``{"type": "json_object"}``.

        Raises:
            BudgetExceeded: a cap was reached before the call, or before a retry.
            EndpointDown: all attempts failed.
            Refused: a ValueError: the server refuses the call, and would again (400, 401, 403, 404 ...).
            ValueError: there is a cap on tokens or dollars, and the server does not report a reply's tokens.
        """
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": list(messages),
            "temperature": temperature,
            "max_tokens": max_tokens,
        }
        if seed is not None:
            request["seed"] = seed
        if response_format is not None:
            request["response_format"] = response_format
        attempts = tenacity.AsyncRetrying(
            stop=tenacity.stop_after_attempt(self.settings.max_attempts),
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
        raise EndpointDown(f"{self.base_url}: {self.settings.max_attempts} attempts failed, the last with: {failure}")

    async def aclose(self) -> None:
        """Close the connections of the running event loop."""
        connection = self._connections.pop(asyncio.get_running_loop(), None)
        if connection is not None:
            await connection.client.close()

    def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            import openai  # takes a second to import

            key = self._key() or _NO_KEY
            if not (key.isascii() and key.isprintable() and " " not in key):
                # The HTTP library would refuse the header, and quote it.
                raise ValueError(
                    f"api_key_env: the value of {self.settings.api_key_env} cannot be a key: it contains "
                    "spaces or special characters; set it again"
                )
            client = openai.AsyncOpenAI(
                api_key=key,
                base_url=self.base_url,
                timeout=self.settings.timeout_seconds,
                max_retries=0,
                # openai's default HTTP client closes itself when collected, which warns if its loop has ended.
                http_client=openai.DefaultAsyncHttpxClient(),
            )
            self._connections = {old: kept for old, kept in self._connections.items() if not old.is_closed()}
            slots = (
                contextlib.nullcontext() if self._max_concurrency is None else asyncio.Semaphore(self._max_concurrency)
            )
            self._connections[loop] = _Connection(client, slots)
        return self._connections[loop]

    def _key(self) -> str:
        """The key; empty if the variable is not set."""
        return os.environ.get(self.settings.api_key_env, "").strip()

    async def _call(self, client: openai.AsyncOpenAI, request: dict[str, Any], attempt: int) -> Reply:
        """Send a request once."""
        import openai

        self._check_caps()
        self._count_call()
        self._retries += attempt > 1
        failure: Exception
        try:
            # The client's own limit applies to each read, so a server that drips bytes could hold it forever.
            async with asyncio.timeout(self.settings.timeout_seconds):
                response = await client.chat.completions.with_raw_response.create(**request)
            return self._read(response.content)
        except openai.APIStatusError as error:
            failure = self._refusal(error)
        except (TimeoutError, openai.APITimeoutError):
            failure = TransientError(f"no reply within {self.settings.timeout_seconds:g} s")
        except openai.APIConnectionError as error:
            cause = error.__cause__ or error
            failure = TransientError(f"no connection ({type(cause).__name__}: {self._shown(str(cause))})")
        except TransientError as error:
            failure = error
        self._failures += 1
        # Raised outside of except: the library's error would be its context, with the request and so the key.
        raise failure

    def share_budget(self, budget: Budget) -> None:
        """From now on, apply the caps to all endpoints that share this budget: a run's processes and restarts."""
        self._budget = budget

    def _count_call(self) -> None:
        """Count a call before it is sent. If several processes have one call left between them, one gets it."""
        if self._budget is not None:
            cap = self.settings.max_calls
            if self._budget.add(calls=1).calls > (math.inf if cap is None else cap):
                self._budget.add(calls=-1)
                raise BudgetExceeded("max_calls", cap or 0, self._shared_usage())
        self._calls += 1

    def _shared_usage(self) -> Usage:
        """Usage by all that share the budget; by this process if it has none."""
        if self._budget is None:
            return self.usage
        shared = self._budget.read()
        return replace(
            self.usage,
            calls=shared.calls,
            prompt_tokens=shared.prompt_tokens,
            completion_tokens=shared.completion_tokens,
            dollars=self.settings.price(shared.prompt_tokens, shared.completion_tokens),
        )

    def _check_caps(self) -> None:
        if not self.settings.caps:
            return
        usage = self._shared_usage()
        used = {"max_calls": usage.calls, "max_total_tokens": usage.total_tokens, "max_dollars": usage.dollars}
        for name, cap in self.settings.caps.items():
            if used[name] >= cap:
                raise BudgetExceeded(name, cap, usage)

    def _read(self, body: bytes) -> Reply:
        """Read the reply in a response's body.

        Raises:
            TransientError: the body is cut, or not a chat completion.
            ValueError: it lacks the token counts that a cap needs.
        """
        if len(body) > _LARGEST_BODY:
            raise TransientError(f"a reply of {len(body)} bytes; at most {_LARGEST_BODY} are read")
        try:
            completion = _Completion.model_validate_json(body)
        except ValidationError as error:
            first = error.errors(include_url=False, include_context=False)[0]
            where = ".".join(map(str, first["loc"]))
            said = self._shown(body.decode("utf-8", errors="replace"))
            problem = f"not a chat completion ({where}{': ' if where else ''}{first['msg']}): {said}"
        else:
            if completion.usage is not None:
                self._prompt_tokens += completion.usage.prompt_tokens
                self._completion_tokens += completion.usage.completion_tokens
                if self._budget is not None:
                    self._budget.add(
                        prompt_tokens=completion.usage.prompt_tokens,
                        completion_tokens=completion.usage.completion_tokens,
                    )
            elif unchecked := [name for name in ("max_total_tokens", "max_dollars") if name in self.settings.caps]:
                raise ValueError(
                    f"{unchecked[0]}: cannot be checked, since {self.settings.host} does not report tokens (usage); "
                    "remove it, and set max_calls"
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
            problem = "not a chat completion (choices: is empty)"
        raise TransientError(problem)

    def _refusal(self, error: openai.APIStatusError) -> Exception:
        """Turn a response of status 3xx, 4xx or 5xx into an exception."""
        status, body = error.status_code, error.body
        message = body.get("message") if isinstance(body, dict) else None
        said = f"{status}: {self._shown(message if isinstance(message, str) else error.response.text)}"
        if status in _TRANSIENT or status >= 500:
            return TransientError(said, _seconds(error.response.headers.get("retry-after")))
        if status in (401, 403):
            problem = "is refused by" if self._key() else "is not set, and a key is required by"
            return Refused(f"api_key_env: {self.settings.api_key_env} {problem} {self.settings.host} ({said})", status)
        if status == 404:
            return Refused(f"model or base_url: {self.base_url} has no {self.settings.model!r} ({said})", status)
        return Refused(
            f"model or base_url: {self.base_url} refuses a call for {self.settings.model!r} ({said})", status
        )

    def _shown(self, text: str) -> str:
        """Shorten a server's message for an error: one line, without the key and control characters."""
        text = text.replace(self._key() or "\0", "***")[: 10 * _MESSAGE_CHARS]
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= _MESSAGE_CHARS else f"{text[: _MESSAGE_CHARS - 3]}..."


_jitter = random.Random()  # separate, so that a retry does not advance a seeded generator


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt."""
    assert state.outcome is not None
    failure = state.outcome.exception()
    assert isinstance(failure, TransientError)
    longest = min(BACKOFF_SECONDS * 2 ** min(state.attempt_number - 1, 30), _LONGEST_BACKOFF)
    return max(_jitter.uniform(longest / 2, longest), failure.retry_after)


def _seconds(retry_after: str | None) -> float:
    """Convert a Retry-After header (seconds or an HTTP date) to seconds from now; 0 if it is missing or malformed."""
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
