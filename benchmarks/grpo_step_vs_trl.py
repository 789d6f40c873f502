"""One GRPO step of rolltune beside one of TRL's ``GRPOTrainer``, on a CPU and under the same conditions.

    python benchmarks/grpo_step_vs_trl.py --data train.jsonl

The two run in turn (rolltune, TRL, rolltune, TRL, ...), each in a process of its own, so that each has a peak resident
set of its own. One step warms up, then ``--steps`` are timed. The last line of the output is a JSON object with every
number.

The same for both:

- SmolLM2-135M-Instruct in fp32, on as many threads as the environment gives; the same GSM8K questions in the same
  order, 4 a step, rendered by the chat template; 8 completions of each at temperature 1, without top-p or top-k.
- Every completion has 128 tokens: both load a copy of the model folder that names as EOS a token which the model does
  not write. So they sample and train on the same number of tokens, which the table shows, and neither gains from
  completions that end early. (rolltune would: it drops them from the batch at once.)
- One optimizer step on the 32 completions: the answer and format rewards of rolltune, z-scored advantages, clip 0.2,
  the mean over each completion and then over completions, k3 KL to a frozen copy with coefficient 0.04 in the loss, the
  gradient norm clipped to 1, AdamW with learning rate 1e-6 and no weight decay.
- No evaluation, no checkpoint, no logging service.

A step is timed from the prompts to the end of the optimizer step: sampling, rewards, reference log-probs, forward and
backward. What surrounds it is left out on both sides: loading, rolltune's self-test before the first step, the data
loader, writing metrics. "sampling" is the time until all completions are there, "training" the rest; scoring 32 short
texts takes milliseconds (rolltune counts them as sampling, TRL as training).

rolltune runs the functions of recipes/grpo.py itself, and the rest of its config is defaults, ``--microbatch-tokens``
(tokens in one forward and backward pass) among them.

TRL 1.16.0 runs with its best plain settings, each measured on its own and paired with rolltune runs of its own:
``--trl-micro-batch`` completions in one forward and backward pass (per_device_train_batch_size; gradients accumulate
over all 32), by default all at once and 8, and ``--trl-gradient-checkpointing`` off and on (on is TRL's default). The
verdict takes the setting that is fastest for time, and the one that needs least for memory. The rest:

- ``bf16`` off (TRL's default is on), ``use_bias_correction_kl`` off, which makes the objective the same;
- TRL's own choices here are its chunked LM head, no pass for old log-probs and the fused AdamW;
- ``transformers`` generates. vLLM is an engine of its own, and continuous batching has nothing to do where all
  completions are equally long.

To be timed, TRL's ``_generate`` and ``compute_loss`` are wrapped; nothing in them is changed.

Imports are inside the functions: this process has to stay small, as a child's peak memory counts from its parent's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"
# The EOS in place of <|im_end|>, which is then a token like others. The model gives it a probability below 1e-5.
NEVER_WRITTEN = ("<filename>", 6)
SYSTEM = (
    "Reason step by step between <think> and </think>, then give the final answer, a number alone, "
    "between <answer> and </answer>."
)
WEIGHTS = {"answer": 1.0, "format": 0.1}
KL_COEF = 0.04
LEARNING_RATE = 1e-6
WARM_UP_STEPS = 1
SEED = 0


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What is the same for both trainers.

    Attributes:
        data: ``path`` of :func:`rolltune.data.gsm8k.gsm8k`.
        prompts: a step.
        completions: a prompt.
        max_new_tokens: a completion, all of which are written.
        steps: timed ones, after the warm-up.
        microbatch_tokens: rolltune's; TRL's counterpart is in :class:`TRLSetting`.
    """

    data: str
    prompts: int
    completions: int
    max_new_tokens: int
    steps: int
    microbatch_tokens: int

    @property
    def rows(self) -> int:
        """Completions a step."""
        return self.prompts * self.completions

    @property
    def all_steps(self) -> int:
        return WARM_UP_STEPS + self.steps


