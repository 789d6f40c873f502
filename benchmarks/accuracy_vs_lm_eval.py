"""Greedy accuracy of one checkpoint twice: by rolltune's native sampler, and by lm-eval (EleutherAI's
lm-evaluation-harness) with ``--model hf``, on the same prompts and with the same rules for right and wrong.

lm-eval lives in an environment of its own:

    python -m venv lm-eval-venv
    lm-eval-venv/bin/pip install --constraint constraints/cpu.txt "lm-eval[hf]==0.4.13"

GSM8K, few-shot, from the Hub or a local test.jsonl:

    python benchmarks/accuracy_vs_lm_eval.py --lm-eval-python lm-eval-venv/bin/python --data gsm8k --gsm8k test.jsonl

The quickstart's held-out sums with the model that ``make quickstart`` wrote, whose accuracy is far from 0 and from 1:

    python benchmarks/accuracy_vs_lm_eval.py --lm-eval-python lm-eval-venv/bin/python --data sums \\
        --model outputs/quickstart/best

The same for both:

- The checkpoint: one Hugging Face folder (or Hub id), in fp32 on a CPU. A LoRA checkpoint is an adapter folder, which
  lm-eval takes by ``peft=``.
- The prompts: rolltune renders them by the model's chat template, and lm-eval is given the text as it is
  (``doc_to_text`` names its column; ``--apply_chat_template`` and ``add_bos_token`` are off). That the text has the
  tokens that rolltune samples from, and that lm-eval logged this very text, is checked for every prompt.
- Greedy decoding with the same stop strings and the same limit of tokens. ``repetition_penalty`` is 1: some models
  (Qwen2.5) name another one in their generation config, which ``generate`` obeys even where it is greedy.
- The answers: lm-eval's regex filters and ``exact_match``. Those of gsm8k, the stop strings and what exact_match
  ignores are those of ``lm_eval/tasks/gsm8k/gsm8k.yaml`` (lm-eval 0.4.13, task version 3.0). lm-eval applies its own
  code to its texts; rolltune's texts are judged by a few lines here, which are run on lm-eval's texts too and have
  to come to the same answers.

What is not that of ``gsm8k.yaml``: the chat template and the system prompt, worked examples that are the last rows of
the file instead of training rows, and gold answers without their solution (which exact_match strips anyway).

Both compute in fp32, but multiply matrices of different shapes, so sums are rounded differently and two tokens of
nearly the same logit can change places: on six 5-shot prompts SmolLM2's logits, of about 30, came out up to 8e-5 apart.
Every text that differs is listed with the first character that does, and the gap between the two largest logits where
rolltune wrote it: below 1e-3 that is rounding, far above a bug. The last line of the output is a JSON object with every
number.

Imports are inside the functions: mistakes on the command line show at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rolltune.config.schema import PromptConfig
    from rolltune.types import Completion, Problem, Prompt

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = "smollm2-135m-instruct"
GSM8K_SYSTEM = "Reason step by step, then give the final answer, a number alone, on a last line behind ####."
GSM8K_TURN = "{solution}\n#### {answer}"
NO_ANSWER = "[invalid]"  # what lm-eval's regex filter gives where nothing matches
# exact_match deletes these from the answer and from the gold one, and ignores case.
IGNORED = (",", r"\$", r"(?s).*#### ", r"\.$")
USER_MISTAKE = 2


@dataclass(frozen=True, kw_only=True)
class Extractor:
    """lm-eval's ``regex`` filter: which match of a pattern is the answer.

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
    """What lm-eval's task file says beside the data.

    Attributes:
        until: strings that end a completion, and are cut off with all that follows.
        max_new_tokens: a completion.
    """

    name: str
    extractors: tuple[Extractor, ...]
    until: tuple[str, ...]
    max_new_tokens: int


@dataclass(frozen=True, kw_only=True)
class Item:
    """One prompt as text, and the gold answer; a row of lm-eval's data set."""

    id: str
    prompt: str
    gold: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What was written to an item, what each extractor takes from it, and whether that is right."""

    text: str
    extracted: dict[str, str]
    correct: dict[str, bool]


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """rolltune's side: problems, their prompts as tokens and as text, and one completion of each, in the same order."""

    task: Task
    few_shot: int
    model: Any
    tokenizer: PreTrainedTokenizerBase
    problems: Sequence[Problem]
    prompts: Sequence[Prompt]
    items: Sequence[Item]
    completions: Sequence[Completion]


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """One extractor: both accuracies, and on how many of the items the two answers and verdicts are the same."""

    extractor: str
    rolltune: float
    lm_eval: float
    same_answer: int
    same_verdict: int


