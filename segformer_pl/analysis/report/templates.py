"""The templates of the pages, and how they show numbers and settings."""

import json
import math
import re
from typing import Any

import jinja2
from markupsafe import Markup, escape

from segformer_pl.analysis import style

DASH = "\u2013"
OPTION = re.compile(r"(?<![\w-])--\w[\w.-]*\w")
MINUS = re.compile(r"(?<!\S)-(?=\d)")  # a hyphen that stands for a minus


def render(template: str, **values: Any) -> str:
    """Return a page as HTML.

    Args:
        template: Name of the template.
        values: Its variables. All text in them is escaped.
    """
    # The headings of the page add themselves to the contents.
    html = _environment().get_template(template).render(style=style, contents=[], **values)
    # Ids, and names of classes and files, may contain unpaired surrogates, which UTF-8 cannot
    # encode.
    return html.encode(errors="replace").decode()


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("segformer_pl.analysis", "report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["share"] = _share
    environment.filters["setting"] = _setting
    environment.filters["decimal"] = lambda value: DASH if math.isnan(value) else f"{value:.3f}"
    environment.filters["options"] = _options
    environment.filters["minus"] = lambda text: MINUS.sub("\u2212", text)
    return environment


def _percent(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.1f}\u00a0%"


def _share(value: float) -> str:
    """Format a fraction as a percentage with two decimals, for values that can be small."""
    if math.isnan(value):
        return DASH
    return "<\u00a00.01\u00a0%" if 0 < value < 5e-5 else f"{100 * value:.2f}\u00a0%"


def _options(text: str) -> Markup:
    """Escape a text, and mark the options of commands in it, whose hyphens must not end a line."""
    marked = OPTION.sub(r'<span class="option">\g<0></span>', str(escape(text)))
    return Markup(marked)


def _setting(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 80 else f"{text[:40]}...{text[-40:]}"
