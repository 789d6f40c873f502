"""What an engine has loaded against what the policy has: single columns of every weight, bit for bit.

An engine may fuse weights, and pack them for its kernels so that they cannot be read any more. But a kernel's product
with a row that is 1 in place j and 0 elsewhere is column j of its weight, to the last bit. Which columns are looked at
depends on the version, so that over the syncs of a run all of them are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor

COLUMNS = 8  # of each weight in each sync


def chosen(width: int, version: int) -> list[int]:
    """Columns of a weight with ``width`` input features, ascending: consecutive ones, further on in each version."""
    count = min(COLUMNS, width)
    return sorted((version * count + i) % width for i in range(count))


def fingerprint(values: Tensor) -> str:
    """Of a tensor's bits, in its own precision, wherever it is; -0 counts as 0. It starts with the type's name."""
    dtype = str(values.dtype).removeprefix("torch.")
    values = values.detach().to("cpu", copy=True).contiguous().add_(0.0)
    data = values.flatten().view(torch.uint8).numpy().tobytes()
    return f"{dtype}:{hashlib.blake2b(data, digest_size=8).hexdigest()}"


def weight_fingerprint(weight: Tensor, version: int) -> str:
    """Of the chosen columns of a matrix [N, K], or of a whole vector."""
    if weight.ndim == 2:
        weight = weight[:, chosen(weight.shape[1], version)]
    return fingerprint(weight)


def differences(expected: Mapping[str, str], loaded: Mapping[str, str]) -> list[str]:
    """One line for each weight that the engine does not have as it should, in the order of ``expected``.

    Args:
        expected: name to fingerprint, of the policy.
        loaded: likewise, of the engine; a packed copy of a weight stands beside it under "name (packed)".
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for key, value in loaded.items():
        found.setdefault(key.removesuffix(" (packed)"), []).append((key, value))
    theirs, ours = ({value.partition(":")[0] for value in prints.values()} for prints in (loaded, expected))
    if theirs.isdisjoint(ours):
        return [
            f"they are {_listed(theirs)} there and {_listed(ours)} here; start the server with that dtype, or give its "
            "own as sampler.dtype"
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