# --- lm-eval's rules --------------------------------------------------------------------------------------------------


def extract(text: str, extractor: Extractor) -> str:
    """The answer in a text, as ``lm_eval.filters.extraction.RegexFilter`` finds it.

    Example:
        >>> extract("2 + 2 = 4 apples, $1,800.", FLEXIBLE)
        '$1,800.'
    """
    matches = re.findall(extractor.pattern, text)
    if not matches:
        return NO_ANSWER
    match = matches[extractor.group_select]
    if isinstance(match, tuple):  # of a pattern with alternatives: the one that matched
        match = next(filter(None, match), NO_ANSWER)
    return match.strip()


def is_match(answer: str, gold: str) -> bool:
    """``exact_match`` with the options of gsm8k.yaml."""
    return _normalise(answer) == _normalise(gold)


def _normalise(text: str) -> str:
    for pattern in IGNORED:
        text = re.sub(pattern, "", text)
    return text.lower()


def cut_at_stop(text: str, until: Iterable[str]) -> str:
    """The text in front of the first stop string. rolltune keeps it, lm-eval does not."""
    for stop in until:
        text = text.split(stop)[0]
    return text


def judge(text: str, gold: str, task: Task) -> Answer:
    """Apply the task's extractors to a text that is already cut."""
    extracted = {extractor.name: extract(text, extractor) for extractor in task.extractors}
    correct = {name: is_match(answer, gold) for name, answer in extracted.items()}
    return Answer(text=text, extracted=extracted, correct=correct)


def task_config(task: Task, data: str) -> dict[str, Any]:
    """lm-eval's task file, over a JSON lines file of :class:`Item`."""
    return {
        "task": task.name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": data}},
        "test_split": "test",
        "output_type": "generate_until",
        "doc_to_text": "prompt",  # the name of a column: its text, untouched
        "doc_to_target": "gold",
        "num_fewshot": 0,  # the prompt has them
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


# --- rolltune's side --------------------------------------------------------------------------------------------------


def load_gsm8k(path: str, num_problems: int, few_shot: int) -> tuple[Sequence[Problem], PromptConfig]:
    """The first rows of the test split; the last ones are worked examples in front of each.

    Raises:
        ValueError: the data cannot be found, or has too few rows.
    """
    from rolltune.config.schema import FewShotExample, PromptConfig
    from rolltune.data.gsm8k import gsm8k
    from rolltune.prompts import worked_response

    rows = gsm8k(split="test", path=path)
    if num_problems + few_shot > len(rows):
        raise ValueError(
            f"--problems: {num_problems} and {few_shot} examples; {path} has {len(rows)} rows, and an example is "
            "never asked"
        )
    examples = [rows[i] for i in range(len(rows) - few_shot, len(rows))]
    turns = [
        FewShotExample(user=example.messages[-1]["content"], assistant=worked_response(example, GSM8K_TURN))
        for example in examples
    ]
    return rows[:num_problems], PromptConfig(system=GSM8K_SYSTEM, few_shot=turns)


def load_sums(num_problems: int) -> tuple[Sequence[Problem], PromptConfig]:
    """The held-out problems and the prompt of configs/quickstart.yaml: with its 200 problems, and as many tokens, the
    accuracy is the one that the quickstart's summary reports."""
    import yaml

    from rolltune.config.components import instantiate
    from rolltune.config.schema import PromptConfig

    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    return instantiate(config["data"]["heldout"] | {"count": num_problems}), PromptConfig(**config["prompt"])


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """The text that has exactly the prompt's tokens.

    Raises:
        ValueError: it has others when it is tokenized again, as lm-eval will do.
    """
    text = str(tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False))
    if tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) != prompt.token_ids:
        raise ValueError(f"--model: its tokenizer does not give the tokens of a prompt back from their text {text!r}")
    return text


def load_checkpoint(path: str) -> Any:
    """The model in fp32, an adapter on top of its base."""
    from peft import PeftModel

    from rolltune.model.load import adapter_base, load_model, resolve_model

    source = resolve_model(path)
    base = adapter_base(source)
    model = load_model(base or source, dtype="float32", device="cpu")
    return (PeftModel.from_pretrained(model, source) if base else model).eval()


