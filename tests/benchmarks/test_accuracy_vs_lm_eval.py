"""benchmarks/accuracy_vs_lm_eval.py without lm-eval: its rules for answers, its files, how it shows differences."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from repo import ROOT

SCRIPT = ROOT / "benchmarks" / "accuracy_vs_lm_eval.py"
sys.path.insert(0, str(SCRIPT.parent))  # as when the script runs
script = importlib.import_module("accuracy_vs_lm_eval")
harness = importlib.import_module("lm_eval_harness")

# From lm_eval/tasks/gsm8k/gsm8k.yaml of lm-eval 0.4.13, with the default group_select of 0 added.
GSM8K_YAML = r"""
metric_list:
  - metric: exact_match
    aggregation: mean
    higher_is_better: true
    ignore_case: true
    ignore_punctuation: false
    regexes_to_ignore:
      - ","
      - "\\$"
      - "(?s).*#### "
      - "\\.$"
filter_list:
  - name: "strict-match"
    filter:
      - function: "regex"
        regex_pattern: "#### (\\-?[0-9\\.\\,]+)"
        group_select: 0
      - function: "take_first"
  - name: "flexible-extract"
    filter:
      - function: "regex"
        group_select: -1
        regex_pattern: "(-?[$0-9.,]{2,})|(-?[0-9]+)"
      - function: "take_first"
