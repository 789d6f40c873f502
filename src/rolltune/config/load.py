"""Turn a YAML file and ``key=value`` overrides into a dataclass of :mod:`rolltune.config.schema`, or list the mistakes.

All mistakes are collected before any is reported. Each reads ``key: value; what is accepted``.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import MISSING as NO_DEFAULT
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import yaml
from omegaconf import MISSING, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rolltune.config.components import nearest
from rolltune.config.renamed import renamed_key
from rolltune.config.schema import Component, FilePath
from rolltune.config.secrets import masked, password_problems
from rolltune.config.tree import apply_override, join_key, parse_yaml, read_yaml, remove, split_key, yaml_problem
from rolltune.config.values import describe_type, show, type_problem, without_none
from rolltune.errors import ConfigError
from rolltune.files import home_path, write_text_atomic
from rolltune.torchrun import process_place

T = TypeVar("T")
Check = Callable[[T, int], Iterable[str]]  # (config, number of processes) to problems, each "key: what is wrong"


def load(schema: type[T], path: str | Path, overrides: Sequence[str] = ()) -> T:
    """Read a config file, apply overrides, and check keys and types.

    Args:
        schema: the dataclass of the config's keys.
        path: the YAML file.
        overrides: ``key=value`` with a dotted key, or ``~key`` to leave a key out. The value is a YAML value; for a key
            that holds text it is the text as typed, or a quoted string. A dotted path given to a component's key sets
            its ``_component_``.

    Returns:
        An instance of ``schema``, with interpolations resolved.

    Raises:
        ConfigError: the mistakes in the file's syntax, or else all mistakes in keys and types.
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
    """Load a config as :func:`load` does, and run the recipe's ``check`` on it.

    Args:
        schema: the dataclass of the config's keys.
        path: the YAML file.
        overrides: as in :func:`load`.
        check: yields the problems of a config whose types are right, such as a function of :mod:`rolltune.run.checks`.
        world_size: number of processes; None: from torchrun's environment.

    Raises:
        ConfigError: all mistakes, those in keys and types and those that ``check`` found.
    """
    config, problems = _load(schema, path, overrides)
    found = check(config, world_size or process_place()[1])
    # A wrong key has its default in `config`, so what the check says about it would mislead.
    wrong = [re.compile(rf"(?<![\w.]){re.escape(key)}(?!\w)") for key in problems]
    found = [problem for problem in found if not any(key.search(problem) for key in wrong)]
    if problems or found:
        raise ConfigError([*problems.values(), *found])
    return config


def dump(config: Any) -> str:
    """A config as YAML, with all keys and with interpolations resolved, except those of secrets. It loads to the same
    config."""
    tree = masked(_map_texts(dataclasses.asdict(config), _escape))
    return yaml.safe_dump(tree, sort_keys=False, allow_unicode=True, width=120)


def _map_texts(value: Any, change: Callable[[str], str]) -> Any:
    if isinstance(value, Mapping):
        return {key: _map_texts(item, change) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_map_texts(item, change) for item in value]
    return change(value) if isinstance(value, str) else value


def _escape(text: str) -> str:
    """Write ``${`` that is plain text as ``\\${``; backslashes before it are doubled."""
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", text)


def _unescape(text: str) -> str:
    return re.sub(r"(\\*)\1\\\$\{", r"\1${", text)


def save(config: Any, folder: str | Path) -> None:
    """Write ``<folder>/config.yaml`` atomically and durably; creates the folder."""
    Path(folder).mkdir(parents=True, exist_ok=True)
    write_text_atomic(Path(folder) / "config.yaml", dump(config))


def read_saved(folder: str | Path) -> dict[str, Any] | None:
    """Read what :func:`save` wrote; None if the folder has no config.yaml.

    Raises:
        ConfigError: the file is not valid YAML or holds no mapping.
    """
    path = Path(folder) / "config.yaml"
    if not path.exists():
        return None
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))  # save() writes plain YAML 1.1
        problem = None if isinstance(tree, dict) else ": holds no config"
    except UnicodeDecodeError:
        problem = ": not UTF-8 text"
    except OSError as error:
        problem = f": {(error.strerror or str(error)).lower()}"
    except yaml.YAMLError as error:
        problem = yaml_problem(error)
    if problem:
        raise ConfigError([f"{path}{problem}; repair it, or choose another output_dir"])
    return _map_texts(tree, _unescape)


