"""Sampling for an evaluation: fingerprints, checks, and blocks that a kill or more ranks do not change."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from thread_world import on_ranks
from transformers import AutoModelForCausalLM

from rolltune.distributed import World
from rolltune.errors import ConfigError, SyncError
from rolltune.eval import sampling
from rolltune.eval.sample_cache import ProblemSamples, Response, SampleCache
from rolltune.eval.sampling import (
    BLOCK_COMPLETIONS,
    blocks,
    check_prompts,
    check_vocabulary,
    fingerprint,
    prompt_digest,
    sample_missing,
)
from rolltune.model.load import load_for_sampling
from rolltune.seeding import derive_seed
from rolltune.types import Completion, Problem, Prompt, SamplingParams

SETTINGS = {"weights": "abc"}
ONE = World(rank=0, size=1, device=torch.device("cpu"))


@pytest.fixture
def cache(tmp_path: Path) -> SampleCache:
    return SampleCache(tmp_path / "samples", "base", SETTINGS)


# --- weights and prompts ----------------------------------------------------------------------------------------------


def test_a_fingerprint_depends_on_the_content_only(tiny_llama: Path, tmp_path: Path):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    (tmp_path / "link").symlink_to(copy)
    (copy / "notes.txt").write_text("not of the model")
    assert fingerprint(str(tiny_llama)) == fingerprint(str(copy)) == fingerprint(str(tmp_path / "link"))


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", "generation_config.json"])
def test_a_fingerprint_sees_every_byte(tiny_llama: Path, tmp_path: Path, name: str):
    copy = tmp_path / "copy"
    shutil.copytree(tiny_llama, copy)
    content = bytearray((copy / name).read_bytes())
    content[len(content) // 2] ^= 1
    (copy / name).write_bytes(content)
    assert fingerprint(str(copy)) != fingerprint(str(tiny_llama))


def make_adapter(base: Path, folder: Path) -> Path:
    torch.manual_seed(0)
    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base),
        LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False),
    )
    model.save_pretrained(folder)
    return folder


def test_an_adapters_fingerprint_includes_its_base(make_tiny_llama, tmp_path: Path):
    base = make_tiny_llama(tmp_path / "base", seed=3)
    adapter = make_adapter(base, tmp_path / "adapter")
    before = fingerprint(str(adapter))
    assert before.endswith(f"+{fingerprint(str(base))}")
    make_tiny_llama(tmp_path / "base", seed=4)
    assert fingerprint(str(adapter)) != before


def test_an_adapter_is_sampled_with_its_weights(make_tiny_llama, tmp_path: Path):
    base = make_tiny_llama(tmp_path / "base", seed=3)
    adapter = make_adapter(base, tmp_path / "adapter")
    model = load_for_sampling(str(adapter), dtype="float32", device=torch.device("cpu"))
    ids = torch.tensor([[5, 6, 7]])
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(adapter))(ids).logits
    plain = AutoModelForCausalLM.from_pretrained(base)(ids).logits
    torch.testing.assert_close(model(ids).logits, expected, atol=1e-5, rtol=0)
    assert (expected - plain).abs().max() > 0.01
    assert not model.training and not any(p.requires_grad for p in model.parameters())


def test_prompts_are_told_apart_by_tokens_and_prefill():
    prompts = [Prompt(token_ids=(1, 2)), Prompt(token_ids=(12,)), Prompt(token_ids=(1, 2), prefill="<think>")]
    assert len({prompt_digest(prompt) for prompt in prompts}) == 3
    response = Response(text="", tokens=0, finish_reason="stop")
    digest = prompt_digest(prompts[0])
    found = {"a": ProblemSamples(problem="a", prompt=digest, greedy=response, samples=(response,))}
    check_prompts(found, {"a": prompts[0], "b": prompts[1]}, Path("x.jsonl"))
    with pytest.raises(ConfigError, match=r"prompt: .* 1 problems, first a, .* x\.jsonl"):
        check_prompts(found, {"b": prompts[1], "a": prompts[2]}, Path("x.jsonl"))


def test_a_checkpoint_of_another_vocabulary(make_tiny_llama, tiny_llama: Path, tmp_path: Path, tokenizer):
    check_vocabulary(str(tiny_llama), tokenizer)
    size = len(tokenizer) - 1
    small = make_tiny_llama(tmp_path / "small", vocab_size=size)
    with pytest.raises(ValueError, match=f"model.path: .*small: .*vocabulary.* {size} embeddings.* {size}"):
        check_vocabulary(str(small), tokenizer)


# --- sampling ---------------------------------------------------------------------------------------------------------

PROBLEMS = [Problem(id=f"p{i}", messages=(), answer="4") for i in range(11)]
PROMPTS = {problem.id: Prompt(token_ids=(int(problem.id[1:]),)) for problem in PROBLEMS}
PARAMS = SamplingParams(temperature=0.7, top_k=5, max_new_tokens=9, stop=("x",))


class Scribe:
    """Writes the requests back as text. At a given call it ends the process, or samples from other weights."""

    def __init__(self, dies_at: int | None = None, strays_at: int | None = None):
        self.calls, self.dies_at, self.strays_at = [], dies_at, strays_at

    def sync(self, version): ...

    def generate(self, requests, params, *, on_progress=None):
        self.calls.append((params, [(r.prompt.token_ids[0], r.seeds) for r in requests]))
        if len(self.calls) == self.dies_at:
            raise KeyboardInterrupt
        total = sum(len(request.seeds) for request in requests)
        if on_progress is not None:
            on_progress(total, total)
        return [
            tuple(
                Completion(
                    token_ids=(1, 2), logprobs=(0.0, 0.0), finish_reason="stop",
                    policy_version=-1 if len(self.calls) == self.strays_at else 0,
                    text=f"{request.prompt.token_ids[0]} {params.temperature} {seed}",
                )
                for seed in request.seeds
            )
            for request in requests
        ]  # fmt: skip


def write(cache: SampleCache, sampler: Scribe, world: World = ONE, problems=PROBLEMS, seen=None) -> None:
    done = cache.read()
    world.barrier()
    sample_missing(
        problems,
        PROMPTS,
        done,
        cache=cache,
        sampler=sampler,
        params=PARAMS,
        samples=2,
        seed=7,
        world=world,
        on_progress=lambda done, total: seen.append((done, total)) if seen is not None else None,
    )


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampling, "BLOCK_COMPLETIONS", 6)  # 3 problems of 2 samples


def test_two_ranks_both_have_work_in_a_small_run(monkeypatch: pytest.MonkeyPatch):
    """8 problems of 16 samples are 128 completions: two blocks of 4 problems."""
    monkeypatch.setattr(sampling, "BLOCK_COMPLETIONS", BLOCK_COMPLETIONS)
    assert blocks("abcdefgh", 16) == ["abcd", "efgh"]


def test_blocks():
    assert blocks("abcdefg", 2) == ["abc", "def", "g"]
    assert blocks("abc", 100) == ["a", "b", "c"]


def test_every_problem_has_its_samples_and_a_greedy_one(cache: SampleCache):
    sampler, seen = Scribe(), []
    write(cache, sampler, seen=seen)
    found = cache.read()
    assert list(found) == [problem.id for problem in PROBLEMS]
    for i, problem in enumerate(PROBLEMS):
        seeds = [derive_seed(7, "sample", problem.id, j) for j in range(2)]
        assert [response.text for response in found[problem.id].samples] == [f"{i} 0.7 {seed}" for seed in seeds]
        assert found[problem.id].greedy == Response(text=f"{i} 0.0 0", tokens=2, finish_reason="stop")
        assert found[problem.id].prompt == prompt_digest(PROMPTS[problem.id])
    assert [params for params, _ in sampler.calls[:2]] == [
        PARAMS,
        SamplingParams(temperature=0.0, max_new_tokens=9, stop=("x",)),
    ]
    assert [len(requests) for _, requests in sampler.calls] == [3, 3, 3, 3, 3, 3, 2, 2]
    assert seen[-1] == (33, 33) and [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert {total for _, total in seen} == {33}


@pytest.mark.parametrize("dies_at", [1, 2, 3, 6, 8])
def test_a_stopped_run_goes_on_where_it_was(cache: SampleCache, tmp_path: Path, dies_at: int):
    whole = SampleCache(tmp_path / "whole", "base", SETTINGS)
    write(whole, Scribe())
    with pytest.raises(KeyboardInterrupt):
        write(cache, Scribe(dies_at=dies_at))
    blocks_done = (dies_at - 1) // 2
    assert len(cache.read()) == 3 * blocks_done
    sampler = Scribe()
    write(cache, sampler)
    assert len(sampler.calls) == 8 - 2 * blocks_done
    assert cache.path.read_bytes() == whole.path.read_bytes()


def test_a_block_cut_in_the_middle_is_sampled_whole(cache: SampleCache):
    """The number of completions that are sampled together decides the last bits."""
    write(cache, Scribe())
    whole = cache.path.read_bytes()
    lines = whole.splitlines(keepends=True)
    cache.path.write_bytes(b"".join(lines[:6]) + lines[6][:9])  # header, a block, two problems and a half
    sampler = Scribe()
    write(cache, sampler)
    assert sampler.calls[0][1][0][0] == 3 and len(sampler.calls) == 6
    cache.merge([problem.id for problem in PROBLEMS])
    assert cache.path.read_bytes() == whole


def test_more_problems_later(cache: SampleCache):
    write(cache, Scribe(), problems=PROBLEMS[:6])
    sampler = Scribe()
    write(cache, sampler)
    assert len(sampler.calls) == 4 and set(cache.read()) == set(PROMPTS)


def test_ranks_write_what_one_process_writes(cache: SampleCache, tmp_path: Path):
    one = SampleCache(tmp_path / "one", "base", SETTINGS)
    write(one, Scribe())
    calls = on_ranks(3, lambda world: write(cache, sampler := Scribe(), world) or len(sampler.calls))
    assert calls == [4, 2, 2]  # four blocks, two calls each
    cache.merge([problem.id for problem in PROBLEMS])
    assert cache.path.read_bytes() == one.path.read_bytes()
    assert on_ranks(3, lambda world: write(cache, sampler := Scribe(), world) or len(sampler.calls)) == [0, 0, 0]


def test_completions_of_other_weights_are_not_kept_and_stop_all_ranks(cache: SampleCache):
    """Four blocks of two calls each over three ranks; the second rank's greedy completions have other weights."""

    def run(world: World) -> bool:
        with pytest.raises(SyncError, match="3 completions .*version 0.*version -1"):
            write(cache, Scribe(strays_at=2 if world.rank == 1 else None), world)
        return True

    assert on_ranks(3, run) == [True] * 3
    assert set(cache.read()) == {problem.id for i, problem in enumerate(PROBLEMS) if i // 3 != 1}
