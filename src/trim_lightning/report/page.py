"""From facts to a page: one file, no network, nothing from data that a browser would obey."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Mapping
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from trim_lightning.console.amounts import size_text, time_text
from trim_lightning.console.visible import _UNSEEN, visible

HOME = Path(__file__).parent
SCRIPTS = ("base.js", "selection.js", "comparison.js", "start.js")  # one after the other
METHOD_NAMES = {
    "trim": "TRIM", "trim_plus": "TRIM+", "random": "chance", "full": "taking all", "longest": "length",
    "bm25": "BM25", "dsir": "DSIR", "embedding": "sentence embeddings", "rds": "RDS+", "perplexity": "perplexity",
    "ifd": "IFD", "less": "LESS", "s2l": "S2L", "tagcos": "TAGCOS", "cld": "CLD",
}  # fmt: skip


def render(page: str, values: Mapping[str, Any], data: Any) -> str:
    """Fill a page's template.

    Args:
        page: Name of the template.
        values: What it shows itself; escaped.
        data: JSON-able; what the page's script shows.
    """
    template = environment().get_template(f"{page}.html.j2")
    shown = {"page": page, "version": version("trim-lightning"), "data": Markup(data_block(data))}
    return template.render(**values, **page_assets(), **shown)


def digest(text: str) -> str:
    """sha256 as a content security policy names it."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


@lru_cache(maxsize=1)
def page_assets() -> dict[str, str]:
    """The style and the scripts that every page carries, by their names in the template; read once for all jobs.

    ``plot`` is Observable Plot, bundled; ``policy`` lets the two scripts run and nothing else, and fetches nothing.
    """
    css, plot, *own = (
        Markup((HOME / "assets" / name).read_text(encoding="utf-8"))  # ours, and no data
        for name in ("page.css", "plot.min.js", *SCRIPTS)
    )
    script = Markup(f'"use strict";\n(() => {{\n{"".join(own)}}})();\n')  # a scope of its own: `name` is the window's
    hashes = " ".join(f"'sha256-{digest(text)}'" for text in (plot, script))
    policy = (
        f"default-src 'none'; script-src {hashes}; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; "
        "form-action 'none'"
    )
    return {"css": css, "plot": plot, "script": script, "policy": policy}


@lru_cache(maxsize=1)
def environment() -> jinja2.Environment:
    """Templates with autoescape, and our filters."""
    made = jinja2.Environment(
        loader=jinja2.FileSystemLoader(HOME / "templates"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    made.filters.update(
        visible=lambda value: visible(str(value)),
        token=token_text,
        num=lambda value: "–" if value is None else f"{value:,}",
        fixed=fixed,
        duration=time_text,
        size=size_text,
    )
    return made


def fixed(value: float | None, digits: int) -> str:
    """A number with so many decimals, a dash for none."""
    if value is None:
        return "–"
    return f"{round(value, digits) + 0.0:,.{digits}f}"  # no minus zero


def token_text(text: str) -> str:
    """A token whose white space can be seen."""
    return visible(text).replace(" ", "␣").replace("\n", "↵").replace("\t", "⇥")


def pretty(value: Any) -> str:
    """JSON to be read."""
    return json.dumps(value, indent=2, ensure_ascii=False)


_UNSAFE = re.compile(f"[<{_UNSEEN}]")


def data_block(value: Any) -> str:
    """JSON for a ``<script type="application/json">`` block.

    No ``<`` stands in it, so that nothing can end the block or open a comment; control and direction characters are
    written as escapes. All other text stands as it is, so that the file can be searched.
    """
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return _UNSAFE.sub(lambda found: _escape(ord(found.group())), text)


def _escape(code: int) -> str:
    if code > 0xFFFF:
        high, low = divmod(code - 0x10000, 0x400)
        return f"\\u{0xD800 + high:04x}\\u{0xDC00 + low:04x}"
    return f"\\u{code:04x}"
