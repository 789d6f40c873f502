"""``tune report`` and ``tune watch``."""

from __future__ import annotations

import pytest

from rolltune import cli


def test_report_of_one_folder_and_of_several(make_run, evaluation_folder, tmp_path, monkeypatch, capsys):
    first, second = make_run("first"), make_run("second")
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", str(first)]) == 0
    assert capsys.readouterr().out == f"{first / 'report.html'}\n" and (first / "report.html").is_file()
    assert cli.main(["report", str(first), str(second)]) == 0
    assert "<title>2 runs</title>" in (tmp_path / "report.html").read_text()
    assert cli.main(["report", str(evaluation_folder), "--output", "other.html"]) == 0
    assert "<title>evaluation</title>" in (tmp_path / "other.html").read_text()


@pytest.mark.parametrize("command", ["report", "watch"])
def test_a_folder_without_a_run(command, tmp_path, capsys):
    assert cli.main([command, str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert f"tune {command}: {tmp_path}: holds no run and no evaluation" in error and "output_dir" in error


def test_a_page_or_an_address_that_cannot_be_had(make_run, tmp_path, capsys):
    folder = make_run()
    assert cli.main(["report", str(folder), "--output", str(tmp_path / "no" / "page.html")]) == 2
    assert "No such file" in (error := capsys.readouterr().err) and "--output" in error
    assert cli.main(["watch", str(folder), "--host", "203.0.113.7"]) == 2
    assert "203.0.113.7" in (error := capsys.readouterr().err) and "--host" in error
    assert cli.main(["watch", str(folder), "--port", "70000"]) == 2
