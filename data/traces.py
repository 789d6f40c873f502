"""SFT examples from traces that ``tune run write_traces`` wrote, and the control sets made from them.

The model learns the whole response, so the ``sft`` recipe needs ``answer_format: "{solution}"``. The controls are those
of arXiv 2503.01307: the same answers after an empty think block or after dots of the same length, and wrong answers
only. They separate what a model learns from the behaviours from what it learns from answers, length or layout.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Literal

from rolltune.data.dataset import Dataset, take_slice
from rolltune.files import home_path
from rolltune.rewards.tags import THINK_CLOSE, THINK_OPEN, parse_tags
from rolltune.traces import Trace
from rolltune.traces.record import read_traces
from rolltune.types import Problem

_DOT = " ."


def traces(
    *,
    path: str,
    keep: Literal["all", "correct", "incorrect"] = "all",
    thinking: Literal["written", "empty", "dots"] = "written",
    tokenizer: str | None = None,
    start: int = 0,
    count: int | None = None,
) -> Dataset:
    """Load examples from a trace file, in file order.

    Each example has the id "<problem's id>#<sample>", the problem's messages, its gold answer (or the answer of the
    response if the problem has no gold answer), and the whole response as its solution.

    Args:
        path: ``<output_dir>/traces.jsonl`` of a write_traces run.
        keep: selects by the verifier's verdict; traces without a verdict are only in "all".
        thinking: "written" keeps the thinking; "empty" replaces it by ``<think> </think>``; "dots" replaces it by " ."
            repeated to the same number of tokens, or as close as the tokenizer allows. The answer always stays.
        tokenizer: model whose tokenizer counts "dots", as in ``model.path``.
        start: index of the first trace, after ``keep``.
        count: number of traces; None takes all from ``start`` on.

    Raises:
        ValueError: no such file, a malformed line (the message names it), no traces left, or an option that is unknown,
            missing or without effect.
    """
    for name, value, known in (
        ("keep", keep, ("all", "correct", "incorrect")),
        ("thinking", thinking, ("written", "empty", "dots")),
    ):
        if value not in known:
            raise ValueError(f"traces: {name}={value!r} must be one of {', '.join(known)}")
    if thinking == "dots" and tokenizer is None:
        raise ValueError("traces: thinking=dots needs tokenizer, the path of the model that will be trained")
    if thinking != "dots" and tokenizer is not None:
        raise ValueError(f"traces: tokenizer={tokenizer!r} has no effect with thinking={thinking}; leave it out")
    source = home_path(path)
    if not source.is_file():
        raise ValueError(f"traces: path={path!r} is not a file; write it with: tune run write_traces --config ...")
    kept = _keep(read_traces(source), keep, source)
    write = _thinking(thinking, tokenizer)
    taken = take_slice(kept, start=start, count=count, source=f"{source}, keep={keep}")
    return Dataset(_example(trace, write) for trace in taken)


def _keep(found: list[Trace], keep: str, source: Path) -> list[Trace]:
    if not found:
        raise ValueError(f"{source}: the file has no traces")
    wanted = {"all": (True, False, None), "correct": (True,), "incorrect": (False,)}[keep]
    kept = [trace for trace in found if trace.correct in wanted]
    if not kept:
        counts = [sum(trace.correct is verdict for trace in found) for verdict in (True, False, None)]
        raise ValueError(
            f"{source}: keep={keep} leaves none of the {len(found)} traces: {counts[0]} are correct, {counts[1]} "
            f"incorrect, {counts[2]} unscored"
        )
    return kept


def _example(trace: Trace, write: Callable[[str], str]) -> Problem:
    name = f"{trace.problem.id}#{trace.sample}"
    layout = parse_tags(trace.response).layout
    if layout is None:
        raise ValueError(f"{name}: the response must be <think>...</think> and <answer>...</answer>")
    begin, end = trace.response.index(THINK_OPEN) + len(THINK_OPEN), trace.response.index(THINK_CLOSE)
    return Problem(
        id=name,
        messages=trace.problem.messages,
        answer=layout.answer.strip() if trace.problem.answer is None else trace.problem.answer,
        solution=trace.response[:begin] + write(layout.think) + trace.response[end:],
    )


def _thinking(thinking: str, tokenizer: str | None) -> Callable[[str], str]:
    """Return the function that replaces the thinking of a trace."""
    if tokenizer is None:
        return (lambda text: " ") if thinking == "empty" else (lambda text: text)
    from rolltune.model.load import load_tokenizer  # imports torch, which the other controls do not need

    encode = load_tokenizer(tokenizer)

    def tokens(text: str) -> int:
        return len(encode(text, add_special_tokens=False)["input_ids"])

    def dots(text: str) -> str:
        wanted = tokens(text)
        # " ." is one token in most tokenizers. If it is two, or several share a token, the second guess is close.
        guess = round(wanted**2 / max(1, tokens(_DOT * wanted)))
        return _DOT * min((max(1, guess + more) for more in (0, -1, 1)), key=lambda n: abs(tokens(_DOT * n) - wanted))

    return dots
