"""False negatives and false positives of answer checkers on the packaged labelled answers.

    pip install -e ".[dev]"       # math-verify and TRL
    python -m venv lm-eval-venv
    lm-eval-venv/bin/pip install "lm-eval==0.4.13"
    python benchmarks/answer_checkers.py --lm-eval-python lm-eval-venv/bin/python

Without ``--lm-eval-python`` lm-eval's two columns are left out. Every checker scores the same answers
(:func:`rolltune.data.answers_labelled.answers_labelled`), with the same labels:

- rolltune: ``answer_reward`` with its defaults, on ``<think>working</think> <answer>answer</answer>``;
- math-verify: ``verify(parse(f"${gold}$"), parse(response))`` with its defaults;
- TRL: ``accuracy_reward``; a response that it leaves unscored counts as one that it refuses;
- lm-eval: the filters ``strict-match`` and ``flexible-extract`` of its task gsm8k, and its ``exact_match``.

The peers are not asked for tags. Each is measured on four layouts of the final answer, and shown with the one where it
makes the fewest mistakes: in a ``\\boxed{}`` (unless the answer has markup of its own), in a sentence, after ``####``,
and by itself without working. The last line of the output is a JSON object with every number.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
from collections import Counter
from collections.abc import Callable, Mapping, Sequence

from rolltune.data.answers_labelled import answers_labelled
from rolltune.rewards.answer import answer_reward
from rolltune.rewards.checks.reward_audit import LabelledAnswer

Verdicts = list[bool]
Checker = Callable[[Sequence[str], Sequence[str]], Verdicts]  # of gold answers and responses
ROLLTUNE_LAYOUT = "<think>{solution}</think>\n<answer>{answer}</answer>"
LAYOUTS = {
    "box": r"{solution}" + "\n\n" + r"\boxed{{answer}}",
    "sentence": "{solution}\n\nThe final answer is {answer}",
    "####": "{solution}\n#### {answer}",
    "answer only": "{answer}",
}
LM_EVAL = """
import json, sys, yaml
from importlib.resources import files
from lm_eval.api.metrics import exact_match_fn
from lm_eval.filters.extraction import RegexFilter
task = yaml.safe_load((files("lm_eval") / "tasks/gsm8k/gsm8k.yaml").read_text())
options = {k: v for k, v in task["metric_list"][0].items() if k.startswith(("ignore", "regexes"))}
golds, responses = json.load(sys.stdin)
found = {}
for filters in task["filter_list"]:
    options_of_filter = {k: v for k, v in filters["filter"][0].items() if k != "function"}
    extracted = RegexFilter(**options_of_filter).apply([[r] for r in responses], [{} for _ in responses])
    pairs = zip(extracted, golds)
    found[filters["name"]] = [bool(exact_match_fn(predictions=e, references=[g], **options)["exact_match"]) for e, g in pairs]
print(json.dumps(found))
"""  # noqa: E501


def response(answer: LabelledAnswer, layout: str) -> str:
    """Write a labelled answer in one of the layouts."""
    has_markup = answer.answer is not None and any(mark in answer.answer for mark in ("$", r"\(", r"\[", r"\boxed"))
    return answer.response(LAYOUTS["sentence" if layout == "box" and has_markup else layout])


def by_rolltune(answers: Sequence[LabelledAnswer]) -> Verdicts:
    return [answer_reward(answer.problem, answer.response(ROLLTUNE_LAYOUT)).total == 1.0 for answer in answers]


def by_math_verify(golds: Sequence[str], responses: Sequence[str]) -> Verdicts:
    from math_verify import parse, verify

    return [verify(parse(f"${gold}$"), parse(text)) for gold, text in zip(golds, responses, strict=True)]


def by_trl(golds: Sequence[str], responses: Sequence[str]) -> Verdicts:
    from trl.rewards.accuracy_rewards import accuracy_reward

    turns = [[{"role": "assistant", "content": text}] for text in responses]
    return [reward == 1.0 for reward in accuracy_reward(turns, [f"${gold}$" for gold in golds])]


def by_lm_eval(python: str, name: str) -> Checker:
    def check(golds: Sequence[str], responses: Sequence[str]) -> Verdicts:
        asked = json.dumps([list(golds), list(responses)])
        done = subprocess.run([python, "-c", LM_EVAL], input=asked, capture_output=True, text=True, check=True)
        return json.loads(done.stdout.splitlines()[-1])[name]

    return check


def mistakes(answers: Sequence[LabelledAnswer], verdicts: Verdicts) -> Counter[str]:
    """Count false negatives and false positives, in all (``fn``, ``fp``) and by source (``gsm8k/fn``)."""
    found: Counter[str] = Counter(fn=0, fp=0)
    for answer, is_accepted in zip(answers, verdicts, strict=True):
        if is_accepted != answer.right:
            kind = "fn" if answer.right else "fp"
            found.update([kind, f"{source(answer)}/{kind}"])
    return found


def source(answer: LabelledAnswer) -> str:
    return answer.problem.id.partition("/")[0]


def measure(answers: Sequence[LabelledAnswer], peers: Mapping[str, Checker]) -> dict[str, tuple[str, Counter[str]]]:
    """Return each checker's layout and mistakes."""
    golds = [answer.problem.answer or "" for answer in answers]
    found = {"rolltune": ("tags", mistakes(answers, by_rolltune(answers)))}
    for name, check in peers.items():
        tried = {
            layout: mistakes(answers, check(golds, [response(answer, layout) for answer in answers]))
            for layout in LAYOUTS
        }
        best = min(tried, key=lambda layout: tried[layout]["fn"] + tried[layout]["fp"])
        found[name] = best, tried[best]
    return found


def table(answers: Sequence[LabelledAnswer], found: Mapping[str, tuple[str, Counter[str]]]) -> str:
    """Render the mistakes as a Markdown table: false negatives / false positives."""
    sources = list(dict.fromkeys(map(source, answers)))
    counts = Counter((source(answer), answer.right) for answer in answers)
    right = sum(answer.right for answer in answers)
    heads = [f"{name} ({counts[name, True]} / {counts[name, False]})" for name in sources]
    lines = [
        f"| checker | layout | all ({right} / {len(answers) - right}) | {' | '.join(heads)} |",
        "|---|---|" + "---|" * (1 + len(sources)),
    ]
    for name, (layout, of) in found.items():
        cells = [f"{of[f'{key}/fn']} / {of[f'{key}/fp']}" for key in sources]
        lines.append(f"| {name} | {layout} | {of['fn']} / {of['fp']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lm-eval-python", help="Python of an environment with lm-eval")
    args = parser.parse_args()
    versions = {name: importlib.metadata.version(name) for name in ("math-verify", "trl")}
    peers: dict[str, Checker] = {
        f"math-verify {versions['math-verify']}": by_math_verify,
        f"TRL {versions['trl']}": by_trl,
    }
    if args.lm_eval_python:
        for name in ("strict-match", "flexible-extract"):
            peers[f"lm-eval gsm8k {name}"] = by_lm_eval(args.lm_eval_python, name)
    answers = answers_labelled()
    found = measure(answers, peers)
    print(table(answers, found))
    print(json.dumps({name: {"layout": layout, **of} for name, (layout, of) in found.items()}))


if __name__ == "__main__":
    main()