def with_defaults(schema: Any, tree: Any) -> Any:
    """A saved config with defaults added, at any depth, for keys that are newer than it."""
    hint = without_none(schema)
    if get_origin(hint) is list and isinstance(tree, list):
        return [with_defaults(get_args(hint)[0], item) for item in tree]
    if not dataclasses.is_dataclass(hint) or not isinstance(tree, Mapping):
        return tree
    hints = get_type_hints(hint)
    defaults = {field.name: default_of(field) for field in dataclasses.fields(hint) if field.default != MISSING}
    return {name: with_defaults(hints.get(name), value) for name, value in (defaults | dict(tree)).items()}


def default_of(field: dataclasses.Field) -> Any:
    """A field's default, as YAML would give it."""
    value = field.default if field.default_factory is NO_DEFAULT else field.default_factory()
    return dataclasses.asdict(value) if dataclasses.is_dataclass(value) else value  # pyright: ignore[reportArgumentType]


def all_keys(schema: type, prefix: str = "") -> list[str]:
    """List the dotted keys of a schema, sections included. Keys of a list's items have no index."""
    keys = []
    for name, hint in get_type_hints(schema).items():
        key, inner = join_key(prefix, name), without_none(hint)
        inner = get_args(inner)[0] if get_origin(inner) is list else inner
        keys += [key, *(all_keys(inner, key) if dataclasses.is_dataclass(inner) else [])]  # pyright: ignore[reportArgumentType]
    return keys


def wanted(hint: Any) -> str:
    return "a component (a mapping with _component_ and its arguments)" if hint == Component else describe_type(hint)


def _load(schema: type[T], path: str | Path, overrides: Sequence[str]) -> tuple[T, dict[str, str]]:
    """The config, with defaults in place of wrong values, and the problems by key."""
    tree = read_yaml(path)
    problems = dict(problem for override in overrides if (problem := apply_override(override, tree, schema)))
    resolved = _resolve(schema, tree, problems)
    problems |= dict(password_problems(resolved))
    builder = _Builder(problems, known=[*all_keys(schema), *_argument_keys(resolved)])
    return builder.section(schema, resolved, ""), problems


def _resolve(schema: Any, tree: dict[str, Any], problems: dict[str, str]) -> dict[str, Any]:
    """The tree merged over the defaults, with ``${...}`` replaced. An interpolation that fails is left out."""
    defaults = {field.name: default_of(field) for field in dataclasses.fields(schema)}
    while True:
        try:
            merged = OmegaConf.create(_merged(defaults, tree))
            return OmegaConf.to_container(merged, resolve=True)  # pyright: ignore[reportReturnType]
        except OmegaConfBaseException as error:
            key = error.full_key or ""
            problems[key] = f"{key}: {_interpolation_problem(error)}"
            if not remove(tree, split_key(key)):
                raise ConfigError(list(problems.values())) from error


def _merged(below: Any, above: Any) -> Any:
    """``above``, with the keys of ``below`` that it lacks, at any depth."""
    if not isinstance(below, dict) or not isinstance(above, dict):
        return above
    return below | {name: _merged(below.get(name), item) for name, item in above.items()}


def _interpolation_problem(error: OmegaConfBaseException) -> str:
    text = str(error).splitlines()[0]
    text = re.sub(r"^\w+ (raised )?while resolving interpolation: ", "", text).strip('"')
    return f"{text[:1].lower()}{text[1:]}" if not text.startswith("Missing mandatory value") else f"needs {text[25:]}"


def _argument_keys(tree: Any, prefix: str = "", *, in_component: bool = False) -> list[str]:
    """List the dotted keys of the arguments of a tree's components."""
    if not isinstance(tree, dict):
        return []
    in_component = in_component or "_component_" in tree
    here = [join_key(prefix, str(name)) for name in tree if in_component and name != "_component_"]
    return here + [
        key
        for name, item in tree.items()
        for key in _argument_keys(item, join_key(prefix, str(name)), in_component=in_component)
    ]


