"""Sample files: what is in them, what they refuse, and what survives a kill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rolltune.errors import ConfigError
from rolltune.eval.sample_cache import ProblemSamples, Response, SampleCache

SETTINGS = {"weights": "abc", "dtype": "float32", "seed": 0, "sampling.samples": 2, "sampling.stop": ["x"]}


def record(problem: str, *texts: str) -> ProblemSamples:
    responses = [Response(text=text, tokens=len(text), finish_reason="stop") for text in texts or ("g", "s")]
    return ProblemSamples(problem=problem, prompt="p", greedy=responses[0], samples=tuple(responses[1:]))


@pytest.fixture
def cache(tmp_path: Path) -> SampleCache:
    return SampleCache(tmp_path / "samples", "base", SETTINGS)


def test_what_is_appended_is_read(cache: SampleCache):
    records = [record("a", "g", "1", "2"), record("b", "g", "3", "4"), record("c")]
    assert cache.read() == {}
    cache.append(records[:2], rank=0)
    cache.append(records[2:], rank=0)
    assert cache.read() == {r.problem: r for r in records}
    first, *rest = cache.path.read_text().splitlines()
    assert json.loads(first) == {"settings": SETTINGS} and len(rest) == 3


@given(st.text(max_size=30) | st.sampled_from(["\u2028\x85\x1c\r\n\0", "\ud800", '"\\', "<answer>4</answer>"]))
def test_any_text_survives(tmp_path_factory: pytest.TempPathFactory, text: str):
    cache = SampleCache(tmp_path_factory.mktemp("any"), "base", SETTINGS)
    cache.append([record("a", text, text)], rank=0)
    assert cache.read() == {"a": record("a", text, text)}


def test_a_cut_line_is_dropped_wherever_it_was_cut(cache: SampleCache):
    """In the header and in the middle of a character too; no other line is lost."""
    cache.append([record("a"), record("b", "\u00fc\u00fc", "\u00fc")], rank=0)
    whole = cache.path.read_bytes()
    ends = [i for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(len(whole)):
        cache.path.write_bytes(whole[:size])
        kept = [("a", ends[1]), ("b", ends[2])]
        assert set(cache.read()) == {name for name, end in kept if size > end}, size
        cache.append([record("c")], rank=0)
        assert {"c"} <= set(cache.read()) and cache.path.read_bytes().count(b"settings") == 1, size


def test_a_block_that_is_sampled_again_takes_the_place_of_the_first(cache: SampleCache):
    cache.append([record("a", "old", "old")], rank=0)
    cache.append([record("a", "new", "new")], rank=0)
    assert cache.read()["a"].greedy.text == "new"
    cache.merge(["a"])
    assert cache.path.read_text().count('"problem"') == 1


def test_ranks_write_beside_each_other_and_are_merged_in_order(cache: SampleCache):
    cache.append([record("b")], rank=1)
    cache.append([record("a"), record("d")], rank=0)
    cache.append([record("c"), record("z")], rank=11)
    assert set(cache.read()) == set("abcdz")
    cache.merge(["a", "b", "c", "d"])
    assert list(cache.read()) == ["a", "b", "c", "d", "z"]  # z is of an evaluation of more problems
    assert [path.name for path in cache.path.parent.iterdir()] == ["base.jsonl"]


def test_merging_what_is_merged_leaves_the_file_alone(cache: SampleCache):
    cache.append([record("a"), record("b")], rank=0)
    before = cache.path.stat()
    cache.merge(["a", "b"])
    assert cache.path.stat() == before


def test_names_do_not_collide(tmp_path: Path):
    """A model may be named like the parts of another one."""
    one, two = (SampleCache(tmp_path, name, SETTINGS) for name in ("m", "m.parts"))
    one.append([record("a")], rank=1)
    two.append([record("b")], rank=0)
    assert set(one.read()) == {"a"} and set(two.read()) == {"b"}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dtype": "bfloat16"}, "dtype: bfloat16: .*base.jsonl was sampled with float32"),
        ({"sampling.stop": []}, r"sampling.stop: \[\]: .* sampled with \['x'\]"),
        ({"weights": "xyz"}, "models: .*base.jsonl .* weights of base"),
        ({"new": 1}, "new: 1: .* sampled with None"),
    ],
)
def test_files_of_other_settings_are_refused(cache: SampleCache, changes: dict, message: str):
    cache.append([record("a")], rank=0)
    other = SampleCache(cache.path.parent, "base", SETTINGS | changes)
    with pytest.raises(ConfigError, match=message) as caught:
        other.read()
    assert len(caught.value.problems) == 1


def test_settings_are_compared_as_json_has_them(cache: SampleCache):
    cache.append([record("a")], rank=0)
    assert SampleCache(cache.path.parent, "base", SETTINGS | {"sampling.stop": ("x",)}).read()


@pytest.mark.parametrize(
    "line",
    ["", "{", "[]", "{}", "3", '{"problem": "b"}']
    + [
        json.dumps({"problem": "b", "prompt": "p", "greedy": response, "samples": []})
        for response in (
            {"text": 3, "tokens": 1, "finish_reason": "stop"},
            {"text": "", "tokens": "1", "finish_reason": "stop"},
            {"text": "", "tokens": 1, "finish_reason": "end"},
            {"text": "", "tokens": 1},
        )
    ],
)
def test_a_broken_line_is_named(cache: SampleCache, line: str):
    cache.append([record("a")], rank=0)
    with cache.path.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(ValueError, match=r"base.jsonl:3: "):
        cache.read()


def test_a_file_of_something_else_is_named(cache: SampleCache):
    cache.path.parent.mkdir()
    cache.path.write_text('{"step": 1}\n')
    with pytest.raises(ValueError, match=r"base.jsonl:1: "):
        cache.read()
