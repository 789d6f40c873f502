"""Compare a YAML value with a Python type. Config keys and the arguments of components share these rules."""

from __future__ import annotations

import dataclasses
import math
import re
import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

_NAMES = {str: "a string", int: "an integer", float: "a number", bool: "true or false", type(None): "null"}
_PLURALS = {str: "strings", int: "integers", float: "numbers"}
_SEQUENCES = (list, tuple, set, frozenset, Sequence, Iterable, Collection)


def type_problem(value: Any, hint: Any) -> str | None:
    """Say why a YAML value does not fit a type, such as ``1.5; must be an integer``.

    Returns:
        None if the value fits, or if no YAML value can have the type (a tensor, a callable).
    """
    return None if _fits(value, hint) else f"{show(value, hint)}; must be {describe_type(hint)}{_advice(value, hint)}"


def _fits(value: Any, hint: Any) -> bool:
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        # The value comes from YAML, so it cannot be a Tensor or another object: only types that YAML can write count.
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
    if dataclasses.is_dataclass(hint):
        return isinstance(value, Mapping)
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
    return dataclasses.is_dataclass(kind) or kind in (*_NAMES, *_SEQUENCES, Path, dict, Mapping, Literal)


def describe_type(hint: Any) -> str:
    """A type in words: ``int | None`` is "an integer or null"."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return " or ".join(dict.fromkeys(describe_type(arg) for arg in args if _is_known(arg)))
    if origin is Literal:
        return f"one of {', '.join(map(str, args))}"
    if dataclasses.is_dataclass(hint):
        return f"a mapping with keys of {', '.join(field.name for field in dataclasses.fields(hint))}"
    kind = origin or hint
    if kind is tuple and args and args[-1] is not Ellipsis:
        return f"a list of {len(args)}"
    if kind in _SEQUENCES:
        return f"a list of {_PLURALS[args[0]]}" if args and args[0] in _PLURALS else "a list"
    if kind in (dict, Mapping):
        return "a mapping"
    return _NAMES.get(hint, "a string" if hint is Path else getattr(hint, "__name__", str(hint)))


def show(value: Any, hint: Any = None) -> str:
    """A YAML value, short enough for a message; of a string also its type, unless ``hint`` lists its values."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, Mapping):
        return f"a mapping ({', '.join(map(str, value))})" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}" if value else "an empty list"
    text = repr(value) if len(repr(value)) <= 60 else f"{repr(value)[:57]}...'"
    has_type = isinstance(value, str) and Literal not in (get_origin(kind) for kind in (hint, *get_args(hint)))
    return f"{text} (a string)" if has_type else text


def _advice(value: Any, hint: Any) -> str:
    """How to write the value that was probably meant."""
    kinds = get_args(hint) or (hint,)
    if str in kinds and isinstance(value, bool | int | float):
        return " (put it in quotes)"
    if isinstance(value, str) and {int, float} & set(kinds) and re.fullmatch(r"[-+]?[\d.]+([eE][-+]?\d+)?", value):
        return " (without quotes; from the environment: ${oc.decode:${oc.env:NAME}})"
    if value == "None" and type(None) in kinds:
        return " (null, not None)"
    return ""


def without_none(hint: Any) -> Any:
    """``T`` of ``T | None``; other types as they are."""
    args = get_args(hint)
    return next(arg for arg in args if arg is not type(None)) if type(None) in args else hint
