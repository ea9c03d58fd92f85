"""Rules of which part of the package may import which. Dependencies point inwards only."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import segformer_pl
from segformer_pl.cli import COMMANDS, TRAINING_COMMANDS

PACKAGE = Path(segformer_pl.__file__).parent

LEAVES = {"models", "data", "optim", "losses", "metrics", "inference", "upsampling"}
EVERYTHING = LEAVES | {
    "ablation",
    "analysis",
    "callbacks",
    "checkpoints",
    "cli",
    "commands",
    "divergence",
    "doctor",
    "freezing",
    "metrics_log",
    "task",
}
# These import nothing of the package, and every module may import them.
FOUNDATION = {
    "atomic",
    "bands",
    "batch",
    "errors",
    "lightning_workarounds",
    "normalization",
    "video_file",
    "worker_errors",
    "yaml_file",
}
MAY_IMPORT = dict.fromkeys(LEAVES | FOUNDATION, frozenset()) | {
    # Both upsample logits in bands of rows.
    "losses": {"upsampling"},
    "inference": {"models", "upsampling"},  # of models only the contract, models.segmenter
    "checkpoints": {"models"},
    "analysis": {"models", "metrics"},
    "ablation": {"analysis", "checkpoints", "inference", "models"},
    "divergence": {"checkpoints"},
    "freezing": {"models"},  # the contract, models.segmenter
    "metrics_log": {"metrics"},
    "task": {
        "models",
        "checkpoints",
        "losses",
        "metrics",
        "metrics_log",
        "optim",
        "inference",
        "divergence",
        "freezing",
    },
    "callbacks": {"analysis", "metrics"},
    "cli": EVERYTHING,
    "doctor": {"analysis", "data", "models", "task"},
    "commands": EVERYTHING - {"cli", "doctor"},
    "__main__": {"cli"},
    "__init__": EVERYTHING,  # what it loads at import time is tested below
}
# Additional imports of single files. `data` imports none of these parts, so there is no cycle.
FILES_MAY_IMPORT = {
    "ablation/study.py": {"data"},  # the size of a data set's images, and its number of classes
    "checkpoints/run_data.py": {"data"},  # opens the data that a run was trained on
    # loads checkpoints, decodes image files, and writes a model card
    "inference/predictor.py": {"checkpoints", "data", "analysis"},
}
OUTSIDE = {"experiments", "notebooks", "tests"}


def imported(tree, path):
    """Yield the absolute dotted names of all imports in a file, also inside functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = path.with_suffix("").parts[: -node.level] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def violations(path, source):
    """Return the broken rules of a file; ``path`` starts with ``segformer_pl/``."""
    path = Path(path)
    unit = path.with_suffix("").parts[1]
    if unit not in MAY_IMPORT:
        return [f"{path}: no rule for what {unit} may import; add one to MAY_IMPORT"]
    allowed = MAY_IMPORT[unit] | FILES_MAY_IMPORT.get("/".join(path.parts[1:]), set())
    tree = ast.parse(source)
    broken = []
    for name in imported(tree, path):
        top, *rest = name.split(".")
        if top == "segformer_pl":
            other = rest[0] if rest else None
            if other in EVERYTHING and other != unit and other not in allowed:
                broken.append(f"{path}: {unit} imports {other}")
        elif top in OUTSIDE or top == "IPython" or (unit == "models" and top == "lightning"):
            broken.append(f"{path}: {unit} imports {top}")
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # noqa: SIM102
            if node.func.id in {"print", "get_ipython"}:
                broken.append(f"{path}:{node.lineno}: calls {node.func.id}")
    return broken


def test_the_package_follows_the_rules():
    files = sorted(PACKAGE.rglob("*.py"))
    assert len(files) > 10
    broken = [v for f in files for v in violations(f.relative_to(PACKAGE.parent), f.read_text())]
    assert broken == []


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
        ("metrics.py", "from segformer_pl.upsampling import SeparableMap"),
        ("upsampling.py", "from segformer_pl.losses import CrossEntropy"),
        ("metrics.py", "def f():\n    from segformer_pl.task import SegmentationTask"),
        ("analysis/erf.py", "from segformer_pl.task import SegmentationTask"),
        ("analysis/ablation.py", "from segformer_pl.ablation.study import Study"),
        ("ablation/study.py", "from segformer_pl.cli.training import resolve"),
        ("ablation/runner.py", "from segformer_pl.data.catalog import find_dataset"),
        ("ablation/runner.py", "from segformer_pl.callbacks import Interrupted"),
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
def test_a_planted_violation_is_detected(path, source):
    assert len(violations(f"segformer_pl/{path}", source)) == 1


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("models/segformer.py", "from segformer_pl.models.mit import MixTransformer"),
        ("models/segformer.py", "from .mit import MixTransformer\nfrom . import decode_head"),
        ("checkpoints/conversion.py", "from segformer_pl.checkpoints import layouts"),
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
def test_a_permitted_import_is_not_reported(path, source):
    assert violations(f"segformer_pl/{path}", source) == []


