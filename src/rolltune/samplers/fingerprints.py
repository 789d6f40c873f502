"""Compare the weights in an engine with the policy's: a few columns of every weight, bit for bit.

An engine may fuse weights, or pack them for its kernels so that they cannot be read back. But the product of a packed
weight and a row that is 1 in place j and 0 elsewhere is column j of the weight, to the last bit. The version selects
the columns, so that the syncs of a run cover all of them.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

COLUMNS = 8  # of each weight in each sync


def sampled_columns(width: int, version: int) -> list[int]:
    """Return the columns to compare of a weight with ``width`` input features, ascending; each version moves on."""
    count = min(COLUMNS, width)
    return sorted((version * count + i) % width for i in range(count))


def fingerprint(values: Tensor) -> str:
    """Return "dtype:hash" of a tensor's bits, from any device; -0 counts as 0."""
    dtype = str(values.dtype).removeprefix("torch.")
    values = values.detach().to("cpu", copy=True).contiguous().add_(0.0)
    data = values.flatten().view(torch.uint8).numpy().tobytes()
    return f"{dtype}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def weight_fingerprint(weight: Tensor, version: int) -> str:
    """Return the fingerprint of a version's columns of a matrix [N, K], or of a whole vector."""
    if weight.ndim == 2:
        weight = weight[:, sampled_columns(weight.shape[1], version)]
    return fingerprint(weight)


def differences(expected: Mapping[str, str], loaded: Mapping[str, str]) -> list[str]:
    """Describe each weight that differs in the engine, one line a weight, in the order of ``expected``.

    Args:
        expected: the policy's fingerprints by weight name.
        loaded: the engine's; a packed copy of a weight has its own entry, "name (packed)".
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for key, value in loaded.items():
        found.setdefault(key.removesuffix(" (packed)"), []).append((key, value))
    theirs, ours = ({value.partition(":")[0] for value in prints.values()} for prints in (loaded, expected))
    if theirs.isdisjoint(ours):
        return [
            f"the engine's are {_listed(theirs)}, the policy's {_listed(ours)}; start the server with the policy's "
            "dtype, or set sampler.dtype to the server's"
        ]
    lines = []
    for name, value in expected.items():
        if name not in found:
            lines.append(f"{name}: is not in the engine")
        others = [other for other, theirs in expected.items() if theirs != value]
        for key, theirs in found.get(name, []):
            if theirs != value:
                twin = next((other for other in others if expected[other] == theirs), None)
                lines.append(f"{key}: has {f'the values of {twin}' if twin else 'other values than the policy'}")
    return lines + [f"{name}: is in the engine, not in the policy" for name in found if name not in expected]


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "none"
