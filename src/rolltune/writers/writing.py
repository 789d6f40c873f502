"""Shared by the recipes that write records: ask an endpoint, several calls at once, until every record is there.

A recipe lists the records and makes one; :func:`write_missing` makes those that the file lacks. Each record is on disk
as soon as it is made, so the same command continues wherever it was stopped.
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
from rich.text import Text

from rolltune.endpoints.client import BudgetExceeded, Endpoint, EndpointDown, Reply
from rolltune.files import home_path, write_json_atomic
from rolltune.metrics.progress import Progress
from rolltune.terminal import printable
from rolltune.types import Message, Problem
from rolltune.writers.records import R, RecordFile

FAILED, INTERRUPTED = 1, 130
_SEEDS = 2**31  # some servers accept only 32-bit seeds


class Malformed(ValueError):
    """No usable reply for a problem; the problem is left out."""


# --- asking -----------------------------------------------------------------------------------------------------------


async def ask(
    endpoint: Endpoint,
    messages: Sequence[Message],
    *,
    temperature: float,
    max_tokens: int,
    seed: int,
    response_format: dict[str, Any] | None = None,
) -> Reply:
    """Call :meth:`rolltune.endpoints.client.Endpoint.chat` with a seed of any size."""
    return await endpoint.chat(
        messages, temperature=temperature, max_tokens=max_tokens, seed=seed % _SEEDS, response_format=response_format
    )


def read_prompt(path: str | Path) -> str:
    """Read a prompt's file.

    Raises:
        ValueError: it cannot be read, is not UTF-8 text, or is empty.
    """
    try:
        text = home_path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"prompt: {path}: {getattr(error, 'strerror', None) or 'not UTF-8 text'}") from None
    if not text.strip():
        raise ValueError(f"prompt: {path}: is empty")
    return text


def digest(text: str) -> str:
    """Hash a prompt to 12 hex digits."""
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def shown_messages(messages: Sequence[Message]) -> str:
    """Render a conversation for a dry run."""
    return "\n\n".join(f"[{message['role']}]\n{message['content']}" for message in messages)


# --- the run ----------------------------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Work(Generic[R]):
    """The records of a run, and what this process made of them.

    Attributes:
        recipe: name of the recipe, for messages.
        file: where records go.
        wanted: (problem, sample number) of every record, in the order in which they are made.
        write: makes one record. BudgetExceeded ends the run once the calls in flight are done; EndpointDown and a
            refusal (ValueError) end it at once. Malformed leaves the record out; so does any ValueError if there is no
            endpoint.
        endpoint: asked by ``write``; None if a program writes.
        written: number of records made.
        left_out: reason for each record that was left out.
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
    """Write the records that the file lacks, and sort the file.

    If that fails (a signal, a cap, an endpoint that is down), print the reason and the progress, and exit: 130 after
    SIGINT and SIGTERM, else 1.

    Args:
        work: counts written and left-out records.
        max_concurrency: records in progress at once.

    Raises:
        ValueError: the endpoint refuses every call (a wrong key, model or address).
    """
    try:
        asyncio.run(_write_all(work, max_concurrency))
    except asyncio.CancelledError:
        _give_up(work, "interrupted", INTERRUPTED)
    except EndpointDown as error:
        _give_up(work, str(error), FAILED)
    if stop := work.stopped_by:
        if work.endpoint:  # including the calls that were in flight when the cap was reached
            stop = BudgetExceeded(stop.key, stop.limit, work.endpoint.usage)
        _give_up(work, str(stop), FAILED)
    work.file.sort(list({problem.id: problem for problem, _ in work.wanted}.values()))


async def _write_all(work: Work[Any], max_concurrency: int) -> None:
    """Write ``max_concurrency`` records at once. SIGINT and SIGTERM cancel those in flight."""
    todo = [(problem, sample) for problem, sample in work.wanted if (problem.id, sample) not in work.file.done]
    already = len(work.wanted) - len(todo)
    if already:
        print(f"{already} of {_all(work)} exist; {len(todo)} are missing", flush=True)
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
    """Write one record after another until none is left or a cap is reached."""
    for problem, sample in todo:
        await asyncio.sleep(0)  # a program that writes never yields otherwise, not even to signal handlers
        if work.stopped_by:
            return
        try:
            record = await work.write(problem, sample)
        except BudgetExceeded as error:  # calls in flight are paid for, so the other workers finish
            work.stopped_by = error
            return
        except ValueError as error:
            if work.endpoint and not isinstance(error, Malformed):
                raise  # the endpoint refuses every call, whereas a program refuses a problem that it cannot solve
            work.left_out.append(str(error))
        else:
            work.file.append(record)
            work.written += 1
        show()


def _shower(progress: Progress, work: Work[Any], already: int) -> Callable[[], None]:
    """Return a function that reports progress: each record on a terminal, else every 5 %."""
    wanted = len(work.wanted)
    every = 1 if sys.stdout.isatty() else max(1, wanted // 20)

    def show() -> None:
        done = already + work.written + len(work.left_out)
        if done % every == 0 or done == wanted:
            cost = {"dollars": work.endpoint.usage.dollars} if work.endpoint else {}
            progress.step(done, {"written": work.written, "left out": len(work.left_out), **cost})

    return show


def _all(work: Work[Any]) -> str:
    return f"{len(work.wanted)} {work.file.layout.nouns}"


def _give_up(work: Work[Any], why: str, status: int) -> NoReturn:
    """Print the progress and end the process."""
    anew = " (caps start again at zero)" if work.endpoint else ""
    there = f"{len(work.file.done)} of {_all(work)} are in {work.file.path}; continue with the same command{anew}"
    print(printable(f"{work.recipe}: {why}\n  {there}"), file=sys.stderr)
    sys.exit(status)


# --- output -----------------------------------------------------------------------------------------------------------


def show_dry_run(shown: Mapping[str, str], wanted: str) -> None:
    """Print texts, each below its name, and that nothing was written."""
    console = Console()
    for name, text in shown.items():
        console.rule(Text(printable(name, keep="")))
        console.print(printable(text), markup=False, highlight=False)
    console.rule()
    console.print(f"dry run: everything resolves; a run would write {wanted}; nothing was written")


def show_summary(work: Work[Any], summary: Mapping[str, float | None]) -> None:
    """Print the summary as a table, and write it to ``summary.json`` beside the file."""
    write_json_atomic(work.file.path.with_name("summary.json"), summary)
    table = Table("summary", "", show_edge=False, pad_edge=False)
    for name, value in summary.items():
        shown = "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.2f}"
        table.add_row(name.replace("_", " "), shown)
    console = Console()
    console.print(table)
    if work.left_out:
        console.print(printable(f"last one left out: {work.left_out[-1]}"), markup=False, highlight=False)
    console.print(f"{work.file.layout.nouns}: {work.file.path}", markup=False, highlight=False)
