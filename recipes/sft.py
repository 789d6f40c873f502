"""SFT: supervised fine-tuning on worked responses, before RL.

A base model often has the ability but not the form: if it never writes the tags that a reward looks for, every group
scores the same and RL has nothing to learn from. A few hundred worked responses change that.

  - the response is ``answer_format``, filled with each problem's own solution and answer;
  - the loss is the negative log-likelihood of the response tokens, EOS included; the prompt is context;
  - examples are packed without padding and never see each other; [tokens, vocabulary] logits never exist as a whole;
  - the checkpoint with the lowest held-out loss is ``<output_dir>/best``, which ``grpo`` starts from directly
    (``model.path=<output_dir>/best``).

    tune run sft --config quickstart_sft.yaml
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
from rolltune.batch import TokenSequence, TrainGroup, count_totals, pack_examples
from rolltune.config.schema import SFTConfig
from rolltune.data.dataset import ProblemStream
from rolltune.distributed import World, joined_world
from rolltune.losses.nll import nll_loss
from rolltune.metrics.progress import Progress
from rolltune.metrics.timing import Phases, peak_memory_gib
from rolltune.model.load import load_tokenizer
from rolltune.model.policy import Policy, build_policy
from rolltune.prompts import PromptRenderer, check_visible, completion_ids, worked_response
from rolltune.report import report_on_exit, try_report
from rolltune.run import build, checks, estimates, lengths, lifecycle, notices
from rolltune.run.agreement import agree_on_data, agree_on_run, agree_on_weights, together
from rolltune.run.checkpoint import Checkpoints, TrainState, load_optimization, load_state
from rolltune.run.selftest import print_selftest, run_sft_selftest
from rolltune.run.watch import Watch, watch
from rolltune.seeding import derive_seed
from rolltune.terminal import printable
from rolltune.types import LossTotals, Problem
from rolltune.update import Optimization

Example = TrainGroup[TokenSequence]  # a prompt and its response


@dataclass(frozen=True, kw_only=True)
class Components:
    """The components that the config names, built. Only the weights change during a run."""

    world: World
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    stream: ProblemStream
    heldout: Sequence[Problem]
    render: PromptRenderer
    optimization: Optimization


def run(cfg: SFTConfig) -> None:
    """Run the training that the config describes, and write ``<output_dir>/best``."""
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


def run_steps(cfg: SFTConfig, world: World, watching: Watch) -> None:
    """Set up or resume, and take the steps."""
    output_dir = Path(cfg.output_dir)
    checkpoints = Checkpoints(output_dir, keep_last=cfg.checkpoint.keep_last)
    agree_on_run(cfg, world)
    resume_from = lifecycle.start(cfg, checkpoints, world)
    state = load_state(resume_from) if resume_from else TrainState()
    components = set_up(cfg, world, resume_from)
    components.policy.version = state.policy_version
    saver = lifecycle.Saver(
        policy=components.policy,
        tokenizer=components.tokenizer,
        optimization=components.optimization,
        checkpoints=checkpoints,
        world=world,
    )
    with together(world):
        log = lifecycle.open_log(cfg, world, resume_step=state.step if resume_from else None)
    with (
        lifecycle.barrier_on_exit(world),
        report_on_exit(output_dir, is_main=world.is_main),
        closing(log),
        Progress(cfg.num_steps, state.step, enabled=world.is_main, on_move=watching.beat) as progress,
    ):
        selftest(cfg, components, state.data_position, Console(quiet=not world.is_main))
        if state.step == 0:
            log.log(0, {"heldout/loss": heldout_loss(cfg, components, progress)})
        for step in range(state.step + 1, cfg.num_steps + 1):
            watching.step = state.step
            if why := watching.stop_requested():
                saver.stop(state, why)
            started = time.perf_counter()
            try:
                metrics = train(cfg, components, step, state.data_position, progress)
            except FloatingPointError as error:  # the weights are still those of ``state``
                saver.stop(state, str(error))
            is_last = step == cfg.num_steps
            if step % cfg.eval.every_n_steps == 0 or is_last:
                metrics["heldout/loss"] = heldout_loss(cfg, components, progress)
            log.log(step, metrics)
            if world.is_main and "heldout/loss" in metrics:
                try_report(output_dir)
            progress.step(step, {name: metrics[name] for name in ("loss", "heldout/loss") if name in metrics})
            state = replace(
                state,
                step=step,
                data_position=state.data_position + cfg.batch.examples_per_step,
                policy_version=components.policy.version,
                seconds=state.seconds + time.perf_counter() - started,
            )
            state = saver.save(
                state,
                score=-metrics["heldout/loss"] if "heldout/loss" in metrics else None,
                is_due=is_last or step % cfg.checkpoint.every_n_steps == 0,
            )
    if world.is_main:
        Console().print(f"{cfg.num_steps} steps in {state.seconds / 60:.1f} minutes; weights: {output_dir / 'best'}")


def dry_run(cfg: SFTConfig) -> None:
    """Check a run without loading weights: build data and responses, estimate tokens and memory."""
    console = Console()
    tokenizer = load_tokenizer(cfg.model.path, cfg.prompt.chat_template)
    train_set, heldout = build.load_data(cfg.data, max_heldout=cfg.eval.max_problems)
    notices.show(about_data(cfg, train_set, heldout))
    render = build.prompt_renderer(cfg.prompt, tokenizer)
    notices.show(notices.about_prompts(render))
    train_set, heldout = fitting_examples(cfg, train_set, heldout, render, tokenizer)
    examples = [
        example(cfg, problem, render, tokenizer)
        for problem in ProblemStream(train_set, seed=cfg.seed).take(0, min(256, len(train_set)))
    ]
    prompt, response = examples[0].prompt.token_ids, examples[0].sequences[0].token_ids
    console.print(
        "first example, trained tokens in green:\n",
        Text.assemble(
            (printable(str(tokenizer.decode(list(prompt)))), "dim"),
            (printable(str(tokenizer.decode(list(response)))), "green"),
        ),
    )
    longest = max(len(e.prompt.token_ids) for e in examples), max(len(e.sequences[0].token_ids) for e in examples)
    console.print(
        f"{len(train_set)} examples, {len(heldout)} held out; {cfg.num_steps * cfg.batch.examples_per_step} are "
        f"trained on; the longest prompt has {longest[0]} tokens and the longest response {longest[1]} (of "
        f"{len(examples)})"
    )
    memory = estimates.estimate_memory(
        cfg.model,
        cfg.lora,
        microbatch_tokens=cfg.batch.microbatch_tokens,
        kv_tokens=0,
        with_reference=False,
        optimizer=cfg.optimizer["_component_"],
    )
    estimates.check_disk(cfg)
    estimates.print_memory(memory, console)
    console.print("dry run: the config is complete and valid; no weights were loaded and nothing was written")


def set_up(cfg: SFTConfig, world: World, resume_from: Path | None) -> Components:
    """Build everything that the loop uses, cheap things first, so that a mistake shows before weights are loaded."""
    with together(world):
        tokenizer = load_tokenizer(cfg.model.path, cfg.prompt.chat_template)
        train_set, heldout = build.load_data(cfg.data, max_heldout=cfg.eval.max_problems)
        notices.show(about_data(cfg, train_set, heldout), is_main=world.is_main)
        render = build.prompt_renderer(cfg.prompt, tokenizer)
        quiet = not world.is_main
        notices.show(notices.about_prompts(render), is_main=world.is_main)
        train_set, heldout = fitting_examples(cfg, train_set, heldout, render, tokenizer, quiet=quiet)
        estimates.check_disk(cfg)
    agree_on_data({"data.train": train_set, "data.heldout": heldout}, world)
    with together(world):
        policy = build_policy(
            cfg.model,
            cfg.lora,
            device=world.device,
            seed=cfg.seed,
            with_reference=False,
            resume_from=resume_from / "policy" if resume_from else None,
            hollow=cfg.parallel.weights == "fsdp",
        )
    agree_on_weights("model.path", policy.model, world)
    build.distribute(cfg, policy, world)
    with together(world):
        optimization = build.build_optimization(cfg, policy, num_updates=cfg.num_steps)
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
        optimization=optimization,
    )


def about_data(cfg: SFTConfig, train_set: Sequence[Problem], heldout: Sequence[Problem]) -> Iterator[str]:
    """Yield what is unusual in the data."""
    per_step = cfg.batch.examples_per_step
    yield from notices.about_data(
        train_set, heldout, max_heldout=cfg.eval.max_problems, per_step=per_step, key="batch.examples_per_step"
    )
    yield from notices.about_epochs(len(train_set), cfg.num_steps * per_step)


def example(cfg: SFTConfig, problem: Problem, render: PromptRenderer, tokenizer: PreTrainedTokenizerBase) -> Example:
    """Turn a problem into its prompt and the response to train on."""
    prompt = render(problem)
    token_ids = completion_ids(worked_response(problem, cfg.answer_format), prompt, tokenizer)
    return TrainGroup(prompt=prompt, sequences=(TokenSequence(token_ids=token_ids),))


def fitting_examples(
    cfg: SFTConfig,
    train_set: Sequence[Problem],
    heldout: Sequence[Problem],
    render: PromptRenderer,
    tokenizer: PreTrainedTokenizerBase,
    *,
    quiet: bool = False,
) -> list[Sequence[Problem]]:
    """Refuse or drop training and held-out examples that exceed the model's context, before weights are loaded."""
    check_visible(cfg.answer_format, tokenizer, "answer_format")
    sets = []
    for key, problems in (("data.train", train_set), ("data.heldout", heldout)):
        prompts = render.many(problems)
        responses = (
            completion_ids(worked_response(p, cfg.answer_format), q, tokenizer)
            for p, q in zip(problems, prompts, strict=True)
        )
        sets.append((key, problems, [len(q.token_ids) + len(ids) for q, ids in zip(prompts, responses, strict=True)]))
    limit = lengths.sequence_limit(cfg.model)
    return lengths.fitting_data(cfg, limit, sets, parts="prompt and response", quiet=quiet)


