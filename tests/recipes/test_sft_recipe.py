"""Whole SFT runs on the tiny Llama, and GRPO runs that go on from them."""

import json
import shutil
import threading
from contextlib import nullcontext

import pytest
import torch
import yaml
from peft import PeftModel
from thread_world import on_ranks
from tiny_run import load_recipe, read_rows
from transformers import AutoModelForCausalLM, AutoTokenizer

from rolltune.batch import pack_examples
from rolltune.config.schema import SFTConfig
from rolltune.data.dataset import ProblemStream
from rolltune.data.sums import sums
from rolltune.distributed import init_world
from rolltune.run import checks

TRAIN = {"count": 20, "low": 1, "high": 9}
HELDOUT = {"count": 4, "high": 9, "split": "heldout"}
SYSTEM = "Add."


@pytest.fixture
def make_config(tiny_llama, tmp_path):
    def make(name="sft", *, overrides=(), **changes) -> SFTConfig:
        file = tmp_path / f"{name}.yaml"
        tree = {
            "output_dir": str(tmp_path / name),
            "model": {"path": str(tiny_llama)},
            "data": {
                "train": {"_component_": "rolltune.data.sums.sums", **TRAIN},
                "heldout": {"_component_": "rolltune.data.sums.sums", **HELDOUT},
            },
            "prompt": {"system": SYSTEM},
            "optimizer": {"_component_": "torch.optim.AdamW", "lr": 1e-2, "eps": 1e-3},
            "num_steps": 4,
            "batch": {"examples_per_step": 4, "microbatch_tokens": 256},
            "eval": {"every_n_steps": 2, "max_problems": 4},
            "checkpoint": {"every_n_steps": 1, "keep_last": 2},
        }
        file.write_text(yaml.safe_dump(tree | changes))
        return checks.validate(SFTConfig, str(file), overrides)

    return make


@pytest.fixture
def run_sft(make_config, tmp_path):
    def run(name="sft", **changes):
        load_recipe("sft").run(make_config(name, **changes))
        return tmp_path / name

    return run


def written_out(problem) -> tuple[str, str]:
    """Prompt and turn of a problem, as the byte tokenizer's template has them."""
    (message,) = problem.messages
    prompt = f"<|system|>{SYSTEM}<|end|><|user|>{message['content']}<|end|><|assistant|>"
    return prompt, f"<think>{problem.solution}</think>\n<answer>{problem.answer}</answer><|end|>"


@torch.no_grad()
def plain_loss(model, tokenizer, problems) -> float:
    """Mean negative log-likelihood of the turns alone, one problem at a time, by transformers alone."""
    total, count = 0.0, 0
    for problem in problems:
        prompt, turn = (tokenizer(text)["input_ids"] for text in written_out(problem))
        logits = model(torch.tensor([prompt + turn])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(turn), reduction="sum").item()
        count += len(turn)
    return total / count


def test_the_loss_is_that_of_the_turns_alone(run_sft, tiny_llama):
    """Neither prompts nor padding are in it, and EOS is: the same number as from a loop over plain transformers."""
    rows = read_rows(run_sft(num_steps=1))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    first = ProblemStream(sums(**TRAIN), seed=0).take(0, 4)
    assert rows[0]["heldout/loss"] == pytest.approx(plain_loss(model, tokenizer, sums(**HELDOUT)), rel=1e-6)
    assert rows[1]["loss"] == pytest.approx(plain_loss(model, tokenizer, first), rel=1e-6)


def test_every_step_takes_the_next_examples(run_sft, tiny_llama):
    """At a rate of next to nothing the losses are those of the untrained model on each step's own examples."""
    rows = read_rows(run_sft(num_steps=3, optimizer={"_component_": "torch.optim.SGD", "lr": 1e-12}))
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    stream = ProblemStream(sums(**TRAIN), seed=0)
    expected = [plain_loss(model, tokenizer, stream.take(4 * step, 4)) for step in range(3)]
    assert len({round(loss, 4) for loss in expected}) == 3
    assert [row["loss"] for row in rows[1:]] == pytest.approx(expected, rel=1e-6)


def test_the_loss_falls_and_the_best_loads_anywhere(run_sft):
    output_dir = run_sft(num_steps=20, eval={"every_n_steps": 5, "max_problems": 4})
    rows = read_rows(output_dir)
    assert [row["step"] for row in rows] == list(range(21))
    heldout = {row["step"]: row["heldout/loss"] for row in rows if "heldout/loss" in row}
    assert list(heldout) == [0, 5, 10, 15, 20]
    assert heldout[20] < 0.6 * heldout[0]
    assert rows[20]["loss"] < 0.6 * rows[1]["loss"]
    assert {"loss", "entropy", "grad_norm", "lr"} <= set(rows[1])
    assert not [name for name in rows[1] if name.startswith(("ratio", "mismatch"))]  # there is no sampler to compare
    assert '"title":"Loss"' in (output_dir / "report.html").read_text()
    model, tokenizer = (kind.from_pretrained(output_dir / "best") for kind in (AutoModelForCausalLM, AutoTokenizer))
    best = min(heldout[step] for step in (5, 10, 15, 20))
    assert plain_loss(model, tokenizer, sums(**HELDOUT)) == pytest.approx(best, rel=1e-6)
    assert json.loads((output_dir / "best/../state.json").read_text())["best_score"] == -best


