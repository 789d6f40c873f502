"""What recipes do around their loop: starting, resuming, building, saving."""

import dataclasses
import json
import os
import shutil
import socket
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from endpoint_options import as_config
from safetensors.torch import save_file
from thread_world import on_ranks

from rolltune.config.schema import (
    DataConfig,
    EvaluateSamplingConfig,
    FewShotExample,
    GRPOConfig,
    LoRAConfig,
    ModelConfig,
    PromptConfig,
    SamplingConfig,
    SFTConfig,
)
from rolltune.distributed import World
from rolltune.errors import ConfigError, RunStopped
from rolltune.model.fp32_head import FP32Head
from rolltune.model.policy import build_policy
from rolltune.rewards.judges.pool import JudgePool
from rolltune.rewards.rubric.schema import Criterion, Rubric
from rolltune.rollout import Rollout, SampledGroup
from rolltune.run import build, lifecycle
from rolltune.run.checkpoint import Checkpoints, TrainState, load_state
from rolltune.samplers.native import NativeSampler
from rolltune.types import Completion, Group, Problem, Prompt, SamplingParams, Score

ALONE = World(rank=0, size=1, device=torch.device("cpu"))
OPTIMIZER = {"_component_": "torch.optim.AdamW", "lr": 1e-05, "betas": [0.9, 0.95]}


def make_config(output_dir: Path, **changes) -> GRPOConfig:
    return GRPOConfig(
        **(
            {
                "output_dir": str(output_dir),
                "model": ModelConfig(path="org/name"),
                "data": DataConfig(train=sums(), heldout=sums(split="heldout")),
                "sampler": {"_component_": "x.Sampler"},
                "advantage": {"_component_": "x.advantage"},
                "loss": {"_component_": "x.Loss"},
                "optimizer": OPTIMIZER,
                "num_steps": 4,
            }
            | changes
        )
    )


def sums(**options) -> dict:
    return {"_component_": "rolltune.data.sums.sums", "count": 5, **options}


def start(cfg: GRPOConfig, world: World = ALONE) -> Path | None:
    return lifecycle.start(cfg, Checkpoints(Path(cfg.output_dir), keep_last=2), world)


def save_step(output_dir: Path, step: int, *, is_best: bool = False, **state) -> None:
    Checkpoints(output_dir, keep_last=2).save(
        TrainState(step=step, **state),
        save_policy=save_weights,
        optimization={},
        is_best=is_best,
    )


