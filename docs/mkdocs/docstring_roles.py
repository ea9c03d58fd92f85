"""Extension of Griffe: the docstrings' few constructs of reStructuredText become Markdown."""

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")
BLOCK = re.compile(r"^(.*)::\n\n((?: {4,}.*\n|\n)+)", re.MULTILINE)


class DocstringRoles(Extension):
    """Turn roles such as ``:class:`~a.b.C``` and blocks after ``::`` into Markdown."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was just read."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda role: f"`{_shown(*role.groups())}`", obj.docstring.value)
            text = BLOCK.sub(_fenced, text + "\n")
            obj.docstring.value = text.rstrip()


def _shown(tilde: str, name: str) -> str:
    return name.rpartition(".")[2] if tilde else name


def _fenced(match: re.Match[str]) -> str:
    lead, block = match.groups()
    language = "python" if lead.strip() == "Example" else "text"
    return f"{lead}:\n\n```{language}\n{dedent(block).strip()}\n```\n\n"
