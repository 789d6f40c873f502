"""Losses and advantages against TRL's own code.

``GRPOTrainer._compute_loss`` runs unbound on a stand-in for the trainer that holds the attributes it reads; its
forward pass is replaced by the log-probs of the test. TRL's tensors are padded and masked, ours are flat.
Importing TRL takes about 10 seconds, the tests take milliseconds.
"""

from collections import defaultdict
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer

from rolltune.advantages import group_mean, group_zscore, leave_one_out
from rolltune.losses.cispo import CISPOLoss
from rolltune.losses.dapo import DAPOLoss
from rolltune.losses.dr_grpo import DrGRPOLoss
from rolltune.losses.grpo import GRPOLoss
from rolltune.losses.gspo import GSPOLoss
from rolltune.losses.reinforce import ReinforceLoss
from rolltune.types import Loss, LossInputs, LossTotals

LENGTHS = (5, 2, 7, 1, 3, 4)
MAX_TOKENS = 9
BETA = 0.04
# With ratios around exp(+-0.4) and these clip ranges, each loss clips some tokens but not all.
CASES = {
    "grpo": {"loss_type": "grpo", "epsilon_low": 0.2, "epsilon_high": 0.2},
    "dr_grpo": {"loss_type": "dr_grpo", "epsilon_low": 0.2, "epsilon_high": 0.2},
    "dapo": {"loss_type": "dapo", "epsilon_low": 0.2, "epsilon_high": 0.28},
    "cispo": {"loss_type": "cispo", "epsilon_low": 0.2, "epsilon_high": 1.2},
    "gspo": {
        "loss_type": "grpo",
        "epsilon_low": 0.05,
        "epsilon_high": 0.07,
        "importance_sampling_level": "sequence",
    },
}
# TRL's two-sided clipping, at which some ratios of tokens with a negative advantage are beyond.
CASES |= {f"{name}_dual_clip": CASES[name] | {"delta": 1.3} for name in ("grpo", "dr_grpo", "dapo")}
CASES["gspo_dual_clip"] = CASES["gspo"] | {"delta": 1.1}


def our_loss(case: str, kl_coef: float) -> Loss:
    low, high = CASES[case]["epsilon_low"], CASES[case]["epsilon_high"]
    options = {"clip_low": low, "clip_high": high, "kl_coef": kl_coef, "dual_clip": CASES[case].get("delta")}
    match case.removesuffix("_dual_clip"):
        case "grpo":
            return GRPOLoss(**options)
        case "dr_grpo":
            return DrGRPOLoss(max_completion_tokens=MAX_TOKENS, **options)
        case "dapo":
            return DAPOLoss(**options)
        case "cispo":
            return CISPOLoss(clip_high=high, kl_coef=kl_coef)
        case "gspo":
            return GSPOLoss(**options)
    raise AssertionError(case)


@dataclass(frozen=True, kw_only=True)
class Padded:
    """[B, T] tensors of B completions; arbitrary values where the mask is 0, which no loss may read."""

    mask: torch.Tensor
    logprobs: torch.Tensor
    old_logprobs: torch.Tensor
    reference_logprobs: torch.Tensor
    token_weights: torch.Tensor
    sequence_weights: torch.Tensor  # [B, 1]
    advantages: torch.Tensor  # [B]

    def completions(self, start: int, end: int) -> "Padded":
        return Padded(**{name: tensor[start:end] for name, tensor in vars(self).items()})


def random_batch(dtype: torch.dtype) -> Padded:
    generator = torch.Generator().manual_seed(0)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).long()
    logprobs = (-3 * torch.rand(mask.shape, generator=generator)).to(dtype)

    def near(tensor: torch.Tensor) -> torch.Tensor:
        return tensor + 0.4 * torch.randn(mask.shape, generator=generator).to(dtype)

    return Padded(
        mask=mask,
        logprobs=logprobs.requires_grad_(),
        old_logprobs=near(logprobs.detach()),
        reference_logprobs=near(logprobs.detach()),
        token_weights=2 * torch.rand(mask.shape, generator=generator).to(dtype),
        sequence_weights=2 * torch.rand(len(LENGTHS), 1, generator=generator).to(dtype),
        advantages=torch.randn(len(LENGTHS), generator=generator).to(dtype),
    )


def weights_of(batch: Padded, weighting: str) -> torch.Tensor | None:
    """As TRL's modes give them: [B, T] for token_*, [B, 1] for sequence_*."""
    return {"none": None, "token": batch.token_weights, "sequence": batch.sequence_weights}[weighting]


