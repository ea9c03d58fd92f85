"""Files that the documents link to or name exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("file", ["README.md", "CONTRIBUTING.md", "experiments/README.md"])
def test_links_and_named_files_exist(file):
    text = (ROOT / file).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"\b((?:experiments|tests|segformer_pl|docs)/[\w./]+\.\w+)", text)
    base = (ROOT / file).parent
    missing = [name for name in links if not (base / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []
