"""Evaluate: an honest comparison of models on the same problems, independent of what any of them was trained on.

What is measured, for each model:

  - n samples of each problem and one greedy completion, judged strictly and leniently: an early gain of RL is mostly
    format, and the gap between the two measures shows it;
  - pass@k, unbiased (Codex, arXiv 2107.03374), and cons@k, the majority vote (arXiv 2203.11171);
  - accuracy by completion length, by the length of the gold solution, and by the baseline's solve rate;
  - how often a completion verifies, backtracks, sets subgoals or chains backward (arXiv 2503.01307).

Every number has a 95 % interval over problems, and every pair of models a difference with an interval of its own.

What is left out: choosing the best temperature for each k, as the Codex paper does (it favours the model that was tuned
longest), and corrections for many comparisons.

Samples go to <output_dir>/samples as they finish, so a run that was stopped goes on with the same command; with another
answer checker (correct, lenient, format) it judges the same samples again and loads no weights. One process or many
write the same samples; another run on the same output_dir is refused meanwhile.

    tune run evaluate --config quickstart_eval.yaml
    tune run --nproc_per_node 2 evaluate --config quickstart_eval.yaml
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from rolltune import config
from rolltune.behaviours.classifier import Classifier
from rolltune.config.components import component, instantiate
from rolltune.config.schema import EvaluateConfig, EvaluatedModel, ModelConfig
from rolltune.distributed import World, close_world, init_world
from rolltune.errors import ConfigError
from rolltune.eval import comparison
from rolltune.eval.comparison import Evaluation
from rolltune.eval.plots import plot_evaluation
from rolltune.eval.report import SamplingProgress, make_console, print_report, results_json
from rolltune.eval.samples import (
    ProblemSamples,
    SampleCache,
    check_prompts,
    check_vocabulary,
    load_for_sampling,
    prompt_digest,
    sample_missing,
    sampling_settings,
)
from rolltune.eval.verdicts import VerifiedModel, verify
from rolltune.files import take_lock, write_json_atomic
from rolltune.model.load import load_tokenizer
from rolltune.run import build, checks, lifecycle
from rolltune.run.estimates import check_context
from rolltune.types import Problem, Prompt


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model under evaluation, short of its weights.

    Attributes:
        name: in tables and plots.
        path: of the weights.
        tokenizer: the model's own.
        prompts: by problem id, by the model's own chat template.
        cache: its sample files.
        done: what was in them at the start.
    """

    name: str
    path: str
    tokenizer: PreTrainedTokenizerBase
    prompts: Mapping[str, Prompt]
    cache: SampleCache
    done: Mapping[str, ProblemSamples] = field(default_factory=dict)

    def has_all(self, problems: Sequence[Problem]) -> bool:
        return all(problem.id in self.done for problem in problems)


def run(cfg: EvaluateConfig) -> None:
    """Sample what is missing, judge everything, and write ``<output_dir>/results.json`` and plots."""
    if cfg.dry_run:
        dry_run(cfg)
        return
    world = init_world(cfg.device)
    lifecycle.warn_of_slow_dtype(cfg.dtype, world)
    problems = load_problems(cfg)
    classifier = instantiate(cfg.classifier) if cfg.classifier else None
    # All models are looked at before the first is sampled from: a mistake in the last one shows now.
    candidates = [prepare(cfg, problems, model, f"models[{i}].path") for i, model in enumerate(cfg.models)]
    with take_lock(Path(cfg.output_dir) / "samples") if world.is_main else nullcontext():
        world.barrier()  # nobody else writes from here on
        evaluate(cfg, problems, [with_samples(candidate) for candidate in candidates], classifier, world)
    close_world()


