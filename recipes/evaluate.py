"""Evaluate: compare models on the same problems, independently of the rewards they were trained on.

For each model it measures:

  - n samples of each problem and one greedy completion, verified strictly and leniently: an early gain of RL is mostly
    format, and the gap between the two measures shows it;
  - pass@k, unbiased (Codex, arXiv 2107.03374), and cons@k, the majority vote (arXiv 2203.11171);
  - accuracy by completion length, by length of the gold solution, and by the baseline's solve rate;
  - how often a completion verifies, backtracks, sets subgoals or chains backward (arXiv 2503.01307).

Every number has a 95 % interval over problems. Every pair of models has a difference with its own interval.

Left out: choosing the best temperature for each k, as the Codex paper does (it favours the model that was tuned
longest), and corrections for multiple comparisons.

Samples are written to <output_dir>/samples as they finish. The same command therefore continues a stopped run. With
another answer checker (correct, lenient, format) it verifies the same samples again and loads no weights. Any number of
processes writes the same samples; a second run on the same output_dir is refused.

    tune run evaluate --config quickstart_eval.yaml
    tune run --nproc_per_node 2 evaluate --config quickstart_eval.yaml
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rolltune import config
from rolltune.behaviours.classifier import Classifier
from rolltune.config.components import component, instantiate
from rolltune.config.schema import EvaluateConfig, EvaluatedModel, ModelConfig
from rolltune.distributed import World, joined_world
from rolltune.errors import ConfigError
from rolltune.eval.behaviour_rates import classify
from rolltune.eval.comparison import compare, notes
from rolltune.eval.measures import default_ks, measure_model
from rolltune.eval.plots import plot_evaluation
from rolltune.eval.progress import SamplingProgress
from rolltune.eval.results import Evaluation, problem_records, results_json
from rolltune.eval.sample_cache import ProblemSamples, SampleCache
from rolltune.eval.sampling import check_prompts, check_vocabulary, prompt_digest, sample_missing, sampling_settings
from rolltune.eval.tables import make_console, print_tables
from rolltune.eval.verdicts import VerifiedModel, verify
from rolltune.files import json_line, write_json_atomic, write_text_atomic
from rolltune.model.load import load_for_sampling, load_tokenizer
from rolltune.prompts import check_visible
from rolltune.report import try_report
from rolltune.rewards.combine import gold_kinds
from rolltune.run import build, checks, lengths, lifecycle
from rolltune.run.agreement import agree_on_data, agree_on_run, agree_on_weights, together
from rolltune.run.record import write_record
from rolltune.samplers.generation import split_stop
from rolltune.terminal import printable
from rolltune.types import Problem, Prompt


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model under evaluation, without its weights.

    Attributes:
        model: its name in tables and plots, and where its weights are.
        tokenizer: the model's own tokenizer.
        prompts: prompts by problem id, rendered by the model's own chat template.
        cache: sample files of the model.
        done: contents of the sample files at the start.
    """

    model: EvaluatedModel
    tokenizer: PreTrainedTokenizerBase
    prompts: Mapping[str, Prompt]
    cache: SampleCache
    done: Mapping[str, ProblemSamples] = field(default_factory=dict)

    def has_all(self, problems: Sequence[Problem]) -> bool:
        return all(problem.id in self.done for problem in problems)


def run(cfg: EvaluateConfig) -> None:
    """Sample what is missing, verify everything, and write ``<output_dir>/results.json`` and plots."""
    if cfg.dry_run:
        dry_run(cfg)
        return
    with joined_world(cfg.device) as world:
        run_models(cfg, world)


def run_models(cfg: EvaluateConfig, world: World) -> None:
    """Sample from every model, and let rank 0 report."""
    lifecycle.warn_of_slow_dtype(cfg.dtype, world)
    agree_on_run(cfg, world)
    with together(world):
        problems = load_problems(cfg)
        classifier = instantiate(cfg.classifier) if cfg.classifier else None
        # Prepare every model before sampling from the first, so that a mistake in the last one shows now.
        candidates = [prepare(cfg, problems, model, f"models[{i}].path") for i, model in enumerate(cfg.models)]
    agree_on_data({"data": problems}, world)
    with lifecycle.exclusive(cfg.output_dir, world, name="samples"):
        candidates = [with_samples(candidate) for candidate in candidates]
        world.barrier()  # every rank has read the caches: from here on the ranks write
        if world.is_main:
            config.save(cfg, cfg.output_dir)
            write_record(cfg.output_dir, world)
        sample_all(cfg, problems, candidates, world)
        if world.is_main:
            report(cfg, problems, candidates, classifier)