def test_float16(run_sft, tiny_llama):
    """The loss's scale is halved until gradients fit, and until then the weights stay; then the loss falls."""
    rows = read_rows(
        run_sft(
            model={"path": str(tiny_llama), "dtype": "float16", "master_weights": True},
            loss_scale={"_component_": "rolltune.loss_scale.LossScale", "init_scale": 2.0**19},
            eval={"every_n_steps": 1, "max_problems": 4},
        )
    )
    assert [(row["loss_scale"], row["skipped_step"]) for row in rows[1:]] == [
        (2.0**19, 1.0),
        (2.0**18, 0.0),
        (2.0**18, 0.0),
        (2.0**18, 0.0),
    ]
    assert ["grad_norm" in row for row in rows[1:]] == [False, True, True, True]
    heldout = [row["heldout/loss"] for row in rows]
    exact = plain_loss(
        AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama), sums(**HELDOUT)
    )
    assert heldout[0] == pytest.approx(exact, rel=1e-4)
    assert heldout[0] == heldout[1] > 1.2 * heldout[2] > 1.3 * heldout[3] > 1.3 * heldout[4]


def test_best_is_the_lowest_held_out_loss_not_the_last(run_sft):
    """A rate at which training blows up."""
    output_dir = run_sft(
        num_steps=6,
        eval={"every_n_steps": 1, "max_problems": 4},
        optimizer={"_component_": "torch.optim.SGD", "lr": 2.0},
        max_grad_norm=100.0,
    )
    heldout = [row["heldout/loss"] for row in read_rows(output_dir)][1:]
    best = 1 + min(range(6), key=heldout.__getitem__)
    assert best < 6
    assert (output_dir / "best").resolve().parent.name == f"step_{best:06d}"


@pytest.mark.parametrize("changes", [
    {"batch": {"examples_per_step": 4, "microbatch_tokens": 1}},
    {"batch": {"examples_per_step": 4, "microbatch_tokens": 10_000}},
    {"model": {"gradient_checkpointing": True}},
], ids=["unpacked", "one row", "recomputed"])  # fmt: skip
def test_how_it_is_computed_changes_nothing(run_sft, changes, tiny_llama):
    if "model" in changes:
        changes = {"model": {"path": str(tiny_llama), **changes["model"]}}
    optimizer = {"_component_": "torch.optim.SGD", "lr": 0.05}
    packed = read_rows(run_sft("packed", optimizer=optimizer))
    other = read_rows(run_sft("other", optimizer=optimizer, **changes))
    for a, b in zip(packed, other, strict=True):
        assert a.keys() == b.keys()
        for name in a:
            assert b[name] == pytest.approx(a[name], rel=1e-6), (a["step"], name)


def test_packed_examples_never_see_each_other(make_config):
    """What the first example's tokens are predicted as does not depend on the second, wherever it stands."""
    recipe, cfg = load_recipe("sft"), make_config()
    components = recipe.set_up(cfg, init_world("cpu"), None)
    a, b, c = (recipe.example(cfg, p, components.render, components.tokenizer) for p in components.stream.take(0, 3))

    def logprobs(*examples):
        (microbatch,) = pack_examples(examples, max_tokens=10_000)
        return (
            components.policy.logprobs(microbatch, temperature=1.0)[0]
            .detach()
            .split([len(e.sequences[0].token_ids) for e in examples])
        )

    alone = logprobs(b)[0]
    for neighbours, place in (((a, b), 1), ((b, a), 0), ((c, b, a), 1)):
        torch.testing.assert_close(logprobs(*neighbours)[place], alone, rtol=0, atol=1e-5)


def test_several_processes_give_the_same_losses(make_config, tmp_path):
    """Ranks in threads: each takes its share of the examples, and the denominators are those of all."""
    recipe, local, lock = load_recipe("sft"), threading.local(), threading.Lock()
    optimizer = {"_component_": "torch.optim.SGD", "lr": 0.05}
    recipe.run(make_config("one", optimizer=optimizer))
    cfg = make_config("two", optimizer=optimizer)
    build_policy = recipe.build_policy

    def build_one_by_one(*args, **options):
        with lock:  # transformers loads a model under switches that hold for the whole process
            return build_policy(*args, **options)

    recipe.joined_world, recipe.build_policy = lambda device, **options: nullcontext(local.world), build_one_by_one

    def run(world):
        local.world = world
        recipe.run(cfg)

    on_ranks(2, run)
    one, two = read_rows(tmp_path / "one"), read_rows(tmp_path / "two")
    for a, b in zip(one, two, strict=True):
        assert a == {name: pytest.approx(value, rel=1e-6) for name, value in b.items()}


