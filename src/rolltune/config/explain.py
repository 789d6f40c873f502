"""The keys of a config's dataclass in words, for ``--help`` and the docs."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
from typing import get_type_hints

from omegaconf import MISSING

from rolltune.config.load import default_of, join_key, wanted, without_none


def explain(schema: type) -> str:
    """The keys of a schema with their types, defaults and comments, for ``--help``."""
    rows = explained_keys(schema)
    width = min(max(len(left) for left, _ in rows), 36) + 2  # a long default pushes its comment to the right
    lines = [f"  {left:<{width}} {comment}".rstrip() for left, comment in rows]
    return "\n".join(["usage: --config FILE [--dry-run] [key=value ...] [~key ...]", "", "keys of the config:", *lines])


def explained_keys(schema: type, prefix: str = "") -> list[tuple[str, str]]:
    comments = _comments(schema)
    hints = get_type_hints(schema)
    rows = []
    for field in dataclasses.fields(schema):
        key, inner = join_key(prefix, field.name), without_none(hints[field.name])
        if dataclasses.is_dataclass(inner):
            if inner is not hints[field.name]:
                rows.append((f"{key}: null", (inspect.getdoc(inner) or "").splitlines()[0]))
            rows += explained_keys(inner, key)  # pyright: ignore[reportArgumentType]
        else:
            default = default_of(field)
            comment = comments.get(field.name, "")
            if default == MISSING:
                rows.append((f"{key}:", f"required: {comment or wanted(inner)}"))
            else:
                rows.append((f"{key}: {json.dumps(default)}", comment))
    return rows


def _comments(schema: type) -> dict[str, str]:
    """The comments behind the fields of a dataclass, from its source."""
    lines = inspect.getsource(schema).splitlines()
    found = (re.match(r"\s+(\w+): [^#]*#\s*(.*)$", line) for line in lines)
    return {match[1]: match[2] for match in found if match}
