"""A step's metrics and a run's summary, computed by hand."""

import io
import json
from math import sqrt

import pytest
import torch
from rich.console import Console
from thread_world import on_ranks

from rolltune.distributed import World
from rolltune.metrics.step_metrics import rollout_metrics, update_metrics
from rolltune.metrics.summary import live_line, write_summary
from rolltune.rollout import Rollout, SampledGroup
from rolltune.types import Completion, Group, Problem, Prompt, Score

ONE = World(rank=0, size=1, device=torch.device("cpu"))


def make_group(*members: tuple[int, str, Score]) -> Group:
    """(length, finish reason, score) of each completion."""
    return Group(
        problem=Problem(id="p", messages=()),
        prompt=Prompt(token_ids=(1,)),
        completions=tuple(
            Completion(token_ids=(0,) * n, logprobs=(0.0,) * n, finish_reason=end, policy_version=0, text="")  # pyright: ignore[reportArgumentType]
            for n, end, _ in members
        ),
        scores=tuple(score for *_, score in members),
    )


def make_rollout(*groups: Group) -> Rollout:
    sampled = [SampledGroup(group=group, number=None, advantages=None) for group in groups]
    return Rollout(groups=sampled, num_kept=0, data_position=0)


def score(total, answer, *, failure=None, **parts) -> Score:
    named = {"answer": answer} | {name.replace("_", "/"): value for name, value in parts.items()}
    return Score(total=total, parts=named | ({f"answer/failure/{failure}": 1.0} if failure else {}), failure=failure)


MIXED = make_group(
    (2, "stop", score(1.2, 1.0, format_tags=0.5)),
    (4, "stop", score(0.2, 0.0, format_tags=0.25)),
    (9, "length", score(0.0, 0.0, failure="no_answer", format_tags=None)),
    (9, "length", score(None, None, failure="timeout")),
)
EQUAL = make_group((1, "stop", score(0.2, 0.0)), (3, "stop", score(0.2, 0.0)))
SINGLE = make_group((5, "stop", score(None, None, failure="timeout")), (7, "stop", score(1.0, 1.0)))

# Totals 1.2 0.2 0 0.2 0.2 1: mean 2.8 / 6; the answer's parts 1 0 0 0 0 1. About its group's mean, MIXED has totals of
# 11/15 -4/15 -7/15 and lengths of -3 -1 4, EQUAL has 0 0 and -1 1, SINGLE 0 and 0.
EXPECTED = {
    "reward/mean": 2.8 / 6,
    "reward/std": sqrt((1.44 + 3 * 0.04 + 1.0) / 6 - (2.8 / 6) ** 2),
    "reward/unscored": 2 / 8,
    "reward/length_correlation": (-33 + 4 - 28) / 15 / sqrt((121 + 16 + 49) / 225 * (9 + 1 + 16 + 1 + 1)),
    "reward/answer/mean": 2 / 6,
    "reward/answer/std": sqrt(2 / 6 - (2 / 6) ** 2),
    "reward/format/tags/mean": 0.375,
    "reward/format/tags/std": 0.125,
    "failures/answer/no_answer": 1 / 8,
    "failures/answer/timeout": 2 / 8,
    "groups/zero_variance": 1 / 3,
    "groups/skipped": 1 / 3,
    "completions/length_mean": (2 + 4 + 9 + 9 + 1 + 3 + 5 + 7) / 8,
    "completions/truncated": 2 / 8,
}


def test_what_was_sampled():
    assert rollout_metrics(make_rollout(MIXED, EQUAL, SINGLE), ONE) == pytest.approx(EXPECTED)


def test_ranks_agree_though_each_sees_other_parts_and_failures():
    groups = [EQUAL, MIXED, SINGLE]
    for metrics in on_ranks(3, lambda world: rollout_metrics(make_rollout(groups[world.rank]), world)):
        assert metrics == pytest.approx(EXPECTED)


def test_nothing_scored_at_all():
    silent = make_group((3, "stop", Score(total=None, parts={"judge": None})))
    metrics = rollout_metrics(make_rollout(silent), ONE)
    assert metrics == {
        "reward/unscored": 1.0,
        "groups/zero_variance": 0.0,
        "groups/skipped": 1.0,
        "completions/length_mean": 3.0,
        "completions/truncated": 0.0,
    }


def test_equal_rewards_have_no_deviation():
    """Rounding can make the mean of squares smaller than the square of the mean."""
    metrics = rollout_metrics(make_rollout(make_group(*[(1, "stop", Score(total=0.1))] * 10)), ONE)
    assert metrics["reward/std"] == pytest.approx(0.0, abs=1e-8)


def lengths_and_rewards(*members: tuple[int, float | None]) -> Group:
    return make_group(*[(length, "stop", Score(total=total)) for length, total in members])


