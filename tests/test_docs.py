"""Links of the documents resolve, the README is short, the ledger keeps its form."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
    ROOT / "experiments" / "README.md",
    ROOT / "experiments" / "results" / "erf_definitions" / "README.md",
]
FENCE = re.compile(r"^```.*?^```\n?", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)\s]+)\)")

each_document = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def slug(heading):
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def anchors(document):
    """Return the anchors of a document's headings, as GitHub and the site form them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", document.read_text()), re.MULTILINE)
    return {slug(heading) for heading in headings}


def dead_links(document):
    """Return the relative links of a document whose file or anchor does not exist."""
    dead = []
    for link in LINK.findall(FENCE.sub("", document.read_text())):
        name, _, anchor = link.partition("#")
        target = document.parent / name if name else document
        is_alive = target.exists() and (not anchor or anchor in anchors(target))
        if ":" not in link and not is_alive:
            dead.append(link)
    return dead


@each_document
def test_links_and_anchors_resolve(document):
    assert dead_links(document) == []


def test_dead_links_are_found(tmp_path):
    (tmp_path / "other.md").write_text("# What `it` is\n```\n# no heading\n```\n")
    page = tmp_path / "page.md"
    links = ["other.md", "other.md#what-it-is", "https://example.org/gone", "#page"]
    dead = ["gone.md", "other.md#no-heading", "#nowhere"]
    page.write_text("# Page\n" + "\n".join(f"[link]({link})" for link in links + dead))
    assert dead_links(page) == dead


@each_document
def test_named_files_exist(document):
    named = r"\b((?:experiments|tests|segformer_pl|docs)/[\w./]+\.\w+)"
    text = LINK.sub("", document.read_text())
    assert [name for name in re.findall(named, text) if not (ROOT / name).exists()] == []


def words(markdown):
    """Return what a reader reads as a word: all that holds a letter or digit, code and tables too.

    A link counts as its text, an image as its caption.
    """
    shown = LINK.sub("]", markdown)
    return [word for word in re.split(r"[\s|]+", shown) if re.search(r"[^\W_]", word)]


def test_readme_takes_two_minutes():
    """At 240 words a minute; code and tables are not read but looked up."""
    readme = (ROOT / "README.md").read_text()
    assert len(words(readme)) < 900
    prose = re.sub(r"^\|.*\n", "", FENCE.sub("", readme), flags=re.MULTILINE)
    assert len(words(prose)) < 2 * 240


@each_document
def test_table_rows_are_short(document):
    rows = [line for line in document.read_text().splitlines() if line.startswith("|")]
    assert [row for row in rows if len(row) > 400] == []


def test_site_has_every_page():
    listed = re.findall(r"\b[\w/]+\.md$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    pages = {path.relative_to(ROOT).as_posix() for path in DOCUMENTS}
    assert sorted(listed) == sorted(pages - {"experiments/results/erf_definitions/README.md"})


# The ledger

LEDGER = (ROOT / "experiments" / "README.md").read_text()
SUMMARY, ENTRIES = re.split(r"^(?=## 2)", LEDGER, maxsplit=1, flags=re.MULTILINE)


def entries():
    """Return the text of every entry by its anchor."""
    parts = re.split(r"^### (.*)\n", ENTRIES, flags=re.MULTILINE)
    return {slug(title): text for title, text in zip(parts[1::2], parts[2::2], strict=True)}


def test_entries_are_dated_and_complete():
    dates = re.findall(r"^## (.*)$", ENTRIES, re.MULTILINE)
    assert dates == sorted(dates, reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d", date) for date in dates)
    assert len(entries()) == len(re.findall(r"^### ", ENTRIES, re.MULTILINE))
    for anchor, text in entries().items():
        for part in (
            "**Question.** ",
            "\n- Command: ",
            "\n- Commit ",
            " hardware: ",
            "**Result.**",
        ):
            assert text.count(part) == 1, f"{anchor}: {part!r}"


def test_current_figures_are_those_of_their_entries():
    rows = re.findall(
        r"^\| ([^|]+) \| ([^|]+) \| \[[^\]]+\]\(#([^)]+)\) \|$", SUMMARY, re.MULTILINE
    )
    assert len(rows) > 40
    number = r"[-+]?\d+(?:\.\d+)?"
    for question, figure, anchor in rows:
        own_links = re.findall(r"\(#([^)]+)\)", figure)
        text = " ".join(entries()[name] for name in (anchor, *own_links))
        figures = set(re.findall(number, LINK.sub("]", figure)))
        assert figures <= set(re.findall(number, text)), question
