import json
import shutil
from dataclasses import replace

import pytest
import torch
from tiny_run import read_rows
from transformers import AutoModelForCausalLM

from rolltune.errors import EngineError, RunStopped, SyncError

ALGORITHMS = {
    "grpo": ("rolltune.advantages.group_zscore", "rolltune.losses.grpo.GRPOLoss", {"kl_coef": 0.04}),
    "dr_grpo": (
        "rolltune.advantages.group_mean",
        "rolltune.losses.dr_grpo.DrGRPOLoss",
        {"max_completion_tokens": 12},
    ),
    "dapo": ("rolltune.advantages.group_zscore", "rolltune.losses.dapo.DAPOLoss", {}),
    "gspo": ("rolltune.advantages.group_zscore", "rolltune.losses.gspo.GSPOLoss", {}),
    "cispo": ("rolltune.advantages.group_zscore", "rolltune.losses.cispo.CISPOLoss", {}),
    "rloo": ("rolltune.advantages.leave_one_out", "rolltune.losses.reinforce.ReinforceLoss", {}),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name == "grpo" else pytest.mark.slow) for name in ALGORITHMS]
)
def test_every_algorithm_raises_the_reward(run_grpo, name):
    advantage, loss, options = ALGORITHMS[name]
    output_dir = run_grpo(
        advantage={"_component_": advantage},
        loss={"_component_": loss, **options},
        optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-2},
        sampling={"group_size": 8, "max_new_tokens": 12},
        num_steps=12,
        eval={"every_n_steps": 12, "max_problems": 2},
        checkpoint={"every_n_steps": 12},
    )
    rewards = [row["reward/low/mean"] for row in read_rows(output_dir) if "reward/low/mean" in row]
    assert len(rewards) == 12
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.1


def test_what_a_run_leaves_behind(run_grpo):
    output_dir = run_grpo()
    rows = read_rows(output_dir, timeless=False)
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert "heldout/accuracy" in rows[0] and "heldout/accuracy" in rows[4] and "heldout/accuracy" not in rows[3]
    for name in (
        "reward/mean reward/std reward/low/mean reward/answer/mean failures/answer/no_answer groups/zero_variance "
        "groups/skipped completions/length_mean completions/truncated kl entropy clip_fraction grad_norm lr loss "
        "ratio/mean ratio/min ratio/max ratio/outside mismatch/mean_abs mismatch/max_abs mismatch/k3 "
        "mismatch/mean_ratio mismatch/outside mismatch/position/quarter_1 mismatch/position/quarter_4 "
        "tokens_per_second/sample tokens_per_second/train seconds/sample seconds/train memory/peak_gib"
    ).split():
        assert name in rows[1], name
    assert rows[1]["kl"] == 0.0 and rows[4]["kl"] > 0.0
    assert rows[1]["ratio/mean"] == 1.0
    assert rows[1]["mismatch/max_abs"] < 1e-3
    summary = json.loads((output_dir / "summary.json").read_text())
    assert {"train_minutes", "reward_first_fifth", "reward_last_fifth", "heldout_before", "heldout_after"} <= set(
        summary
    )
    assert summary["heldout_before_interval"][0] <= summary["heldout_before"] <= summary["heldout_before_interval"][1]
    assert (output_dir / "curves.png").read_bytes().startswith(b"\x89PNG")
    samples = [json.loads(line) for line in (output_dir / "samples/step_000004.jsonl").read_text().splitlines()]
    assert len(samples) == 16
    gaps = [abs(gap) for sample in samples for gap in sample.get("token_gaps", ())]
    assert sum(gaps) / len(gaps) == pytest.approx(rows[4]["mismatch/mean_abs"], rel=0.05)  # written to two digits
    AutoModelForCausalLM.from_pretrained(output_dir / "best")
    kept = sorted(path.name for path in (output_dir / "checkpoints").iterdir())
    assert kept[-2:] == ["step_000003", "step_000004"] and len(kept) <= 3


def test_several_minibatches_and_iterations_take_the_ratio_off_one(run_grpo):
    output_dir = run_grpo(
        batch={"prompts_per_step": 4, "num_iterations": 2, "minibatches": 2, "microbatch_tokens": 128},
        optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-2},
        num_steps=2,
    )
    row = read_rows(output_dir)[1]
    assert row["updates"] == 4.0
    assert row["ratio/max"] > 1.001 and row["ratio/min"] < 0.999


