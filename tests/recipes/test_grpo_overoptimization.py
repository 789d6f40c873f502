"""GRPO with a gold check: the numbers stand beside the held-out accuracy, and the alarm is told."""

from __future__ import annotations

import sys

from tiny_run import read_rows

ANSWER = {"_component_": "rolltune.rewards.answer.answer_reward"}


def eval_with(reward: str, gold: dict, **options) -> dict:
    check = {
        "_component_": "rolltune.rewards.checks.overoptimization.OveroptimizationCheck",
        "reward": reward,
        "gold": gold,
    } | options
    return {"every_n_steps": 2, "max_problems": 4, "overoptimization": check | {"min_problems": 4}}


def test_a_run_with_a_gold_check(run_grpo):
    """The reward that is trained on has a part of its own; the random model gets no answer right."""
    rows = read_rows(run_grpo(num_steps=3, eval=eval_with("low", ANSWER)))
    plain = read_rows(run_grpo("plain", num_steps=3, eval={"every_n_steps": 2, "max_problems": 4}))
    checked = [row for row in rows if "overoptimization/scored" in row]
    assert [row["step"] for row in checked] == [0, 2, 3] == [row["step"] for row in rows if "heldout/accuracy" in row]
    assert [
        {name: value for name, value in row.items() if not name.startswith("overoptimization/")} for row in rows
    ] == plain
    first = checked[0]
    for row in checked:
        assert (
            row["overoptimization/scored"] == 4.0
            and row["overoptimization/mean"] == 0.0
            and 0 < row["overoptimization/train_mean"] < 1
        )
        assert row["overoptimization/gap"] == row["overoptimization/train_mean"]
        assert row["overoptimization/gap_change"] == row["overoptimization/gap"] - first["overoptimization/gap"]
        assert "overoptimization/correlation" not in row, "no turn is right, so gold has no variance"


def test_the_alarm_is_told(run_grpo, reward_module, capsys):
    """A judge that is taken in by and by: its mark grows with each turn that it reads, whatever stands there."""
    (reward_module / "taken_in.py").write_text(
        "from rolltune.types import Score\nread = []\ndef judge(problem, text):\n"
        "    read.append(text)\n    return Score(total=min(1.0, len(read) / 40))\njudge.full_marks = None\n"
    )
    rewards = {"judge": {"_component_": "taken_in.judge", "weight": 1.0}}
    rows = read_rows(run_grpo(num_steps=2, rewards=rewards, eval=eval_with("judge", ANSWER)))
    assert [row["overoptimization/alarm"] for row in rows if "overoptimization/alarm" in row] == [0.0, 1.0]
    told = [line for line in capsys.readouterr().out.splitlines() if line.startswith("eval.overoptimization: ALARM")]
    assert len(told) == 1 and "since the first evaluation the mean of judge went from" in told[0]


GOLD_JUDGE = """
from rolltune.rewards.judges.judge import Answer, Question
from rolltune.rewards.judges.panel import Panel
from rolltune.rewards.rubric.questions import Rating
from rolltune.types import Score

CALLED = []

class Judge:
    name = "gold"
    stop_reason = None
    async def ask(self, question):
        CALLED.append("smoke_test")
        return Answer(value=Rating(rating=5), failure=None, text="", judge=self.name, cached=False)
    def share_budget(self, path):
        CALLED.append(f"{path.parent.name}/{path.name}")
    def metrics(self):
        return {"calls": float(CALLED.count("finish"))}
    async def aclose(self):
        CALLED.append("close")

class Gold:
    def __call__(self, problem, text):
        return self.finish(self.begin(problem, text))
    def check(self, problems):
        CALLED.append(f"check {len(problems)}")
    def join(self, pool, key, problem):
        pool.add(key, Panel([Judge()]), smoke_question=Question(messages=(), answer=Rating), wait_seconds=1.0)
    def begin(self, problem, text):
        CALLED.append("begin")
    def finish(self, pending):
        CALLED.append("finish")
        return Score(total=0.5)
"""


def test_another_judge_as_the_gold_measure(run_grpo, reward_module, monkeypatch):
    (reward_module / "gold_judge.py").write_text(GOLD_JUDGE)
    monkeypatch.delitem(sys.modules, "gold_judge", raising=False)
    checked = eval_with("low", {"_component_": "gold_judge.Gold"})
    run_grpo("dry", eval=checked, overrides=("dry_run=true",))
    called = sys.modules["gold_judge"].CALLED
    assert called == ["check 4", "close"], "a dry run asks nobody"
    called.clear()
    rows = read_rows(run_grpo(num_steps=2, eval=checked))
    measured = [*["begin"] * 4, *["finish"] * 4]
    budget = "budgets/eval.overoptimization.sqlite"
    assert called == ["check 4", budget, "smoke_test", *measured, *measured, "close"]
    assert [row["overoptimization/judge/calls"] for row in rows if row["step"] > 0] == [4.0, 8.0]
