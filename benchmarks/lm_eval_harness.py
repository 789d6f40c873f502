"""lm-eval's side of accuracy_vs_lm_eval.py: its rules for answers, its task file, its run and its output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

NO_ANSWER = "[invalid]"  # the result of lm-eval's regex filter when nothing matches
# exact_match deletes these from both answers, and ignores case.
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """lm-eval's ``regex`` filter, which takes one match of a pattern as the answer.

    Attributes:
        group_select: 0 for the first match, -1 for the last.
    """

    name: str
    pattern: str
    group_select: int


STRICT = Extractor(name="strict-match", pattern=r"#### (\-?[0-9\.\,]+)", group_select=0)
FLEXIBLE = Extractor(name="flexible-extract", pattern=r"(-?[$0-9.,]{2,})|(-?[0-9]+)", group_select=-1)
ANSWER_TAG = Extractor(name="answer-tag", pattern=r"<answer>([^<]*)</answer>", group_select=-1)


@dataclass(frozen=True, kw_only=True)
class Task:
    """lm-eval's task file without the data.

    Attributes:
        until: strings that end a completion; they and everything after them are cut off.
        max_new_tokens: token limit of a completion.
    """

    name: str
    extractors: tuple[Extractor, ...]
    until: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """A record of lm-eval's data set: a prompt as text, and the gold answer."""

    id: str
    prompt: str
    gold: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A response to an item, the answer by each extractor, and whether that is right."""

    text: str
    extracted: dict[str, str]
    correct: dict[str, bool]


# --- rules for answers ------------------------------------------------------------------------------------------------


def extract(text: str, extractor: Extractor) -> str:
    """Extract the answer from a text as ``lm_eval.filters.extraction.RegexFilter`` does.

    Example:
        >>> extract("2 + 2 = 4 apples, $1,800.", FLEXIBLE)
        '$1,800.'
    """
    matches = re.findall(extractor.pattern, text)
    if not matches:
        return NO_ANSWER
    match = matches[extractor.group_select]
    if isinstance(match, tuple):  # the pattern has alternatives: take the one that matched
        match = next(filter(None, match), NO_ANSWER)
    return match.strip()


def is_match(answer: str, gold: str) -> bool:
    """Compare like ``exact_match`` with the options of gsm8k.yaml."""
    return _normalise(answer) == _normalise(gold)


def _normalise(text: str) -> str:
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def cut_at_stop(text: str, until: Iterable[str]) -> str:
    """Cut a text before the first stop string, as lm-eval does; rolltune keeps the stop string."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def verify(text: str, gold: str, task: Task) -> Answer:
    """Verify a text, already cut, by each of the task's extractors."""
    extracted = {extractor.name: extract(text, extractor) for extractor in task.extractors}
    correct = {name: is_match(answer, gold) for name, answer in extracted.items()}
    return Answer(text=text, extracted=extracted, correct=correct)


# --- running lm-eval --------------------------------------------------------------------------------------------------


def lm_eval_version(python: str) -> str:
    """Return the versions of lm-eval, transformers and torch; ValueError if the interpreter cannot import them."""
    code = "import importlib.metadata as m; print(m.version('lm_eval'), m.version('transformers'), m.version('torch'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--lm-eval-python: {python}: cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ValueError(
            f"--lm-eval-python: {python}: lm-eval, transformers and torch are not all installed there; "
            "the top of accuracy_vs_lm_eval.py says how to install them"
        )
    return "lm-eval {}, transformers {}, torch {}".format(*done.stdout.split())


def task_config(task: Task, data: str) -> dict[str, Any]:
    """Make lm-eval's task file for a JSON lines file of :class:`Item`."""
    return {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",  # the name of a column: its text, untouched
        "doc_to_target": "gold",
        "num_fewshot": 0,  # the prompt contains the examples
        "generation_kwargs": {
            "until": list(task.until),
            "do_sample": False,
            "temperature": 0.0,
            "repetition_penalty": 1.0,
            "max_gen_toks": task.max_new_tokens,
        },
        "repeats": 1,
        "filter_list": [
            {
                "name": extractor.name,
                "filter": [
                    {
                        "function": "regex",
                        "regex_pattern": extractor.pattern,
                        "group_select": extractor.group_select,
                    },
                    {"function": "take_first"},
                ],
            }
            for extractor in task.extractors
        ],
        "metric_list": [
            {
                "metric": "exact_match",
                "aggregation": "mean",
                "higher_is_better": True,
                "ignore_case": True,
                "ignore_punctuation": False,
                "regexes_to_ignore": list(IGNORED),
            }
        ],
        "metadata": {"version": 1.0},
    }


