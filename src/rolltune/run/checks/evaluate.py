"""The check of a config of recipes/evaluate.py."""

from __future__ import annotations

import re
from collections.abc import Iterator

from rolltune.config.components import check_component
from rolltune.config.schema import EvaluateConfig, EvaluatedModel, EvaluateSamplingConfig
from rolltune.run.checks.common import (
    at_least,
    check_context,
    check_device,
    check_max_problems,
    check_members,
    check_model_path,
    check_output_dir,
    check_prompt,
    check_sampler,
    check_sampling_params,
    check_verifier,
)


def check_evaluate(cfg: EvaluateConfig, world_size: int) -> Iterator[str]:
    yield from check_output_dir(cfg.output_dir)
    yield from at_least("seed", cfg.seed, 0)
    yield from check_device(cfg.device)
    yield from _check_models(cfg.models)
    yield from check_component(cfg.data, "data")
    yield from check_max_problems(cfg.max_problems)
    yield from check_prompt(cfg.prompt)
    yield from _check_sampling(cfg.sampling)
    for i, model in enumerate(cfg.models):
        yield from check_context(model.path, cfg.sampling.max_new_tokens, f"models[{i}].path")
    yield from check_sampler(cfg.sampler, cfg.sampling)
    for name in ("correct", "lenient", "format"):
        yield from check_verifier(getattr(cfg, name), name)
    yield from _check_ks(cfg.ks, cfg.sampling.samples)
    yield from at_least("resamples", cfg.resamples, 100)
    if cfg.classifier is not None:
        yield from check_members(
            cfg.classifier, "classifier", "rolltune.behaviours.classifier.Classifier", ["classify"]
        )
        yield from at_least("classified_samples", cfg.classified_samples, 1)
    elif cfg.classified_samples != EvaluateConfig.classified_samples:
        yield f"classified_samples: {cfg.classified_samples}; has no effect while classifier is null"


def _check_models(models: list[EvaluatedModel]) -> Iterator[str]:
    if not models:
        yield "models: none; give at least one: [{name: base, path: ...}]"
    names = [model.name for model in models]
    for i, model in enumerate(models):
        if not re.fullmatch(r"\w[\w.+-]*", model.name):
            yield f"models[{i}].name: {model.name!r}; must be a file name of letters, digits and . _ + -"
        elif model.name in names[:i]:
            yield f"models[{i}].name: {model.name}; must differ from the name of models[{names.index(model.name)}]"
        yield from check_model_path(model.path, f"models[{i}].path")


def _check_sampling(sampling: EvaluateSamplingConfig) -> Iterator[str]:
    yield from check_sampling_params(sampling)
    yield from at_least("sampling.samples", sampling.samples, 1)
    if sampling.temperature == 0 and sampling.samples > 1:
        yield (
            f"sampling.temperature: 0; must be > 0 with {sampling.samples} samples, which would all be the same "
            "(the evaluation decodes greedily as well)"
        )
    elif sampling.temperature == 0 and (sampling.top_p, sampling.top_k) != (1, 0):
        yield "sampling.temperature: 0; top_p and top_k have no effect with it; leave them out"


def _check_ks(ks: list[int], samples: int) -> Iterator[str]:
    for i, k in enumerate(ks):
        if not 1 <= k <= samples:
            yield f"ks[{i}]: {k}; must be in 1 .. sampling.samples, {samples}"
        elif k in ks[:i]:
            yield f"ks[{i}]: {k}; is in the list twice"
