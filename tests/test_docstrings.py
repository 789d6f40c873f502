"""The examples in docstrings, which the API reference shows, give what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import rolltune
from rolltune.rewards.answer import answer_reward
from rolltune.rewards.format import format_reward
from rolltune.rewards.judges.judge import Question
from rolltune.rewards.rubric.questions import Rating
from rolltune.rewards.rubric.schema import Criterion, Rubric
from rolltune.types import Completion, Problem

PROBLEM = Problem(id="p/0", messages=({"role": "user", "content": "?"},), answer="18")
TEXT = "<think>9 * 2 = 18</think> <answer>18</answer>"
ASKED = 'Does this deserve {"rating": 10}?'
# What examples take for granted.
NAMES = {
    "problem": PROBLEM,
    "rubric": Rubric.of(Criterion(title="Unit", description="States the unit.", category="important")),
    "question": Question(messages=({"role": "user", "content": ASKED},), answer=Rating),
    "completion": Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text=TEXT),
    "answer_reward": answer_reward,
    "format_reward": format_reward,
}
NEEDS_VLLM = "rolltune.samplers.vllm"


def test_examples_give_what_they_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said: list[str] = []
    runner, finder = doctest.DocTestRunner(), doctest.DocTestFinder()
    for found in pkgutil.walk_packages(rolltune.__path__, "rolltune."):
        if not found.name.startswith((NEEDS_VLLM, "rolltune.recipes")):
            for test in finder.find(importlib.import_module(found.name), extraglobs=NAMES):
                runner.run(test, out=said.append)
    assert not said, "".join(said)
    assert runner.tries > 50  # the rewards among them, through their link
