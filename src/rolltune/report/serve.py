"""Serve a run's report while the run goes on: ``tune watch``.

The page is at a URL with a random token, on loopback unless another address is asked for. Requests without the token
or with another Host header (DNS rebinding) are refused. The only thing that a visitor can change is the stop file.
"""

from __future__ import annotations

import hmac
import secrets
import threading
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from rolltune.report.html import json_in_html, render
from rolltune.report.page import Page, gather
from rolltune.run import stop_file

LOOPBACK = "127.0.0.1"
WATCHED = ("metrics.jsonl", "results.json", "run.json", "config.yaml", "samples", stop_file.NAME)


@dataclass
class WatchedFolder:
    """A folder's report, gathered again when a file of it has changed."""

    folder: Path
    _version: str = ""
    _page: Page | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def page(self) -> tuple[str, Page]:
        """Return the newest report with its version.

        Raises:
            ValueError: the folder holds no run, or a file in it is damaged.
        """
        with self._lock:
            version = self._files_version()
            if self._page is None or version != self._version:
                self._page, self._version = gather(self.folder), version
            return self._version, self._page

    def data(self) -> dict[str, Any]:
        """Return the content of the page, with what only a served page shows."""
        version, page = self.page()
        return page.data() | {
            "version": version,
            "changed": max((path.stat().st_mtime for path in self._files()), default=0.0),
            "stop_requested": stop_file.is_requested(self.folder),
        }

    def _files(self) -> list[Path]:
        return [path for name in WATCHED if (path := self.folder / name).exists()]

    def _files_version(self) -> str:
        return ".".join(f"{status.st_mtime_ns:x}-{status.st_size:x}" for status in (p.stat() for p in self._files()))


class WatchServer(ThreadingHTTPServer):
    """The server behind ``tune watch``.

    Args:
        folder: the output folder of a run or evaluation.
        host: name or address of this machine to listen on; requests for other hosts are refused.
        port: 0 for a free one.

    Raises:
        ValueError: the folder holds no run.
        OSError: the address cannot be used.
    """

    daemon_threads = True

    def __init__(self, folder: str | Path, *, host: str = LOOPBACK, port: int = 0) -> None:
        self.watched = WatchedFolder(Path(folder))
        self.can_stop = self.watched.page()[1].kind == "run"
        self.token = secrets.token_urlsafe(24)
        super().__init__((host, port), _Handler)
        port = self.server_address[1]
        names = {host, "localhost"} if host == LOOPBACK else {host}
        self.hosts = {f"{name}:{port}" for name in names} | (names if port == 80 else set())
        self.url = f"http://{host}:{port}/{self.token}/"


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer  # pyright: ignore[reportIncompatibleVariableOverride]
    timeout = 30

    def do_GET(self) -> None:
        route = self._route()
        if route is None:
            return
        watched = self.server.watched
        name, _, key = route.partition("/")
        try:
            if not route:
                self._send(render(watched.page()[1], watch=True).encode(), "text/html; charset=utf-8")
            elif route == "data":
                have = parse_qs(urlsplit(self.path).query).get("have", [""])[0]
                if have == watched.page()[0]:
                    self._send(b"", "application/json", HTTPStatus.NO_CONTENT)
                else:
                    self._send(json_in_html(watched.data()).encode(), "application/json")
            elif name == "pack" and (samples := watched.page()[1].samples) and unquote(key) in samples.packs:
                self._send(samples.packs[unquote(key)].data, "application/octet-stream")
            else:
                self._refuse(HTTPStatus.NOT_FOUND, "no such page")
        except (ValueError, OSError) as error:  # a file that is being replaced; the page asks again
            self._refuse(HTTPStatus.SERVICE_UNAVAILABLE, f"{type(error).__name__}: {error}")

    def do_POST(self) -> None:
        route = self._route()
        if route is None:
            return
        if route != "stop" or not self.server.can_stop:
            self._refuse(HTTPStatus.NOT_FOUND, "no such page")
            return
        stop_file.request_stop(self.server.watched.folder)
        self._send(b"", "text/plain", HTTPStatus.NO_CONTENT)

    def _route(self) -> str | None:
        """Return the path behind the token; None after refusing a request that has no business here."""
        if self.headers.get("Host", "") not in self.server.hosts:
            self._refuse(HTTPStatus.FORBIDDEN, "this server answers for its own address only")
            return None
        _, token, *rest = [*urlsplit(self.path).path.split("/", 2), "", ""]
        if not hmac.compare_digest(token.encode(), self.server.token.encode()):
            self._refuse(HTTPStatus.NOT_FOUND, "no such page; open the whole URL that `tune watch` printed")
            return None
        return rest[0]

    def _refuse(self, status: HTTPStatus, text: str) -> None:
        self._send(f"{text}\n".encode(), "text/plain; charset=utf-8", status)

    def _send(self, content: bytes, kind: str, status: HTTPStatus = HTTPStatus.OK) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        if status != HTTPStatus.NO_CONTENT:
            self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Referrer-Policy", "no-referrer")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep the terminal quiet; the token is part of every path."""
