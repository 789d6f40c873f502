"""Greedy accuracy of one checkpoint, by rolltune's native sampler and by lm-eval (EleutherAI's lm-evaluation-harness).

lm-eval runs with ``--model hf``. Both get the same prompts and the same rules for right and wrong. lm-eval needs an
environment of its own:

    python -m venv lm-eval-venv
    lm-eval-venv/bin/pip install --constraint constraints/cpu.txt "lm-eval[hf]==0.4.13"

GSM8K, few-shot, from the Hub or a local test.jsonl:

    python benchmarks/accuracy_vs_lm_eval.py --lm-eval-python lm-eval-venv/bin/python --data gsm8k --gsm8k test.jsonl

The quickstart's held-out sums with the model from ``make quickstart``, whose accuracy is far from both 0 and 1:

    python benchmarks/accuracy_vs_lm_eval.py --lm-eval-python lm-eval-venv/bin/python --data sums \\
        --model outputs/quickstart/best

The same for both:

- Checkpoint: one Hugging Face folder (or Hub id), in fp32 on a CPU. For a LoRA checkpoint, an adapter folder, lm-eval
  gets ``peft=``.
- Prompts: rolltune renders them by the model's chat template. lm-eval gets the text unchanged: ``doc_to_text`` names
  its column, and ``--apply_chat_template`` and ``add_bos_token`` are off. The script checks for every prompt that its
  text has the tokens rolltune samples from, and that lm-eval logged this text.
- Decoding: greedy, with the same stop strings and token limit. ``repetition_penalty`` is 1, because ``generate`` obeys
  the one in a model's generation config (Qwen2.5 has one) even when decoding greedily.
- Answers: lm-eval's regex filters and ``exact_match``. The filters of gsm8k, the stop strings and what exact_match
  ignores are from ``lm_eval/tasks/gsm8k/gsm8k.yaml`` (lm-eval 0.4.13, task version 3.0). lm-eval verifies its own texts
  with its own code. A few lines here verify rolltune's texts. They also verify lm-eval's texts and must agree with it.

Unlike ``gsm8k.yaml``, the prompts use a chat template and a system prompt, the worked examples are the last rows of the
test file instead of training rows, and the gold answers have no solution (exact_match strips it anyway).

Both compute in fp32 but multiply matrices of different shapes. Sums are rounded differently, and two tokens with nearly
equal logits can swap: on six 5-shot prompts SmolLM2's logits, of about 30, were up to 8e-5 apart. The script lists each
text that differs, with its first different character and the gap between the two largest logits at the token where
rolltune wrote it. A gap below 1e-3 is rounding; a gap far above it is a bug. The last line of the output is a JSON
object with every number.

Imports are inside functions so that mistakes on the command line show at once.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lm_eval_harness import (
    ANSWER_TAG,
    FLEXIBLE,
    STRICT,
    Answer,
    Item,
    Task,
    cut_at_stop,
    lm_eval_version,
    read_lm_eval,
    run_lm_eval,
    verify,
    write_task,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rolltune.config.schema import PromptConfig
    from rolltune.types import Completion, Problem, Prompt

ROOT = Path(__file__).resolve().parents[1]
PACKAGED = "smollm2-135m-instruct"
GSM8K_SYSTEM = "Reason step by step, then give the final answer, a number alone, on a last line behind ####."
GSM8K_RESPONSE = "{solution}\n#### {answer}"
USER_MISTAKE = 2


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """rolltune's side: problems, their prompts as tokens and as text, and one completion each, in the same order."""

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
    """Results by one extractor: both accuracies, and the number of items with the same answer and the same verdict."""

    extractor: str
    rolltune: float
    lm_eval: float
    same_answer: int
    same_verdict: int


# --- rolltune's side --------------------------------------------------------------------------------------------------


def load_gsm8k(path: str, num_problems: int, few_shot: int) -> tuple[Sequence[Problem], PromptConfig]:
    """Load the first problems of the test split, and a prompt with its last ones as worked examples.

    Raises:
        ValueError: the data cannot be found or has too few problems.
    """
    from rolltune.config.schema import FewShotExample, PromptConfig
    from rolltune.data.gsm8k import gsm8k
    from rolltune.prompts import worked_response

    problems = gsm8k(split="test", path=path)
    if num_problems + few_shot > len(problems):
        raise ValueError(
            f"--problems: {num_problems} and {few_shot} other examples, but {path} has only {len(problems)} problems"
        )
    examples = [
        FewShotExample(user=problem.messages[-1]["content"], assistant=worked_response(problem, GSM8K_RESPONSE))
        for problem in (problems[i] for i in range(len(problems) - few_shot, len(problems)))
    ]
    return problems[:num_problems], PromptConfig(system=GSM8K_SYSTEM, few_shot=examples)


