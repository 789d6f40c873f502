"""GRPO: sample groups of completions, score them, step on the group-relative advantage.

Group Relative Policy Optimization (DeepSeekMath, arXiv 2402.03300, eq. 3-4), outcome supervision:

  - kept: a group of completions per prompt, the z-score of its rewards as advantage (no value model), the clipped
    ratio, and the k3 KL to a frozen reference inside the loss;
  - changed by config, one component each: the advantage (``rolltune.advantages``) and the objective
    (``rolltune.losses``), which together give Dr. GRPO, DAPO, GSPO, CISPO and RLOO;
  - dropped: refreshing the reference during the run, and process supervision;
  - the old policy is the trainer's, not the sampler's: with several updates per step its log-probs are computed before
    the first update, and with a single update the ratio is exactly 1. The mismatch between sampler and trainer is
    measured (``rolltune.mismatch``) and can be corrected for (``rolltune.corrections``); ``old_policy: sampler`` takes
    the ratio to the sampler instead.

One process or many: every rank samples and trains its share of the step's prompts, whole groups at a time; denominators
and metrics are global. All randomness comes from (seed, step, purpose), so a killed run resumes to the same numbers.

    tune run grpo --config quickstart.yaml
    tune run --nproc_per_node 2 grpo --config quickstart.yaml
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rolltune import config
from rolltune.balance import balance, imbalance
from rolltune.batch import count_totals, pack, train_group, without_zero_advantages
from rolltune.config.components import component, component_or_object, instantiate
from rolltune.config.schema import GRPOConfig
from rolltune.corrections import Correction
from rolltune.data.dataset import ProblemStream
from rolltune.distributed import World, joined_world
from rolltune.errors import EngineError, StopRequested, SyncError
from rolltune.eval.heldout import sample_greedy, score_heldout
from rolltune.metrics.curves import plot_curves
from rolltune.metrics.progress import Progress
from rolltune.metrics.step_metrics import rollout_metrics, update_metrics
from rolltune.metrics.summary import live_line, write_summary
from rolltune.metrics.timing import Phases, peak_memory_gib
from rolltune.mismatch import MismatchError, MismatchLimit, TokenGaps
from rolltune.model.load import load_tokenizer
from rolltune.model.policy import Policy, build_policy
from rolltune.prompts import PromptRenderer, check_visible
from rolltune.report import report_on_exit, try_report
from rolltune.rewards.combine import format_counts
from rolltune.rollout import Advantage, Rollout, check_versions, collect, sample_groups, score_groups
from rolltune.run import build, checks, estimates, lengths, lifecycle, notices
from rolltune.run.agreement import agree_on_data, agree_on_run, agree_on_weights, together
from rolltune.run.checkpoint import Checkpoints, TrainState, load_optimization, load_state
from rolltune.run.selftest import print_selftest, run_selftest
from rolltune.run.watch import Watch, watch
from rolltune.samplers import Sampler
from rolltune.samplers.generation import PromptTooLong, split_stop
from rolltune.seeding import derive_seed
from rolltune.terminal import printable
from rolltune.types import Group, Loss, LossTotals, Problem, SamplingParams
from rolltune.update import OldPolicy, Optimization, PreparedMicrobatch, prepare_microbatches, update_policy

# Errors of a step that come while the weights are still those of the last one.
LEAVES_THE_WEIGHTS = (SyncError, EngineError, MismatchError, PromptTooLong, StopRequested)


@dataclass(frozen=True, kw_only=True)
class Components:
    """The components that the config names, built. Only the weights change during a run."""

    world: World
    policy: Policy
    sampler: Sampler
    tokenizer: PreTrainedTokenizerBase
    stream: ProblemStream
    heldout: Sequence[Problem]
    render: PromptRenderer
    rewards: build.Rewards
    advantage: Advantage
    loss: Loss
    old_policy: OldPolicy
    correction: Correction | None
    mismatch: MismatchLimit | None
    optimization: Optimization


def run(cfg: GRPOConfig) -> None:
    """Run the training that the config describes, and write ``<output_dir>/summary.json``."""
    if cfg.dry_run:
        dry_run(cfg)
        return
    with (
        joined_world(cfg.device, stall_seconds=cfg.stall_seconds, cpu_offload=cfg.parallel.cpu_offload) as world,
        watch(
            world, stall_seconds=cfg.stall_seconds, grace_seconds=cfg.grace_seconds, output_dir=cfg.output_dir
        ) as watching,
        lifecycle.exclusive(cfg.output_dir, world),
    ):
        run_steps(cfg, world, watching)


def run_steps(cfg: GRPOConfig, world: World, watching: Watch) -> None:
    """Set up or resume, take the steps, and write curves and summary."""
    output_dir = Path(cfg.output_dir)
    checkpoints = Checkpoints(output_dir, keep_last=cfg.checkpoint.keep_last)
    agree_on_run(cfg, world)
    resume_from = lifecycle.start(cfg, checkpoints, world)
    state = load_state(resume_from) if resume_from else TrainState()
    components = set_up(cfg, world, resume_from)
    policy, rewards = components.policy, components.rewards
    policy.version = state.policy_version
    saver = lifecycle.Saver(
        policy=policy,
        tokenizer=components.tokenizer,
        optimization=components.optimization,
        checkpoints=checkpoints,
        world=world,
    )
    with together(world):
        resume_step = state.step if resume_from else None
        log = lifecycle.open_log(cfg, world, resume_step=resume_step, token_text=components.tokenizer.decode)
    console = Console(quiet=not world.is_main)
    with (
        lifecycle.barrier_on_exit(world),
        report_on_exit(output_dir, is_main=world.is_main),
        closing(log),
        closing(rewards.pool),
        closing(components.sampler),
        Progress(cfg.num_steps, state.step, enabled=world.is_main, on_move=watching.beat) as progress,
    ):
        if state.step == 0:
            log.log(0, evaluate(cfg, components, progress) | lifecycle.judge_costs(rewards.pool, world))
        first_step, signal = state.step + 1, notices.SignalWatch()
        for step in range(first_step, cfg.num_steps + 1):
            watching.step = state.step
            if why := watching.stop_requested():
                saver.stop(state, why)
            started = time.perf_counter()
            phases = Phases()
            is_last = step == cfg.num_steps
            try:
                rollout = sample(cfg, components, step, state.data_position, phases, progress)
                if why := lifecycle.unscored_problem(rollout, rewards.pool.stop_reason, cfg.batch.max_unscored, world):
                    saver.stop(state, why)
                if step == first_step:
                    selftest(cfg, components, rollout, console, starts_as_reference=state.policy_version == 0)
                gaps = TokenGaps() if world.is_main and step % cfg.logging.samples_every_n_steps == 0 else None
                metrics = train(cfg, components, step, rollout, phases, progress, gaps)
                state = replace(
                    state,
                    step=step,
                    data_position=rollout.data_position,
                    policy_version=policy.version,
                    seconds=state.seconds + time.perf_counter() - started,
                )
                if step % cfg.eval.every_n_steps == 0 or is_last:
                    try:
                        metrics |= evaluate(cfg, components, progress)
                    except LEAVES_THE_WEIGHTS:
                        log.log(step, metrics)  # the step is taken, and saved below
                        raise
            except LEAVES_THE_WEIGHTS as error:
                saver.stop(state, str(error))
            except FloatingPointError as error:  # earlier updates of the step may have been taken
                saver.stop_without_saving(state, str(error))
            log.log(step, metrics | lifecycle.judge_costs(rewards.pool, world))
            if gaps is not None:
                log.log_samples(step, rollout.sampled, [sampled.advantages for sampled in rollout.groups], gaps.of)
            if world.is_main and "heldout/format" in metrics:  # the step was evaluated
                try_report(output_dir)
            progress.step(step, live_line(metrics))
            notices.show(signal.after(metrics), is_main=world.is_main)
            state = saver.save(
                state,
                score=lifecycle.best_score(metrics, max_unscored=cfg.batch.max_unscored, world=world),
                is_due=is_last or step % cfg.checkpoint.every_n_steps == 0,
            )
    if world.is_main:
        plot_curves(output_dir)
        write_summary(output_dir, console)


def dry_run(cfg: GRPOConfig) -> None:
    """Check a run without loading weights: build data, prompts and rewards, estimate tokens and memory."""
    console = Console()
    tokenizer = load_tokenizer(cfg.model.path, cfg.prompt.chat_template)
    train_set, heldout = build.load_data(cfg.data, max_heldout=cfg.eval.max_problems)
    notices.show(about_data(cfg, train_set, heldout))
    rewards = build.start_rewards(cfg, train_set, heldout, smoke_test=False)
    rewards.pool.close()
    for name, kinds in rewards.training.gold_kinds("rewards", train_set).items():
        console.print(f"gold answers of {name}: {format_counts(kinds)}")
    render = build.prompt_renderer(cfg.prompt, tokenizer)
    check_texts(cfg, tokenizer)
    notices.show(notices.about_prompts(render))
    train_set, heldout, longest = lengths.fitting_prompts(cfg, train_set, heldout, render)
    first = render(ProblemStream(train_set, seed=cfg.seed).take(0, 1)[0])
    console.print("first prompt:", Text(printable(str(tokenizer.decode(list(first.token_ids)))), style="dim"), sep="\n")
    completions = cfg.batch.prompts_per_step * cfg.sampling.group_size
    tokens = completions * cfg.sampling.max_new_tokens
    console.print(
        f"{len(train_set)} training problems, {len(heldout)} held out; the longest prompt has {longest} "
        f"tokens; {completions} completions per step, at most {tokens} sampled tokens per step and "
        f"{cfg.num_steps * tokens} in all"
    )
    engine = estimates.engine_memory(cfg.model, cfg.sampler)
    kv_tokens = min(completions, cfg.sampler.get("max_num_seqs", 64)) * (cfg.sampling.max_new_tokens + longest // 2)
    memory = estimates.estimate_memory(
        cfg.model,
        cfg.lora,
        microbatch_tokens=cfg.batch.microbatch_tokens,
        kv_tokens=kv_tokens if engine is None else 0,
        with_reference=instantiate(cfg.loss).kl_coef > 0,
        rearranged_copy=engine is None and cfg.sampler.get("pack_weights", True) and not torch.cuda.is_available(),
        optimizer=cfg.optimizer["_component_"],
    )
    estimates.check_disk(cfg)
    estimates.print_memory(memory | (engine or {}), console)
    console.print("dry run: the config is complete and valid; no weights were loaded and nothing was written")


def set_up(cfg: GRPOConfig, world: World, resume_from: Path | None) -> Components:
    """Build everything that the loop uses, cheap things first, so that a mistake shows before weights are loaded."""
    with together(world):
        tokenizer = load_tokenizer(cfg.model.path, cfg.prompt.chat_template)
        train_set, heldout = build.load_data(cfg.data, max_heldout=cfg.eval.max_problems)
        notices.show(about_data(cfg, train_set, heldout), is_main=world.is_main)
        render = build.prompt_renderer(cfg.prompt, tokenizer)
        check_texts(cfg, tokenizer)
        notices.show(notices.about_prompts(render), is_main=world.is_main)
        train_set, heldout, _ = lengths.fitting_prompts(cfg, train_set, heldout, render, quiet=not world.is_main)
        loss = instantiate(cfg.loss)
        rewards = build.start_rewards(cfg, train_set, heldout, smoke_test=True)
        estimates.check_disk(cfg)
    agree_on_data({"data.train": train_set, "data.heldout": heldout}, world)
    with together(world):
        policy = build_policy(
            cfg.model,
            cfg.lora,
            device=world.device,
            seed=cfg.seed,
            with_reference=loss.kl_coef > 0,
            resume_from=resume_from / "policy" if resume_from else None,
            hollow=cfg.parallel.weights == "fsdp",
        )
    agree_on_weights("model.path", policy.model, world)
    build.distribute(cfg, policy, world)
    with together(world):
        updates_per_step = cfg.batch.num_iterations * cfg.batch.minibatches
        own_ratio = updates_per_step > 1 or policy.has_dropout  # later updates, and those with dropout, are off-policy
        optimization = build.build_optimization(cfg, policy, num_updates=cfg.num_steps * updates_per_step)
        if resume_from:
            optimization.load_state_dict(load_optimization(resume_from))
    notices.show(policy.notes, is_main=world.is_main)
    return Components(
        world=world,
        policy=policy,
        tokenizer=tokenizer,
        stream=ProblemStream(train_set, seed=cfg.seed),
        heldout=heldout,
        render=render,
        rewards=rewards,
        advantage=component(cfg.advantage),
        loss=loss,
        old_policy="sampler" if cfg.old_policy == "sampler" else "trainer" if own_ratio else "current",
        correction=component_or_object(cfg.correction) if cfg.correction else None,
        mismatch=instantiate(cfg.mismatch) if cfg.mismatch else None,
        optimization=optimization,
        sampler=build.start_sampler(cfg, policy, tokenizer, rewards, world),  # last: it may start a server
    )


def about_data(cfg: GRPOConfig, train_set: Sequence[Problem], heldout: Sequence[Problem]) -> Iterator[str]:
    """Yield what is unusual in the data."""
    return notices.about_data(
        train_set,
        heldout,
        max_heldout=cfg.eval.max_problems,
        per_step=cfg.batch.prompts_per_step,
        key="batch.prompts_per_step",
    )


def check_texts(cfg: GRPOConfig, tokenizer: PreTrainedTokenizerBase) -> None:
    """Reject tags and stop strings that the text of a response cannot hold, as they are special tokens."""
    check_visible(cfg.answer_format, tokenizer, "answer_format")
    check_visible(cfg.prompt.prefill, tokenizer, "prompt.prefill")
    split_stop(cfg.sampling.stop, tokenizer)


def sample(
    cfg: GRPOConfig, components: Components, step: int, data_position: int, phases: Phases, progress: Progress
) -> Rollout:
    """Sample this rank's groups of one step with the current weights, and score them."""
    reward, params = components.rewards.training, cfg.sampling.params()

    def sample_and_score(problems: Sequence[Problem]) -> list[Group]:
        with together(components.world):
            pending = sample_groups(
                problems,
                render=components.render,
                sampler=components.sampler,
                reward=reward,
                params=params,
                group_size=cfg.sampling.group_size,
                seed=(cfg.seed, step),
                on_progress=progress.phase("sampling"),
            )
            return score_groups(pending, reward)

    with components.policy.gathered():
        with phases("sync"):
            components.sampler.sync(components.policy.version)
        with phases("sample"):
            rollout = collect(
                components.stream,
                data_position,
                components.world,
                sample_and_score,
                advantage=components.advantage,
                num_groups=cfg.batch.prompts_per_step,
                dynamic_rounds=cfg.batch.dynamic_sampling_rounds,
            )
    completions = (completion for group in rollout.sampled for completion in group.completions)
    check_versions(completions, components.policy.version, components.world)
    return rollout


