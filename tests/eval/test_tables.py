"""Tables, plots, progress and results.json of an evaluation."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
from matplotlib.image import imread
from rich.console import Console

from rolltune.behaviours import BEHAVIOURS
from rolltune.eval import progress as progress_module
from rolltune.eval.passk import Difference, Estimate
from rolltune.eval.plots import plot_evaluation
from rolltune.eval.progress import SamplingProgress
from rolltune.eval.results import BehaviourRates, Bin, Classified, Comparison, Evaluation, ModelResult, results_json
from rolltune.eval.tables import print_tables
from rolltune.files import write_json_atomic


def estimate(mean: float, *, problems: int = 40, half: float = 0.05) -> Estimate:
    return Estimate(
        mean=mean, low=mean - half, high=mean + half, interval="bootstrap", problems=problems, completions=4 * problems
    )


def result(name: str, shift: float, *, classified: Classified | None = None) -> ModelResult:
    metrics = {
        "greedy/accuracy": estimate(0.3 + shift),
        "sampled/lenient_accuracy": estimate(0.35 + shift, problems=39),
        "sampled/length_mean": estimate(61.27, half=3),
        **{f"pass@{k}": estimate(0.1 * k + shift) for k in (1, 2, 4)},
    }
    if shift:  # the first model has no majority vote
        metrics["cons@4"] = estimate(0.6)
    return ModelResult(
        name=name,
        metrics=metrics,
        unscored={},
        by_length=[Bin(label=f"{n}", center=n, accuracy=estimate(0.5 - n / 100)) for n in (5.0, 10.0, 20.0)],
        by_solution_length=[
            Bin(label="1 to 7", center=4.0, accuracy=estimate(0.41 + shift, problems=25)),
            Bin(label="8 to 9", center=8.5, accuracy=estimate(math.nan, problems=0)),
        ],
        by_baseline=[
            Bin(label="0", center=0.0, accuracy=estimate(0.2, problems=29)),
            Bin(label="(0, 0.25]", center=0.2, accuracy=estimate(0.444, problems=11)),
        ]
        if shift
        else [],
        behaviours={
            behaviour: BehaviourRates(mean=estimate(0.7 + i), any=estimate(0.2))
            for i, behaviour in enumerate(BEHAVIOURS)
        },
        classified=classified,
    )


def evaluation(*models: ModelResult) -> Evaluation:
    differences = {
        "greedy/accuracy": Difference(mean=0.1, low=0.02, high=0.18, problems=40, changed=9, mcnemar_p=0.0213),
        "sampled/accuracy": Difference(mean=-0.01, low=-0.05, high=0.03, problems=38, changed=20, mcnemar_p=None),
        "pass@4": Difference(mean=math.nan, low=math.nan, high=math.nan, problems=0, changed=0, mcnemar_p=None),
    }
    comparisons = [Comparison(first="base", second="rl", differences=differences)] if len(models) > 1 else []
    return Evaluation(
        problems=40, samples=4, ks=[1, 2, 4], models=list(models), comparisons=comparisons, notes=["[Mind] this."]
    )


TWO = evaluation(result("base", 0.0), result("rl", 0.1))


def printed(of: Evaluation, *, width: int = 200, terminal: bool = False) -> str:
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    print_tables(of, console)
    return console.file.getvalue()


def cells(text: str, label: str) -> list[str]:
    """The cells of the row of a Markdown table that starts with a label."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {label} ")]
    return [cell.strip() for cell in row.strip("|").split("|")][1:]


def test_a_pipe_gets_markdown_tables():
    text = printed(TWO)
    assert "40 problems, 4 samples of each; greedy: 1 of each" in text
    assert cells(text, "accuracy, greedy") == ["0.300 [0.250, 0.350]", "0.400 [0.350, 0.450]"]
    assert cells(text, "lenient accuracy, sampled")[0] == "0.350 [0.300, 0.400] of 39 problems"
    assert cells(text, "length in tokens, sampled")[0] == "61.3 [58.3, 64.3]"
    assert cells(text, "pass@4") == ["0.400 [0.350, 0.450]", "0.500 [0.450, 0.550]"]
    assert cells(text, "cons@4")[0] == "-"
    assert cells(text, "(0, 0.25]") == ["11", "0.444 [0.394, 0.494]"]
    assert cells(text, "1 to 7") == ["25", "0.410 [0.360, 0.460]", "0.510 [0.460, 0.560]"]
    assert cells(text, "8 to 9") == ["0", "-", "-"]
    assert cells(text, "subgoal setting, per completion")[0] == "2.700 [2.650, 2.750]"
    assert text.rstrip().endswith("[Mind] this.")
    assert not set("│┃━╇") & set(text)


def test_a_single_bin_is_not_printed():
    base = result("base", 0.0)
    alone = replace(base, by_solution_length=base.by_solution_length[:1])
    assert "gold solution" in printed(evaluation(base)) and "gold solution" not in printed(evaluation(alone))


