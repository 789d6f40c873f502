"""The measured process of grpo_step_vs_trl.py: the steps of one trainer.

Imports are inside functions, so that each trainer loads only its own libraries.
"""

from __future__ import annotations

import importlib.util
import json
import resource
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from types import ModuleType
from typing import Any

from grpo_step_vs_trl import WARM_UP_STEPS, Conditions, Run, Step, TRLSetting

ROOT = Path(__file__).resolve().parents[1]
MODEL = "smollm2-135m-instruct"
# The EOS in place of <|im_end|>, which becomes an ordinary token. The model gives it a probability below 1e-5.
NEVER_WRITTEN = ("<filename>", 6)
SYSTEM = (
    "Reason step by step between <think> and </think>, then give the final answer, a number alone, "
    "between <answer> and </answer>."
)
WEIGHTS = {"answer": 1.0, "format": 0.1}
KL_COEF = 0.04
LEARNING_RATE = 1e-6
SEED = 0


def load_recipe() -> ModuleType:
    """Import recipes/grpo.py by its path: recipes are not part of a package."""
    spec = importlib.util.spec_from_file_location("recipe_grpo", ROOT / "recipes" / "grpo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def run_rolltune(conditions: Conditions, model: Path) -> list[Step]:
    """Run the steps of the recipe's loop, and nothing around them. Returns all steps, the warm-up first."""
    from rolltune.config.schema import BatchConfig, DataConfig, GRPOConfig, ModelConfig, PromptConfig, SamplingConfig
    from rolltune.distributed import init_world
    from rolltune.metrics.progress import Progress
    from rolltune.metrics.timing import Phases

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
            heldout={
                "_component_": "rolltune.data.sums.sums",
                "count": 1,
                "split": "heldout",
            },  # required, but not used
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
    components = recipe.set_up(cfg, init_world(cfg.device), None)
    progress = Progress(cfg.num_steps, enabled=False)
    steps, data_position = [], 0
    for number in range(1, cfg.num_steps + 1):
        started, phases = time.perf_counter(), Phases()
        rollout = recipe.sample(cfg, components, number, data_position, phases, progress)
        recipe.train(cfg, components, number, rollout, phases, progress)
        seconds, data_position = time.perf_counter() - started, rollout.data_position
        trained = [group for group, _ in rollout.minibatch(0, 1)]
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
    """Run ``GRPOTrainer.train()`` on the same prompts. Returns all steps, the warm-up first."""
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
    records = [
        {"prompt": [{"role": "system", "content": SYSTEM}, *problem.messages], "answer": problem.answer}
        for problem in problems
    ]
    args = GRPOConfig(
        output_dir=str(model / "trl"),  # in the temporary folder
        use_cpu=True,
        bf16=False,
        model_init_kwargs={"dtype": "float32"},
        per_device_train_batch_size=setting.micro_batch,
        gradient_accumulation_steps=conditions.completions_per_step // setting.micro_batch,
        gradient_checkpointing=setting.gradient_checkpointing,
        num_generations=conditions.completions,
        max_completion_length=conditions.max_new_tokens,
        max_steps=conditions.all_steps,
        shuffle_dataset=False,  # the stream has shuffled the data
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
        train_dataset=Dataset.from_list(records),
        callbacks=[StepClock()],
    )
    trainer.train()
    return steps


def as_trl_reward(reward: Callable[..., Any]) -> Callable[..., list[float | None]]:
    """Wrap a reward of rolltune for TRL, which passes all completions at once and the data set's columns."""
    from rolltune.types import Problem

    def score(completions: list[list[dict[str, str]]], answer: list[str], **_: Any) -> list[float | None]:
        return [
            reward(Problem(id="", messages=(), answer=gold), messages[0]["content"]).total
            for messages, gold in zip(completions, answer, strict=True)
        ]

    score.__name__ = reward.__name__
    return score


def prepare(conditions: Conditions, model: Path) -> None:
    """Check the data, and make a copy of the model folder whose EOS is never written.

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


def main(task: dict[str, Any]) -> None:
    """Prepare the model folder, or measure one trainer and write the measurement to the file ``task["result"]``."""
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

    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    run = Run(
        trainer=name,
        steps=tuple(steps[WARM_UP_STEPS:]),
        peak_gib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30,
        threads=torch.get_num_threads(),
    )
    Path(task["result"]).write_text(json.dumps(asdict(run)))


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
