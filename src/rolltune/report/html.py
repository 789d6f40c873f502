"""A report as one HTML file that needs no network and runs no script but its own.

Texts of models are untrusted. They are in the file as JSON, in which nothing can end the element around it, and the
script shows them as text. The content security policy admits the page's own scripts and styles by their hashes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from functools import lru_cache
from pathlib import Path
from typing import Any

from jinja2 import Environment
from markupsafe import Markup

from rolltune.files import finite
from rolltune.report.page import Page

HERE = Path(__file__).parent
SCRIPTS = ("vendor/uPlot.iife.min.js", "report.js")
STYLES = ("vendor/uPlot.min.css", "report.css")


def render(page: Page, *, watch: bool = False) -> str:
    """Render a report as HTML.

    Args:
        page: the content.
        watch: render the page that :mod:`rolltune.report.serve` serves: it loads the texts of samples when they are
            shown, and looks for news.
    """
    scripts, styles = [_asset(name) for name in SCRIPTS], [_asset(name) for name in STYLES]
    packs = {} if watch or page.samples is None else page.samples.packs
    return _template().render(
        title=page.title,
        watch=watch,
        data=Markup(json_in_html(page.data())),
        packs={key: base64.b64encode(pack.data).decode() for key, pack in packs.items()},
        scripts=[Markup(text) for text in scripts],
        styles=[Markup(text) for text in styles],
        policy=_policy(scripts, styles, watch=watch),
    )


def json_in_html(value: Any) -> str:
    r"""Format a value as JSON that is inert anywhere in an HTML file: without ``<``, ``>``, ``&`` and non-ASCII.

    Example:
        >>> json_in_html("</script>&")
        '"\\u003c/script\\u003e\\u0026"'
    """
    text = json.dumps(finite(value), ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _policy(scripts: list[str], styles: list[str], *, watch: bool) -> str:
    connect = "; connect-src 'self'" if watch else ""
    return (
        f"default-src 'none'; script-src {_hashes(scripts)}; style-src {_hashes(styles)}; base-uri 'none'; "
        f"form-action 'none'{connect}"
    )


def _hashes(texts: list[str]) -> str:
    digests = (base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in texts)
    return " ".join(f"'sha256-{digest}'" for digest in digests)


@lru_cache
def _asset(name: str) -> str:
    return (HERE / name).read_text(encoding="utf-8")


@lru_cache
def _template() -> Any:
    return Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True).from_string(_asset("template.html.jinja"))
