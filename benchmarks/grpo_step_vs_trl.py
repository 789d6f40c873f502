"""Time and peak memory of one GRPO step, rolltune against TRL's ``GRPOTrainer``, on a CPU under the same conditions.

    python benchmarks/grpo_step_vs_trl.py --data train.jsonl

The trainers alternate (rolltune, TRL, rolltune, TRL, ...). Each run is a process of its own (grpo_step_child.py), so
each has its own peak resident set. One step warms up, then ``--steps`` are timed. The last line of the output is a JSON
object with every number.

The same for both:

- SmolLM2-135M-Instruct in fp32, with the number of threads that the environment gives; the same GSM8K questions in the
  same order, 4 per step, rendered by the chat template; 8 completions of each at temperature 1, without top-p or top-k.
- Every completion has 128 tokens, because both load a copy of the model folder whose EOS is a token that the model does
  not write. So both sample and train on the same number of tokens, which the table shows, and neither gains from
  completions that end early. (rolltune would: it drops them from the batch at once.)
- One optimizer step on the 32 completions: rolltune's answer and format rewards, z-scored advantages, clip 0.2, the
  mean over each completion and then over completions, k3 KL to a frozen copy with coefficient 0.04 in the loss, the
  gradient norm clipped to 1, AdamW with learning rate 1e-6 and no weight decay.
- No evaluation, no checkpoint, no logging service.

A step is timed from the prompts to the end of the optimizer step: sampling, rewards, reference log-probs, forward and
backward. Not timed on either side: loading, rolltune's self-test before the first step, the data loader, writing
metrics. "sampling" is the time until all completions are there, "training" is the rest. Scoring 32 short texts takes
milliseconds (rolltune counts it as sampling, TRL as training).

rolltune runs the functions of recipes/grpo.py. The rest of its config is defaults, including ``--microbatch-tokens``
(tokens in one forward and backward pass).

TRL 1.16.0 runs with its best plain settings. Each is measured and paired with rolltune runs of its own:
``--trl-micro-batch`` completions in one forward and backward pass (per_device_train_batch_size; gradients accumulate
over all 32), by default all of them and 8, and ``--trl-gradient-checkpointing`` off and on (on is TRL's default). The
result compares time with TRL's fastest setting and memory with its leanest one. Other settings:

- ``bf16`` off (TRL's default is on), and ``use_bias_correction_kl`` off, which makes the objective the same;
- TRL's own choices remain: its chunked LM head, no pass for old log-probs, the fused AdamW;
- ``transformers`` generates: vLLM is a separate engine, and continuous batching does not help completions of equal
  length.

Time is measured by wrapping TRL's ``_generate`` and ``compute_loss``, without changing them.

This process must stay small, because a child's peak memory starts from its parent's: it imports only the standard
library.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

CHILD = Path(__file__).with_name("grpo_step_child.py")
WARM_UP_STEPS = 1


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """The conditions that are the same for both trainers.

    Attributes:
        data: ``path`` of :func:`rolltune.data.gsm8k.gsm8k`.
        prompts: prompts per step.
        completions: completions per prompt.
        max_new_tokens: tokens of every completion.
        steps: timed steps, after the warm-up.
        microbatch_tokens: rolltune's microbatch size; TRL's counterpart is in :class:`TRLSetting`.
    """

    data: str
    prompts: int
    completions: int
    max_new_tokens: int
    steps: int
    microbatch_tokens: int

    @property
    def completions_per_step(self) -> int:
        return self.prompts * self.completions

    @property
    def all_steps(self) -> int:
        return WARM_UP_STEPS + self.steps


@dataclass(frozen=True, kw_only=True)
class TRLSetting:
    """The settings of TRL that time and memory depend on.

    Attributes:
        micro_batch: completions in one forward and backward pass.
        gradient_checkpointing: recompute activations in the backward pass.
    """

    micro_batch: int
    gradient_checkpointing: bool

    def __str__(self) -> str:
        return f"TRL, {self.micro_batch} a pass, checkpointing {'on' if self.gradient_checkpointing else 'off'}"


@dataclass(kw_only=True)
class Step:
    """One step of either trainer: seconds in all and for sampling, tokens sampled and trained on."""

    seconds: float = 0.0
    sample_seconds: float = 0.0
    sampled_tokens: int = 0
    trained_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process.

    Attributes:
        trainer: "rolltune", or the name of a :class:`TRLSetting`.
        steps: the timed steps.
        peak_gib: peak resident set in GiB.
        threads: number of PyTorch's threads.
    """

    trainer: str
    steps: tuple[Step, ...]
    peak_gib: float
    threads: int

    @property
    def seconds(self) -> float:
        """Median seconds of a step."""
        return statistics.median(step.seconds for step in self.steps)

    @property
    def sample_seconds(self) -> float:
        return statistics.median(step.sample_seconds for step in self.steps)