def test_dynamic_sampling_keeps_groups_with_variance_only(run_grpo):
    output_dir = run_grpo(
        loss={"_component_": "rolltune.losses.dapo.DAPOLoss"},
        batch={"prompts_per_step": 2, "microbatch_tokens": 128, "dynamic_sampling_rounds": 3},
        num_steps=2,
    )
    assert len(read_rows(output_dir)) == 3


def test_truncated_sampling_is_trained_on_as_it_was_sampled(run_grpo):
    output_dir = run_grpo(
        sampling={"group_size": 4, "max_new_tokens": 12, "top_p": 0.9},
        batch={"prompts_per_step": 4, "num_iterations": 2, "minibatches": 2, "microbatch_tokens": 128},
        optimizer={"_component_": "torch.optim.AdamW", "lr": 1e-2},
        correction={"_component_": "rolltune.corrections.TokenTIS"},
        mismatch={"_component_": "rolltune.mismatch.MismatchLimit"},
        num_steps=3,
    )
    rows = read_rows(output_dir)[1:]
    assert all(row["mismatch/mean_ratio"] == pytest.approx(1, abs=1e-4) for row in rows)
    assert all(row["mismatch/max_abs"] < 1e-3 for row in rows)
    assert rows[0]["ratio/max"] > 1.001 and rows[2]["kl"] > 0
    samples = [json.loads(line) for line in (output_dir / "samples/step_000001.jsonl").read_text().splitlines()]
    assert "text" in samples[0] and not any("support" in sample for sample in samples)


def test_a_sampler_without_supports_stops_a_truncated_run(run_grpo, monkeypatch):
    from rolltune.samplers.native import NativeSampler

    right = NativeSampler.generate

    def generate(self, *args, **options):
        return [tuple(replace(c, support=None) for c in each) for each in right(self, *args, **options)]

    monkeypatch.setattr(NativeSampler, "generate", generate)
    with pytest.raises(ValueError, match=r"sampling.top_p: 0.9, sampling.top_k: 0: NativeSampler"):
        run_grpo(sampling={"group_size": 4, "max_new_tokens": 12, "top_p": 0.9})


def test_held_out_turns_of_other_weights_stop_a_run(run_grpo, tmp_path, monkeypatch):
    from rolltune.samplers.native import NativeSampler

    monkeypatch.setattr(NativeSampler, "sync", lambda self, version: setattr(self, "policy_version", -1))
    with pytest.raises(SyncError, match="4 completions were not written by the policy's weights.*: 4 by version -1"):
        run_grpo()
    assert not (tmp_path / "run/metrics.jsonl").read_text()


def test_a_step_after_which_the_evaluation_fails_is_saved_and_logged(run_grpo, tmp_path, monkeypatch):
    """An engine that ends while the policy of a finished step is evaluated costs the evaluation and nothing else."""
    from rolltune.samplers.native import NativeSampler

    right, syncs = NativeSampler.sync, []

    def sync(self, version):
        syncs.append(version)
        if syncs == [0, 0, 1]:  # evaluation before the first step, the first step, the evaluation after it
            raise EngineError("the server has ended")
        right(self, version)

    settings = {"num_steps": 2, "eval": {"every_n_steps": 1, "max_problems": 2}}
    with monkeypatch.context() as patch, pytest.raises(RunStopped, match="a checkpoint of step 1 is in"):
        patch.setattr(NativeSampler, "sync", sync)
        run_grpo(**settings)
    assert [row["step"] for row in read_rows(tmp_path / "run")] == [0, 1]
    again = read_rows(run_grpo(**settings, overrides=("resume=true",)))
    whole = read_rows(run_grpo("whole", **settings))
    assert again[1] == {key: value for key, value in whole[1].items() if not key.startswith("heldout/")}
    assert again[2] == whole[2]


def test_lora_run_writes_an_adapter(run_grpo, tiny_llama):
    output_dir = run_grpo(lora={"rank": 4, "alpha": 8.0, "dropout": 0.1}, num_steps=2)
    assert (output_dir / "best" / "adapter_config.json").exists()
    assert read_rows(output_dir)[1]["kl"] == 0.0


