"""A config file and ``key=value`` overrides as a tree of dicts, lists and YAML scalars, not yet typed."""

from __future__ import annotations

import dataclasses
import os
import re
import sys
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml

from rolltune.config.values import show, without_none
from rolltune.errors import ConfigError

MAX_VALUES = 100_000  # of a config


class _Loader(yaml.SafeLoader):
    """YAML 1.1 with four differences.

    1e-6 is a number, a date is a string, a repeated key is an error, and neither a leading zero (octal 0100) nor colons
    (1:30 and 1:30.5 to base 60) make a number.
    """

    yaml_implicit_resolvers: Mapping = {
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith((":timestamp", ":int", ":float"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen = set()
        for key_node, _ in node.value:
            name = str(key_node.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name}: repeated key", problem_mark=key_node.start_mark)
            seen.add(name)
        return node


_DIGITS = "[0-9]+(_[0-9]+)*"
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        rf"[-+]?({_DIGITS}\.({_DIGITS})?|\.{_DIGITS})([eE][-+]?[0-9]+)?$|[-+]?{_DIGITS}[eE][-+]?[0-9]+$"
        r"|[-+]?\.(inf|Inf|INF)$|\.(nan|NaN|NAN)$"
    ),
    list("-+0123456789."),
)
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:int", re.compile(rf"[-+]?(0|(?!0){_DIGITS}|0x[0-9a-fA-F]+)$"), list("-+0123456789")
)


def parse_yaml(text: str) -> Any:
    """Parse a YAML value, by the rules of a config file.

    Raises:
        yaml.YAMLError: a syntax error, a repeated key, an alias inside of what it stands for, or aliases of aliases
            that stand for too much.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if _num_values(node, {}) > MAX_VALUES:
            raise yaml.YAMLError(f"aliases stand for more than {MAX_VALUES} values")
        return None if node is None else _unshared(loader.construct_document(node))
    except RecursionError:
        raise yaml.YAMLError("brackets are nested too deeply") from None
    except ValueError as error:  # Python converts no integer of more than 4300 digits
        raise yaml.YAMLError(str(error)) from None
    finally:
        loader.dispose()


def _num_values(node: yaml.Node | None, known: dict[int, int | None]) -> int:
    """Count the values of a node, those behind its aliases included. ``known`` are counts by the node's id."""
    if not isinstance(node, yaml.CollectionNode):
        return 1
    if id(node) not in known:
        known[id(node)] = None  # being counted
        children = chain.from_iterable(node.value) if isinstance(node, yaml.MappingNode) else node.value
        known[id(node)] = 1 + sum(_num_values(child, known) for child in children)
    count = known[id(node)]
    if count is None:
        raise yaml.YAMLError("an alias stands inside of its own anchor")
    return count


def _unshared(value: Any) -> Any:
    """A copy in which an anchor and its aliases are values of their own, so that one can change without the others."""
    if isinstance(value, dict):
        return {key: _unshared(item) for key, item in value.items()}
    return [_unshared(item) for item in value] if isinstance(value, list) else value


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read the mapping in a YAML file, with interpolations unresolved; ``-`` is standard input.

    Raises:
        ConfigError: the file cannot be read or holds no mapping; a syntax error names its line.
    """
    try:
        tree = parse_yaml(_spaces_for_tabs(read_config(path)))
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}{yaml_problem(error)}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: {'empty' if tree is None else show(tree)}; a config must be a mapping of keys"])
    return tree


def _spaces_for_tabs(text: str) -> str:
    """Indent JSON by spaces, which YAML asks for."""
    is_json = text.lstrip("\ufeff \t\r\n").startswith("{")
    return re.sub(r"^[ \t]+", lambda indent: " " * len(indent[0]), text, flags=re.MULTILINE) if is_json else text


def read_config(path: str | Path) -> str:
    """Read the text of a config file, of a pipe such as ``/dev/fd/63``, or with ``-`` of standard input.

    Raises:
        ConfigError: it cannot be read, or it is a pipe and several processes would read from it.
    """
    if is_stream(path) and int(os.environ.get("WORLD_SIZE") or 1) > 1:
        raise ConfigError(
            [f"--config: {path}: only one process can read from it; give a file, or start the processes by `tune run`"]
        )
    try:
        return (sys.stdin.buffer.read() if str(path) == "-" else Path(path).read_bytes()).decode("utf-8")
    except OSError as error:
        raise ConfigError([f"--config: {path}: {(error.strerror or str(error)).lower()}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"--config: {path}: not UTF-8 text"]) from error


def is_stream(path: str | Path) -> bool:
    """Whether a config comes from a pipe, a device or (``-``) standard input, which can be read only once."""
    file = Path(path)
    return str(path) == "-" or (file.exists() and not file.is_file() and not file.is_dir())


def yaml_problem(error: yaml.YAMLError) -> str:
    """A syntax error as ``, line 3: what is wrong``."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem or str(error).splitlines()[0]}"