def load_problems(cfg: EvaluateConfig) -> Sequence[Problem]:
    """Load the first ``max_problems`` problems and check that each has a gold answer that can be used."""
    data = instantiate(cfg.data)
    problems = [data[i] for i in range(min(cfg.max_problems or len(data), len(data)))]
    without = [problem.id for problem in problems if problem.answer is None or not problem.answer.strip()]
    if without:
        raise ConfigError(
            [
                f"data: {len(without)} of {len(problems)} problems have no gold answer, first {without[0]}; "
                "responses to them cannot be verified: give data with answers"
            ]
        )
    gold_kinds("correct", component(cfg.correct), problems)
    return problems


# --- samples ----------------------------------------------------------------------------------------------------------


def prepare(cfg: EvaluateConfig, problems: Sequence[Problem], model: EvaluatedModel, key: str) -> Candidate:
    """Load the tokenizer and render the prompts; raise ConfigError for anything that would fail later."""
    with errors_name(key):
        tokenizer, prompts = render(cfg, problems, model)
        cache = SampleCache(Path(cfg.output_dir) / "samples", model.name, sampling_settings(cfg, model))
    return Candidate(model=model, tokenizer=tokenizer, prompts=prompts, cache=cache)


@contextmanager
def errors_name(key: str) -> Iterator[None]:
    """Turn errors about ``model.path``, the key in other recipes' configs, into ConfigErrors about ``key``."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error).replace("model.path", key, 1)]) from error


def render(
    cfg: EvaluateConfig, problems: Sequence[Problem], model: EvaluatedModel
) -> tuple[PreTrainedTokenizerBase, dict[str, Prompt]]:
    """Return the model's tokenizer and all prompts by problem id, checked against its vocabulary and context."""
    tokenizer = load_tokenizer(model.path, cfg.prompt.chat_template)
    check_vocabulary(model.path, tokenizer)
    split_stop(cfg.sampling.stop, tokenizer)
    check_visible(cfg.prompt.prefill, tokenizer, "prompt.prefill")
    prompts = build.prompt_renderer(cfg.prompt, tokenizer).many(problems)
    new_tokens = cfg.sampling.max_new_tokens
    lengths.fitting(
        problems,
        [len(prompt.token_ids) + new_tokens for prompt in prompts],
        lengths.sequence_limit(ModelConfig(path=model.path), cfg.sampler),
        key="data",
        parts=f"prompt and sampling.max_new_tokens, {new_tokens}",
    )
    return tokenizer, {problem.id: prompt for problem, prompt in zip(problems, prompts, strict=True)}


