"""Output folders with known numbers, and a headless Chromium."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from report_folders import write_step

from rolltune.eval.comparison import compare, notes
from rolltune.eval.measures import measure_model
from rolltune.eval.results import Evaluation, problem_records, results_json
from rolltune.eval.sample_cache import ProblemSamples, Response
from rolltune.eval.verdicts import verify
from rolltune.files import json_line, write_json_atomic
from rolltune.rewards.answer import answer_reward, lenient_answer_reward
from rolltune.rewards.format import format_reward
from rolltune.types import Problem

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
)


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    """Write the folder of a run of some steps."""

    def make(name: str = "run", *, steps: int = 4, text: str | None = None, config: str = "num_steps: 8\n") -> Path:
        folder = tmp_path / name
        folder.mkdir(parents=True)
        (folder / "config.yaml").write_text(config)
        for step in range(1, steps + 1):
            write_step(folder, step, text if step == steps else None)
        return folder

    return make


@pytest.fixture
def evaluation_folder(tmp_path: Path) -> Path:
    """Two models on eight problems: the first solves the first four, the second all but the last."""
    folder = tmp_path / "evaluation"
    (folder / "samples").mkdir(parents=True)
    problems = [
        Problem(id=f"p{i}", messages=({"role": "user", "content": f"question {i}"},), answer=str(i), solution="a b")
        for i in range(8)
    ]

    def response(problem: int, is_right: bool) -> Response:
        answer = problem if is_right else 99
        text = f"<think>about {problem}</think>\n<answer>{answer}</answer>"
        return Response(text=text, tokens=10 + problem, finish_reason="stop")

    models = []
    for name, solved in (("base", 4), ("trained", 7)):
        found = {
            problem.id: ProblemSamples(
                problem=problem.id,
                prompt="digest",
                greedy=response(i, i < solved),
                samples=(response(i, i < solved), response(i, False)),
            )
            for i, problem in enumerate(problems)
        }
        lines = [{"settings": {}}, *map(asdict, found.values())]
        (folder / "samples" / f"{name}.jsonl").write_text("".join(map(json_line, lines)))
        rewards = {"correct": answer_reward, "lenient": lenient_answer_reward, "format": format_reward}
        models.append(verify(name, problems, found, **rewards))
    bootstrap = {"resamples": 100, "seed": 0}
    results = [measure_model(problems, models[0], baseline=None, ks=[1, 2], **bootstrap)]
    results += [measure_model(problems, models[1], baseline=models[0], ks=[1, 2], **bootstrap)]
    evaluation = Evaluation(
        problems=8,
        samples=2,
        ks=[1, 2],
        models=results,
        comparisons=compare(models, k=2, **bootstrap),
        notes=notes(problems, results),
    )
    write_json_atomic(folder / "results.json", results_json(evaluation))
    (folder / "problems.jsonl").write_text("".join(map(json_line, problem_records(problems, models))))
    return folder


@pytest.fixture(scope="module")  # Playwright runs an event loop in this thread until it ends
def browser() -> Iterator[Any]:
    """A headless Chromium."""
    if CHROMIUM is None:
        problem = "no chromium on the path; on Debian: apt-get install chromium"
        if os.environ.get("CI") == "true":
            pytest.fail(problem)
        pytest.skip(problem)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=list(ARGUMENTS))
        yield started
        started.close()