def selftest(cfg: SFTConfig, components: Components, data_position: int, console: Console) -> None:
    """Check the gradient path on the first batch; raises before anything is trained."""
    tokenizer = components.tokenizer
    problems = components.world.shard(components.stream.take(data_position, cfg.batch.examples_per_step))
    examples = [example(cfg, problem, components.render, tokenizer) for problem in problems]
    responses = [worked_response(problem, cfg.answer_format) for problem in problems]
    with components.policy.gathered(), together(components.world):
        results = run_sft_selftest(components.policy, examples, responses=responses, tokenizer=tokenizer)
        print_selftest(results, examples[0].prompt, examples[0].sequences[0].token_ids, tokenizer, console)


def train(
    cfg: SFTConfig, components: Components, step: int, data_position: int, progress: Progress
) -> dict[str, float]:
    """Take one optimizer step on the next examples; returns the metrics of the step."""
    world, policy, phases = components.world, components.policy, Phases()
    torch.manual_seed(derive_seed(cfg.seed, step, world.rank, "dropout"))
    problems = world.shard(components.stream.take(data_position, cfg.batch.examples_per_step))
    examples = [example(cfg, problem, components.render, components.tokenizer) for problem in problems]
    counted = count_totals(examples)
    tokens, sequences = world.sum([counted.tokens, counted.sequences])
    totals = LossTotals(tokens=int(tokens), sequences=int(sequences))
    loss_sum, entropy_sum, router_sum, packed_tokens = 0.0, 0.0, 0.0, 0
    with phases("train"), policy.with_dropout():
        microbatches = pack_examples(
            balance(examples, world), max_tokens=cfg.batch.microbatch_tokens, device=world.device
        )
        on_progress = progress.phase("training")
        idle = policy.idle_microbatches("train", len(microbatches))
        for done, microbatch in enumerate(microbatches, start=1):
            logprobs, entropy, router_loss = policy.trained_logprobs(microbatch, temperature=1.0)
            loss = nll_loss(logprobs, totals)
            if router_loss is None:
                components.optimization.backward(loss)
            else:
                share = len(logprobs) / totals.tokens
                components.optimization.backward(loss + policy.router_aux_loss * router_loss * share)
                router_sum += router_loss.item() * share
            loss_sum += loss.item()
            entropy_sum += entropy.sum().item()
            packed_tokens += len(microbatch.input_ids)
            on_progress(done, len(microbatches))
        policy.idle_backward(idle)
        metrics = components.optimization.step(world)
    policy.version += not metrics["skipped_step"]
    loss_sum, entropy_sum, router_sum, all_tokens = world.sum([loss_sum, entropy_sum, router_sum, packed_tokens])
    metrics["imbalance/train"] = imbalance(packed_tokens, all_tokens, world)
    metrics |= {"loss": loss_sum, "entropy": entropy_sum / totals.tokens, "memory/peak_gib": peak_memory_gib()}
    if policy.router_aux_loss:
        metrics["router/aux_loss"] = router_sum
    return metrics | phases.metrics(train=all_tokens)


@torch.no_grad()
def heldout_loss(cfg: SFTConfig, components: Components, progress: Progress) -> float:
    """Return the mean negative log-likelihood of the held-out response tokens, without dropout."""
    world, policy = components.world, components.policy
    problems = world.shard(components.heldout)
    examples = [example(cfg, problem, components.render, components.tokenizer) for problem in problems]
    total, count = 0.0, 0
    microbatches = pack_examples(examples, max_tokens=cfg.batch.microbatch_tokens, device=world.device)
    on_progress = progress.phase("evaluating")
    idle = policy.idle_microbatches("heldout_loss", len(microbatches))
    for done, microbatch in enumerate(microbatches, start=1):
        logprobs, _ = policy.logprobs(microbatch, temperature=1.0)
        total, count = total - logprobs.double().sum().item(), count + len(logprobs)
        on_progress(done, len(microbatches))
    for microbatch in idle:
        policy.logprobs(microbatch, temperature=1.0)
    total, count = world.sum([total, count])
    return total / count


if __name__ == "__main__":
    config.main(SFTConfig, run, check=checks.check_sft)