def longest(prompts: Mapping[str, Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts.values())


def with_samples(candidate: Candidate) -> Candidate:
    """Read the samples of earlier runs."""
    done = candidate.cache.read()
    check_prompts(done, candidate.prompts, candidate.cache.path)
    return replace(candidate, done=done)


def sample_all(cfg: EvaluateConfig, problems: Sequence[Problem], candidates: Sequence[Candidate], world: World) -> None:
    """Complete the samples of one model after another, and merge the ranks' files."""
    with SamplingProgress(len(candidates), enabled=world.is_main) as progress:
        for number, candidate in enumerate(candidates, start=1):
            if candidate.has_all(problems):
                progress.say(number, candidate.model.name, f"all samples are in {candidate.cache.path}")
            else:
                sample(cfg, problems, candidate, world, progress, number)
            world.barrier()
            if world.is_main:
                candidate.cache.merge([problem.id for problem in problems])


def sample(
    cfg: EvaluateConfig,
    problems: Sequence[Problem],
    candidate: Candidate,
    world: World,
    progress: SamplingProgress,
    number: int,
) -> None:
    """Load one model, sample what is missing, and free it again."""
    share = f"; this is the share of one of {world.size} processes" if world.size > 1 else ""
    progress.say(
        number, candidate.model.name, f"samples go to {candidate.cache.path}; loading {candidate.model.path}{share}"
    )
    with together(world):
        model = load_for_sampling(
            candidate.model.path, dtype=cfg.dtype, device=world.device, quantization=candidate.model.quantization
        )
    agree_on_weights(candidate.model.path, model, world)
    with closing(instantiate(cfg.sampler, model, candidate.tokenizer)) as sampler:
        for note in getattr(sampler, "notes", ()):
            progress.say(number, candidate.model.name, note)
        sampler.sync(0)
        sample_missing(
            problems,
            candidate.prompts,
            candidate.done,
            cache=candidate.cache,
            sampler=sampler,
            params=cfg.sampling.params(),
            samples=cfg.sampling.samples,
            seed=cfg.seed,
            world=world,
            on_progress=progress.model(number, candidate.model.name),
        )
        world.barrier()  # closing rank 0's sampler may stop a server that other ranks still use
    del sampler, model
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


# --- numbers ----------------------------------------------------------------------------------------------------------


def report(
    cfg: EvaluateConfig, problems: Sequence[Problem], candidates: Sequence[Candidate], classifier: Classifier | None
) -> None:
    """Verify the samples, and write the results as JSON, plots and tables."""
    models = [verify_samples(cfg, problems, candidate) for candidate in candidates]
    evaluation = measure(cfg, problems, models)
    results = write_results(cfg, evaluation)
    lines = "".join(map(json_line, problem_records(problems, models)))
    write_text_atomic(Path(cfg.output_dir) / "problems.jsonl", lines)
    if classifier is not None:  # after the results are written: its endpoint may fail
        evaluation = add_classified(cfg, evaluation, models, classifier)
        write_results(cfg, evaluation)
    plots = plot_evaluation(evaluation, Path(cfg.output_dir))
    console = make_console()
    print_tables(evaluation, console)
    try_report(cfg.output_dir)
    console.print(f"numbers: {results}   plots: {', '.join(map(str, plots))}", soft_wrap=True)


def verify_samples(cfg: EvaluateConfig, problems: Sequence[Problem], candidate: Candidate) -> VerifiedModel:
    """Verify every response in the model's sample files."""
    return verify(
        candidate.model.name,
        problems,
        candidate.cache.read(),
        correct=component(cfg.correct),
        lenient=component(cfg.lenient),
        format=component(cfg.format),
    )


def measure(cfg: EvaluateConfig, problems: Sequence[Problem], models: Sequence[VerifiedModel]) -> Evaluation:
    """Compute all numbers. The first model is the baseline."""
    ks = sorted(cfg.ks) or default_ks(cfg.sampling.samples)
    bootstrap = {"resamples": cfg.resamples, "seed": cfg.seed}
    results = [
        measure_model(problems, model, baseline=models[0] if i else None, ks=ks, **bootstrap)
        for i, model in enumerate(models)
    ]
    return Evaluation(
        problems=len(problems),
        samples=cfg.sampling.samples,
        ks=ks,
        models=results,
        comparisons=compare(models, k=ks[-1], **bootstrap),
        notes=notes(problems, results),
    )


def add_classified(
    cfg: EvaluateConfig, evaluation: Evaluation, models: Sequence[VerifiedModel], classifier: Classifier
) -> Evaluation:
    """Add the classifier's counts of behaviours to each model's result."""
    options = {"max_completions": cfg.classified_samples, "resamples": cfg.resamples, "seed": cfg.seed}
    results = [
        replace(result, classified=classify(model, classifier, **options))
        for result, model in zip(evaluation.models, models, strict=True)
    ]
    return replace(evaluation, models=results)


def write_results(cfg: EvaluateConfig, evaluation: Evaluation) -> Path:
    path = Path(cfg.output_dir) / "results.json"
    write_json_atomic(path, results_json(evaluation))
    return path


# --- dry run ----------------------------------------------------------------------------------------------------------


def dry_run(cfg: EvaluateConfig) -> None:
    """Build everything but the models, show the first prompt, and count the tokens to sample."""
    console = make_console()
    problems = load_problems(cfg)
    if cfg.classifier:
        instantiate(cfg.classifier)
    completions = len(problems) * (cfg.sampling.samples + 1)
    shown = None
    for i, model in enumerate(cfg.models):
        with errors_name(f"models[{i}].path"):
            tokenizer, prompts = render(cfg, problems, model)
        first = prompts[problems[0].id]
        if prompt_digest(first) != shown:
            text = printable(str(tokenizer.decode(list(first.token_ids))))
            console.print(f"first prompt of {model.name}:", Text(text, "dim"), sep="\n", soft_wrap=True)
            shown = prompt_digest(first)
        console.print(
            f"{model.name}: {len(problems)} problems, prompts of at most {longest(prompts)} tokens; {completions} "
            f"completions, at most {completions * cfg.sampling.max_new_tokens} sampled tokens"
        )
    console.print(f"at most {len(cfg.models) * completions * cfg.sampling.max_new_tokens} sampled tokens in all")
    console.print("dry run: the config is complete and valid; no weights were loaded and nothing was written")


if __name__ == "__main__":
    config.main(EvaluateConfig, run, check=checks.check_evaluate)
