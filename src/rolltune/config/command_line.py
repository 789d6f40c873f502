"""The command line of a recipe, ``--config FILE [--dry-run] [key=value ...]``, and its error messages."""

from __future__ import annotations

import errno
import io
import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TextIO, TypeVar

import rolltune
from rolltune.config.explain import explain
from rolltune.config.load import Check, dump, validate
from rolltune.errors import STOPS, ConfigError, RankFailed, RankLost, os_error_text
from rolltune.terminal import printable

T = TypeVar("T")
USER_MISTAKE = 2
INTERRUPTED = 130
STOPPED = 1
SECONDS_FOR_ANOTHER = 5.0  # torchrun ends this process when the rank with the better message has ended


@dataclass(frozen=True, kw_only=True)
class Arguments:
    """A parsed command line; ``--dry-run`` becomes the override ``dry_run=true``."""

    config: str | None
    overrides: tuple[str, ...]
    help: bool


def parse_args(argv: Sequence[str]) -> Arguments:
    """Parse a recipe's command line.

    Raises:
        ConfigError: an unknown flag, or ``--config`` without a value.
    """
    config, overrides, problems = None, [], []
    rest = list(argv)
    while rest:
        argument = rest.pop(0)
        name, equals, value = argument.partition("=")
        if name == "--config":
            config = value if equals else rest.pop(0) if rest else ""
            if not config:
                problems.append("--config: no value; give a YAML file")
        elif argument == "--dry-run":
            overrides.append("dry_run=true")
        elif argument.startswith("--") and argument != "--help":
            right = f"{name[2:].replace('-', '_')}={value or '...'}"
            problems.append(f"{name}: unknown flag; use --config, --dry-run or --help, and set config keys as {right}")
        elif argument not in ("-h", "--help"):
            overrides.append(argument)
    if problems:
        raise ConfigError(problems)
    return Arguments(config=config, overrides=tuple(overrides), help=bool({"-h", "--help"} & set(argv)))


def main(schema: type[T], run: Callable[[T], None], *, check: Check[T] = lambda cfg, world_size: ()) -> None:
    """Run a recipe from the command line: load and check the config, print it, and call ``run``.

    A user's mistake (a :class:`ConfigError`, or a ValueError from rolltune's own code) is printed in a few lines and
    ends the process with status 2. What ends a run with a message (``rolltune.errors.STOPS``) gives status 1.
    Any other error is a bug and keeps its traceback.

    Args:
        schema: the dataclass of the config's keys.
        run: the recipe.
        check: yields the problems of a config whose types are right, such as a function of :mod:`rolltune.run.checks`.
    """
    sys.stdout, sys.stderr = _lasting(sys.stdout), _lasting(sys.stderr)
    try:
        arguments = parse_args(sys.argv[1:])
        if arguments.help:
            print(explain(schema))
            return
        if arguments.config is None:
            raise ConfigError(["--config: missing; give a YAML file"])
        config = validate(schema, arguments.config, arguments.overrides, check=check)
    except ConfigError as error:
        _give_up(error)
    if os.environ.get("RANK", "0") == "0":
        print(f"# {arguments.config}\n{dump(config)}", flush=True)
    try:
        run(config)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except STOPS as stopped:
        if os.environ.get("RANK", "0") == "0" or isinstance(stopped, RankLost):  # else all ranks stop together
            print(f"{Path(sys.argv[0]).stem}: stopped: {printable(str(stopped))}", file=sys.stderr)
        if isinstance(stopped, RankFailed):
            time.sleep(SECONDS_FOR_ANOTHER)
        sys.exit(STOPPED)
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(f"{Path(sys.argv[0]).stem}: stopped: {os_error_text(error)}", file=sys.stderr)
        sys.exit(STOPPED)
    except ValueError as error:
        # A ConfigError needs no place, unless it was made from another error.
        raised = error.__cause__ if isinstance(error, ConfigError) else error
        place = traceback.extract_tb(raised.__traceback__)[-1] if raised else None
        if raised is error and place and not _is_ours(place.filename):
            raise
        _give_up(error, place)


class _LastingFile(io.FileIO):
    """A file descriptor whose reader may go away, or whose disk may be full: what cannot be written is dropped."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError:
            return len(data)


def _lasting(stream: TextIO | None) -> TextIO:
    """Return a standard stream that ends no run: neither by what it is asked to show, nor by a reader that goes away.

    Model text may hold characters that the terminal cannot show.
    """
    if stream is None:  # closed before the start
        return open(os.devnull, "w")
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
    if stream not in (sys.__stdout__, sys.__stderr__) or not isinstance(stream, io.TextIOWrapper):
        return stream  # of a test or a notebook
    stream.flush()
    raw = _LastingFile(stream.fileno(), "wb", closefd=False)
    return io.TextIOWrapper(
        io.BufferedWriter(raw), stream.encoding, errors="replace", line_buffering=stream.line_buffering
    )


def _give_up(error: ValueError, place: traceback.FrameSummary | None = None) -> NoReturn:
    """Print a user's mistakes and end the process."""
    if os.environ.get("RANK", "0") != "0":
        time.sleep(SECONDS_FOR_ANOTHER)  # rank 0 usually finds the same mistake
        if isinstance(error, ConfigError) and error.on_all_ranks:
            sys.exit(USER_MISTAKE)
    print(format_mistakes(error, Path(sys.argv[0]).stem), file=sys.stderr)
    if place is not None:
        print(f"  (from {place.filename}:{place.lineno})", file=sys.stderr)
    sys.exit(USER_MISTAKE)


def _is_ours(filename: str) -> bool:
    """Whether a file belongs to rolltune or is the running recipe."""
    package = Path(rolltune.__file__).parent
    folders = [package.resolve(), *((package / name).resolve() for name in ("rewards", "data", "recipes"))]
    file = Path(filename).resolve()
    return any(folder in file.parents for folder in folders) or file == Path(sys.argv[0]).resolve()


def format_mistakes(error: ValueError, title: str) -> str:
    """A title with the number of mistakes, then one mistake a line."""
    problems = error.problems if isinstance(error, ConfigError) else [str(error)]
    lines = printable("\n".join(problems)).splitlines()  # problems quote ids and text of data
    return "\n".join([f"{title}: {len(problems)} mistake{'s' * (len(problems) > 1)}", *(f"  {line}" for line in lines)])
