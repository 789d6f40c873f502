"""Run setup and life cycle shared by the recipes: resume, open the log, save, stop."""

from __future__ import annotations

import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rolltune import config
from rolltune.config.components import is_node
from rolltune.config.schema import GRPOConfig, SFTConfig
from rolltune.distributed import World
from rolltune.endpoints import settings
from rolltune.errors import STOPS, ConfigError, RankFailed, RunStopped
from rolltune.files import take_lock
from rolltune.metrics.log import MetricsLog, read_metrics
from rolltune.model import parallel
from rolltune.model.policy import Policy
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rollout import Rollout
from rolltune.run import stop_file
from rolltune.run.agreement import agree, together, weights_checksum
from rolltune.run.build import BUDGETS
from rolltune.run.checkpoint import Checkpoints, TrainState, check_room, damage, load_state, tensor_bytes
from rolltune.run.record import write_record
from rolltune.torchrun import count_restarts
from rolltune.update import Optimization

Resumable = GRPOConfig | SFTConfig

# Keys that may change on resume because they do not affect training.
FREE_ON_RESUME = {
    *("output_dir", "resume", "dry_run", "device", "parallel", "checkpoint", "logging", "mismatch"),
    *("stall_seconds", "grace_seconds"),
}

# Arguments of a judge that may change on resume, because they do not decide its verdicts.
FREE_JUDGE_ARGUMENTS = {"max_concurrency", "cache", "wait_seconds"}


def start(cfg: Resumable, checkpoints: Checkpoints, world: World) -> Path | None:
    """Start in an empty output folder, or find the checkpoint to resume from.

    Processes that torchrun has started again resume, whatever ``cfg.resume`` says.

    Returns:
        The newest complete checkpoint when resuming; None for a fresh start.

    Raises:
        ConfigError: the folder holds another run or a broken config.yaml, or the config is not the one that the run was
            started with.
    """
    warn_of_slow_dtype(cfg.model.dtype, world)
    if restarts := count_restarts():
        cfg = replace(cfg, resume=True)
        if world.is_main:
            message = f"restart {restarts} by torchrun: resuming from the last checkpoint, as with resume=true"
            print(message, file=sys.stderr, flush=True)
    with together(world):
        latest = _find_latest(cfg, checkpoints) if world.is_main else None
    # Rank 0 decides; the folder of another node may be another one.
    (found,) = world.gather([None if latest is None else asdict(load_state(latest))] if world.is_main else [])
    with together(world):
        if found is not None and not world.is_main:
            latest = checkpoints.path(found["step"])
            _check_same(latest, found, world)
    with together(world):
        if world.is_main:
            if not cfg.resume:
                shutil.rmtree(checkpoints.output_dir / BUDGETS, ignore_errors=True)  # of a run that took no step
            config.save(cfg, checkpoints.output_dir)
            write_record(checkpoints.output_dir, world)
            stop_file.clear(checkpoints.output_dir)
            if latest is not None:
                checkpoints.recover(load_state(latest))
    return latest


def _check_same(path: Path, state: dict[str, Any], world: World) -> None:
    """Raise ConfigError unless this rank has the checkpoint that rank 0 resumes from."""
    problem = damage(path)
    if problem is None and asdict(load_state(path)) == state:
        return
    raise ConfigError(
        [
            f"output_dir: rank {world.rank} does not have the checkpoint that rank 0 resumes from, {path} "
            f"({problem or 'its state.json differs'}); use a folder that all nodes share, or copy it to each"
        ]
    )


def _find_latest(cfg: Resumable, checkpoints: Checkpoints) -> Path | None:
    """Return the checkpoint to resume from; None for a fresh start. Arguments and errors as in :func:`start`."""
    latest = _newest(cfg, checkpoints)
    if latest is not None:
        _check_unchanged(cfg, checkpoints)
    elif cfg.resume:
        _check_nothing_is_lost(cfg, checkpoints)
    return latest


