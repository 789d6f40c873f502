"""Find recipes and configs: the bundled ones, torchtune's, and the user's own files.

Nothing here imports torch or torchtune, so that ``tune ls`` starts fast.
"""

from __future__ import annotations

import ast
import atexit
import importlib.util
import os
import re
import runpy
import shutil
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import rolltune
from rolltune.files import home_path

PACKAGE = Path(rolltune.__file__).parent
RENAMED = {"prime": "sft"}  # recipes, old name to new


class UsageError(Exception):
    """A command that cannot be carried out. The message is for the user."""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A recipe file; ``ours`` is False for torchtune's and the user's own."""

    name: str
    path: Path
    ours: bool = True


@dataclass(frozen=True, kw_only=True)
class Config:
    """A config file; ``recipe`` is the name of the recipe that it is for, ``ours`` is False for torchtune's."""

    name: str
    path: Path
    recipe: str | None
    ours: bool = True


def recipes() -> list[Recipe]:
    return [Recipe(name=path.stem, path=path.resolve()) for path in sorted((PACKAGE / "recipes").glob("*.py"))]


def configs() -> list[Config]:
    paths = sorted((PACKAGE / "configs").glob("*.yaml"))
    return [Config(name=path.stem, path=path.resolve(), recipe=recipe_of(path)) for path in paths]


def torchtune_catalog() -> tuple[list[Recipe], list[Config]]:
    """Read torchtune's recipes and configs from its registry file, without importing torchtune."""
    spec = importlib.util.find_spec("torchtune")
    if spec is None or not spec.submodule_search_locations:
        return [], []
    package = Path(next(iter(spec.submodule_search_locations)))
    folder = package.parent / "recipes"
    registry = runpy.run_path(str(package / "_recipe_registry.py"))["_ALL_RECIPES"]
    theirs = [Recipe(name=recipe.name, path=folder / recipe.file_path, ours=False) for recipe in registry]
    their_configs = [
        Config(name=config.name, path=folder / "configs" / config.file_path, recipe=recipe.name, ours=False)
        for recipe in registry
        for config in recipe.configs
    ]
    return theirs, their_configs


# --- about a file -----------------------------------------------------------------------------------------------------


def recipe_of(path: Path) -> str | None:
    """Name the recipe in the command that a config opens with, such as ``# tune run grpo --config quickstart.yaml``."""
    for line in _opening_comments(path):
        words = line.split()
        if words[:2] == ["tune", "run"] and "--config" in words[3:]:
            return Path(words[words.index("--config") - 1]).stem
    return None


def summary_of(path: Path) -> str:
    """Return the first sentence of a recipe's docstring, or of the comments below a config's command."""
    if path.suffix == ".py":
        text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        return text.partition("\n\n")[0].replace("\n", " ")
    text = " ".join(line for line in _opening_comments(path) if not line.startswith("tune run")).strip()
    return re.split(r"(?<=\w{3}[.!])\s", text, maxsplit=1)[0]


def _opening_comments(path: Path) -> list[str]:
    lines = []
    with open(path, encoding="utf-8", errors="replace") as file:
        for line in file:
            if not line.startswith("#"):
                break
            lines.append(line.lstrip("#").strip())
    return lines


