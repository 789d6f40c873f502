"""Whole evaluations of tiny models: what is sampled, what is kept, what is refused."""

from __future__ import annotations

import json
import os
import shutil
import sys
import threading
import time
import weakref
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from thread_world import on_ranks
from tiny_run import load_recipe
from transformers import AutoModelForCausalLM

from rolltune.config.schema import EvaluateConfig
from rolltune.data.sums import sums
from rolltune.errors import ConfigError
from rolltune.eval import sampling
from rolltune.eval.sample_cache import SampleCache
from rolltune.files import take_lock
from rolltune.model.load import load_model, load_tokenizer
from rolltune.prompts import PromptRenderer
from rolltune.run import checks
from rolltune.samplers.native import NativeSampler
from rolltune.seeding import derive_seed
from rolltune.stats import accuracy_interval
from rolltune.types import SampleRequest, SamplingParams

DATA = {"count": 7, "low": 1, "high": 9}
# Verifiers that a random model of bytes can satisfy: an early letter, or a late one.
VERIFIERS = """
from rolltune.behaviours import BEHAVIOURS, BehaviourCounts
from rolltune.data.dataset import Dataset
from rolltune.types import Problem, Score

def early(problem, text):
    return Score(total=float(any(c in "abcdefgh" for c in text)))

def late(problem, text):
    return Score(total=float(any(c in "xyz" for c in text)))

def never_scores(problem, text):
    return Score(total=None)

def unanswered():
    question = ({"role": "user", "content": "?"},)
    return Dataset([Problem(id="0", messages=question, answer="4"), Problem(id="1", messages=question, answer=" ")])

class Classifier:
    def __init__(self, *, unsure=0, refuses=False):
        self.unsure, self.refuses = unsure, refuses
    def classify(self, texts):
        if self.refuses:
            raise ValueError("a wrong key")
        counts = BehaviourCounts(**dict.fromkeys(BEHAVIOURS, 2))
        return [None if i < self.unsure else counts for i in range(len(texts))]
"""