def _newest(cfg: Resumable, checkpoints: Checkpoints) -> Path | None:
    """Return the newest checkpoint if the run resumes; raises ConfigError if it is damaged, or should not be there."""
    if obstacle := checkpoints.obstacle():
        raise ConfigError([f"output_dir: {obstacle}"])
    steps = checkpoints.steps()
    check_is_new(cfg)
    if not steps:
        return None
    latest, newest = checkpoints.latest(), checkpoints.path(steps[-1])
    if latest is None:
        raise ConfigError(
            [
                f"output_dir: {checkpoints.folder}: holds checkpoints, but none with a trainer.pt to resume from; "
                "restore one, or start over in another output_dir"
            ]
        )
    problem = damage(latest) if latest == newest else "trainer.pt: missing"
    if problem is None:
        return latest
    resumable = [step for step in steps[:-1] if (checkpoints.path(step) / "trainer.pt").exists()]
    way_out = f"to resume from step {resumable[-1]}" if resumable else "and start over without resume=true"
    raise ConfigError([f"output_dir: {newest}: the newest checkpoint is damaged ({problem}); delete it {way_out}"])


def check_is_new(cfg: Resumable) -> None:
    """Raise ConfigError if the run does not resume, but its folder holds the checkpoints of an earlier one.

    ``tune run`` asks as well, before it starts processes: after a restart by torchrun they would resume.
    """
    if not cfg.resume and Checkpoints(Path(cfg.output_dir), keep_last=cfg.checkpoint.keep_last).steps():
        raise ConfigError(
            [
                f"output_dir: {cfg.output_dir}: holds the checkpoints of an earlier run; "
                "add resume=true to continue it, or choose another output_dir"
            ]
        )


def _check_unchanged(cfg: Resumable, checkpoints: Checkpoints) -> None:
    """Raise ConfigError unless the run was started with this config, but for what may change."""
    before = config.read_saved(checkpoints.output_dir)
    if before is None:
        raise ConfigError(
            [
                f"output_dir: {cfg.output_dir}: holds checkpoints, but no config.yaml to compare this config with; "
                "restore it, or start over in another output_dir"
            ]
        )
    now = config.masked(asdict(cfg))
    if others := before.keys() - now.keys():
        raise ConfigError(
            [
                f"output_dir: {cfg.output_dir}: holds the run of another recipe or version, whose config has "
                f"{', '.join(sorted(map(str, others)))}; choose another output_dir"
            ]
        )
    # A run may be older than a key. The key's default is what such a run did.
    before = config.masked(config.with_defaults(type(cfg), before))
    free = FREE_ON_RESUME | ({"num_steps"} if _is_longer(before, now) else set())
    changed = [
        f"{key}: {now[key]}: the run in {cfg.output_dir} was started with {before.get(key)}; {_advice(key, now)}"
        for key in now
        if key not in free and _fixed(before.get(key)) != _fixed(now[key])
    ]
    if changed:
        raise ConfigError(changed)


def _is_longer(before: dict[str, Any], now: dict[str, Any]) -> bool:
    """Whether a run of a constant learning rate gets more steps, which changes none of those that were taken."""
    steps = before.get("num_steps")
    return now["lr_scheduler"] is None and isinstance(steps, int) and now["num_steps"] > steps


def _advice(key: str, now: dict[str, Any]) -> str:
    if key == "num_steps" and now["lr_scheduler"] is not None:
        return "the schedule of the learning rate spans num_steps, so resume with the same value"
    if key == "num_steps":
        return "it may grow, but not shrink"
    return "resume with the same value, or choose another output_dir"


def _check_nothing_is_lost(cfg: Resumable, checkpoints: Checkpoints) -> None:
    """Raise ConfigError if a run in the folder had checkpoints; say so if its steps before the first one are lost."""
    if not (checkpoints.output_dir / "metrics.jsonl").is_file():
        return
    logged = max((int(record["step"] or 0) for record in read_metrics(checkpoints.output_dir)), default=0)
    before = config.read_saved(checkpoints.output_dir) or {}
    every = (before.get("checkpoint") or {}).get("every_n_steps", cfg.checkpoint.every_n_steps)
    if logged > every:
        raise ConfigError(
            [
                f"output_dir: {cfg.output_dir}: its metrics.jsonl has {logged} steps, but there is no checkpoint to "
                "resume from; restore one, or start over without resume=true"
            ]
        )
    if logged:
        print(f"resume: {cfg.output_dir} has no checkpoint yet; starting over, after {logged} steps", flush=True)


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