@pytest.mark.parametrize(
    ("groups", "expected"),
    [
        # Longer is better within each group, though the group of long completions has lower rewards.
        ([[(1, 0.8), (2, 0.9)], [(50, 0.1), (51, 0.2)]], 1.0),
        ([[(1, 0.9), (2, 0.8)], [(50, 0.1), (51, 0.2)]], 0.0),
        ([[(4, 0.0), (2, 1.0)]], -1.0),
        ([[(1, 0.0), (2, 0.0), (3, 1.0)]], sqrt(0.75)),  # 1 / sqrt(2 * 2/3)
        # An unscored completion does not count in its group's means.
        ([[(1, 0.0), (2, 0.0), (3, 1.0), (900, None)]], sqrt(0.75)),
        ([[(5, 0.1), (6, 0.1), (7, 0.1)]], None),
        ([[(5, 0.1), (5, 0.9)]], None),
        ([[(5, 0.1)], [(9, 0.9)], [(3, None), (4, None)]], None),
    ],
)
def test_correlation_of_reward_and_length_within_groups(groups, expected):
    rollouts = [make_rollout(lengths_and_rewards(*group)) for group in groups]
    metrics = rollout_metrics(make_rollout(*(rollout.sampled[0] for rollout in rollouts)), ONE)
    if expected is None:
        assert "reward/length_correlation" not in metrics
    else:
        assert metrics["reward/length_correlation"] == pytest.approx(expected, abs=1e-12)
    for of_rank in on_ranks(len(groups), lambda world: rollout_metrics(rollouts[world.rank], world)):
        assert of_rank.get("reward/length_correlation") == pytest.approx(expected, abs=1e-12)


# --- updates ----------------------------------------------------------------------------------------------------------


def test_several_updates_are_merged():
    updates = [
        {"loss": 1.0, "lr": 0.1, "ratio/max": 1.5, "ratio/min": 0.7, "mismatch/max_abs": 0.25, "clip_fraction": 0.0}
        | {"skipped_step": 0.0},
        {"lr": 0.2, "skipped_step": 1.0},  # a minibatch without signal
        {"loss": 4.0, "lr": 0.2, "ratio/max": 1.2, "ratio/min": 0.5, "mismatch/max_abs": 0.5, "kl": 0.125}
        | {"skipped_step": 0.0},
    ]
    assert update_metrics(updates) == {
        "updates": 2.0,
        "skipped_step": 1 / 3,
        "loss": 2.5,
        "lr": 0.2,
        "ratio/max": 1.5,
        "ratio/min": 0.5,
        "mismatch/max_abs": 0.5,
        "clip_fraction": 0.0,
        "kl": 0.125,
    }
    nothing = {"lr": 0.2, "skipped_step": 1.0}
    assert update_metrics([nothing, nothing]) == {"updates": 0.0} | nothing
    assert update_metrics([]) == {"updates": 0.0}


def test_a_skipped_update_has_no_gradient_norm_and_is_not_counted():
    updates = [
        {"loss": 1.0, "loss_scale": 4.0, "skipped_step": 1.0, "lr": 0.1},
        {"loss": 2.0, "loss_scale": 2.0, "skipped_step": 0.0, "lr": 0.1, "grad_norm": 3.0},
    ]
    assert update_metrics(updates) == {
        "updates": 1.0,
        "loss": 1.5,
        "loss_scale": 2.0,
        "skipped_step": 0.5,
        "lr": 0.1,
        "grad_norm": 3.0,
    }
    assert update_metrics(updates[:1])["updates"] == 0.0


def test_live_line():
    metrics = {"reward/mean": 0.5, "kl": 0.0, "heldout/score": 0.25, "reward/std": 1.0, "lr": 1.0}
    assert live_line(metrics) == {"reward": 0.5, "kl": 0.0, "held-out": 0.25}
    assert live_line({"reward/mean": 0.5, "groups/zero_variance": 1.0}) == {"reward": 0.5, "signal": "none"}


# --- summary ----------------------------------------------------------------------------------------------------------


def evaluation(accuracy: float) -> dict:
    return {
        "heldout/accuracy": accuracy,
        "heldout/score": accuracy,
        "heldout/accuracy_low": accuracy - 0.1,
        "heldout/accuracy_high": accuracy + 0.1,
    }


