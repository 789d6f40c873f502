"""The check of sft's config."""

import pytest


@pytest.mark.parametrize(
    ("override", "fragment"),
    [
        # sft measures the loss on held-out problems, no accuracy.
        ("eval.correct={_component_: rolltune.rewards.countdown.countdown_reward}", "eval.correct: no such key"),
        ("eval.overoptimization.reward=x", "eval.overoptimization: no such key"),
        ("eval.every_n_steps=0", "eval.every_n_steps: 0; must be >= 1"),
        ("model.batch_invariant=true", "model.batch_invariant: true; has no effect in sft"),
        ("batch.examples_per_step=0", "batch.examples_per_step: 0; must be >= 1"),
        ("batch.microbatch_tokens=0", "batch.microbatch_tokens: 0; must be >= 1"),
        ("answer_format='text'", "answer_format: 'text'; must have {solution} or {answer}"),
        ("optimizer.lr=0", "optimizer.lr: 0; must be > 0"),
        ("model.dtype=bfloat16", "model.master_weights: false; must be true with model.dtype bfloat16"),
    ],
)
def test_one_mistake_is_one_message(sft, override: str, fragment: str):
    (found,) = sft(override)
    assert fragment in found


def test_the_answer_format_may_be_a_whole_trace(sft):
    assert sft("answer_format='{solution}'") == []


def test_number_of_processes(sft):
    assert sft("batch.examples_per_step=6", world_size=3) == []
    (found,) = sft("batch.examples_per_step=6", world_size=4)
    assert found.startswith("batch.examples_per_step: 6; must be divisible by the number of processes, 4")
