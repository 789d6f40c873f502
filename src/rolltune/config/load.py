"""YAML and ``key=value`` to a checked dataclass of :mod:`rolltune.config.schema`, or a list of what is wrong.

Mistakes are collected, all of them, and read ``key: what is wrong; what would be right``.
"""

from __future__ import annotations

import dataclasses
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rolltune.config.components import describe_type, nearest, show, type_problem
from rolltune.config.schema import Component
from rolltune.errors import ConfigError
from rolltune.files import write_text_atomic

T = TypeVar("T")
Check = Callable[[T, int], Iterable[str]]  # (config, number of processes) to problems, each "key: what is wrong"


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a config and merge ``key=value`` into it; every value has the type that its key wants.

    Args:
        schema: the dataclass of the config's keys.
        path: the YAML file.
        overrides: ``key=value`` with the key dotted and the value in YAML, or ``~key`` to leave a key out. A dotted
            path given to a component's key sets its ``_component_``.

    Returns:
        An instance of ``schema``, interpolations resolved.

    Raises:
        ConfigError: with all that is wrong in the file's syntax, or else in its keys and values.
    """
    config, problems = _load(schema, path, overrides)
    if problems:
        raise ConfigError(list(problems.values()))
    return config


def validate(
    schema: type[T],
    path: str | Path,
    overrides: Sequence[str] = (),
    *,
    check: Check[T] = lambda cfg, world_size: (),
    world_size: int | None = None,
) -> T:
    """:func:`load`, then check components against their signatures and keys against each other.

    Args:
        schema: the dataclass of the config's keys.
        path: the YAML file.
        overrides: as in :func:`load`.
        check: the problems of a config whose types are right, such as one of :mod:`rolltune.run.checks`.
        world_size: number of processes; None: as torchrun's environment says.

    Raises:
        ConfigError: with all that is wrong.
    """
    config, problems = _load(schema, path, overrides)
    found = check(config, world_size or int(os.environ.get("WORLD_SIZE", "1")))
    # A key that is wrong has its default here: what the checks say of it would mislead.
    wrong = [re.compile(rf"(?<![\w.]){re.escape(key)}(?!\w)") for key in problems]
    found = [problem for problem in found if not any(key.search(problem) for key in wrong)]
    if problems or found:
        raise ConfigError([*problems.values(), *found])
    return config


def dump(config: Any) -> str:
    """A config as YAML, all keys, interpolations resolved."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False, allow_unicode=True, width=120)