@pytest.fixture(scope="module")
def models(make_tiny_llama, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("models")
    return [make_tiny_llama(folder / f"seed{seed}", seed=seed) for seed in (1, 2)]


@pytest.fixture
def make_config(models: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "tiny_verifiers.py").write_text(VERIFIERS)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.delitem(sys.modules, "tiny_verifiers", raising=False)
    monkeypatch.setattr(sampling, "BLOCK_COMPLETIONS", 8)  # 2 problems of 4 samples

    def make(name: str = "out", **changes) -> EvaluateConfig:
        tree = {
            "output_dir": str(tmp_path / name),
            "seed": 3,
            "models": [{"name": "base", "path": str(models[0])}, {"name": "rl", "path": str(models[1])}],
            "data": {"_component_": "rolltune.data.sums.sums", **DATA},
            "prompt": {"system": "Add."},
            "sampling": {"samples": 4, "temperature": 0.8, "max_new_tokens": 12, "stop": ["Z"]},
            "sampler": {"_component_": "rolltune.samplers.native.NativeSampler"},
            "correct": {"_component_": "tiny_verifiers.early"},
            "resamples": 200,
        }
        file = tmp_path / f"{name}.yaml"
        file.write_text(yaml.safe_dump(tree | changes))
        return checks.validate(EvaluateConfig, str(file))

    return make


@pytest.fixture
def evaluate(make_config, tmp_path: Path):
    """Run the recipe; returns results.json."""

    def run(name: str = "out", *, plots: bool = False, **changes) -> dict:
        recipe = load_recipe("evaluate")
        if not plots:  # they take longer than everything else
            recipe.plot_evaluation = lambda evaluation, output_dir: []
        recipe.run(make_config(name, **changes))
        return json.loads((tmp_path / name / "results.json").read_text())

    return run


def sampled(folder: Path, name: str) -> list[dict]:
    """The records of a sample file, without its first line."""
    return [json.loads(line) for line in (folder / "samples" / f"{name}.jsonl").read_text().split("\n")[1:-1]]


# --- what comes out ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_an_evaluation_leaves_everything_behind(evaluate, tmp_path: Path, capsys):
    found = evaluate(plots=True)
    out = tmp_path / "out"
    assert {path.name for path in out.iterdir()} == {
        "accuracy_by_length.png",
        "behaviours.png",
        "config.yaml",
        "pass_at_k.png",
        "problems.jsonl",
        "report.html",
        "results.json",
        "run.json",
        "samples",
        "samples.lock",
    }
    shown = capsys.readouterr().out
    assert "7 problems, 4 samples of each; greedy: 1 of each" in shown and "| accuracy, greedy " in shown
    assert "model 1 of 2, base: 35 of 35 completions" in shown and "model 2 of 2, rl: 35 of 35 completions" in shown
    assert "rl - base" in shown and "subgoal setting" in shown and "no correction" in shown
    assert yaml.safe_load((out / "config.yaml").read_text())["sampling"]["samples"] == 4
    assert list(found["models"]) == ["base", "rl"] and found["ks"] == [1, 2, 4]
    assert len(found["comparisons"]) == 1 and found["models"]["rl"]["by_baseline"]


def test_the_numbers_are_those_of_the_samples(evaluate, tmp_path: Path):
    """Accuracy, format, length, pass@k and the difference, counted from the files."""
    found = evaluate()
    rates = {}
    for name in ("base", "rl"):
        records = sampled(tmp_path / "out", name)
        right = [
            [any(c in "abcdefgh" for c in response["text"]) for response in record["samples"]] for record in records
        ]
        rates[name] = [sum(r) / 4 for r in right]
        metrics = found["models"][name]["metrics"]
        greedy = sum(any(c in "abcdefgh" for c in record["greedy"]["text"]) for record in records)
        assert metrics["greedy/accuracy"]["mean"] == greedy / 7
        assert [metrics["greedy/accuracy"][end] for end in ("low", "high")] == list(accuracy_interval(greedy, 7))
        assert metrics["sampled/accuracy"]["mean"] == pytest.approx(sum(map(sum, right)) / 28)
        assert metrics["pass@4"]["mean"] == sum(map(any, right)) / 7
        tokens = [response["tokens"] for record in records for response in record["samples"]]
        assert metrics["sampled/length_mean"]["mean"] == pytest.approx(sum(tokens) / 28)
        cut = [response["finish_reason"] == "length" for record in records for response in record["samples"]]
        assert metrics["sampled/truncated"]["mean"] == pytest.approx(sum(cut) / 28)
        assert metrics["sampled/format"]["mean"] == 0
        assert metrics["sampled/accuracy"]["completions"] == 28 and metrics["greedy/accuracy"]["completions"] == 7
        assert sum(each["accuracy"]["completions"] for each in found["models"][name]["by_length"]) == 28
    difference = found["comparisons"][0]["differences"]["sampled/accuracy"]
    assert difference["mean"] == pytest.approx((sum(rates["rl"]) - sum(rates["base"])) / 7)
    assert 0 < sum(rates["base"]) < 7, "the verifier accepts some samples and not others"


def test_the_samples_are_those_of_the_sampler(evaluate, tmp_path: Path, models: list[Path]):
    """One problem sampled by hand: the model's template, the seeds of (seed, problem, sample), the stop strings."""
    evaluate()
    tokenizer = load_tokenizer(str(models[1]))
    model = load_model(str(models[1]), dtype="float32", device="cpu")
    sampler = NativeSampler(model, tokenizer)
    problem = sums(**DATA)[5]
    prompt = PromptRenderer(tokenizer, system="Add.")(problem)
    params = SamplingParams(temperature=0.8, max_new_tokens=12, stop=("Z",))
    request = SampleRequest(prompt=prompt, seeds=tuple(derive_seed(3, "sample", problem.id, i) for i in range(4)))
    (expected,) = sampler.generate([request], params)
    (greedy,) = sampler.generate(
        [SampleRequest(prompt=prompt, seeds=(0,))], SamplingParams(temperature=0.0, max_new_tokens=12, stop=("Z",))
    )[0]
    record = sampled(tmp_path / "out", "rl")[5]
    assert record["problem"] == problem.id
    assert [response["text"] for response in record["samples"]] == [completion.text for completion in expected]
    assert record["greedy"] == {
        "text": greedy.text,
        "tokens": len(greedy.token_ids),
        "finish_reason": greedy.finish_reason,
    }
    assert len({response["text"] for response in record["samples"]}) > 1


@pytest.mark.slow
def test_float16(evaluate, tmp_path: Path):
    evaluate(dtype="float16")
    assert len(sampled(tmp_path / "out", "rl")) == 7


def test_a_model_does_not_differ_from_itself(evaluate, models: list[Path]):
    found = evaluate(models=[{"name": name, "path": str(models[0])} for name in ("one", "two")])
    one, two = found["models"].values()
    assert one["metrics"] == two["metrics"] and one["behaviours"] == two["behaviours"]
    for difference in found["comparisons"][0]["differences"].values():
        assert (difference["mean"], difference["low"], difference["high"]) == (0, 0, 0)


@pytest.mark.slow
def test_an_adapter_is_evaluated_on_its_base(evaluate, tmp_path: Path, models: list[Path]):
    torch.manual_seed(0)
    lora = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(models[0]), lora).save_pretrained(tmp_path / "adapter")
    evaluate(models=[{"name": "base", "path": str(models[0])}, {"name": "lora", "path": str(tmp_path / "adapter")}])
    base, adapted = (sampled(tmp_path / "out", name) for name in ("base", "lora"))
    assert [record["prompt"] for record in base] == [record["prompt"] for record in adapted]  # the base's tokenizer
    assert [record["greedy"]["text"] for record in base] != [record["greedy"]["text"] for record in adapted]


