"""Extension of Griffe: what the docstrings have of reStructuredText becomes Markdown."""

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

ROLE = re.compile(r":(?:class|func|meth|mod|data|attr|exc):`(~?)([\w.]+)`")
SESSION = re.compile(r"^Example:\n(?= +>>>)", re.MULTILINE)
# Indented lines after `::`, and the table of shapes after `Shapes:`
BLOCK = re.compile(r"^(.*:):\n\n((?: {4,}.*\n|\n)+)|^(Shapes\b.*:)\n((?: {4,}.*\n)+)", re.MULTILINE)


class DocstringRoles(Extension):
    """Rewrite roles such as ``:class:`~a.b.C```, and keep the line breaks of indented blocks."""

    def on_object(self, *, obj: Object, **kwargs: Any) -> None:
        """Rewrite the docstring of an object that was just read."""
        if obj.docstring is not None:
            text = ROLE.sub(lambda role: f"`{_shown(*role.groups())}`", obj.docstring.value)
            text = SESSION.sub("Examples:\n", text)
            obj.docstring.value = BLOCK.sub(_fenced, text + "\n").rstrip()


def _shown(tilde: str, name: str) -> str:
    return name.rpartition(".")[2] if tilde else name


def _fenced(match: re.Match[str]) -> str:
    lead, block = match[1] or match[3], match[2] or match[4]
    language = "python" if lead == "Example:" else "text"
    return f"{lead}\n\n```{language}\n{dedent(block).strip()}\n```\n\n"
