"""Values that check themselves."""

import pytest

from rolltune.types import SamplingParams


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -0.1},
        {"temperature": float("nan")},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"max_new_tokens": 0},
        {"stop": ("a", "")},
    ],
    ids=str,
)
def test_sampling_params_out_of_range(wrong: dict):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"^{name}: "):
        SamplingParams(**wrong)


def test_sampling_params_at_the_edge_of_their_range():
    SamplingParams(temperature=0.0, top_p=1.0, top_k=0, max_new_tokens=1, stop=("a",))
