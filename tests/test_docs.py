"""Files that the documents link to or name exist, and the commands on clusters can be parsed."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    "file",
    ["README.md", "CONTRIBUTING.md", "docs/clusters.md", "docs/export.md", "experiments/README.md"],
)
def test_links_and_named_files_exist(file):
    text = (ROOT / file).read_text()
    links = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"\b((?:experiments|tests|segformer_pl|docs)/[\w./]+\.\w+)", text)
    base = (ROOT / file).parent
    missing = [name for name in links if not (base / name).exists()]
    missing += [name for name in named if not (ROOT / name).exists()]
    assert missing == []


@pytest.mark.slow
def test_commands_on_clusters_have_options_of_fit(monkeypatch):
    from segformer_pl.cli.training import parser  # heavy, and the other test does not need it

    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "clusters.md").read_text().replace("\\\n", "")
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    # After `fit`, or after a script and the name of the run
    start = r"segformer_pl fit|experiments/cluster/\w+\.\w+ \w+"
    options = re.findall(rf"(?:{start}) (.*)", "\n".join(blocks))
    assert len(options) == 7
    for given in options:
        line = given.replace("FILE", "experiments/demo.yaml").replace("{task}", "0")
        parser("fit").parse_args(["fit", *line.split()])
