"""``_component_`` nodes: the dotted path of a class or function and its arguments.

:func:`check_component` compares the arguments with the component's signature before anything is built.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import os
import pkgutil
import re
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, get_type_hints

import rolltune
from rolltune.config import renamed
from rolltune.config.schema import Component
from rolltune.config.values import type_problem, without_none
from rolltune.errors import ConfigError
from rolltune.files import home_path

ROOTS = ("rolltune", "torchtune", "torch", "transformers", "bitsandbytes", "torchao")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")


# --- building ---------------------------------------------------------------------------------------------------------


def instantiate(node: Component, *args: Any, **kwargs: Any) -> Any:
    """Call the node's component with ``args``, the node's own arguments and ``kwargs``.

    An argument that is itself a node is passed as it is: the component builds it. A mapping is passed as an instance of
    the dataclass that the component's signature names.

    Raises:
        ConfigError: the component does not exist, refuses its arguments (a ValueError) or misses a file.
    """
    call = component(node)
    try:
        return call(*args, **kwargs)
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError([f"{node['_component_']}: {error}"]) from error


def component(node: Component, *, ignore: Collection[str] = ()) -> functools.partial[Any]:
    """Bind the node's arguments to its component, for functions that are called later.

    A mapping for an argument that is annotated as a dataclass is passed as an object of that class.

    Args:
        node: ``_component_`` and arguments.
        ignore: keys of the node that are not arguments, such as the ``weight`` of a reward.

    Raises:
        ConfigError: the component does not exist, or a mapping among its arguments has a wrong value.
    """
    path = node["_component_"]
    try:
        target = locate(path)
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    try:
        return functools.partial(target, **_build_mappings(target, _arguments(node, ignore)))
    except ValueError as error:
        raise ConfigError([f"{path}: {error}"]) from error


def component_or_object(node: Component, *, ignore: Collection[str] = ()) -> Callable[..., Any]:
    """Build a class now, or bind a function's arguments. Either result is called later.

    Args:
        node: ``_component_`` and arguments.
        ignore: keys of the node that are not arguments.

    Raises:
        ConfigError: the component does not exist, or is a class that refuses its arguments.
    """
    bound = component(node, ignore=ignore)
    if inspect.isclass(bound.func):
        return instantiate({key: value for key, value in node.items() if key not in ignore})
    return bound


def is_node(value: Any) -> bool:
    """Whether a value is a mapping with ``_component_``."""
    return isinstance(value, Mapping) and "_component_" in value


def _arguments(node: Component, ignore: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in node.items() if name != "_component_" and name not in ignore}


def _build_mappings(target: Any, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments, with a dataclass instance in place of each mapping whose type is a dataclass.

    ``~`` at the start of a path is replaced by the home folder where the type is ``Path``.

    Raises:
        ValueError: a dataclass refused a value; the message starts with the argument and the field.
    """
    hints = _argument_types(target)
    built = dict(arguments)
    for name, value in arguments.items():
        kind = _dataclass_for(value, hints.get(name))
        if kind is not None:
            try:
                built[name] = kind(**_build_mappings(kind, value))
            except ValueError as error:
                raise ValueError(f"{name}.{error}") from error
        elif isinstance(value, str) and without_none(hints.get(name)) is Path:
            built[name] = home_path(value)
    return built


def _dataclass_for(value: Any, hint: Any) -> Any:
    """The dataclass that a mapping is turned into, for a type ``D`` or ``D | None``; None if it stays a mapping."""
    kind = without_none(hint)
    return kind if dataclasses.is_dataclass(kind) and isinstance(value, Mapping) and not is_node(value) else None


