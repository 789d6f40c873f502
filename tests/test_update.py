import dataclasses
import math

import pytest
import torch

from rolltune.batch import TrainGroup, TrainSequence, count_totals, pack
from rolltune.config.schema import LoRAConfig, ModelConfig
from rolltune.corrections import GeometricRejection, K3Rejection, TokenMask, TokenTIS
from rolltune.distributed import World
from rolltune.losses.dapo import DAPOLoss
from rolltune.losses.grpo import GRPOLoss
from rolltune.mismatch import MismatchError, MismatchLimit
from rolltune.model.policy import build_policy
from rolltune.types import Prompt
from rolltune.update import MasterWeights, Optimization, prepare_microbatches, update_policy

WORLD = World(rank=0, size=1, device=torch.device("cpu"))


def make_groups(seed=0):
    generator = torch.Generator().manual_seed(seed)

    def ids(n):
        return tuple(torch.randint(4, 250, (n,), generator=generator).tolist())

    return [
        TrainGroup(
            prompt=Prompt(token_ids=ids(5)),
            sequences=tuple(
                TrainSequence(token_ids=ids(n), logprobs=(-5.0,) * n, advantage=a)
                for n, a in ((4, 1.0), (9, -0.5), (2, -0.5))
            ),
        )
        for _ in range(2)
    ]


def step_once(
    path,
    loss,
    *,
    max_tokens,
    lr=0.1,
    dtype="float32",
    masters=False,
    num_updates=1,
    correction=None,
    limit=None,
    old_policy=None,
):
    policy = build_policy(
        ModelConfig(path=str(path), dtype=dtype),
        None,
        device=WORLD.device,
        seed=0,
        with_reference=loss.kl_coef > 0,
    )
    weights = MasterWeights(policy.trainable_parameters, enabled=masters)
    optimization = Optimization(
        weights=weights, optimizer=torch.optim.SGD(weights.masters, lr=lr), scheduler=None, max_grad_norm=1e9
    )
    groups = make_groups()
    rows = prepare_microbatches(
        policy,
        pack(groups, max_tokens=max_tokens),
        temperature=1.0,
        old_policy=old_policy or ("trainer" if num_updates > 1 else "current"),
        with_reference=loss.kl_coef > 0,
    )
    metrics = [
        update_policy(
            policy,
            rows,
            loss,
            count_totals(groups),
            optimization,
            WORLD,
            temperature=1.0,
            correction=correction,
            limit=limit,
        )
        for _ in range(num_updates)
    ]
    return policy, metrics


@pytest.mark.parametrize("loss", [GRPOLoss(kl_coef=0.04), DAPOLoss()], ids=["grpo", "dapo"])
def test_micro_batches_change_neither_step_nor_metrics(tiny_llama, loss):
    """Means of means would weigh a short row like a long one; sums over global totals do not."""
    whole, (one,) = step_once(tiny_llama, loss, max_tokens=1000)
    split, (many,) = step_once(tiny_llama, loss, max_tokens=10)
    for a, b in zip(whole.model.parameters(), split.model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=1e-5)
    assert one.keys() == many.keys()
    for name in one:
        assert many[name] == pytest.approx(one[name], rel=1e-4, abs=1e-6), name


def test_first_update_has_ratio_exactly_one_and_later_ones_do_not(tiny_llama):
    _, metrics = step_once(tiny_llama, GRPOLoss(kl_coef=0.0), max_tokens=1000, num_updates=3, lr=1.0)
    assert metrics[0]["ratio/mean"] == metrics[0]["ratio/max"] == metrics[0]["ratio/min"] == 1.0
    assert metrics[0]["clip_fraction"] == 0.0
    assert metrics[2]["ratio/max"] > 1.01 > 0.99 > metrics[2]["ratio/min"]
    assert metrics[2]["clip_fraction"] > 0.0


