"""The ``{code-cell}`` directive of MyST notebooks, shown as a code block.

``docs/tutorial.md`` is a notebook in Jupytext's MyST format. A test runs its cells; the docs show them and run nothing.
"""

from typing import Any

from sphinx.application import Sphinx
from sphinx.directives.code import CodeBlock


class CodeCell(CodeBlock):
    pass


def setup(app: Sphinx) -> dict[str, Any]:
    app.add_directive("code-cell", CodeCell)
    return {"parallel_read_safe": True}