def selftest(
    cfg: GRPOConfig, components: Components, rollout: Rollout, console: Console, *, starts_as_reference: bool
) -> None:
    """Check the gradient path on the first batch; raises before anything is trained."""
    with_reference = components.loss.kl_coef > 0
    with components.policy.gathered(with_reference=with_reference), together(components.world):
        results = run_selftest(
            components.policy,
            rollout.sampled,
            tokenizer=components.tokenizer,
            rewards=components.rewards.training.text_rewards,
            answer_format=cfg.answer_format,
            temperature=cfg.sampling.temperature,
            dtype=cfg.model.dtype,
            sampler_dtype=cfg.sampler.get("dtype"),
            with_reference=with_reference,
            starts_as_reference=starts_as_reference,
        )
        shown = rollout.sampled[0]
        print_selftest(results, shown.prompt, shown.completions[0].token_ids, components.tokenizer, console)


def train(
    cfg: GRPOConfig,
    components: Components,
    step: int,
    rollout: Rollout,
    phases: Phases,
    progress: Progress,
    gaps: TokenGaps | None,
) -> dict[str, float]:
    """Take the optimizer steps on one rollout, and note each token's mismatch; returns the metrics of the step."""
    world = components.world
    torch.manual_seed(derive_seed(cfg.seed, step, world.rank, "dropout"))
    with phases("prepare"):
        minibatches = [prepare(cfg, components, rollout, index) for index in range(cfg.batch.minibatches)]
    updates, version = [], components.policy.version
    with phases("train"):
        for _ in range(cfg.batch.num_iterations):
            for microbatches, totals in minibatches:
                has_sampled = components.policy.version == version
                updates.append(
                    update_policy(
                        components.policy,
                        microbatches,
                        components.loss,
                        totals,
                        components.optimization,
                        world,
                        temperature=cfg.sampling.temperature,
                        correction=components.correction,
                        limit=components.mismatch if has_sampled else None,
                        gaps=gaps if has_sampled else None,
                        on_microbatch=progress.phase("training"),
                    )
                )
    own_tokens = sum(len(m.microbatch.input_ids) for microbatches, _ in minibatches for m in microbatches)
    sampled_tokens, packed_tokens = world.sum(
        [sum(len(completion.token_ids) for group in rollout.sampled for completion in group.completions), own_tokens]
    )
    return (
        rollout_metrics(rollout, world)
        | update_metrics(updates)
        | phases.metrics(sample=sampled_tokens, train=packed_tokens * cfg.batch.num_iterations)
        | {"memory/peak_gib": peak_memory_gib(), "imbalance/train": imbalance(own_tokens, packed_tokens, world)}
    )


