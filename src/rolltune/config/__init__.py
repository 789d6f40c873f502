"""A recipe's config: from YAML and ``key=value`` to a checked dataclass, or to a list of mistakes."""

from rolltune.config.command_line import format_mistakes, main, parse_args
from rolltune.config.explain import explain
from rolltune.config.load import Check, all_keys, dump, load, read_saved, save, validate, with_defaults
from rolltune.config.secrets import masked
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
    "masked",
    "parse_args",
    "read_saved",
    "save",
    "validate",
    "with_defaults",
]
