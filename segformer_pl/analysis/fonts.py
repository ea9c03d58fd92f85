"""Fonts for letters that the font of the figures lacks, such as those of Chinese class names.

Matplotlib draws with DejaVu Sans, which has no letters of East and South Asia, and Pillow with one
font only. Where DejaVu Sans lacks a letter, an installed font that has it is used for this letter.
Letters that no installed font has become escapes such as ``\\u9053``, and a warning says which
package has them.
"""

import unicodedata
import warnings
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import FontEntry, findfont, findSystemFonts, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

OWN = str(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf")  # comes with matplotlib
# Fonts with boxes in place of letters, and of emoji that matplotlib cannot draw
UNUSABLE = ("Last Resort", "LastResort", "Color")
EAST_ASIAN = ("CJK", "HIRAGANA", "KATAKANA", "HANGUL", "BOPOMOFO", "FULLWIDTH", "IDEOGRAPHIC")


class Piece(NamedTuple):
    """Text in one font, with the path of the font's file."""

    text: str
    file: str


def fit_text(figure: Figure) -> Figure:
    """Give every text of a complete figure fonts that have its letters.

    Letters that no installed font has are escaped. A figure of a page needs none of this
    (:func:`~.style.inline_svg`): the browser has fonts of its own.

    Returns:
        The same figure.
    """
    for drawn in figure.findobj(Text):
        text = drawn.get_text()
        if text.isascii():
            continue
        lacking = _lacking(findfont(drawn.get_fontproperties()), text)
        fonts, unknown = _search("".join(sorted(lacking)))
        if fonts:
            families = [name for name in drawn.get_fontfamily() if name]
            drawn.set_fontfamily([*families, *(font.name for font in fonts)])
        if unknown:
            _warn(unknown)
            drawn.set_text(escaped(text, unknown))
    return figure


def split(text: str) -> list[Piece]:
    """Split a text into pieces with a font for each, where letters that no font has are escaped."""
    lacking = _lacking(OWN, text)
    fonts, unknown = _search("".join(sorted(lacking)))
    if unknown:
        _warn(unknown)
        text = escaped(text, unknown)
    pieces: list[Piece] = []
    for letter in text:
        file = OWN
        if letter in lacking:
            file = next(font.fname for font in fonts if _has(font.fname, letter))
        if pieces and pieces[-1].file == file:
            letter = pieces.pop().text + letter
        pieces.append(Piece(letter, file))
    return pieces


def escaped(text: str, letters: Iterable[str]) -> str:
    """Replace letters by their escapes, such as ``\\u9053``."""
    return text.translate({ord(letter): ascii(letter)[1:-1] for letter in letters})


def _lacking(file: str, text: str) -> set[str]:
    """Return the letters of a text for which a font has no glyph but needs one."""
    return {
        letter
        for letter in set(text)
        # Spaces and characters of format, such as joiners, are not drawn.
        if not (letter.isascii() or letter.isspace() or unicodedata.category(letter) == "Cf")
        and not _has(file, letter)
    }


@cache
def _search(letters: str) -> tuple[list[FontEntry], frozenset[str]]:
    """Return installed fonts that have letters, as few as possible, and the letters in none."""
    fonts, left = [], set(letters)
    candidates = list(_installed()) if left else []
    while left:
        best = max(candidates, key=lambda font: len(_of(font, left)), default=None)
        found = set() if best is None else _of(best, left)
        if best is None or not found:
            break
        fonts.append(best)
        left -= found
    return fonts, frozenset(left)


def _installed() -> Iterator[FontEntry]:
    """Yield the installed fonts, those first that resemble matplotlib's own.

    Matplotlib's list of fonts is a cache, which lacks what was installed since.
    """
    known = {entry.fname for entry in fontManager.ttflist}
    for file in findSystemFonts():
        if file not in known:
            try:
                fontManager.addfont(file)
            except (OSError, RuntimeError):  # damaged, or a format that matplotlib cannot read
                continue

    def order(font: FontEntry) -> tuple[bool, int, bool, str]:
        weight = font.weight if isinstance(font.weight, int) else 400
        return font.style != "normal", abs(weight - 400), "Serif" in font.name, font.name

    seen = set()
    for font in sorted(fontManager.ttflist, key=order):
        is_usable = not any(name in font.name for name in UNUSABLE)
        if is_usable and font.fname not in seen:  # its other names and faces have no other letters
            seen.add(font.fname)
            yield font


def _of(font: FontEntry, letters: Iterable[str]) -> set[str]:
    return {letter for letter in letters if _has(font.fname, letter)}


def _has(file: str, letter: str) -> bool:
    font = _open(file)
    return font is not None and font.get_char_index(ord(letter)) != 0


@cache
def _open(file: str) -> FT2Font | None:
    try:
        return FT2Font(file)
    except (OSError, RuntimeError):
        return None


@cache
def _warn(letters: frozenset[str]) -> None:
    """Warn of letters that no font has, once."""
    names = [unicodedata.name(letter, "") for letter in letters]
    package = "fonts-noto-cjk" if any(n.startswith(EAST_ASIAN) for n in names) else "fonts-noto"
    shown = "".join(sorted(letters))
    warnings.warn(
        f"no installed font has the letters {shown!r}, so figures show them as "
        f"{escaped(shown[:2], shown[:2])}; install a font that has them, such as the package "
        f"{package} of Debian and Ubuntu",
        stacklevel=3,
    )
