"""Weights and mismatch against TRL's own code: ``GRPOTrainer._generate_and_score_completions`` on a stand-in.

Its generation, scoring and forward pass are replaced by the completions, rewards and log-probs of the test; what is
between them, the importance weights and the metrics of the mismatch, is TRL's. Importing it takes about 10 seconds.
"""

import math
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from rolltune.corrections import Correction, SequenceMIS, SequenceTIS, TokenMask, TokenTIS
from rolltune.distributed import World
from rolltune.mismatch import MismatchMeter
from rolltune.types import RolloutMicrobatch

LENGTHS = (5, 2, 7, 1, 3, 4)
IDS = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
TOKENS = sum(LENGTHS)
ALONE = World(rank=0, size=1, device=torch.device("cpu"))


def policies(spread: float) -> tuple[torch.Tensor, torch.Tensor]:
    """The trainer's and the sampler's log-probs, [N]."""
    generator = torch.Generator().manual_seed(1)
    sampler = -3 * torch.rand(TOKENS, generator=generator)
    return sampler + spread * torch.randn(TOKENS, generator=generator), sampler


def trl(mode: str, old: torch.Tensor, sampler: torch.Tensor, *, low: float | None, high: float | None):
    """TRL's weights, [N], and what it logs."""
    count = len(LENGTHS)
    padded = torch.zeros(count, max(LENGTHS))
    mask = torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]
    padded[mask] = old
    completions = [[2] * length for length in LENGTHS]
    logprobs = [part.tolist() for part in sampler.split(LENGTHS)]
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            num_processes=1,
            process_index=0,
            device=torch.device("cpu"),
            gather=lambda tensor: tensor,
            reduce=lambda tensor, reduction: tensor,
        ),
        model=SimpleNamespace(training=True, is_gradient_checkpointing=False),
        args=SimpleNamespace(
            per_device_train_batch_size=count,
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
        use_vllm=True,
        vllm_importance_sampling_correction=True,
        vllm_importance_sampling_mode=mode,
        vllm_importance_sampling_clip_min=low,
        vllm_importance_sampling_clip_max=high,
        beta=0.0,
        num_generations=2,
        scale_rewards="group",
        reward_weights=torch.ones(1),
        reward_func_names=["reward"],
        multi_objective_aggregation="sum_then_normalize",
        log_multimodal=False,
        _metrics={"train": defaultdict(list)},
        _logs=defaultdict(list, rewards=defaultdict(list)),
        _pending_extra_logs={},
        _pending_metrics={},
        _generate=lambda prompts: ([[1]] * count, completions, None, [""] * count, logprobs, {}, None, None),
        _calculate_rewards=lambda *_: torch.zeros(count, 1),
        _get_per_token_logps_and_entropies=lambda *_, **__: (padded, None, None),
    )
    output = GRPOTrainer._generate_and_score_completions(trainer, [{"prompt": ""}] * count)  # pyright: ignore
    found = output["importance_sampling_ratio"]
    return found.expand_as(padded)[mask], {name: values[-1] for name, values in trainer._metrics["train"].items()}


# Bounds that some ratios are beyond and some are not; a sequence's product of ratios around exp(+-0.4) each.
CASES = {
    "token_truncate": (TokenTIS(max_ratio=1.2), None, 1.2),
    "token_mask": (TokenMask(low=0.8, high=1.3), 0.8, 1.3),
    "sequence_truncate": (SequenceTIS(max_ratio=1.1), None, 1.1),
    "sequence_mask": (SequenceMIS(max_ratio=1.1), None, 1.1),
}


@pytest.mark.parametrize("mode", CASES)
def test_weights_are_trls(mode):
    correction, low, high = CASES[mode]
    old, sampler = policies(0.4)
    theirs, _ = trl(mode, old, sampler, low=low, high=high)
    free, _ = trl(mode.replace("mask", "truncate"), old, sampler, low=None, high=math.inf)
    assert 0 < (theirs != free).sum() < TOKENS, "the bounds have to matter, and not to all"
    torch.testing.assert_close(correction(old, sampler, IDS, len(LENGTHS)), theirs, rtol=1e-5, atol=1e-6)


def test_trls_default_is_ours():
    defaults: dict[str, float | str | None] = {
        name: GRPOConfig.__dataclass_fields__[f"vllm_importance_sampling_{name}"].default
        for name in ("mode", "clip_min", "clip_max")
    }
    assert defaults == {"mode": "sequence_mask", "clip_min": None, "clip_max": SequenceMIS().max_ratio}


@pytest.mark.parametrize("correction", [TokenTIS(max_ratio=1e30), SequenceTIS(max_ratio=1e30)], ids=["token", "all"])
def test_where_trl_overflows_ours_is_bounded(correction: Correction):
    """TRL's ratio of a completion explodes (its issue 4772); here it stops at exp(20), as in verl."""
    old, sampler = torch.full((TOKENS,), -0.1), torch.full((TOKENS,), -100.0)
    theirs, _ = trl("sequence_truncate", old, sampler, low=None, high=math.inf)
    assert theirs.isinf().any()
    assert correction(old, sampler, IDS, len(LENGTHS)).max().item() == pytest.approx(math.exp(20), rel=1e-5)


def test_mismatch_is_trls():
    old, sampler = policies(0.2)
    _, theirs = trl("token_truncate", old, sampler, low=None, high=math.inf)
    meter = MismatchMeter()
    ones = torch.ones(TOKENS, dtype=torch.int64)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])
    meter.add(
        old,
        RolloutMicrobatch(
            input_ids=ones,
            position_ids=positions,
            segment_index=ones,
            sequence_index=IDS,
            predictor_index=torch.arange(TOKENS),
            target_ids=ones,
            target_sequence_index=IDS,
            advantages=ones.float(),
            sampler_logprobs=sampler,
            num_sequences=len(LENGTHS),
        ),
    )
    seen = meter.read(ALONE)
    assert seen is not None
    assert seen.mean_abs == pytest.approx(theirs["sampling/sampling_logp_difference/mean"], rel=1e-5)
    assert seen.max_abs == pytest.approx(theirs["sampling/sampling_logp_difference/max"], rel=1e-5)
    assert seen.mean_ratio == pytest.approx(theirs["sampling/importance_sampling_ratio/mean"], rel=1e-5)
