"""GRPO: sample groups of completions, score them, step on the group-relative advantage.

Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, eq. 3-4), outcome supervision:

  - kept: a group of completions for each prompt, the z-score of its rewards as advantage (no value model), the clipped
    ratio, and the k3 KL to a frozen reference inside the loss;
  - changed by config, one component each: the advantage (``rolltune.advantages``) and the objective
    (``rolltune.losses``), which together give Dr. GRPO, DAPO, GSPO, CISPO and RLOO;
  - dropped: refreshing the reference in mid-run, and process supervision;
  - old log-probs are the trainer's own, not the sampler's: where there is more than one update a step they are computed
    before the first, and where there is one the ratio is exactly 1. How far the sampler's are from them is measured
    (``rolltune.mismatch``) and can be corrected for, or bypassed, by one component (``rolltune.corrections``).

One process or many: every rank samples and trains on its share of the step's prompts, whole groups at a time;
denominators and metrics are global. All randomness comes from (seed, step, purpose), so a killed run resumes to the
same numbers.

    tune run grpo --config quickstart.yaml
    tune run --nproc_per_node 2 grpo --config quickstart.yaml
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rolltune import config
from rolltune.batch import count_totals, pack, train_group, without_zero_advantages
from rolltune.config.components import component, component_or_object, instantiate
from rolltune.config.schema import GRPOConfig
from rolltune.corrections import Bypass, Correction
from rolltune.data.dataset import ProblemStream
from rolltune.distributed import World, close_world, init_world
from rolltune.errors import EngineError, SyncError
from rolltune.eval.heldout import sample_greedy, score_heldout
from rolltune.metrics.curves import plot_curves
from rolltune.metrics.progress import Progress
from rolltune.metrics.step_metrics import rollout_metrics, update_metrics
from rolltune.metrics.summary import live_line, write_summary
from rolltune.metrics.timing import Phases, peak_memory_gib
from rolltune.mismatch import MismatchError, MismatchLimit
from rolltune.model.load import load_tokenizer
from rolltune.model.policy import Policy, build_policy
from rolltune.rollout import Rollout, check_versions, collect, is_trainable, sample_groups
from rolltune.run import build, checks, estimates, lifecycle
from rolltune.run.checkpoint import Checkpoints, TrainState, load_optimization, load_state
from rolltune.run.selftest import print_selftest, run_selftest
from rolltune.samplers import Sampler
from rolltune.seeding import derive_seed
from rolltune.types import Group, Loss, LossTotals, Problem, Prompt, SamplingParams
from rolltune.update import Optimization, prepare_microbatches, update_policy


@dataclass(frozen=True, kw_only=True)
class Components:
    """What the config names, built; nothing here changes during a run but the weights."""

    world: World
    policy: Policy
    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    stream: ProblemStream
    heldout: Sequence[Problem]
    render: Callable[[Problem], Prompt]
    rewards: build.Rewards
    advantage: Callable[[Sequence[float]], list[float]]
    loss: Loss
    correction: Correction | None
    mismatch: MismatchLimit | None
    optimization: Optimization


def run(cfg: GRPOConfig) -> None:
    """Train from the config to ``<output_dir>/summary.json``."""
    if cfg.dry_run:
        dry_run(cfg)
        return
    output_dir = Path(cfg.output_dir)
    world = init_world(cfg.device)
    checkpoints = Checkpoints(output_dir, keep_last=cfg.checkpoint.keep_last)
    resume_from = lifecycle.start(cfg, checkpoints, world)
    state = load_state(resume_from) if resume_from else TrainState()
    components = build_components(cfg, world, resume_from)
    components.policy.version = state.policy_version
    log = lifecycle.open_log(cfg, world, resume_step=state.step if resume_from else None)
    console = Console(quiet=not world.is_main)
    with (
        lifecycle.barrier_on_exit(world),
        closing(log),
        closing(components.rewards.pool),
        closing(components.sampler),
        Progress(cfg.num_steps, state.step, enabled=world.is_main) as progress,
        lifecycle.background_classifier(cfg.logging, log, world) as classify,
    ):
        if state.step == 0:
            log.log(0, evaluate(cfg, components, progress) | lifecycle.judge_metrics(components.rewards.pool, world))
        first_step = state.step + 1
        stop = partial(
            lifecycle.stop_early,
            cfg,
            components.policy,
            components.tokenizer,
            components.optimization,
            checkpoints,
            world,
        )
        for step in range(first_step, cfg.num_steps + 1):
            started = time.perf_counter()
            phases = Phases()
            is_last = step == cfg.num_steps
            try:
                rollout = sample(cfg, components, step, state.data_position, phases, progress)
                if why := lifecycle.why_stop(rollout, components.rewards.pool, cfg.batch.max_unscored, world):
                    stop(state, why)
                if step == first_step:
                    selftest(cfg, components, rollout, console, starts_as_reference=state.policy_version == 0)
                metrics, advantages = train(cfg, components, step, rollout, phases, progress)
                seconds = state.seconds + time.perf_counter() - started
                state = replace(
                    state,
                    step=step,
                    data_position=rollout.data_position,
                    policy_version=components.policy.version,
                    seconds=seconds,
                )
                if step % cfg.eval.every_n_steps == 0 or is_last:
                    metrics |= evaluate(cfg, components, progress)
            except (SyncError, EngineError, MismatchError) as error:  # no weight was stepped since ``state``
                if isinstance(error, EngineError) and world.size > 1:
                    raise  # this rank's alone: the others would not save with it
                stop(state, str(error))
            log.log(step, metrics | lifecycle.judge_metrics(components.rewards.pool, world))
            classify(rollout, step)
            if step % cfg.logging.samples_every_n_steps == 0:
                log.log_samples(step, rollout.sampled, advantages)
            progress.step(step, live_line(metrics))
            state = lifecycle.save(
                components.policy,
                components.tokenizer,
                components.optimization,
                checkpoints,
                state,
                world,
                score=lifecycle.heldout_score(metrics, max_unscored=cfg.batch.max_unscored, world=world),
                is_due=is_last or step % cfg.checkpoint.every_n_steps == 0,
            )
    if world.is_main:
        plot_curves(output_dir)
        write_summary(output_dir, console)
    close_world()


def dry_run(cfg: GRPOConfig) -> None:
    """Everything short of the weights: data, prompts and rewards are built; tokens and memory are estimated."""
    console = Console()
    tokenizer = load_tokenizer(cfg.model.path, cfg.prompt.chat_template)
    train, heldout = build.load_data(cfg.data, max_heldout=cfg.eval.max_problems)
    build.start_rewards(cfg, train, heldout, smoke_test=False)
    stream = ProblemStream(train, seed=cfg.seed)
    render = build.prompt_renderer(cfg.prompt, tokenizer)
    first = render(stream.take(0, 1)[0])
    console.print("first prompt:", Text(str(tokenizer.decode(list(first.token_ids))), style="dim"), sep="\n")
    longest = build.longest_prompt(stream, render)
    estimates.check_context(cfg.model, prompt_tokens=longest, max_new_tokens=cfg.sampling.max_new_tokens)
    rows = cfg.batch.prompts_per_step * cfg.sampling.group_size
    console.print(
        f"{len(train)} training problems, {len(heldout)} held out; prompts of {longest} tokens at most (of the first "
        f"256); {rows} completions a step, {rows * cfg.sampling.max_new_tokens} sampled tokens a step at most, "
        f"{cfg.num_steps * rows * cfg.sampling.max_new_tokens} in all"
    )
    engine = estimates.engine_memory(cfg.model, cfg.sampler)
    kv_tokens = min(rows, cfg.sampler.get("max_num_seqs", 64)) * (cfg.sampling.max_new_tokens + longest // 2)
    components = estimates.estimate_memory(
        cfg.model,
        cfg.lora,
        microbatch_tokens=cfg.batch.microbatch_tokens,
        kv_tokens=kv_tokens if engine is None else 0,
        with_reference=instantiate(cfg.loss).kl_coef > 0,
        rearranged_copy=engine is None and cfg.sampler.get("pack_weights", True) and not torch.cuda.is_available(),
    )
    estimates.print_memory(components | (engine or {}), console)
    console.print("dry run: everything resolves; nothing was loaded, nothing was written")


def build_components(cfg: GRPOConfig, world: World, resume_from: Path | None) -> Components:
    """Everything the loop uses, cheap things first, so that a mistake shows before weights are loaded."""
    tokenizer = load_tokenizer(cfg.model.path, cfg.prompt.chat_template)
    train, heldout = build.load_data(cfg.data, max_heldout=cfg.eval.max_problems)
    stream, render = ProblemStream(train, seed=cfg.seed), build.prompt_renderer(cfg.prompt, tokenizer)
    longest = build.longest_prompt(stream, render)
    estimates.check_context(cfg.model, prompt_tokens=longest, max_new_tokens=cfg.sampling.max_new_tokens)
    loss = instantiate(cfg.loss)
    rewards = build.start_rewards(cfg, train, heldout, smoke_test=True)
    policy = build_policy(
        cfg.model,
        cfg.lora,
        device=world.device,
        seed=cfg.seed,
        with_reference=loss.kl_coef > 0,
        resume_from=resume_from / "policy" if resume_from else None,
    )
    optimization = build.build_optimization(
        cfg, policy, num_updates=cfg.num_steps * cfg.batch.num_iterations * cfg.batch.minibatches
    )
    if resume_from:
        optimization.load_state_dict(load_optimization(resume_from, world.device))
    return Components(
        world=world,
        policy=policy,
        tokenizer=tokenizer,
        stream=stream,
        heldout=heldout,
        render=render,
        rewards=rewards,
        advantage=component(cfg.advantage),
        loss=loss,
        correction=component_or_object(cfg.correction) if cfg.correction else None,
        mismatch=instantiate(cfg.mismatch) if cfg.mismatch else None,
        optimization=optimization,
        sampler=build.start_sampler(cfg, policy, tokenizer, rewards, world),  # last: it may have a server to end
    )


def sample(
    cfg: GRPOConfig, components: Components, step: int, data_position: int, phases: Phases, progress: Progress
) -> Rollout:
    """This rank's groups of one step, written by the current weights."""
    with phases("sync"):
        components.sampler.sync(components.policy.version)
    params = build.sampling_params(cfg.sampling)

    training = components.rewards.training

    def sample_some(problems) -> list[Group]:
        return sample_groups(
            problems,
            render=components.render,
            sampler=components.sampler,
            begin_score=lambda problem, completion: partial(training.finish, training.begin(problem, completion)),
            params=params,
            group_size=cfg.sampling.group_size,
            seed=(cfg.seed, step),
            on_progress=progress.phase("sampling"),
        )

    with phases("sample"):
        rollout = collect(
            components.stream,
            data_position,
            components.world,
            sample_some,
            num_groups=cfg.batch.prompts_per_step,
            dynamic_rounds=cfg.batch.dynamic_sampling_rounds,
        )
    check_versions(
        (c for group in rollout.sampled for c in group.completions), components.policy.version, components.world
    )
    return rollout