def _argument_types(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # an annotation may name what is imported for type checkers only
        return {}


# --- finding ----------------------------------------------------------------------------------------------------------


def locate(path: str) -> Any:
    """Import the class or function at a dotted path.

    Raises:
        ValueError: not a dotted path, a module from elsewhere than :data:`ROOTS` and the user's folders, no such name,
            or a module whose import fails.
    """
    if not isinstance(path, str) or not _DOTTED.fullmatch(path):
        raise ValueError(f"{path}: not a dotted path such as rolltune.losses.grpo.GRPOLoss")
    if path in renamed.COMPONENTS:
        raise ValueError(f"{path}: was renamed; use {renamed.COMPONENTS[path]}")
    if path in renamed.REMOVED_COMPONENTS:
        raise ValueError(f"{path}: was removed; {renamed.REMOVED_COMPONENTS[path]}")
    parts = path.split(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    if any(name.startswith("__") for name in parts):
        raise ValueError(f"{path}: names with two leading underscores are not components")
    _check_root(path, parts[0])
    found = _import(parts[0])
    for depth, name in enumerate(parts[1:], start=1):
        parent, module = ".".join(parts[:depth]), ".".join(parts[: depth + 1])
        if not hasattr(found, name):
            if not isinstance(found, types.ModuleType) or not hasattr(found, "__path__") or not _find_spec(module):
                raise ValueError(f"{path}: {parent} has no {name}{did_you_mean(name, _members(found))}")
            found = _import(module)
        else:
            found = getattr(found, name)
        if isinstance(found, types.ModuleType) and found.__name__.partition(".")[0] != parts[0]:
            raise ValueError(f"{path}: {module} is the module {found.__name__}, which {parent} only imports")
    _check_home(path, parts[0], found)
    return found


def _check_home(path: str, root: str, found: Any) -> None:
    """Refuse a function or class of Python's own modules that a library imported, such as ``os.system``."""
    home = found.__module__ if inspect.isclass(found) or inspect.isroutine(found) else None
    if root in ROOTS and isinstance(home, str) and home.partition(".")[0] in sys.stdlib_module_names:
        raise ValueError(
            f"{path}: is {home}.{found.__name__}, which {root} only imports; to use it, import it in a module of your "
            "own and give that module's path"
        )


def _check_root(path: str, root: str) -> None:
    if root in ROOTS:
        return
    spec = _find_spec(root)
    is_own = spec is not None and _search_folder(spec) in _own_folders()
    if (not is_own or _is_in_rolltune(spec)) and _find_spec(f"rolltune.{root}"):
        raise ValueError(f"{path}: no module {root} of your own; did you mean rolltune.{path}?")
    if spec is None:
        raise ValueError(
            f"{path}: no module {root} in this folder, on PYTHONPATH or among {', '.join(ROOTS)}"
            f"{did_you_mean(root, ROOTS)}"
        )
    if not is_own:
        raise ValueError(
            f"{path}: {root} is neither one of {', '.join(ROOTS)} nor a module in this folder or on PYTHONPATH; "
            "to use it, import it in a module of your own and give that module's path"
        )


def _find_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # __main__ has no spec
        return None


def _search_folder(spec: ModuleSpec) -> Path | None:
    """The folder of sys.path that a top-level module was found in; None for a built-in module."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return Path(spec.origin).resolve().parent if spec.has_location and spec.origin else None


def _is_in_rolltune(spec: ModuleSpec | None) -> bool:
    """Whether a top-level ``rewards`` or ``data`` is rolltune's own folder, found from the root of its repository."""
    package = Path(rolltune.__file__).parent
    return spec is not None and _search_folder(spec) in [
        (package / name).resolve().parent for name in ("rewards", "data")
    ]


def _own_folders() -> set[Path]:
    folders = [os.getcwd(), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
    return {Path(folder).resolve() for folder in folders if folder}


def _import(module: str) -> types.ModuleType:
    try:
        return importlib.import_module(module)
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        where = f" ({place.filename}:{place.lineno})" if "importlib" not in place.filename else ""
        raise ValueError(f"{module}: import failed: {type(error).__name__}: {error}{where}") from error


def _members(found: Any) -> list[str]:
    names = [name for name in vars(found) if not name.startswith("_")] if hasattr(found, "__dict__") else []
    return names + [module.name for module in pkgutil.iter_modules(getattr(found, "__path__", []))]


# --- checking ---------------------------------------------------------------------------------------------------------


def check_component(
    node: Component,
    key: str,
    *,
    positional: int = 0,
    passed: Sequence[str] = (),
    reserved: Sequence[str] = (),
    ignore: Collection[str] = (),
) -> list[str]:
    """List the problems of a component's path and arguments. Imports the component but does not call it.

    Args:
        node: ``_component_`` and arguments.
        key: the node's place in the config, such as ``rewards.answer``.
        positional: number of positional arguments that the recipe calls it with.
        passed: keyword arguments that the recipe always passes.
        reserved: keyword arguments that the recipe passes if the component takes them.
        ignore: keys of the node that are not arguments.
    """
    if "_component_" not in node:
        return [f"{key}: has no _component_; give the dotted path of a class or function, with its arguments beside it"]
    path = node["_component_"]
    try:
        target = locate(path)
    except ValueError as error:
        return [f"{key}._component_: {error}"]
    if not callable(target):
        return [f"{key}._component_: {path} is a {type(target).__name__}; must be a class or a function"]
    return _argument_problems(
        target, _arguments(node, ignore), key, positional=positional, passed=passed, reserved=reserved
    )


def _argument_problems(
    target: Callable[..., Any],
    arguments: Mapping[str, Any],
    key: str,
    *,
    positional: int = 0,
    passed: Sequence[str] = (),
    reserved: Sequence[str] = (),
) -> list[str]:
    """List arguments that ``target`` does not take, misses, or takes in another type."""
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # written in C, without a signature
        return []
    name = getattr(target, "__name__", type(target).__name__)
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    filled = by_position[:positional]
    by_name = {p.name: p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p not in filled}
    given = {*passed, *(p.name for p in filled), *(option for option in reserved if option in by_name)}
    free = by_name.keys() - given  # may come from the config
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)

    problems = []
    if len(filled) < positional and not any(p.kind is p.VAR_POSITIONAL for p in parameters):
        problems.append(
            f"{key}._component_: {name} takes {len(filled)} positional arguments; the recipe passes {positional}"
        )
    if not takes_any:
        problems += [
            f"{key}._component_: {name} takes no {argument}, which the recipe passes to it"
            for argument in passed
            if argument not in by_name
        ]
    for argument in arguments:
        if argument in given:
            problems.append(f"{key}.{argument}: the recipe passes it to {name}; leave it out")
        elif argument not in free and not takes_any:
            problems.append(f"{key}.{argument}: {_unknown_argument(argument, free, key, name)}")
    problems += [
        f"{key}.{argument}: missing; {name} needs it"
        for argument in by_name
        if argument in free and argument not in arguments and by_name[argument].default is inspect.Parameter.empty
    ]
    ours = {argument: value for argument, value in arguments.items() if argument not in given}
    return problems + _value_problems(target, ours, key)


def _unknown_argument(argument: str, names: Collection[str], key: str, component: str) -> str:
    new = renamed.ARGUMENTS.get(argument, "")
    if new.partition(".")[0] in names:
        return f"was renamed; use {key}.{new}"
    others = f"; it takes {', '.join(sorted(names))}" if names else ""
    return f"{component} takes no such argument{did_you_mean(argument, names, f'{key}.') or others}"


def _value_problems(target: Any, arguments: Mapping[str, Any], key: str) -> list[str]:
    """List arguments of another type than the signature's; components and dataclasses among them are checked too."""
    hints = _argument_types(target)
    problems = []
    for name, value in arguments.items():
        place, hint = f"{key}.{name}", hints.get(name, Any)
        if is_node(value):
            problems += _nested_problems(value, place)
        elif (kind := _dataclass_for(value, hint)) is not None:
            problems += _argument_problems(kind, value, place)
        elif isinstance(value, list | tuple) and value and all(map(is_node, value)):
            problems += [p for i, item in enumerate(value) for p in _nested_problems(item, f"{place}[{i}]")]
        elif wrong := type_problem(value, hint):
            problems.append(f"{place}: {wrong}")
    return problems


def _nested_problems(node: Component, key: str) -> list[str]:
    """List the problems of a node inside another one.

    A function there may lack its positional arguments: only its caller knows how many it passes.
    """
    try:
        target = locate(node["_component_"])
        positional = 0 if inspect.isclass(target) else len(_required_by_position(target))
    except (TypeError, ValueError):
        positional = 0
    return check_component(node, key, positional=positional)


def _required_by_position(target: Any) -> list[inspect.Parameter]:
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    parameters = inspect.signature(target).parameters.values()
    return [p for p in parameters if p.kind in kinds and p.default is p.empty]


# --- names ------------------------------------------------------------------------------------------------------------


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The most similar of ``names``, or None if none is similar."""
    names = [other for other in names if other]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    near = near or [other for other in names if name.lower() in other.lower() or other.lower() in name.lower()]
    return near[0] if near else None


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean x?"`` with the most similar name, or an empty string."""
    near = nearest(name, names)
    return f"; did you mean {prefix}{near}?" if near else ""