# --- stopped and verified again ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_stopped_run_ends_as_an_unbroken_one(evaluate, tmp_path: Path):
    """The first model's file is cut in the middle of a line, the second is missing."""
    evaluate("whole")
    evaluate("cut")
    file = tmp_path / "cut/samples/base.jsonl"
    content = file.read_bytes()
    for size in (len(content) // 2, len(content) - 9, 20):
        file.write_bytes(content[:size])
        (tmp_path / "cut/samples/rl.jsonl").unlink()
        shutil.rmtree(tmp_path / "cut/results.json", ignore_errors=True)
        evaluate("cut")
        for name in ("samples/base.jsonl", "samples/rl.jsonl", "results.json"):
            assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), (name, size)


@pytest.mark.slow
def test_interrupted_in_the_middle(evaluate, make_config, tmp_path: Path, monkeypatch):
    evaluate("whole")
    recipe, append, calls = load_recipe("evaluate"), SampleCache.append, []

    def stop_at_the_third(self, records, *, rank):
        calls.append(records)
        if len(calls) == 3:
            raise KeyboardInterrupt
        append(self, records, rank=rank)

    monkeypatch.setattr(SampleCache, "append", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        recipe.run(make_config("cut"))
    assert len(sampled(tmp_path / "cut", "base")) == 4 and not (tmp_path / "cut/results.json").exists()
    recipe.run(make_config("cut"))
    assert len(calls) == 3 + 2 + 4, "finished blocks are not sampled again"
    assert (tmp_path / "cut/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


@pytest.fixture
def without_weights(monkeypatch: pytest.MonkeyPatch):
    """Return a function after which no weights can be loaded."""

    def forbid() -> None:
        def refuse(*args, **kwargs):
            raise AssertionError("weights are loaded")

        monkeypatch.setattr("rolltune.model.load.load_model", refuse)
        monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", refuse)
        monkeypatch.setattr("transformers.PreTrainedModel.from_pretrained", refuse)

    return forbid


@pytest.mark.slow
def test_another_verifier_reads_the_same_samples(evaluate, tmp_path: Path, without_weights, capsys):
    first = evaluate()
    before = [(tmp_path / f"out/samples/{name}.jsonl").read_bytes() for name in ("base", "rl")]
    without_weights()
    second = evaluate(correct={"_component_": "tiny_verifiers.late"}, ks=[3], resamples=300)
    third = evaluate()
    assert first == third
    assert [(tmp_path / f"out/samples/{name}.jsonl").read_bytes() for name in ("base", "rl")] == before
    records = sampled(tmp_path / "out", "base")
    late = sum(any(c in "xyz" for c in response["text"]) for record in records for response in record["samples"]) / 28
    assert second["models"]["base"]["metrics"]["sampled/accuracy"]["mean"] == pytest.approx(late)
    assert second["models"]["base"]["metrics"] != first["models"]["base"]["metrics"] and second["ks"] == [3]
    assert "model 2 of 2, rl: all samples are in" in capsys.readouterr().out


@pytest.mark.slow
def test_fewer_problems_need_no_weights_and_more_only_the_rest(evaluate, tmp_path: Path, without_weights):
    evaluate("whole")
    evaluate(max_problems=4)
    evaluate()
    assert sampled(tmp_path / "out", "rl") == sampled(tmp_path / "whole", "rl")
    without_weights()
    found = evaluate(max_problems=3)
    assert found["problems"] == 3 and len(sampled(tmp_path / "out", "rl")) == 7


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"sampling": {"samples": 4, "temperature": 0.7, "max_new_tokens": 12, "stop": ["Z"]}},
            "sampling.temperature: 0.7: .*base.jsonl was sampled with 0.8",
        ),
        ({"seed": 4}, "seed: 4: .*base.jsonl was sampled with 3"),
        ({"dtype": "bfloat16"}, "dtype: bfloat16: .*was sampled with float32"),
        ({"prompt": {"system": "Subtract."}}, "prompt: .*7 problems, first sums/train/seed0/0"),
        (
            {"sampler": {"_component_": "rolltune.samplers.native.NativeSampler", "max_num_seqs": 2}},
            "sampler: .*'max_num_seqs': 2.*was sampled with",
        ),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_samples_of_other_settings_are_refused(evaluate, without_weights, changes: dict, message: str):
    evaluate()
    without_weights()
    with pytest.raises(ConfigError, match=message):
        evaluate(**changes)


