"""Middleware for vLLM's server: every route but ``/health`` needs the key.

vLLM itself guards ``/v1``, ``/v2``, ``/inference`` and ``/cohere``, but not the routes that change weights, pause the
server or call methods of its workers. vLLM imports this module by name, in the server's process.
"""

from __future__ import annotations

import hmac
import os
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

KEY_VARIABLE = "VLLM_API_KEY"
START_VARIABLE = "ROLLTUNE_SERVER_START"  # a random word for each start, which /health repeats
START_HEADER = "x-rolltune-start"

Scope = Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]


class RequireKey:
    """ASGI middleware that answers 401 to requests without ``Authorization: Bearer <key>``, whatever their method.

    ``/health`` is open. It repeats the word of this start, by which :func:`rolltune.endpoints.serving.serve` knows that
    its own server has got the port, and not another program that is waiting for the key.

    Args:
        app: the application behind it.

    Raises:
        KeyError: an environment variable is not set: the server must not start without a key.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._key = os.environ[KEY_VARIABLE].encode()
        self._start = os.environ[START_VARIABLE].encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["path"].removeprefix(scope.get("root_path", "")) == "/health":
            await self._app(scope, receive, self._with_start(send))
        elif self._has_key(scope):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        else:
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": b'{"error": "Unauthorized"}'})

    def _has_key(self, scope: Scope) -> bool:
        scheme, _, key = dict(scope["headers"]).get(b"authorization", b"").partition(b" ")
        return scheme.lower() == b"bearer" and hmac.compare_digest(key, self._key)

    def _with_start(self, send: Send) -> Send:
        async def send_with_start(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message.get("headers", ()), (START_HEADER.encode(), self._start)]
            await send(message)

        return send_with_start
