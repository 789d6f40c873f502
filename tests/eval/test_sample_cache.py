"""Sample files: what is in them, what they refuse, and that a kill loses no more than a block."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from thread_world import on_ranks
from transformers import AutoModelForCausalLM

from rolltune.distributed import World
from rolltune.errors import ConfigError, SyncError
from rolltune.eval import samples as module
from rolltune.eval.samples import (
    BLOCK_COMPLETIONS,
    ProblemSamples,
    Response,
    SampleCache,
    blocks,
    check_prompts,
    check_vocabulary,
    fingerprint,
    load_for_sampling,
    prompt_digest,
    sample_missing,
)
from rolltune.seeding import derive_seed
from rolltune.types import Completion, Problem, Prompt, SamplingParams

SETTINGS = {"weights": "abc", "dtype": "float32", "seed": 0, "sampling.samples": 2, "sampling.stop": ["x"]}
ONE = World(rank=0, size=1, device=torch.device("cpu"))


def row(problem: str, *texts: str) -> ProblemSamples:
    turns = [Response(text=text, tokens=len(text), finish_reason="stop") for text in texts or ("g", "s")]
    return ProblemSamples(problem=problem, prompt="p", greedy=turns[0], samples=tuple(turns[1:]))


@pytest.fixture
def cache(tmp_path: Path) -> SampleCache:
    return SampleCache(tmp_path / "samples", "base", SETTINGS)


# --- files ------------------------------------------------------------------------------------------------------------


def test_what_is_appended_is_read(cache: SampleCache):
    rows = [row("a", "g", "1", "2"), row("b", "g", "3", "4"), row("c")]
    assert cache.read() == {}
    cache.append(rows[:2], rank=0)
    cache.append(rows[2:], rank=0)
    assert cache.read() == {r.problem: r for r in rows}
    first, *rest = cache.path.read_text().splitlines()
    assert json.loads(first) == {"settings": SETTINGS} and len(rest) == 3


@given(st.text(max_size=30) | st.sampled_from(["\u2028\x85\x1c\r\n\0", "\ud800", '"\\', "<answer>4</answer>"]))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str):
    cache = SampleCache(tmp_path_factory.mktemp("any"), "base", SETTINGS)
    cache.append([row("a", text, text)], rank=0)
    assert cache.read() == {"a": row("a", text, text)}


def test_a_cut_line_is_dropped_wherever_it_was_cut(cache: SampleCache):
    """Also in the header, also in the middle of a character: nothing is lost but that line."""
    cache.append([row("a"), row("b", "\u00fc\u00fc", "\u00fc")], rank=0)
    whole = cache.path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        cache.path.write_bytes(whole[:size])
        kept = [("a", ends[1]), ("b", ends[2])]
        assert set(cache.read()) == {name for name, end in kept if size > end}, size
        cache.append([row("c")], rank=0)
        assert {"c"} <= set(cache.read()) and cache.path.read_bytes().count(b"settings") == 1, size


def test_a_block_that_is_sampled_again_takes_the_place_of_the_first(cache: SampleCache):
    cache.append([row("a", "old", "old")], rank=0)
    cache.append([row("a", "new", "new")], rank=0)
    assert cache.read()["a"].greedy.text == "new"
    cache.merge(["a"])
    assert cache.path.read_text().count('"problem"') == 1


def test_ranks_write_beside_each_other_and_are_merged_in_order(cache: SampleCache):
    cache.append([row("b")], rank=1)
    cache.append([row("a"), row("d")], rank=0)
    cache.append([row("c"), row("z")], rank=11)
    assert set(cache.read()) == set("abcdz")
    cache.merge(["a", "b", "c", "d"])
    assert list(cache.read()) == ["a", "b", "c", "d", "z"]  # z is of an evaluation of more problems
    assert [path.name for path in cache.path.parent.iterdir()] == ["base.jsonl"]


def test_merging_what_is_merged_leaves_the_file_alone(cache: SampleCache):
    cache.append([row("a"), row("b")], rank=0)
    before = cache.path.stat()
    cache.merge(["a", "b"])
    assert cache.path.stat() == before


def test_names_do_not_collide(tmp_path: Path):
    """A model may be called as another one's parts."""
    one, two = (SampleCache(tmp_path, name, SETTINGS) for name in ("m", "m.parts"))
    one.append([row("a")], rank=1)
    two.append([row("b")], rank=0)
    assert set(one.read()) == {"a"} and set(two.read()) == {"b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype: bfloat16: {path} was sampled with float32; choose another output_dir"),
        ({"sampling.stop": []}, r"sampling.stop: \[\]: {path} was sampled with \['x'\]"),
        ({"weights": "xyz"}, "models: the weights of base are not those that {path} was sampled from; choose another"),
        ({"new": 1}, "new: 1: {path} was sampled with None"),
    ],
)
def test_files_of_other_settings_are_refused(cache: SampleCache, changes: dict, message: str):
    cache.append([row("a")], rank=0)
    other = SampleCache(cache.path.parent, "base", SETTINGS | changes)
    with pytest.raises(ConfigError, match=message.format(path=cache.path)) as caught:
        other.read()
    assert len(caught.value.problems) == 1


