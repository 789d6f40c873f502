"""Samples of the models under evaluation: taken once, kept in files, judged as often as one likes.

    <output_dir>/samples/<name>.jsonl             a line with what was sampled with, then one line a problem
    <output_dir>/samples/<name>.parts/0001.jsonl  the same, of the processes behind the first, until all are done

Judging is none of it: another answer checker reads the same samples again, and no weights are loaded.

Problems are sampled in blocks, always the same ones, and a block is written when all of it is there: what a completion
is depends neither on the number of processes nor on how often the run was stopped.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.config.schema import EvaluateConfig
from rolltune.distributed import World
from rolltune.errors import ConfigError
from rolltune.model.load import adapter_base, load_config, load_model, resolve_model
from rolltune.rollout import check_versions
from rolltune.samplers import Sampler
from rolltune.seeding import derive_seed
from rolltune.types import Completion, Problem, Prompt, SampleRequest, SamplingParams

T = TypeVar("T")
BLOCK_COMPLETIONS = 64  # sampled in one go: what a kill can cost, and what ranks share; the world's size plays no part
_WEIGHTS = "weights"
_MODEL_FILES = (".safetensors", ".bin", ".json", ".model")


@dataclass(frozen=True, kw_only=True, slots=True)
class Response:
    """One completion, as much of it as judging needs.

    Attributes:
        text: the whole assistant turn, a prefill included.
        tokens: that were sampled.
        finish_reason: "stop" or "length".
    """

    text: str
    tokens: int
    finish_reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class ProblemSamples:
    """What one model wrote to one problem.

    Attributes:
        problem: its id.
        prompt: :func:`prompt_digest` of what the model was given.
        greedy: the greedy completion.
        samples: in the order of their seeds.
    """

    problem: str
    prompt: str
    greedy: Response
    samples: tuple[Response, ...]


# --- files ------------------------------------------------------------------------------------------------------------


class SampleCache:
    """The sample files of one model.

    Args:
        folder: ``<output_dir>/samples``, made when something is written.
        name: of the model.
        settings: what the samples depend on beside the prompts: config key to value, as :func:`sampling_settings` gives
            it. Files that were written under others are refused.
    """

    def __init__(self, folder: Path, name: str, settings: Mapping[str, Any]) -> None:
        self.path = folder / f"{name}.jsonl"
        self._parts = folder / f"{name}.parts"
        self._name = name
        self._settings = dict(settings)

    def read(self) -> dict[str, ProblemSamples]:
        """What is there, by problem; a last line that was cut off is not.

        Raises:
            ConfigError: the files were written under other settings.
            ValueError: a line is none of ours.
        """
        found: dict[str, ProblemSamples] = {}
        for path in self._files():
            # Not splitlines(): a text may hold the other characters that it splits at.
            lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]
            for number, line in enumerate(lines, start=1):
                try:
                    if number == 1:
                        settings = dict(json.loads(line)["settings"])
                    else:
                        samples = _from_json(json.loads(line))
                        found[samples.problem] = samples
                except (json.JSONDecodeError, KeyError, TypeError, ValueError) as error:
                    raise ValueError(
                        f"{path}:{number}: not a line of samples ({type(error).__name__}: {error}); remove the file "
                        "to sample again"
                    ) from None
                if number == 1:
                    self._check_settings(settings, path)
        return found

    def append(self, rows: Sequence[ProblemSamples], *, rank: int) -> None:
        """Add the lines of a block to this rank's file, and wait until they are on disk."""
        path = self._parts / f"{rank:04d}.jsonl" if rank else self.path
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a+b") as file:
            _drop_cut_line(file)
            lines = [] if file.tell() else [{"settings": self._settings}]
            file.write(_encode([*lines, *map(asdict, rows)]))
            file.flush()
            os.fsync(file.fileno())

    def merge(self, order: Sequence[str]) -> None:
        """One file of whole lines in the order of the problems; what is not among these any more comes behind."""
        found = self.read()
        ordered = [found.pop(problem) for problem in order if problem in found] + list(found.values())
        content = _encode([{"settings": self._settings}, *map(asdict, ordered)])
        if not self.path.exists() or self.path.read_bytes() != content:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            temporary = self.path.with_name(self.path.name + ".tmp")
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, self.path)
        shutil.rmtree(self._parts, ignore_errors=True)

    def _files(self) -> list[Path]:
        return [path for path in (self.path, *sorted(self._parts.glob("*.jsonl"))) if path.is_file()]

    def _check_settings(self, before: Mapping[str, Any], path: Path) -> None:
        now = json.loads(json.dumps(self._settings))
        advice = "choose another output_dir, or remove that file"
        problems = [
            f"models: the weights of {self._name} are not those that {path} was sampled from; {advice}"
            if key == _WEIGHTS
            else f"{key}: {now.get(key)}: {path} was sampled with {before.get(key)}; {advice}"
            for key in dict.fromkeys([*now, *before])
            if now.get(key) != before.get(key)
        ]
        if problems:
            raise ConfigError(problems)


