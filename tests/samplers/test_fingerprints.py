"""Fingerprints of weight columns, and descriptions of those that differ."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from rolltune.samplers.fingerprints import COLUMNS, differences, fingerprint, sampled_columns, weight_fingerprint


@given(width=st.integers(1, 100), start=st.integers(0, 1000))
def test_the_syncs_of_a_run_cover_all_columns(width, start):
    versions = range(start, start + -(-width // COLUMNS) + 1)
    seen = [column for version in versions for column in sampled_columns(width, version)]
    assert set(seen) == set(range(width))
    assert all(sampled_columns(width, v) == sorted(set(sampled_columns(width, v))) for v in versions)
    assert len(sampled_columns(width, start)) == min(width, COLUMNS)


def test_the_last_bit_counts():
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        x = torch.randn(4, 4).to(dtype)
        y = x.clone()
        assert fingerprint(x) == fingerprint(y)
        bits = y.view(torch.int16 if dtype != torch.float32 else torch.int32)
        bits[2, 1] ^= 1
        assert fingerprint(x) != fingerprint(y)


def test_minus_zero_counts_as_zero_and_the_tensor_is_not_changed():
    x = torch.tensor([0.0, -0.0])
    assert fingerprint(x) == fingerprint(torch.zeros(2))
    assert torch.signbit(x).tolist() == [False, True]


def test_a_kernels_product_with_a_unit_row_is_a_column():
    weight = torch.randn(5, 20)
    columns = sampled_columns(20, 3)
    rows = torch.eye(20)[columns]
    assert fingerprint((rows @ weight.T).T) == weight_fingerprint(weight, 3)


def test_differences_name_the_weight_and_whose_values_it_has():
    expected = {"a": "x:1", "b": "x:2", "c": "x:3", "d": "x:4"}
    assert differences(expected, dict(expected)) == []
    found = {"a": "x:1", "a (packed)": "x:0", "b": "x:3", "c": "x:3", "e": "x:5"}
    assert differences(expected, found) == [
        "a (packed): has other values than the policy",
        "b: has the values of c",
        "d: is not in the engine",
        "e: is in the engine, not in the policy",
    ]


def test_another_precision_is_one_line():
    ours, theirs = fingerprint(torch.ones(2)), fingerprint(torch.ones(2, dtype=torch.bfloat16))
    (line,) = differences({"a": ours, "b": ours}, {"a": theirs, "b": theirs})
    assert "engine's are bfloat16" in line and "policy's float32" in line