def test_metrics_by_hand(tiny_llama):
    policy, (metrics,) = step_once(tiny_llama, DAPOLoss(), max_tokens=1000, lr=0.0)
    groups = make_groups()
    (row,) = pack(groups, max_tokens=1000)
    logprobs = policy.logprobs(row, temperature=1.0)[0].detach()
    gap = logprobs + 5.0
    assert metrics["mismatch/mean_abs"] == pytest.approx(gap.abs().mean().item(), rel=1e-5)
    assert metrics["mismatch/max_abs"] == pytest.approx(gap.abs().max().item(), rel=1e-5)
    assert metrics["mismatch/k3"] == pytest.approx((gap.exp() - gap - 1).mean().item(), rel=1e-4)
    assert metrics["mismatch/mean_ratio"] == pytest.approx(gap.exp().mean().item(), rel=1e-5)
    # The sampler's log-probs are -5 throughout: all in the bucket below 0.01, whose mean is that of all tokens.
    assert metrics["mismatch/probability/0_to_0.01"] == pytest.approx(metrics["mismatch/mean_abs"], rel=1e-6)
    assert not [name for name in metrics if name.startswith("correction/")]
    # DAPO's loss at ratio 1 is minus the token mean of the advantages: (4*1 - 9*0.5 - 2*0.5) / 15 a group.
    assert metrics["loss"] == pytest.approx(1.5 / 15, rel=1e-5)
    assert metrics["lr"] == 0.0 and policy.version == 1


def test_a_correction_weighs_the_current_log_probs_where_there_is_one_update(tiny_llama):
    policy, (metrics,) = step_once(tiny_llama, DAPOLoss(), max_tokens=1000, lr=0.0, correction=TokenTIS(max_ratio=1.0))
    (row,) = pack(make_groups(), max_tokens=1000)
    weights = (policy.logprobs(row, temperature=1.0)[0].detach() + 5.0).exp().clamp(max=1.0)
    assert 0 < (weights == 1.0).sum() < len(weights), "some are cut and some are not"
    assert metrics["loss"] == pytest.approx(-(weights * row.advantages).mean().item(), rel=1e-5)
    assert metrics["ratio/mean"] == 1.0, "the ratio is to pi_old still"
    assert metrics["correction/weight"] == pytest.approx(weights.mean().item(), rel=1e-5)
    assert metrics["correction/zeroed"] == 0.0


def test_later_updates_move_the_ratio_but_neither_weights_nor_mismatch(tiny_llama):
    correction = TokenMask(low=0.2, high=2.0)
    _, metrics = step_once(
        tiny_llama, GRPOLoss(kl_coef=0.0), max_tokens=1000, num_updates=3, lr=1.0, correction=correction
    )
    assert metrics[2]["ratio/max"] > 1.01
    names = [name for name in metrics[0] if name.startswith(("mismatch/", "correction/"))]
    assert len(names) > 8 and 0 < metrics[0]["correction/zeroed"] < 1
    for name in names:
        assert metrics[2][name] == metrics[0][name], name


def test_the_ratio_can_be_taken_to_the_sampler(tiny_llama):
    loss = DAPOLoss()
    policy, metrics = step_once(tiny_llama, loss, max_tokens=1000, lr=0.0, num_updates=2, old_policy="sampler")
    (row,) = pack(make_groups(), max_tokens=1000)
    ratios = (policy.logprobs(row, temperature=1.0)[0].detach() + 5.0).exp()
    expected = -torch.minimum(ratios * row.advantages, ratios.clamp(0.8, 1.28) * row.advantages).mean().item()
    for update in metrics:
        assert update["ratio/mean"] == pytest.approx(ratios.mean().item(), rel=1e-5)
        assert update["loss"] == pytest.approx(expected, rel=1e-5)
        assert update["mismatch/mean_ratio"] == pytest.approx(ratios.mean().item(), rel=1e-5)


def test_a_rejection_beside_the_ratio_to_the_sampler_compares_it_with_the_current_policy(tiny_llama):
    policy, _ = step_once(tiny_llama, DAPOLoss(), max_tokens=1000, lr=0.0)
    (batch,) = pack(make_groups(), max_tokens=1000)
    gap = policy.logprobs(batch, temperature=1.0)[0].detach() + 5.0
    lengths = torch.bincount(batch.target_sequence_index)
    means = torch.zeros(len(lengths)).index_add(0, batch.target_sequence_index, gap) / lengths
    cut = means.exp().sort().values[[2, 3]].mean().item()  # three of six completions are below it
    low, high = (0.0, cut) if cut >= 1 else (cut, 1e9)
    rejection = GeometricRejection(low=low, high=high)
    _, (update,) = step_once(
        tiny_llama, DAPOLoss(), max_tokens=1000, lr=0.0, old_policy="sampler", correction=rejection
    )
    rejected = (means.exp() < low) | (means.exp() > high)
    assert rejected.sum() == 3
    assert update["correction/zeroed"] == pytest.approx((lengths[rejected].sum() / lengths.sum()).item(), rel=1e-5)