def _encode(rows: Iterable[Mapping[str, Any]]) -> bytes:
    text = "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)
    # Model text can hold half of a surrogate pair, which UTF-8 cannot; as \udXXX it is the JSON escape for it.
    return text.encode("utf-8", errors="backslashreplace")


def _drop_cut_line(file: BinaryIO) -> None:
    """Cut a file, open for reading and appending, behind its last newline; what follows was killed in mid-write."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read() not in (b"", b"\n"):
        file.seek(0)
        size = file.truncate(file.read().rfind(b"\n") + 1)
    file.seek(size)


def _from_json(row: Any) -> ProblemSamples:
    return ProblemSamples(
        problem=_text(row["problem"]),
        prompt=_text(row["prompt"]),
        greedy=_turn(row["greedy"]),
        samples=tuple(map(_turn, row["samples"])),
    )


def _turn(row: Any) -> Response:
    if row["finish_reason"] not in ("stop", "length") or not isinstance(row["tokens"], int):
        raise ValueError(f"finish_reason {row['finish_reason']!r}, tokens {row['tokens']!r}")
    return Response(text=_text(row["text"]), tokens=row["tokens"], finish_reason=row["finish_reason"])


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is no text")
    return value


# --- what samples depend on -------------------------------------------------------------------------------------------


def sampling_settings(cfg: EvaluateConfig, model: str) -> dict[str, Any]:
    """Everything but the prompts that a model's samples depend on. The answer checkers are not among it.

    Args:
        cfg: of the whole evaluation.
        model: its path.
    """
    sampling = {f"sampling.{key}": value for key, value in asdict(cfg.sampling).items()}
    return {_WEIGHTS: fingerprint(model), "dtype": cfg.dtype, "seed": cfg.seed, **sampling, "sampler": cfg.sampler}


def fingerprint(path: str) -> str:
    """Tells weights apart by their content, wherever they lie.

    Of a folder: a hash of every byte of its weights, config and tokenizer, at some gigabytes a second or as fast as the
    disk reads (sizes and times are no help: checkpoints of one run have the same sizes, and a copy has another time).
    Of a Hub id: its commit. An adapter has its base's fingerprint beside its own.
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
    """Tells prompts apart: by their tokens, and by the prefill that stands in front of the texts."""
    return hashlib.blake2b(repr((prompt.token_ids, prompt.prefill)).encode(), digest_size=8).hexdigest()


def check_prompts(found: Mapping[str, ProblemSamples], prompts: Mapping[str, Prompt], path: Path) -> None:
    """Raise ConfigError where a problem that is sampled already has another prompt now."""
    changed = [i for i, prompt in prompts.items() if i in found and found[i].prompt != prompt_digest(prompt)]
    if changed:
        raise ConfigError(
            [
                f"prompt: {len(changed)} problems, first {changed[0]}, have another prompt now than when {path} was "
                "sampled (by data, prompt or the tokenizer); choose another output_dir, or remove that file"
            ]
        )