def sample_greedily(args: argparse.Namespace) -> Sampled:
    """Load everything, render the prompts, and write one completion of each.

    Raises:
        ValueError: the model or the data cannot be used, or a completion could be too long for the model.
    """
    from rolltune.model.load import load_tokenizer
    from rolltune.rewards.answer import gold_answer
    from rolltune.run.build import prompt_renderer
    from rolltune.samplers.native import NativeSampler
    from rolltune.types import SampleRequest, SamplingParams

    tokenizer = load_tokenizer(args.model)
    if args.data == "gsm8k":
        problems, prompt_config = load_gsm8k(args.gsm8k, args.problems, args.few_shot)
        extractors, until, most = (STRICT, FLEXIBLE), ("Question:", "</s>", "<|im_end|>"), 256
    else:
        problems, prompt_config = load_sums(args.problems)
        extractors, until, most = (ANSWER_TAG, FLEXIBLE), (), 64
    task = Task(
        name=f"rolltune_{args.data}",
        extractors=extractors,
        # lm-eval adds the EOS itself, but where a task names nothing it takes an empty line.
        until=tuple(dict.fromkeys((*until, str(tokenizer.eos_token)))),
        max_new_tokens=args.max_new_tokens or most,
    )
    prompts = list(map(prompt_renderer(prompt_config, tokenizer), problems))
    items = [
        Item(id=problem.id, prompt=prompt_text(prompt, tokenizer), gold=gold_answer(problem))
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    model = load_checkpoint(args.model)
    groups = NativeSampler(model, tokenizer, max_num_seqs=32).generate(
        [SampleRequest(prompt=prompt, seeds=(0,)) for prompt in prompts],
        SamplingParams(temperature=0.0, max_new_tokens=task.max_new_tokens, stop=task.until),
        on_progress=lambda done, total: print(f"rolltune: {done} of {total} completions", file=sys.stderr, flush=True),
    )
    return Sampled(
        task=task,
        few_shot=len(prompt_config.few_shot),
        model=model,
        tokenizer=tokenizer,
        problems=problems,
        prompts=prompts,
        items=items,
        completions=[completion for (completion,) in groups],
    )


def logit_gap(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompt: Prompt, completion: Completion, position: int
) -> float:
    """The two largest logits' difference where the token was written that holds a character, or that ended the text."""
    import torch

    ids = list(completion.token_ids)
    ends = (len(str(tokenizer.decode(ids[: i + 1], skip_special_tokens=True))) for i in range(len(ids)))
    token = next((i for i, end in enumerate(ends) if end > position), len(ids) - 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt.token_ids, *ids[:token]]]), logits_to_keep=1).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return first - second


# --- lm-eval's side ---------------------------------------------------------------------------------------------------


def lm_eval_version(python: str) -> str:
    """What the interpreter has installed. ValueError if it cannot be run or has no lm-eval."""
    code = "import importlib.metadata as m; print(m.version('lm_eval'), m.version('transformers'), m.version('torch'))"
    try:
        done = subprocess.run([python, "-c", code], capture_output=True, text=True)
    except OSError as error:
        raise ValueError(f"--lm-eval-python: {python}: cannot be run: {error.strerror}") from None
    if done.returncode:
        raise ValueError(
            f"--lm-eval-python: {python}: has no lm-eval, or no torch and transformers beside it; "
            "how to install it stands at the top of this file"
        )
    return "lm-eval {}, transformers {}, torch {}".format(*done.stdout.split())


def write_task(task: Task, items: Sequence[Item], model: str, folder: Path) -> str:
    """Write what lm-eval reads into ``folder``, and link the model there.

    Returns:
        lm-eval's ``--model_args``, free of paths that could hold a comma.
    """
    import yaml

    from rolltune.model.load import adapter_base, resolve_model

    rows = "".join(json.dumps(asdict(item)) + "\n" for item in items)
    (folder / "data.jsonl").write_text(rows, encoding="utf-8")
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
    """``lm_eval --model hf`` in ``folder``. SystemExit if it fails."""
    command = [python, "-m", "lm_eval", "--model", "hf", "--model_args", model_args, "--device", "cpu"]
    command += ["--tasks", task.name, "--include_path", ".", "--batch_size", str(batch_size)]
    command += ["--output_path", "results", "--log_samples"]
    print(" ".join(command), file=sys.stderr, flush=True)
    # The model has been loaded before, so everything is here; data sets are cached under a hash of their file.
    offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "cache")}
    done = subprocess.run(command, cwd=folder, stdout=sys.stderr, env=os.environ | offline)
    if done.returncode:
        sys.exit(f"lm-eval failed with status {done.returncode}, see above")


