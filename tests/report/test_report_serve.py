"""The server of ``tune watch``."""

from __future__ import annotations

import http.client
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from report_folders import write_step

from rolltune.report.serve import WatchServer


@pytest.fixture
def folder(make_run) -> Path:
    return make_run()


@pytest.fixture
def server(folder: Path) -> Iterator[WatchServer]:
    with WatchServer(folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def ask(
    server: WatchServer, path: str, method: str = "GET", token: str | None = None, **headers: str
) -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_address[1], timeout=10)
    connection.request(method, f"/{server.token if token is None else token}/{path}", headers=headers)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content


def test_it_serves_the_page_its_data_and_samples(server, folder):
    status, page = ask(server, "")
    assert status == 200 and b"connect-src 'self'" in page.replace(b"&#39;", b"'") and b'id="pack-' not in page
    data = json.loads(ask(server, "data")[1])
    assert data["samples"]["places"][-1] == "4" and data["stop_requested"] is False
    assert ask(server, f"data?have={data['version']}") == (204, b"")
    write_step(folder, 5)
    newer = json.loads(ask(server, f"data?have={data['version']}")[1])
    assert newer["panels"][0]["x"] == [1, 2, 3, 4, 5] and newer["version"] != data["version"]
    status, pack = ask(server, f"pack/{newer['samples']['groups']['pack'][-1]}")
    assert status == 200 and pack[:2] == b"\x1f\x8b"
    assert ask(server, "pack/../../../etc/passwd")[0] == ask(server, "nothing")[0] == 404


def test_the_button_writes_the_stop_file_only(server, folder):
    assert ask(server, "stop")[0] == 404 and not (folder / "stop").exists()
    assert ask(server, "other", "POST")[0] == 404
    assert ask(server, "stop", "POST")[0] == 204 and (folder / "stop").exists()
    assert json.loads(ask(server, "data")[1])["stop_requested"] is True


def test_strangers_are_refused(server, folder):
    port = server.server_address[1]
    for host in (f"evil.example:{port}", "127.0.0.1", f"127.0.0.1:{port + 1}", f"0.0.0.0:{port}"):
        assert ask(server, "", Host=host)[0] == ask(server, "stop", "POST", Host=host)[0] == 403
    for token in ("", "wrong", server.token[:-1], server.token + "x"):
        assert ask(server, "", token=token)[0] == ask(server, "stop", "POST", token=token)[0] == 404
    assert not (folder / "stop").exists()
    assert ask(server, "", Host=f"localhost:{port}")[0] == 200
    assert server.server_address[0] == "127.0.0.1"


def test_a_damaged_file_is_said_and_the_server_goes_on(server, folder):
    (folder / "samples" / "step_000005.jsonl").write_text("{\n")
    status, text = ask(server, "data")
    assert status == 503 and b"step_000005.jsonl" in text
    (folder / "samples" / "step_000005.jsonl").unlink()
    assert ask(server, "data")[0] == 200


def test_an_evaluation_has_nothing_to_stop(evaluation_folder):
    with WatchServer(evaluation_folder) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert ask(server, "")[0] == 200
        assert ask(server, "stop", "POST")[0] == 404 and not (evaluation_folder / "stop").exists()
        server.shutdown()