# --- tree to dataclass ------------------------------------------------------------------------------------------------

_WRONG = object()
_PLACEHOLDERS: Mapping[Any, Any] = {int: 1, float: 1.0, bool: False, str: "", Component: {}}


@dataclasses.dataclass(frozen=True)
class _Builder:
    """Builds typed values and notes what is wrong with them.

    Attributes:
        problems: by key; written to.
        known: dotted keys that a misspelt one may have meant.
    """

    problems: dict[str, str]
    known: Sequence[str]

    def section(self, hint: Any, value: Mapping[str, Any], key: str) -> Any:
        """An instance of the dataclass ``hint``; a wrong or missing value has its default there."""
        hints = get_type_hints(hint)
        paths = [
            name for name, kind in get_type_hints(hint, include_extras=True).items() if without_none(kind) == FilePath
        ]
        for name in map(str, value):
            if name not in hints:
                path = join_key(key, name)
                problem = renamed_key(path) or f"no such key{_nearest_key(path, self.known)}"
                self.problems[path] = f"{path}: {problem}"
        built = {}
        for field in dataclasses.fields(hint):
            given = value.get(field.name, default_of(field))
            built[field.name] = self.value(hints[field.name], given, join_key(key, field.name))
            if field.name in paths and isinstance(built[field.name], str):
                built[field.name] = self.path(built[field.name], join_key(key, field.name))
            if built[field.name] is _WRONG:
                built[field.name] = _stand_in(field, without_none(hints[field.name]))
        return hint(**built)

    def path(self, value: str, key: str) -> Any:
        """A path without ``~``, or ``_WRONG``."""
        try:
            return str(home_path(value)) if value.startswith("~") else value
        except ValueError as error:
            self.problems[key] = f"{key}: {error}"
            return _WRONG

    def value(self, hint: Any, value: Any, key: str) -> Any:
        """``value`` as an instance of ``hint``, or ``_WRONG`` with the reason in ``problems``."""
        inner = without_none(hint)
        if value is None and inner is not hint:
            return None
        if value == MISSING:
            if key not in self.problems:  # otherwise its interpolation failed
                self.problems[key] = f"{key}: missing; give {wanted(inner)}, in the config or as {key}=..."
            return _WRONG
        if isinstance(value, Mapping) and dataclasses.is_dataclass(inner):
            return self.section(inner, value, key)
        if isinstance(value, Mapping) and inner == dict[str, Component]:
            parts = {str(name): self.value(Component, part, f"{key}.{name}") for name, part in value.items()}
            return {name: {} if part is _WRONG else part for name, part in parts.items()}
        if isinstance(value, Mapping) and inner == Component:
            return {str(name): item for name, item in value.items()}
        if isinstance(value, list) and get_origin(inner) is list:
            items = [self.value(get_args(inner)[0], item, f"{key}[{i}]") for i, item in enumerate(value)]
            return [item for item in items if item is not _WRONG]
        value = _from_text(value, inner)
        if inner == Component:
            self.problems[key] = f"{key}: {show(value)}; must be {wanted(inner)}"
        elif wrong := type_problem(value, hint):
            self.problems[key] = f"{key}: {wrong}"
        else:
            return float(value) if inner is float else value
        return _WRONG


def _stand_in(field: dataclasses.Field, hint: Any) -> Any:
    """The value that checks see in place of a wrong one."""
    if field.default_factory is not NO_DEFAULT:
        return field.default_factory()
    return _PLACEHOLDERS[hint] if field.default == MISSING else field.default


def _from_text(value: Any, hint: Any) -> Any:
    """Parse numbers and booleans that come as text, from the environment or in quotes."""
    if not isinstance(value, str) or hint not in (int, float, bool):
        return value
    try:
        parsed = parse_yaml(value)
    except yaml.YAMLError:
        return value
    return value if isinstance(parsed, str | dict | list) or parsed is None else parsed


def _nearest_key(path: str, keys: Sequence[str]) -> str:
    """Suggest a key: one of this name in another section, else a similar one in this section, else a similar one."""
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
