"""What a report says, gathered from folders with known numbers."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from report_folders import write_step

from rolltune.report import samples as samples_module
from rolltune.report import try_report, write_report
from rolltune.report.page import gather, gather_comparison
from rolltune.rewards.rubric.notes import read_note, write_note
from rolltune.run.notices import about_metrics


def panel(page, title):
    return next(panel for panel in page.panels if panel.title == title)


def test_the_curves_of_a_run(make_run):
    page = gather(make_run())
    reward = panel(page, "Reward")
    assert reward.x == [1, 2, 3, 4] and reward.lines[0].y == [0.1, 0.2, 0.3, 0.4]
    (strict,) = panel(page, "Held-out accuracy").lines
    assert (strict.y, strict.low, strict.high, strict.points) == ([0.5, 0.5], [0.25, 0.25], [0.75, 0.75], True)
    assert [line.label for line in panel(page, "Lost completions and groups").lines] == ["truncated", "unscored"]
    seconds = panel(page, "Seconds of a step")
    assert seconds.stacked and [(line.label, line.y[0]) for line in seconds.lines] == [("sample", 2.0), ("train", 1.0)]
    assert "Loss" not in [panel.title for panel in page.panels]
    assert "Held-out score" not in [panel.title for panel in page.panels], "it is the accuracy"


def test_what_a_run_was(make_run):
    folder = make_run(config="num_steps: 8\nmodel: {path: tiny}\n")
    (folder / "run.json").write_text(
        json.dumps(
            {
                "command": "tune run grpo --config x.yaml",
                "started": 1_767_225_600.0,
                "processes": 2,
                "versions": {"python": "3.11.7", "torch": "2.13.0"},
                "hardware": {"cpu": "EPYC", "cores": 2, "memory_gib": 16.0, "gpus": ["H100"]},
            }
        )
    )
    page = gather(folder)
    facts = dict(page.facts)
    assert facts["command"] == "tune run grpo --config x.yaml" and facts["model"] == "tiny"
    assert facts["steps"] == "4 of 8" and facts["last start"].endswith(", processes: 2")
    assert facts["time"].endswith(", 0.2 minutes in steps")
    assert facts["hardware"] == "H100, EPYC, 2 cores, 16.0 GiB of memory"
    assert facts["judges"] == "16 calls, 0 tokens, 2.00 dollars"
    assert page.config == (folder / "config.yaml").read_text()
    numbers = dict(page.numbers[0]["rows"])
    assert numbers["reward"] == "0.100 → 0.400"
    assert numbers["held-out accuracy"] == "0.500 [0.250, 0.750] → 0.500 [0.250, 0.750]"
    (folder / "run.json").write_text("{")
    assert "command" not in dict(gather(folder).facts), "a damaged run.json takes nothing else away"


def test_judges_costs_add_up_over_the_processes_of_a_run(make_run):
    folder = make_run(steps=3)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(json.dumps({"step": 4, "time": 0.0, "judge/rubric/calls": 5.0}) + "\n")
    assert dict(gather(folder).facts)["judges"].startswith("17 calls")  # 12 before the restart, 5 after


def test_warnings_in_plain_words():
    steps = [
        {
            "step": step,
            "updates": 0.0 if step == 3 else 1.0,
            "groups/zero_variance": 1.0,
            "completions/truncated": 0.0 if step < 9 else 0.5,
            "reward/unscored": 0.2,
            "reward/length_correlation": 0.8,
            "mismatch/mean_abs": 0.001 * step,
            "overoptimization/alarm": float(step == 5),
        }
        for step in range(11)
    ]
    lines = list(about_metrics(steps))
    for words in (
        "no optimizer step was taken in 1 of 10 steps",
        "5 steps in a row had nothing to learn from",
        "50% of the completions of the last steps were cut at sampling.max_new_tokens",
        "20% of the completions of the last steps are unscored",
        "+0.80 in the last steps): longer completions earn more",
        "first at step 5",
        "grew from 0.0015 to 0.0095",
    ):
        assert sum(words in line for line in lines) == 1, words
    assert len(lines) == 7
    quiet = {"updates": 1.0, "completions/truncated": 0.1, "reward/unscored": 0.0, "mismatch/mean_abs": 1e-6}
    assert list(about_metrics([{"step": step, **quiet} for step in range(9)])) == []


def test_samples_are_indexed_and_packed(make_run):
    page = gather(make_run())
    index = page.data()["samples"]
    assert index["places"] == ["1", "2", "3", "4"] and index["problems"] == ["sums/0", "sums/1"]
    assert index["groups"]["rewards"][-2:] == [[0.4, 0.0], [0.41, None]]
    assert index["groups"]["cut"][-2:] == [0, 1] and index["groups"]["problem"][-2:] == [0, 1]
    assert page.samples is not None
    pack = json.loads(gzip.decompress(page.samples.packs[index["groups"]["pack"][-1]].data))
    first, second = pack[0]["completions"]
    assert (first["advantage"], second["advantage"], first["token_texts"]) == (1.0, -1.0, ["<t0>", "<t1>", "<t2>"])
    assert first["token_logprobs"] == [-0.05, -1.0, -4.0]
    assert pack[1]["completions"][1] == {
        "text": "step 4 problem 1 completion 1",
        "tokens": 3,
        "finish_reason": "length",
        "failure": "judge_down",
        "token_texts": ["<t0>", "<t1>", "<t2>"],
        "token_logprobs": [-0.05, -1.0, -4.0],
    }


def test_too_many_samples_are_thinned_out_evenly(make_run, monkeypatch):
    folder = make_run(steps=6)
    size = sum(path.stat().st_size for path in (folder / "samples").iterdir())
    monkeypatch.setattr(samples_module, "MAX_SAMPLE_BYTES", size // 2 + 1)
    index = gather(folder).data()["samples"]
    assert index["places"] == ["2", "4", "6"] and index["note"].startswith("3 of 6 steps are in this page")


def test_a_rubrics_criteria(make_run):
    (table,) = gather(make_run()).tables
    # Two graded responses a step; the judges agree on the first criterion only.
    assert table["rows"] == [["is_short", "1.00", "1.00", "8", "0"], ["is_kind", "0.50", "0.00", "8", "0"]]


def test_notes_are_read_back():
    note = write_note(0.5, [("judge-a@host:80", 1.0, "Yes: it | does."), ("b", None, "judge_down")])
    assert read_note(note) == (0.5, [1.0, None])
    assert read_note(write_note(None, [("b", None, "x")])) == (None, [None])
    assert read_note("") is read_note("fine") is read_note("0.5: no judge") is read_note("1e: a 1: x") is None


def test_a_run_without_rewards_has_its_losses(tmp_path):
    lines = [{"step": 0, "heldout/loss": 2.0}, {"step": 1, "loss": 1.5}, {"step": 2, "loss": 1.0, "heldout/loss": 0.5}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = gather(tmp_path)
    numbers = dict(page.numbers[0]["rows"])
    assert (numbers["training loss"], numbers["held-out loss"]) == ("1.500 → 1.000", "2.000 → 0.500")
    assert page.data()["samples"] is None


def test_a_comparison_of_runs(make_run):
    first = make_run("a/run", config="num_steps: 8\noptimizer: {lr: 0.1}\n")
    second = make_run("b/run", steps=2, config="num_steps: 8\noptimizer: {lr: 0.2}\n")
    page = gather_comparison([first, second])
    reward = panel(page, "Reward")
    assert [(line.label, line.y) for line in reward.lines] == [
        ("a/run", [0.1, 0.2, 0.3, 0.4]),
        ("b/run", [0.1, 0.2, None, None]),
    ]
    assert panel(page, "Held-out accuracy: strict").lines[0].low == [0.25, 0.25]
    assert page.tables[0]["rows"] == [["optimizer.lr", "0.1", "0.2"]]
    assert ["reward", "0.100 → 0.400", "0.100 → 0.200"] in page.numbers[0]["rows"]
    with pytest.raises(ValueError, match="is given twice"):
        gather_comparison([first, first / "../run"])


def test_an_evaluation(evaluation_folder):
    page = gather(evaluation_folder)
    base, trained = panel(page, "pass@k").lines
    assert panel(page, "pass@k").x == [1, 2] and panel(page, "pass@k").log2
    assert (base.y, trained.y) == ([0.25, 0.5], [7 / 16, 7 / 8])
    assert base.low is not None and base.low[0] is not None and base.low[0] < 0.25
    tables = {table["title"]: table for table in page.tables}
    assert tables["Metrics"]["rows"][0][:2] == ["accuracy, greedy", "0.500 [0.215, 0.785]"]
    assert tables["Differences between models"]["rows"][0][0] == "trained - base"
    assert tables["Differences between models"]["rows"][0][1].startswith("+0.375 [")
    only_one = tables["Problems that only one model solves"]["rows"]
    assert only_one == [["trained", f"p{i}", "67%", f"question {i}"] for i in (4, 5, 6)]
    index = page.data()["samples"]
    assert index["axis"] == "model" and index["places"] == ["base", "trained"]
    assert index["groups"]["rewards"][4] == [0.0, 0.0, 0.0] and index["groups"]["rewards"][12] == [1.0, 1.0, 0.0]


def test_folders_without_a_run_and_damaged_files(tmp_path, make_run, evaluation_folder):
    with pytest.raises(ValueError, match="holds no run and no evaluation"):
        gather(tmp_path / "nothing")
    with pytest.raises(ValueError, match="give it alone"):
        gather_comparison([evaluation_folder, make_run("other")])
    (evaluation_folder / "results.json").write_text('{"problems": 1}')
    with pytest.raises(ValueError, match="results.json: not the results"):
        gather(evaluation_folder)
    folder = make_run()
    (folder / "samples" / "step_000002.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="step_000002.jsonl:1: not JSON"):
        gather(folder)
    (folder / "samples" / "step_000002.jsonl").write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match="step_000002.jsonl:1: not an object with a 'problem'"):
        gather(folder)


def test_a_report_that_cannot_be_written_ends_nothing(make_run, capsys):
    folder = make_run()
    (folder / "report.html").mkdir()
    try_report(folder)
    assert "report.html: not written (IsADirectoryError" in capsys.readouterr().err
    assert not list(folder.glob("*.tmp"))


def test_a_page_is_written_again_from_the_new_files_only(make_run, monkeypatch):
    folder = make_run()
    write_report([folder])
    write_step(folder, 5)
    read: list[Path] = []
    read_records = samples_module.read_records
    monkeypatch.setattr(samples_module, "read_records", lambda path: read.append(path) or read_records(path))
    assert gather(folder).data()["samples"]["places"][-1] == "5"
    assert [path.stem for path in read] == ["step_000005"]