def selftest(
    cfg: GRPOConfig, components: Components, rollout: Rollout, console: Console, *, starts_as_reference: bool
) -> None:
    """Check the gradient path on a group of the first batch; raises before anything is trained."""
    checks = run_selftest(
        components.policy,
        rollout.sampled,
        tokenizer=components.tokenizer,
        rewards=components.rewards.training.text_rewards,
        answer_format=cfg.answer_format,
        temperature=cfg.sampling.temperature,
        dtype=cfg.model.dtype,
        sampler_dtype=cfg.sampler.get("dtype"),
        with_reference=components.loss.kl_coef > 0,
        starts_as_reference=starts_as_reference,
    )
    print_selftest(checks, rollout.sampled[0], components.tokenizer, console)


def train(
    cfg: GRPOConfig, components: Components, step: int, rollout: Rollout, phases: Phases, progress: Progress
) -> tuple[dict[str, float], list[list[float] | None]]:
    """The optimizer steps on one rollout; returns the step's metrics and each sampled group's advantages."""
    world, policy = components.world, components.policy
    torch.manual_seed(derive_seed(cfg.seed, step, world.rank, "dropout"))
    groups = {number: group.scored() for number, group in rollout.kept.items() if is_trainable(group)}
    advantages = {number: components.advantage(group.rewards) for number, group in groups.items()}
    trained = {number: train_group(group, advantages[number]) for number, group in groups.items()}
    num_updates = cfg.batch.num_iterations * cfg.batch.minibatches
    with_reference = components.loss.kl_coef > 0
    device = world.device

    minibatches = []
    with phases("prepare"):
        for m in range(cfg.batch.minibatches):
            mine = [g for number, g in trained.items() if number * cfg.batch.minibatches // rollout.num_kept == m]
            totals = count_totals(mine)
            tokens, sequences = world.sum([totals.tokens, totals.sequences])
            kept = mine if with_reference else without_zero_advantages(mine)
            rows = prepare_microbatches(
                policy,
                pack(kept, max_tokens=cfg.batch.microbatch_tokens, device=device),
                temperature=cfg.sampling.temperature,
                with_old=num_updates > 1 and not isinstance(components.correction, Bypass),
                with_reference=with_reference,
            )
            minibatches.append((rows, LossTotals(tokens=int(tokens), sequences=int(sequences))))

    updates = []
    with phases("train"):
        for _ in range(cfg.batch.num_iterations):
            for rows, totals in minibatches:
                updates.append(
                    update_policy(
                        policy,
                        rows,
                        components.loss,
                        totals,
                        components.optimization,
                        world,
                        temperature=cfg.sampling.temperature,
                        correction=components.correction,
                        limit=None if updates else components.mismatch,
                        on_microbatch=progress.phase("training"),
                    )
                )
    metrics = rollout_metrics(rollout, world) | update_metrics(updates)
    sampled_tokens, trained_tokens = world.sum(
        [
            sum(len(c.token_ids) for group in rollout.sampled for c in group.completions),
            sum(len(row.microbatch.input_ids) for rows, _ in minibatches for row in rows) * cfg.batch.num_iterations,
        ]
    )
    metrics |= phases.metrics(sample=sampled_tokens, train=trained_tokens) | {"memory/peak_gib": peak_memory_gib()}
    by_problem = {id(group): advantages.get(number) for number, group in rollout.kept.items()}
    return metrics, [by_problem.get(id(group)) for group in rollout.sampled]


def evaluate(cfg: GRPOConfig, components: Components, progress: Progress) -> dict[str, float]:
    """Greedy accuracy on the held-out problems with the current weights, and the gold check of the same turns."""
    components.sampler.sync(components.policy.version)
    params = SamplingParams(
        temperature=0.0,
        max_new_tokens=cfg.eval.max_new_tokens or cfg.sampling.max_new_tokens,
        stop=tuple(cfg.sampling.stop),
    )
    turns = sample_greedy(
        components.heldout,
        render=components.render,
        sampler=components.sampler,
        params=params,
        world=components.world,
        on_progress=progress.phase("evaluating"),
    )
    check_versions((completion for _, completion in turns), components.policy.version, components.world)
    metrics = score_heldout(turns, reward=components.rewards.heldout, world=components.world)
    return metrics | lifecycle.check_overoptimization(
        components.rewards.overoptimization, turns, Path(cfg.output_dir), components.world
    )


if __name__ == "__main__":
    config.main(GRPOConfig, run, check=checks.check_grpo)
