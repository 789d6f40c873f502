"""The lint as a command: its table, its report, and what it ends with."""

import json

import pytest
import yaml
from tiny_run import load_recipe

from rolltune.config.schema import LintRubricsConfig
from rolltune.run import checks

GOOD = [
    {"title": "Cause", "description": "Says that air scatters blue light most.", "category": "essential"},
    {"title": "Angle", "description": "Says that the light comes from everywhere.", "category": "essential"},
    {"title": "Sea", "description": "Claims that the sky mirrors the sea.", "category": "pitfall", "weight": -0.9},
]
AGAINST = {"title": "Jargon", "description": "Avoids jargon.", "category": "pitfall", "satisfied_is_good": False}
NEAR = {"title": "Again", "description": "Says that air scatters most blue light.", "category": "important"}


@pytest.fixture
def lint(tmp_path, monkeypatch, capsys):
    """Run the recipe on rubrics; returns its exit status, what it showed and what it wrote."""
    monkeypatch.setenv("COLUMNS", "240")

    def run(*rubrics, data=None, **changes):
        rows = [{"id": f"p{i}", "question": "Why?", "criteria": criteria} for i, criteria in enumerate(rubrics)]
        (tmp_path / "rubrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        node = {"_component_": "rolltune.data.rubrics.rubric_jsonl", "path": str(tmp_path / "rubrics.jsonl")}
        tree = {"output_dir": str(tmp_path / "out"), "data": data or node, "fewest_criteria": 3}
        (tmp_path / "lint.yaml").write_text(yaml.safe_dump(tree | changes))
        cfg = checks.validate(LintRubricsConfig, str(tmp_path / "lint.yaml"))
        capsys.readouterr()
        status = 0
        try:
            load_recipe("lint_rubrics").run(cfg)
        except SystemExit as stop:
            status = stop.code
        file = tmp_path / "out/lint.json"
        return status, capsys.readouterr().out, json.loads(file.read_text()) if file.exists() else None

    return run


def test_clean_rubrics_pass(lint):
    status, shown, report = lint(GOOD, GOOD)
    assert status == 0
    assert "2 problems, 6 criteria" in shown and "0 errors, 0 warnings" in shown
    assert report == {"problems": 2, "criteria": 6, "errors": 0, "warnings": 0, "findings": []}


def test_errors_end_with_status_1_and_come_first(lint):
    status, shown, report = lint([*GOOD, NEAR], [*GOOD, AGAINST], GOOD)
    assert status == 1
    assert "1 errors, 1 warnings" in shown and "1 error polarity" in shown and "1 warning near_duplicate" in shown
    assert "criterion 4, 'Jargon': reads as good to satisfy and is marked bad: 'Avoids jargon.'" in shown
    assert (report["errors"], report["warnings"]) == (1, 1)
    assert [(f["severity"], f["rubric"], f["criterion"]) for f in report["findings"]] == [
        ("error", "p1", 4),
        ("warning", "p0", 4),
    ]
    assert report["findings"][0]["mend"] == "give satisfied_is_good: true, or say what the response does wrong"


def test_warnings_alone_pass(lint):
    status, shown, report = lint([*GOOD, NEAR])
    assert status == 0 and report["warnings"] == 1 and "near_duplicate" in shown


def test_how_many_criteria_is_an_option(lint):
    assert lint(GOOD, fewest_criteria=4)[2]["warnings"] == 1
    assert lint(GOOD, fewest_criteria=2, most_criteria=2)[2]["warnings"] == 1


def test_a_problem_without_a_rubric_is_an_error(lint):
    status, shown, report = lint(GOOD, data={"_component_": "rolltune.data.sums.sums", "count": 2})
    assert status == 1 and [f["rule"] for f in report["findings"]] == ["no_rubric", "no_rubric"]
    assert "the problem has no rubric" in shown


def test_the_first_problems(lint):
    status, _, report = lint(GOOD, [*GOOD, AGAINST], max_problems=1)
    assert status == 0 and report["problems"] == 1


def test_a_long_list_is_cut_in_the_table_alone(lint):
    status, shown, report = lint(*[[*GOOD, AGAINST]] * 60)
    assert status == 1 and len(report["findings"]) == 60
    assert shown.count("reads as good to satisfy") == 50 and "... and 10 more, see lint.json" in shown


def test_dry_run_writes_nothing(lint):
    status, shown, report = lint([*GOOD, AGAINST], dry_run=True)
    assert (status, report) == (0, None) and "nothing was linted" in shown


def test_a_rubric_cannot_write_to_the_terminal(lint):
    """Neither escape sequences nor rich's markup: titles and descriptions were written by a model."""
    nasty = {"title": "\x1b[2J[red]x[/nope]", "description": "Avoids \x1b]0;owned\x07 [bold]it[/].", "weight": -1}
    status, shown, report = lint([*GOOD, nasty])
    assert status == 1 and "\x1b[2J" not in shown and "\x1b]0" not in shown and "\x07" not in shown
    assert "[red]x[/nope]" in shown and report["findings"][0]["criterion"] == 4


def test_broken_files_are_told_by_line(lint):
    with pytest.raises(ValueError, match=r"rubrics.jsonl:1: criteria\[0\].category: .*\n.*rubrics.jsonl:2: "):
        lint([GOOD[0] | {"category": "x"}], [GOOD[0] | {"weight": 0}])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"fewest_criteria": 0}, "fewest_criteria: 0; must be >= 1"),
        ({"most_criteria": 2}, "most_criteria: 2; must be at least fewest_criteria, 3"),
        ({"max_problems": 0}, "max_problems: 0; must be >= 1"),
        ({"output_dir": ""}, "output_dir: empty"),
        ({"data": {"_component_": "rolltune.data.rubrics.rubrics_jsonl"}}, "did you mean .*rubric_jsonl"),
    ],
)
def test_wrong_configs(lint, change, message):
    with pytest.raises(ValueError, match=message):
        lint(GOOD, **change)
