"""``_component_`` nodes: a dotted path and its arguments, checked against the signature before anything is built.

Also here, since arguments and config keys are checked by the same rules: what a YAML value has to be to fit a type.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import inspect
import logging
import math
import os
import pkgutil
import re
import sys
import traceback
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import rolltune
from rolltune.config.schema import Component
from rolltune.errors import ConfigError

# torchtune imports torchao, which logs a complaint about optional kernels that are not used here.
logging.getLogger("torchao").setLevel(logging.ERROR)

ROOTS = ("rolltune", "torchtune", "torch")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
_PLURALS = {str: "strings", int: "integers", float: "numbers"}
_SEQUENCES = (list, tuple, set, frozenset, Sequence, Iterable, Collection)


# --- using ------------------------------------------------------------------------------------------------------------


def instantiate(node: Component, *args: Any, **kwargs: Any) -> Any:
    """Call the node's component with ``args``, the node's own arguments and ``kwargs``.

    An argument that is a node itself is passed as it stands: what takes it builds it.

    Raises:
        ConfigError: no such component, or it refused its arguments (a ValueError) or found no file.
    """
    try:
        return component(node)(*args, **kwargs)
    except ConfigError:
        raise
    except (ValueError, FileNotFoundError) as error:
        raise ConfigError([f"{node['_component_']}: {error}"]) from error


def component(node: Component, *, ignore: Collection[str] = ()) -> Callable[..., Any]:
    """The node's component with its arguments bound, for functions that are called later.

    A mapping for an argument that is annotated as a dataclass is passed as an object of that class.

    Args:
        node: ``_component_`` and arguments.
        ignore: keys of the node that are not arguments, such as the ``weight`` of a reward.

    Raises:
        ConfigError: no such component, or a dataclass refuses its values.
    """
    try:
        target = locate(node["_component_"])
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    arguments = {name: value for name, value in node.items() if name not in _options(ignore)}
    for name, settings in _dataclass_arguments(target).items():
        if isinstance(arguments.get(name), Mapping):
            try:
                arguments[name] = settings(**arguments[name])
            except ValueError as error:
                raise ConfigError([f"{node['_component_']}: {name}.{error}"]) from error
    return functools.partial(target, **arguments)


def is_node(value: Any) -> bool:
    """Whether an argument names a component of its own."""
    return isinstance(value, Mapping) and "_component_" in value


def _is_node_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and bool(value) and all(is_node(item) for item in value)


def component_or_object(node: Component, *, ignore: Collection[str] = ()) -> Callable[..., Any]:
    """What is called later: a function with its arguments bound, or an object of a class, made now and kept.

    Args:
        node: ``_component_`` and arguments.
        ignore: keys of the node that are not arguments.

    Raises:
        ConfigError: no such component, or a class that refuses its arguments.
    """
    if inspect.isclass(component(node).func):  # pyright: ignore[reportFunctionMemberAccess]
        return instantiate({key: value for key, value in node.items() if key not in ignore})
    return component(node, ignore=ignore)


def _options(ignore: Collection[str]) -> set[str]:
    return {"_component_", *ignore}


# --- finding ----------------------------------------------------------------------------------------------------------


def locate(path: str) -> Any:
    """Import what a dotted path names.

    Raises:
        ValueError: not a path, not from an allowed place, not there, or its module fails to import.
    """
    if not isinstance(path, str) or not _DOTTED.fullmatch(path):
        raise ValueError(f"{path}: not a dotted path such as rolltune.losses.grpo.GRPOLoss")
    parts = path.split(".")
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
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
    return found


def _check_root(path: str, root: str) -> None:
    if root in ROOTS:
        return
    spec = _find_spec(root)
    is_own = spec is not None and _search_folder(spec) in _own_folders()
    if (not is_own or _is_in_rolltune(spec)) and _find_spec(f"rolltune.{root}"):
        raise ValueError(f"{path}: no module {root} of yours; did you mean rolltune.{path}?")
    if spec is None:
        raise ValueError(
            f"{path}: no module {root} here, on PYTHONPATH or among {', '.join(ROOTS)}{did_you_mean(root, ROOTS)}"
        )
    if not is_own:
        raise ValueError(
            f"{path}: {root} is not one of {', '.join(ROOTS)}, nor a module of yours in the current folder or on "
            "PYTHONPATH; to use it, import it in a module of yours and name that"
        )


def _find_spec(module: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(module)
    except ValueError:  # __main__ has no spec
        return None


def _search_folder(spec: ModuleSpec) -> Path | None:
    """The folder of sys.path that a top-level module was found in; None for what is built in."""
    if spec.submodule_search_locations:
        return Path(next(iter(spec.submodule_search_locations))).resolve().parent
    return Path(spec.origin).resolve().parent if spec.has_location and spec.origin else None


def _is_in_rolltune(spec: ModuleSpec | None) -> bool:
    """Whether a top-level ``rewards`` or ``data`` is rolltune's own folder, seen from its repository's root."""
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
        raise ValueError(f"{module}: its import fails: {type(error).__name__}: {error}{where}") from error


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
    """What is wrong with a component and its arguments; imports the component, calls nothing.

    Args:
        node: ``_component_`` and arguments.
        key: where the node stands in the config, such as ``rewards.answer``.
        positional: how many positional arguments the recipe calls it with.
        passed: keyword arguments that the recipe always passes.
        reserved: keyword arguments that the recipe passes where the component takes them.
        ignore: keys of the node that are not arguments.
    """
    if "_component_" not in node:
        return [f"{key}: no _component_; it names the class or function, with its arguments beside it"]
    path = node["_component_"]
    try:
        target = locate(path)
    except ValueError as error:
        return [f"{key}._component_: {error}"]
    if not callable(target):
        return [f"{key}._component_: {path} is a {type(target).__name__}; a class or a function is wanted"]
    options = {name: value for name, value in node.items() if name not in _options(ignore)}
    try:
        parameters = list(inspect.signature(target).parameters.values())
    except (TypeError, ValueError):  # written in C, without a signature
        return []
    name = path.rpartition(".")[2]
    return [
        *_bind_problems(parameters, options, key, name, positional, passed, reserved),
        *_value_problems(target, options, key),
    ]


def _bind_problems(
    parameters: Sequence[inspect.Parameter],
    options: Mapping[str, Any],
    key: str,
    name: str,
    positional: int,
    passed: Sequence[str],
    reserved: Sequence[str],
) -> list[str]:
    by_position = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    filled, rest = by_position[:positional], by_position[positional:]
    named = {p.name: p for p in (*rest, *parameters) if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)}
    named = {k: p for k, p in named.items() if p not in filled}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters)
    takes_more = any(p.kind is p.VAR_POSITIONAL for p in parameters)
    given = {*passed, *(p.name for p in filled), *(name for name in reserved if name in named)}
    problems = []
    if len(filled) < positional and not takes_more:
        problems.append(
            f"{key}._component_: {name} takes {len(filled)} positional arguments; it is called with {positional} here"
        )
    for argument in passed:
        if argument not in named and not takes_any:
            problems.append(f"{key}._component_: {name} takes no {argument}, which the recipe passes to it")
    for option in options:
        if option in given:
            problems.append(f"{key}.{option}: the recipe passes it to {name}; leave it out")
        elif option not in named and not takes_any:
            right = did_you_mean(option, named.keys() - given, f"{key}.")
            problems.append(f"{key}.{option}: {name} takes no such argument{right or _listed(named.keys() - given)}")
    for argument, parameter in named.items():
        if parameter.default is parameter.empty and argument not in options and argument not in given:
            problems.append(f"{key}.{argument}: missing; {name} needs it")
    return problems


def _listed(names: Iterable[str]) -> str:
    return f"; it takes {', '.join(sorted(names))}" if names else ""


def _nested_problems(node: Component, key: str) -> list[str]:
    """Of a node inside another one. What a function is called with there is not known here, so it may lack that."""
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


def _value_problems(target: Any, options: Mapping[str, Any], key: str) -> list[str]:
    hints, settings = _hints(target), _dataclass_arguments(target)
    problems = []
    for name, value in options.items():
        if is_node(value):
            problems += _nested_problems(value, f"{key}.{name}")
        elif _is_node_list(value):
            problems += [p for i, item in enumerate(value) for p in _nested_problems(item, f"{key}.{name}[{i}]")]
        elif name in settings and isinstance(value, Mapping):
            problems += _settings_problems(settings[name], value, f"{key}.{name}")
        elif wrong := type_problem(value, Mapping if name in settings else hints.get(name, Any)):
            problems.append(f"{key}.{name}: {wrong}")
    return problems


def _settings_problems(settings: type, value: Mapping[str, Any], key: str) -> list[str]:
    parameters = list(inspect.signature(settings).parameters.values())
    return [
        *_bind_problems(parameters, value, key, settings.__name__, 0, (), ()),
        *_value_problems(settings, value, key),
    ]


def _dataclass_arguments(target: Any) -> dict[str, type]:
    """The target's arguments that a config writes as a mapping of a dataclass's fields."""
    return {
        name: hint for name, hint in _hints(target).items() if inspect.isclass(hint) and dataclasses.is_dataclass(hint)
    }


def _hints(target: Any) -> dict[str, Any]:
    try:
        return get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # names that exist only for type checkers
        return {}


# --- types ------------------------------------------------------------------------------------------------------------


def type_problem(value: Any, hint: Any) -> str | None:
    """Why a YAML value does not fit a type, in a few words; None if it fits, or if YAML cannot write the type."""
    return None if _fits(value, hint) else f"{show(value)}; {describe_type(hint)} is wanted{_hint_at(value, hint)}"


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # A YAML value can never be a Tensor or another object, so only the members that YAML can say count.
        known = [arg for arg in args if _is_known(arg)]
        return any(_fits(value, arg) for arg in known) if set(known) - {type(None)} else True
    if origin is Literal:
        return any(value == arg and type(value) is type(arg) for arg in args)
    if hint is type(None):
        return value is None
    if hint is bool:
        return isinstance(value, bool)
    if hint is int:
        return isinstance(value, int) and not isinstance(value, bool)
    if hint is float:
        return isinstance(value, int | float) and not isinstance(value, bool) and not math.isnan(value)
    if hint in (str, Path):
        return isinstance(value, str)
    kind = origin or hint
    if kind in _SEQUENCES:
        return isinstance(value, list | tuple) and _items_fit(value, kind, args)
    if kind in (dict, Mapping):
        return isinstance(value, Mapping) and all(_fits(item, args[1]) for item in value.values() if len(args) == 2)
    return True


def _items_fit(value: Sequence[Any], kind: Any, args: tuple[Any, ...]) -> bool:
    if kind is tuple and args and args[-1] is not Ellipsis:
        return len(value) == len(args) and all(_fits(item, arg) for item, arg in zip(value, args, strict=True))
    return all(_fits(item, args[0]) for item in value) if args else True


def _is_known(hint: Any) -> bool:
    kind = get_origin(hint) or hint
    return kind in (*_NAMES, *_SEQUENCES, Path, dict, Mapping, Literal)


def describe_type(hint: Any) -> str:
    """A type in words: ``int | None`` is "an integer or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(arg) for arg in args if _is_known(arg)))
    if origin is Literal:
        return " or ".join(map(str, args))
    kind = origin or hint
    if kind is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)}"
    if kind in _SEQUENCES:
        return f"a list of {_PLURALS[args[0]]}" if args and args[0] in _PLURALS else "a list"
    if kind in (dict, Mapping):
        return "a mapping"
    return _NAMES.get(hint, "a string" if hint is Path else getattr(hint, "__name__", str(hint)))


def show(value: Any) -> str:
    """A YAML value with its type, short enough for a message."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(map(str, value))})" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}...'"
    return f"{text} is a string" if isinstance(value, str) else text


def _hint_at(value: Any, hint: Any) -> str:
    """How to say what was probably meant."""
    kinds = get_args(hint) or (hint,)
    if str in kinds and isinstance(value, bool | int | float):
        return " (put it in quotes)"
    if isinstance(value, str) and {int, float} & set(kinds) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value):
        return " (without quotes; from the environment: ${oc.decode:${oc.env:NAME}})"
    if value == "None" and type(None) in kinds:
        return " (null, not None)"
    return ""


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The one of ``names`` that was probably meant by ``name``."""
    names = [other for other in names if other]
    near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    near = near or [other for other in names if name.lower() in other.lower() or other.lower() in name.lower()]
    return near[0] if near else None


def did_you_mean(name: str, names: Iterable[str], prefix: str = "") -> str:
    """``"; did you mean x?"``, or nothing where no name is near."""
    near = nearest(name, names)
    return f"; did you mean {prefix}{near}?" if near else ""