def prepare(
    cfg: GRPOConfig, components: Components, rollout: Rollout, index: int
) -> tuple[list[PreparedMicrobatch], LossTotals]:
    """Pack a minibatch and compute its fixed log-probs; returns it with the global denominators of its loss."""
    world, with_reference = components.world, components.loss.kl_coef > 0
    groups = [
        train_group(group, advantages, mask_truncated=cfg.batch.mask_truncated)
        for group, advantages in rollout.minibatch(index, cfg.batch.minibatches)
    ]
    totals = count_totals(groups)
    tokens, sequences = world.sum([totals.tokens, totals.sequences])
    if not with_reference:
        groups = without_zero_advantages(groups)
    microbatches = prepare_microbatches(
        components.policy,
        pack(balance(groups, world), max_tokens=cfg.batch.microbatch_tokens, device=world.device),
        temperature=cfg.sampling.temperature,
        old_policy=components.old_policy,
        with_reference=with_reference,
    )
    return microbatches, LossTotals(tokens=int(tokens), sequences=int(sequences))


def evaluate(cfg: GRPOConfig, components: Components, progress: Progress) -> dict[str, float]:
    """Measure greedy accuracy on the held-out problems, and compare judges with the gold measure if there is one."""
    world, rewards = components.world, components.rewards
    with components.policy.gathered():  # judges may be the policy as well
        components.sampler.sync(components.policy.version)
        with together(world):
            responses = sample_greedy(
                components.heldout,
                render=components.render,
                sampler=components.sampler,
                params=SamplingParams(
                    temperature=0.0,
                    max_new_tokens=cfg.eval.max_new_tokens or cfg.sampling.max_new_tokens,
                    stop=tuple(cfg.sampling.stop),
                ),
                world=world,
                on_progress=progress.phase("evaluating"),
            )
        check_versions((completion for _, completion in responses), components.policy.version, world)
        metrics = score_heldout(responses, reward=rewards.heldout, world=world)
        if rewards.overoptimization is not None:
            reading = rewards.overoptimization.measure(responses, output_dir=Path(cfg.output_dir), world=world)
            metrics |= reading.metrics
            if reading.warning and world.is_main:
                print(reading.warning, flush=True)
    return metrics


if __name__ == "__main__":
    config.main(GRPOConfig, run, check=checks.check_grpo)
