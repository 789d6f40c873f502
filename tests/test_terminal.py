"""Text of others cannot control the terminal."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.text import Text

from rolltune.config import format_mistakes
from rolltune.data.dataset import Dataset
from rolltune.run import notices
from rolltune.run.lengths import Limit, fitting
from rolltune.terminal import printable
from rolltune.types import Problem
from rolltune.writers.writing import show_dry_run


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[2Jx", "\\x1b[2Jx"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("a\rb\x08", "a\\rb\\x08"),
        ("\u202eabc", "\\u202eabc"),
        ("\u200b\ud800", "\\u200b\\ud800"),
        ("a\n\tb \u4f60 \U0001f600", "a\n\tb \u4f60 \U0001f600"),
    ],
)
def test_what_is_shown(text: str, shown: str):
    assert printable(text) == shown


@given(st.text())
def test_nothing_that_a_terminal_interprets_is_left(text: str):
    assert all(char.isprintable() or char in "\n\t" for char in printable(text))
    assert printable(text, keep="").isprintable()


ESCAPE = "\x1b[2J\x1b]0;owned\x07"


def test_texts_of_a_dry_run_of_the_writers(capsys):
    show_dry_run({f"p{ESCAPE}": f"Ask: {ESCAPE}"}, "1 trace")
    assert "\x1b" not in (shown := capsys.readouterr().out) and shown.count("\\x1b[2J") == 2


def test_mistakes_that_quote_data():
    shown = format_mistakes(ValueError(f"data: {ESCAPE} has no rubric"), "grpo")
    assert shown == "grpo: 1 mistake\n  data: \\x1b[2J\\x1b]0;owned\\x07 has no rubric"


def test_ids_of_problems_that_are_left_out_or_repeated(capsys):
    problems = [
        Problem(id=f"{i}{ESCAPE}", messages=({"role": "user", "content": "2 + 2?"},), answer="4") for i in range(2)
    ]
    fitting(Dataset(problems), [1, 99], Limit(tokens=9, source="the context"), key="data.train", parts="p", drop=True)
    notices.show(notices.about_data(problems, [], max_heldout=1, per_step=1, key="k"))
    assert "\x1b" not in (shown := capsys.readouterr().out) and shown.count("\\x1b[2J") == 3, shown


def test_notes_below_tables():
    stream = io.StringIO()
    text = f"{ESCAPE}[red]x[/nope]"
    Console(file=stream).print(Text(printable(text)))  # as in all recipes: rich alone leaves the sequences in
    assert "\x1b" not in stream.getvalue() and "[red]x[/nope]" in stream.getvalue()


@pytest.mark.parametrize("recipe", ["grpo", "sft"])
@pytest.mark.slow
def test_the_first_prompt_of_a_dry_run(recipe: str, tmp_path):
    """The real command, with a data set that tries to clear the screen."""
    for name in ("train", "heldout"):
        record = {"id": f"{name}{ESCAPE}", "question": f"{name}? {ESCAPE}", "answer": "4", "solution": f"4 {ESCAPE}"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(record) + "\n")
    names = {"grpo": "quickstart.yaml", "sft": "quickstart_sft.yaml"}
    data = [
        f"data.{name}={{_component_: rolltune.data.jsonl.jsonl, path: {tmp_path / name}.jsonl}}"
        for name in ("train", "heldout")
    ]
    command = [sys.executable, "-m", "rolltune.cli", "run", recipe, "--config", names[recipe], "--dry-run"]
    command += ["model.path=smollm2-135m-instruct", "batch.prompts_per_step=1"][: 2 if recipe == "grpo" else 1]
    done = subprocess.run([*command, *data], capture_output=True, text=True)
    print(done.stdout, done.stderr)
    assert "\x1b" not in done.stdout + done.stderr and "\\x1b[2J" in done.stdout + done.stderr