def test_samples_of_other_weights_are_refused(evaluate, make_tiny_llama, tmp_path: Path, models: list[Path]):
    """For example, a later run has replaced outputs/quickstart/best."""
    shutil.copytree(models[0], tmp_path / "best")
    of = {"models": [{"name": "best", "path": str(tmp_path / "best")}]}
    evaluate(**of)
    make_tiny_llama(tmp_path / "best", seed=9)
    with pytest.raises(ConfigError, match=r"models: .*best.jsonl .* weights of best"):
        evaluate(**of)


@pytest.mark.slow
def test_several_processes_write_the_same(evaluate, make_config, tmp_path: Path, monkeypatch):
    """No rank closes its sampler, which may run a server for all ranks, before the slowest rank has sampled."""
    one = evaluate("one")
    recipe, local, lock = load_recipe("evaluate"), threading.local(), threading.Lock()
    prepare, load, progress = recipe.prepare, recipe.load_for_sampling, recipe.SamplingProgress

    def one_by_one(function):
        def call(*args, **options):
            with lock:  # transformers loads a model under process-wide switches
                return function(*args, **options)

        return call

    recipe.prepare, recipe.load_for_sampling = one_by_one(prepare), one_by_one(load)
    recipe.joined_world, cfg = lambda device: nullcontext(local.world), make_config("three")
    generate, happened = NativeSampler.generate, []

    def generate_slowly(self, *args, **options):
        written = generate(self, *args, **options)
        time.sleep(0.1 * local.world.rank)
        happened.append("sampled")
        return written

    monkeypatch.setattr(NativeSampler, "generate", generate_slowly)
    monkeypatch.setattr(NativeSampler, "close", lambda self: happened.append("closed"))

    def run(world):
        local.world = world
        recipe.run(cfg)

    on_ranks(3, run)
    assert happened == 2 * (["sampled"] * 8 + ["closed"] * 3)
    assert json.loads((tmp_path / "three/results.json").read_text()) == one
    for name in ("base", "rl"):
        files = [tmp_path / folder / f"samples/{name}.jsonl" for folder in ("one", "three")]
        assert files[0].read_bytes() == files[1].read_bytes()
    assert len(list((tmp_path / "three/samples").iterdir())) == 2
    assert progress is recipe.SamplingProgress


@pytest.mark.slow
def test_one_run_at_a_time(evaluate, make_config, tmp_path: Path, without_weights):
    """What the other run has sampled when it ends is not sampled again."""
    evaluate("whole")
    with take_lock(tmp_path / "out/samples"), pytest.raises(ValueError, match="out/samples"):
        evaluate()
    assert os.listdir(tmp_path / "out") == ["samples.lock"]
    recipe = load_recipe("evaluate")
    prepare = recipe.prepare

    def prepare_while_another_one_ends(*args):
        candidate = prepare(*args)
        shutil.copytree(tmp_path / "whole/samples", tmp_path / "out/samples", dirs_exist_ok=True)
        return candidate

    recipe.prepare, recipe.plot_evaluation = prepare_while_another_one_ends, lambda evaluation, output_dir: []
    without_weights()
    recipe.run(make_config())
    assert (tmp_path / "out/results.json").read_bytes() == (tmp_path / "whole/results.json").read_bytes()