@pytest.mark.parametrize("lora", [None, {"rank": 4, "alpha": 8.0, "dropout": 0.1}], ids=["full", "lora"])
def test_resumed_equals_unbroken(run_sft, lora):
    """Two steps, then two more from the checkpoint: the same numbers, to the last bit, dropout included."""
    options = {"lora": lora, "checkpoint": {"every_n_steps": 1, "keep_last": 4}}
    output_dir = run_sft("whole", **options)
    whole, weights = read_rows(output_dir), (output_dir / "best").resolve()
    again = run_sft("again", **options)
    for step in (3, 4):
        shutil.rmtree(again / f"checkpoints/step_{step:06d}")
    run_sft("again", overrides=("resume=true",), **options)
    assert read_rows(again) == whole
    name = "adapter_model.safetensors" if lora else "model.safetensors"
    last = again / "best"
    assert last.resolve().parent.name == weights.parent.name
    assert (last / name).read_bytes() == (weights / name).read_bytes()
    run_sft("again", overrides=("resume=true",), **options)  # already at its end: nothing happens
    assert read_rows(again) == whole


def test_dropout_is_off_for_the_held_out_loss(run_sft):
    """At the start an adapter does nothing, so with dropout the loss is that of the base model still."""
    plain = read_rows(run_sft("plain", num_steps=1))
    dropped = read_rows(run_sft("dropped", num_steps=1, lora={"rank": 4, "alpha": 8.0, "dropout": 0.5}))
    assert dropped[0]["heldout/loss"] == pytest.approx(plain[0]["heldout/loss"], rel=1e-6)
    options = {"lora": {"rank": 4, "alpha": 8.0, "dropout": 0.9}, "eval": {"every_n_steps": 1, "max_problems": 4}}
    output_dir = run_sft("trained", num_steps=3, **options)
    base = AutoModelForCausalLM.from_pretrained(make_base(output_dir))
    model = PeftModel.from_pretrained(base, str(output_dir / "checkpoints/step_000003/policy")).eval()
    tokenizer = AutoTokenizer.from_pretrained(output_dir / "best")
    assert read_rows(output_dir)[3]["heldout/loss"] == pytest.approx(
        plain_loss(model, tokenizer, sums(**HELDOUT)), rel=1e-5
    )


def make_base(output_dir) -> str:
    return json.loads((output_dir / "best/adapter_config.json").read_text())["base_model_name_or_path"]


# --- on to GRPO -------------------------------------------------------------------------------------------------------


def test_grpo_goes_on_from_the_best(run_sft, run_grpo):
    start = run_sft() / "best"
    rows = read_rows(run_grpo(model=start, num_steps=2))
    assert rows[1]["kl"] == 0.0 and rows[2]["kl"] > 0.0
    assert rows[1]["mismatch/max_abs"] < 1e-3


def test_lora_grpo_is_held_to_the_sft_adapter(run_sft, run_grpo):
    lora = {"rank": 4, "alpha": 8.0}
    output_dir = run_sft(lora=lora, num_steps=8)
    heldout = [row["heldout/loss"] for row in read_rows(output_dir) if "heldout/loss" in row]
    assert heldout[-1] < heldout[0] - 0.1  # so that the base model would be far off
    grpo = run_grpo(model=output_dir / "best", lora=lora, num_steps=3)
    rows = read_rows(grpo)
    assert rows[1]["kl"] == pytest.approx(0.0, abs=1e-9)
    assert 0.0 < rows[3]["kl"] < 0.05
    assert make_base(grpo) == make_base(output_dir)
    with pytest.raises(ValueError, match="is a LoRA adapter; give a `lora:` section"):
        run_grpo("full", model=output_dir / "best", num_steps=1)


# --- before it starts -------------------------------------------------------------------------------------------------


def test_dry_run_shows_the_first_example_and_writes_nothing(run_sft, capsys):
    output_dir = run_sft(overrides=("dry_run=true",))
    shown = capsys.readouterr().out
    problem = ProblemStream(sums(**TRAIN), seed=0).take(0, 1)[0]
    assert "".join(written_out(problem)) in shown.replace("\n", "").replace("</think>", "</think>\n")
    assert "20 examples, 4 held out; 16 are trained on" in " ".join(shown.split())
    assert "dry run: " in shown and not output_dir.exists()


def test_dry_run_refuses_examples_beyond_the_context(run_sft):
    long = "x" * 600
    with pytest.raises(ValueError, match=r"data\.train: 20 of 20 problems .*512 tokens"):
        run_sft(overrides=("dry_run=true",), answer_format=f"{long}{{answer}}")


def test_an_earlier_run_in_the_way(run_sft):
    run_sft(num_steps=1)
    with pytest.raises(ValueError, match="holds the checkpoints of an earlier run; add resume=true"):
        run_sft(num_steps=1)
