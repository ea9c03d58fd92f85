"""Names of classes, images and files are shown as text and never interpreted as markup."""

import json

import numpy as np
import pytest
import yaml
from matplotlib.figure import Figure
from PIL import Image

from segformer_pl.analysis.overlays import draw_overlay
from segformer_pl.analysis.run import Run
from segformer_pl.analysis.style import printable
from segformer_pl.cli import main
from tests.tiny_network import TINY_OPTION

CLASSES = [
    "$\\frac{a}$",
    "Ünïcödé 道路",
    "<script>alert(1)</script>",
    "[/bold] [red]",
    "&amp;&lt;b&gt;",
    "\u202eright to left",
    "_background_",
    "long " * 40,
    "100 % {x} \\undefined",
]
IDS = ["$x_{1", "$\\bad{$", "a\nb", "<b>&", "\u202egnp.tac", "label", "x" * 5000, "[/i]", "a,b\"'"]
COLORS = [[20 * n, 255 - 20 * n, 7 * n] for n in range(len(CLASSES))]


@pytest.fixture(scope="module")
def data(tmp_path_factory, row, write_shards):
    folder = tmp_path_factory.mktemp("data")
    rows = [row(name, n, (32, 32)) for n, name in enumerate(IDS)]
    write_shards(folder / "shards", "train", [rows])
    write_shards(folder / "shards", "validation", [rows])
    entry = {
        "image_column": "image",
        "label_column": "label",
        "id_column": "id",
        "labels": {"names": CLASSES, "colors": COLORS},
    }
    (folder / "$odd$ [x].yaml").write_text(yaml.safe_dump(entry))
    return folder


@pytest.mark.slow
@pytest.mark.filterwarnings("error:no figure")
@pytest.mark.filterwarnings("error:The report could not")
def test_a_run_and_its_evaluation_by_other_commands(data, tmp_path, capsys):
    settings = {
        "model.network": TINY_OPTION,
        "model.warmup_steps": 1,
        "data.dataset": data / "$odd$ [x].yaml",
        "data.path": data / "shards",
        "data.batch_size": 3,
        "data.num_workers": 0,
        "trainer.accelerator": "cpu",
        "trainer.max_steps": 2,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.num_sanity_val_steps": 0,
        "trainer.enable_progress_bar": "false",
        "trainer.enable_model_summary": "false",
        "trainer.logger.save_dir": tmp_path,
    }
    arguments = [f"--{key}={value}" for key, value in settings.items()]
    figures = ["PredictionPanel", "EffectiveReceptiveField"]
    added = [f"--trainer.callbacks+=segformer_pl.callbacks.{name}" for name in figures]
    main(["fit", *arguments, *added])
    run_dir = next(tmp_path.glob("*/version_0"))
    for name in ("predictions", "worst", "erf"):
        assert (run_dir / name / "step_0000002.png").is_file(), name
    assert Run(run_dir).last_evaluation().ids == IDS
    assert Run(run_dir).last_evaluation().class_names == CLASSES
    page = (run_dir / "report.html").read_text()
    assert "<script>" not in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "$\\frac{a}$" in page

    checkpoint = run_dir / "checkpoints" / "last.ckpt"
    capsys.readouterr()
    main(["validate", *arguments, f"--ckpt_path={checkpoint}"])  # prints a table with all classes
    assert "val/iou/[/bold] [red]" in capsys.readouterr().out.replace("\n", "")

    images = tmp_path / "images"
    images.mkdir()
    files = ["$x_{1", "a\nb", "\u202egnp", "n" * 240, "<b>", "\x1b[31m", os_name(b"\xff\xfe")]
    for name in files:
        Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(images / f"{name}.png")
    out = tmp_path / "out"
    main(["predict", f"--ckpt={checkpoint}", f"--input={images}", f"--output={out}"])
    for kind in ("masks", "overlays"):
        assert {file.stem for file in (out / kind).iterdir()} == set(files)

    against = checkpoint.with_name("$\\bad{$.ckpt")
    against.write_bytes(checkpoint.read_bytes())
    main(
        [
            *("erf", f"--ckpt={checkpoint}", f"--against={against}", "--num_images=1"),
            f"--output={tmp_path / 'erf'}",
        ]
    )
    assert len(list((tmp_path / "erf").glob("*.png"))) == 4
    assert json.loads((tmp_path / "erf" / "erf.json").read_text())["image_ids"] == [IDS[0]]


def os_name(name):
    """A file name that is not UTF-8, as Python represents it."""
    return name.decode("utf-8", errors="surrogateescape")


def test_overlay_with_classes_of_any_name():
    names = [*CLASSES, "half \udcff of a pair", ""]
    colors = [*COLORS, [1, 2, 3], [4, 5, 6]]
    ids = np.arange(len(names), dtype=np.uint8).repeat(8).reshape(-1, 8)
    assert draw_overlay(np.zeros((*ids.shape, 3), np.uint8), ids, names, colors).width > 8


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("r\u00e9sum\u00e9 \u4e2d\u6587 \u0634\u0647\u0631", None),
        ("a\nb\x1b", "a\\nb\\x1b"),
        ("\u202ecat", "\\u202ecat"),
        ("\udcff", "\\udcff"),
        ("\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", None),  # Persian needs the joiner
        ("0123456789" * 3, "0123\u20266789"),
    ],
)
def test_text_for_one_line(text, shown):
    limit = 9 if shown and "\u2026" in shown else 200
    assert printable(text, limit) == (text if shown is None else shown)
    Figure().text(0, 0, printable("$\\bad{$ " + text), parse_math=False)
