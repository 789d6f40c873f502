"""Run setup and life cycle shared by the recipes: resume, open the log, save, stop."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from transformers import PreTrainedTokenizerBase

from rolltune import config
from rolltune.config.components import is_node
from rolltune.config.schema import GRPOConfig, SFTConfig
from rolltune.distributed import World
from rolltune.endpoints import settings
from rolltune.errors import ConfigError, RunStopped, SyncError
from rolltune.files import take_lock
from rolltune.metrics.log import MetricsLog
from rolltune.model.policy import Policy
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rollout import Rollout
from rolltune.run.build import BUDGETS
from rolltune.run.checkpoint import Checkpoints, TrainState, damage, load_state
from rolltune.update import Optimization

# Keys that may change on resume because they do not affect training.
FREE_ON_RESUME = {"output_dir", "resume", "dry_run", "device", "checkpoint", "logging", "mismatch"}

# Arguments of a judge that may change on resume, because they do not decide its verdicts.
FREE_JUDGE_ARGUMENTS = {"max_concurrency", "cache", "wait_seconds"}


def start(cfg: GRPOConfig | SFTConfig, checkpoints: Checkpoints, world: World) -> Path | None:
    """Start in an empty output folder, or find the checkpoint to resume from.

    Returns:
        The newest complete checkpoint when resuming; None for a fresh start.

    Raises:
        ConfigError: the folder holds another run or a broken config.yaml, or the config is not the one that the run was
            started with.
    """
    warn_of_slow_dtype(cfg.model.dtype, world)
    latest = checkpoints.latest() if cfg.resume else None
    if not cfg.resume and checkpoints.steps():
        raise ConfigError(
            [
                f"output_dir: {cfg.output_dir}: holds the checkpoints of an earlier run; "
                "add resume=true to continue it, or choose another output_dir"
            ]
        )
    if cfg.resume and latest is None and checkpoints.steps():
        raise ConfigError(
            [
                f"output_dir: {checkpoints.folder}: holds checkpoints, but none with a trainer.pt to resume from; "
                "restore one, or start over in another output_dir"
            ]
        )
    if latest is not None:
        _check_resumable(checkpoints, latest)
        before = config.read_saved(checkpoints.output_dir)
        if before is None:
            raise ConfigError(
                [
                    f"output_dir: {cfg.output_dir}: holds checkpoints, but no config.yaml to compare this config with; "
                    "restore it, or start over in another output_dir"
                ]
            )
        # A run may be older than a key. The key's default is what such a run did.
        before, now = config.masked(config.with_defaults(type(cfg), before)), config.masked(asdict(cfg))
        changed = [k for k in now if k not in FREE_ON_RESUME and _fixed(before.get(k)) != _fixed(now[k])]
        if changed:
            raise ConfigError(
                [
                    f"{key}: {now[key]}: the run in {cfg.output_dir} was started with {before.get(key)}; "
                    "resume with the same value, or choose another output_dir"
                    for key in changed
                ]
            )
    if world.is_main and not cfg.resume:
        shutil.rmtree(checkpoints.output_dir / BUDGETS, ignore_errors=True)  # of a run that never took a step
    world.barrier()  # every rank has looked before rank 0 writes
    if world.is_main:
        config.save(cfg, checkpoints.output_dir)
        if latest is not None:
            checkpoints.recover(load_state(latest))
    return latest


def _check_resumable(checkpoints: Checkpoints, latest: Path) -> None:
    """Raise ConfigError if the newest checkpoint is damaged; the message names it and the one before."""
    problem = damage(latest)
    if problem is None:
        return
    before = [step for step in checkpoints.steps() if checkpoints.path(step) < latest]
    resumable = [step for step in before if (checkpoints.path(step) / "trainer.pt").exists()]
    way_out = f"to resume from step {resumable[-1]}" if resumable else "and start over without resume=true"
    raise ConfigError([f"output_dir: {latest}: the newest checkpoint is damaged ({problem}); delete it {way_out}"])


def warn_of_slow_dtype(dtype: str, world: World) -> None:
    """Warn on rank 0 if ``dtype`` makes a run slow: fp16 products take EPYC cores (Zen 4) 2 to 20 times as long."""
    if dtype == "float16" and world.device.type == "cpu" and world.is_main:
        print(
            "model.dtype: float16 is slow on a CPU without AVX512-FP16 or AMX-FP16: matrix products take 2 to 20 times "
            "as long as in bfloat16",
            flush=True,
        )


def _fixed(value: Any) -> Any:
    """Return a config's value without the judges' arguments that may change, at any depth."""
    if isinstance(value, dict):
        return {key: _fixed(item) for key, item in value.items() if key not in _free_keys(value)}
    return [_fixed(item) for item in value] if isinstance(value, list) else value


def _free_keys(node: dict[str, Any]) -> Collection[str]:
    if is_node(node):
        if "base_url" in node:  # a judge of the user's own
            return FREE_JUDGE_ARGUMENTS | settings.FREE_ON_RESUME
        return FREE_JUDGE_ARGUMENTS if "judges" in node or "endpoint" in node else ()
    return settings.FREE_ON_RESUME if "base_url" in node else ()


def open_log(cfg: GRPOConfig | SFTConfig, world: World, *, resume_step: int | None) -> MetricsLog:
    """Open the metrics log on rank 0, and one that writes nothing on the others."""
    if not world.is_main:
        return MetricsLog.null()
    return MetricsLog(
        Path(cfg.output_dir),
        wandb=cfg.logging.wandb,
        wandb_project=cfg.logging.wandb_project,
        tensorboard=cfg.logging.tensorboard,
        config=config.masked(asdict(cfg)),
        resume_step=resume_step,
    )


@dataclass(frozen=True, kw_only=True)
class Saver:
    """Everything that a checkpoint holds, and where it goes. All ranks call the methods; rank 0 writes."""

    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    optimization: Optimization
    checkpoints: Checkpoints
    world: World

    def save(self, state: TrainState, *, score: float | None, is_due: bool) -> TrainState:
        """Write a checkpoint if one is due or the held-out score is the best so far.

        Args:
            state: the state after the step.
            score: held-out score of this step, higher is better; None if it was not measured.
            is_due: whether the step's number asks for a checkpoint.

        Returns:
            The state with the best score updated.
        """
        if not all(parameter.isfinite().all() for parameter in self.policy.trainable_parameters):
            last = max(self.checkpoints.steps(), default=None)
            kept = "no checkpoint was written" if last is None else f"the checkpoint of step {last} is intact"
            raise RunStopped(
                f"step {state.step}: the policy's weights are not finite and were not saved; {kept}: lower "
                "optimizer.lr, and start over or resume from an earlier step"
            )
        is_best = score is not None and (state.best_score is None or score > state.best_score)
        if is_best:
            state = replace(state, best_score=score, best_step=state.step)
        if is_best or is_due:
            if self.world.is_main:
                self.checkpoints.save(
                    state,
                    save_policy=lambda folder: self.policy.save(folder, self.tokenizer),
                    optimization=self.optimization.state_dict(),
                    is_best=is_best,
                )
            self.world.barrier()
        return state

    def stop(self, state: TrainState, why: str) -> NoReturn:
        """End the run in step ``state.step + 1``, with a checkpoint of ``state``.

        Raises:
            RunStopped: always; the message says why, and how to resume.
        """
        # All ranks save or none: a rank that looked for itself might see what another has written in the meantime.
        (is_kept,) = self.world.gather([state.step in self.checkpoints.steps()] if self.world.is_main else [])
        if state.step and not is_kept:
            self.save(state, score=None, is_due=True)
        output_dir = self.checkpoints.output_dir
        kept = f"a checkpoint of step {state.step} is in {output_dir}" if state.step else "nothing was trained yet"
        again = "the same command and resume=true" if state.step else "the same command"
        raise RunStopped(f"step {state.step + 1}: {why}\n  {kept}; continue with {again}")

    def stop_without_saving(self, state: TrainState, why: str) -> NoReturn:
        """End the run in step ``state.step + 1``, whose weights are no longer those of ``state``.

        Raises:
            RunStopped: always; the message says why, and what there is to resume from.
        """
        steps = self.checkpoints.steps()
        kept = f"the last checkpoint is of step {steps[-1]}" if steps else "there is no checkpoint"
        raise RunStopped(f"step {state.step + 1}: {why}\n  {kept}")


@contextmanager
def exclusive(output_dir: str, world: World) -> Iterator[None]:
    """Let one run at a time write an output folder; all ranks call this.

    Raises:
        ConfigError: on all ranks, if another process writes the folder.
    """
    with ExitStack() as stack:
        problem = []
        if world.is_main:
            try:
                stack.enter_context(take_lock(Path(output_dir) / "run"))
            except ValueError as error:
                problem = [f"output_dir: {error}"]
            except OSError as error:
                problem = [f"output_dir: {output_dir}: {error.strerror or error}; choose a folder that can be written"]
        if problems := world.gather(problem):
            raise ConfigError(problems)
        yield


@contextmanager
def stop_requests(world: World) -> Iterator[Callable[[], str | None]]:
    """Turn SIGTERM (Slurm, Kubernetes) and a first Ctrl-C into a request to stop after the current step.

    A second signal ends the process at once.

    Yields:
        A function that returns why the run should stop, None if nobody asked; all ranks call it, and get one answer.
    """
    requests: list[str] = []

    def on_signal(number: int, frame: Any) -> None:
        for each, handler in previous.items():
            signal.signal(each, handler)
        requests.append(f"stopped by {signal.Signals(number).name}")
        if world.is_main:
            message = "finishing the step and saving; the same signal again stops at once\n"
            os.write(2, f"{signal.Signals(number).name}: {message}".encode())

    def requested() -> str | None:
        return next(iter(world.gather(requests[:1])), None)

    # Python calls signal handlers in the main thread only.
    numbers = (signal.SIGTERM, signal.SIGINT) if threading.current_thread() is threading.main_thread() else ()
    previous = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        signal.signal(number, on_signal)
    try:
        yield requested
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def barrier_on_exit(world: World) -> Iterator[None]:
    """Let the ranks of a stopped run wait for each other, after everything else is closed.

    torchrun kills the remaining ranks as soon as one has left, and rank 0 may still be writing its logs.
    """
    try:
        yield
    except (RunStopped, SyncError):  # which all ranks raise
        world.barrier()
        raise


def unscored_problem(rollout: Rollout, judges_stopped: str | None, max_unscored: float, world: World) -> str | None:
    """Return why a rollout has too few scores to train on, the same on all ranks; None if it has enough.

    Args:
        rollout: the rollout of this rank.
        judges_stopped: why the judges cannot score anything more; None while they can.
        max_unscored: share of the completions that may be unscored.
        world: all ranks call this.
    """
    scores = [score for group in rollout.sampled for score in group.scores]
    unscored = [score for score in scores if score.total is None]
    reasons = world.gather([judges_stopped] if judges_stopped else [])
    failures = Counter(world.gather([score.failure or "no reason given" for score in unscored]))
    (total,) = world.sum([len(scores)])
    if reasons:
        return reasons[0]
    if failures.total() > max_unscored * total:
        listed = ", ".join(f"{failure} {count}" for failure, count in failures.most_common())
        return (
            f"batch.max_unscored: {failures.total()} of {total:.0f} completions are unscored ({listed}), more than the "
            f"allowed share of {max_unscored:g}"
        )
    return None


def judge_costs(pool: JudgePool, world: World) -> dict[str, float]:
    """Return what judging has cost since the start of this process, summed over ranks; all ranks call this."""
    costs = pool.metrics()
    return dict(zip(costs, world.sum(list(costs.values())), strict=True))


def best_score(metrics: dict[str, float], *, max_unscored: float, world: World) -> float | None:
    """Return the score that the best checkpoint is chosen by; None if it was not measured or not reliable.

    Args:
        metrics: the metrics of the step.
        max_unscored: share of the held-out responses that may be unscored.
        world: rank 0 warns if there are more.
    """
    unscored = metrics.get("heldout/unscored", 0.0)
    if unscored <= max_unscored:
        return metrics.get("heldout/score")
    if world.is_main:
        print(f"held-out responses: {unscored:.0%} are unscored; this step cannot be the best checkpoint", flush=True)
    return None