def load_sums(num_problems: int) -> tuple[Sequence[Problem], PromptConfig]:
    """Load the held-out problems and the prompt of configs/quickstart.yaml.

    With its 200 problems and its token limit, the accuracy is the one that the quickstart's summary reports.
    """
    import yaml

    from rolltune.config.components import instantiate
    from rolltune.config.schema import PromptConfig

    config = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text(encoding="utf-8"))
    return instantiate(config["data"]["heldout"] | {"count": num_problems}), PromptConfig(**config["prompt"])


def prompt_text(prompt: Prompt, tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the text of a prompt.

    Raises:
        ValueError: tokenizing the text, as lm-eval will do, gives other tokens.
    """
    text = str(tokenizer.decode(list(prompt.token_ids), skip_special_tokens=False))
    if tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) != prompt.token_ids:
        raise ValueError(f"--model: its tokenizer gives other tokens when a prompt's text is tokenized again: {text!r}")
    return text


def sample_greedily(args: argparse.Namespace) -> Sampled:
    """Load everything, render the prompts, and sample one completion of each.

    Raises:
        ValueError: the model or the data cannot be used, or a completion could be too long for the model.
    """
    import torch

    from rolltune.model.load import load_for_sampling, load_tokenizer
    from rolltune.rewards.answer import gold_answer
    from rolltune.run.build import prompt_renderer
    from rolltune.samplers.native import NativeSampler
    from rolltune.types import SampleRequest, SamplingParams

    tokenizer = load_tokenizer(args.model)
    if args.data == "gsm8k":
        problems, prompt_config = load_gsm8k(args.gsm8k, args.problems, args.few_shot)
        extractors, until, limit = (STRICT, FLEXIBLE), ("Question:", "</s>", "<|im_end|>"), 256
    else:
        problems, prompt_config = load_sums(args.problems)
        extractors, until, limit = (ANSWER_TAG, FLEXIBLE), (), 64
    task = Task(
        name=f"rolltune_{args.data}",
        extractors=extractors,
        # lm-eval adds the EOS itself, but stops at an empty line if a task names no stop string.
        until=tuple(dict.fromkeys((*until, str(tokenizer.eos_token)))),
        max_new_tokens=args.max_new_tokens or limit,
    )
    prompts = list(map(prompt_renderer(prompt_config, tokenizer), problems))
    items = [
        Item(id=problem.id, prompt=prompt_text(prompt, tokenizer), gold=gold_answer(problem))
        for problem, prompt in zip(problems, prompts, strict=True)
    ]
    model = load_for_sampling(args.model, dtype="float32", device=torch.device("cpu"))
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
    """Return the gap between the two largest logits at the token that wrote a character.

    For a position behind the end of the text it is the token that ended the text.
    """
    import torch

    ids = list(completion.token_ids)
    ends = (len(str(tokenizer.decode(ids[: i + 1], skip_special_tokens=True))) for i in range(len(ids)))
    token = next((i for i, end in enumerate(ends) if end > position), len(ids) - 1)
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt.token_ids, *ids[:token]]]), logits_to_keep=1).logits[0, -1]
    first, second = logits.topk(2).values.tolist()
    return first - second


# --- comparison -------------------------------------------------------------------------------------------------------


def first_difference(left: str, right: str) -> int | None:
    """Return the first position where two texts differ, which may be the end of one; None if they are equal."""
    if left == right:
        return None
    return next((i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))


def compare(
    task: Task, ours: Sequence[Answer], theirs: Sequence[Answer], accuracies: dict[str, float]
) -> list[Agreement]:
    """Compare the answers item by item, for each extractor.

    Args:
        task: names the extractors.
        ours: rolltune's answers.
        theirs: lm-eval's answers to the same items.
        accuracies: accuracies that lm-eval reports, by extractor.
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


def summarise(sampled: Sampled, accuracies: dict[str, float], theirs: Sequence[Answer]) -> dict[str, Any]:
    """Compare rolltune's completions with lm-eval's answers.

    Args:
        sampled: rolltune's side.
        accuracies: accuracies that lm-eval reports, by extractor.
        theirs: lm-eval's answers.

    Returns:
        ``accuracy``: one :class:`Agreement` per extractor; ``answer_reward``: rolltune's own measure, None if the
        prompt does not ask for an <answer> block; ``other_verdicts``: items whose lm-eval text gets another answer or
        verdict here than by lm-eval (if there are any, the extractors here are wrong); ``same_texts`` and
        ``differences``: comparison of the texts.
    """
    from rolltune.rewards.answer import answer_reward

    task, items, completions = sampled.task, sampled.items, sampled.completions
    ours = [
        verify(cut_at_stop(completion.text.removeprefix(prompt.prefill), task.until), item.gold, task)
        for item, prompt, completion in zip(items, sampled.prompts, completions, strict=True)
    ]
    differences = []
    for item, prompt, completion, mine, other in zip(items, sampled.prompts, completions, ours, theirs, strict=True):
        position = first_difference(mine.text, other.text)
        if position is not None:
            around = slice(max(0, position - 24), position + 24)
            differences.append(
                {
                    "id": item.id,
                    "character": position,
                    "logit_gap": logit_gap(sampled.model, sampled.tokenizer, prompt, completion, position),
                    "same_verdict": mine.correct == other.correct,
                    "rolltune": mine.text[around],
                    "lm_eval": other.text[around],
                }
            )
    rewards = [answer_reward(p, c.text).total for p, c in zip(sampled.problems, completions, strict=True)]
    return {
        "problems": len(items),
        "cut": sum(completion.finish_reason == "length" for completion in completions),
        "accuracy": [asdict(agreement) for agreement in compare(task, ours, theirs, accuracies)],
        "answer_reward": rewards.count(1.0) / len(items) if ANSWER_TAG in task.extractors else None,
        "other_verdicts": [
            item.id for item, other in zip(items, theirs, strict=True) if verify(other.text, item.gold, task) != other
        ],
        "same_texts": len(items) - len(differences),
        "differences": differences,
    }


def table(agreements: Sequence[Agreement], same_texts: int, total: int) -> str:
    lines = [f"{'extractor':<18} {'rolltune':>9} {'lm-eval':>9} {'same answer':>13} {'same verdict':>13}"]
    for agreement in agreements:
        same_answer, same_verdict = f"{agreement.same_answer}/{total}", f"{agreement.same_verdict}/{total}"
        lines.append(
            f"{agreement.extractor:<18} {agreement.rolltune:>9.4f} {agreement.lm_eval:>9.4f} {same_answer:>13} "
            f"{same_verdict:>13}"
        )
    lines.append(f"the same text: {same_texts}/{total}")
    return "\n".join(lines)


def format_results(results: dict[str, Any]) -> str:
    """Format the results in a few lines, with the texts that differ."""
    total = results["problems"]
    lines = [
        f"{results['data']}: {total} problems, {results['few_shot']} examples each; {results['model']} in fp32 on a "
        f"CPU, greedy; at most {results['max_new_tokens']} tokens, which cut {results['cut']} of rolltune's texts",
        table([Agreement(**agreement) for agreement in results["accuracy"]], results["same_texts"], total),
    ]
    if results["answer_reward"] is not None:
        lines.append(f"rolltune's own answer_reward on its texts: {results['answer_reward']:.4f}")
    if results["other_verdicts"]:
        lines.append(f"OTHER VERDICTS here than by lm-eval on its own texts: {', '.join(results['other_verdicts'])}")
    for difference in results["differences"]:
        lines.append(
            f"{difference['id']}: differs from character {difference['character']} on, "
            f"logit gap {difference['logit_gap']:.2g}, "
            f"{'the same verdicts' if difference['same_verdict'] else 'OTHER VERDICTS'}\n"
            f"    rolltune {difference['rolltune']!r}\n    lm-eval  {difference['lm_eval']!r}"
        )
    return "\n".join(lines)


# --- command line -----------------------------------------------------------------------------------------------------


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line. A mistake ends the process with status 2."""
    parser = argparse.ArgumentParser(
        description="Greedy accuracy of one checkpoint by rolltune and by lm-eval, on the same prompts.",
        epilog="The top of this file says how to install lm-eval and what is the same for both.",
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
    for name, default, minimum, text in (
        ("--problems", 200, 1, "number of problems"),
        ("--few-shot", 5, 0, "gsm8k: worked examples in each prompt"),
        ("--max-new-tokens", None, 1, "token limit of a completion (default: 256 for gsm8k, 64 for sums)"),
        ("--batch-size", 8, 1, "batch size of lm-eval"),
    ):
        shown = "" if default is None else f" (default: {default})"
        parser.add_argument(name, type=_at_least(minimum), default=default, metavar="N", help=f"{text}{shown}")
    parser.add_argument("--keep", metavar="FOLDER", help="new folder for lm-eval's task, data and logs (default: none)")
    return parser.parse_args(argv)


def _at_least(minimum: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text)
        if value < minimum:
            raise argparse.ArgumentTypeError(f"{value}; must be {minimum} or more")
        return value

    return number


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_args(argv)
    # Not resolve(): a venv's interpreter is a link and finds the venv only under its own name.
    python = str(Path(shutil.which(args.lm_eval_python) or args.lm_eval_python).absolute())
    with tempfile.TemporaryDirectory() as temporary:
        try:
            versions = lm_eval_version(python)
            if args.keep and Path(args.keep).exists():
                raise ValueError(f"--keep: {args.keep}: already exists; give a new folder")
            sampled = sample_greedily(args)
        except ValueError as error:
            print(error, file=sys.stderr)
            sys.exit(USER_MISTAKE)
        folder = Path(args.keep or temporary).absolute()
        folder.mkdir(parents=True, exist_ok=True)
        model_args = write_task(sampled.task, sampled.items, args.model, folder)
        run_lm_eval(python, sampled.task, model_args, args.batch_size, folder)
        accuracies, theirs = read_lm_eval(folder / "results", sampled.task, sampled.items)
    results = {
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
    print(format_results(results))
    print(json.dumps(results))


if __name__ == "__main__":
    main()
