"""A client of any OpenAI-compatible chat endpoint: your own server (vLLM, SGLang, llama.cpp) or a service.

Transient failures (no connection, no reply in time, 408, 409, 429, 5xx, a body that is not a chat completion) are
retried with growing pauses, and never before the server's ``Retry-After``. Each call is counted before it is sent, so a
cap on calls holds. A reply's tokens are counted as the server reports them, under whatever names, or by an upper
estimate (:mod:`rolltune.endpoints.usage`). The key comes from the environment, goes to ``base_url`` only (redirects are
not followed), and appears in no repr, log or exception.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import os
import random
from collections.abc import Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, replace
from typing import Any

import httpx
import tenacity
from pydantic import ValidationError

from rolltune.endpoints.budget import Budget, Usage
from rolltune.endpoints.redaction import redacted
from rolltune.endpoints.responses import ChatCompletion, TransientError, read_body, retry_seconds, server_error, text_of
from rolltune.endpoints.settings import EndpointSettings, can_be_sent
from rolltune.endpoints.usage import Tokens, read_usage
from rolltune.types import Message

# Pause before the first retry; it doubles with each attempt. Half of it is random, so that calls that failed together
# are not retried together.
BACKOFF_SECONDS = 0.5
_LONGEST_BACKOFF = 60.0
_TRANSIENT = frozenset({408, 409, 429})  # and 5xx
_MESSAGE_CHARS = 300  # of a server's message that an error quotes
_NO_KEY = "none"  # sent to servers without keys
# In the code, type or message of an error: the account is exhausted, and waiting does not help.
_NO_QUOTA = (
    "insufficient_quota", "billing", "exceeded your current quota", "insufficient balance", "out of credits", "arrear"
)  # fmt: skip
_CUT = frozenset({"length", "max_tokens", "max_output_tokens", "model_length", "token_limit"})  # finish reasons
_BAD_KEY = ("invalid_api_key", "authentication_error", "invalid_authentication", "incorrect api key")
_log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class Reply:
    """A reply of the model.

    Attributes:
        text: of the first choice; empty if it has none.
        reasoning: its thoughts, where the server reports them separately.
        model: the server's name of the model, which may be more exact than the name in the settings.
        finish_reason: "stop", "length" for a reply cut at ``max_tokens``, or another word of the server, in lower case;
            may be empty.
        prompt_tokens: as the server counts them; an upper estimate if it does not.
        completion_tokens: as the server counts them; an upper estimate if it does not.
    """

    text: str
    reasoning: str = ""
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


@dataclass(frozen=True, slots=True)
class _Connection:
    client: httpx.AsyncClient
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
        self._dollars = 0.0
        self._has_warned = False
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
            dollars=self._dollars,
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
            seed: for servers that sample by a seed; not sent with the setting ``send_seed: false``.
            response_format: as in the protocol, such as ``{"type": "json_object"}``.

        Raises:
            BudgetExceeded: a cap was reached before the call, or before a retry.
            EndpointDown: all attempts failed.
            Refused: a ValueError: the server refuses the call, and would again (400, 401, 403, 404 ..., an exhausted
                account).
        """
        request: dict[str, Any] = {
            "model": self.settings.model,
            "messages": list(messages),
            "temperature": temperature,
            self.settings.max_tokens_key: max_tokens,
        }
        if seed is not None and self.settings.send_seed:
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
            await connection.client.aclose()

    def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        if loop not in self._connections:
            client = httpx.AsyncClient(
                headers=self._headers(),
                params=None if self.settings.api_version is None else {"api-version": self.settings.api_version},
                timeout=self.settings.timeout_seconds,
                trust_env=not self.settings.is_local,  # a proxy cannot reach this machine's servers, but reads the key
                limits=httpx.Limits(max_connections=1000, max_keepalive_connections=100),
            )
            self._connections = {old: kept for old, kept in self._connections.items() if not old.is_closed()}
            slots = (
                contextlib.nullcontext() if self._max_concurrency is None else asyncio.Semaphore(self._max_concurrency)
            )
            self._connections[loop] = _Connection(client, slots)
        return self._connections[loop]

    def _headers(self) -> dict[str, str]:
        """The header fields of each request.

        Raises:
            ValueError: the value of an environment variable cannot be one.
        """
        sent = {"Authorization": f"Bearer {self._key() or _NO_KEY}"}
        variables = {"Authorization": ("api_key_env", self.settings.key_variable or "")}
        if self.settings.is_openai:
            openai = {"OpenAI-Organization": "OPENAI_ORG_ID", "OpenAI-Project": "OPENAI_PROJECT_ID"}
            sent |= {name: value for name, variable in openai.items() if (value := _environment(variable))}
        for name, variable in self.settings.headers_env.items():
            if not _environment(variable):
                raise ValueError(f"headers_env.{name}: {variable} is not set; export it")
            sent[name] = _environment(variable)
            variables[name] = (f"headers_env.{name}", variable)
        for name, value in sent.items():
            # The HTTP library would refuse the header, and quote it.
            if not can_be_sent(value.removeprefix("Bearer ")):
                key, variable = variables.get(name, ("environment", name))
                raise ValueError(
                    f"{key}: the value of {variable} cannot be sent: it contains spaces or special characters; set it "
                    "again"
                )
        return {**sent, "Content-Type": "application/json", "Accept-Encoding": "gzip, deflate"}

    def _key(self) -> str:
        """The key; empty if there is none for this server."""
        return _environment(self.settings.key_variable)

    async def _call(self, client: httpx.AsyncClient, request: dict[str, Any], attempt: int) -> Reply:
        """Send a request once."""
        self._check_caps()
        self._count_call()
        self._retries += attempt > 1
        content = json.dumps(request).encode()
        body: bytes | None = None
        status, headers = 0, httpx.Headers()
        failure: Exception
        try:
            # The client's own limit applies to each read, so a server that drips bytes could hold it forever.
            async with (
                asyncio.timeout(self.settings.timeout_seconds),
                client.stream("POST", f"{self.base_url}/chat/completions", content=content) as response,
            ):
                status, headers = response.status_code, response.headers
                body = await read_body(response)
        except (TimeoutError, httpx.TimeoutException):
            failure = TransientError(f"no reply within {self.settings.timeout_seconds:g} s")
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            failure = TransientError(f"no connection ({type(error).__name__}: {self._shown(str(error))})")
        except TransientError as error:
            failure = error
        else:
            try:
                if status != 200:
                    raise self._refusal(status, text_of(body), headers)
                return self._read(body, content, request)
            except (TransientError, Refused) as error:
                failure = error
        if status == 200 and body is None:  # the server has written a reply, and it got lost
            self._count_tokens(read_usage(None, len(content), request[self.settings.max_tokens_key]))
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
            # A file of an older version has tokens only.
            dollars=max(shared.dollars, self.settings.price(shared.prompt_tokens, shared.completion_tokens)),
        )

    def _check_caps(self) -> None:
        if not self.settings.caps:
            return
        usage = self._shared_usage()
        used = {"max_calls": usage.calls, "max_total_tokens": usage.total_tokens, "max_dollars": usage.dollars}
        for name, cap in self.settings.caps.items():
            if used[name] >= cap:
                raise BudgetExceeded(name, cap, usage)

    def _count_tokens(self, tokens: Tokens) -> Tokens:
        """Count what a reply has used; return it with all tokens assigned to the prompt or the reply."""
        dollars = self.settings.price(tokens.prompt, tokens.completion)
        if tokens.total > tokens.prompt + tokens.completion:  # it is not reported which: count the dearer kind
            rest = tokens.total - tokens.prompt - tokens.completion
            dollars += max(self.settings.price(rest, 0), self.settings.price(0, rest))
            tokens = replace(tokens, completion=tokens.completion + rest)
        dollars = max(dollars, tokens.dollars)
        self._prompt_tokens += tokens.prompt
        self._completion_tokens += tokens.completion
        self._dollars += dollars
        if self._budget is not None:
            self._budget.add(prompt_tokens=tokens.prompt, completion_tokens=tokens.completion, dollars=dollars)
        if tokens.is_estimate and self.settings.caps and not self._has_warned:
            self._has_warned = True
            _log.warning(
                "%s does not report all tokens (usage); caps count at most one token per byte instead",
                self.settings.host,
            )
        return tokens

    def _read(self, body: bytes, content: bytes, request: Mapping[str, Any]) -> Reply:
        """Read the reply in a response's body.

        Raises:
            TransientError: the body is cut, or not a chat completion.
            Refused: it is an error that would come again.
        """
        text = text_of(body)
        try:
            parsed, problem = json.loads(text), ""
        except (ValueError, RecursionError) as error:
            parsed, problem = None, f"Invalid JSON: {error}"
        limit = request[self.settings.max_tokens_key]
        # An unreadable body shows nothing of the reply's length.
        tokens = read_usage(parsed, len(content), limit if parsed is None else min(limit, len(body)))
        is_error = (
            isinstance(parsed, dict)
            and not parsed.get("choices")
            and bool(parsed.get("error") or server_error(text).code)
        )
        if not (is_error and tokens.is_estimate):  # an error with status 200 is no reply that was written
            tokens = self._count_tokens(tokens)
        if is_error:
            raise self._refusal(200, text, httpx.Headers())
        if not problem:
            try:
                completion = ChatCompletion.model_validate(parsed)
            except ValidationError as error:
                first = error.errors(include_url=False, include_context=False)[0]
                where = ".".join(map(str, first["loc"]))
                problem = f"{where}{': ' if where else ''}{first['msg']}"
            else:
                return self._reply(completion, tokens)
        raise TransientError(f"not a chat completion ({problem}): {self._shown(text)}")

    def _reply(self, completion: ChatCompletion, tokens: Tokens) -> Reply:
        if not completion.choices:
            raise TransientError("not a chat completion (choices: is empty)")
        choice = completion.choices[0]
        finish_reason = (choice.finish_reason or "").casefold()
        if finish_reason == "error":
            raise TransientError("the server ended the reply with an error")
        return Reply(
            text=choice.message.content or "",
            reasoning=choice.message.thoughts,
            model=completion.model or "",
            finish_reason="length" if finish_reason in _CUT else finish_reason,
            prompt_tokens=tokens.prompt,
            completion_tokens=tokens.completion,
        )

    def _refusal(self, status: int, body: str, headers: httpx.Headers) -> TransientError | Refused:
        """Turn an error into an exception. Some servers send errors with status 200."""
        error = server_error(body)
        if status == 200:
            status = error.code or (429 if error.says(_NO_QUOTA) else 401 if error.says(_BAD_KEY) else 500)
        said = f"{status}: {self._shown(error.message or body)}"
        variable = self.settings.key_variable
        if status in (403, 429) and error.says(_NO_QUOTA):
            return Refused(f"api_key_env: the account at {self.settings.host} has no quota left ({said})", status)
        if status in _TRANSIENT or status >= 500 or status < 300:
            return TransientError(said, retry_seconds(headers.get("retry-after")))
        if status in (401, 403) and self._key():
            return Refused(f"api_key_env: {variable} is refused by {self.settings.host} ({said})", status)
        if status in (401, 403):
            named = f"{variable} is not set, and" if variable else "null;"
            hint = "" if variable else "; name the environment variable that has it"
            return Refused(f"api_key_env: {named} a key is required by {self.settings.host} ({said}){hint}", status)
        if status == 402:
            return Refused(f"api_key_env: {self.settings.host} asks for payment ({said})", status)
        if status == 404:
            return Refused(f"model or base_url: {self.base_url} has no {self.settings.model!r} ({said})", status)
        if status < 400:
            return Refused(f"base_url: {self.base_url} redirects to another address; give that one ({said})", status)
        return Refused(
            f"model or base_url: {self.base_url} refuses a call for {self.settings.model!r} ({said})", status
        )

    def redacted(self, text: str) -> str:
        """Replace the key, and other secret header values, by ``***``, in whatever escaping a server echoes them."""
        variables = ("OPENAI_API_KEY", self.settings.key_variable, *self.settings.headers_env.values())
        return redacted(text, map(_environment, variables))

    def _shown(self, text: str) -> str:
        """Shorten a server's message for an error: one line, without the key and control characters."""
        text = self.redacted(text[: 100 * _MESSAGE_CHARS])[: 10 * _MESSAGE_CHARS]
        text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
        return text if len(text) <= _MESSAGE_CHARS else f"{text[: _MESSAGE_CHARS - 3]}..."


def _environment(variable: str | None) -> str:
    return os.environ.get(variable, "").strip() if variable else ""


_jitter = random.Random()  # separate, so that a retry does not advance a seeded generator


def _pause(state: tenacity.RetryCallState) -> float:
    """Seconds until the next attempt."""
    assert state.outcome is not None
    failure = state.outcome.exception()
    assert isinstance(failure, TransientError)
    longest = min(BACKOFF_SECONDS * 2 ** min(state.attempt_number - 1, 30), _LONGEST_BACKOFF)
    return max(_jitter.uniform(longest / 2, longest), failure.retry_after)
