"""The ``{code-cell}`` directive of MyST notebooks, shown as a code block.

``docs/tutorial.md`` is a notebook in Jupytext's MyST format. A test runs its cells; the docs show them and run nothing.
"""

from __future__ import annotations

from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.directives.code import CodeBlock


class CodeCell(CodeBlock):
    """A code block in the language of the cell: a shell for ``!``, a file's for ``%%writefile``, else Python."""

    def run(self) -> list[nodes.Node]:
        first = self.content[0]
        if first.startswith("!"):
            self.arguments = ["bash"]
        elif first.startswith("%%writefile"):
            self.arguments = ["yaml" if first.endswith(".yaml") else "python"]
            self.options["caption"] = first.split()[1]
            self.content = self.content[1:]
        return super().run()


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("code-cell", CodeCell)
    return {"parallel_read_safe": True}
