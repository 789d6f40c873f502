"""Directives that write reference tables at build time, so that no table can lag behind the code.

- ``{config-keys} GRPOConfig``: the keys of a recipe's config, with defaults and meanings, from the schema;
- ``{bundled-configs}``: every file of ``configs/`` by recipe, with the comment that it opens with.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from rolltune.config import schema
from rolltune.config.explain import explained_keys

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
RECIPES = (
    "grpo sft evaluate write_traces write_rubrics lint_rubrics audit_rewards audit_judge serve".split()
)  # in the order in which a reader meets them


class ConfigKeys(SphinxDirective):
    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        self.env.note_dependency(schema.__file__)
        rows = []
        for left, meaning in explained_keys(getattr(schema, self.arguments[0])):
            key, _, default = left.partition(":")
            rows.append(([nodes.literal(text=key)], literal(default.strip()), text(meaning)))
        return [table(("Key", "Default", "Meaning"), rows, widths=(32, 22, 46))]


class BundledConfigs(SphinxDirective):
    def run(self) -> list[nodes.Node]:
        by_recipe: dict[str, list] = defaultdict(list)
        for path in sorted(CONFIGS.glob("*.yaml")):
            self.env.note_dependency(str(path))
            recipe, words = header(path)
            by_recipe[recipe].append((literal(path.stem), text(words)))
        found: list[nodes.Node] = []
        for recipe in [*RECIPES, *sorted(by_recipe.keys() - set(RECIPES))]:
            found.append(nodes.rubric("", "", nodes.literal(text=recipe)))
            found.append(table(("Config", "Purpose"), by_recipe[recipe], widths=(32, 68)))
        return found


def header(path: Path) -> tuple[str, str]:
    """The recipe that a config is for, and the comment below its command."""
    command, *rest = path.read_text().splitlines()
    match = re.match(r"# tune run (\w+) --config ", command)
    if match is None:
        raise ValueError(f"{path}: line 1: {command!r}; must be '# tune run <recipe> --config {path.name}'")
    comment = []
    for line in rest:
        if not line.startswith("#"):
            break
        comment.append(line.removeprefix("#").strip())
    return match[1], " ".join(filter(None, comment))


def table(head: Sequence[str], rows: Sequence[Sequence[list[nodes.Node]]], *, widths: Sequence[int]) -> nodes.table:
    group = nodes.tgroup("", *(nodes.colspec(colwidth=width) for width in widths), cols=len(widths))
    group += nodes.thead("", row([[nodes.Text(name)] for name in head]))
    group += nodes.tbody("", *map(row, rows))
    return nodes.table("", group)


def row(cells: Sequence[list[nodes.Node]]) -> nodes.row:
    return nodes.row("", *(nodes.entry("", nodes.paragraph("", "", *cell)) for cell in cells))


def literal(value: str) -> list[nodes.Node]:
    return [nodes.literal(text=value)] if value else []


def text(words: str) -> list[nodes.Node]:
    """Plain words, with what stands in backticks as code."""
    parts = re.split(r"`([^`]+)`", words)
    return [nodes.literal(text=part) if i % 2 else nodes.Text(part) for i, part in enumerate(parts)]


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("config-keys", ConfigKeys)
    app.add_directive("bundled-configs", BundledConfigs)
    return {"parallel_read_safe": True}