@dataclass(frozen=True, kw_only=True)
class TRLSetting:
    """What TRL leaves to its user, and what time and memory hang on.

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
    """One step of either trainer: seconds in all and of sampling, tokens sampled and trained on."""

    seconds: float = 0.0
    sample_seconds: float = 0.0
    sampled_tokens: int = 0
    trained_tokens: int = 0


@dataclass(frozen=True, kw_only=True)
class Run:
    """One process: its timed steps, and its peak resident set in GiB.

    Attributes:
        trainer: "rolltune", or the name of a :class:`TRLSetting`.
        threads: what PyTorch computed on.
    """

    trainer: str
    steps: tuple[Step, ...]
    peak_gib: float
    threads: int

    @property
    def seconds(self) -> float:
        """Of one step: the median."""
        return statistics.median(step.seconds for step in self.steps)

    @property
    def sample_seconds(self) -> float:
        return statistics.median(step.sample_seconds for step in self.steps)


# --- the two trainers, each in a process of its own -------------------------------------------------------------------


def load_recipe() -> ModuleType:
    """recipes/grpo.py as a module: recipes are run by path and live in no package."""
    spec = importlib.util.spec_from_file_location("recipe_grpo", ROOT / "recipes" / "grpo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_rolltune(conditions: Conditions, model: Path) -> list[Step]:
    """The recipe's loop, without what surrounds a step. Returns all steps, the warm-up first."""
    from rolltune.config.schema import BatchConfig, DataConfig, GRPOConfig, ModelConfig, PromptConfig, SamplingConfig
    from rolltune.distributed import init_world
    from rolltune.metrics.progress import Progress
    from rolltune.metrics.timing import Phases
    from rolltune.rollout import is_trainable

    cfg = GRPOConfig(
        output_dir="",  # nothing is written
        seed=SEED,
        device="cpu",
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(
            train={
                "_component_": "rolltune.data.gsm8k.gsm8k",
                "split": "train",
                "path": conditions.data,
                "count": conditions.prompts * conditions.all_steps,
            },
            heldout={"_component_": "rolltune.data.sums.sums", "count": 1, "split": "heldout"},  # is not asked
        ),
        prompt=PromptConfig(system=SYSTEM),
        rewards={
            name: {"_component_": f"rolltune.rewards.{name}.{name}_reward", "weight": weight}
            for name, weight in WEIGHTS.items()
        },
        sampling=SamplingConfig(
            group_size=conditions.completions, temperature=1.0, max_new_tokens=conditions.max_new_tokens
        ),
        sampler={"_component_": "rolltune.samplers.native.NativeSampler"},
        advantage={"_component_": "rolltune.advantages.group_zscore"},
        loss={"_component_": "rolltune.losses.grpo.GRPOLoss", "kl_coef": KL_COEF},
        optimizer={"_component_": "torch.optim.AdamW", "lr": LEARNING_RATE, "weight_decay": 0.0},
        num_steps=conditions.all_steps,
        max_grad_norm=1.0,
        batch=BatchConfig(prompts_per_step=conditions.prompts, microbatch_tokens=conditions.microbatch_tokens),
    )
    recipe = load_recipe()
    parts = recipe.build(cfg, init_world(cfg.device), None)
    progress = Progress(cfg.num_steps, enabled=False)
    steps, data_position = [], 0
    for number in range(1, cfg.num_steps + 1):
        started, phases = time.perf_counter(), Phases()
        rollout = recipe.sample(cfg, parts, number, data_position, phases, progress)
        recipe.train(cfg, parts, number, rollout, phases, progress)
        seconds, data_position = time.perf_counter() - started, rollout.data_position
        trained = [group.scored() for group in rollout.kept.values() if is_trainable(group)]
        steps.append(
            Step(
                seconds=seconds,
                sample_seconds=phases.seconds["sample"],
                sampled_tokens=sum(len(c.token_ids) for group in rollout.sampled for c in group.completions),
                trained_tokens=sum(len(c.token_ids) for group in trained for c in group.completions),
            )
        )
    return steps