"""


@pytest.fixture(scope="module")
def task():
    return harness.Task(
        name="rolltune_sums",
        extractors=(harness.ANSWER_TAG, harness.FLEXIBLE),
        until=("Question:", "<|end|>"),
        max_new_tokens=8,
    )


@pytest.fixture(scope="module")
def sampled(tiny_llama: Path):
    args = ["--lm-eval-python", "python", "--data", "sums", "--model", str(tiny_llama), "--problems", "3"]
    return script.sample_greedily(script.parse_args([*args, "--max-new-tokens", "8"]))


@pytest.mark.parametrize(
    ("text", "strict", "flexible", "tag"),
    [
        ("2 + 2 = 4\n#### 4", "4", "4", "[invalid]"),
        ("#### 1,800.\nQ\n#### 7", "1,800.", "7", "[invalid]"),  # the first match, the last match
        ("#### -3 apples for $12.50", "-3", "$12.50", "[invalid]"),
        ("####4", "[invalid]", "4", "[invalid]"),
        ("It is -5. <answer>6</answer> <answer> $7 </answer>", "[invalid]", "$7", "$7"),
        ("<answer>6", "[invalid]", "6", "[invalid]"),
        ("Well, no.", "[invalid]", "[invalid]", "[invalid]"),
        ("Wait.. what", "[invalid]", "..", "[invalid]"),  # a quirk of the pattern
        ("", "[invalid]", "[invalid]", "[invalid]"),
    ],
)
def test_extract(text: str, strict: str, flexible: str, tag: str) -> None:
    assert harness.extract(text, harness.STRICT) == strict
    assert harness.extract(text, harness.FLEXIBLE) == flexible
    assert harness.extract(text, harness.ANSWER_TAG) == tag


@pytest.mark.parametrize(
    ("answer", "gold", "right"),
    [
        ("$1,800.", "1800", True),
        ("18", "9 * 2 = 18\n#### 18", True),
        ("B", "b", True),
        ("18.0", "18", False),
        ("18..", "18", False),  # one point at the end is ignored
        ("[invalid]", "18", False),
    ],
)
def test_is_match(answer: str, gold: str, right: bool) -> None:
    assert harness.is_match(answer, gold) is right


def test_cut_at_stop() -> None:
    assert harness.cut_at_stop("a</s>b Question: c", ("Question:", "</s>")) == "a"
    assert harness.cut_at_stop("nothing", ("Question:",)) == "nothing"


@pytest.mark.parametrize(
    ("left", "right", "position"), [("abc", "abc", None), ("abc", "abd", 2), ("ab", "abc", 2), ("", "a", 0)]
)
def test_first_difference(left: str, right: str, position: int | None) -> None:
    assert script.first_difference(left, right) == position
    assert script.first_difference(right, left) == position


def test_the_task_has_the_rules_of_gsm8k(task) -> None:
    config = harness.task_config(replace(task, extractors=(harness.STRICT, harness.FLEXIBLE)), "data.jsonl")
    theirs = yaml.safe_load(GSM8K_YAML)
    assert {key: config[key] for key in theirs} == theirs
    assert config["generation_kwargs"]["until"] == ["Question:", "<|end|>"]
    assert config["generation_kwargs"]["max_gen_toks"] == 8


def test_agreement(task) -> None:
    ours = [harness.verify(text, "4", task) for text in ("<answer>4</answer>", "<answer>5</answer>", "4", "none")]
    theirs = [harness.verify(text, "4", task) for text in ("<answer>4</answer>", "<answer>6</answer>", "7", "4")]
    tag, flexible = script.compare(task, ours, theirs, {"answer-tag": 0.25, "flexible-extract": 0.5})
    assert (tag.rolltune, tag.lm_eval, tag.same_answer, tag.same_verdict) == (0.25, 0.25, 3, 4)
    assert (flexible.rolltune, flexible.lm_eval, flexible.same_answer, flexible.same_verdict) == (0.5, 0.5, 1, 2)
    text = script.table([tag, flexible], 1, 4).splitlines()
    assert text[1].split() == ["answer-tag", "0.2500", "0.2500", "3/4", "4/4"]
    assert text[3] == "the same text: 1/4"


# --- lm-eval's input and output ------------------------------------------------------------------------------------


def test_write_task(task, tiny_llama: Path, tmp_path: Path) -> None:
    items = [harness.Item(id="a", prompt="<|user|>2 + 2?\n<|assistant|>", gold="4")]
    assert harness.write_task(task, items, str(tiny_llama), tmp_path) == (
        "pretrained=model,dtype=float32,add_bos_token=False"
    )
    assert (tmp_path / "model").resolve() == tiny_llama.resolve()
    assert json.loads((tmp_path / "data.jsonl").read_text()) == {"id": "a", "prompt": items[0].prompt, "gold": "4"}
    written = yaml.safe_load((tmp_path / "rolltune_sums.yaml").read_text())
    assert written == harness.task_config(task, "data.jsonl")


def test_write_task_of_an_adapter(task, tiny_llama: Path, tmp_path: Path) -> None:
    adapter, folder = tmp_path / "adapter, rank 8", tmp_path / "work"
    for path in (adapter, folder):
        path.mkdir()
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(tiny_llama)}))
    args = harness.write_task(task, [], str(adapter), folder)
    assert args == "pretrained=base,peft=model,dtype=float32,add_bos_token=False"
    assert (folder / "base").resolve() == tiny_llama.resolve()
    assert (folder / "model").resolve() == adapter.resolve()


def lm_eval_files(folder: Path, prompt: str) -> Path:
    """The part of lm-eval 0.4.13's output (with --log_samples) that is read; the second item's samples come first."""
    results = folder / "results" / "model"
    results.mkdir(parents=True)
    scores = {"exact_match,answer-tag": 0.5, "exact_match,flexible-extract": 1.0}
    (results / "results_2026.json").write_text(json.dumps({"results": {"rolltune_sums": scores}}))
    samples = [
        {
            "doc": {"id": name},
            "arguments": {"gen_args_0": {"arg_0": prompt, "arg_1": {}}},
            "resps": [[f"text {name}"]],
            "filtered_resps": [f"{name} {extractor}"],
            "filter": extractor,
            "exact_match": float(name == "a" or extractor == "flexible-extract"),
        }
        for name in ("b", "a")
        for extractor in ("flexible-extract", "answer-tag")
    ]
    (results / "samples_rolltune_sums_2026.jsonl").write_text("".join(json.dumps(s) + "\n" for s in samples))
    return folder / "results"


def test_read_lm_eval(task, tmp_path: Path) -> None:
    items = [harness.Item(id=name, prompt="p", gold="4") for name in ("a", "b")]
    accuracies, answers = harness.read_lm_eval(lm_eval_files(tmp_path, "p"), task, items)
    assert accuracies == {"answer-tag": 0.5, "flexible-extract": 1.0}
    assert [answer.text for answer in answers] == ["text a", "text b"]
    assert answers[1].extracted == {"answer-tag": "b answer-tag", "flexible-extract": "b flexible-extract"}
    assert answers[1].correct == {"answer-tag": False, "flexible-extract": True}


@pytest.mark.parametrize(
    ("name", "prompt", "message"),
    [("a", "<s>p", "prompt of a "), ("c", "p", "nothing for c")],
)
def test_read_lm_eval_refuses(task, tmp_path: Path, name: str, prompt: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        harness.read_lm_eval(lm_eval_files(tmp_path, prompt), task, [harness.Item(id=name, prompt="p", gold="4")])


def test_read_lm_eval_of_nothing(task, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="0 sample files"):
        harness.read_lm_eval(tmp_path, task, [])


# --- a tiny model on rolltune's side ----------------------------------------------------------------------------------


def test_the_prompt_as_text_has_the_sampled_tokens(sampled) -> None:
    assert [item.gold for item in sampled.items] == [problem.answer for problem in sampled.problems]
    for item, prompt in zip(sampled.items, sampled.prompts, strict=True):
        assert item.prompt.startswith("<|system|>Think first, then answer.<|end|><|user|>")
        assert item.prompt.endswith("<|end|><|assistant|>")
        assert tuple(sampled.tokenizer(item.prompt, add_special_tokens=False)["input_ids"]) == prompt.token_ids


def test_the_same_texts(sampled) -> None:
    theirs = [
        harness.verify(harness.cut_at_stop(c.text, sampled.task.until), item.gold, sampled.task)
        for item, c in zip(sampled.items, sampled.completions, strict=True)
    ]
    accuracies = {extractor.name: 0.0 for extractor in sampled.task.extractors}
    summary = script.summarise(sampled, accuracies, theirs)
    assert (summary["same_texts"], summary["differences"], summary["other_verdicts"]) == (3, [], [])
    assert [agreement["same_answer"] for agreement in summary["accuracy"]] == [3, 3]


def test_a_text_that_differs(sampled) -> None:
    import torch

    task, items = sampled.task, sampled.items
    texts = [harness.cut_at_stop(c.text, task.until) for c in sampled.completions]
    assert len(texts[1]) >= 3, "the tiny model's text is too short to change"
    texts[1] = texts[1][:2] + "\u2603<answer>" + items[1].gold + "</answer>"
    theirs = [harness.verify(text, item.gold, task) for text, item in zip(texts, items, strict=True)]
    theirs[2] = replace(theirs[2], correct=dict.fromkeys(theirs[2].correct, True))  # a wrong verdict of lm-eval's
    summary = script.summarise(sampled, {"answer-tag": 1 / 3, "flexible-extract": 1 / 3}, theirs)
    (found,) = summary["differences"]
    assert (found["id"], found["character"], found["same_verdict"]) == (items[1].id, 2, False)
    assert (summary["same_texts"], summary["other_verdicts"]) == (2, [items[2].id])
    # Tokens and characters do not align: find the first token after which the text has more than two characters.
    ids, prompt = list(sampled.completions[1].token_ids), sampled.prompts[1]
    token = min(i for i in range(len(ids)) if len(sampled.tokenizer.decode(ids[: i + 1])) > 2)
    with torch.no_grad():
        logits = sampled.model(input_ids=torch.tensor([[*prompt.token_ids, *ids[:token]]])).logits[0, -1]
    best, second = logits.sort(descending=True).values[:2].tolist()
    assert int(logits.argmax()) == ids[token]
    assert found["logit_gap"] == pytest.approx(best - second, abs=1e-5)
    text = script.format_results({"data": "sums", "few_shot": 0, "model": "tiny", "max_new_tokens": 8, **summary})
    assert text.count("OTHER VERDICTS") == 2 and f"on its own texts: {items[2].id}" in text


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--lm-eval-python"),
        (["--lm-eval-python", "p", "--problems", "0"], "--problems: 0"),
        (["--lm-eval-python", "p", "--data", "sum"], "--data"),
    ],
)
def test_mistakes(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        script.parse_args(arguments)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["no-such-python", "false"])
def test_an_interpreter_without_lm_eval(name: str) -> None:
    command = [sys.executable, str(SCRIPT), "--lm-eval-python", name]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    assert done.returncode == 2
    assert "--lm-eval-python: " in done.stderr and "Traceback" not in done.stderr


def test_gsm8k_examples_are_the_last_problems(tmp_path: Path) -> None:
    file = tmp_path / "test.jsonl"
    records = [{"question": f"Q{i}?", "answer": f"<<{i}={i}>>It is {i}.\n#### {i}"} for i in range(4)]
    file.write_text("".join(json.dumps(record) + "\n" for record in records))
    problems, prompt = script.load_gsm8k(str(file), 2, 2)
    assert [problem.answer for problem in problems] == ["0", "1"]
    assert [(example.user, example.assistant) for example in prompt.few_shot] == [
        ("Q2?", "It is 2.\n#### 2"),
        ("Q3?", "It is 3.\n#### 3"),
    ]
    assert script.load_gsm8k(str(file), 4, 0)[1].few_shot == []
    with pytest.raises(ValueError, match="--problems: 3 .* only 4 problems"):
        script.load_gsm8k(str(file), 3, 2)
