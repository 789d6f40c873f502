"""What chat endpoints send: bodies of any size, chat completions, and errors, as different servers write them."""

from __future__ import annotations

import json
import math
import time
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Annotated

import httpx
from pydantic import BaseModel, BeforeValidator

_LARGEST_BODY = 8 * 2**20  # bytes, decompressed; a reply of 100,000 tokens takes half a MiB
_LONGEST_RETRY_AFTER = 120.0  # a longer Retry-After is cut to this


class TransientError(Exception):
    """A failure after which a retry may succeed."""

    def __init__(self, message: str, retry_after: float = 0.0) -> None:
        super().__init__(message)
        self.retry_after = retry_after


def _without_surrogates(value: object) -> object:
    """Join surrogate pairs, and replace half pairs by U+FFFD: no other library takes them."""
    return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace") if isinstance(value, str) else value


def _joined(value: object) -> object:
    """Join the texts of a content of one or more parts; other parts (thoughts, images) are left out."""
    parts = [value] if isinstance(value, Mapping) else value
    if isinstance(parts, list) and all(isinstance(part, str | Mapping) for part in parts):
        texts = [part if isinstance(part, str) else part.get("text") for part in parts if not _is_thought(part)]
        value = "".join(text for text in texts if isinstance(text, str))
    return _without_surrogates(value)


def _is_thought(part: str | Mapping) -> bool:
    return isinstance(part, Mapping) and part.get("type") not in (None, "text", "output_text")


def _text_or_none(value: object) -> object:
    """The text of thoughts; None in a form that is not known, because a reply counts without them."""
    text = _joined(value)
    return text if isinstance(text, str) else None


_Text = Annotated[str | None, BeforeValidator(_joined)]
_Thoughts = Annotated[str | None, BeforeValidator(_text_or_none)]
_Name = Annotated[str | None, BeforeValidator(_without_surrogates)]


class _Message(BaseModel):
    content: _Text = None
    reasoning_content: _Thoughts = None  # vLLM, DeepSeek
    reasoning: _Thoughts = None  # Ollama, OpenRouter, newer vLLM
    thinking: _Thoughts = None  # Ollama's own protocol

    @property
    def thoughts(self) -> str:
        return self.reasoning_content or self.reasoning or self.thinking or ""


class _Choice(BaseModel):
    message: _Message
    finish_reason: _Name = None


class ChatCompletion(BaseModel):
    """The fields of a chat completion that are read. Others are ignored."""

    model: _Name = None
    choices: list[_Choice]


@dataclass(frozen=True, slots=True)
class ServerError:
    """An error as servers report it.

    Attributes:
        message: the server's own; empty if it gives none.
        code: an HTTP status in the body; 0 if it gives none.
        words: code, type and message in lower case, or the start of the body.
    """

    message: str
    code: int
    words: str

    def says(self, known: Sequence[str]) -> bool:
        return any(word in self.words for word in known)


def server_error(body: str) -> ServerError:
    """Read the error in a body, which may be JSON of any shape, or anything else."""
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        return ServerError("", 0, body[:1000].casefold())
    parsed = parsed[0] if isinstance(parsed, list) and parsed else parsed
    inner = parsed.get("error", parsed) if isinstance(parsed, dict) else parsed
    if not isinstance(inner, dict):
        return ServerError(inner if isinstance(inner, str) else "", 0, str(inner)[:1000].casefold())
    message, code = inner.get("message"), str(inner.get("code") or inner.get("status") or "")
    words = f"{code} {inner.get('type')} {message}"[:1000].casefold()
    status = int(code) if len(code) == 3 and code.isdecimal() and 400 <= int(code) < 600 else 0
    return ServerError(message if isinstance(message, str) else "", status, words)


def text_of(body: bytes) -> str:
    """Decode a body: UTF-8, with or without a byte order mark, or Latin-1."""
    try:
        return body.decode("utf-8-sig")
    except UnicodeDecodeError:
        return body.decode("latin-1")


async def read_body(response: httpx.Response) -> bytes:
    """Read a response up to the limit. Compressed data are unpacked no further than that.

    Raises:
        TransientError: it is larger, or compressed in a way that was not asked for.
    """
    encoding = response.headers.get("content-encoding", "").strip().casefold()
    if encoding not in ("", "identity", "gzip", "x-gzip", "deflate"):
        raise TransientError(f"a reply compressed as {encoding[:40]!r}; gzip was asked for")
    unpack = zlib.decompressobj(zlib.MAX_WBITS | 32) if encoding not in ("", "identity") else None
    body = bytearray()
    async for chunk in response.aiter_raw():
        try:
            body += chunk if unpack is None else unpack.decompress(chunk, _LARGEST_BODY + 1 - len(body))
        except zlib.error as error:
            raise TransientError(f"a reply that cannot be unpacked ({error})") from None
        if len(body) > _LARGEST_BODY:
            raise TransientError(f"a reply of more than {_LARGEST_BODY:,} bytes; no more are read")
    return bytes(body)


def retry_seconds(retry_after: str | None) -> float:
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
