"""Who may import whom inside the package. Arrows only point from the outside in."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import segformer_pl

PACKAGE = Path(segformer_pl.__file__).parent

LEAVES = {"models", "data", "optim", "losses", "metrics", "inference", "upsampling"}
EVERYTHING = LEAVES | {
    "analysis",
    "callbacks",
    "checkpoints",
    "cli",
    "commands",
    "divergence",
    "doctor",
    "task",
}
# Below everything: they import nothing of the package, and everyone may import them.
FOUNDATION = {"atomic", "batch", "errors", "lightning_workarounds", "normalization"}
MAY_IMPORT = dict.fromkeys(LEAVES | FOUNDATION, frozenset()) | {
    # One computation under both: logits are upsampled band by band.
    "losses": {"upsampling"},
    "inference": {"models", "upsampling"},  # of models the contract
    "checkpoints": {"models"},
    "analysis": {"models", "metrics"},
    "divergence": {"checkpoints"},
    "task": {"models", "checkpoints", "losses", "metrics", "optim", "inference", "divergence"},
    "callbacks": {"analysis", "metrics"},
    "cli": EVERYTHING,
    "doctor": {"analysis", "data", "models", "task"},
    "commands": EVERYTHING - {"cli", "doctor"},
    "__main__": {"cli"},
    "__init__": EVERYTHING,  # what it may load is measured below
}
# What single files may import beyond that. `data` imports no sibling, so there is no cycle.
FILES_MAY_IMPORT = {
    "checkpoints/run_data.py": {"data"},  # opens the data that a run was trained on
    "inference/predictor.py": {"checkpoints", "data"},  # is loaded, and decodes image files
}
OUTSIDE = {"experiments", "notebooks", "tests"}


def imported(tree, path):
    """Absolute dotted names of every import in a file, those inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(path, source):
    """Broken rules of a file; ``path`` starts at the package, ``segformer_pl/...``."""
    path = Path(path)
    unit = path.with_suffix("").parts[1]
    if unit not in MAY_IMPORT:
        return [f"{path}: no rule says what {unit} may import; the design names every unit"]
    allowed = MAY_IMPORT[unit] | FILES_MAY_IMPORT.get("/".join(path.parts[1:]), set())
    tree = ast.parse(source)
    found = []
    for name in imported(tree, path):
        top, *rest = name.split(".")
        if top == "segformer_pl":
            other = rest[0] if rest else None
            if other in EVERYTHING and other != unit and other not in allowed:
                found.append(f"{path}: {unit} imports {other}")
        elif top in OUTSIDE or top == "IPython" or (unit == "models" and top == "lightning"):
            found.append(f"{path}: {unit} imports {top}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # noqa: SIM102
            if node.func.id in {"print", "get_ipython"}:
                found.append(f"{path}:{node.lineno}: calls {node.func.id}")
    return found


def test_package_keeps_the_rules():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    found = [v for f in files for v in violations(f.relative_to(PACKAGE.parent), f.read_text())]
    assert found == []


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/mit.py", "from segformer_pl.data import LabelSpec"),
        ("models/mit.py", "from ..data.labels import LabelSpec"),
        ("atomic.py", "from segformer_pl.data import LabelSpec"),
        ("models/__init__.py", "from ..losses import cross_entropy"),
        ("models/mit.py", "import segformer_pl.optim as o"),
        ("models/segformer.py", "import lightning.pytorch as pl"),
        ("models/segformer.py", "from segformer_pl.checkpoints import convert"),
        ("checkpoints/loading.py", "from segformer_pl.task import SegmentationTask"),
        ("checkpoints/loading.py", "from segformer_pl.data import LabelSpec"),
        ("checkpoints/run_checkpoint.py", "from segformer_pl.data import LabelSpec"),
        ("checkpoints/run_data.py", "from segformer_pl.task import SegmentationTask"),
        ("inference/engine.py", "from segformer_pl.checkpoints import load_network"),
        ("inference/predictor.py", "from segformer_pl.task import SegmentationTask"),
        ("normalization.py", "from segformer_pl.data import LabelSpec"),
        ("errors.py", "from segformer_pl.data import LabelSpec"),
        ("batch.py", "from segformer_pl.data import LabelSpec"),
        ("commands.py", "from segformer_pl.cli import main"),
        ("losses.py", "from segformer_pl import inference"),
        ("losses.py", "from . import inference"),
        ("metrics.py", "from segformer_pl.upsampling import bands"),
        ("upsampling.py", "from segformer_pl.losses import CrossEntropy"),
        ("metrics.py", "def f():\n    from segformer_pl.task import SegmentationTask"),
        ("analysis/erf.py", "from segformer_pl.task import SegmentationTask"),
        ("callbacks/erf.py", "from segformer_pl.data.catalog import find_dataset"),
        ("callbacks/erf.py", "from segformer_pl.models import SegFormer"),
        ("task.py", "from segformer_pl.data import LabelSpec"),
        ("task.py", "from segformer_pl.cli import main"),
        ("__main__.py", "from segformer_pl.task import SegmentationTask"),
        ("cli.py", "from tests.conftest import randomize"),
        ("cli.py", "import notebooks"),
        ("cli.py", "print('hello')"),
        ("analysis/erf.py", "from IPython.display import display"),
        ("utils.py", ""),
    ],
)
def test_planted_violation_is_found(path, source):
    assert len(violations(f"segformer_pl/{path}", source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/segformer.py", "from segformer_pl.models.mit import MixTransformer"),
        ("models/segformer.py", "from .mit import MixTransformer\nfrom . import decode_head"),
        ("checkpoints/export.py", "from segformer_pl.checkpoints import layouts"),
        ("analysis/erf.py", "from segformer_pl.models import SegFormer"),
        ("checkpoints/run_data.py", "from segformer_pl.data import StreamingSegmentationData"),
        ("inference/engine.py", "from segformer_pl.models.segmenter import Output"),
        ("inference/predictor.py", "from segformer_pl.data.decoding import EncodedImage"),
        ("data/sources.py", "from segformer_pl.atomic import atomic_write"),
        ("task.py", "from segformer_pl.losses import cross_entropy\nimport lightning"),
        ("callbacks/erf.py", "from segformer_pl.analysis.erf import plot_erf"),
        ("cli.py", "from segformer_pl import __version__, data, task\nimport torch.utils.data"),
        ("task.py", '"""Mentions print() only."""\nself.print("x")'),
    ],
)
def test_permitted_import_is_not_reported(path, source):
    assert violations(f"segformer_pl/{path}", source) == []