def write_task(task: Task, items: Sequence[Item], model: str, folder: Path) -> str:
    """Write lm-eval's task file and data to ``folder``, and link the model there.

    Returns:
        lm-eval's ``--model_args``, without paths, which could contain a comma.
    """
    import yaml

    from rolltune.model.load import adapter_base, resolve_model

    records = "".join(json.dumps(asdict(item)) + "\n" for item in items)
    (folder / "data.jsonl").write_text(records, encoding="utf-8")
    text = yaml.safe_dump(task_config(task, "data.jsonl"), sort_keys=False)
    (folder / f"{task.name}.yaml").write_text(text, encoding="utf-8")

    def link(name: str, source: str) -> str:
        if not Path(source).is_dir():
            return source  # a Hub id
        (folder / name).symlink_to(Path(source).resolve())
        return name

    source = resolve_model(model)
    base = adapter_base(source)
    names = f"pretrained={link('model', source)}"
    if base:
        names = f"pretrained={link('base', resolve_model(base))},peft=model"
        if (Path(source) / "tokenizer_config.json").exists():
            names += ",tokenizer=model"
    return f"{names},dtype=float32,add_bos_token=False"


def run_lm_eval(python: str, task: Task, model_args: str, batch_size: int, folder: Path) -> None:
    """Run ``lm_eval --model hf`` in ``folder``. SystemExit if it fails."""
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", model_args, "--device", "cpu"]
    command += ["--tasks", task.name, "--include_path", ".", "--batch_size", str(batch_size)]
    command += ["--output_path", "results", "--log_samples"]
    print(" ".join(command), file=sys.stderr, flush=True)
    # Offline, because rolltune has loaded the model before. Data sets are cached under a hash of their file.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, stdout=sys.stderr, env=os.environ | offline)
    if done.returncode:
        sys.exit(f"lm-eval failed with status {done.returncode}, see above")


def read_lm_eval(results: Path, task: Task, items: Sequence[Item]) -> tuple[dict[str, float], list[Answer]]:
    """Read the accuracies that lm-eval reports, and the answers that it logged.

    Raises:
        ValueError: files are missing or of several runs, an item is missing, or a prompt is not the given one.
    """
    reports, logs = (list(results.rglob(name)) for name in ("results_*.json", f"samples_{task.name}_*.jsonl"))
    if len(reports) != 1 or len(logs) != 1:
        raise ValueError(
            f"{results}: lm-eval wrote {len(reports)} result files and {len(logs)} sample files; expected one of each"
        )
    scores = json.loads(reports[0].read_text(encoding="utf-8"))["results"][task.name]
    accuracies = {extractor.name: float(scores[f"exact_match,{extractor.name}"]) for extractor in task.extractors}
    logged: dict[tuple[str, str], dict[str, Any]] = {}
    with open(logs[0], encoding="utf-8") as lines:
        for line in lines:
            sample = json.loads(line)
            logged[sample["doc"]["id"], sample["filter"]] = sample
    answers = []
    for item in items:
        samples = {e.name: logged.get((item.id, e.name)) for e in task.extractors}
        found = {name: sample for name, sample in samples.items() if sample is not None}
        if len(found) < len(samples):
            raise ValueError(f"{logs[0]}: lm-eval logged nothing for {item.id}")
        for sample in found.values():
            if sample["arguments"]["gen_args_0"]["arg_0"] != item.prompt:
                raise ValueError(f"{logs[0]}: lm-eval's prompt of {item.id} is not the one it was given")
        answers.append(
            Answer(
                text=next(iter(found.values()))["resps"][0][0],
                extracted={name: sample["filtered_resps"][0] for name, sample in found.items()},
                correct={name: sample["exact_match"] == 1.0 for name, sample in found.items()},
            )
        )
    return accuracies, answers
