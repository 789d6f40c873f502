"""How far sampler and trainer are apart in each precision, with a head in it and with one in fp32.

The same prompts and seeds in each; completions differ as soon as one rounding decides a draw, so that numbers are of
about the same text, never of the same tokens.

    python benchmarks/mismatch_by_precision.py --model smollm2-135m-instruct
"""

from __future__ import annotations

import argparse
import time

import torch

from rolltune.batch import TrainGroup, TrainSequence, pack
from rolltune.data.sums import sums
from rolltune.distributed import World, init_world
from rolltune.mismatch import Mismatch, MismatchMeter
from rolltune.models import DTYPES, load_model, load_tokenizer
from rolltune.policy import packed_logprobs
from rolltune.prompts import render_prompt
from rolltune.samplers.native import NativeSampler
from rolltune.types import SampleRequest, SamplingParams


def measure(arguments: argparse.Namespace, dtype: str, fp32_head: bool, world: World) -> Mismatch:
    tokenizer = load_tokenizer(arguments.model)
    model = load_model(arguments.model, dtype=dtype, device=world.device, fp32_head=fp32_head).eval()
    prompts = [render_prompt(problem, tokenizer=tokenizer) for problem in sums(count=arguments.prompts)]
    seeds = tuple(range(arguments.completions))
    groups = NativeSampler(model, tokenizer).generate(
        [SampleRequest(prompt=prompt, seeds=seeds) for prompt in prompts],
        SamplingParams(temperature=1.0, max_new_tokens=arguments.tokens),
    )
    meter = MismatchMeter()
    with torch.no_grad():
        for prompt, group in zip(prompts, groups, strict=True):
            sequences = tuple(TrainSequence(token_ids=c.token_ids, logprobs=c.logprobs, advantage=1.0) for c in group)
            (row,) = pack([TrainGroup(prompt=prompt, sequences=sequences)], max_tokens=10**9, device=world.device)
            meter.add(packed_logprobs(model, row, temperature=1.0)[0], row)
    mismatch = meter.read(world)
    assert mismatch is not None
    return mismatch


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as model.path of a config")
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--completions", type=int, default=8, help="of each prompt")
    parser.add_argument("--tokens", type=int, default=32, help="of each completion, at most")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    arguments = parser.parse_args()
    world = init_world()
    print("| weights | head | tokens | mean abs | max abs | k3 | outside [0.9, 1.1] | seconds |")
    print("|---|---|---|---|---|---|---|---|")
    for dtype in arguments.dtypes:
        for fp32_head in (False, True) if dtype != "float32" else (False,):
            start = time.perf_counter()
            m = measure(arguments, dtype, fp32_head, world)
            head = "float32" if fp32_head else dtype
            print(
                f"| {dtype} | {head} | {m.tokens} | {m.mean_abs:.2e} | {m.max_abs:.2e} | {m.k3:.2e} | {m.outside:.1%} "
                f"| {time.perf_counter() - start:.0f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
