"""A recipe's config: YAML and ``key=value`` to a checked dataclass, or a list of what is wrong with it."""

from rolltune.config.command_line import format_mistakes, main, parse_args
from rolltune.config.explain import explain
from rolltune.config.load import Check, all_keys, dump, load, read_saved, read_yaml, save, validate, with_defaults
from rolltune.errors import ConfigError

__all__ = [
    "Check",
    "ConfigError",
    "all_keys",
    "dump",
    "explain",
    "format_mistakes",
    "load",
    "main",
    "parse_args",
    "read_saved",
    "read_yaml",
    "save",
    "validate",
    "with_defaults",
]