def run_trl(conditions: Conditions, model: Path, setting: TRLSetting) -> list[Step]:
    """``GRPOTrainer.train()`` on the same prompts. Returns all steps, the warm-up first."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl.trainer.grpo_config import GRPOConfig
    from trl.trainer.grpo_trainer import GRPOTrainer

    from rolltune.data.dataset import ProblemStream
    from rolltune.data.gsm8k import gsm8k
    from rolltune.rewards.answer import answer_reward
    from rolltune.rewards.format import format_reward

    steps: list[Step] = []

    class StepClock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            steps.append(Step())
            self.started = time.perf_counter()

        def on_step_end(self, args, state, control, **kwargs):
            steps[-1].seconds = time.perf_counter() - self.started

    class TimedTrainer(GRPOTrainer):
        def _generate(self, prompts):
            started = time.perf_counter()
            generated = super()._generate(prompts)
            steps[-1].sample_seconds += time.perf_counter() - started
            steps[-1].sampled_tokens += sum(map(len, generated[1]))
            return generated

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            steps[-1].trained_tokens += int(inputs["completion_mask"].sum())
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

    count = conditions.prompts * conditions.all_steps
    problems = ProblemStream(gsm8k(split="train", path=conditions.data, count=count), seed=SEED).take(0, count)
    rows = [
        {"prompt": [{"role": "system", "content": SYSTEM}, *problem.messages], "answer": problem.answer}
        for problem in problems
    ]
    args = GRPOConfig(
        output_dir=str(model / "trl"),  # in the temporary folder
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=conditions.rows // setting.micro_batch,
        gradient_checkpointing=setting.gradient_checkpointing,
        num_generations=conditions.completions,
        max_completion_length=conditions.max_new_tokens,
        max_steps=conditions.all_steps,
        shuffle_dataset=False,  # the stream has shuffled it
        temperature=1.0,
        loss_type="grpo",
        beta=KL_COEF,
        use_bias_correction_kl=False,
        reward_weights=list(WEIGHTS.values()),
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        max_grad_norm=1.0,
        report_to="none",
        logging_strategy="no",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
        seed=SEED,
    )
    trainer = TimedTrainer(
        model=str(model),
        reward_funcs=[as_trl_reward(answer_reward), as_trl_reward(format_reward)],
        args=args,
        train_dataset=Dataset.from_list(rows),
        callbacks=[StepClock()],
    )
    trainer.train()
    return steps


def as_trl_reward(reward: Callable[..., Any]) -> Callable[..., list[float | None]]:
    """A reward of rolltune as TRL calls them: all completions at once, with the data set's columns."""
    from rolltune.types import Problem

    def score(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float | None]:
        return [
            reward(Problem(id="", messages=(), answer=gold), turns[0]["content"]).total
            for turns, gold in zip(completions, answer, strict=True)
        ]

    score.__name__ = reward.__name__
    return score


def prepare(conditions: Conditions, model: Path) -> None:
    """Check the data, and make the model folder whose EOS is never written.

    Raises:
        ValueError: the data or the model cannot be found.
    """
    from rolltune.data.gsm8k import gsm8k
    from rolltune.model.load import resolve_model

    gsm8k(split="train", path=conditions.data, count=conditions.prompts * conditions.all_steps)
    token, token_id = NEVER_WRITTEN
    changes = {
        "config.json": {"eos_token_id": token_id},
        "generation_config.json": {"eos_token_id": token_id},
        "tokenizer_config.json": {"eos_token": token},
    }
    for file in Path(resolve_model(MODEL)).iterdir():
        if file.name in changes:
            (model / file.name).write_text(json.dumps(json.loads(file.read_text()) | changes[file.name]))
        else:
            (model / file.name).symlink_to(file)


def work(task: dict[str, Any]) -> None:
    """What a child process does; a measurement goes to the file ``task["result"]``."""
    conditions, model = Conditions(**task["conditions"]), Path(task["model"])
    if task["what"] == "prepare":
        try:
            prepare(conditions, model)
        except ValueError as error:
            sys.exit(str(error))
        return
    if task["what"] == "rolltune":
        name, steps = "rolltune", run_rolltune(conditions, model)
    else:
        setting = TRLSetting(**task["setting"])
        name, steps = str(setting), run_trl(conditions, model, setting)
    assert len(steps) == conditions.all_steps, (len(steps), conditions.all_steps)
    import torch

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes there, in KiB elsewhere
    run = Run(
        trainer=name,
        steps=tuple(steps[WARM_UP_STEPS:]),
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        threads=torch.get_num_threads(),
    )
    Path(task["result"]).write_text(json.dumps(asdict(run)))


# --- this process: in turn, and what comes of it ----------------------------------------------------------------------


def run_child(what: str, conditions: Conditions, model: Path, setting: TRLSetting | None = None) -> Run | None:
    """Do ``what`` in a process of its own; the measurement, if it makes one. SystemExit if it fails."""
    with tempfile.NamedTemporaryFile("r", suffix=".json") as result:
        task = {
            "what": what,
            "conditions": asdict(conditions),
            "model": str(model),
            "setting": asdict(setting) if setting else None,
            "result": result.name,
        }
        # Whatever the libraries print goes to stderr: stdout is for the table.
        done = subprocess.run([sys.executable, __file__, "--work", json.dumps(task)], stdout=sys.stderr)
        if done.returncode:
            sys.exit(f"{setting or what}: failed with status {done.returncode}, see above")
        text = result.read()
    if not text:
        return None
    fields = json.loads(text)
    return Run(**fields | {"steps": tuple(Step(**step) for step in fields["steps"])})


