"""Prime: supervised fine-tuning on worked turns, before RL.

A base model often has the ability and lacks the form: where it never writes the tags that a reward looks for, every
group scores the same and RL has nothing to learn from. A few hundred worked turns are enough to change that.

  - the turn that is learnt is ``answer_format`` filled with each problem's own solution and answer;
  - loss on the turn's tokens alone, EOS included; the prompt is context;
  - examples are packed without padding and never see each other; [tokens, vocab] logits never exist whole;
  - the best checkpoint by held-out loss is ``<output_dir>/best``, which ``grpo`` starts from directly
    (``model.path=<output_dir>/best``).

    tune run sft --config quickstart_sft.yaml
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rolltune import config
from rolltune.batch import TrainGroup, TrainSequence, count_totals, pack
from rolltune.config.schema import SFTConfig
from rolltune.data.dataset import ProblemStream
from rolltune.distributed import World, close_world, init_world
from rolltune.losses.nll import NLLLoss
from rolltune.metrics.progress import Progress
from rolltune.metrics.timing import Phases, peak_memory_gib
from rolltune.model.load import load_tokenizer
from rolltune.model.policy import Policy, build_policy
from rolltune.prompts import completion_ids, worked_response
from rolltune.run import build, checks, estimates, lifecycle
from rolltune.run.checkpoint import Checkpoints, TrainState, load_optimization, load_state
from rolltune.seeding import derive_seed
from rolltune.types import LossTotals, Problem, Prompt
from rolltune.update import Optimization, prepare_microbatches, update_policy


@dataclass(frozen=True, kw_only=True)
class Components:
    """What the config names, built."""

    world: World
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    stream: ProblemStream
    heldout: Sequence[Problem]
    render: Callable[[Problem], Prompt]
    optimization: Optimization


def run(cfg: SFTConfig) -> None:
    """Train from the config to ``<output_dir>/best``."""
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
    with Progress(cfg.num_steps, state.step, enabled=world.is_main) as progress:
        if state.step == 0:
            log.log(0, {"heldout/loss": heldout_loss(cfg, components)})
        for step in range(state.step + 1, cfg.num_steps + 1):
            started = time.perf_counter()
            metrics = train(cfg, components, step, state.data_position)
            is_last = step == cfg.num_steps
            if step % cfg.eval.every_n_steps == 0 or is_last:
                metrics["heldout/loss"] = heldout_loss(cfg, components)
            log.log(step, metrics)
            progress.step(step, {name: metrics[name] for name in ("loss", "heldout/loss") if name in metrics})
            state = replace(
                state,
                step=step,
                data_position=state.data_position + cfg.batch.examples_per_step,
                policy_version=components.policy.version,
                seconds=state.seconds + time.perf_counter() - started,
            )
            score = -metrics["heldout/loss"] if "heldout/loss" in metrics else None
            state = lifecycle.save(
                components.policy,
                components.tokenizer,
                components.optimization,
                checkpoints,
                state,
                world,
                score=score,
                is_due=is_last or step % cfg.checkpoint.every_n_steps == 0,
            )
    log.close()
    if world.is_main:
        Console().print(f"{cfg.num_steps} steps in {state.seconds / 60:.1f} minutes; weights: {output_dir / 'best'}")
    close_world()


def dry_run(cfg: SFTConfig) -> None:
    """Everything short of the weights: data and turns are built; tokens and memory are estimated."""
    console = Console()
    tokenizer = load_tokenizer(cfg.model.path, cfg.prompt.chat_template)
    train_set, heldout = build.load_data(cfg.data, max_heldout=cfg.eval.max_problems)
    render = build.prompt_renderer(cfg.prompt, tokenizer)
    examples = [
        example(cfg, problem, render, tokenizer)
        for problem in ProblemStream(train_set, seed=cfg.seed).take(0, min(256, len(train_set)))
    ]
    prompt, turn = examples[0].prompt.token_ids, examples[0].sequences[0].token_ids
    console.print(
        "first example, trained tokens in green:\n",
        Text.assemble((str(tokenizer.decode(list(prompt))), "dim"), (str(tokenizer.decode(list(turn))), "green")),
    )
    longest = max(len(e.prompt.token_ids) for e in examples), max(len(e.sequences[0].token_ids) for e in examples)
    check_lengths(cfg, train_set, heldout, render, tokenizer)
    console.print(
        f"{len(train_set)} examples, {len(heldout)} held out; {cfg.num_steps * cfg.batch.examples_per_step} are "
        f"trained on; prompts of {longest[0]} and turns of {longest[1]} tokens at most (of {len(examples)})"
    )
    components = estimates.estimate_memory(
        cfg.model, cfg.lora, microbatch_tokens=cfg.batch.microbatch_tokens, kv_tokens=0, with_reference=False
    )
    estimates.print_memory(components, console)
    console.print("dry run: everything resolves; nothing was loaded, nothing was written")


def build_components(cfg: SFTConfig, world: World, resume_from: Path | None) -> Components:
    tokenizer = load_tokenizer(cfg.model.path, cfg.prompt.chat_template)
    train_set, heldout = build.load_data(cfg.data, max_heldout=cfg.eval.max_problems)
    render = build.prompt_renderer(cfg.prompt, tokenizer)
    check_lengths(cfg, train_set, heldout, render, tokenizer)
    policy = build_policy(
        cfg.model,
        cfg.lora,
        device=world.device,
        seed=cfg.seed,
        with_reference=False,
        resume_from=resume_from / "policy" if resume_from else None,
    )
    optimization = build.build_optimization(cfg, policy, num_updates=cfg.num_steps)
    if resume_from:
        optimization.load_state_dict(load_optimization(resume_from, world.device))
    return Components(
        world=world,
        policy=policy,
        tokenizer=tokenizer,
        stream=ProblemStream(train_set, seed=cfg.seed),
        heldout=heldout,
        render=render,
        optimization=optimization,
    )


def example(
    cfg: SFTConfig, problem: Problem, render: Callable[[Problem], Prompt], tokenizer: PreTrainedTokenizerBase
) -> TrainGroup:
    """A prompt with the one turn that is learnt."""
    prompt = render(problem)
    ids = completion_ids(worked_response(problem, cfg.answer_format), prompt, tokenizer)
    sequence = TrainSequence(token_ids=ids, logprobs=(0.0,) * len(ids), advantage=1.0)
    return TrainGroup(prompt=prompt, sequences=(sequence,))


def check_lengths(
    cfg: SFTConfig,
    train_set: Sequence[Problem],
    heldout: Sequence[Problem],
    render: Callable[[Problem], Prompt],
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Refuse examples beyond the model's context now: every one that is trained on, and the held-out ones."""
    trained = min(cfg.num_steps * cfg.batch.examples_per_step, len(train_set))
    for key, problems in (
        ("data.train", ProblemStream(train_set, seed=cfg.seed).take(0, trained)),
        ("data.heldout", heldout),
    ):
        groups = [(example(cfg, problem, render, tokenizer), problem.id) for problem in problems]
        tokens, name = max((len(g.prompt.token_ids) + len(g.sequences[0].token_ids), name) for g, name in groups)
        estimates.check_examples(cfg.model, tokens=tokens, key=key, name=name)


