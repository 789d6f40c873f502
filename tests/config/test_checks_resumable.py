"""Everything that a config can name as optimizer or schedule resumes, or is refused before weights are loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

OWN = """\
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

class Counting(SGD):
    \"""Its count, which decides the step, is not in the state_dict.\"""
    def __init__(self, params, lr):
        super().__init__(params, lr=lr)
        self.count = 0

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * self.count * p.grad)

class Noisy(SGD):
    \"""Its noise comes from torch's generator, which training seeds in each step.\"""
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.data.sub_(group["lr"] * (p.grad + torch.randn_like(p)))

class Stateful:
    def __init__(self):
        self.seen = 0
    def to(self, epoch):
        self.seen += 1
        return 1.0 if self.seen < 5 else 0.5

def forgetful(optimizer, num_training_steps):
    return LambdaLR(optimizer, Stateful().to)

def late(optimizer, num_training_steps):
    calls = []
    return LambdaLR(optimizer, lambda epoch: calls.append(1) or (1.0 if len(calls) < 60 else 0.1))

def by_epoch(optimizer, num_training_steps):
    return LambdaLR(optimizer, lambda epoch: 1 - epoch / num_training_steps)

def infinite(optimizer, num_training_steps):
    return LambdaLR(optimizer, lambda epoch: float("inf") if epoch == 3 else 1.0)

class Remembering(LRScheduler):
    def __init__(self, optimizer, num_training_steps):
        self.factor = 1.0
        super().__init__(optimizer)

    def get_lr(self):
        self.factor *= 0.9
        return [base * self.factor for base in self.base_lrs]
"""


@pytest.fixture(autouse=True)
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "own_resumable.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "own_resumable", raising=False)


@pytest.mark.parametrize(
    "path",
    [
        *(
            f"torch.optim.{name}"
            for name in ("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam", "Adagrad", "Adadelta")
        ),
        *(f"torch.optim.{name}" for name in ("ASGD", "Rprop", "RMSprop", "Adafactor")),
        *(f"bitsandbytes.optim.{name}" for name in ("AdamW8bit", "PagedAdamW8bit", "Lion8bit")),
        "own_resumable.Noisy",
    ],
)
def test_optimizers_that_resume(grpo, path: str):
    assert grpo(f"optimizer={{_component_: {path}, lr: 1e-2}}") == []


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("torch.optim.LBFGS, lr: 1e-3", "LBFGS doesn't support per-parameter options"),
        ("torch.optim.SparseAdam, lr: 1e-3", "does not support dense gradients"),
        ("torch.optim.Muon, lr: 1e-3", "only supports 2D parameters"),
        ("own_resumable.Counting, lr: 1e-3", "its state_dict lacks some of its state"),
        ("torch.optim.AdamW, betas: [1.5, 0.9]", "Invalid beta"),
    ],
)
def test_optimizers_that_are_refused(grpo, node: str, reason: str):
    (found,) = grpo(f"optimizer={{_component_: {node}}}")
    assert found.startswith("optimizer._component_: ") and reason in found


@pytest.mark.parametrize(("name", "value"), [("lr", ".inf"), ("lr", ".nan"), ("weight_decay", ".inf"), ("eps", ".nan")])
def test_settings_of_the_optimizer_are_finite(grpo, name: str, value: str):
    assert grpo(f"optimizer.{name}={value}")[0].startswith(f"optimizer.{name}: {value[1:]}; must be ")


@pytest.mark.parametrize("name", ["linear", "cosine", "cosine_with_restarts", "polynomial", "constant", "inverse_sqrt"])
def test_schedules_that_resume(grpo, name: str):
    assert grpo(f"lr_scheduler.name={name}") == []
    assert grpo("lr_scheduler={_component_: own_resumable.by_epoch}", f"num_steps={len(name)}") == []


@pytest.mark.parametrize(
    ("node", "reason"),
    [
        ("own_resumable.forgetful", "another rate from step 7 on"),
        ("own_resumable.late", "another rate from step 60 on"),
        ("own_resumable.infinite", "the rate of step 4 is inf"),
        ("transformers.get_scheduler, name: reduce_lr_on_plateau", "'metrics'"),
        ("transformers.get_scheduler, name: warmup_stable_decay, num_warmup_steps: 2", "'num_decay_steps'"),
        ("transformers.get_scheduler, name: cosine_with_min_lr, num_warmup_steps: 2", "min_lr"),
    ],
)
def test_schedules_that_are_refused(grpo, node: str, reason: str):
    (found,) = grpo(f"lr_scheduler={{_component_: {node}}}", "num_steps=100")
    assert found.startswith("lr_scheduler: ") and reason in found


def test_state_in_an_attribute_is_kept(grpo):
    """A schedule's attributes are in its state_dict."""
    assert grpo("lr_scheduler={_component_: own_resumable.Remembering}") == []


def test_the_trial_leaves_no_trace(grpo):
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    grpo()
    assert torch.equal(torch.rand(3), expected)