def apply_override(override: str, tree: dict[str, Any], schema: Any = None) -> tuple[str, str] | None:
    """Merge one ``key=value`` or ``~key`` into the tree.

    Args:
        override: what was typed.
        tree: of the config; written to.
        schema: the dataclass of the keys, whose types say how to read the value.

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
        value = _read_value(text, _hint_of(schema, split_key(key)))
    except yaml.YAMLError as error:
        return key, f"{key}: {text} is not a YAML value{yaml_problem(error).replace(', line 1', '')}"
    *parents, last = split_key(key)
    node: Any = tree
    for name in parents:
        child = _child(node, name)
        if isinstance(child, str) and "${" in child:
            return key, f"{key}: {name} is {child}, so it has no value of its own to change; write {name} out"
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


_QUOTED = re.compile(r"""'([^']|\'\')*'|"([^"\\]|\\.)*\"""", re.DOTALL)
_COLLECTION = re.compile(r"\[.*\]|\{.*\}", re.DOTALL)
_NOT_PLAIN = re.compile(r"(^|\s)#|^[&*!|>%@`]")  # comments and indicators, which no one means in an override


def _read_value(text: str, hint: Any) -> Any:
    """Read the value of an override: text as it was typed, or another YAML value.

    For a key that holds text, everything is text except a quoted string and, where it is allowed, ``null``. For other
    keys YAML decides, and lists and mappings need brackets. What YAML reads as a string, or cannot read, is the text as
    it was typed, comment signs included.

    Raises:
        yaml.YAMLError: a syntax error in a quoted string, a list or a mapping.
    """
    stripped = text.strip()
    if _QUOTED.fullmatch(stripped):
        return parse_yaml(stripped)
    if without_none(hint) is str:
        return None if stripped == "null" and hint is not str else text
    if stripped[:1] in ("'", '"', "[", "{"):
        if not _COLLECTION.fullmatch(stripped):
            raise yaml.YAMLError("a quote or bracket is not closed, or has something behind it")
        return parse_yaml(stripped)
    try:
        value = text if _NOT_PLAIN.search(text) else parse_yaml(text)
    except yaml.YAMLError:
        return text
    is_text = isinstance(value, str | list | dict) or (value is None and stripped not in ("null", "~"))
    return text if is_text else value


def _hint_of(schema: Any, names: Sequence[str]) -> Any:
    """The type of a split key in a schema; Any inside of components, and for an unknown key."""
    for name in names:
        inner = without_none(schema)
        if get_origin(inner) is list and name.isdecimal():
            schema = get_args(inner)[0]
        elif dataclasses.is_dataclass(inner):
            schema = get_type_hints(inner).get(name, Any)
        else:
            return Any
    return schema


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
    if isinstance(node, list) and last.isdecimal() and int(last) < len(node):
        del node[int(last)]
    elif isinstance(node, dict) and last in node:
        del node[last]
    else:
        return False
    return True


def _child(node: Any, name: str) -> Any:
    if isinstance(node, list):
        return node[int(name)] if name.isdecimal() and int(name) < len(node) else None
    return node.get(name)


def _put(node: Any, name: str, value: Any) -> bool:
    if isinstance(node, list):
        if not name.isdecimal() or int(name) >= len(node):
            return False
        node[int(name)] = value
    else:
        node[name] = value
    return True