def save(config: Any, folder: str | Path) -> None:
    """Write ``<folder>/config.yaml``, the folder made if needed; on the disk, and whole, when this returns."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text_atomic(Path(folder) / "config.yaml", dump(config))


def read_saved(folder: str | Path) -> dict[str, Any] | None:
    """What :func:`save` wrote there, every value as it was; None where nothing is.

    Raises:
        ConfigError: the file is no YAML any more, or no mapping.
    """
    path = Path(folder) / "config.yaml"
    if not path.exists():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))  # a plain loader, as save() has a plain dumper
        problem = None if isinstance(tree, dict) else ": holds no config"
    except UnicodeDecodeError:
        problem = ": is no UTF-8 text"
    except yaml.YAMLError as error:
        problem = _yaml_problem(error)
    if problem:
        raise ConfigError([f"{path}{problem}; mend it, or choose another output_dir"])
    return tree


def _load(schema: type[T], path: str | Path, overrides: Sequence[str]) -> tuple[T, dict[str, str]]:
    """The config, with defaults in place of what is wrong, and the problems by key."""
    tree = read_yaml(path)
    problems: dict[str, str] = {}
    for override in overrides:
        _apply(override, tree, problems)
    resolved = _resolve(tree, _defaults(schema), problems)
    known = [*all_keys(schema), *_argument_keys(resolved)]
    return _build_dataclass(schema, resolved, "", problems, known), problems


class _Loader(yaml.SafeLoader):
    """YAML 1.1 but for three traps: 1e-6 is a number, a date is a string, and a key stands once in a mapping."""

    yaml_implicit_resolvers: Mapping = {
        first: [(tag, regexp) for tag, regexp in resolvers if not tag.endswith(":timestamp")]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def construct_mapping(self, node: yaml.Node, deep: bool = False) -> dict:
        seen = set()
        for key_node, _ in node.value if isinstance(node, yaml.MappingNode) else []:
            name = str(key_node.value)
            if name in seen:
                raise yaml.MarkedYAMLError(problem=f"{name}: stands here twice", problem_mark=key_node.start_mark)
            seen.add(name)
        return super().construct_mapping(node, deep)  # pyright: ignore[reportArgumentType]


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """The mapping in a YAML file, interpolations as they stand.

    Raises:
        ConfigError: no such file, or not a mapping; a syntax error names its line.
    """
    try:
        tree = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ConfigError([f"--config: {path}: {(error.strerror or str(error)).lower()}"]) from error
    except UnicodeDecodeError as error:
        raise ConfigError([f"--config: {path}: is no UTF-8 text"]) from error
    except yaml.YAMLError as error:
        raise ConfigError([f"{path}{_yaml_problem(error)}"]) from error
    if not isinstance(tree, dict):
        raise ConfigError([f"{path}: {'is empty' if tree is None else show(tree)}; a config is a mapping of keys"])
    return tree


def _yaml_problem(error: yaml.YAMLError) -> str:
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None)
    return f"{f', line {mark.line + 1}' if mark else ''}: {problem or str(error).splitlines()[0]}"


def _apply(override: str, tree: dict[str, Any], problems: dict[str, str]) -> None:
    """Merge one ``key=value`` or ``~key`` into the tree."""
    key, equals, text = override.partition("=")
    if key.startswith("~") and not equals:
        if not _remove(tree, _split(key[1:])):
            problems[override] = f"{override}: the config has no {key[1:]} to leave out"
        return
    if not equals or not key:
        problems[override] = f"{override}: not of the form key=value"
        return
    try:
        value = yaml.load(text, _Loader) if text else ""
    except yaml.YAMLError as error:
        problems[key] = f"{key}: {text} is no YAML value{_yaml_problem(error).replace(', line 1', '')}"
        return
    *parents, last = _split(key)
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
        problems[key] = f"{key}: the list has {len(node)} items, counted from 0"


def _split(key: str) -> list[str]:
    """The names in a dotted key; items of a list as ``.0`` or ``[0]``."""
    return [name for name in re.split(r"[.\[\]]", key) if name]


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


def _remove(tree: dict[str, Any], names: Sequence[str]) -> bool:
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


def _defaults(schema: type) -> dict[str, Any]:
    return OmegaConf.to_container(OmegaConf.structured(schema))  # pyright: ignore[reportReturnType]


def _resolve(tree: dict[str, Any], defaults: dict[str, Any], problems: dict[str, str]) -> dict[str, Any]:
    """The tree over the defaults, with ``${...}`` replaced; those that cannot be are left out."""
    while True:
        try:
            merged = OmegaConf.merge(OmegaConf.create(defaults), OmegaConf.create(tree))
            return OmegaConf.to_container(merged, resolve=True)  # pyright: ignore[reportReturnType]
        except OmegaConfBaseException as error:
            key = error.full_key or ""
            problems[key] = f"{key}: {_interpolation_problem(error)}"
            if not _remove(tree, _split(key)):
                raise ConfigError(list(problems.values())) from error


def _interpolation_problem(error: OmegaConfBaseException) -> str:
    text = str(error).splitlines()[0]
    text = re.sub(r"^\w+ (raised )?while resolving interpolation: ", "", text).strip('"')
    return f"{text[:1].lower()}{text[1:]}" if not text.startswith("Missing mandatory value") else f"needs {text[25:]}"


def with_defaults(schema: Any, tree: Any) -> Any:
    """A saved config with the defaults of all keys that it has not, at any depth: those that are newer than it."""
    hint = without_none(schema)
    if get_origin(hint) is list and isinstance(tree, list):
        return [with_defaults(get_args(hint)[0], item) for item in tree]
    if not dataclasses.is_dataclass(hint) or not isinstance(tree, Mapping):
        return tree
    hints = get_type_hints(hint)
    defaults = {field.name: default_of(field) for field in dataclasses.fields(hint) if field.default != MISSING}
    return {name: with_defaults(hints.get(name), value) for name, value in (defaults | dict(tree)).items()}


# --- types and keys ---------------------------------------------------------------------------------------------------

_WRONG = object()
_PLACEHOLDERS: Mapping[Any, Any] = {int: 1, float: 1.0, bool: False, str: "", Component: {}}


def _build(hint: Any, value: Any, key: str, problems: dict[str, str], known: Sequence[str]) -> Any:
    """``value`` as an instance of ``hint``, or ``_WRONG`` with the reason in ``problems``."""
    if value is None and without_none(hint) is not hint:
        return None
    inner = without_none(hint)
    if value == MISSING:
        if key not in problems:  # else it was given, and could not be resolved
            problems[key] = f"{key}: missing; {wanted(inner)} is wanted, in the config or as {key}=..."
        return _WRONG
    if dataclasses.is_dataclass(inner) and isinstance(value, Mapping):
        return _build_dataclass(inner, value, key, problems, known)  # pyright: ignore[reportArgumentType]
    if get_origin(inner) is list and isinstance(value, list):
        items = [_build(get_args(inner)[0], item, f"{key}[{i}]", problems, known) for i, item in enumerate(value)]
        return [item for item in items if item is not _WRONG]
    if inner == dict[str, Component] and isinstance(value, Mapping):
        parts = {str(name): _build(Component, part, f"{key}.{name}", problems, known) for name, part in value.items()}
        return {name: {} if part is _WRONG else part for name, part in parts.items()}
    if inner == Component and isinstance(value, Mapping):
        return {str(name): item for name, item in value.items()}
    value = _from_text(value, inner)
    if dataclasses.is_dataclass(inner) or inner == Component:
        problems[key] = f"{key}: {show(value)}; {wanted(inner)} is wanted"
    elif wrong := type_problem(value, hint):
        problems[key] = f"{key}: {wrong}"
    else:
        return float(value) if inner is float else value
    return _WRONG


def _build_dataclass(
    hint: type, value: Mapping[str, Any], key: str, problems: dict[str, str], known: Sequence[str]
) -> Any:
    hints = get_type_hints(hint)
    for name in map(str, value):
        if name not in hints:
            path = join_key(key, name)
            problems[path] = f"{path}: no such key{_nearest_key(path, known)}"
    fields = {}
    for field in dataclasses.fields(hint):
        path = join_key(key, field.name)
        fields[field.name] = _build(hints[field.name], value.get(field.name, default_of(field)), path, problems, known)
        if fields[field.name] is _WRONG:
            fields[field.name] = _stand_in(field, without_none(hints[field.name]))
    return hint(**fields)


def default_of(field: dataclasses.Field) -> Any:
    """A field's default as YAML would give it."""
    value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore[reportArgumentType]


