"""Training in float16: how the loss scale moves, and how a step uses it."""

import copy
import math

import pytest
import torch
from thread_world import on_ranks

from rolltune.batch import TrainGroup, TrainSequence, count_totals, pack
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.distributed import World
from rolltune.loss_scale import LossScale
from rolltune.losses.dapo import DAPOLoss
from rolltune.model.policy import build_policy
from rolltune.types import Prompt
from rolltune.update import MasterWeights, Optimization, prepare_microbatches, update_policy

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, device=CPU)
TOO_LARGE = 2.0**40  # every gradient of the tiny Llama overflows


def make_optimization(parameters, *, scale=None, masters=True, lr=0.1, max_grad_norm=1e9, optimizer=torch.optim.SGD):
    weights = MasterWeights(parameters, enabled=masters)
    stepped = optimizer(weights.masters, lr=lr)
    scheduler = torch.optim.lr_scheduler.StepLR(stepped, step_size=1, gamma=0.5)
    return Optimization(
        weights=weights, optimizer=stepped, scheduler=scheduler, max_grad_norm=max_grad_norm, loss_scale=scale
    )


def half(*values: float) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.tensor(values, dtype=torch.float16))


def make_rows(policy):
    """A prompt with three completions."""
    generator = torch.Generator().manual_seed(0)

    def ids(n):
        return tuple(torch.randint(4, 250, (n,), generator=generator).tolist())

    sequences = tuple(
        TrainSequence(token_ids=ids(n), logprobs=(-5.0,) * n, advantage=a) for n, a in ((4, 1.0), (9, -0.5), (2, -0.5))
    )
    groups = [TrainGroup(prompt=Prompt(token_ids=ids(5)), sequences=sequences)]
    rows = prepare_microbatches(
        policy, pack(groups, max_tokens=100), temperature=1.0, old_policy="current", with_reference=False
    )
    return rows, count_totals(groups)


def make_policy(path, dtype, lora=None, **options):
    return build_policy(
        ModelConfig(path=str(path), dtype=dtype, **options), lora, device=CPU, seed=0, with_reference=False
    )


# --- the scale --------------------------------------------------------------------------------------------------------


def scales_of(optimization, overflows) -> list[float]:
    """Take a step for each entry, with a gradient that overflows or not, and return the scale after each."""
    (parameter,) = optimization.weights.parameters
    seen = []
    for overflow in overflows:
        (parameter * (math.inf if overflow else 1.0)).sum().backward()
        assert optimization.step(WORLD)["skipped_step"] == overflow
        seen.append(optimization.loss_scale.get_scale())
    return seen


def test_trajectory_by_hand():
    """The scale doubles after two clean steps, counted from its last change, and halves at once."""
    optimization = make_optimization([half(0.0)], scale=LossScale(init_scale=4, growth_interval=2))
    assert scales_of(optimization, [0, 0, 0, 1, 0, 0, 1, 1, 0, 1]) == [4, 8, 8, 4, 4, 8, 4, 2, 2, 1]


@pytest.mark.parametrize("init_scale", [0.0, 0.5, -2.0, 3.0, 65535.0, math.inf, math.nan])
def test_only_powers_of_two(init_scale):
    with pytest.raises(ValueError, match=f"init_scale: {init_scale}; must be a power of two"):
        LossScale(init_scale=init_scale)
    with pytest.raises(ValueError, match="growth_interval: 0; must be >= 1"):
        LossScale(growth_interval=0)


def test_state_comes_back():
    optimization = make_optimization([half(0.0)], scale=LossScale(init_scale=16, growth_interval=3))
    scales_of(optimization, [1, 0, 0])
    restored = make_optimization([half(0.0)], scale=LossScale(init_scale=4, growth_interval=3))
    restored.load_state_dict(optimization.state_dict())
    assert scales_of(restored, [0] * 4) == scales_of(optimization, [0] * 4) == [16, 16, 16, 32]


# --- a step -----------------------------------------------------------------------------------------------------------


def test_gradients_are_unscaled_before_they_are_clipped():
    """(3, 4) scaled by 1024 has a norm of 5 and is clipped to (0.6, 0.8), not to a thousandth of that."""
    parameter = half(0.0, 0.0)
    optimization = make_optimization([parameter], scale=LossScale(init_scale=1024), lr=1.0, max_grad_norm=1.0)
    optimization.backward(parameter.float() @ torch.tensor([3.0, 4.0]))
    assert optimization.weights.masters[0].grad.tolist() == [3072.0, 4096.0]
    metrics = optimization.step(WORLD)
    assert metrics == {
        "lr": 1.0,
        "loss_scale": 1024.0,
        "skipped_step": 0.0,
        "grad_norm": pytest.approx(5.0, rel=1e-6),
    }
    torch.testing.assert_close(optimization.weights.masters[0].detach(), torch.tensor([-0.6, -0.8]))
    assert parameter.tolist() == torch.tensor([-0.6, -0.8]).half().tolist()


def test_small_gradients_only_survive_with_a_scale():
    """1e-8 is below half of fp16's smallest number: it becomes 0 without a scale, and is right to 11 bits with one."""
    for scale, expected in ((None, 0.0), (LossScale(), -1e-2)):
        parameter = half(0.0)
        optimization = make_optimization([parameter], scale=scale, lr=1e6)
        optimization.backward(parameter.float().sum() * 1e-8)
        optimization.step(WORLD)
        assert optimization.weights.masters[0].item() == pytest.approx(expected, rel=2**-11)