def test_a_mismatch_beyond_its_limit_leaves_the_weights(tiny_llama):
    policy = build_policy(ModelConfig(path=str(tiny_llama)), None, device=WORLD.device, seed=0, with_reference=False)
    weights = MasterWeights(policy.trainable_parameters, enabled=False)
    optimization = Optimization(
        weights=weights, optimizer=torch.optim.SGD(weights.masters, lr=0.1), scheduler=None, max_grad_norm=1.0
    )
    copies = [p.detach().clone() for p in weights.parameters]
    rows = prepare_microbatches(
        policy, pack(make_groups(), max_tokens=10), temperature=1.0, old_policy="current", with_reference=False
    )
    totals = count_totals(make_groups())
    with pytest.raises(MismatchError, match="mismatch.max_k3: k3 of sampler and trainer is"):
        update_policy(
            policy, rows, DAPOLoss(), totals, optimization, WORLD, temperature=1.0, limit=MismatchLimit(max_k3=0.01)
        )
    assert policy.version == 0
    for parameter, copy in zip(weights.parameters, copies, strict=True):
        assert torch.equal(parameter, copy)
    loose = MismatchLimit(max_k3=1e6, max_ratio_gap=1e6)
    assert update_policy(policy, rows, DAPOLoss(), totals, optimization, WORLD, temperature=1.0, limit=loose)
    assert policy.version == 1


def test_a_gradient_that_is_not_finite_leaves_the_weights(tiny_llama, monkeypatch):
    before = build_policy(ModelConfig(path=str(tiny_llama)), None, device=WORLD.device, seed=0, with_reference=False)
    weights = MasterWeights(before.trainable_parameters, enabled=False)
    optimization = Optimization(
        weights=weights, optimizer=torch.optim.SGD(weights.masters, lr=0.1), scheduler=None, max_grad_norm=1.0
    )
    copies = [p.detach().clone() for p in weights.parameters]
    for parameter in weights.parameters:
        parameter.grad = torch.full_like(parameter, math.nan)
    with pytest.raises(FloatingPointError, match="the weights were left as they were"):
        optimization.step(WORLD)
    for parameter, copy in zip(weights.parameters, copies, strict=True):
        assert torch.equal(parameter, copy)


def test_no_rows_is_no_step(tiny_llama):
    policy = build_policy(ModelConfig(path=str(tiny_llama)), None, device=WORLD.device, seed=0, with_reference=False)
    weights = MasterWeights(policy.trainable_parameters, enabled=False)
    optimization = Optimization(
        weights=weights, optimizer=torch.optim.SGD(weights.masters, lr=0.1), scheduler=None, max_grad_norm=1.0
    )
    totals = count_totals(make_groups())
    update = update_policy(policy, [], DAPOLoss(), totals, optimization, WORLD, temperature=1.0)
    assert update == {"lr": 0.1, "skipped_step": 1.0}
    assert policy.version == 0


def test_master_weights_keep_updates_that_bf16_rounds_away():
    """256 steps of 1/1024 on a weight of 1: bf16 alone never leaves 1, the copy arrives at 0.75."""
    for enabled, expected in ((True, 0.75), (False, 1.0)):
        parameter = torch.nn.Parameter(torch.ones(1, dtype=torch.bfloat16))
        weights = MasterWeights([parameter], enabled=enabled)
        optimization = Optimization(
            weights=weights, optimizer=torch.optim.SGD(weights.masters, lr=1 / 1024), scheduler=None, max_grad_norm=10.0
        )
        for _ in range(256):
            optimization.backward(parameter.sum())
            optimization.step(WORLD)
        assert parameter.item() == expected


def test_clipping_is_by_the_global_norm(tiny_llama):
    parameter = torch.nn.Parameter(torch.zeros(2))
    weights = MasterWeights([parameter], enabled=False)
    optimization = Optimization(
        weights=weights, optimizer=torch.optim.SGD(weights.masters, lr=1.0), scheduler=None, max_grad_norm=1.0
    )
    parameter.grad = torch.tensor([3.0, 4.0])
    assert optimization.step(WORLD)["grad_norm"] == pytest.approx(5.0)
    torch.testing.assert_close(parameter.detach(), torch.tensor([-0.6, -0.8]))