def test_differences_are_marked_where_they_are_significant():
    text = printed(TWO)
    assert "on the same 40 problems, 4 samples of each; * significant" in text
    assert cells(text, "rl - base") == [
        "+0.100 [+0.020, +0.180] *",
        "-0.010 [-0.050, +0.030] of 38 problems",
        "-",
        "0.0213",
    ]
    # The same interval, but only 4 problems changed.
    greedy = replace(TWO.comparisons[0].differences["greedy/accuracy"], changed=4, mcnemar_p=0.125)
    unsure = replace(TWO.comparisons[0], differences=TWO.comparisons[0].differences | {"greedy/accuracy": greedy})
    found = cells(printed(replace(TWO, comparisons=[unsure])), "rl - base")
    assert (found[0], found[-1]) == ("+0.100 [+0.020, +0.180]", "0.125")


def test_a_terminal_gets_lines_and_no_markdown():
    text = printed(TWO, width=120, terminal=True)
    assert "│" in text and "|--" not in text and "0.300 [0.250, 0.350]" in text


def test_one_model_is_compared_with_nothing():
    text = printed(evaluation(result("base", 0.0)))
    assert "differences" not in text and "solve rate" not in text


def test_the_classifier_has_a_table_of_its_own():
    classified = Classified(
        completions=50,
        unscored=3,
        mean={"verification": estimate(1.25), "subgoal_setting": estimate(0.5, problems=38)},
        agreement={},
    )
    text = printed(evaluation(result("base", 0.0), result("rl", 0.1, classified=classified)))
    table = text[text.index("by the classifier") :]
    assert cells(table, "completions") == ["50"] and cells(table, "without a verdict") == ["3"]
    assert cells(table, "verification") == ["1.250 [1.200, 1.300]"] and cells(table, "backtracking") == ["-"]
    assert cells(table, "subgoal setting") == ["0.500 [0.450, 0.550] of 38 problems"]
    assert "by the classifier" not in printed(TWO)


def test_results_json_has_every_number(tmp_path: Path):
    write_json_atomic(tmp_path / "results.json", results_json(TWO))
    found = json.loads((tmp_path / "results.json").read_text())
    assert list(found["models"]) == ["base", "rl"] and found["problems"] == 40 and found["samples"] == 4
    assert found["models"]["rl"]["metrics"]["pass@2"] == {
        "mean": pytest.approx(0.3),
        "low": pytest.approx(0.25),
        "high": pytest.approx(0.35),
        "interval": "bootstrap",
        "problems": 40,
        "completions": 160,
    }
    assert found["models"]["base"]["by_solution_length"][1]["accuracy"]["mean"] is None
    assert found["comparisons"][0]["differences"]["greedy/accuracy"]["mcnemar_p"] == 0.0213
    assert found["models"]["rl"]["by_baseline"][1]["label"] == "(0, 0.25]"


@pytest.mark.parametrize("ks", [[1], [1, 2, 4]])
def test_plots_are_drawn(tmp_path: Path, ks: list[int]):
    of = evaluation(result("base", 0.0), result("rl", 0.1), result("other", 0.2))
    paths = plot_evaluation(replace(of, ks=ks), tmp_path)
    assert [path.name for path in paths] == ["pass_at_k.png", "accuracy_by_length.png", "behaviours.png"]
    assert sorted(tmp_path.iterdir()) == sorted(paths)
    for path in paths:
        image = imread(path)[..., :3]
        assert image.shape[0] > 400 and image.std() > 0.05, "an empty picture"
        assert all(((abs(image - color).max(axis=-1) < 0.02).sum() > 50) for color in ((0.165, 0.435, 0.733),
                   (0.878, 0.482, 0.224))), "a curve of each model"  # fmt: skip


def test_progress_without_a_terminal_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    now = [0.0]
    monkeypatch.setattr(progress_module.time, "monotonic", lambda: now[0])
    with SamplingProgress(3, enabled=True) as progress:
        update = progress.model(2, "rl")
        for seconds, done in ((10, 100), (31, 200), (40, 300), (62, 400), (63, 900), (63, 900)):
            now[0] = seconds
            update(done, 900)
        progress.say(3, "x", "all samples are in [here]")
    assert capsys.readouterr().out.splitlines() == [
        "model 2 of 3, rl: 200 of 900 completions, 1:48 min left",
        "model 2 of 3, rl: 400 of 900 completions, 1:17 min left",
        "model 2 of 3, rl: 900 of 900 completions, 0:00 min left",
        "model 3 of 3, x: all samples are in [here]",
    ]


def test_other_ranks_print_nothing(capsys: pytest.CaptureFixture[str]):
    with SamplingProgress(1, enabled=False) as progress:
        progress.model(1, "a")(5, 5)
        progress.say(1, "a", "x")
    assert capsys.readouterr() == ("", "")
