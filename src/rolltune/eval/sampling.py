"""Sampling for an evaluation: the settings samples depend on, checks before sampling, and the sampling itself.

Problems are sampled in fixed blocks, and a block is written when it is complete. So a completion depends neither on the
number of processes nor on how often the run was stopped.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from rolltune.config.schema import EvaluateConfig, EvaluatedModel
from rolltune.distributed import World
from rolltune.errors import ConfigError
from rolltune.eval.sample_cache import WEIGHTS_KEY, ProblemSamples, Response, SampleCache
from rolltune.model.load import adapter_base, load_config, resolve_model
from rolltune.rollout import check_versions
from rolltune.samplers import Sampler
from rolltune.seeding import derive_seed
from rolltune.types import Completion, Problem, Prompt, SampleRequest, SamplingParams

T = TypeVar("T")
BLOCK_COMPLETIONS = 64  # of a block, which is the most that a kill can lose; must not depend on the number of ranks
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model")


# --- what samples depend on -------------------------------------------------------------------------------------------


def sampling_settings(cfg: EvaluateConfig, model: EvaluatedModel) -> dict[str, Any]:
    """Collect everything a model's samples depend on except the prompts. The answer checkers are not part of it.

    Args:
        cfg: config of the whole evaluation.
        model: one of its models.
    """
    weights = {WEIGHTS_KEY: fingerprint(model.path), "dtype": cfg.dtype}
    if model.quantization is not None:
        weights["quantization"] = model.quantization
    sampling = {f"sampling.{key}": value for key, value in asdict(cfg.sampling).items()}
    return {**weights, "seed": cfg.seed, **sampling, "sampler": cfg.sampler}


def fingerprint(path: str) -> str:
    """Identify weights by their content, independent of where they are stored.

    For a folder: a hash of every byte of its weights, config and tokenizer, computed at some gigabytes a second or at
    the speed of the disk. (Sizes and times would not do: all checkpoints of a run have the same sizes, and a copy has
    another time.) For a Hub id: its commit. For an adapter: its own fingerprint and that of its base.
    """
    source = resolve_model(path)
    if not Path(source).is_dir():
        return f"{source}@{getattr(load_config(source), '_commit_hash', None)}"
    digest = hashlib.blake2b(digest_size=16)
    for file in sorted(Path(source).iterdir()):
        if file.suffix in _MODEL_FILES and file.is_file():
            digest.update(f"{file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as content:
                while piece := content.read(2**22):
                    digest.update(piece)
    base = adapter_base(source)
    return digest.hexdigest() + (f"+{fingerprint(base)}" if base else "")


def prompt_digest(prompt: Prompt) -> str:
    """Identify a prompt by its tokens and its prefill, which the response texts start with."""
    return hashlib.blake2b(repr((prompt.token_ids, prompt.prefill)).encode(), digest_size=8).hexdigest()


def check_prompts(found: Mapping[str, ProblemSamples], prompts: Mapping[str, Prompt], path: Path) -> None:
    """Raise ConfigError if the prompt of a problem has changed since the problem was sampled."""
    changed = [i for i, prompt in prompts.items() if i in found and found[i].prompt != prompt_digest(prompt)]
    if changed:
        raise ConfigError(
            [
                f"prompt: the prompts of {len(changed)} problems, first {changed[0]}, have changed since {path} was "
                "sampled (by data, prompt or the tokenizer); choose another output_dir or remove that file"
            ]
        )


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError if the tokenizer has ids without an embedding in the model."""
    size = getattr(load_config(path).get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values())
    if size is not None and largest >= size:
        raise ValueError(
            f"model.path: {path}: the vocabulary of the checkpoint is not that of its tokenizer: {size} embeddings, "
            f"but token ids up to {largest}; give the model its own tokenizer files"
        )


# --- sampling ---------------------------------------------------------------------------------------------------------


def blocks(problems: Sequence[T], samples: int) -> list[Sequence[T]]:
    """Split the problems, in order, into blocks of about ``BLOCK_COMPLETIONS`` completions."""
    size = max(1, BLOCK_COMPLETIONS // samples)
    return [problems[start : start + size] for start in range(0, len(problems), size)]


def sample_missing(
    problems: Sequence[Problem],
    prompts: Mapping[str, Prompt],
    done: Mapping[str, ProblemSamples],
    *,
    cache: SampleCache,
    sampler: Sampler,
    params: SamplingParams,
    samples: int,
    seed: int,
    world: World,
    on_progress: Callable[[int, int], None],
) -> None:
    """Sample this rank's share of the incomplete blocks, and write each block to the cache when it is complete.

    Args:
        problems: all problems of the evaluation.
        prompts: prompts by problem id.
        done: contents of the cache, as all ranks have read it.
        cache: where samples are written.
        sampler: sampler of the model, synced as version 0.
        params: parameters of the samples; the greedy response has the same limits.
        samples: samples of each problem, in addition to the greedy response.
        seed: seeds each completion together with the problem's id and the sample's number.
        world: all ranks must call this.
        on_progress: called with (completions done, completions in all) of this rank.

    Raises:
        SyncError: on all ranks, if the engine of one rank sampled from other weights. That block is not written.
    """
    todo = world.shard([block for block in blocks(problems, samples) if any(p.id not in done for p in block)])
    total = sum(map(len, todo)) * (samples + 1)
    finished = 0
    greedy_params = SamplingParams(temperature=0.0, max_new_tokens=params.max_new_tokens, stop=params.stop)

    def generate(block: Sequence[Problem], params: SamplingParams, seeds: Callable[[Problem], tuple[int, ...]]):
        nonlocal finished
        requests = [SampleRequest(prompt=prompts[problem.id], seeds=seeds(problem)) for problem in block]
        before = finished
        completions = sampler.generate(requests, params, on_progress=lambda n, _: on_progress(before + n, total))
        finished += sum(map(len, completions))
        on_progress(finished, total)
        return completions

    completions: list[Completion] = []  # of this rank's last block
    for block in todo:
        sampled = generate(
            block, params, lambda problem: tuple(derive_seed(seed, "sample", problem.id, i) for i in range(samples))
        )
        greedy = generate(block, greedy_params, lambda problem: (0,))
        completions = [completion for group in (*sampled, *greedy) for completion in group]
        if any(completion.policy_version != 0 for completion in completions):
            break  # check_versions() below tells the other ranks when they have sampled their share
        records = [
            ProblemSamples(
                problem=problem.id,
                prompt=prompt_digest(prompts[problem.id]),
                greedy=_response(greedy_completion),
                samples=tuple(map(_response, group)),
            )
            for problem, group, (greedy_completion,) in zip(block, sampled, greedy, strict=True)
        ]
        cache.append(records, rank=world.rank)
    check_versions(completions, 0, world)


def _response(completion: Completion) -> Response:
    return Response(text=completion.text, tokens=len(completion.token_ids), finish_reason=completion.finish_reason)
