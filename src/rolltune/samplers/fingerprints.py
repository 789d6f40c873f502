"""Compare the weights in an engine with the policy's by checksums of all their bits.

The checksum of a weight W [R, C] is

    sum over r, c of bits(W[r, c]) * u[r] * v[c]    modulo 2^64

with the bits read as an integer, and odd factors u and v that look random and depend only on the index. Any single
changed value changes it, and so do swapped rows, columns and values; other differences stay unseen with a probability
of about 2^-32. Checksums of parts add up to that of the whole, so the workers of a tensor-parallel engine, who hold
parts of fused weights, are compared with whole weights of the trainer.

An engine may pack weights for its kernels so that they cannot be read back. Their checksums are taken before. And the
product of a packed weight and a row that is 1 in place j and 0 elsewhere is column j of the weight, to the last bit. So
some columns of a packed copy are compared in each sync, spread over its whole width. The version selects them, and the
syncs of a run cover all.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

PACKED = " (packed)"  # ends the name of a packed copy's entry
COLUMNS = 16  # of a packed copy, in each sync
_CHUNK = 2**19  # values converted to integers at a time: they stay in a CPU's cache
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}

Shapes = dict[str, tuple[str, tuple[int, ...]]]  # {name: (dtype, shape)} of the weights that were sent


class Piece(NamedTuple):
    """A part of a weight in one worker of an engine. A tuple, because it travels as JSON.

    Attributes:
        dtype: "float32", "bfloat16", ...
        row: index of the part's first row in the whole weight.
        column: index of its first column.
        count: number of its values.
        checksum: its part of the weight's checksum.
    """

    dtype: str
    row: int
    column: int
    count: int
    checksum: int


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """Identity of a weight, up to differences that a checksum does not see."""

    dtype: str
    count: int
    checksum: int


def row_sums(values: Tensor, columns: Tensor | int = 0) -> Tensor:
    """Return each row's part of the checksum: int64 [R], on the device of the values.

    Args:
        values: [R], [R, C] or more dimensions, of which all but the first count as columns; a scalar is one row.
        columns: the columns' indices in the whole weight, int64 [C]; or the index of the first.
    """
    values = values.detach().reshape(values.shape[0] if values.ndim else 1, -1)
    bits = values.view(_INTEGERS[values.dtype.itemsize])
    if isinstance(columns, int):
        columns = torch.arange(columns, columns + bits.shape[1], device=bits.device)
    factors = _factors(columns, stream=1)
    chunks = bits.split(max(1, _CHUNK // max(bits.shape[1], 1)))
    return torch.cat([chunk.long().mul_(factors).sum(1) for chunk in chunks])


def checksum(sums: Tensor, row: int = 0) -> Tensor:
    """Return the checksum of rows from their :func:`row_sums`, the first of which has index ``row``: int64 []."""
    return (sums * _row_factors(row, len(sums), sums.device)).sum()


def dtype_name(values: Tensor) -> str:
    return str(values.dtype).removeprefix("torch.")


def sampled_columns(width: int, version: int) -> Tensor:
    """Return the columns to compare of a packed copy with ``width`` input features, ascending: int64 [C]."""
    count = min(COLUMNS, width)
    stride = -(-width // count)
    return torch.arange(version % stride, width, stride)


def column_sums(values: Tensor, columns: Tensor) -> Tensor:
    """Return the :func:`row_sums` of some columns [R, C] of a matrix. -0 counts as 0, which it is after a product."""
    return row_sums(values + 0.0, columns.to(values.device))


class Recorder:
    """Takes the fingerprints of the policy's weights while they are sent to an engine.

    Checksums are read from their device all at once, in :meth:`fingerprints`.

    Attributes:
        shapes: dtype and shape of each weight so far.
        num_bytes: their size.
    """

    def __init__(self, version: int):
        self.shapes: Shapes = {}
        self.num_bytes = 0
        self._version = version
        self._counts: dict[str, int] = {}
        self._checksums: dict[str, Tensor] = {}

    def recorded(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Yield the weights, recording each."""
        for name, values in weights:
            self.record(name, values)
            yield name, values

    def record(self, name: str, values: Tensor) -> None:
        self.shapes[name] = (dtype_name(values), tuple(values.shape))
        self.num_bytes += values.nbytes
        self._add(name, row_sums(values), values.numel())
        if values.ndim == 2:
            columns = sampled_columns(values.shape[1], self._version).to(values.device)
            self._add(name + PACKED, column_sums(values[:, columns], columns), len(values) * len(columns))

    def _add(self, key: str, sums: Tensor, count: int) -> None:
        self._counts[key] = count
        self._checksums[key] = checksum(sums)

    def fingerprints(self) -> dict[str, Fingerprint]:
        """Return the fingerprints by weight; those of the columns of matrices as "name (packed)"."""
        sums = torch.stack(list(self._checksums.values())).tolist() if self._checksums else []
        return {
            key: Fingerprint(self.shapes[key.removesuffix(PACKED)][0], self._counts[key], value)
            for key, value in zip(self._checksums, sums, strict=True)
        }


