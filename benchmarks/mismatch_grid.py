"""Measure the mismatch of sampler and trainer for each sampler and precision, and the time each sampler takes.

Rows are the trainer's precision. Columns are the sampler: the native one, which shares the trainer's weights (with
``fp32 head``, the LM head is in fp32 on both sides), and vLLM in each precision. All cells have the same prompts and
seeds. Completions differ as soon as rounding decides a draw, so cells compare similar texts but not the same tokens.
The weights do not change, so a mean ratio other than 1 means another distribution.

    python benchmarks/mismatch_grid.py --model smollm2-135m-instruct --dtypes float32 bfloat16 --picture grid.png
    python benchmarks/mismatch_grid.py --model smollm2-135m-instruct --dtypes float32 --temperature 0.6
    python benchmarks/mismatch_grid.py --model smollm2-135m-instruct --dtypes float32 --top-p 0.9 --top-k 64

"load" is the time to start the sampler, "sync" that of the second sync, and "check" the part of it that checks weights
and probe. "tokens/s" covers sampling only. The last line of the output is a JSON list of all cells.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.data.sums import sums
from rolltune.distributed import World, init_world
from rolltune.mismatch import Mismatch, MismatchMeter
from rolltune.model.forward import packed_logprobs
from rolltune.model.load import DTYPES, load_model, load_tokenizer
from rolltune.prompts import PromptRenderer
from rolltune.samplers import Sampler
from rolltune.samplers.native import NativeSampler
from rolltune.samplers.vllm import colocated
from rolltune.samplers.vllm_sampler import VLLMSampler
from rolltune.types import SampleRequest, SamplingParams


@dataclass(frozen=True, kw_only=True)
class Cell:
    """Results for one trainer and one sampler."""

    trainer: str
    sampler: str
    mismatch: Mismatch
    load_seconds: float
    sync_seconds: float
    check_seconds: float
    tokens_per_second: float


def cells(arguments: argparse.Namespace, world: World) -> Iterator[Cell]:
    tokenizer = load_tokenizer(arguments.model)
    for dtype in arguments.dtypes:
        if "native" in arguments.samplers:
            for fp32_head in (False, True) if dtype != "float32" else (False,):
                model = load_model(arguments.model, dtype=dtype, device=world.device, fp32_head=fp32_head).eval()
                started = time.perf_counter()
                sampler = NativeSampler(model, tokenizer, max_num_seqs=arguments.max_num_seqs)
                name = f"native{', fp32 head' if fp32_head else ''}"
                yield measure(arguments, dtype, name, model, tokenizer, sampler, started, world)
        if "vllm" in arguments.samplers:
            model = load_model(arguments.model, dtype=dtype, device=world.device).eval()
            for engine in arguments.engine_dtypes or arguments.dtypes:
                started = time.perf_counter()
                sampler = colocated(
                    model,
                    tokenizer,
                    dtype=engine,
                    max_num_seqs=arguments.max_num_seqs,
                    max_model_len=512,
                    kv_cache_gib=1.0,
                )
                yield measure(arguments, dtype, f"vllm {engine}", model, tokenizer, sampler, started, world)


def measure(
    arguments: argparse.Namespace,
    dtype: str,
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    sampler: Sampler,
    started: float,
    world: World,
) -> Cell:
    with closing(sampler):
        load_seconds = time.perf_counter() - started
        prompts = PromptRenderer(tokenizer).many(sums(count=arguments.prompts))
        requests = [SampleRequest(prompt=p, seeds=tuple(range(arguments.completions))) for p in prompts]
        params = SamplingParams(
            temperature=arguments.temperature,
            top_p=arguments.top_p,
            top_k=arguments.top_k,
            max_new_tokens=arguments.tokens,
        )
        sampler.sync(0)
        sampler.generate(requests[:1], params)  # warm-up
        started = time.perf_counter()
        sampler.sync(1)
        sync_seconds = time.perf_counter() - started
        report = sampler.last_sync if isinstance(sampler, VLLMSampler) else None
        started = time.perf_counter()
        groups = sampler.generate(requests, params)
        seconds = time.perf_counter() - started
    meter = MismatchMeter()
    with torch.no_grad():
        for prompt, group in zip(prompts, groups, strict=True):
            sequences = tuple(
                TrainSequence(token_ids=c.token_ids, logprobs=c.logprobs, advantage=1.0, support=c.support)
                for c in group
            )
            (microbatch,) = pack(
                [TrainGroup(prompt=prompt, sequences=sequences)], max_tokens=10**9, device=world.device
            )
            meter.add(packed_logprobs(model, microbatch, temperature=arguments.temperature)[0], microbatch)
    mismatch = meter.read(world)
    assert mismatch is not None
    return Cell(
        trainer=dtype,
        sampler=name,
        mismatch=mismatch,
        load_seconds=load_seconds,
        sync_seconds=sync_seconds,
        check_seconds=report.check_seconds if report else 0.0,
        tokens_per_second=mismatch.tokens / seconds,
    )


def draw(found: list[Cell], path: Path, title: str) -> None:
    """Draw the k3 of each cell on a logarithmic colour scale."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.colors import LogNorm

    rows = list(dict.fromkeys(cell.trainer for cell in found))
    columns = sorted(dict.fromkeys(cell.sampler for cell in found), key=lambda name: name.startswith("vllm"))
    values = torch.full((len(rows), len(columns)), float("nan"))
    figure, axes = plt.subplots(figsize=(2 + 1.6 * len(columns), 1.2 + 0.8 * len(rows)), layout="constrained")
    for cell in found:
        i, j = rows.index(cell.trainer), columns.index(cell.sampler)
        values[i, j] = max(cell.mismatch.k3, 1e-12)
        text = f"{cell.mismatch.k3:.1e}\n{cell.mismatch.outside:.1%} outside"
        axes.text(j, i, text, ha="center", va="center", fontsize=8, color="black")
    image = axes.imshow(values.numpy(), norm=LogNorm(vmin=1e-12, vmax=10.0), cmap="YlOrRd", aspect="auto")
    axes.set_xticks(range(len(columns)), columns, fontsize=8)
    axes.set_yticks(range(len(rows)), rows, fontsize=8)
    axes.set_xlabel("sampler")
    axes.set_ylabel("trainer")
    axes.set_title(title, fontsize=9)
    figure.colorbar(image, label="k3, nats per token")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a folder, a Hub id or a packaged name, as in model.path")
    parser.add_argument(
        "--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="precisions of the trainer"
    )
    parser.add_argument(
        "--engine-dtypes", nargs="+", choices=list(DTYPES), help="precisions of vLLM (default: --dtypes)"
    )
    parser.add_argument("--samplers", nargs="+", choices=["native", "vllm"], default=["native", "vllm"])
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=8, help="completions of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="token limit of a completion")
    parser.add_argument("--max-num-seqs", type=int, default=64, help="completions sampled at the same time")
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--top-p", type=float, default=1.0)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--picture", type=Path, help="PNG file for a picture of the grid")
    arguments = parser.parse_args()
    world = init_world()
    columns = ("trainer", "sampler", "tokens", "mean abs", "max abs", "k3", "mean ratio", "outside", "tokens/s")
    print(f"| {' | '.join((*columns, 'load', 'sync', 'check'))} |")
    print("|---" * (len(columns) + 3) + "|")
    found = []
    for cell in cells(arguments, world):
        m = cell.mismatch
        print(
            f"| {cell.trainer} | {cell.sampler} | {m.tokens} | {m.mean_abs:.2e} | {m.max_abs:.2e} | {m.k3:.2e} "
            f"| {m.mean_ratio:.5f} | {m.outside:.1%} | {cell.tokens_per_second:.0f} | {cell.load_seconds:.1f} s "
            f"| {cell.sync_seconds:.2f} s | {cell.check_seconds:.2f} s |",
            flush=True,
        )
        found.append(cell)
    if arguments.picture:
        draw(found, arguments.picture, f"{arguments.model}: temperature {arguments.temperature:g}")
    print(json.dumps([asdict(cell) for cell in found]))


if __name__ == "__main__":
    main()