def summarise(pairs: Sequence[tuple[Run, Run]]) -> dict[str, Any]:
    """Ratios rolltune / TRL, pair by pair and their medians, for each setting of TRL.

    Args:
        pairs: (rolltune, TRL), one after the other in time.

    Returns:
        ``settings``: by TRL setting, the pairs' ratios of seconds a step and of peak memory, and their medians;
        ``fastest`` and ``leanest``: the settings where TRL itself needs least time and least memory (medians);
        ``seconds_ratio`` against the fastest and ``peak_ratio`` against the leanest, both medians;
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
    """One line under HEADER; tokens are those of one step."""
    sampled = statistics.median(step.sampled_tokens for step in run.steps)
    trained = statistics.median(step.trained_tokens for step in run.steps)
    return (
        f"{pair:>4}  {run.trainer:<38} {sampled:>8.0f} {trained:>8.0f} {run.seconds:>8.2f} {run.sample_seconds:>8.2f} "
        f"{run.seconds - run.sample_seconds:>8.2f} {run.peak_gib:>8.2f}"
    )


def verdict(summary: dict[str, Any]) -> str:
    """The summary in a few lines."""
    lines = ["", "rolltune / TRL, pair by pair, and the median:"]
    for name, ratios in summary["settings"].items():
        for key, what in (("seconds_ratio", "seconds"), ("peak_ratio", "peak memory")):
            values = " ".join(f"{value:.3f}" for value in ratios[key])
            lines.append(f"  {name:<38} {what:<12} {values}   median {ratios[f'{key}_median']:.3f}")
    lines.append(f"time against {summary['fastest']}: {summary['seconds_ratio']:.3f}")
    lines.append(f"peak memory against {summary['leanest']}: {summary['peak_ratio']:.3f}")
    if not summary["same_tokens"]:
        lines.append("NOT the same number of tokens in every step: see the table")
    return "\n".join(lines)


def parse_args(argv: Sequence[str] | None) -> tuple[Conditions, list[TRLSetting], int]:
    """(conditions, settings of TRL, pairs of each setting); a mistake ends the process with status 2."""
    parser = argparse.ArgumentParser(
        description="One GRPO step of rolltune beside one of TRL's GRPOTrainer, under the same conditions.",
        epilog="What is the same, what is timed and how TRL is set up: see the top of this file.",
    )
    parser.add_argument(
        "--data", default="openai/gsm8k", help="GSM8K: a train.jsonl, a folder or a Hub id (default: %(default)s)"
    )
    for name, default, what in (
        ("--steps", 1, "timed steps of each process, after one warm-up"),
        ("--pairs", 2, "pairs of processes for each TRL setting"),
        ("--prompts", 4, "prompts a step"),
        ("--completions", 8, "completions a prompt"),
        ("--max-new-tokens", 128, "tokens a completion"),
        ("--microbatch-tokens", 4096, "rolltune: tokens in one forward and backward pass"),
    ):
        parser.add_argument(name, type=int, default=default, metavar="N", help=f"{what} (default: %(default)s)")
    parser.add_argument(
        "--trl-micro-batch",
        type=int,
        nargs="+",
        metavar="N",
        help="TRL: completions in one forward and backward pass (default: all of a step, and those of one prompt)",
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
        value, least = getattr(args, name), 2 if name == "completions" else 1
        if value < least:
            parser.error(f"--{name.replace('_', '-')}: {value}; must be {least} or more")
    conditions = Conditions(
        data=args.data,
        prompts=args.prompts,
        completions=args.completions,
        max_new_tokens=args.max_new_tokens,
        steps=args.steps,
        microbatch_tokens=args.microbatch_tokens,
    )
    micro_batches = args.trl_micro_batch or [conditions.rows, conditions.completions]
    for size in micro_batches:
        if size < 1 or conditions.rows % size:
            parser.error(f"--trl-micro-batch: {size}; must divide the {conditions.rows} completions of a step")
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
    print(verdict(summary), flush=True)
    report = {
        "conditions": asdict(conditions),
        "versions": {name: importlib.metadata.version(name) for name in ("rolltune", "trl", "transformers", "torch")},
        "omp_wait_policy": os.environ.get("OMP_WAIT_POLICY"),
        "pairs": [[asdict(run) for run in pair] for pair in pairs],
        "summary": summary,
    }
    print(json.dumps(report))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--work"]:
        work(json.loads(sys.argv[2]))
    else:
        main()
