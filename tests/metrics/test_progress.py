"""Progress: plain lines without a terminal, bars with one."""

import io
import re

import pytest

from rolltune.metrics import progress as progress_module
from rolltune.metrics.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def run_progress(stream, **options):
    with Progress(4, 2, stream=stream, **options) as progress:
        sampled = progress.phase("sampling", 8)
        sampled(4, 8)
        progress.phase("training")(1, 3)
        progress.step(3, {"reward": 0.42345, "kl": 0.00312, "length": 1250.7, "acc": 0.31})
        progress.step(4, {"reward": -100.0, "note": "best"})


def test_without_a_terminal_one_plain_line_a_step(monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")
    stream = io.StringIO()
    run_progress(stream)
    lines = stream.getvalue().splitlines()
    assert len(lines) == 2
    assert re.fullmatch(
        r"step 3/4 \| reward 0\.423 \| kl 0\.00312 \| length 1251 \| acc 0\.31 \| \d+\.\d s/step \| 0:00:00 left",
        lines[0],
    )
    assert lines[1].startswith("step 4/4 | reward -100 | note best | ")
    assert stream.getvalue().isprintable() or all(c == "\n" or c.isprintable() for c in stream.getvalue())


def test_time_left(monkeypatch):
    now = iter([0.0, 0.0, 100.0])
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: next(now))
    stream = io.StringIO()
    with Progress(total_steps=112, start=10, stream=stream) as progress:
        progress.step(12, {})
    # Two steps in 100 s, and 100 steps to go: 5,000 s.
    assert stream.getvalue() == "step 12/112 | 50.0 s/step | 1:23:20 left\n"


def test_on_a_terminal_bars_and_the_numbers(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    stream = Terminal()
    run_progress(stream)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", stream.getvalue())
    assert "steps" in shown and "4/4" in shown
    assert "reward -100 | note best | " in shown
    assert "\x1b[?25h" in stream.getvalue(), "the cursor is shown again"


def test_a_terminal_is_left_clean_after_an_error(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    stream = Terminal()
    with pytest.raises(KeyboardInterrupt), Progress(4, stream=stream):
        raise KeyboardInterrupt
    assert stream.getvalue().rfind("\x1b[?25h") > stream.getvalue().rfind("\x1b[?25l") >= 0


@pytest.mark.parametrize("stream", [io.StringIO(), Terminal()])
def test_switched_off_shows_nothing(stream):
    run_progress(stream, enabled=False)
    assert stream.getvalue() == ""
