"""Checksums of weights and of their parts, and descriptions of those that differ."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rolltune.samplers.fingerprints import (
    COLUMNS,
    PACKED,
    Fingerprint,
    Piece,
    Recorder,
    assemble,
    checksum,
    column_sums,
    differences,
    row_sums,
    sampled_columns,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]


def whole(x: torch.Tensor) -> int:
    return int(checksum(row_sums(x)))


def piece(x: torch.Tensor, row: int, column: int) -> Piece:
    return Piece("float32", row, column, x.numel(), int(checksum(row_sums(x, column), row)))


def test_the_sum_is_the_documented_one():
    def factor(index: int, stream: int) -> int:
        x = (index * 0x9E3779B97F4A7C15 + stream * 0xD1B54A32D192ED03) % 2**64
        x = (x ^ x >> 30) * 0xBF58476D1CE4E5B9 % 2**64
        x = (x ^ x >> 27) * 0x94D049BB133111EB % 2**64
        return (x ^ x >> 31) | 1

    x = torch.randn(3, 5)
    bits = x.view(torch.int32).tolist()
    expected = sum(bits[r][c] * factor(r, 2) * factor(c, 1) for r in range(3) for c in range(5))
    assert (whole(x) - expected) % 2**64 == 0


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_bit_and_every_order_counts(dtype):
    x = torch.randn(40, 30).to(dtype)
    same = whole(x)
    assert whole(x.clone()) == same
    bits = {torch.float32: torch.int32}.get(dtype, torch.int16)
    for bit in range(8 * x.element_size()):
        y = x.clone()
        y.view(bits)[2, 1] ^= 1 << bit if bit < 8 * x.element_size() - 1 else torch.iinfo(bits).min
        assert whole(y) != same
    flipped_rows, flipped_columns, value_swap = x.flip(0), x.flip(1), x.clone()
    value_swap[[3, 5], [4, 9]] = x[[5, 3], [9, 4]]
    sign_of_two = x.clone()
    sign_of_two[7, [3, 8]] *= -1
    others = [-x, flipped_rows, flipped_columns, value_swap, sign_of_two, x.T.contiguous().view(40, 30)]
    assert len({same, *map(whole, others)}) == len(others) + 1


@given(
    rows=st.lists(st.integers(1, 9), min_size=1, max_size=3),
    columns=st.lists(st.integers(1, 9), min_size=1, max_size=3),
)
def test_parts_add_up_to_the_whole(rows, columns):
    x = torch.randn(sum(rows), sum(columns))
    workers, row = [], 0
    for part in x.split(rows):
        column = 0
        for block in part.split(columns, dim=1):
            workers.append({"w": [piece(block, row, column)]})
            column += block.shape[1]
        row += len(part)
    expected = Fingerprint("float32", x.numel(), whole(x))
    assert assemble(workers) == {"w": expected}
    assert assemble([*workers, workers[0]]) == {"w": expected}  # a part may be in several workers
    if len(workers) > 1:
        assert assemble(workers[1:]) != {"w": expected}


def test_workers_that_hold_the_same_rows_must_agree():
    x = torch.randn(4, 4)
    assert assemble([{"w": [piece(x, 0, 0)]}, {"w": [piece(x + 1, 0, 0)]}]) == {"w": None}
    found = {"w": None, "v": Fingerprint("float32", 1, 1)}
    (line,) = differences({"w": Fingerprint("float32", 16, whole(x)), "v": found["v"]}, found)
    assert line == "w: the engine's workers differ"


@given(width=st.integers(1, 200), start=st.integers(0, 1000))
def test_the_syncs_of_a_run_compare_all_columns_of_packed_copies(width, start):
    syncs = [sampled_columns(width, start + i).tolist() for i in range(-(-width // min(COLUMNS, width)))]
    assert {column for columns in syncs for column in columns} == set(range(width))
    assert all(columns == sorted(set(columns)) and len(columns) <= COLUMNS for columns in syncs)


def test_a_kernels_products_with_unit_rows_have_the_fingerprint_of_columns():
    weight = torch.randn(5, 200)
    weight[:, 3] = -0.0
    sent = Recorder(version=3)
    sent.record("w", weight)
    columns = sampled_columns(200, 3)
    products = (torch.eye(200)[columns] @ weight.T).T
    assert sent.fingerprints()["w" + PACKED].checksum == int(checksum(column_sums(products, columns)))


def test_weights_of_any_shape_are_recorded():
    sent = Recorder(version=0)
    weights = {"scalar": torch.tensor(2.0), "vector": torch.randn(4), "convolution": torch.randn(3, 1, 4)}
    for name, tensor in weights.items():
        sent.record(name, tensor)
    assert sent.shapes == {
        "scalar": ("float32", ()),
        "vector": ("float32", (4,)),
        "convolution": ("float32", (3, 1, 4)),
    }
    assert {name: print.count for name, print in sent.fingerprints().items()} == {
        "scalar": 1, "vector": 4, "convolution": 12
    }  # fmt: skip


def test_differences_name_the_weight_and_what_it_has():
    a, b, c, d, x = (Fingerprint("float32", 8, i) for i in range(5))
    expected = {"a": a, "a (packed)": a, "b": b, "b (packed)": b, "c": c, "d": d}
    assert differences(expected, {key: value for key, value in expected.items() if key != "b (packed)"}) == []
    found = {"a": a, "a (packed)": x, "b": c, "c": Fingerprint("bfloat16", 8, 2), "e": x}
    assert differences(expected, found) == [
        "a (packed): has other values than the policy",
        "b: has the values of c",
        "c: is bfloat16 in the engine, float32 in the policy",
        "d: is not in the engine",
        "e: is in the engine, not in the policy",
    ]
    (line,) = differences({"a": a}, {"a": Fingerprint("float32", 4, 0)})
    assert line == "a: has 4 values in the engine, 8 in the policy"


def test_another_precision_is_one_line():
    ours, theirs = Fingerprint("float32", 2, 0), Fingerprint("bfloat16", 2, 0)
    (line,) = differences({"a": ours, "b": ours}, {"a": theirs, "b": theirs})
    assert "engine's are bfloat16" in line and "policy's float32" in line