def summarize(output_dir, records) -> tuple[dict, str]:
    (output_dir / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    console = Console(file=io.StringIO(), width=300)
    summary = write_summary(output_dir, console)
    assert json.loads((output_dir / "summary.json").read_text()) == summary
    return summary, console.file.getvalue()  # pyright: ignore[reportAttributeAccessIssue]


def test_summary_of_fifths(tmp_path):
    records = [{"step": 0, **evaluation(0.25)}]
    for step in range(1, 12):  # 11 steps: a fifth is 2
        records.append(
            {"step": step, "reward/mean": float(step), "reward/answer/mean": step / 10, "seconds/train": 30.0}
        )
    records[4] |= evaluation(0.75)
    records[8] |= evaluation(0.75)
    records[11] |= {**evaluation(0.5), "seconds/sample": 90.0}
    summary, shown = summarize(tmp_path, records)
    assert summary == {
        "steps": 11,
        "train_minutes": (11 * 30.0 + 90.0) / 60,
        "steps_without_signal": 0,
        "steps_without_update": 0,
        "reward_first_fifth": 1.5,
        "reward_last_fifth": 10.5,
        "reward_answer_first_fifth": pytest.approx(0.15),
        "reward_answer_last_fifth": pytest.approx(1.05),
        "heldout_before": 0.25,
        "heldout_before_interval": [0.15, 0.35],
        "heldout_before_score": 0.25,
        "heldout_after": 0.5,
        "heldout_after_interval": [0.4, 0.6],
        "heldout_after_score": 0.5,
        "heldout_best": 0.75,
        "heldout_best_step": 4,  # the first of equals, as its checkpoint
    }
    assert "0.250  (95 %: 0.150 to 0.350)" in shown and "0.500  (95 %: 0.400 to 0.600)" in shown
    assert "11 steps in 7.0 minutes; best held-out score 0.750 at step 4" in shown


def test_the_summary_counts_steps_that_trained_nothing(tmp_path):
    equal = {"reward/mean": 1.0, "groups/zero_variance": 1.0}
    records = [{"step": step, "updates": 0.0, **equal} for step in (1, 2)] + [{"step": 3, "updates": 1.0, **equal}]
    summary, shown = summarize(tmp_path, records)
    assert (summary["steps_without_signal"], summary["steps_without_update"]) == (3, 2)
    assert "optimizer steps were taken in 1 of 3 steps: all rewards of a group were equal" in shown
    _, shown = summarize(tmp_path, records[2:])  # the KL term alone moves the weights
    assert "in 1 of 1 steps all rewards of a group were equal" in shown


def test_fewer_than_five_steps_are_fifths_of_one(tmp_path):
    records = [{"step": 0, **evaluation(0.5)}, *({"step": s, "reward/mean": float(s)} for s in (1, 2, 3))]
    summary, _ = summarize(tmp_path, records)
    assert (summary["reward_first_fifth"], summary["reward_last_fifth"]) == (1.0, 3.0)
    # The only evaluation is the one before the first step.
    assert (summary["heldout_best"], summary["heldout_best_step"], summary["heldout_after"]) == (0.5, 0, 0.5)


def test_the_start_is_the_best_only_where_there_is_nothing_else(tmp_path):
    """Step 0 has no checkpoint, so best/ holds the best of the others."""
    records = [{"step": 0, **evaluation(0.9)}, {"step": 1, "reward/mean": 0.0, **evaluation(0.2)}]
    summary, _ = summarize(tmp_path, records)
    assert (summary["heldout_best"], summary["heldout_best_step"]) == (0.2, 1)


def test_values_that_are_null_or_missing_are_left_out(tmp_path):
    records = [
        {"step": 0, **evaluation(0.5)},
        {"step": 1, "reward/mean": None, "reward/a/mean": 7.0, "seconds/train": None},
        {"step": 2, "reward/mean": 1.0, "reward/a/mean": None, "reward/b/mean": 0.25, "seconds/train": 60.0},
        {"step": 3, "reward/mean": 2.0, "reward/a/mean": 0.5, "reward/c/mean": None},
        {"step": 4, "updates": 0.0},
    ]
    summary, shown = summarize(tmp_path, records)
    assert summary["steps"] == 2 and summary["train_minutes"] == 1.0
    assert (summary["reward_first_fifth"], summary["reward_last_fifth"]) == (1.0, 2.0)
    assert (summary["reward_a_first_fifth"], summary["reward_a_last_fifth"]) == (None, 0.5)
    assert (summary["reward_b_first_fifth"], summary["reward_b_last_fifth"]) == (0.25, None)
    assert (summary["reward_c_first_fifth"], summary["reward_c_last_fifth"]) == (None, None)
    (line,) = [line.split("│") for line in shown.splitlines() if line.startswith("reward a ")]
    assert [cell.strip() for cell in line] == ["reward a", "-", "0.500"]


def test_a_run_in_which_nothing_was_ever_scored(tmp_path):
    summary, _ = summarize(tmp_path, [{"step": 0, **evaluation(0.5)}, {"step": 1, "reward/unscored": 1.0}])
    assert summary["steps"] == 0 and "reward_first_fifth" not in summary


def test_a_run_whose_judge_never_scored_a_held_out_response(tmp_path):
    records = [{"step": 0, "heldout/unscored": 1.0}, {"step": 1, "reward/mean": 0.5, "reward/r/criterion/x/mean": 1.0}]
    summary, shown = summarize(tmp_path, records)
    assert summary["reward_first_fifth"] == 0.5 and not [name for name in summary if "heldout" in name]
    assert "no held-out response was scored" in shown and "criterion" not in shown


def test_a_graded_measure_is_shown_beside_the_share_of_full_marks(tmp_path):
    records = [{"step": 0, **evaluation(0.0), "heldout/score": 0.4}, {"step": 1, "reward/mean": 0.5, **evaluation(0.5)}]
    _, shown = summarize(tmp_path, records)
    (line,) = [line.split("│") for line in shown.splitlines() if line.startswith("held-out score")]
    assert [cell.strip() for cell in line[1:]] == ["0.400", "0.500"]