def everything(policy, optimization):
    return copy.deepcopy((policy.version, [p.detach() for p in policy.model.parameters()], optimization.state_dict()))


@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=4, alpha=8.0)], ids=["full", "lora"])
def test_a_skipped_step_changes_only_the_scale(tiny_llama, lora):
    policy = make_policy(tiny_llama, "float16", lora)
    optimization = make_optimization(
        policy.trainable_parameters,
        scale=LossScale(),
        masters=lora is None,
        optimizer=torch.optim.AdamW,
    )
    rows, totals = make_rows(policy)

    def update():
        return update_policy(policy, rows, DAPOLoss(), totals, optimization, WORLD, temperature=1.0)

    assert update()["skipped_step"] == 0.0 and policy.version == 1  # Adam has moments now
    optimization.loss_scale.update(TOO_LARGE)
    version, parameters, state = everything(policy, optimization)
    metrics = update()
    assert (metrics["skipped_step"], metrics["loss_scale"]) == (1.0, TOO_LARGE)
    assert "grad_norm" not in metrics and math.isfinite(metrics["loss"])
    assert metrics["lr"] == 0.05
    assert optimization.loss_scale.get_scale() == TOO_LARGE / 2
    assert optimization.loss_scale.state_dict()["_growth_tracker"] == 0
    after = everything(policy, optimization)
    assert after[0] == version == 1
    assert all(torch.equal(a, b) for a, b in zip(after[1], parameters, strict=True))
    assert after[2]["scheduler"] == state["scheduler"]
    assert after[2]["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    moments = list(zip(*(s["optimizer"]["state"].values() for s in (after[2], state)), strict=True))
    assert moments and all(torch.equal(a[name], b[name]) for a, b in moments for name in a)
    assert all(torch.equal(a, b) for a, b in zip(after[2]["masters"], state["masters"], strict=True))
    assert all(p.grad is None for p in [*policy.model.parameters(), *optimization.weights.masters])

    optimization.loss_scale.update(2.0**10)
    assert update()["skipped_step"] == 0.0 and policy.version == 2


def test_at_a_scale_of_one_it_raises(tiny_llama):
    """Then scaling did not cause the overflow. Before that 2^3 is halved three times."""
    parameter = half(1.0)
    optimization = make_optimization([parameter], scale=LossScale(init_scale=8))
    for scale in (8, 4, 2):
        (parameter * math.nan).sum().backward()
        assert optimization.step(WORLD)["loss_scale"] == scale
    (parameter * math.nan).sum().backward()
    with pytest.raises(FloatingPointError, match="the gradient norm is nan"):
        optimization.step(WORLD)
    assert parameter.item() == optimization.weights.masters[0].item() == 1.0


def test_all_ranks_skip_if_one_overflows():
    """A sum that fp16 cannot represent is not an overflow, because gradients are summed in fp32."""

    def run(gradients):
        def on_rank(world):
            parameter = half(0.0)
            optimization = make_optimization([parameter], scale=LossScale(init_scale=16), lr=1.0)
            if gradients[world.rank] is not None:
                (parameter * gradients[world.rank]).sum().backward()
            skipped = optimization.step(world)["skipped_step"]
            return skipped, optimization.weights.masters[0].item(), optimization.loss_scale.get_scale()

        return on_ranks(2, on_rank)

    assert run([32.0, math.inf]) == run([-math.inf, math.inf]) == run([None, math.nan]) == [(1.0, 0.0, 8.0)] * 2
    assert run([32.0, 16.0]) == [(0.0, -3.0, 16.0)] * 2
    assert run([60_000.0, 60_000.0]) == [(0.0, -7500.0, 16.0)] * 2
    assert run([None, 16.0]) == [(0.0, -1.0, 16.0)] * 2


@pytest.mark.parametrize("fp32_head", [False, True])
def test_gradients_are_those_of_fp32(tiny_llama, fp32_head):
    gradients = {}
    for dtype, scale in (("float32", None), ("float16", LossScale())):
        policy = make_policy(tiny_llama, dtype, fp32_head=fp32_head and dtype == "float16")
        optimization = make_optimization(policy.trainable_parameters, scale=scale, masters=dtype == "float16")
        rows, totals = make_rows(policy)
        metrics = update_policy(policy, rows, DAPOLoss(), totals, optimization, WORLD, temperature=1.0)
        assert policy.version == 1
        masters = optimization.weights.masters
        start = make_policy(tiny_llama, dtype).trainable_parameters
        gradients[dtype] = [(a.float() - b).detach() / 0.1 for a, b in zip(start, masters, strict=True)]
        norm = torch.cat([gradient.flatten() for gradient in gradients[dtype]]).norm().item()
        assert metrics["grad_norm"] == pytest.approx(norm, rel=1e-5), "the norm is that of the unscaled gradients"
    for exact, rounded in zip(gradients["float32"], gradients["float16"], strict=True):
        assert (rounded - exact).norm() < 0.02 * exact.norm()


def test_without_a_scale_no_scale_is_logged(tiny_llama):
    policy = make_policy(tiny_llama, "bfloat16")
    optimization = make_optimization(policy.trainable_parameters)
    rows, totals = make_rows(policy)
    metrics = update_policy(policy, rows, DAPOLoss(), totals, optimization, WORLD, temperature=1.0)
    assert "loss_scale" not in metrics and metrics["skipped_step"] == 0.0
    assert optimization.state_dict()["loss_scale"] is None