def read_lm_eval(results: Path, task: Task, items: Sequence[Item]) -> tuple[dict[str, float], list[Answer]]:
    """The accuracies that lm-eval reports, and what it logged of each item.

    Raises:
        ValueError: files are missing or more than one run's, an item is missing, or a prompt was not the one given.
    """
    reports, logs = (list(results.rglob(name)) for name in ("results_*.json", f"samples_{task.name}_*.jsonl"))
    if len(reports) != 1 or len(logs) != 1:
        raise ValueError(
            f"{results}: lm-eval left {len(reports)} reports and {len(logs)} sample files, not one of each"
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
                raise ValueError(f"{logs[0]}: lm-eval's prompt of {item.id} is not the one that it was given")
        answers.append(
            Answer(
                text=next(iter(found.values()))["resps"][0][0],
                extracted={name: sample["filtered_resps"][0] for name, sample in found.items()},
                correct={name: sample["exact_match"] == 1.0 for name, sample in found.items()},
            )
        )
    return accuracies, answers


# --- the two together -------------------------------------------------------------------------------------------------


def first_difference(left: str, right: str) -> int | None:
    """The first character in which two texts differ, which may be behind the end of one; None if they are the same."""
    if left == right:
        return None
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def compare(
    task: Task, ours: Sequence[Answer], theirs: Sequence[Answer], accuracies: dict[str, float]
) -> list[Agreement]:
    """Item by item, for each extractor.

    Args:
        accuracies: lm-eval's own, by extractor.
    """
    pairs = list(zip(ours, theirs, strict=True))
    return [
        Agreement(
            extractor=name,
            rolltune=sum(a.correct[name] for a in ours) / len(ours),
            lm_eval=accuracies[name],
            same_answer=sum(a.extracted[name] == b.extracted[name] for a, b in pairs),
            same_verdict=sum(a.correct[name] == b.correct[name] for a, b in pairs),
        )
        for name in (extractor.name for extractor in task.extractors)
    ]


def table(agreements: Sequence[Agreement], same_texts: int, total: int) -> str:
    lines = [f"{'extractor':<18} {'rolltune':>9} {'lm-eval':>9} {'same answer':>13} {'same verdict':>13}"]
    for row in agreements:
        lines.append(
            f"{row.extractor:<18} {row.rolltune:>9.4f} {row.lm_eval:>9.4f} {f'{row.same_answer}/{total}':>13} "
            f"{f'{row.same_verdict}/{total}':>13}"
        )
    lines.append(f"the same text: {same_texts}/{total}")
    return "\n".join(lines)


def difference(item: Item, ours: Answer, theirs: Answer, position: int, gap: float) -> dict[str, Any]:
    """One text that differs: where, by how much, and what stands there."""
    around = slice(max(0, position - 24), position + 24)
    return {
        "id": item.id,
        "character": position,
        "logit_gap": gap,
        "same_verdict": ours.correct == theirs.correct,
        "rolltune": ours.text[around],
        "lm_eval": theirs.text[around],
    }


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """A mistake ends the process with status 2."""
    parser = argparse.ArgumentParser(
        description="Greedy accuracy of one checkpoint by rolltune and by lm-eval, on the same prompts.",
        epilog="How to install lm-eval, and what is the same for both: see the top of this file.",
    )
    parser.add_argument(
        "--lm-eval-python", required=True, metavar="PYTHON", help="interpreter of an environment with lm-eval"
    )
    parser.add_argument("--model", default=PACKAGED, help="a folder, a Hub id or %(default)s (the default)")
    parser.add_argument("--data", choices=("gsm8k", "sums"), default="gsm8k", help="(default: %(default)s)")
    parser.add_argument(
        "--gsm8k",
        default="openai/gsm8k",
        metavar="PATH",
        help="gsm8k: a test.jsonl, a folder with one or a Hub id (default: %(default)s)",
    )
    for name, default, least, what in (
        ("--problems", 200, 1, "problems asked"),
        ("--few-shot", 5, 0, "gsm8k: worked examples in each prompt"),
        ("--max-new-tokens", None, 1, "tokens a completion (default: 256 for gsm8k, 64 for sums)"),
        ("--batch-size", 8, 1, "lm-eval's batch"),
    ):
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(name, type=_at_least(least), default=default, metavar="N", help=f"{what}{shown}")
    parser.add_argument("--keep", metavar="FOLDER", help="new folder for lm-eval's task, data and logs (default: none)")
    return parser.parse_args(argv)


def _at_least(least: int):
    def number(text: str) -> int:
        value = int(text)
        if value < least:
            raise argparse.ArgumentTypeError(f"{value}; must be {least} or more")
        return value

    return number


def summarise(sampled: Sampled, accuracies: dict[str, float], theirs: Sequence[Answer]) -> dict[str, Any]:
    """Everything that there is to say of the two.

    Args:
        sampled: rolltune's side.
        accuracies: lm-eval's own, by extractor.
        theirs: lm-eval's answers.

    Returns:
        ``accuracy``: one :class:`Agreement` an extractor; ``answer_reward``: rolltune's own measure, None where the
        prompt asks for no <answer> block; ``other_judgement``: items whose lm-eval text is judged here otherwise than
        by lm-eval (none, or the extractors here are wrong); ``same_texts`` and ``differences``: of the texts.
    """
    from rolltune.rewards.answer import answer_reward

    task, items, completions = sampled.task, sampled.items, sampled.completions
    ours = [
        judge(cut_at_stop(completion.text.removeprefix(prompt.prefill), task.until), item.gold, task)
        for item, prompt, completion in zip(items, sampled.prompts, completions, strict=True)
    ]
    differences = []
    for item, prompt, completion, mine, other in zip(items, sampled.prompts, completions, ours, theirs, strict=True):
        position = first_difference(mine.text, other.text)
        if position is not None:
            gap = logit_gap(sampled.model, sampled.tokenizer, prompt, completion, position)
            differences.append(difference(item, mine, other, position, gap))
    rewards = [answer_reward(p, c.text).total for p, c in zip(sampled.problems, completions, strict=True)]
    return {
        "problems": len(items),
        "cut": sum(completion.finish_reason == "length" for completion in completions),
        "accuracy": [asdict(row) for row in compare(task, ours, theirs, accuracies)],
        "answer_reward": rewards.count(1.0) / len(items) if ANSWER_TAG in task.extractors else None,
        "other_judgement": [
            item.id for item, other in zip(items, theirs, strict=True) if judge(other.text, item.gold, task) != other
        ],
        "same_texts": len(items) - len(differences),
        "differences": differences,
    }


def verdict(report: dict[str, Any]) -> str:
    """The report in a few lines, and the texts that differ."""
    total = report["problems"]
    lines = [
        f"{report['data']}: {total} problems, {report['few_shot']} examples each; {report['model']} in fp32 on a CPU, "
        f"greedily; at most {report['max_new_tokens']} tokens, which cut {report['cut']} of rolltune's texts",
        table([Agreement(**row) for row in report["accuracy"]], report["same_texts"], total),
    ]
    if report["answer_reward"] is not None:
        lines.append(f"rolltune's own answer_reward on its texts: {report['answer_reward']:.4f}")
    if report["other_judgement"]:
        lines.append(f"NOT judged here as by lm-eval: its texts of {', '.join(report['other_judgement'])}")
    for row in report["differences"]:
        lines.append(
            f"{row['id']}: differs from character {row['character']} on, logit gap {row['logit_gap']:.2g}, "
            f"{'the same verdicts' if row['same_verdict'] else 'OTHER VERDICTS'}\n"
            f"    rolltune {row['rolltune']!r}\n    lm-eval  {row['lm_eval']!r}"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # Not resolve(): a venv's interpreter is a link, and is the venv's only under its own name.
    python = str(Path(shutil.which(args.lm_eval_python) or args.lm_eval_python).absolute())
    with tempfile.TemporaryDirectory() as temporary:
        try:
            versions = lm_eval_version(python)
            if args.keep and Path(args.keep).exists():
                raise ValueError(f"--keep: {args.keep}: is there already; give a new folder")
            sampled = sample_greedily(args)
        except ValueError as error:
            print(error, file=sys.stderr)
            sys.exit(USER_MISTAKE)
        folder = Path(args.keep or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        model_args = write_task(sampled.task, sampled.items, args.model, folder)
        run_lm_eval(python, sampled.task, model_args, args.batch_size, folder)
        accuracies, theirs = read_lm_eval(folder / "results", sampled.task, sampled.items)
    report = {
        "model": args.model,
        "data": args.data,
        "few_shot": sampled.few_shot,
        "max_new_tokens": sampled.task.max_new_tokens,
        "versions": {
            "rolltune": ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("transformers", "torch")),
            "lm_eval": versions,
        },
        **summarise(sampled, accuracies, theirs),
    }
    print(verdict(report))
    print(json.dumps(report))


if __name__ == "__main__":
    main()
