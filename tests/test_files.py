"""Files that appear complete or not at all."""

import json
import math

import pytest

from rolltune import files
from rolltune.files import json_line, write_json_atomic


def strict_json(text: str):
    """json.loads that refuses NaN and Infinity, which are not JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is not JSON")

    return json.loads(text, parse_constant=refuse)


def test_json_line_is_json():
    line = json_line({"a": [1, math.nan], "b": "\n\u2028"})
    assert strict_json(line) == {"a": [1, None], "b": "\n\u2028"}
    assert line.count("\n") == 1 and line.endswith("\n")


def test_write_json_atomic(tmp_path):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"a": [1, math.nan], "b": {"c": "é"}})
    assert strict_json(path.read_text("utf-8")) == {"a": [1, None], "b": {"c": "é"}}
    with pytest.raises(TypeError):
        write_json_atomic(path, {"a": object()})
    assert strict_json(path.read_text("utf-8"))["a"] == [1, None]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch, broken):
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"old": True})

    def fail(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(files.os, broken, fail)
    with pytest.raises(OSError, match="no space"):
        write_json_atomic(path, {"new": "x" * 10_000})
    assert strict_json(path.read_text()) == {"old": True}


def test_a_link_with_the_temporary_files_name_is_not_followed(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("untouched")
    for name in ("a.json.tmp", "a.json"):
        (tmp_path / name).symlink_to(victim)
    write_json_atomic(tmp_path / "a.json", {"a": 1})
    assert victim.read_text() == "untouched" and not (tmp_path / "a.json").is_symlink()
    assert (tmp_path / "a.json.tmp").is_symlink()


def test_a_name_that_was_guessed_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda count: "guessed")
    (tmp_path / "a.json.guessed.tmp").symlink_to(tmp_path / "victim")
    with pytest.raises(FileExistsError):
        write_json_atomic(tmp_path / "a.json", {"a": 1})
    assert not (tmp_path / "victim").exists()


def test_permissions_are_those_of_any_new_file(tmp_path):
    (tmp_path / "usual").touch()
    write_json_atomic(tmp_path / "a.json", {})
    assert (tmp_path / "a.json").stat().st_mode == (tmp_path / "usual").stat().st_mode