def our_value(loss: Loss, batch: Padded, weighting: str, totals: LossTotals):
    keep = batch.mask.bool()
    weights = weights_of(batch, weighting)
    inputs = LossInputs(
        logprobs=batch.logprobs[keep],
        old_logprobs=batch.old_logprobs[keep],
        advantages=batch.advantages[:, None].expand_as(batch.logprobs)[keep],
        sequence_index=keep.nonzero()[:, 0],
        num_sequences=len(keep),
        reference_logprobs=batch.reference_logprobs[keep] if loss.kl_coef > 0 else None,
        importance_weights=None if weights is None else weights.expand_as(batch.logprobs)[keep],
    )
    return loss(inputs, totals)


def accelerator() -> SimpleNamespace:
    """One process: gathering and reducing leave a tensor as it is."""
    return SimpleNamespace(
        num_processes=1,
        process_index=0,
        device=torch.device("cpu"),
        gather=lambda tensor: tensor,
        reduce=lambda tensor, reduction: tensor,
    )


def trl_value(case: str, beta: float, batch: Padded, weighting: str, *, tokens: int, microbatches: int):
    """TRL's loss of one microbatch of an accumulation window, and the metrics that it logs."""
    trainer = SimpleNamespace(
        importance_sampling_level="token",
        beta=beta,
        use_vllm=weighting != "none",
        vllm_importance_sampling_correction=weighting != "none",
        max_completion_length=MAX_TOKENS,
        current_gradient_accumulation_steps=microbatches,
        args=SimpleNamespace(
            delta=CASES[case].get("delta"), use_bias_correction_kl=False, steps_per_generation=microbatches
        ),
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        _entropy_bonus_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, torch.zeros_like(batch.logprobs), None),
    )
    vars(trainer).update(CASES[case])
    ids = torch.zeros_like(batch.mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_per_token_logps": batch.old_logprobs,
        "num_items_in_batch": torch.tensor(tokens),
    }
    if beta > 0:
        inputs["ref_per_token_logps"] = batch.reference_logprobs
    weights = weights_of(batch, weighting)
    if weights is not None:
        inputs["importance_sampling_ratio"] = weights
    loss = GRPOTrainer._compute_loss(trainer, None, inputs)  # pyright: ignore[reportArgumentType]
    return loss, {name: values[-1] for name, values in trainer._metrics["train"].items()}


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float32, 1e-5), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@pytest.mark.parametrize("microbatches", [1, 3])
@pytest.mark.parametrize("weighting", ["none", "token", "sequence"])
@pytest.mark.parametrize("beta", [0.0, BETA])
@pytest.mark.parametrize("case", CASES)
def test_loss_and_gradient_are_trls(case, beta, weighting, microbatches, dtype, rtol):
    batch = random_batch(dtype)
    totals = LossTotals(tokens=sum(LENGTHS), sequences=len(LENGTHS))
    loss = our_loss(case, kl_coef=beta)
    size = len(LENGTHS) // microbatches
    parts = [batch.completions(start, start + size) for start in range(0, len(LENGTHS), size)]

    ours = [our_value(loss, part, weighting, totals) for part in parts]
    theirs = [
        trl_value(case, beta, part, weighting, tokens=totals.tokens, microbatches=microbatches)[0] for part in parts
    ]
    our_sum, their_sum = sum(value for value, _ in ours), sum(theirs)
    assert isinstance(our_sum, torch.Tensor) and isinstance(their_sum, torch.Tensor)
    torch.testing.assert_close(our_sum, their_sum, rtol=rtol, atol=rtol / 10)

    (our_gradient,) = torch.autograd.grad(our_sum, batch.logprobs)
    (their_gradient,) = torch.autograd.grad(their_sum, batch.logprobs)
    assert their_gradient[batch.mask == 0].abs().max() == 0 and their_gradient.abs().max() > 0.01
    torch.testing.assert_close(our_gradient, their_gradient, rtol=rtol, atol=rtol / 10)

    clipped = sum(metrics["clip_fraction"].item() for _, metrics in ours)
    assert 0 < clipped < totals.tokens, "some tokens must be clipped, and some not"


@pytest.mark.parametrize("case", ["grpo", "dr_grpo", "dapo", "cispo"])
def test_metrics_are_trls(case):
    batch = random_batch(torch.float32)
    totals = LossTotals(tokens=sum(LENGTHS), sequences=len(LENGTHS))
    _, ours = our_value(our_loss(case, kl_coef=BETA), batch, "none", totals)
    _, theirs = trl_value(case, BETA, batch, "none", tokens=totals.tokens, microbatches=1)
    their_clip = theirs["cispo_clip_ratio" if case == "cispo" else "clip_ratio/region_mean"]
    assert ours["clip_fraction"].item() / totals.tokens == pytest.approx(their_clip, rel=1e-6)
    assert ours["kl"].item() / totals.tokens == pytest.approx(theirs["kl"], rel=1e-5)


