"""A config file and ``key=value`` overrides as a tree of dicts, lists and YAML scalars, not yet typed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rolltune.config.values import show
from rolltune.errors import ConfigError


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with four differences.

    1e-6 is a number, a date is a string, a repeated key is an error, and neither a leading zero (octal 0100) nor colons
    (1:30 to base 60) make a number.
    """

    yaml_implicit_resolvers: Mapping = {
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":int"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            name = str(key_node.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name}: repeated key", problem_mark=key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)  # pyright: ignore[reportArgumentType]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(r"[-+]?(0|[1-9][0-9_]*|0x[0-9a-fA-F_]+)$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse a YAML value, by the rules of a config file.

    Raises:
        yaml.YAMLError: a syntax error or a repeated key.
    """
    return yaml.load(text, _Loader)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, with interpolations unresolved.

    Raises:
        ConfigError: the file cannot be read or holds no mapping; a syntax error names its line.
    """
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError([f"--config: {path}: {(error.strerror or str(error)).lower()}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"--config: {path}: not UTF-8 text"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}{yaml_problem(error)}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: {'empty' if tree is None else show(tree)}; a config must be a mapping of keys"])
    return tree


def yaml_problem(error: yaml.YAMLError) -> str:
    """A syntax error as ``, line 3: what is wrong``."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem or str(error).splitlines()[0]}"


def apply_override(override: str, tree: dict[str, Any]) -> tuple[str, str] | None:
    """Merge one ``key=value`` or ``~key`` into the tree.

    Returns:
        The key and the problem where the override cannot be applied.
    """
    key, equals, text = override.partition("=")
    if key.startswith("~") and not equals:
        if not remove(tree, split_key(key[1:])):
            return override, f"{override}: the config has no {key[1:]} to leave out"
        return None
    if not equals or not key:
        return override, f"{override}: must have the form key=value or ~key"
    try:
        value = parse_yaml(text) if text else ""
    except yaml.YAMLError as error:
        return key, f"{key}: {text} is not a YAML value{yaml_problem(error).replace(', line 1', '')}"
    *parents, last = split_key(key)
    node: Any = tree
    for name in parents:
        child = _child(node, name)
        if not isinstance(child, dict | list):
            child = {}
            _put(node, name, child)
        node = child
    old = _child(node, last)
    if isinstance(value, str) and "${" not in value and isinstance(old, dict) and "_component_" in old:
        node, last = old, "_component_"
    elif isinstance(value, dict) and isinstance(old, dict) and "_component_" not in value:
        value = old | value
    if not _put(node, last, value):
        return key, f"{key}: the list has {len(node)} items, counted from 0"
    return None


def split_key(key: str) -> list[str]:
    """Split a dotted key into names; a list's item is ``.0`` or ``[0]``."""
    return [name for name in re.split(r"[.\[\]]", key) if name]


def join_key(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def remove(tree: dict[str, Any], names: Sequence[str]) -> bool:
    """Remove the value under a split key; returns whether the tree had it."""
    node: Any = tree
    for name in names[:-1]:
        node = _child(node, name) if isinstance(node, dict | list) else None
    last = names[-1] if names else ""
    if isinstance(node, list) and last.isdigit() and int(last) < len(node):
        del node[int(last)]
    elif isinstance(node, dict) and last in node:
        del node[last]
    else:
        return False
    return True


def _child(node: Any, name: str) -> Any:
    if isinstance(node, list):
        return node[int(name)] if name.isdigit() and int(name) < len(node) else None
    return node.get(name)


def _put(node: Any, name: str, value: Any) -> bool:
    if isinstance(node, list):
        if not name.isdigit() or int(name) >= len(node):
            return False
        node[int(name)] = value
    else:
        node[name] = value
    return True
