"""What the recipes that write have in common: asking an endpoint, several calls at once, until all is there.

A recipe says what is wanted and how one record is made; :func:`write_missing` makes those that the file lacks. What is
made is on the disk at once, so the same command goes on wherever it was stopped.
"""

from __future__ import annotations

import asyncio
import hashlib
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, NoReturn

from rich.console import Console
from rich.table import Table

from rolltune.endpoints.client import BudgetExceeded, Endpoint, EndpointDown, Reply
from rolltune.files import write_json_atomic
from rolltune.metrics.progress import Progress
from rolltune.types import Message, Problem
from rolltune.writers.records import R, RecordFile

FAILED, INTERRUPTED = 1, 130
_SEEDS = 2**31  # some servers take 32-bit seeds alone


class Malformed(ValueError):
    """No reply for a problem could be used; the problem is left out."""


# --- asking -----------------------------------------------------------------------------------------------------------


def check_asking(*, temperature: float, max_tokens: int, max_total_tokens: int | None) -> None:
    """Raise ValueError where one of a writer's arguments is out of range, those apart that an endpoint checks."""
    if not 0 <= temperature <= 2:
        raise ValueError(f"temperature: {temperature}; must be in 0 .. 2")
    if max_tokens < 1:
        raise ValueError(f"max_tokens: {max_tokens}; must be >= 1")
    if max_total_tokens is not None and max_total_tokens < 1:
        raise ValueError(f"max_total_tokens: {max_total_tokens}; must be >= 1")


async def ask(
    endpoint: Endpoint,
    messages: Sequence[Message],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    response_format: dict[str, Any] | None = None,
) -> Reply:
    """:meth:`rolltune.endpoints.client.Endpoint.chat` by any seed, for a writer whose cap on tokens is
    max_total_tokens."""
    try:
        return await endpoint.chat(
            messages,
            temperature=temperature,
            max_tokens=max_tokens,
            seed=seed % _SEEDS,
            response_format=response_format,
        )
    except BudgetExceeded as error:
        key = "max_total_tokens" if error.key == "max_tokens" else error.key  # as it is called there
        raise BudgetExceeded(key, error.limit, error.spent) from None


def read_prompt(path: str | Path) -> str:
    """The text of a prompt's file.

    Raises:
        ValueError: it cannot be read, is no UTF-8 text, or is empty.
    """
    try:
        text = Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt: {path}: {getattr(error, 'strerror', None) or 'is no UTF-8 text'}") from None
    if not text.strip():
        raise ValueError(f"prompt: {path}: is empty")
    return text


