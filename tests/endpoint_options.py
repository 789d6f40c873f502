"""Options of a component with those of its endpoint under one key, as a config or as arguments."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from rolltune.endpoints.settings import EndpointSettings

KEYS = {field.name for field in fields(EndpointSettings)}


def as_config(**options: Any) -> dict[str, Any]:
    """``base_url="u", cache="c"`` -> ``{"endpoint": {"base_url": "u"}, "cache": "c"}``"""
    endpoint = {name: value for name, value in options.items() if name in KEYS}
    return {"endpoint": endpoint} | {name: value for name, value in options.items() if name not in KEYS}


def as_arguments(**options: Any) -> dict[str, Any]:
    """As :func:`as_config`, with :class:`EndpointSettings` in place of the mapping."""
    config = as_config(**options)
    return config | {"endpoint": EndpointSettings(**config["endpoint"])}
