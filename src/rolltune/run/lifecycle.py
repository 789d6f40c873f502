"""Run setup and life cycle shared by the recipes: resume, logs, stop, save."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from rolltune import config
from rolltune.behaviours import BackgroundClassifier, thinking
from rolltune.config.components import instantiate, is_node
from rolltune.config.schema import (
    GRPOConfig,
    LoggingConfig,
    SFTConfig,
)
from rolltune.distributed import World
from rolltune.endpoints import settings
from rolltune.errors import ConfigError, RunStopped, SyncError
from rolltune.metrics.log import MetricsLog
from rolltune.model.policy import Policy
from rolltune.rewards.checks.overoptimization import OveroptimizationMonitor
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rollout import Rollout
from rolltune.run.build import BUDGETS
from rolltune.run.checkpoint import Checkpoints, TrainState, load_state
from rolltune.types import Completion, Problem
from rolltune.update import Optimization

# Keys that may change between the parts of a resumed run: none of them touches a number that is trained with.
FREE_ON_RESUME = {"output_dir", "resume", "dry_run", "device", "checkpoint", "logging", "mismatch"}

# The same of a judge's arguments: where it is and what it may cost, not what it says. A run that a cap or a dead server
# has stopped goes on with others.
FREE_JUDGE_ARGUMENTS = {"max_concurrency", "cache", "wait_seconds"}


def start(cfg: GRPOConfig | SFTConfig, checkpoints: Checkpoints, world: World) -> Path | None:
    """Begin in an empty output folder, or find the checkpoint to resume from.

    Returns:
        The newest whole checkpoint when resuming; None for a fresh start.

    Raises:
        ConfigError: the folder holds another run or a broken config.yaml, or the config is not the one the run was
            started with.
    """
    warn_of_slow_dtype(cfg.model.dtype, world)
    latest = checkpoints.latest() if cfg.resume else None
    if not cfg.resume and checkpoints.steps():
        raise ConfigError(
            [
                f"output_dir: {cfg.output_dir}: holds the checkpoints of an earlier run; "
                "add resume=true to go on with it, or choose another output_dir"
            ]
        )
    before = config.read_saved(checkpoints.output_dir) if latest is not None else None
    if before is not None:
        # A run may be older than a key, whose default is what was done before there was one.
        before, now = config.with_defaults(type(cfg), before), asdict(cfg)
        changed = [k for k in now if k not in FREE_ON_RESUME and _fixed(before.get(k)) != _fixed(now[k])]
        if changed:
            raise ConfigError(
                [
                    f"{key}: {now[key]}: the run in {cfg.output_dir} was started with {before.get(key)}; "
                    "resume with the same, or choose another output_dir"
                    for key in changed
                ]
            )
    if world.is_main and not cfg.resume:
        shutil.rmtree(checkpoints.output_dir / BUDGETS, ignore_errors=True)  # of a run that came to nothing
    world.barrier()  # every rank has looked before rank 0 writes
    if world.is_main:
        config.save(cfg, checkpoints.output_dir)
        if latest is not None:
            checkpoints.recover(load_state(latest))
    return latest


def warn_of_slow_dtype(dtype: str, world: World) -> None:
    """Rank 0 says where ``dtype`` makes a run slow: fp16 products take EPYC cores (Zen 4) 2 to 20 times as long."""
    if dtype == "float16" and world.device.type == "cpu" and world.is_main:
        print(
            "float16 is slow on a CPU without a unit for it (AVX512-FP16, AMX-FP16): matrix products take 2 to 20 "
            "times as long as in bfloat16",
            flush=True,
        )


def _fixed(value: Any) -> Any:
    """A config's value without what may change of judges, at any depth."""
    if isinstance(value, dict):
        return {key: _fixed(item) for key, item in value.items() if key not in _free_keys(value)}
    return [_fixed(item) for item in value] if isinstance(value, list) else value


def _free_keys(node: dict[str, Any]) -> Collection[str]:
    if is_node(node):
        return FREE_JUDGE_ARGUMENTS if "judges" in node or "endpoint" in node else ()
    return settings.FREE_ON_RESUME if "base_url" in node else ()


def open_log(cfg: GRPOConfig | SFTConfig, world: World, *, resume_step: int | None) -> MetricsLog:
    if not world.is_main:
        return MetricsLog.null()
    return MetricsLog(
        Path(cfg.output_dir),
        wandb=cfg.logging.wandb,
        wandb_project=cfg.logging.wandb_project,
        tensorboard=cfg.logging.tensorboard,
        config=asdict(cfg),
        resume_step=resume_step,
    )


@contextmanager
def background_classifier(
    logging: LoggingConfig, log: MetricsLog, world: World
) -> Iterator[Callable[[Rollout, int], None]]:
    """What is called with each step's rollout: an LLM counts the behaviours of a few completions, and no step waits.

    Counts are logged under the step that they are of, some steps later, and at the end the last ones are waited for.
    Steps whose counts do not come (the endpoint is slower than the training) are left out and said at the end. A killed
    run loses those that were still to come.
    """
    if logging.classifier is None or not world.is_main:
        yield lambda rollout, step: None
        return
    background = BackgroundClassifier(instantiate(logging.classifier))

    def log_done() -> None:
        for done, metrics in background.collect():
            log.log(done, metrics)

    def classify(rollout: Rollout, step: int) -> None:
        by_sample = zip(*(group.completions for group in rollout.sampled), strict=False)  # one of each problem first
        texts = [thinking(completion.text) for sample in by_sample for completion in sample]
        background.submit(step, texts[: logging.classified_samples])
        log_done()

    yield classify
    is_done = background.close(timeout=60.0)
    log_done()
    if background.dropped or not is_done:
        late = "" if is_done else "; the last ones were not waited for longer than a minute"
        print(f"logging.classifier: {background.dropped} steps were left out{late}")