def test_settings_are_compared_as_json_has_them(cache: SampleCache):
    cache.append([row("a")], rank=0)
    assert SampleCache(cache.path.parent, "base", SETTINGS | {"sampling.stop": ("x",)}).read()


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "{}", "3", '{"problem": "b"}']
    + [
        json.dumps({"problem": "b", "prompt": "p", "greedy": turn, "samples": []})
        for turn in (
            {"text": 3, "tokens": 1, "finish_reason": "stop"},
            {"text": "", "tokens": "1", "finish_reason": "stop"},
            {"text": "", "tokens": 1, "finish_reason": "end"},
            {"text": "", "tokens": 1},
        )
    ],
)
def test_a_broken_line_is_named(cache: SampleCache, line: str):
    cache.append([row("a")], rank=0)
    with cache.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"base.jsonl:3: not a line of samples .*; remove the file to sample again"):
        cache.read()


def test_a_file_of_something_else_is_named(cache: SampleCache):
    cache.path.parent.mkdir()
    cache.path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"base.jsonl:1: not a line of samples \(KeyError"):
        cache.read()


# --- weights and prompts ----------------------------------------------------------------------------------------------


def test_a_fingerprint_is_of_the_content_alone(tiny_llama: Path, tmp_path: Path):
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


def test_an_adapter_is_itself_and_its_base(make_tiny_llama, tmp_path: Path):
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
    found = {"a": replace(row("a"), prompt=prompt_digest(prompts[0]))}
    check_prompts(found, {"a": prompts[0], "b": prompts[1]}, Path("x.jsonl"))
    with pytest.raises(ConfigError, match="prompt: 1 problems, first a, have another prompt now than when x.jsonl was"):
        check_prompts(found, {"b": prompts[1], "a": prompts[2]}, Path("x.jsonl"))


def test_a_checkpoint_of_another_vocabulary(make_tiny_llama, tiny_llama: Path, tmp_path: Path, tokenizer):
    check_vocabulary(str(tiny_llama), tokenizer)
    small = make_tiny_llama(tmp_path / "small", vocab_size=len(tokenizer) - 1)
    size = len(tokenizer) - 1
    with pytest.raises(ValueError, match=f"vocabulary than its tokenizer: {size} embeddings, ids up to {size} in the"):
        check_vocabulary(str(small), tokenizer)


# --- sampling ---------------------------------------------------------------------------------------------------------

PROBLEMS = [Problem(id=f"p{i}", messages=(), answer="4") for i in range(11)]
PROMPTS = {problem.id: Prompt(token_ids=(int(problem.id[1:]),)) for problem in PROBLEMS}
PARAMS = SamplingParams(temperature=0.7, top_k=5, max_new_tokens=9, stop=("x",))


class Scribe:
    """Writes what it was asked for; ends the process at some call, or has other weights there."""

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
    monkeypatch.setattr(module, "BLOCK_COMPLETIONS", 6)  # 3 problems of 2 samples


def test_two_ranks_both_have_work_in_a_small_run(monkeypatch: pytest.MonkeyPatch):
    """8 problems of 16 samples are 128 completions: two blocks of 4 problems."""
    monkeypatch.setattr(module, "BLOCK_COMPLETIONS", BLOCK_COMPLETIONS)
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
        assert [turn.text for turn in found[problem.id].samples] == [f"{i} 0.7 {seed}" for seed in seeds]
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
    """So that each completion is sampled beside the same others, whose number decides the last bits."""
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


def test_what_other_weights_wrote_is_kept_by_none_and_stops_all_ranks(cache: SampleCache):
    """Four blocks of two calls each over three ranks; the second one's greedy completions are another run's."""
    said = "3 completions were not written by the policy's weights, which are of version 0: 3 by version -1"

    def run(world: World) -> bool:
        with pytest.raises(SyncError, match=said):
            write(cache, Scribe(strays_at=2 if world.rank == 1 else None), world)
        return True

    assert on_ranks(3, run) == [True] * 3
    assert set(cache.read()) == {problem.id for i, problem in enumerate(PROBLEMS) if i // 3 != 1}