def test_gspo_clips_the_completions_that_trl_clips():
    batch = random_batch(torch.float32)
    clipped = []
    for i, length in enumerate(LENGTHS):
        one = batch.completions(i, i + 1)
        _, ours = our_value(our_loss("gspo", kl_coef=0.0), one, "none", LossTotals(tokens=length, sequences=1))
        _, theirs = trl_value("gspo", 0.0, one, "none", tokens=length, microbatches=1)
        clipped.append(theirs["clip_ratio/region_mean"])
        assert ours["clip_fraction"].item() == length * theirs["clip_ratio/region_mean"]
    assert 0 < sum(clipped) < len(LENGTHS)


def test_reinforce_gradient_is_that_of_trls_rloo_on_policy():
    batch = random_batch(torch.float64)
    trainer = SimpleNamespace(
        epsilon_low=0.2,
        epsilon_high=0.2,
        model=SimpleNamespace(training=True),
        accelerator=accelerator(),
        aux_loss_enabled=False,
        _metrics={"train": defaultdict(list)},
        _get_per_token_logps_and_entropies=lambda *_, **__: (batch.logprobs, torch.zeros_like(batch.logprobs), None),
    )
    ids = torch.zeros_like(batch.mask)
    inputs = {
        "prompt_ids": ids[:, :1],
        "prompt_mask": torch.ones_like(ids[:, :1]),
        "completion_ids": ids,
        "completion_mask": batch.mask,
        "advantages": batch.advantages,
        "old_logps": (batch.logprobs.detach() * batch.mask).sum(1),
    }
    theirs = RLOOTrainer._compute_loss(trainer, None, inputs)  # pyright: ignore[reportArgumentType]
    totals = LossTotals(tokens=sum(LENGTHS), sequences=len(LENGTHS))
    ours, _ = our_value(ReinforceLoss(), batch, "none", totals)
    torch.testing.assert_close(
        torch.autograd.grad(ours, batch.logprobs)[0],
        torch.autograd.grad(theirs, batch.logprobs)[0],
        rtol=1e-12,
        atol=1e-13,
    )


GROUPS = [[1.0, 0.0, 0.0, 1.0], [0.3, 2.5, -1.0, 0.1], [0.1, 0.1, 0.1, 0.1], [0.0, 0.0, 0.0, 1.0]]
COUNT = sum(map(len, GROUPS))


def trl_advantages(trainer_class: type, generated: tuple, **options) -> list[float]:
    """``_generate_and_score_completions`` of a trainer on GROUPS, with ``_generate`` and the scoring replaced."""
    trainer = SimpleNamespace(
        accelerator=accelerator(),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=SimpleNamespace(
            per_device_train_batch_size=COUNT,
            gradient_checkpointing_kwargs=None,
            steps_per_generation=1,
            gradient_accumulation_steps=1,
        ),
        environment_factories=None,
        environments=None,
        tools=None,
        _standalone_tools=[],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        num_iterations=1,
        use_vllm=False,
        beta=0.0,
        num_generations=len(GROUPS[0]),
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        multi_objective_aggregation="sum_then_normalize",
        log_multimodal=False,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: generated,
        _calculate_rewards=lambda *_: torch.tensor(GROUPS).view(-1, 1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (torch.zeros(COUNT, 1), None, None),
        **options,
    )
    output = trainer_class._generate_and_score_completions(trainer, [{"prompt": ""}] * COUNT)
    return output["advantages"].tolist()


@pytest.mark.parametrize(("scale_rewards", "ours"), [("group", group_zscore), ("none", group_mean)])
def test_advantages_are_trls(scale_rewards, ours):
    generated = ([[1]] * COUNT, [[2]] * COUNT, None, [""] * COUNT, None, {}, None, None)
    expected = trl_advantages(GRPOTrainer, generated, scale_rewards=scale_rewards)
    assert max(map(abs, expected)) > 0.7
    assert [value for group in GROUPS for value in ours(group)] == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_leave_one_out_is_trls():
    generated = ([[1]] * COUNT, [[2]] * COUNT, [""] * COUNT)
    expected = trl_advantages(RLOOTrainer, generated, reward_clip_range=None, normalize_advantages=False)
    assert max(map(abs, expected)) > 0.9
    assert [value for group in GROUPS for value in leave_one_out(group)] == pytest.approx(expected, rel=1e-5, abs=1e-6)