def evaluate(
    cfg: EvaluateConfig,
    problems: Sequence[Problem],
    candidates: Sequence[Candidate],
    classifier: Classifier | None,
    world: World,
) -> None:
    """All of it, once nobody else writes."""
    world.barrier()  # every rank has read the caches before any of them writes
    if world.is_main:
        config.save(cfg, cfg.output_dir)
    with SamplingProgress(len(candidates), enabled=world.is_main) as progress:
        for number, candidate in enumerate(candidates, start=1):
            if candidate.has_all(problems):
                progress.say(number, candidate.name, f"all samples are in {candidate.cache.path}")
            else:
                sample(cfg, problems, candidate, world, progress, number)
            world.barrier()
            if world.is_main:
                candidate.cache.merge([problem.id for problem in problems])
    if world.is_main:
        judged = [judge_one(cfg, problems, candidate) for candidate in candidates]
        evaluation = measure(cfg, problems, judged)
        if classifier is not None:
            write_results(cfg, evaluation)  # which stay if the endpoint refuses
            evaluation = classify(cfg, evaluation, judged, classifier)
        report(cfg, evaluation)


def load_problems(cfg: EvaluateConfig) -> Sequence[Problem]:
    """The first ``max_problems`` problems, each of which has to have a gold answer."""
    data = instantiate(cfg.data)
    problems = [data[i] for i in range(min(cfg.max_problems or len(data), len(data)))]
    without = [problem.id for problem in problems if problem.answer is None or not problem.answer.strip()]
    if without:
        raise ConfigError(
            [
                f"data: {len(without)} of {len(problems)} problems have no gold answer, first {without[0]}; "
                "nothing they are answered with could be judged: give data with answers"
            ]
        )
    return problems


def prepare(cfg: EvaluateConfig, problems: Sequence[Problem], model: EvaluatedModel, key: str) -> Candidate:
    """Tokenizer and prompts; raises ConfigError for what would go wrong later."""
    with model_path_named(key):
        tokenizer, prompts = render(cfg, problems, model)
        cache = SampleCache(Path(cfg.output_dir) / "samples", model.name, sampling_settings(cfg, model.path))
    return Candidate(name=model.name, path=model.path, tokenizer=tokenizer, prompts=prompts, cache=cache)


def with_samples(candidate: Candidate) -> Candidate:
    """The same with what was sampled before."""
    done = candidate.cache.read()
    check_prompts(done, candidate.prompts, candidate.cache.path)
    return replace(candidate, done=done)


@contextmanager
def model_path_named(key: str) -> Iterator[None]:
    """What loads models calls the key of a path model.path; here it is another one."""
    try:
        yield
    except ConfigError:
        raise
    except ValueError as error:
        raise ConfigError([str(error).replace("model.path", key, 1)]) from error


def render(
    cfg: EvaluateConfig, problems: Sequence[Problem], model: EvaluatedModel
) -> tuple[PreTrainedTokenizerBase, dict[str, Prompt]]:
    """The model's tokenizer, and all prompts by problem id, which have to fit its vocabulary and context."""
    tokenizer = load_tokenizer(model.path, cfg.prompt.chat_template)
    check_vocabulary(model.path, tokenizer)
    render_one = build.prompt_renderer(cfg.prompt, tokenizer)
    prompts = {problem.id: render_one(problem) for problem in problems}
    check_context(
        ModelConfig(path=model.path),
        prompt_tokens=longest(prompts),
        max_new_tokens=cfg.sampling.max_new_tokens,
    )
    return tokenizer, prompts


def longest(prompts: Mapping[str, Prompt]) -> int:
    return max(len(prompt.token_ids) for prompt in prompts.values())