def test_a_step_without_a_gradient_moves_nothing(tiny_llama):
    """All tokens are rejected: weight decay, momentum and schedule would move all the same."""
    policy = build_policy(ModelConfig(path=str(tiny_llama)), None, device=WORLD.device, seed=0, with_reference=False)
    weights = MasterWeights(policy.trainable_parameters, enabled=False)
    optimizer = torch.optim.AdamW(weights.masters, lr=1e-2, weight_decay=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.5)
    optimization = Optimization(weights=weights, optimizer=optimizer, scheduler=scheduler, max_grad_norm=1.0)
    rows = prepare_microbatches(
        policy, pack(make_groups(), max_tokens=100), temperature=1.0, old_policy="current", with_reference=False
    )

    def update(correction=None):
        totals = count_totals(make_groups())
        return update_policy(
            policy, rows, DAPOLoss(), totals, optimization, WORLD, temperature=1.0, correction=correction
        )

    assert update()["skipped_step"] == 0.0 and policy.version == 1  # AdamW has momentum now
    before = [parameter.detach().clone() for parameter in weights.masters]
    moments = [state["exp_avg"].clone() for state in optimizer.state.values()]
    metrics = update(K3Rejection(max_k3=1e-30))
    assert (metrics["correction/zeroed"], metrics["grad_norm"], metrics["skipped_step"]) == (1.0, 0.0, 1.0)
    assert policy.version == 1 and metrics["lr"] == optimization.lr == 5e-3
    assert all(torch.equal(a, b) for a, b in zip(before, weights.masters, strict=True))
    assert all(torch.equal(a, state["exp_avg"]) for a, state in zip(moments, optimizer.state.values(), strict=True))
    assert update()["skipped_step"] == 0.0 and policy.version == 2 and optimization.lr == 2.5e-3


def test_gradients_of_bf16_weights_add_up_in_fp32():
    """The next bf16 number after 256 is 258: added one by one in bf16, 1s are lost from there on."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=torch.bfloat16))
    weights = MasterWeights([parameter], enabled=True)
    optimization = Optimization(
        weights=weights, optimizer=torch.optim.SGD(weights.masters, lr=1.0), scheduler=None, max_grad_norm=1e9
    )
    for _ in range(300):
        optimization.backward(parameter.float().sum())
    assert optimization.step(WORLD)["grad_norm"] == 300.0
    assert parameter.grad is None and weights.masters[0].item() == -300.0


def test_a_policy_with_dropout_has_the_ratio_to_the_network_that_sampled(tiny_llama):
    """Old log-probs, mismatch and reference are without dropout; the ratio is that of the network with it."""
    lora = LoRAConfig(rank=4, alpha=8.0, dropout=0.5)
    policy = build_policy(ModelConfig(path=str(tiny_llama)), lora, device=WORLD.device, seed=0, with_reference=True)
    with torch.no_grad():
        for name, parameter in policy.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    weights = MasterWeights(policy.trainable_parameters, enabled=False)
    optimization = Optimization(
        weights=weights, optimizer=torch.optim.SGD(weights.masters, lr=1e-9), scheduler=None, max_grad_norm=1.0
    )
    groups = make_groups()
    (microbatch,) = pack(groups, max_tokens=1000)
    sampled = policy.logprobs(microbatch, temperature=1.0)[0].detach()
    microbatch = dataclasses.replace(microbatch, sampler_logprobs=sampled)
    for old_policy in ("trainer", "sampler"):
        (row,) = rows = prepare_microbatches(
            policy, [microbatch], temperature=1.0, old_policy=old_policy, with_reference=True
        )
        assert torch.equal(row.trainer_logprobs, sampled)
        metrics = update_policy(policy, rows, GRPOLoss(), count_totals(groups), optimization, WORLD, temperature=1.0)
        assert metrics["mismatch/max_abs"] < 1e-4 and metrics["ratio/max"] > 1.05 > 0.95 > metrics["ratio/min"]
    assert not any(module.training for module in policy.model.modules())
    assert torch.equal(policy.reference_logprobs(microbatch, temperature=1.0), row.reference_logprobs)