ARCHITECTURES = {"SegFormer", "MixTransformer", "AllMLPHead"}
# Networks themselves, foreign layouts, and the shortcut to single units of one head.
MAY_KNOW_ARCHITECTURES = ("models/", "checkpoints/", "analysis/erf/head_units.py")


def asks_for_an_architecture(source):
    """Lines that ask for a class of network, or for an attribute that some networks have."""
    for node in ast.walk(ast.parse(source)):
        is_check = (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"isinstance", "issubclass"}
            and ARCHITECTURES & {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)}
        )
        is_attribute = isinstance(node, ast.Attribute) and node.attr == "encoder"
        is_text = (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Name)
            and node.func.id in {"getattr", "hasattr"}
            and isinstance(node.args[1], ast.Constant)
            and node.args[1].value in {"encoder", "stages", "blocks"}
        )
        if is_check or is_attribute or is_text:
            yield node.lineno


def test_only_models_and_foreign_layouts_know_architectures():
    """Everyone else reads the contract, segformer_pl.models.segmenter."""
    found = [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if not file.relative_to(PACKAGE).as_posix().startswith(MAY_KNOW_ARCHITECTURES)
        for line in asks_for_an_architecture(file.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(network, SegFormer)",
        "isinstance(network, (nn.Linear, models.mit and MixTransformer))",
        "network.encoder.norm_eps",
        "getattr(network, 'encoder', None)",
    ],
)
def test_asking_for_an_architecture_is_found(source):
    assert list(asks_for_an_architecture(source)) == [1]


def test_importing_the_package_is_cheap():
    heavy = {"torch", "torchvision", "lightning", "timm", "datasets", "wandb", "matplotlib"}
    program = (
        "import sys; before = set(sys.modules); import segformer_pl; "
        "sys.stdout.write(' '.join(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    loaded = set(done.stdout.split())
    assert "segformer_pl" in loaded
    assert loaded & heavy == set()
