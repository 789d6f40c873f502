"""Describe the keys of a config's dataclass, for ``--help`` and the docs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import Literal, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from rolltune.config.load import default_of, wanted
from rolltune.config.tree import join_key
from rolltune.config.values import without_none


def explain(schema: type) -> str:
    """List the keys of a schema with their defaults and comments, for ``--help``."""
    rows = explained_keys(schema)
    width = min(max(len(left) for left, _ in rows), 36) + 2  # a long default pushes its comment to the right
    lines = [f"  {left:<{width}} {comment}".rstrip() for left, comment in rows]
    return "\n".join(["usage: --config FILE [--dry-run] [key=value ...] [~key ...]", "", "keys of the config:", *lines])


def explained_keys(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    """``("key: default", comment)`` of each key that is not a section; of a required key ``("key:", ...)``."""
    comments = _comments(schema)
    hints = get_type_hints(schema)
    rows = []
    for field in dataclasses.fields(schema):
        key, inner = join_key(prefix, field.name), without_none(hints[field.name])
        if dataclasses.is_dataclass(inner):
            if inner is not hints[field.name]:
                rows.append((f"{key}: null", (inspect.getdoc(inner) or "").splitlines()[0]))
            rows += explained_keys(inner, key)  # pyright: ignore[reportArgumentType]
            continue
        comment = comments.get(field.name, "")
        if get_origin(inner) is Literal:
            comment = f"{', '.join(map(str, get_args(inner)))}: {comment}"
        default = default_of(field)
        if default == MISSING:
            rows.append((f"{key}:", f"required: {comment or wanted(inner)}"))
        else:
            rows.append((f"{key}: {json.dumps(default)}", comment))
    return rows


def _comments(schema: type) -> dict[str, str]:
    """The comment behind each field of a dataclass, or the one on the lines above it, from the source."""
    comments: dict[str, str] = {}
    for base in reversed([base for base in inspect.getmro(schema) if dataclasses.is_dataclass(base)]):
        above: list[str] = []
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"\s+# (.*)$", line):
                above.append(match[1])
                continue
            if match := re.match(r"\s+(\w+): [^#]*(?:# (.*))?$", line):
                comments[match[1]] = match[2] or " ".join(above)
            above = []
    return comments