def train(cfg: SFTConfig, components: Components, step: int, data_position: int) -> dict[str, float]:
    """One optimizer step on the next examples."""
    world, phases = components.world, Phases()
    torch.manual_seed(derive_seed(cfg.seed, step, world.rank, "dropout"))
    problems = world.shard(components.stream.take(data_position, cfg.batch.examples_per_step))
    examples = [example(cfg, problem, components.render, components.tokenizer) for problem in problems]
    totals = count_totals(examples)
    tokens, sequences = world.sum([totals.tokens, totals.sequences])
    with phases("train"):
        microbatches = pack(examples, max_tokens=cfg.batch.microbatch_tokens, device=world.device)
        metrics = update_policy(
            components.policy,
            prepare_microbatches(
                components.policy, microbatches, temperature=1.0, with_old=False, with_reference=False
            ),
            NLLLoss(),
            LossTotals(tokens=int(tokens), sequences=int(sequences)),
            components.optimization,
            world,
            temperature=1.0,
        )
    names = ("loss", "entropy", "grad_norm", "lr", "loss_scale", "skipped_step")  # the rest compares with a sampler
    kept = {name: metrics[name] for name in names if name in metrics}
    (row_tokens,) = world.sum([sum(len(m.input_ids) for m in microbatches)])
    return kept | phases.metrics(train=row_tokens) | {"memory/peak_gib": peak_memory_gib()}


@torch.no_grad()
def heldout_loss(cfg: SFTConfig, components: Components) -> float:
    """Mean negative log-likelihood of the held-out turns' tokens, adapters' dropout off."""
    examples = [
        example(cfg, p, components.render, components.tokenizer) for p in components.world.shard(components.heldout)
    ]
    components.policy.model.eval()
    total, count = 0.0, 0
    for microbatch in pack(examples, max_tokens=cfg.batch.microbatch_tokens, device=components.world.device):
        logprobs, _ = components.policy.logprobs(microbatch, temperature=1.0)
        total, count = total - logprobs.double().sum().item(), count + len(logprobs)
    components.policy.model.train()
    total, count = components.world.sum([total, count])
    return total / count


if __name__ == "__main__":
    config.main(SFTConfig, run, check=checks.check_sft)