def _stand_in(field: dataclasses.Field, hint: Any) -> Any:
    """What the checks see in place of a wrong value."""
    if field.default_factory is not NO_DEFAULT:
        return field.default_factory()
    return _PLACEHOLDERS[hint] if field.default == MISSING else field.default


def without_none(hint: Any) -> Any:
    args = get_args(hint)
    return next(arg for arg in args if arg is not type(None)) if type(None) in args else hint


def _from_text(value: Any, hint: Any) -> Any:
    """Numbers and booleans that come as text, as they do from the environment and in quotes."""
    if not isinstance(value, str) or hint not in (int, float, bool):
        return value
    try:
        parsed = yaml.load(value, _Loader)
    except yaml.YAMLError:
        return value
    return value if isinstance(parsed, str | dict | list) or parsed is None else parsed


def wanted(hint: Any) -> str:
    if dataclasses.is_dataclass(hint):
        return f"a mapping with keys of {', '.join(field.name for field in dataclasses.fields(hint))}"
    return "a component (a mapping with _component_ and its arguments)" if hint == Component else describe_type(hint)


def join_key(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _nearest_key(path: str, keys: Sequence[str]) -> str:
    """The key that was meant: of that name elsewhere, else the nearest in this section, else the nearest of all."""
    section, _, name = re.sub(r"\[\d+\]", "", path).rpartition(".")
    elsewhere = [key for key in keys if key.rpartition(".")[2] == name]
    if elsewhere:
        return f"; did you mean {elsewhere[0]}?"
    here = [key.rpartition(".")[2] for key in keys if key.rpartition(".")[0] == section]
    near = nearest(name, here)
    if near:
        return f"; did you mean {join_key(path.rpartition('.')[0], near)}?"
    near = nearest(name, leaves := {key.rpartition(".")[2]: key for key in keys})
    return f"; did you mean {leaves[near]}?" if near else f"; keys here: {', '.join(here)}"


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """The dotted keys of a schema, sections included; those of a list's items without a number."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        key, inner = join_key(prefix, name), without_none(hint)
        inner = get_args(inner)[0] if get_origin(inner) is list else inner
        keys += [key, *(all_keys(inner, key) if dataclasses.is_dataclass(inner) else [])]  # pyright: ignore[reportArgumentType]
    return keys


def _argument_keys(tree: Any, prefix: str = "") -> list[str]:
    """The dotted keys of the arguments of a tree's components."""
    if not isinstance(tree, dict):
        return []
    here = [join_key(prefix, str(name)) for name in tree if "_component_" in tree and name != "_component_"]
    return here + [key for name, item in tree.items() for key in _argument_keys(item, join_key(prefix, str(name)))]