def save_weights(folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file({"weight": torch.ones(3)}, folder / "model.safetensors")
    (folder / "config.json").write_text("{}")


# --- start ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resume", [False, True])
def test_a_fresh_start_writes_the_whole_config(tmp_path, resume):
    cfg = make_config(tmp_path / "a/run", resume=resume)
    assert start(cfg) is None
    assert yaml.safe_load((tmp_path / "a/run/config.yaml").read_text()) == dataclasses.asdict(cfg)
    assert sorted(os.listdir(tmp_path / "a/run")) == ["config.yaml", "run.json"]


def test_an_earlier_run_is_not_written_over(tmp_path):
    start(make_config(tmp_path))
    save_step(tmp_path, 1)
    before = (tmp_path / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=r"output_dir: .* holds the checkpoints of an earlier run; add resume=true"):
        start(make_config(tmp_path, seed=1))
    assert (tmp_path / "config.yaml").read_text() == before


def test_a_run_without_a_checkpoint_may_start_again_with_another_config(tmp_path):
    start(make_config(tmp_path))
    assert start(make_config(tmp_path, seed=1)) is None
    assert start(make_config(tmp_path, seed=2, resume=True)) is None
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 2


def test_resumes_from_the_newest(tmp_path):
    start(make_config(tmp_path))
    for step in (1, 2):
        save_step(tmp_path, step)
    assert start(make_config(tmp_path, resume=True)) == tmp_path / "checkpoints/step_000002"


DAMAGES = {
    "state.json": lambda path: (path / "state.json").write_text(""),
    "state.json.*: step: '2'": lambda path: edit_state(path, step="2"),
    "state.json.*: data_position: null": lambda path: edit_state(path, data_position=None),
    "state.json.*TypeError": lambda path: edit_state(path, more=1),
    "state.json: is of step 1": lambda path: edit_state(path, step=1),
    "trainer.pt: .* bytes instead of": lambda path: os.truncate(path / "trainer.pt", 200),
    "policy/config.json: 1 bytes": lambda path: os.truncate(path / "policy/config.json", 1),
    "policy/config.json: missing": lambda path: (path / "policy/config.json").unlink(),
    "policy/model.safetensors: 40 bytes": lambda path: os.truncate(path / "policy/model.safetensors", 40),
    "policy/model.safetensors: missing": lambda path: (path / "policy/model.safetensors").unlink(),
    "files.json: missing": lambda path: (path / "files.json").unlink(),
    "files.json.*TypeError": lambda path: (path / "files.json").write_text("[1]"),
    "files.json.*JSONDecodeError": lambda path: os.truncate(path / "files.json", 20),
}


def edit_state(path: Path, **changes: Any) -> None:
    file = path / "state.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


@pytest.mark.parametrize("part", DAMAGES)
def test_a_damaged_newest_checkpoint_is_named(tmp_path, part):
    start(make_config(tmp_path))
    for step in (1, 2):
        save_step(tmp_path, step)
    DAMAGES[part](tmp_path / "checkpoints/step_000002")
    with pytest.raises(ConfigError, match=rf"step_000002: .*{part}.*delete it to resume from step 1"):
        start(make_config(tmp_path, resume=True))
    shutil.rmtree(tmp_path / "checkpoints/step_000001")
    with pytest.raises(ConfigError, match="delete it and start over"):
        start(make_config(tmp_path, resume=True))


def test_an_older_checkpoint_does_not_replace_a_newer_one_silently(tmp_path):
    start(make_config(tmp_path))
    for step in (1, 2):
        save_step(tmp_path, step)
    (tmp_path / "checkpoints/step_000002/trainer.pt").unlink()
    with pytest.raises(ConfigError, match=r"step_000002: .*trainer\.pt: missing.*delete it to resume from step 1"):
        start(make_config(tmp_path, resume=True))
    assert Checkpoints(tmp_path, keep_last=2).steps() == [1, 2]


def test_nothing_that_cannot_be_resumed_is_started_over(tmp_path):
    start(make_config(tmp_path))
    save_step(tmp_path, 1)
    (tmp_path / "config.yaml").rename(tmp_path / "kept.yaml")
    with pytest.raises(ConfigError, match="no config.yaml"):
        start(make_config(tmp_path, resume=True, seed=3))
    (tmp_path / "kept.yaml").rename(tmp_path / "config.yaml")
    (tmp_path / "checkpoints/step_000001/trainer.pt").unlink()
    with pytest.raises(ConfigError, match="none with a trainer.pt"):
        start(make_config(tmp_path, resume=True))
    assert Checkpoints(tmp_path, keep_last=2).steps() == [1]


OBSTACLES = {
    "step_12: is not a checkpoint": lambda folder: os.rename(folder / "step_000002", folder / "step_12"),
    "step_000002.bak: is not a checkpoint": lambda folder: os.rename(
        folder / "step_000002", folder / "step_000002.bak"
    ),
    "step_000003: is not a checkpoint": lambda folder: (folder / "step_000003").write_text(""),
    "best: is not the link": lambda folder: (folder.parent / "best").mkdir(),
    "checkpoints: is a file": lambda folder: (shutil.rmtree(folder), folder.write_text("")),
    "checkpoints: the link leads nowhere": lambda folder: (shutil.rmtree(folder), folder.symlink_to("gone")),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
@pytest.mark.parametrize("resume", [False, True])
def test_what_is_no_checkpoint_is_named_before_anything_is_written(tmp_path, obstacle, resume):
    start(make_config(tmp_path))
    for step in (1, 2):
        save_step(tmp_path, step)
    before = (tmp_path / "config.yaml").read_text()
    OBSTACLES[obstacle](tmp_path / "checkpoints")
    with pytest.raises(ConfigError, match=f"output_dir: .*{obstacle}"):
        start(make_config(tmp_path, resume=resume, device="cpu"))
    assert (tmp_path / "config.yaml").read_text() == before


def test_checkpoints_may_be_on_another_disk(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").mkdir()
    (tmp_path / "run/checkpoints").symlink_to(tmp_path / "disk")
    start(make_config(tmp_path / "run"))
    for step in (1, 2, 3, 4):
        save_step(tmp_path / "run", step, is_best=step == 1, best_score=1.0, best_step=1)
    assert start(make_config(tmp_path / "run", resume=True)) == tmp_path / "run/checkpoints/step_000004"
    assert sorted(os.listdir(tmp_path / "disk")) == ["step_000001", "step_000003", "step_000004"]


@pytest.mark.parametrize(("logged", "is_lost"), [(0, False), (3, False), (10, False), (11, True)])
def test_a_run_whose_checkpoints_were_removed_is_not_started_over(tmp_path, capsys, logged, is_lost):
    """A checkpoint is due every 10 steps, so a run of 11 had one; a shorter one may have been killed before it."""
    start(make_config(tmp_path))
    metrics = "".join(json.dumps({"step": step, "loss": 1.0}) + "\n" for step in range(logged + 1))
    (tmp_path / "metrics.jsonl").write_text(metrics)
    cfg = make_config(tmp_path, resume=True)
    if is_lost:
        with pytest.raises(ConfigError, match=r"metrics.jsonl has 11 steps, but there is no checkpoint"):
            start(cfg)
    else:
        assert start(cfg) is None
        assert ("starting over" in capsys.readouterr().out) == (logged > 0)
    assert (tmp_path / "metrics.jsonl").read_text() == metrics


def test_a_run_of_another_recipe_is_not_resumed(tmp_path):
    start(make_config(tmp_path))
    save_step(tmp_path, 1)
    cfg = SFTConfig(output_dir=str(tmp_path), data=DataConfig(train={}, heldout={}), optimizer=OPTIMIZER, num_steps=1)
    cfg.model.path, cfg.resume = "org/name", True
    with pytest.raises(ConfigError, match="another recipe or version, whose config has advantage"):
        lifecycle.start(cfg, Checkpoints(tmp_path, keep_last=1), ALONE)


def test_a_run_gets_more_steps_if_its_rate_is_constant(tmp_path):
    start(make_config(tmp_path))
    save_step(tmp_path, 1)
    with pytest.raises(ConfigError, match="num_steps: 3: .* started with 4; it may grow"):
        start(make_config(tmp_path, resume=True, num_steps=3))
    assert start(make_config(tmp_path, resume=True, num_steps=9)) is not None
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["num_steps"] == 9
    schedule = {"_component_": "transformers.get_scheduler", "name": "cosine", "num_warmup_steps": 0}
    start(make_config(tmp_path / "b", lr_scheduler=schedule))
    save_step(tmp_path / "b", 1)
    with pytest.raises(ConfigError, match="num_steps: 9: .* started with 4; the schedule of the learning rate spans"):
        start(make_config(tmp_path / "b", lr_scheduler=schedule, resume=True, num_steps=9))


def test_one_run_at_a_time_writes_a_folder(tmp_path):
    with lifecycle.exclusive(str(tmp_path / "run"), ALONE):
        with (
            pytest.raises(
                ConfigError, match=f"output_dir: .*another process .*{os.getpid()} on {socket.gethostname()}"
            ),
            lifecycle.exclusive(str(tmp_path / "run"), ALONE),
        ):
            pass
    with lifecycle.exclusive(str(tmp_path / "run"), ALONE):
        pass


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="output_dir: .*file/run: Not a directory"):
        with lifecycle.exclusive(str(tmp_path / "file/run"), ALONE):
            pass


def test_resuming_names_every_change(tmp_path):
    start(make_config(tmp_path))
    save_step(tmp_path, 1)
    changed = make_config(tmp_path, resume=True, seed=7, num_steps=3, optimizer=OPTIMIZER | {"lr": 2e-05})
    with pytest.raises(ConfigError) as error:
        start(changed)
    assert error.value.problems[0].startswith(f"seed: 7: the run in {tmp_path} was started with 0")
    assert [problem.split(":")[0] for problem in error.value.problems] == ["seed", "optimizer", "num_steps"]
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["seed"] == 0


def test_a_run_older_than_a_key_goes_on_with_its_default_alone(tmp_path):
    start(make_config(tmp_path, lora=LoRAConfig(rank=4)))
    save_step(tmp_path, 1)
    saved = yaml.safe_load((tmp_path / "config.yaml").read_text())
    for key in ("fp32_head", "batch_invariant"):
        del saved["model"][key]
    del saved["loss_scale"], saved["prompt"], saved["lora"]["dropout"]
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(saved))
    for changes in (
        {"model": ModelConfig(path="org/name", fp32_head=True)},
        {"lora": LoRAConfig(rank=4, dropout=0.1)},
        {"prompt": PromptConfig(prefill="<think>")},
    ):
        with pytest.raises(ConfigError, match=f"^{next(iter(changes))}: "):
            start(make_config(tmp_path, resume=True, **({"lora": LoRAConfig(rank=4)} | changes)))
    assert start(make_config(tmp_path, resume=True, lora=LoRAConfig(rank=4))) is not None
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["model"]["fp32_head"] is False


def judged(**changes) -> dict:
    reward = {"_component_": "rolltune.rewards.rubric.reward.RubricReward", "weight": 1.0, "wait_seconds": 9.0}
    own = {name: changes.pop(name) for name in [*changes] if name in ("wait_seconds", "min_scored")}
    judge = as_config(**{"base_url": "http://a/v1", "model": "m", "max_calls": 9} | changes)
    judge["_component_"] = "rolltune.rewards.judges.endpoint.EndpointJudge"
    return {"rubric": reward | own | {"judges": [judge]}}


def test_a_run_goes_on_with_a_judge_that_moved_or_may_cost_more_but_not_with_another(tmp_path):
    start(make_config(tmp_path, rewards=judged()))
    save_step(tmp_path, 1)
    moved = judged(base_url="http://b/v1", max_calls=99, max_dollars=5.0, cache="c.sqlite", wait_seconds=60.0)
    assert start(make_config(tmp_path, resume=True, rewards=moved)) is not None
    for change in ({"model": "n"}, {"temperature": 0.7}, {"min_scored": 0.1}):
        with pytest.raises(ConfigError, match="^rewards: "):
            start(make_config(tmp_path, resume=True, rewards=judged(**change)))


@pytest.mark.parametrize(
    ("metrics", "score"),
    [
        ({}, None),
        ({"heldout/score": 0.4, "heldout/unscored": 0.0}, 0.4),
        ({"heldout/score": 1.0, "heldout/unscored": 0.6}, None),
        ({"heldout/unscored": 1.0}, None),
    ],
)
def test_the_best_is_not_chosen_by_a_few(metrics, score, capsys):
    assert lifecycle.best_score(metrics, max_unscored=0.5, world=ALONE) == score
    assert ("unscored" in capsys.readouterr().out) == (metrics.get("heldout/unscored", 0.0) > 0.5)


def test_a_broken_config_is_named(tmp_path):
    start(make_config(tmp_path))
    save_step(tmp_path, 1)
    (tmp_path / "config.yaml").write_text("seed: 0\nmodel: [\n")
    with pytest.raises(ConfigError, match=rf"^{tmp_path}/config\.yaml, line 3: .*; repair it"):
        start(make_config(tmp_path, resume=True))


def test_what_no_number_depends_on_may_change(tmp_path):
    start(make_config(tmp_path / "run"))
    save_step(tmp_path / "run", 1)
    os.rename(tmp_path / "run", tmp_path / "moved")
    cfg = make_config(tmp_path / "moved", resume=True, device="cpu")
    cfg.logging.tensorboard = True
    cfg.checkpoint.keep_last = 5
    assert start(cfg) == tmp_path / "moved/checkpoints/step_000001"
    assert yaml.safe_load((tmp_path / "moved/config.yaml").read_text())["device"] == "cpu"


@pytest.mark.parametrize(
    "text",
    ["1e-3", "yes", "null", "12:30", "0777", "???", "a ${b} c", "${oc.env:HOME}", "${", "é\n  - x: {}", "", "# no"],
)
def test_any_text_is_the_same_after_a_restart(tmp_path, text):
    changes = {"prompt": PromptConfig(system=text), "loss": {"_component_": "x.Loss", "name": text, text: 1e-08}}
    start(make_config(tmp_path, **changes))
    save_step(tmp_path, 1)
    assert start(make_config(tmp_path, resume=True, **changes)) is not None


def test_resuming_finishes_a_save_that_was_cut_short(tmp_path):
    """Killed behind the rename of step 2: it is the best and the last, but best/ is step 1."""
    start(make_config(tmp_path))
    save_step(tmp_path, 1, is_best=True, best_score=0.1, best_step=1)
    save_step(tmp_path, 2, best_score=0.2, best_step=2)
    assert os.readlink(tmp_path / "best") == "checkpoints/step_000001/policy"
    start(make_config(tmp_path, resume=True))
    assert os.readlink(tmp_path / "best") == "checkpoints/step_000002/policy"


def test_all_ranks_find_the_same(tmp_path):
    found = on_ranks(3, lambda world: start(make_config(tmp_path), world))
    assert found == [None] * 3 and sorted(os.listdir(tmp_path)) == ["config.yaml", "run.json"]
    save_step(tmp_path, 1)
    found = on_ranks(3, lambda world: start(make_config(tmp_path, resume=True, device="cpu"), world))
    assert found == [tmp_path / "checkpoints/step_000001"] * 3
    with pytest.raises(ConfigError, match="seed: 1"):
        on_ranks(3, lambda world: start(make_config(tmp_path, resume=True, seed=1), world))


def test_no_rank_goes_on_without_the_checkpoint_of_rank_0(tmp_path):
    """Each rank has a folder of its own; the second has no checkpoint, an older one, or the same."""
    for name in ("0", "same", "older"):
        start(make_config(tmp_path / name))
        save_step(tmp_path / name, 1)
    save_step(tmp_path / "0", 2, data_position=8)
    save_step(tmp_path / "same", 2, data_position=8)

    def resume(world: World, second: str) -> Path | None:
        return start(make_config(tmp_path / ("0", second)[world.rank], resume=True), world)

    assert on_ranks(2, lambda world: resume(world, "same")) == [
        Checkpoints(tmp_path / name, keep_last=2).path(2) for name in ("0", "same")
    ]
    for second in ("older", "none"):
        with pytest.raises(ConfigError, match="rank 1 does not have the checkpoint that rank 0 resumes from"):
            on_ranks(2, lambda world, second=second: resume(world, second))


def test_ranks_other_than_the_first_write_nothing(tmp_path):
    def log_one(world: World) -> None:
        cfg = make_config(tmp_path / str(world.rank))  # a node without a shared disk
        assert start(cfg, world) is None
        log = lifecycle.open_log(cfg, world, resume_step=None)
        log.log(1, {"loss": 1.0})
        log.close()

    on_ranks(2, log_one)
    assert (tmp_path / "0").exists() and not (tmp_path / "1").exists()


def test_the_first_rank_logs_and_goes_on_behind_the_checkpoint(tmp_path):
    cfg = make_config(tmp_path)
    for resume_step in (None, 1):
        log = lifecycle.open_log(cfg, ALONE, resume_step=resume_step)
        for step in (1, 2) if resume_step is None else (2, 3):
            log.log(step, {"loss": float(step)})
        log.close()
    assert [yaml.safe_load(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3]


# --- building ---------------------------------------------------------------------------------------------------------


def test_held_out_problems_are_the_first_ones_and_not_trained_on():
    train, heldout = build.load_data(DataConfig(train=sums(), heldout=sums(split="heldout")), max_heldout=3)
    assert len(train) == 5 and [p.id for p in heldout] == [f"sums/heldout/seed0/{i}" for i in range(3)]
    assert len(build.load_data(DataConfig(train=sums(), heldout=sums(split="heldout")), max_heldout=99)[1]) == 5
    with pytest.raises(
        ConfigError, match=r"data\.heldout: 2 of its 2 questions are also in data\.train, first 'sums/train"
    ):
        build.load_data(DataConfig(train=sums(), heldout=sums(count=2)), max_heldout=99)


def test_a_data_set_that_cannot_be_loaded_is_the_users_mistake():
    with pytest.raises(ConfigError, match=r"rolltune\.data\.sums\.sums: sums: count=0 must be at least 1"):
        build.load_data(DataConfig(train=sums(count=0), heldout=sums()), max_heldout=1)


def test_rewards_by_name_with_their_weights():
    reward = build.build_reward(
        {
            "answer": {"_component_": "rolltune.rewards.answer.answer_reward"},
            "format": {"_component_": "rolltune.rewards.format.format_reward", "weight": 0.25},
            "loops": {"_component_": "rolltune.rewards.repetition.repetition_reward", "weight": 2, "n": 1},
        }
    )
    text = "<think>a a b c</think> <answer>4</answer>"
    completion = Completion(token_ids=(), logprobs=(), finish_reason="stop", policy_version=0, text=text)
    score = reward(Problem(id="p", messages=(), answer="4"), completion)
    assert score.parts == {"answer": 1.0, "format": 1.0, "loops": 0.0}
    assert score.total == 1.25
    repeated = dataclasses.replace(completion, text="b b b b")
    score = reward(Problem(id="p", messages=(), answer="4"), repeated)
    assert score.total == 2 * -0.75 and score.parts["loops"] == -0.75  # n = 1: three of four words came before


@pytest.fixture
def policy(tiny_llama):
    def build(dtype="float32"):
        config = ModelConfig(path=str(tiny_llama), dtype=dtype)
        return build_policy(config, None, device=torch.device("cpu"), seed=0, with_reference=False)

    return build


def test_the_optimizer_steps_the_parameters_or_their_fp32_copies(policy, tmp_path):
    cfg = make_config(tmp_path, max_grad_norm=0.5)
    single = build.build_optimization(cfg, model := policy(), num_updates=3)
    assert type(single.optimizer) is torch.optim.AdamW and single.scheduler is None and single.max_grad_norm == 0.5
    matrices, norms = single.optimizer.param_groups
    assert (matrices["lr"], tuple(matrices["betas"])) == (norms["lr"], tuple(norms["betas"])) == (1e-05, (0.9, 0.95))
    stepped = {id(p) for p in [*matrices["params"], *norms["params"]]}
    assert stepped == {id(p) for p in model.trainable_parameters}
    names = {name for name, p in model.model.named_parameters() if any(p is each for each in norms["params"])}
    assert names == {name for name, _ in model.model.named_parameters() if "norm" in name}
    assert (matrices["weight_decay"], norms["weight_decay"]) == (0.01, 0.0), "AdamW's default, and none for norms"
    cfg.model.master_weights = True
    copies = build.build_optimization(cfg, policy("bfloat16"), num_updates=3).optimizer.param_groups[0]["params"]
    assert {p.dtype for p in copies} == {torch.float32}


def test_float16_has_a_loss_scale_and_nothing_else_has(policy, tmp_path):
    cfg = make_config(tmp_path)
    for dtype in ("float32", "bfloat16"):
        cfg.model.dtype = dtype
        assert build.build_optimization(cfg, policy(dtype), num_updates=3).loss_scale is None
    cfg.model = ModelConfig(path="org/name", dtype="float16", master_weights=True)
    scale = build.build_optimization(cfg, policy("float16"), num_updates=3).loss_scale
    assert scale is not None and (scale.get_scale(), scale.get_growth_interval()) == (2.0**16, 400)
    cfg.loss_scale = {"_component_": "rolltune.loss_scale.LossScale", "init_scale": 8, "growth_interval": 5}
    scale = build.build_optimization(cfg, policy("float16"), num_updates=3).loss_scale
    assert scale is not None and (scale.get_scale(), scale.get_growth_interval()) == (8.0, 5)


def test_float16_on_a_cpu_is_warned_of_once(tmp_path, capsys):
    start(make_config(tmp_path / "a", model=ModelConfig(path="org/name", dtype="float16", master_weights=True)))
    assert capsys.readouterr().out.endswith("matrix products take 2 to 20 times as long as in bfloat16\n")
    start(make_config(tmp_path / "b", model=ModelConfig(path="org/name", dtype="bfloat16")))
    cuda = dataclasses.replace(ALONE, device=torch.device("cuda"))
    lifecycle.warn_of_slow_dtype("float16", cuda)
    lifecycle.warn_of_slow_dtype("float16", dataclasses.replace(ALONE, rank=1))
    assert capsys.readouterr().out == ""


def test_a_starting_sampler_has_the_head_of_the_policy(tiny_llama, tokenizer, tmp_path, monkeypatch):
    class Sampler:
        def __init__(self, model):
            self.model, self.version = model, None

        def sync(self, version):
            self.version = version

    monkeypatch.setattr(build, "instantiate", lambda node, model, tokenizer: Sampler(model))
    for fp32_head, kind in ((False, torch.nn.Linear), (True, FP32Head)):
        model = ModelConfig(path=str(tiny_llama), dtype="bfloat16", fp32_head=fp32_head)
        sampled = build.starting_sampler(make_config(tmp_path, model=model), tokenizer, ALONE)
        assert type(sampled.model.get_output_embeddings()) is kind and sampled.version == 0  # pyright: ignore


@pytest.mark.parametrize("name", ["colocated", "served"])
def test_the_starting_weights_are_in_no_second_engine(tiny_llama, tokenizer, tmp_path, name):
    cfg = make_config(
        tmp_path,
        model=ModelConfig(path=str(tiny_llama)),
        sampler={"_component_": f"rolltune.samplers.vllm.{name}", "kv_cache_gib": 1.0},
    )
    assert type(build.starting_sampler(cfg, tokenizer, ALONE)) is NativeSampler


class Closing:
    """A sampler that notes when it is closed."""

    def __init__(self, model, tokenizer, *, closed: list):
        self.model, self.closed = model, closed

    def sync(self, version): ...

    def close(self):
        self.closed.append(self.model)


def self_judged() -> build.Rewards:
    judge = {"_component_": "rolltune.rewards.judges.policy.PolicyJudge", "frozen": True}
    reward = {"_component_": "rolltune.rewards.rubric.reward.RubricReward", "judges": [judge]}
    training, heldout = build.build_reward({"rubric": reward}), build.build_reward({"correct": reward})
    rubric = Rubric.of(Criterion(title="Right", description="Is right.", category="essential"))
    pool = JudgePool()
    for section, measure in (("rewards", training), ("eval", heldout)):
        measure.join(pool, section, [Problem(id="p", messages=(), rubric=rubric)])
    return build.Rewards(training=training, heldout=heldout, overoptimization=None, pool=pool)


def test_the_starting_weights_are_sampled_from_until_the_judges_close(tokenizer):
    closed, made = [], []
    rewards = self_judged()
    rewards.pool.bind(
        Closing("policy", tokenizer, closed=closed),
        tokenizer,
        lambda: made.append("start") or Closing("start", tokenizer, closed=closed),
    )
    assert made == ["start"] and closed == []
    rewards.pool.close()
    assert closed == ["start"], "the policy's own is the run's"


def test_a_policy_that_cannot_judge_leaves_no_sampler_open(policy, tokenizer, tmp_path, monkeypatch):
    def fail(*args):
        raise ValueError("no memory for the starting weights")

    monkeypatch.setattr(build, "starting_sampler", fail)
    monkeypatch.setattr(build, "instantiate", lambda node, *args: Closing(*args, closed=closed))
    rewards, closed, of = self_judged(), [], policy()
    with pytest.raises(ValueError, match="no memory for the starting weights"):
        build.start_sampler(make_config(tmp_path), of, tokenizer, rewards, ALONE)
    assert closed == [of.model]
    rewards.pool.close()


def test_the_schedule_knows_the_number_of_updates(policy, tmp_path):
    cfg = make_config(
        tmp_path,
        optimizer=OPTIMIZER | {"lr": 1.0},
        lr_scheduler={
            "_component_": "transformers.get_scheduler",
            "name": "cosine",
            "num_warmup_steps": 1,
        },
    )
    optimization = build.build_optimization(cfg, policy(), num_updates=3)
    lrs = []
    for _ in range(4):
        lrs.append(optimization.optimizer.param_groups[0]["lr"])
        optimization.optimizer.step()
        assert optimization.scheduler is not None
        optimization.scheduler.step()
    assert lrs == pytest.approx([0.0, 1.0, 0.5, 0.0])


def test_prompts_and_sampling_follow_the_config(tokenizer):
    prompt = PromptConfig(system="s", few_shot=[FewShotExample(user="u", assistant="a")], prefill="<think>")
    rendered = build.prompt_renderer(prompt, tokenizer)(Problem(id="p", messages=({"role": "user", "content": "q"},)))
    assert tokenizer.decode(rendered.token_ids) == (
        "<|system|>s<|end|><|user|>u<|end|><|assistant|>a<|end|><|user|>q<|end|><|assistant|><think>"
    )
    sampling = SamplingConfig(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=11, stop=["x", "y"])
    expected = SamplingParams(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=11, stop=("x", "y"))
    assert sampling.params() == expected
    of_evaluation = EvaluateSamplingConfig(temperature=0.5, top_p=0.9, top_k=7, max_new_tokens=11, stop=["x", "y"])
    assert of_evaluation.params() == expected


# --- save -------------------------------------------------------------------------------------------------------------


class Nothing:
    """A policy and an optimization that hold nothing."""

    trainable_parameters = saved_parameters = ()
    mesh = None

    def collect_weights(self) -> None:
        pass

    def save(self, folder: Path, tokenizer, weights: None) -> None:
        folder.mkdir(parents=True)

    def state_dict(self) -> dict:
        return {}


def save_all(output_dir: Path, scores: list[float | None], *, every: int = 1, world: World = ALONE) -> list[TrainState]:
    saver, state, states = saver_of(Checkpoints(output_dir, keep_last=99), world), TrainState(), []
    for step, score in enumerate(scores, start=1):
        state = saver.save(dataclasses.replace(state, step=step), score=score, is_due=step % every == 0)
        states.append(state)
    return states


def saver_of(checkpoints: Checkpoints, world: World) -> lifecycle.Saver:
    nothing: Any = Nothing()
    return lifecycle.Saver(
        policy=nothing, tokenizer=nothing, optimization=nothing, checkpoints=checkpoints, world=world
    )


def test_the_best_is_the_first_of_the_highest(tmp_path):
    states = save_all(tmp_path, [None, -3.0, -4.0, None, -3.0, -2.0, -2.0])
    assert [(s.best_score, s.best_step) for s in states] == [
        (None, None),
        *[(-3.0, 2)] * 4,
        *[(-2.0, 6)] * 2,
    ]
    assert os.readlink(tmp_path / "best") == "checkpoints/step_000006/policy"
    for step, state in enumerate(states, start=1):
        assert load_state(tmp_path / f"checkpoints/step_{step:06d}") == state


def test_an_accuracy_of_0_is_the_best_of_a_run_that_has_no_other(tmp_path):
    (state,) = save_all(tmp_path, [0.0])
    assert state.best_score == 0.0 and (tmp_path / "best").exists()


def test_saved_when_due_and_when_best(tmp_path):
    save_all(tmp_path, [None, None, 0.5, 0.4, None, None, 0.6, None], every=4)
    assert Checkpoints(tmp_path, keep_last=99).steps() == [3, 4, 7, 8]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    saver = saver_of(Checkpoints(tmp_path, keep_last=2), ALONE)
    saver.save(TrainState(step=1), score=None, is_due=True)
    saver.policy.trainable_parameters = (torch.ones(2), torch.tensor([1.0, float("nan")]))  # pyright: ignore
    with pytest.raises(RunStopped, match=r"(?s)step 2: .*not finite.*the last checkpoint is of step 1"):
        saver.save(TrainState(step=2), score=9.0, is_due=True)
    assert Checkpoints(tmp_path, keep_last=2).steps() == [1]


def test_one_rank_writes_and_all_know_the_best(tmp_path):
    states = on_ranks(3, lambda world: save_all(tmp_path, [0.1, None, 0.3], every=2, world=world))
    assert states[0] == states[1] == states[2] and states[0][-1].best_step == 3
    assert Checkpoints(tmp_path, keep_last=99).steps() == [1, 2, 3]


# --- stopping ---------------------------------------------------------------------------------------------------------


def test_all_ranks_stop_for_the_same_reason():
    """One rank's judge has reached its cap, or two of four turns are unscored over both ranks."""

    def rollout(*failures: str | None) -> Rollout:
        scores = tuple(Score(total=1.0 if failure is None else None, failure=failure) for failure in failures)
        completion = Completion(token_ids=(1,), logprobs=(0.0,), finish_reason="stop", policy_version=0, text="x")
        group = Group(
            problem=Problem(id="p", messages=()),
            prompt=Prompt(token_ids=(1,)),
            completions=(completion,) * len(scores),
            scores=scores,
        )
        sampled = SampledGroup(group=group, number=0, advantages=None)
        return Rollout(groups=[sampled], num_kept=1, data_position=1)

    def why(world: World, reason: str | None, share: float) -> str | None:
        mine = rollout("judge_down", None) if world.rank == 0 else rollout("judge_late", None)
        return lifecycle.unscored_problem(mine, reason if world.rank == 1 else None, share, world)

    assert on_ranks(2, lambda world: why(world, "max_calls", 1.0)) == ["max_calls"] * 2
    assert on_ranks(2, lambda world: why(world, None, 0.5)) == [None, None]
    first, second = on_ranks(2, lambda world: why(world, None, 0.4))
    assert first == second and first is not None
    assert first.startswith("batch.max_unscored: 2 of 4 completions are unscored (judge_down 1, judge_late 1)")


@pytest.mark.parametrize("is_kept", [False, True])
def test_stopping_keeps_the_last_step_on_all_ranks_or_none(tmp_path, is_kept):
    """The second rank looks into another folder, as behind a slow network file system: it must not decide by itself,
    or one rank waits for the other for ever."""
    for rank, kept in enumerate((is_kept, not is_kept)):
        if kept:
            save_step(tmp_path / str(rank), 3)

    def stop(world: World) -> str:
        checkpoints = Checkpoints(tmp_path / str(world.rank), keep_last=2)
        with pytest.raises(RunStopped) as stopped:
            saver_of(checkpoints, world).stop(TrainState(step=3), "why")
        return str(stopped.value)

    for rank, said in enumerate(on_ranks(2, stop)):
        assert said.startswith(f"step 4: why\n  a checkpoint of step 3 is in {tmp_path / str(rank)}; ")
        assert "resume=true" in said
    assert Checkpoints(tmp_path / "0", keep_last=2).steps() == [3]


def test_stopped_ranks_leave_together():
    closed = []

    def stop(world: World) -> list[str]:
        with pytest.raises(RunStopped), lifecycle.barrier_on_exit(world):
            try:
                raise RunStopped("why")
            finally:
                if world.is_main:
                    time.sleep(0.3)
                    closed.append("the log")
        return list(closed)

    assert on_ranks(2, stop) == [["the log"]] * 2


def test_sft_starts_in_the_same_way(tmp_path):
    cfg = SFTConfig(output_dir=str(tmp_path), data=DataConfig(train={}, heldout={}), optimizer=OPTIMIZER, num_steps=1)
    cfg.model.path = "org/name"
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    assert lifecycle.start(cfg, checkpoints, ALONE) is None
    save_step(tmp_path, 1)
    cfg.resume = True
    assert lifecycle.start(cfg, checkpoints, ALONE) == checkpoints.path(1)