def sample(
    cfg: EvaluateConfig,
    problems: Sequence[Problem],
    candidate: Candidate,
    world: World,
    progress: SamplingProgress,
    number: int,
) -> None:
    """Load one model, sample what is missing, and free it again."""
    share = f"; one of {world.size} processes shows its share" if world.size > 1 else ""
    progress.say(number, candidate.name, f"samples go to {candidate.cache.path}; loading {candidate.path}{share}")
    model = load_for_sampling(candidate.path, dtype=cfg.dtype, device=world.device)
    with closing(instantiate(cfg.sampler, model, candidate.tokenizer)) as sampler:
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
            on_progress=progress.model(number, candidate.name),
        )
        world.barrier()  # rank 0 may close a server that the others still sample from
    del sampler, model
    gc.collect()
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def judge_one(cfg: EvaluateConfig, problems: Sequence[Problem], candidate: Candidate) -> VerifiedModel:
    """Verdicts on everything the model wrote, from its files."""
    return verify(
        candidate.name,
        problems,
        candidate.cache.read(),
        correct=component(cfg.correct),
        lenient=component(cfg.lenient),
        format=component(cfg.format),
    )


def measure(cfg: EvaluateConfig, problems: Sequence[Problem], judged: Sequence[VerifiedModel]) -> Evaluation:
    """All numbers; the first model is the baseline."""
    ks = sorted(cfg.ks) or comparison.default_ks(cfg.sampling.samples)
    bootstrap = {"resamples": cfg.resamples, "seed": cfg.seed}
    results = [
        comparison.measure_model(problems, model, baseline=judged[0] if i else None, ks=ks, **bootstrap)
        for i, model in enumerate(judged)
    ]
    return Evaluation(
        problems=len(problems),
        samples=cfg.sampling.samples,
        ks=ks,
        models=results,
        comparisons=comparison.compare(judged, k=ks[-1], **bootstrap),
        notes=comparison.notes(problems, results),
    )


def classify(
    cfg: EvaluateConfig, evaluation: Evaluation, judged: Sequence[VerifiedModel], classifier: Classifier
) -> Evaluation:
    """The same with what the classifier says of each model."""
    most, resamples = cfg.classified_samples, cfg.resamples
    classified = [comparison.classify(m, classifier, most=most, resamples=resamples, seed=cfg.seed) for m in judged]
    models = [replace(m, classified=c) for m, c in zip(evaluation.models, classified, strict=True)]
    return replace(evaluation, models=models)


def write_results(cfg: EvaluateConfig, evaluation: Evaluation) -> Path:
    path = Path(cfg.output_dir) / "results.json"
    write_json_atomic(path, results_json(evaluation))
    return path


def report(cfg: EvaluateConfig, evaluation: Evaluation) -> None:
    console = make_console()
    results = write_results(cfg, evaluation)
    plots = plot_evaluation(evaluation, Path(cfg.output_dir))
    print_report(evaluation, console)
    console.print(f"numbers: {results}   plots: {', '.join(map(str, plots))}", soft_wrap=True)


def dry_run(cfg: EvaluateConfig) -> None:
    """Everything short of the weights: data and prompts are built, the tokens to sample are counted."""
    console = make_console()
    problems = load_problems(cfg)
    instantiate(cfg.classifier) if cfg.classifier else None
    completions = len(problems) * (cfg.sampling.samples + 1)
    before = None
    for i, model in enumerate(cfg.models):
        with model_path_named(f"models[{i}].path"):
            tokenizer, prompts = render(cfg, problems, model)
        first = prompts[problems[0].id]
        if prompt_digest(first) != before:
            text = str(tokenizer.decode(list(first.token_ids)))
            console.print(f"first prompt of {model.name}:", Text(text, "dim"), sep="\n", soft_wrap=True)
            before = prompt_digest(first)
        console.print(
            f"{model.name}: {len(problems)} problems, prompts of {longest(prompts)} tokens at most; {completions} "
            f"completions, {completions * cfg.sampling.max_new_tokens} sampled tokens at most"
        )
    console.print(f"{len(cfg.models) * completions * cfg.sampling.max_new_tokens} sampled tokens in all, at most")
    console.print("dry run: everything resolves; nothing was loaded, nothing was written")


if __name__ == "__main__":
    config.main(EvaluateConfig, run, check=checks.check_evaluate)
