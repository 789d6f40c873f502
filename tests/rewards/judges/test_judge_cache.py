"""The cache of answers: what it keeps, between whom, and which files it leaves alone."""

from __future__ import annotations

import logging
import os
import signal
import sqlite3
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from rolltune.rewards.judges.cache import AnswerCache, cache_key

# Writes numbered answers until it is killed or done; in a process of its own.
WRITER = """
import sys
from rolltune.rewards.judges.cache import AnswerCache
cache = AnswerCache(sys.argv[1])
for number in range(int(sys.argv[3])):
    cache.put(f"{sys.argv[2]}-{number}", "x" * 500, prompt_tokens=1, completion_tokens=1)
    print(number, flush=True)
"""


def put(cache: AnswerCache, key: str, text: str) -> None:
    cache.put(key, text, prompt_tokens=3, completion_tokens=4)


def start(path: Path, name: str, count: int) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", WRITER, str(path), name, str(count)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_what_is_put_is_got(tmp_path):
    path = tmp_path / "new" / "folder" / "judge.sqlite"
    cache = AnswerCache(path)
    assert not path.exists()  # made with the first use
    assert cache.get("k") is None
    put(cache, "k", "caf\u00e9 \U0001f600")
    put(cache, "k", "another")  # the first stays
    assert cache.get("k") == "caf\u00e9 \U0001f600" and len(cache) == 1
    cache.close()
    assert cache.get("k") == "caf\u00e9 \U0001f600"
    assert AnswerCache(path).get("k") == "caf\u00e9 \U0001f600"


def test_the_file_holds_tokens_and_a_time(tmp_path):
    cache = AnswerCache(tmp_path / "c")
    put(cache, "k", "text")
    cache.close()
    with sqlite3.connect(tmp_path / "c") as connection:
        ((key, text, prompt, completion, time),) = connection.execute("SELECT * FROM answers")
    assert (key, text, prompt, completion) == ("k", "text", 3, 4) and time > 1.7e9


def test_a_key_depends_on_everything():
    parts = {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0.0, "seed": 0}
    others = [
        {**parts, "model": "n"},
        {**parts, "messages": [{"role": "user", "content": "y"}]},
        {**parts, "messages": [{"role": "system", "content": "x"}]},
        {**parts, "temperature": 1.0},
        {**parts, "seed": 1},
        {**parts, "schema": None},
    ]
    assert len({cache_key(**kind) for kind in [parts, *others]}) == 1 + len(others)
    assert cache_key(**parts) == cache_key(**dict(reversed(parts.items())))
    assert len(cache_key(text="\ud800")) == 64


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"hello, I am a text\n" * 100, "file is not a database"),
        (b"SQLite format 3\0" + b"\xff" * 4000, "not a cache of answers"),
    ],
)
def test_a_file_that_is_none(tmp_path, content: bytes, says: str):
    path = tmp_path / "notes.txt"
    path.write_bytes(content)
    with pytest.raises(ValueError) as error:
        AnswerCache(path)
    assert str(error.value).startswith(f"cache: {path}: ") and says in str(error.value)
    assert path.read_bytes() == content


@pytest.mark.parametrize("setup", ["CREATE TABLE bills (sum REAL)", "PRAGMA application_id = 7"])
def test_another_programs_database(tmp_path, setup: str):
    path = tmp_path / "bills.db"
    with sqlite3.connect(path) as connection:
        connection.execute(setup)
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="bills.db: is another program's database; give another path"):
        AnswerCache(path)
    assert path.read_bytes() == before


def test_another_layout(tmp_path):
    cache = AnswerCache(tmp_path / "c")
    put(cache, "k", "text")
    cache.close()
    with sqlite3.connect(tmp_path / "c") as connection:
        connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(ValueError, match="has layout 99"):
        AnswerCache(tmp_path / "c")


def test_a_folder_and_a_place_where_nothing_can_be(tmp_path):
    with pytest.raises(ValueError, match="cannot be opened"):
        AnswerCache(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cache: .*its folder cannot be created"):
        AnswerCache(tmp_path / "file" / "c").get("k")


def test_a_file_that_breaks_later(tmp_path):
    path = tmp_path / "c"
    cache = AnswerCache(path)
    for number in range(200):
        put(cache, str(number), "x" * 1000)
    cache.close()
    path.write_bytes(path.read_bytes()[:100] + b"\xff" * 50_000)
    with pytest.raises(ValueError, match="broken"):
        [cache.get(str(number)) for number in range(200)]


def test_a_file_that_cannot_be_written_is_told_once_and_left_out(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr("rolltune.rewards.judges.cache._WAIT_SECONDS", 0.05)
    path = tmp_path / "c"
    cache = AnswerCache(path)
    put(cache, "a", "kept")
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")  # as a process that hangs in mid-write
    with caplog.at_level(logging.WARNING):
        put(cache, "b", "lost")
        put(cache, "c", "lost")
        assert cache.get("a") == "kept"  # readers do not wait
    holder.execute("COMMIT")
    holder.close()
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [str(path)]
    assert (cache.get("b"), cache.get("a")) == (None, "kept")
    put(cache, "b", "now")
    assert cache.get("b") == "now"


def test_several_processes_and_threads_share_a_file(tmp_path):
    path = tmp_path / "c"
    processes = [start(path, name, 100) for name in "abc"]  # all of them make it
    cache = AnswerCache(path)
    threads = [
        threading.Thread(target=lambda name=name: [put(cache, f"{name}-{number}", "x") for number in range(100)])
        for name in "xy"
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [process.wait(60) for process in processes] == [0, 0, 0]
    assert len(cache) == 500
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()


def test_a_kill_loses_nothing_that_was_stored(tmp_path):
    path = tmp_path / "c"
    process = start(path, "a", 10**6)
    assert process.stdout is not None
    for line in process.stdout:
        if int(line) >= 50:
            break
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    process.stdout.close()
    cache = AnswerCache(path)
    assert len(cache) >= 51
    assert all(cache.get(f"a-{number}") == "x" * 500 for number in range(51))
    cache.close()
    with sqlite3.connect(path) as connection:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
