"""Reports: a run, an evaluation or a comparison of runs as one page to look at in a browser.

:mod:`~rolltune.report.page` gathers the content from a folder, :mod:`~rolltune.report.html` renders it, and
:mod:`~rolltune.report.serve` serves it while a run goes on.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from rolltune.files import write_text_atomic

NAME = "report.html"


def write_report(folders: Sequence[str | Path], path: str | Path | None = None) -> Path:
    """Write the report of a run or evaluation, or one that compares several runs.

    Args:
        folders: output folders.
        path: the file to write; None for ``report.html`` in the only folder, or in the working directory.

    Returns:
        The file's path.

    Raises:
        ValueError: a folder holds no run, or a file in it is damaged.
        OSError: the report cannot be written.
    """
    from rolltune.report.html import render
    from rolltune.report.page import gather, gather_comparison

    page = gather(folders[0]) if len(folders) == 1 else gather_comparison(folders)
    path = Path(path) if path is not None else Path(folders[0]) / NAME if len(folders) == 1 else Path(NAME)
    write_text_atomic(path, render(page))
    return path


def try_report(output_dir: str | Path) -> None:
    """Write a run's report. A report that cannot be written never ends a run: it is said on stderr."""
    try:
        write_report([output_dir])
    except Exception as error:  # whatever it is, the run is worth more
        print(f"{Path(output_dir) / NAME}: not written ({type(error).__name__}: {error})", file=sys.stderr, flush=True)


@contextmanager
def report_on_exit(output_dir: str | Path, *, is_main: bool = True) -> Iterator[None]:
    """Write a run's report when the run ends, in whatever way; ``is_main`` is False on all ranks but the first."""
    try:
        yield
    finally:
        if is_main:
            try_report(output_dir)