ARCHITECTURES = {"SegFormer", "MixTransformer", "AllMLPHead"}
# The networks, the layouts of other code bases, and the shortcut to single units of one head.
MAY_KNOW_ARCHITECTURES = ("models/", "checkpoints/", "analysis/erf/head_units.py")


def architecture_checks(source):
    """Yield the lines that depend on a class of network, or on an attribute of some networks."""
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


def test_only_models_and_layouts_depend_on_architectures():
    """All other modules use the contract, segformer_pl.models.segmenter."""
    checks = [
        f"{file.relative_to(PACKAGE)}:{line}"
        for file in sorted(PACKAGE.rglob("*.py"))
        if not file.relative_to(PACKAGE).as_posix().startswith(MAY_KNOW_ARCHITECTURES)
        for line in architecture_checks(file.read_text())
    ]
    assert checks == []


@pytest.mark.parametrize(
    "source",
    [
        "isinstance(network, SegFormer)",
        "isinstance(network, (nn.Linear, models.mit and MixTransformer))",
        "network.encoder.norm_eps",
        "getattr(network, 'encoder', None)",
    ],
)
def test_a_planted_architecture_check_is_detected(source):
    assert list(architecture_checks(source)) == [1]


HEAVY = {
    *("torch", "torchvision", "lightning", "torchmetrics", "timm", "transformers"),
    *("datasets", "pyarrow", "pandas", "wandb", "submitit", "rich"),
    *("matplotlib", "scipy", "sklearn", "cv2", "av", "gradio"),
}
OF_PREDICTION = {"torch", "cv2"}  # cv2 decodes images


def loaded_by(statement):
    """Return the top-level modules that a statement loads in a new process."""
    program = (
        f"import sys; before = set(sys.modules); {statement}; "
        "sys.stdout.write(' '.join(set(sys.modules) - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(done.stdout.split())


def test_importing_the_package_and_the_settings_is_cheap():
    packages = "segformer_pl, segformer_pl.analysis, segformer_pl.data, segformer_pl.inference"
    loaded = loaded_by(f"import {packages}")
    assert "segformer_pl" in loaded
    assert loaded & HEAVY == set()


def test_prediction_loads_nothing_else():
    loaded = loaded_by("import segformer_pl.models; from segformer_pl.inference import Predictor")
    assert loaded & HEAVY == OF_PREDICTION


HELP = """
import contextlib, io, sys
from segformer_pl.cli import COMMANDS, TRAINING_COMMANDS, main

for arguments in [[], ["unknown"], ["--help"], *([name, "--help"] for name in COMMANDS)]:
    if arguments and arguments[0] in TRAINING_COMMANDS:
        continue  # their help is made from the classes of Lightning
    before = set(sys.modules)
    output = io.StringIO()
    with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        try:
            main(arguments)
        except SystemExit as exit_:
            status = exit_.code
    loaded = {name.partition(".")[0] for name in set(sys.modules) - before}
    print(arguments, status or 0, output.getvalue().split()[0], *loaded, sep="\t")
"""


def test_help_and_unknown_commands_load_nothing_heavy():
    done = subprocess.run(
        [sys.executable, "-c", HELP], cwd=PACKAGE.parent, capture_output=True, text=True, check=True
    )
    lines = [line.split("\t") for line in done.stdout.splitlines()]
    assert {(status, begin) for _, status, begin, *_ in lines[:2]} == {("2", "error:")}
    assert {(status, begin) for _, status, begin, *_ in lines[2:]} == {("0", "usage:")}
    loaded = {arguments: sorted(HEAVY & set(modules)) for arguments, _, _, *modules in lines}
    assert {f"['{name}', '--help']" for name in set(COMMANDS) - set(TRAINING_COMMANDS)} < set(
        loaded
    )
    assert {arguments: modules for arguments, modules in loaded.items() if modules} == {}


@pytest.mark.slow  # the first import of Lightning
def test_the_data_module_is_found_when_it_is_used():
    from segformer_pl import data

    assert data.StreamingSegmentationData.__module__ == "segformer_pl.data.datamodule"
    with pytest.raises(ImportError, match="cannot import name 'Nothing'"):
        from segformer_pl.data import Nothing  # noqa: F401