def run_child(what: str, conditions: Conditions, model: Path, setting: TRLSetting | None = None) -> Run | None:
    """Run grpo_step_child.py; return its measurement, or None for "prepare". SystemExit if it fails."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        task = {
            "what": what,
            "conditions": asdict(conditions),
            "model": str(model),
            "setting": asdict(setting) if setting else None,
            "result": result.name,
        }
        # The libraries' output goes to stderr: stdout is for the table.
        done = subprocess.run([sys.executable, str(CHILD), json.dumps(task)], stdout=sys.stderr)
        if done.returncode:
            sys.exit(f"{setting or what}: failed with status {done.returncode}, see above")
        text = result.read()
    if not text:
        return None
    fields = json.loads(text)
    return Run(**fields | {"steps": tuple(Step(**step) for step in fields["steps"])})


def summarise(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any]:
    """Compute the ratios rolltune / TRL of each pair, and their medians, for each setting of TRL.

    Args:
        pairs: (rolltune, TRL), run one after the other.

    Returns:
        ``settings``: for each TRL setting, the pairs' ratios of seconds per step and of peak memory, and their medians;
        ``fastest`` and ``leanest``: the settings with which TRL needs the least time and memory (medians);
        ``seconds_ratio`` to the fastest and ``peak_ratio`` to the leanest, both medians;
        ``same_tokens``: whether every step sampled and trained on the same number of tokens.
    """
    settings: dict[str, Any] = {}
    seconds, peaks = {}, {}
    for name in dict.fromkeys(theirs.trainer for _, theirs in pairs):
        mine = [(ours, theirs) for ours, theirs in pairs if theirs.trainer == name]
        seconds[name] = statistics.median(theirs.seconds for _, theirs in mine)
        peaks[name] = statistics.median(theirs.peak_gib for _, theirs in mine)
        ratios = {
            "seconds_ratio": [ours.seconds / theirs.seconds for ours, theirs in mine],
            "peak_ratio": [ours.peak_gib / theirs.peak_gib for ours, theirs in mine],
        }
        settings[name] = ratios | {f"{key}_median": statistics.median(values) for key, values in ratios.items()}
    fastest, leanest = min(seconds, key=seconds.__getitem__), min(peaks, key=peaks.__getitem__)
    tokens = {(s.sampled_tokens, s.trained_tokens) for pair in pairs for run in pair for s in run.steps}
    return {
        "settings": settings,
        "fastest": fastest,
        "seconds_ratio": settings[fastest]["seconds_ratio_median"],
        "leanest": leanest,
        "peak_ratio": settings[leanest]["peak_ratio_median"],
        "same_tokens": len(tokens) == 1,
    }


HEADER = "pair  {:<38} {:>8} {:>8} {:>8} {:>8} {:>8} {:>8}".format(
    "trainer", "sampled", "trained", "s/step", "sampling", "training", "peak GiB"
)


def table_row(pair: int, run: Run) -> str:
    """Format a run as a line under HEADER; tokens are per step."""
    sampled = statistics.median(step.sampled_tokens for step in run.steps)
    trained = statistics.median(step.trained_tokens for step in run.steps)
    return (
        f"{pair:>4}  {run.trainer:<38} {sampled:>8.0f} {trained:>8.0f} {run.seconds:>8.2f} {run.sample_seconds:>8.2f} "
        f"{run.seconds - run.sample_seconds:>8.2f} {run.peak_gib:>8.2f}"
    )


def format_summary(summary: dict[str, Any]) -> str:
    lines = ["", "rolltune / TRL, pair by pair, and the median:"]
    for name, ratios in summary["settings"].items():
        for key, label in (("seconds_ratio", "seconds"), ("peak_ratio", "peak memory")):
            values = " ".join(f"{value:.3f}" for value in ratios[key])
            lines.append(f"  {name:<38} {label:<12} {values}   median {ratios[f'{key}_median']:.3f}")
    lines.append(f"time against {summary['fastest']}: {summary['seconds_ratio']:.3f}")
    lines.append(f"peak memory against {summary['leanest']}: {summary['peak_ratio']:.3f}")
    if not summary["same_tokens"]:
        lines.append("NOT every step has the same number of tokens: see the table")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> tuple[Conditions, list[TRLSetting], int]:
    """Return (conditions, settings of TRL, pairs per setting). A mistake ends the process with status 2."""
    parser = argparse.ArgumentParser(
        description="Time and peak memory of one GRPO step, rolltune against TRL's GRPOTrainer.",
        epilog="The top of this file says what is the same, what is timed and how TRL is set up.",
    )
    parser.add_argument(
        "--data", default="openai/gsm8k", help="GSM8K: a train.jsonl, a folder or a Hub id (default: %(default)s)"
    )
    for name, default, text in (
        ("--steps", 1, "timed steps of each process, after one warm-up step"),
        ("--pairs", 2, "pairs of processes for each TRL setting"),
        ("--prompts", 4, "prompts per step"),
        ("--completions", 8, "completions per prompt"),
        ("--max-new-tokens", 128, "tokens of every completion"),
        ("--microbatch-tokens", 4096, "rolltune: tokens in one forward and backward pass"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{text} (default: %(default)s)")
    parser.add_argument(
        "--trl-micro-batch",
        type=int,
        nargs="+",
        metavar="N",
        help="TRL: completions in one forward and backward pass (default: all of a step, and all of a prompt)",
    )
    parser.add_argument(
        "--trl-gradient-checkpointing",
        choices=("off", "on"),
        nargs="+",
        default=["off", "on"],
        help="TRL: each value is measured (default: off on)",
    )
    args = parser.parse_args(argv)
    for name in ("steps", "pairs", "prompts", "completions", "max_new_tokens", "microbatch_tokens"):
        value, minimum = getattr(args, name), 2 if name == "completions" else 1
        if value < minimum:
            parser.error(f"--{name.replace('_', '-')}: {value}; must be {minimum} or more")
    conditions = Conditions(
        data=args.data,
        prompts=args.prompts,
        completions=args.completions,
        max_new_tokens=args.max_new_tokens,
        steps=args.steps,
        microbatch_tokens=args.microbatch_tokens,
    )
    micro_batches = args.trl_micro_batch or [conditions.completions_per_step, conditions.completions]
    for size in micro_batches:
        if size < 1 or conditions.completions_per_step % size:
            parser.error(
                f"--trl-micro-batch: {size}; must divide the {conditions.completions_per_step} completions of a step"
            )
    settings = [
        TRLSetting(micro_batch=size, gradient_checkpointing=checkpointing == "on")
        for size in dict.fromkeys(micro_batches)
        for checkpointing in dict.fromkeys(args.trl_gradient_checkpointing)
    ]
    return conditions, settings, args.pairs


def main(argv: Sequence[str] | None = None) -> None:
    conditions, settings, num_pairs = parse_args(argv)
    pairs: list[tuple[Run, Run]] = []
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        run_child("prepare", conditions, model)
        print(HEADER, flush=True)
        for number in range(1, num_pairs + 1):
            for setting in settings:
                pair = []
                for what in ("rolltune", "trl"):
                    run = run_child(what, conditions, model, setting if what == "trl" else None)
                    assert run is not None
                    print(table_row(number, run), flush=True)
                    pair.append(run)
                pairs.append((pair[0], pair[1]))
    summary = summarise(pairs)
    print(format_summary(summary), flush=True)
    results = {
        "conditions": asdict(conditions),
        "versions": {name: importlib.metadata.version(name) for name in ("rolltune", "trl", "transformers", "torch")},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "pairs": [[asdict(run) for run in pair] for pair in pairs],
        "summary": summary,
    }
    print(json.dumps(results))


if __name__ == "__main__":
    main()