def assemble(workers: Iterable[Mapping[str, Iterable[Piece]]]) -> dict[str, Fingerprint | None]:
    """Add up the pieces of all workers of an engine. None: several workers hold a piece, and their values differ."""
    pieces: dict[str, set[Piece]] = {}
    for worker in workers:
        for key, held in worker.items():
            pieces.setdefault(key, set()).update(Piece(*piece) for piece in held)
    return {key: _whole(held) for key, held in pieces.items()}


def _whole(pieces: set[Piece]) -> Fingerprint | None:
    dtypes = {piece.dtype for piece in pieces}
    if len({(piece.row, piece.column) for piece in pieces}) < len(pieces) or len(dtypes) > 1:
        return None
    total = sum(piece.checksum for piece in pieces)
    return Fingerprint(dtypes.pop(), sum(piece.count for piece in pieces), (total + 2**63) % 2**64 - 2**63)


def differences(expected: Mapping[str, Fingerprint], loaded: Mapping[str, Fingerprint | None]) -> list[str]:
    """Describe each weight that differs in the engine, one line a weight, in the order of ``expected``.

    Args:
        expected: the policy's fingerprints, from :meth:`Recorder.fingerprints`.
        loaded: the engine's. A packed copy of a weight has its own entry, "name (packed)".
    """
    theirs, ours = ({print.dtype for print in prints.values() if print} for prints in (loaded, expected))
    if theirs.isdisjoint(ours):
        return [
            f"the engine's are {_listed(theirs)}, the policy's {_listed(ours)}; start the server with the policy's "
            "dtype, or set sampler.dtype to the server's"
        ]
    names = {expected[name]: name for name in reversed([*expected])}  # of several that are equal, the first
    lines = []
    for key, wanted in expected.items():
        is_packed = key.endswith(PACKED)
        if key in loaded and loaded[key] != wanted:
            lines.append(f"{key}: {_difference(wanted, loaded[key], names)}")
        elif key not in loaded and not is_packed:
            lines.append(f"{key}: is not in the engine")
    return lines + [f"{key}: is in the engine, not in the policy" for key in loaded if key not in expected]


def _difference(wanted: Fingerprint, found: Fingerprint | None, names: Mapping[Fingerprint, str]) -> str:
    if found is None:
        return "the engine's workers differ"
    if found in names:
        return f"has the values of {names[found].removesuffix(PACKED)}"
    if found.dtype != wanted.dtype:
        return f"is {found.dtype} in the engine, {wanted.dtype} in the policy"
    if found.count != wanted.count:
        return f"has {found.count} values in the engine, {wanted.count} in the policy"
    return "has other values than the policy"


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"


def _factors(indices: Tensor, stream: int) -> Tensor:
    """Return an odd factor for each index, int64: the output function of SplitMix64 (Steele et al., 2014)."""
    x = indices * _signed(0x9E3779B97F4A7C15) + _signed(stream * 0xD1B54A32D192ED03)
    for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
        x = (x ^ ((x >> shift) & ((1 << (64 - shift)) - 1))) * _signed(factor)
    return (x ^ ((x >> 31) & ((1 << 33) - 1))) | 1


@lru_cache(maxsize=64)
def _row_factors(start: int, count: int, device: torch.device) -> Tensor:
    return _factors(torch.arange(start, start + count, device=device), stream=2)


def _signed(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