def schema_of(recipe: Path) -> type | None:
    """Find the class of :mod:`rolltune.config.schema` that a recipe file passes to ``config.main``."""
    from rolltune.config import schema

    for node in ast.walk(ast.parse(recipe.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Name):
            called = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            found = getattr(schema, node.args[0].id, None)
            if called == "main" and isinstance(found, type):
                return found
    return None


# --- by name ----------------------------------------------------------------------------------------------------------


def find_recipe(name: str) -> Recipe:
    """Find a Python file, or else a bundled recipe by name, with or without .py."""
    path = home_path(name)
    if path.suffix == ".py" and path.is_file():
        return Recipe(name=path.stem, path=path.resolve(), ours=path.resolve() in [r.path for r in recipes()])
    known = [*recipes(), *torchtune_catalog()[0]]
    for recipe in known:
        if name in (recipe.name, f"{recipe.name}.py"):
            return recipe
    if path.suffix == ".py" and os.sep in name:
        raise UsageError(f"no recipe file {name}")
    if name.removesuffix(".py") in RENAMED:
        raise UsageError(f"recipe {name} was renamed to {RENAMED[name.removesuffix('.py')]}")
    files = [file.name for file in Path().glob("*.py")]
    candidates = [*names(recipes()), *files, *names(known)]
    raise UsageError(f"no recipe {name}{_did_you_mean(name, candidates)} (tune ls lists them)")


def find_config(name: str, recipe: Recipe | None = None) -> Config:
    """Find a local file, or else a bundled config by name, with or without .yaml.

    Args:
        name: of the config or file. A pipe, and ``-`` for standard input, is read at once, into a temporary file.
        recipe: the recipe that the config is for; torchtune's configs are then left out.
    """
    if "://" in name:
        raise UsageError(f"{name}: URLs are not read; download the config and give the file")
    path = _as_path(name)
    if path.is_file():
        return Config(name=path.stem, path=path.absolute(), recipe=recipe_of(path))
    known = configs() if recipe else [*configs(), *torchtune_catalog()[1]]
    for config in known:
        if name.removesuffix(".yaml") == config.name:
            return config
    if path.suffix in (".yaml", ".yml") and os.sep in name:
        raise UsageError(f"no config file {name}{_did_you_mean(path.stem, names(configs()))}")
    files = [file.name for file in Path().glob("*.yaml")]
    candidates = [*names(configs()), *files, *names(known)]
    raise UsageError(f"no config or file {name}{_did_you_mean(name, candidates)} (tune ls lists configs)")


def _as_path(name: str) -> Path:
    """The path of a config; what can be read only once is read into a temporary file, for all processes of a run."""
    from rolltune.config.tree import is_stream, read_config

    try:
        path = Path(name) if name == "-" else home_path(name)
        if not is_stream(path):
            return path
        text = read_config(path)
    except ValueError as error:
        raise UsageError(str(error)) from None
    folder = tempfile.mkdtemp(prefix="rolltune-config-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    copy = Path(folder) / ("stdin.yaml" if name == "-" else f"{path.name}.yaml")
    copy.write_text(text, encoding="utf-8")
    return copy


def find_bundled(name: str) -> Path:
    """Return the path of a bundled recipe or config: ``grpo``, ``grpo.py``, ``quickstart``, ``quickstart.yaml``."""
    theirs, their_configs = torchtune_catalog()
    known = [*recipes(), *configs(), *theirs, *their_configs]
    for entry in known:
        if name in (entry.name, f"{entry.name}{entry.path.suffix}"):
            return entry.path
    raise UsageError(f"no recipe or config {name}{_did_you_mean(name, names(known))} (tune ls lists them)")


def names(entries: Iterable[Recipe | Config]) -> list[str]:
    return [entry.name for entry in entries]


def configs_of(recipe: str) -> str:
    """List the bundled configs of a recipe, for an error message."""
    return ", ".join(config.name for config in configs() if config.recipe == recipe) or "none is bundled"


def check_belongs(recipe: Recipe, config: Config) -> None:
    """Refuse a config whose first line runs another bundled recipe, since all its keys would look wrong."""
    if recipe.ours and config.recipe != recipe.name and config.recipe in names(recipes()):
        raise UsageError(
            f"{config.name} is a config of {config.recipe}, as its first line says; "
            f"configs of {recipe.name}: {configs_of(recipe.name)}"
        )


def _did_you_mean(name: str, candidates: Iterable[str]) -> str:
    from rolltune.config.components import did_you_mean

    return did_you_mean(name, candidates)