def why_stop(rollout: Rollout, judges: JudgePool, max_unscored: float, world: World) -> str | None:
    """Why no step should be taken on a rollout, the same on all ranks; None where all is well.

    Args:
        rollout: this rank's.
        judges: that scored it.
        max_unscored: share of the completions that may be unscored.
        world: all ranks call this.
    """
    scores = [score for group in rollout.sampled for score in group.scores]
    unscored = [score for score in scores if score.total is None]
    reasons = world.gather([judges.stop_reason] if judges.stop_reason else [])
    failures = Counter(world.gather([score.failure or "no reason given" for score in unscored]))
    (total,) = world.sum([len(scores)])
    if reasons:
        return reasons[0]
    if failures.total() > max_unscored * total:
        listed = ", ".join(f"{failure} {count}" for failure, count in failures.most_common())
        return (
            f"batch.max_unscored: {failures.total()} of {total:.0f} completions are unscored ({listed}), more than the "
            f"share of {max_unscored:g} that is allowed"
        )
    return None


def stop_early(
    cfg: GRPOConfig,
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    optimization: Optimization,
    checkpoints: Checkpoints,
    world: World,
    state: TrainState,
    why: str,
) -> NoReturn:
    """End the run on a rollout that should not be trained on, with a checkpoint of the last step that was taken."""
    # All ranks save or none: a rank that looked for itself might see what another has written meanwhile.
    (is_kept,) = world.gather([state.step in checkpoints.steps()] if world.is_main else [])
    if state.step and not is_kept:
        save(policy, tokenizer, optimization, checkpoints, state, world, score=None, is_due=True)
    kept = f"a checkpoint of step {state.step} is in {cfg.output_dir}" if state.step else "nothing was trained yet"
    raise RunStopped(
        f"step {state.step + 1}: {why}\n  {kept}; go on with the same command{' and resume=true' * bool(state.step)}"
    )


@contextmanager
def barrier_on_exit(world: World) -> Iterator[None]:
    """Ranks of a stopped run wait for each other: torchrun kills the rest when one has left, rank 0 with its logs too.

    Outside of all that is closed.
    """
    try:
        yield
    except (RunStopped, SyncError):  # which all ranks raise
        world.barrier()
        raise


def heldout_score(metrics: dict[str, float], *, max_unscored: float, world: World) -> float | None:
    """What the best checkpoint is chosen by; None where nothing was measured, or too little of it was scored to choose.

    Args:
        metrics: of the step.
        max_unscored: share of the held-out turns that may be unscored.
        world: rank 0 says where too many are.
    """
    unscored = metrics.get("heldout/unscored", 0.0)
    if unscored <= max_unscored:
        return metrics.get("heldout/score")
    if world.is_main:
        print(f"held-out turns: {unscored:.0%} are unscored; no best checkpoint is chosen by the others", flush=True)
    return None


def judge_metrics(judges: JudgePool, world: World) -> dict[str, float]:
    """What judging has cost so far, over all ranks; counted from the start of this process."""
    mine = judges.metrics()
    return dict(zip(mine, world.sum(list(mine.values())), strict=True))


def check_overoptimization(
    watch: OveroptimizationMonitor | None, turns: Sequence[tuple[Problem, Completion]], output_dir: Path, world: World
) -> dict[str, float]:
    """The metrics of one gold check, none without a watch; rank 0 prints its warning."""
    if watch is None:
        return {}
    reading = watch.measure(turns, output_dir=output_dir, world=world)
    if reading.warning and world.is_main:
        print(reading.warning, flush=True)
    return reading.metrics


def save(
    policy: Policy,
    tokenizer: PreTrainedTokenizerBase,
    optimization: Optimization,
    checkpoints: Checkpoints,
    state: TrainState,
    world: World,
    *,
    score: float | None,
    is_due: bool,
) -> TrainState:
    """Checkpoint where one is due, and whenever the held-out score is the best yet.

    Args:
        policy, tokenizer, optimization: what is saved; rank 0 writes, the others wait.
        checkpoints: where to.
        state: after the step.
        world: all ranks call this.
        score: held-out score of this step, higher is better; None where none was taken.
        is_due: by the step's number.

    Returns:
        The state, with the best score brought up to date.
    """
    is_best = score is not None and (state.best_score is None or score > state.best_score)
    if is_best:
        state = replace(state, best_score=score, best_step=state.step)
    if is_best or is_due:
        if world.is_main:
            checkpoints.save(
                state,
                save_policy=lambda folder: policy.save(folder, tokenizer),
                optimization=optimization.state_dict(),
                is_best=is_best,
            )
        world.barrier()
    return state