def check_vocabulary(path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError where the tokenizer has ids that the model has no embedding for."""
    rows = getattr(load_config(path).get_text_config(), "vocab_size", None)
    largest = max(tokenizer.get_vocab().values())
    if rows is not None and largest >= rows:
        raise ValueError(
            f"model.path: {path}: the checkpoint is of another vocabulary than its tokenizer: {rows} embeddings, "
            f"ids up to {largest} in the tokenizer; give the model its own tokenizer files"
        )


# --- sampling ---------------------------------------------------------------------------------------------------------


def load_for_sampling(
    path: str, *, dtype: str, device: torch.device, fp32_head: bool = False
) -> PreTrainedModel | PeftModel:
    """A full model, or an adapter on its base, in eval mode and without gradients."""
    source = resolve_model(path)
    base = adapter_base(source)
    model = load_model(base or source, dtype=dtype, device=device, fp32_head=fp32_head)
    if base is not None:
        model = PeftModel.from_pretrained(model, source)
    return model.requires_grad_(False).eval()


def blocks(problems: Sequence[T], samples: int) -> list[Sequence[T]]:
    """The problems in order, so many together that they have about ``BLOCK_COMPLETIONS`` completions."""
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
    """Sample this rank's share of the blocks that are not done, each into the cache as it finishes.

    Args:
        problems: all of them.
        prompts: by problem id.
        done: what the cache has, as all ranks have read it.
        cache: where to.
        sampler: of the model, synced as version 0.
        params: of the samples; the greedy completion has the same limits.
        samples: of each problem, besides the greedy one.
        seed: with the problem's id and the sample's number it seeds each completion.
        world: all ranks call this.
        on_progress: called with (this rank's completions done, in all).

    Raises:
        SyncError: on all ranks, where one was given a completion of other weights. The block that it is of is not kept.
    """
    todo = world.shard([block for block in blocks(problems, samples) if any(p.id not in done for p in block)])
    total = sum(map(len, todo)) * (samples + 1)
    finished = 0
    greedy_params = SamplingParams(temperature=0.0, max_new_tokens=params.max_new_tokens, stop=params.stop)

    def generate(block: Sequence[Problem], params: SamplingParams, seeds: Callable[[Problem], tuple[int, ...]]):
        nonlocal finished
        requests = [SampleRequest(prompt=prompts[problem.id], seeds=seeds(problem)) for problem in block]
        before = finished
        written = sampler.generate(requests, params, on_progress=lambda n, _: on_progress(before + n, total))
        finished += sum(map(len, written))
        on_progress(finished, total)
        return written

    written: list[Completion] = []  # of this rank's last block
    for block in todo:
        sampled = generate(
            block, params, lambda problem: tuple(derive_seed(seed, "sample", problem.id, i) for i in range(samples))
        )
        greedy = generate(block, greedy_params, lambda problem: (0,))
        written = [completion for each in (*sampled, *greedy) for completion in each]
        if any(completion.policy_version != 0 for completion in written):
            break  # the other ranks hear of it when they have done their share
        rows = [
            ProblemSamples(
                problem=problem.id,
                prompt=prompt_digest(prompts[problem.id]),
                greedy=_from_completion(of_greedy[0]),
                samples=tuple(map(_from_completion, of_samples)),
            )
            for problem, of_samples, of_greedy in zip(block, sampled, greedy, strict=True)
        ]
        cache.append(rows, rank=world.rank)
    check_versions(written, 0, world)


def _from_completion(completion: Completion) -> Response:
    return Response(text=completion.text, tokens=len(completion.token_ids), finish_reason=completion.finish_reason)