def digest(text: str) -> str:
    """12 hex digits that name a prompt."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def shown_messages(messages: Sequence[Message]) -> str:
    """A conversation as a dry run prints it."""
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Work(Generic[R]):
    """What is to be written, and what has come of it in this process.

    Attributes:
        recipe: its name, for messages.
        file: what is written goes there.
        wanted: problems and samples, in the order in which they are taken.
        write: makes the record of one. BudgetExceeded ends the run when the calls in flight are done, EndpointDown
            and a refusal (ValueError) at once; Malformed leaves the one out, and so does any ValueError without an
            endpoint.
        endpoint: that ``write`` asks; None where a program writes.
        written: records made.
        left_out: why, for each that was not.
        stopped_by: the cap that was reached.
    """

    recipe: str
    file: RecordFile[R]
    wanted: Sequence[tuple[Problem, int]]
    write: Callable[[Problem, int], Awaitable[R]]
    endpoint: Endpoint | None
    written: int = 0
    left_out: list[str] = field(default_factory=list)
    stopped_by: BudgetExceeded | None = None


def write_missing(work: Work[R], *, max_concurrency: int) -> None:
    """Write what the file does not have yet, and put the file in order.

    Where that cannot be done (a signal, a cap, an endpoint that is down) it says why and how far it got, and ends the
    process: 130 after SIGINT and SIGTERM, else 1.

    Args:
        work: counts what is written and left out.
        max_concurrency: records in the making at once.

    Raises:
        ValueError: the endpoint refuses all calls (a wrong key, model or address).
    """
    try:
        asyncio.run(_write_all(work, max_concurrency))
    except asyncio.CancelledError:
        _give_up(work, "interrupted", INTERRUPTED)
    except EndpointDown as error:
        _give_up(work, str(error), FAILED)
    if stop := work.stopped_by:
        if work.endpoint:  # what is spent now, with the calls that were in flight then
            stop = BudgetExceeded(stop.key, stop.limit, work.endpoint.spent)
        _give_up(work, str(stop), FAILED)
    work.file.sort(list({problem.id: problem for problem, _ in work.wanted}.values()))


async def _write_all(work: Work[Any], max_concurrency: int) -> None:
    """So many at once; SIGINT and SIGTERM cancel what is in flight."""
    todo = [(problem, sample) for problem, sample in work.wanted if (problem.id, sample) not in work.file.done]
    already = len(work.wanted) - len(todo)
    if already:
        print(f"{already} of {_all(work)} are there; {len(todo)} are missing", flush=True)
    this = asyncio.current_task()
    assert this is not None
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, this.cancel)
    with Progress(len(work.wanted), already) as progress:
        show = _shower(progress, work, already)
        rest = iter(todo)
        workers = [asyncio.create_task(_write_some(work, rest, show)) for _ in range(min(max_concurrency, len(todo)))]
        try:
            await asyncio.gather(*workers)
        finally:
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)
            if work.endpoint:
                await work.endpoint.aclose()


async def _write_some(work: Work[Any], todo: Iterator[tuple[Problem, int]], show: Callable[[], None]) -> None:
    """Write one record after the other, until none is left or a cap is reached."""
    for problem, sample in todo:
        await asyncio.sleep(0)  # a program that writes would let nobody else have a turn, signals included
        if work.stopped_by:
            return
        try:
            record = await work.write(problem, sample)
        except BudgetExceeded as error:  # calls in flight are paid for: the other workers finish theirs
            work.stopped_by = error
            return
        except ValueError as error:
            if work.endpoint and not isinstance(error, Malformed):
                raise  # the endpoint refuses all calls alike; a program refuses a problem that it cannot work
            work.left_out.append(str(error))
        else:
            work.file.append(record)
            work.written += 1
        show()


def _shower(progress: Progress, work: Work[Any], already: int) -> Callable[[], None]:
    """What shows each record on a terminal, and every twentieth part of them where lines are printed."""
    wanted = len(work.wanted)
    every = 1 if sys.stdout.isatty() else max(1, wanted // 20)

    def show() -> None:
        done = already + work.written + len(work.left_out)
        if done % every == 0 or done == wanted:
            spent = {"dollars": work.endpoint.spent.dollars} if work.endpoint else {}
            progress.step(done, {"written": work.written, "left out": len(work.left_out), **spent})

    return show


def _all(work: Work[Any]) -> str:
    return f"{len(work.wanted)} {work.file.layout.nouns}"


def _give_up(work: Work[Any], why: str, status: int) -> NoReturn:
    """Say how far it got, and end the process."""
    anew = " (caps count anew)" if work.endpoint else ""
    there = f"{len(work.file.done)} of {_all(work)} are in {work.file.path}; go on with the same command{anew}"
    print(f"{work.recipe}: {why}\n  {there}", file=sys.stderr)
    sys.exit(status)


# --- what is shown ----------------------------------------------------------------------------------------------------


def show_dry_run(shown: Mapping[str, str], wanted: str) -> None:
    """Print texts, each under its name, and that nothing was written."""
    console = Console()
    for name, text in shown.items():
        console.rule(name)
        console.print(text, markup=False, highlight=False)
    console.rule()
    console.print(f"dry run: everything resolves; {wanted} were to be written, nothing was")


def show_summary(work: Work[Any], summary: Mapping[str, float | None]) -> None:
    """The table, and ``summary.json`` beside the file with the same numbers."""
    write_json_atomic(work.file.path.with_name("summary.json"), summary)
    table = Table("summary", "", show_edge=False, pad_edge=False)
    for name, value in summary.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
        table.add_row(name.replace("_", " "), shown)
    console = Console()
    console.print(table)
    if work.left_out:
        console.print(f"left out, the last: {work.left_out[-1]}", markup=False, highlight=False)
    console.print(f"{work.file.layout.nouns}: {work.file.path}", markup=False, highlight=False)
