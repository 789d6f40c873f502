"""The shape of the code: recipes stay readable, the links work, every file can say what it is for."""

import ast
import os

import pytest
from repo import ROOT

RECIPES = sorted((ROOT / "recipes").glob("*.py"))
SOURCES = [*RECIPES, *(path for folder in ("src", "rewards", "data") for path in sorted((ROOT / folder).rglob("*.py")))]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_has_no_function_over_80_lines(path):
    source = path.read_text()
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno is not None
            assert node.end_lineno - node.lineno < 80, f"{path.name}:{node.name} is longer than 80 lines"
    assert ast.get_docstring(tree), "a recipe opens with what of the method it keeps and drops"


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_module_has_a_docstring(path):
    source = path.read_text()
    assert not source.strip() or ast.get_docstring(ast.parse(source))


@pytest.mark.parametrize("name", ["recipes", "configs", "rewards", "data"])
def test_links_are_relative_and_whole(name):
    link = ROOT / "src/rolltune" / name
    assert link.is_symlink() and os.readlink(link) == f"../../{name}"
    assert link.resolve() == (ROOT / name).resolve()


def test_recipes_hold_no_helper_modules():
    """Under torchrun the folder of the recipe heads sys.path: a helper called datasets.py would shadow the library."""
    assert {path.stem for path in RECIPES} == {
        "grpo",
        "sft",
        "evaluate",
        "write_traces",
        "write_rubrics",
        "serve",
        "audit_rewards",
        "audit_judge",
        "lint_rubrics",
    }


def test_nothing_imports_what_torchtune_did_not_ship():
    for path in SOURCES:
        assert "torchtune.dev" not in path.read_text()