@pytest.mark.slow
def test_one_model_is_in_memory_at_a_time(make_config):
    recipe, loaded = load_recipe("evaluate"), []
    load = recipe.load_for_sampling

    def watch(*args, **kwargs):
        assert [model() for model in loaded] == [None] * len(loaded), "the previous model is still in memory"
        model = load(*args, **kwargs)
        loaded.append(weakref.ref(model))
        return model

    recipe.load_for_sampling = watch
    recipe.run(make_config())
    assert len(loaded) == 2


# --- no verdict, and the classifier ----------------------------------------------------------------------------


def test_responses_without_a_verdict_are_not_wrong(evaluate, capsys):
    found = evaluate(correct={"_component_": "tiny_verifiers.never_scores"})
    metrics = found["models"]["rl"]["metrics"]
    assert metrics["sampled/accuracy"]["mean"] is None and metrics["pass@2"]["problems"] == 0
    assert found["models"]["rl"]["unscored"]["sampled/accuracy"] == 28
    assert found["comparisons"][0]["differences"]["greedy/accuracy"]["problems"] == 0
    assert "rl: 28 of 28 responses" in capsys.readouterr().out


def test_the_classifier_is_asked(evaluate, capsys):
    classifier = {"_component_": "tiny_verifiers.Classifier", "unsure": 2}
    found = evaluate(classifier=classifier, classified_samples=9)
    for name in ("base", "rl"):
        classified = found["models"][name]["classified"]
        assert (classified["completions"], classified["unscored"]) == (9, 2)
        assert {key: value["mean"] for key, value in classified["mean"].items()} == dict.fromkeys(
            ("verification", "backtracking", "subgoal_setting", "backward_chaining"), 2.0
        )
        assert set(classified["agreement"]) == set(classified["mean"])
    assert "by the classifier" in capsys.readouterr().out
    assert evaluate()["models"]["rl"]["classified"] is None


def test_a_classifier_that_fails_costs_no_other_number(evaluate, tmp_path: Path):
    with pytest.raises(ValueError, match="a wrong key"):
        evaluate(classifier={"_component_": "tiny_verifiers.Classifier", "refuses": True})
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert found == evaluate()


# --- before it starts -------------------------------------------------------------------------------------------------


def test_dry_run_loads_and_writes_nothing(evaluate, make_config, tmp_path: Path, without_weights, capsys):
    without_weights()
    load_recipe("evaluate").run(make_config(dry_run=True))
    shown = capsys.readouterr().out
    problem = sums(**DATA)[0]
    question = problem.messages[0]["content"]
    assert f"<|system|>Add.<|end|><|user|>{question}<|end|><|assistant|>" in shown
    assert shown.count("first prompt of") == 1, "both models have the same"
    assert "35 completions, at most 420 sampled tokens" in " ".join(shown.split())
    assert "at most 840 sampled tokens in all" in shown and "no weights were loaded" in shown
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dry_run", [True, False])
def test_another_vocabulary_is_found_before_sampling(
    make_config, make_tiny_llama, tmp_path: Path, models: list[Path], tokenizer, without_weights, dry_run: bool
):
    small = make_tiny_llama(tmp_path / "small", vocab_size=len(tokenizer) - 9)
    without_weights()
    cfg = make_config(
        models=[{"name": "base", "path": str(models[0])}, {"name": "small", "path": str(small)}], dry_run=dry_run
    )
    with pytest.raises(ConfigError, match=r"models\[1\]\.path: .*small: .*vocabulary"):
        load_recipe("evaluate").run(cfg)
    assert not (tmp_path / "out").exists()


def test_prompts_beyond_the_context(make_config, without_weights):
    without_weights()
    cfg = make_config(prompt={"system": "x" * 500})
    with pytest.raises(ConfigError, match=r"data: 7 of 7 problems .*seed1, 512 tokens.*max_new_tokens, 12"):
        load_recipe("evaluate").run(cfg)


@pytest.mark.parametrize("dry_run", [True, False])
def test_problems_without_an_answer(make_config, dry_run: bool):
    with pytest.raises(ConfigError, match="data: 1 of 2 problems have no gold answer, first 1"):
        load_recipe("evaluate").run(make_config(data={"_component_": "tiny_verifiers.unanswered"}, dry_run=dry_run))
