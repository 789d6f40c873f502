"""Problems that do not fit the model's context."""

import pytest
from transformers import Gemma2Config, MistralConfig, Qwen2Config

from rolltune.config.schema import ModelConfig
from rolltune.data.dataset import Dataset
from rolltune.errors import ConfigError
from rolltune.prompts import BATCH, PromptRenderer
from rolltune.run.lengths import Limit, fitting, sequence_limit
from rolltune.samplers.caches import shared_cache_limit
from rolltune.types import Problem

NATIVE = {"_component_": "rolltune.samplers.native.NativeSampler"}
VLLM = {"_component_": "rolltune.samplers.vllm.colocated"}
LIMIT = Limit(tokens=10, source="the context of m")


def problems(*contents: str) -> Dataset:
    return Dataset(
        Problem(id=f"p{i}", messages=({"role": "user", "content": text},)) for i, text in enumerate(contents)
    )


def test_lengths_are_those_of_the_prompts(tokenizer):
    many = problems(*("x" * (i % 50) for i in range(BATCH + 10)))
    render = PromptRenderer(tokenizer, prefill="ab")
    assert render.lengths(many) == [3 + i % 50 + 2 for i in range(BATCH + 10)]
    assert render.lengths(many)[-3:] == [len(render(problem).token_ids) for problem in many[-3:]]


def test_problems_that_do_not_fit_are_refused_together():
    with pytest.raises(ConfigError) as error:
        fitting(problems(*"abcdef"), [11, 10, 12, 30, 11, 1], LIMIT, key="data.train", parts="prompt", remedy=" so")
    (line,) = error.value.problems
    assert line.startswith("data.train: 4 of 6 problems do not fit the context of m, 10 tokens: p0, p2, p3, ...;")
    assert "the longest, p3, needs 30 (prompt)" in line and line.endswith("out so")


def test_dropped_problems_leave_the_others_in_order(capsys):
    kept = fitting(problems(*"abcd"), [11, 10, 12, 3], LIMIT, key="data.train", parts="prompt", drop=True)
    assert [problem.id for problem in kept] == ["p1", "p3"]
    assert "data.train: 2 of 4 problems do not fit" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="2 of 2 problems"):
        fitting(problems(*"ab"), [11, 11], LIMIT, key="data.train", parts="prompt", drop=True)


def test_what_fits_is_left_alone(capsys):
    whole = problems(*"ab")
    assert fitting(whole, [10, 1], LIMIT, key="data.train", parts="prompt", drop=True) is whole
    assert fitting(whole, [10**9, 1], None, key="data.train", parts="prompt") is whole
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("sampler", "limit"),
    [
        (None, 512),
        (NATIVE, 512),
        (VLLM, 512),
        (VLLM | {"max_model_len": 100}, 100),
        (VLLM | {"max_model_len": 1000}, 512),
    ],
)
def test_the_limit_is_the_smaller_one_of_context_and_sampler(tiny_llama, sampler, limit):
    found = sequence_limit(ModelConfig(path=str(tiny_llama)), sampler)
    assert found is not None and found.tokens == limit


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        (MistralConfig(sliding_window=100, max_position_embeddings=300), 100),
        (MistralConfig(sliding_window=None, max_position_embeddings=300), 300),
        (Gemma2Config(sliding_window=100, max_position_embeddings=300), 100),
        (Qwen2Config(sliding_window=100, max_position_embeddings=300), 300),
        (
            Qwen2Config(sliding_window=100, use_sliding_window=True, max_window_layers=1, max_position_embeddings=300),
            100,
        ),
    ],
)
def test_the_native_sampler_ends_at_a_sliding_window(config, limit):
    assert shared_cache_limit(config) == limit
