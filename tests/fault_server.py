"""An OpenAI-compatible chat server on this machine that misbehaves as a test's script says.

    def script(call: int, request: dict) -> Response: ...

    with FaultServer(script) as server:
        endpoint = Endpoint(EndpointSettings(base_url=server.base_url, model="m"))

The script is asked for each request, which are counted from 0 in the order of their arrival. Real sockets, real HTTP.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self


@dataclass(frozen=True, kw_only=True)
class Response:
    """What is sent back.

    Attributes:
        status: of the HTTP response.
        body: its bytes.
        headers: further ones, such as ``{"Retry-After": "1"}``.
        delay: seconds before the first byte.
        cut: the connection ends after half of the body, whose length was announced whole.
        drip: seconds between any two bytes of the body.
    """

    status: int = 200
    body: bytes = b""
    headers: Mapping[str, str] = field(default_factory=dict)
    delay: float = 0.0
    cut: bool = False
    drip: float = 0.0


def ok(
    text: str | None,
    *,
    finish_reason: str | None = "stop",
    prompt_tokens: int = 10,
    completion_tokens: int = 5,
    usage: bool = True,
    model: str = "tiny-1",
    **options: Any,
) -> Response:
    """A chat completion with one choice."""
    body: dict[str, Any] = {
        "id": "chatcmpl-0",
        "object": "chat.completion",
        "created": 0,
        "model": model,
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish_reason},
        ],
    }
    if usage:
        body["usage"] = {
            "prompt_tokens": prompt_tokens,
            "completion_tokens": completion_tokens,
            "total_tokens": prompt_tokens + completion_tokens,
        }
    return Response(body=json.dumps(body).encode(), **options)


def error(status: int, message: str = "", **headers: str) -> Response:
    """An error as the protocol has it; headers with ``_`` for ``-``: ``Retry_After="1"``."""
    body = json.dumps({"error": {"message": message, "type": "error", "code": None}}).encode()
    return Response(
        status=status, body=body, headers={name.replace("_", "-"): value for name, value in headers.items()}
    )


Script = Callable[[int, dict[str, Any]], Response]


@dataclass(frozen=True, kw_only=True)
class Call:
    """A request that arrived.

    Attributes:
        request: its JSON.
        headers: its header fields, names in lower case.
        time: seconds of a monotonic clock.
    """

    request: dict[str, Any]
    headers: dict[str, str]
    time: float


class FaultServer:
    """The server, for the length of a ``with`` block, on ``port``; 0 is a free one.

    Attributes:
        base_url: ends with ``/v1``.
        calls: requests so far.
        most_at_once: the largest number of requests that were open at a time.
    """

    def __init__(self, script: Script, *, port: int = 0) -> None:
        self.calls: list[Call] = []
        self.most_at_once = 0
        self._open = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", port), self._handler(script))
        self._server.daemon_threads = True
        self.base_url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stopped.set()  # those that sleep wake up
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def _handler(self, script: Script) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"  # connections are kept, as by real servers

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                headers = {name.lower(): value for name, value in self.headers.items()}
                with server._lock:
                    number = len(server.calls)
                    server.calls.append(Call(request=request, headers=headers, time=time.monotonic()))
                    server._open += 1
                    server.most_at_once = max(server.most_at_once, server._open)
                try:
                    if self.path == "/v1/chat/completions":
                        response = script(number, request)
                    else:
                        response = error(404, f"no {self.path} here")
                    self._send(response)
                except (BrokenPipeError, ConnectionResetError):  # the client has given up
                    self.close_connection = True
                finally:
                    with server._lock:
                        server._open -= 1

            def _send(self, response: Response) -> None:
                if response.delay:
                    server._stopped.wait(response.delay)
                self.send_response(response.status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(response.body)))
                for name, value in response.headers.items():
                    self.send_header(name, value)
                self.end_headers()
                if response.cut:
                    self.wfile.write(response.body[: len(response.body) // 2])
                    self.close_connection = True
                elif response.drip:
                    for byte in response.body:
                        self.wfile.write(bytes([byte]))
                        if server._stopped.wait(response.drip):
                            break
                else:
                    self.wfile.write(response.body)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        return Handler
