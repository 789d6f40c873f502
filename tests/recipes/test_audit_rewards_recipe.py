"""The audit as a command: what it finds, and its exit status."""

import json

import pytest
import yaml
from tiny_run import load_recipe

from rolltune.config.schema import AuditRewardsConfig
from rolltune.run import checks

PLANTED = '''
from rolltune.types import Score

def contains(problem, text):
    """The gold answer anywhere in the answer block: accepts lists of guesses, extra digits and denials."""
    return Score(total=float(problem.answer in text.rpartition("<answer>")[2]))

def anywhere(problem, text):
    return Score(total=float(problem.answer in text))

def too_strict(problem, text):
    return Score(total=float(text.endswith(f"<answer>{problem.answer}</answer>")))

def last_message(problem, text):
    """Reads the question, as a reward may."""
    assert problem.messages[-1]["role"] == "user"
    return too_strict(problem, text)

def boxed(problem, text):
    return Score(total=float(f"{{{problem.answer}}}" in text.rpartition("boxed")[2]))

def by_length(problem, text, *, completion):
    return Score(total=1.0)

def penalty(problem, text):
    return Score(total=-1.0)

penalty.full_marks = None
'''
DEFAULT = {
    "answer": {"_component_": "rolltune.rewards.answer.answer_reward"},
    "format": {"_component_": "rolltune.rewards.format.format_reward"},
}


@pytest.fixture
def audit(tmp_path, monkeypatch):
    """Run the recipe; returns its exit status and what it wrote."""
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(__import__("sys").modules, "planted_rewards", raising=False)
    (tmp_path / "planted_rewards.py").write_text(PLANTED)

    def run(rewards, **changes):
        tree = {
            "output_dir": str(tmp_path / "out"),
            "data": {"_component_": "rolltune.data.sums.sums", "count": 12, "high": 90},
            "rewards": rewards,
        }
        (tmp_path / "audit.yaml").write_text(yaml.safe_dump(tree | changes))
        cfg = checks.validate(AuditRewardsConfig, str(tmp_path / "audit.yaml"))
        status = 0
        try:
            load_recipe("audit_rewards").run(cfg)
        except SystemExit as stop:
            status = stop.code
        file = tmp_path / "out/audit.json"
        return status, json.loads(file.read_text()) if file.exists() else None

    return run


def planted(name: str) -> dict:
    return {name: {"_component_": f"planted_rewards.{name}"}}


def test_the_default_rewards_pass(audit, capsys):
    status, found = audit(DEFAULT)
    assert (status, found) == (0, {name: {"false_negatives": 0, "false_positives": 0} for name in DEFAULT})
    shown = capsys.readouterr().out
    assert "12 problems, rewards: answer, format" in shown
    assert "answer: 0 false negatives, 0 false positives" in shown
    assert "not audited" not in shown
    right, wrong = shown.partition("format: 0 false")[::2]
    assert "wrong  guess_list" in right and "wrong  " not in wrong  # the format does not depend on the answer


@pytest.mark.parametrize("name", ["contains", "anywhere"])
def test_a_reward_that_searches_for_the_answer_fails(audit, capsys, name):
    status, found = audit(DEFAULT | planted(name))
    assert status == 1
    assert found["answer"] == found["format"] == {"false_negatives": 0, "false_positives": 0}
    assert found[name]["false_positives"] >= 12 * 6
    shown = capsys.readouterr().out
    assert f"{name}: {found[name]['false_negatives']} false negatives, {found[name]['false_positives']} false" in shown
    assert "wrong guess_list, sums/train/seed0/0: scored 1: " in shown


def test_a_reward_that_is_too_strict_fails(audit):
    status, found = audit(planted("too_strict"))
    assert (
        status == 1 and found["too_strict"]["false_negatives"] >= 12 * 6 and not found["too_strict"]["false_positives"]
    )


def test_one_miss_is_enough(audit):
    status, found = audit(planted("too_strict"), max_problems=1)
    assert status == 1 and 0 < found["too_strict"]["false_negatives"] < 15


def test_a_reward_may_look_at_the_question(audit):
    assert audit(planted("last_message"))[0] == 1


def test_rewards_that_give_a_right_response_less_than_1_are_left_out(audit, capsys):
    loops = {"loops": {"_component_": "rolltune.rewards.repetition.repetition_reward"}}
    status, found = audit(DEFAULT | loops | planted("by_length") | planted("penalty"))
    assert status == 0 and set(found) == set(DEFAULT)
    shown = capsys.readouterr().out
    (line,) = (line for line in shown.splitlines() if "not audited" in line)
    assert line.endswith("by_length, loops, penalty")
    with pytest.raises(ValueError, match="rewards: none of by_length, penalty"):
        audit(planted("by_length") | planted("penalty"))


def test_doubled_braces_are_single_ones(audit):
    """answer_format is a format string here as in the self-test, which writes \\boxed{4}."""
    answer_format = "<think>{solution}</think>\n<answer>\\boxed{{{answer}}}</answer>"
    status, found = audit(DEFAULT, answer_format=answer_format)
    assert status == 0 and not found["answer"]["false_negatives"]
    status, found = audit(planted("boxed"), answer_format=answer_format)
    assert found["boxed"]["false_negatives"] < 12 * 11  # at least the plain spelling is accepted


def test_the_first_problems_and_the_seed(audit, capsys):
    audit(planted("contains"), max_problems=3)
    assert "3 problems, rewards: contains" in capsys.readouterr().out
    first = audit(planted("contains"), seed=1)
    assert audit(planted("contains"), seed=1) == first


def test_labelled_answers(audit, tmp_path, capsys):
    """All misses are shown; a reward of something other than correctness sees right answers only."""
    answers = [{"answer": str(n), "right": n == 2, "kind": "off by some"} for n in range(9)]
    answers.append({"answer": "**2**", "right": True, "kind": "bold"})
    records = [
        {"id": f"sum/{i}", "question": "1 + 1?", "gold": "2", "working": "So it is 2.", "answers": answers}
        for i in range(3)
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, records)))
    data = {"_component_": "rolltune.data.answers_labelled.answers_labelled", "path": str(tmp_path / "own.jsonl")}
    status, found = audit(DEFAULT | planted("anywhere") | planted("too_strict"), data=data, max_problems=2)
    assert status == 1 and found == {
        "answer": {"false_negatives": 0, "false_positives": 0},
        "format": {"false_negatives": 0, "false_positives": 0},
        "anywhere": {"false_negatives": 0, "false_positives": 16},
        "too_strict": {"false_negatives": 2, "false_positives": 0},
    }
    shown = capsys.readouterr().out
    assert "2 problems, 20 labelled answers, rewards: " in shown
    assert shown.count("wrong off by some, sum/1: scored 1: ") == 8
    assert audit(DEFAULT, data=data, dry_run=True) == (0, found)  # of the run before
    assert "gold answers of answer: 3 number" in capsys.readouterr().out


def test_dry_run_writes_nothing(audit, capsys):
    assert audit(planted("anywhere"), dry_run=True) == (0, None)
    assert "nothing was audited" in capsys.readouterr().out
    assert audit(DEFAULT, dry_run=True) == (0, None)
    assert "gold answers of answer: 12 number" in capsys.readouterr().out
