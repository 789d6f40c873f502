"""Old names are refused, and the message gives the new one."""

import pytest

from rolltune.config import renamed
from rolltune.config.components import check_component, locate

GOLD = "{_component_: rolltune.rewards.rubric.gold.GoldCheck}"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (f"eval.gold={GOLD}", "eval.gold: was renamed; use eval.overoptimization"),
        ("sampler.max_rows=3", "sampler.max_rows: was renamed; use sampler.max_num_seqs"),
        (
            "sampler={_component_: rolltune.samplers.vllm.colocated, max_rows: 3}",
            "sampler.max_rows: was renamed; use sampler.max_num_seqs",
        ),
        (
            f"eval.overoptimization={GOLD}",
            "eval.overoptimization._component_: rolltune.rewards.rubric.gold.GoldCheck: was renamed; "
            "use rolltune.rewards.checks.overoptimization.OveroptimizationCheck",
        ),
    ],
)
def test_an_old_name(grpo, override: str, message: str):
    assert grpo(override) == [message]


@pytest.mark.parametrize("recipe", ["grpo", "sft"])
@pytest.mark.parametrize("override", ["logging.classifier.model=x", "logging.classified_samples=3"])
def test_a_removed_key(recipe: str, override: str, request: pytest.FixtureRequest):
    (found,) = request.getfixturevalue(recipe)(override)
    key = override.partition("=")[0].removesuffix(".model")
    assert found.startswith(f"{key}: was removed") and "rolltune.rewards.behaviours.behaviour_counts" in found


def test_a_similar_argument_of_another_component_is_unknown():
    (found,) = check_component({"_component_": "rolltune.losses.grpo.GRPOLoss", "max_rows": 3}, "loss")
    assert "takes no such argument" in found


@pytest.mark.parametrize(("old", "new"), renamed.COMPONENTS.items())
def test_the_new_path_of_a_component_is_right(old: str, new: str):
    assert callable(locate(new))
    with pytest.raises(ValueError, match=f"{old}: was renamed; use {new}"):
        locate(old)


@pytest.mark.parametrize(("old", "instead"), renamed.REMOVED_COMPONENTS.items())
def test_a_removed_component_says_what_to_use(old: str, instead: str):
    with pytest.raises(ValueError, match=f"{old}: was removed; {instead}"):
        locate(old)
