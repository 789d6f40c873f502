"""Whole runs with templates that open the response, and with problems that do not fit the context."""

from __future__ import annotations

import json
import shutil

import pytest
import yaml
from tiny_run import load_recipe, read_rows
from transformers import AutoTokenizer

from rolltune.config.schema import SFTConfig
from rolltune.errors import ConfigError, RunStopped
from rolltune.run import checks
from rolltune.samplers.generation import PromptTooLong
from rolltune.samplers.native import NativeSampler

R1 = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content.split('</think>')[-1] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|><think>\n{% endif %}"
)
TAGGED = {"_component_": "rolltune.rewards.format.format_reward"}


@pytest.fixture
def r1_llama(make_tiny_llama, tmp_path):
    folder = make_tiny_llama(tmp_path / "r1_model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = R1
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def data(tmp_path):
    """Twelve sums as JSONL; two of the questions are longer than the context of 512 tokens."""
    questions = [f"What is {i} + {i}?" + " " * (i == 3) + "Think. " * 90 * (i in (3, 7)) for i in range(12)]
    file = tmp_path / "sums.jsonl"
    lines = [json.dumps({"question": q, "answer": 2 * i}) for i, q in enumerate(questions)]
    file.write_text("\n".join(lines), encoding="utf-8")
    heldout = {"_component_": "rolltune.data.sums.sums", "count": 4, "high": 9, "split": "heldout"}
    return {"train": {"_component_": "rolltune.data.jsonl.jsonl", "path": str(file)}, "heldout": heldout}


def sft_config(tmp_path, model, data, **changes) -> SFTConfig:
    tree = {
        "output_dir": str(tmp_path / "sft"),
        "model": {"path": str(model)},
        "data": data,
        "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, "eps": 1e-3},
        "num_steps": 3,
        "batch": {"examples_per_step": 4, "microbatch_tokens": 1024},
        "eval": {"every_n_steps": 3, "max_problems": 4},
    }
    file = tmp_path / "sft.yaml"
    file.write_text(yaml.safe_dump(tree | changes))
    return checks.validate(SFTConfig, str(file), ())


def test_rewards_see_what_the_template_opens_the_response_with(run_grpo, r1_llama):
    folder = run_grpo("r1", model=r1_llama, num_steps=1, rewards={"low": {"_component_": "tiny_reward.low_bytes"}})
    (table,) = (folder / "samples").glob("*1.jsonl")
    texts = [json.loads(line)["text"] for line in table.read_text().splitlines()]
    assert texts and all(text.startswith("<think>\n") for text in texts)


def test_sft_does_not_train_on_a_second_tag(r1_llama, data, tmp_path, capsys):
    cfg = sft_config(tmp_path, r1_llama, data | {"too_long": "drop"}, dry_run=True)
    load_recipe("sft").run(cfg)
    shown = capsys.readouterr().out
    assert "<|assistant|><think>" in shown and shown.count("<think>") == 1


@pytest.mark.parametrize("dry_run", [True, False])
def test_problems_that_do_not_fit_are_refused_before_the_first_step(run_grpo, data, dry_run, tmp_path):
    with pytest.raises(
        ConfigError, match=r"data.train: 2 of 12 problems .* 512 tokens: sums/4, sums/8; .*too_long=drop"
    ):
        run_grpo("long", data=data, dry_run=dry_run)
    assert not (tmp_path / "long/metrics.jsonl").exists()


def test_dropped_problems_are_never_sampled_and_a_resumed_run_takes_the_same(run_grpo, data, tmp_path, capsys):
    data = data | {"too_long": "drop"}
    keep = {"every_n_steps": 1, "keep_last": 9}
    whole = run_grpo("whole", data=data, checkpoint=keep)
    assert "data.train: 2 of 12 problems do not fit" in capsys.readouterr().out
    shutil.copytree(whole, tmp_path / "again", symlinks=True)
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"again/checkpoints/step_{step:06}")
    run_grpo("again", data=data, checkpoint=keep, resume=True)
    assert read_rows(whole) == read_rows(tmp_path / "again")
    texts = "".join(file.read_text() for file in (whole / "samples").glob("*"))
    assert "sums/1" in texts and "sums/4" not in texts and "sums/8" not in texts
    with pytest.raises(ConfigError, match="data: "):
        run_grpo("whole", data=data | {"too_long": "refuse"}, resume=True)


def test_sft_refuses_or_drops_examples_that_do_not_fit(tiny_llama, data, tmp_path, capsys):
    with pytest.raises(ConfigError, match=r"data.train: 2 of 12 problems .*sums/4, sums/8; .*too_long=drop"):
        load_recipe("sft").run(sft_config(tmp_path, tiny_llama, data))
    load_recipe("sft").run(sft_config(tmp_path, tiny_llama, data | {"too_long": "drop"}))
    assert "2 of 12 problems do not fit" in capsys.readouterr().out
    assert (tmp_path / "sft/best/config.json").exists()


def test_a_prompt_that_the_sampler_refuses_stops_the_run_with_a_checkpoint(run_grpo, monkeypatch, tmp_path):
    generate, calls = NativeSampler.generate, []

    def limited(self, requests, params, **callbacks):
        calls.append(params.temperature)
        if calls.count(1.0) == 3:
            raise PromptTooLong("sampling.max_new_tokens: 12; with a prompt of 700 tokens ...")
        return generate(self, requests, params, **callbacks)

    monkeypatch.setattr(NativeSampler, "generate", limited)
    with pytest.raises(RunStopped, match="step 3: sampling.max_new_tokens: 12; with a prompt of 700"):
        run_grpo("stopped", checkpoint={"every_n_steps": 10, "keep_last": 2})
    assert [path.name for path in (tmp_path / "stopped/checkpoints").iterdir()] == ["step_000002"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling": {"group_size": 4, "max_new_tokens": 12, "stop": ["a<|user|>"]}}, "sampling.stop: 'a<|user|>'"),
        ({"answer_format": "<|user|>{answer}"}, "answer_format: .*special token"),
        ({"prompt": {"prefill": "<|user|>"}, "answer_format": "<|user|>{answer}"}, "answer_format: .*special token"),
    ],
)
def test_texts_with_special_tokens_are_refused_before_weights_are_loaded(run_grpo, changes, message):
    with pytest.raises(ValueError, match=message.replace("|", r"\|")):
        run_grpo("special", **changes, dry_run=True)
