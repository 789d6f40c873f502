"""A run may be killed inside any file operation: what is left is whole, and the run ends as if nothing had happened."""

import itertools
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from rolltune.run import checkpoint
from rolltune.run.checkpoint import (
    Checkpoints,
    TrainState,
    check_room,
    load_optimization,
    load_state,
    tensor_bytes,
)

SCORES = {1: 0.3, 2: 0.5, 3: None, 4: 0.5, 5: 0.7}  # 2 is the best until 5; the 0.5 of step 4 is no better


class Killed(BaseException):
    """Not an Exception: nothing may catch it and clean up."""


class Countdown:
    """Kills before file operation number ``left`` (from 0), or never."""

    def __init__(self, left: int | None = None):
        self.left = left
        self.calls: list[str] = []

    def wrap(self, monkeypatch, module, name: str) -> None:
        right = getattr(module, name)

        def operation(*args, **kwargs):
            if self.left is not None and len(self.calls) == self.left:
                raise Killed(name)
            self.calls.append(name)
            return right(*args, **kwargs)

        monkeypatch.setattr(module, name, operation)


@pytest.fixture
def fast_disk(monkeypatch):
    """Without what takes milliseconds and says nothing here: there is no power cut, and no tensor of interest."""

    def load(path, **options):
        return pickle.loads(path.read_bytes())

    monkeypatch.setattr(os, "fsync", os.fstat)
    monkeypatch.setattr(torch, "save", lambda value, path: path.write_bytes(pickle.dumps(value)))
    monkeypatch.setattr(torch, "load", load)


def watch(monkeypatch, countdown: Countdown) -> None:
    for name in ("rename", "replace", "symlink", "unlink", "rmdir", "mkdir", "fsync"):
        countdown.wrap(monkeypatch, os, name)
    for name in ("write_text", "write_bytes"):
        countdown.wrap(monkeypatch, Path, name)
    countdown.wrap(monkeypatch, torch, "save")


def save(checkpoints: Checkpoints, state: TrainState, *, is_best: bool = False) -> None:
    def save_policy(folder: Path) -> None:
        folder.mkdir(parents=True)
        (folder / "weights").write_text(f"weights of {state.step}")
        (folder / "tokenizer").write_text("tokenizer")

    checkpoints.save(state, save_policy=save_policy, optimization={"moment": state.step}, is_best=is_best)


def drive(output_dir: Path, *, keep_last: int = 2) -> None:
    """What a recipe does: go on from the newest whole checkpoint, save, keep track of the best."""
    checkpoints = Checkpoints(output_dir, keep_last=keep_last)
    latest = checkpoints.latest()
    state = load_state(latest) if latest else TrainState()
    if latest:
        checkpoints.recover(state)
    for step in range(state.step + 1, max(SCORES) + 1):
        score = SCORES[step]
        is_best = score is not None and (state.best_score is None or score > state.best_score)
        best = {"best_score": score, "best_step": step} if is_best else {}
        state = TrainState(**(vars_of(state) | best | {"step": step, "data_position": 10 * step}))
        save(checkpoints, state, is_best=is_best)


def vars_of(state: TrainState) -> dict:
    return {name: getattr(state, name) for name in TrainState.__dataclass_fields__}


def look(output_dir: Path) -> dict:
    """All files below a run's folder and what is in them; links by what they point to."""
    found = {}
    for path in sorted(output_dir.rglob("*")):
        if path.is_symlink():
            found[str(path.relative_to(output_dir))] = os.readlink(path)
        elif path.is_file():
            is_tensor = path.name == "trainer.pt"
            found[str(path.relative_to(output_dir))] = torch.load(path)["moment"] if is_tensor else path.read_text()
    return found


def assert_whole(output_dir: Path) -> None:
    """Whatever is named like a checkpoint is one, and ``best`` is the policy of one."""
    checkpoints = Checkpoints(output_dir, keep_last=2)
    for step in checkpoints.steps():
        path = checkpoints.path(step)
        assert (path / "policy/weights").read_text() == f"weights of {step}"
        assert (path / "policy/tokenizer").read_text() == "tokenizer"
        assert load_state(path).step == step and load_state(path).data_position == 10 * step
    latest = checkpoints.latest()
    if latest is not None:
        assert load_optimization(latest)["moment"] == load_state(latest).step
    best = output_dir / "best"
    if best.is_symlink():
        assert (best / "weights").read_text() in {"weights of 1", "weights of 2", "weights of 5"}