def test_lr_schedule_runs_over_all_updates(run_grpo):
    output_dir = run_grpo(
        lr_scheduler={
            "_component_": "transformers.get_scheduler",
            "name": "cosine",
            "num_warmup_steps": 2,
        }
    )
    lrs = [row["lr"] for row in read_rows(output_dir)[1:]]
    assert lrs[:3] == pytest.approx([0.0, 5e-4, 1e-3]) and lrs[3] == pytest.approx(5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("truncation", [{}, {"top_k": 20, "top_p": 0.9}], ids=["full", "truncated"])
def test_resumed_in_process_equals_unbroken(run_grpo, truncation):
    """Two steps, then two more from the checkpoint: the same numbers as four in one go, to the last bit."""
    sampling = {"group_size": 4, "max_new_tokens": 12} | truncation
    whole = read_rows(run_grpo("whole", sampling=sampling))
    keep_all = {"every_n_steps": 1, "keep_last": 4}
    output_dir = run_grpo("again", checkpoint=keep_all, sampling=sampling)
    for step in (3, 4):
        shutil.rmtree(output_dir / f"checkpoints/step_{step:06d}")
    run_grpo("again", checkpoint=keep_all, sampling=sampling, overrides=("resume=true",))
    assert read_rows(output_dir) == whole


def test_earlier_run_in_the_way(run_grpo):
    run_grpo("run", num_steps=1)
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run; add resume=true"):
        run_grpo("run", num_steps=1)
    with pytest.raises(ValueError, match="seed: 7: the run in .* was started with 0"):
        run_grpo("run", num_steps=1, overrides=("resume=true", "seed=7"))


def test_gold_answer_that_the_reward_does_not_take_stops_the_run(run_grpo):
    with pytest.raises(ValueError, match="reward `answer` gives the gold answer full marks: 0.0 instead of 1"):
        run_grpo(answer_format="{solution} So it is {answer}.")


def test_every_gold_answer_is_read_before_anything_is_loaded(run_grpo, tmp_path, capsys, monkeypatch):
    answers = ["5 inches", "016", 1e-7, r"10,\!000", "12/25/2024", "B", "(1, 2)"]
    rows = "".join(json.dumps({"question": f"Question {i}?", "answer": a}) + "\n" for i, a in enumerate(answers))
    (tmp_path / "rows.jsonl").write_text(rows)
    data = {
        "train": {"_component_": "rolltune.data.jsonl.jsonl", "path": str(tmp_path / "rows.jsonl")},
        "heldout": {"_component_": "rolltune.data.sums.sums", "count": 4, "high": 9, "split": "heldout"},
    }
    run_grpo(data=data, overrides=("dry_run=true",))
    assert "gold answers of answer: 4 number, 1 text, 1 choice, 1 list" in capsys.readouterr().out
    message = r"rewards.answer: 3 of 7 gold answers cannot be used: problem 'rows/5': .*'12/25/2024' is not of the kind"
    monkeypatch.setattr("rolltune.model.policy.build_policy", None)  # weights are loaded after the check
    with pytest.raises(ValueError, match=message):
        run_grpo(data=data, overrides=("rewards.answer.kind=number",))


def test_a_trainer_that_forgets_the_temperature_is_caught(run_grpo, monkeypatch):
    from rolltune.model import forward

    right = forward.selected_logprobs
    monkeypatch.setattr(forward, "selected_logprobs", lambda h, w, t, temperature, *_, **__: right(h, w, t, 1.0))
    with pytest.raises(ValueError, match="sampler and trainer give the same log-probs"):
        run_grpo(sampling={"group_size": 4, "max_new_tokens": 12, "temperature": 0.6})


def test_a_reference_that_is_not_the_start_is_caught(run_grpo, monkeypatch):
    from rolltune.model import policy

    right = policy.load_model
    seen = []

    def load(*args, **kwargs):
        model = right(*args, **kwargs)
        if seen:  # the second load is the reference
            with torch.no_grad():
                model.model.norm.weight.mul_(1.1)
        seen.append(model)
        return model

    monkeypatch.setattr(policy, "load_model", load)
    with pytest.raises(ValueError, match="KL to the reference is 0 at the start"):
        run_grpo()


def test_prefill_is_seen_by_the_rewards_and_not_trained(run_grpo):
    output_dir = run_grpo(prompt={"prefill": "<think>"}, num_steps=1)
    samples = [json.loads(line) for line in (output_dir / "samples/step_000001.jsonl").read_text().splitlines()]
    assert all(sample["text"].startswith("<think>") for sample in samples)