def open_log(
    cfg: Resumable,
    world: World,
    *,
    resume_step: int | None,
    token_text: Callable[[int], str | list[str]] | None = None,
) -> MetricsLog:
    """Open the metrics log on rank 0, and one that writes nothing on the others; arguments as in MetricsLog."""
    if not world.is_main:
        return MetricsLog.null()
    return MetricsLog(
        Path(cfg.output_dir),
        wandb=cfg.logging.wandb,
        wandb_project=cfg.logging.wandb_project,
        tensorboard=cfg.logging.tensorboard,
        config=config.masked(asdict(cfg)),
        resume_step=resume_step,
        token_text=token_text,
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
        weights = [parallel.local(parameter) for parameter in self.policy.trainable_parameters]
        (not_finite,) = self.world.max([float(not all(tensor.isfinite().all() for tensor in weights))])
        if not_finite:
            raise RunStopped(
                f"step {state.step}: the policy's weights are not finite and were not saved; lower optimizer.lr, and "
                f"start over\n  {self._kept()}"
            )
        is_best = score is not None and (state.best_score is None or score > state.best_score)
        if is_best:
            state = replace(state, best_score=score, best_step=state.step)
        if is_best or is_due:
            self._check_replicas(state)
            collected = self.policy.collect_weights(), self.optimization.state_dict()
            problem = self._write(state, *collected, is_best=is_best) if self.world.is_main else None
            if problems := self.world.gather([problem] if problem else []):
                raise RunStopped(f"step {state.step}: the checkpoint was not written: {problems[0]}\n  {self._kept()}")
        return state

    def _check_replicas(self, state: TrainState) -> None:
        """Stop before a checkpoint of weights that have become different on some rank."""
        if self.world.size > 1:
            try:
                agree(self.world, {"weights": self._checksum()})
            except ConfigError as error:
                raise RunStopped(
                    f"step {state.step}: the ranks' weights have drifted apart and were not saved: {error}\n"
                    f"  {self._kept()}"
                ) from error

    def _checksum(self) -> str:
        """Return the checksum of the copy of the weights that this rank has, or has a slice of."""
        own = weights_checksum(parallel.local(parameter) for parameter in self.policy.trainable_parameters)
        if self.policy.mesh is None:
            return own
        replica = parallel.replica(self.policy.mesh)
        slices = self.world.gather([(replica, own)])
        return " ".join(checksum for number, checksum in slices if number == replica)

    def _write(
        self, state: TrainState, weights: dict[str, Tensor] | None, optimization: dict, *, is_best: bool
    ) -> str | None:
        """Write a checkpoint; returns what went wrong, such as a full disk."""
        folder = self.checkpoints.folder
        try:
            check_room(
                folder, needed=tensor_bytes(optimization) + tensor_bytes(weights or self.policy.saved_parameters)
            )
            self.checkpoints.save(
                state,
                save_policy=lambda folder: self.policy.save(folder, self.tokenizer, weights),
                optimization=optimization,
                is_best=is_best,
            )
        except (OSError, SafetensorError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
            return f"{folder}: {getattr(error, 'strerror', None) or str(error).splitlines()[0]}"
        return None

    def _kept(self) -> str:
        """Say what there is to resume from."""
        steps = self.checkpoints.steps()
        if not steps:
            return "there is no checkpoint"
        return f"the last checkpoint is of step {steps[-1]}; continue with the same command and resume=true"

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
        raise RunStopped(f"step {state.step + 1}: {why}\n  {self._kept()}")


@contextmanager
def exclusive(output_dir: str, world: World, *, name: str = "run") -> Iterator[None]:
    """Let one run at a time write an output folder, or what is called ``name`` in it; all ranks call this.

    Raises:
        ConfigError: on all ranks, if another process writes the folder, or it cannot be written.
    """
    with ExitStack() as stack:
        with together(world):
            if world.is_main:
                stack.enter_context(take_lock(Path(output_dir) / name))
        yield


@contextmanager
def barrier_on_exit(world: World) -> Iterator[None]:
    """Let the ranks of a stopped run wait for each other, after everything else is closed.

    torchrun kills the remaining ranks as soon as one has left, and rank 0 may still be writing its logs.
    """
    try:
        yield
    except RankFailed:
        raise
    except STOPS:
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