def test_killed_at_every_file_operation(tmp_path, monkeypatch, fast_disk):
    with monkeypatch.context() as patch:
        watch(patch, counted := Countdown())
        drive(tmp_path / "whole")
    whole = look(tmp_path / "whole")
    assert len(counted.calls) > 80 and {"rename", "replace", "symlink", "unlink", "rmdir", "save"} <= set(counted.calls)
    for number, name in enumerate(counted.calls):
        output_dir = tmp_path / str(number)
        with monkeypatch.context() as patch:
            watch(patch, Countdown(number))
            with pytest.raises(Killed, match=name):
                drive(output_dir)
        assert_whole(output_dir)
        # From its first moment on there is always a best.
        assert (output_dir / "best").exists() or "replace" not in counted.calls[:number]
        before = Checkpoints(output_dir, keep_last=2).latest()
        if before is not None and (state := load_state(before)).step > 2:
            # At most one save is lost.
            saves = counted.calls[:number].count("save")
            assert saves - 1 <= state.step <= saves
        drive(output_dir)
        assert look(output_dir) == whole, f"killed at {name}, operation {number}"
        shutil.rmtree(output_dir)


def test_killed_again_and_again(tmp_path, monkeypatch, fast_disk):
    """Every attempt dies a little later than the one before."""
    drive(tmp_path / "whole")
    output_dir = tmp_path / "run"
    for number in itertools.count(1, step=3):
        with monkeypatch.context() as patch:
            watch(patch, Countdown(number))
            try:
                drive(output_dir)
            except Killed:
                assert_whole(output_dir)
            else:
                break
    assert look(output_dir) == look(tmp_path / "whole")


def test_what_is_kept(tmp_path):
    drive(tmp_path)
    found = look(tmp_path)
    sizes = [json.loads(found.pop(f"checkpoints/step_{step:06d}/files.json")) for step in (4, 5)]
    names = ["policy/tokenizer", "policy/weights", "state.json", "trainer.pt"]
    assert [sorted(each) for each in sizes] == [names, names] and sizes[0]["policy/weights"] == len("weights of 4")
    assert found == {
        "best": "checkpoints/step_000005/policy",
        **{
            f"checkpoints/step_{step:06d}/{name}": content
            for step in (4, 5)
            for name, content in (
                ("policy/weights", f"weights of {step}"),
                ("policy/tokenizer", "tokenizer"),
                ("trainer.pt", step),
                (
                    "state.json",
                    json.dumps(
                        {
                            "step": step,
                            "data_position": 10 * step,
                            "policy_version": 0,
                            "best_score": {4: 0.5, 5: 0.7}[step],
                            "best_step": {4: 2, 5: 5}[step],
                            "seconds": 0.0,
                        }
                    ),
                ),
            )
        },
    }


def test_the_best_stays_without_its_optimizer_state(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=1)
    for step in range(1, 5):
        save(checkpoints, TrainState(step=step), is_best=step == 2)
    assert checkpoints.steps() == [2, 4]
    assert not (checkpoints.path(2) / "trainer.pt").exists() and (checkpoints.path(4) / "trainer.pt").exists()
    assert (tmp_path / "best/weights").read_text() == "weights of 2"
    save(checkpoints, TrainState(step=5), is_best=True)
    assert checkpoints.steps() == [5]
    assert (tmp_path / "best/weights").read_text() == "weights of 5"


def test_the_link_is_relative_so_a_run_can_be_moved(tmp_path):
    save(Checkpoints(tmp_path / "run", keep_last=1), TrainState(step=1), is_best=True)
    os.rename(tmp_path / "run", tmp_path / "moved")
    assert (tmp_path / "moved/best/weights").read_text() == "weights of 1"


def test_latest_is_the_newest_that_can_be_resumed_from(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    assert checkpoints.latest() is None and checkpoints.steps() == []
    for step in (9, 10, 200):
        save(checkpoints, TrainState(step=step))
    (checkpoints.folder / ".tmp-step_000300/policy").mkdir(parents=True)
    assert checkpoints.steps() == [9, 10, 200] and checkpoints.latest() == checkpoints.path(200)
    (checkpoints.path(200) / "trainer.pt").unlink()  # as of a best one that was left behind
    assert checkpoints.latest() == checkpoints.path(10)
    save(checkpoints, TrainState(step=11))
    assert not list(checkpoints.folder.glob(".tmp-*"))


def test_a_step_that_is_saved_again_is_replaced(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=2)
    save(checkpoints, TrainState(step=1, data_position=1))
    (checkpoints.path(1) / "policy/more").write_text("of the first time")
    save(checkpoints, TrainState(step=1, data_position=2))
    assert load_state(checkpoints.path(1)).data_position == 2
    assert not (checkpoints.path(1) / "policy/more").exists()
    assert [path.name for path in checkpoints.folder.iterdir()] == ["step_000001"]


def test_recover_finishes_the_save_that_was_cut_short(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep_last=5)
    for step in (1, 2, 3):
        save(checkpoints, TrainState(step=step), is_best=step == 1)
    (checkpoints.folder / ".tmp-step_000004/policy").mkdir(parents=True)
    Checkpoints(tmp_path, keep_last=1).recover(TrainState(step=3, best_score=1.0, best_step=2))
    assert (tmp_path / "best/weights").read_text() == "weights of 2"
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == ["step_000002", "step_000003"]
    assert not (checkpoints.path(2) / "trainer.pt").exists()
    checkpoints.recover(TrainState(step=3))  # before the first evaluation
    checkpoints.recover(TrainState(step=3, best_score=1.0, best_step=7))  # removed by hand: better an old one than none
    assert (tmp_path / "best/weights").read_text() == "weights of 2"


def test_every_file_is_on_disk_before_it_counts(tmp_path, monkeypatch):
    synced, order = set(), []
    fsync, rename = os.fsync, os.rename

    def note_fsync(fd):
        synced.add(os.path.realpath(f"/proc/self/fd/{fd}"))
        fsync(fd)

    def note_rename(source, target):
        order.append({os.path.realpath(path) for path in Path(source).rglob("*") if path.is_file()} - synced)
        rename(source, target)

    monkeypatch.setattr(checkpoint.os, "fsync", note_fsync)
    monkeypatch.setattr(checkpoint.os, "rename", note_rename)
    save(Checkpoints(tmp_path, keep_last=1), TrainState(step=1))
    assert order == [set()] and len(synced) == 5


def test_state_and_optimizer_come_back_exactly(tmp_path):
    state = TrainState(step=3, data_position=24, policy_version=12, best_score=-0.1 / 3, best_step=2, seconds=1.0 / 7)
    parameter = torch.nn.Parameter(torch.randn(5))
    optimizer = torch.optim.AdamW([parameter], lr=1e-3, betas=(0.9, 0.95))
    parameter.grad = torch.randn(5)
    optimizer.step()
    Checkpoints(tmp_path, keep_last=1).save(
        state, save_policy=lambda path: path.mkdir(parents=True), optimization=optimizer.state_dict(), is_best=False
    )
    latest = Checkpoints(tmp_path, keep_last=1).latest()
    assert latest is not None and load_state(latest) == state
    loaded = load_optimization(latest)
    assert loaded["param_groups"] == optimizer.state_dict()["param_groups"]
    for name, value in optimizer.state_dict()["state"][0].items():
        assert torch.equal(loaded["state"][0][name], value)


def test_a_disk_without_room_is_named_before_a_save(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)._replace(free=2**29)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    check_room(tmp_path / "new", needed=2**29)
    with pytest.raises(OSError, match="needs 1.00 GiB, and 0.50 GiB are free"):
        check_room(tmp_path / "new", needed=2**30)
    assert tensor_bytes({"a": [torch.zeros(3), 1], "b": (torch.zeros(2, dtype=torch.bfloat16),)}) == 16
