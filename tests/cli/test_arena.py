"""``arena`` with real trainings of small networks: what it measures, once, and what it cannot."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml

from segformer_pl.ablation.study import read_study
from segformer_pl.analysis.run import Run
from segformer_pl.cli import main
from segformer_pl.cli.arena import _images
from segformer_pl.cli.training import resolve

pytestmark = pytest.mark.slow

STUDIES = Path(__file__).parents[2] / "experiments" / "arena"
SYSTEMS = {"segformer_b0", "setr_pup", "setr_mla", "maskformer_r18", "semask_fpn"}
SYSTEMS |= {"deeplabv3plus_r18"}


def write_study(folder, data, **entries):
    """Write a study of two systems on a small data set; -> the study file."""
    base = {
        "trainer": {
            "max_steps": 1,
            "val_check_interval": 1,
            "limit_val_batches": 1,
            "num_sanity_val_steps": 0,
            "accelerator": "cpu",
            "enable_model_summary": False,
        },
        "model": {"network": {"class_path": "arena_networks.Small"}, "warmup_steps": 1},
        "data": {"path": str(data), "batch_size": 2, "eval_batch_size": 4, "num_workers": 0},
    }
    (folder / "base.yaml").write_text(yaml.safe_dump(base))
    study = {
        "question": "Which system learns most?",
        "base": "base.yaml",
        "variants": {
            "small": {},
            "unmeasurable": {"model.network": {"class_path": "arena_networks.Unmeasurable"}},
        },
        "notes": {"small": "It was made for a test."},
        "seeds": [0],
        "budgets": {"small": {}},
        **entries,
    }
    file = folder / "tiny.yaml"
    file.write_text(yaml.safe_dump(study, sort_keys=False))
    return file


def times(folder, pattern):
    return {file: file.stat().st_mtime_ns for file in folder.rglob(pattern)}


def test_systems_are_trained_measured_once_and_compared(folder, tmp_path, start_command):
    write_study(tmp_path, folder)
    arguments = ["arena", "tiny.yaml", "--output=out", "--num_images=2"]

    def finish():
        process = start_command(arguments, folder=tmp_path, figures=False)
        assert process.wait(600) == 0, process.output
        return process.output

    text = finish()
    report = tmp_path / "out" / "tiny" / "arena_small"
    assert "2 of 2 runs done" in text
    assert f"arena: {Path('out/tiny/arena_small/report.html')}" in text
    assert (report.parent / "report_small" / "report.html").is_file()
    names = {"report.html", "table.md", "table.csv", "erf.csv", "erf.png", "erf.pdf"}
    assert {file.name for file in report.iterdir()} == names
    small, unmeasurable = csv.DictReader((report / "table.csv").open())
    (run,) = (Run(path) for path in report.parent.glob("small.seed0.*"))
    assert float(small["miou"]) == pytest.approx(run.last_evaluation().miou)
    assert float(small["boundary_iou"]) == pytest.approx(run.metrics["val/boundary_iou"].last)
    content = json.loads((run.folder / "arena/robustness_2/robustness.json").read_text())
    assert float(small["robustness"]) == pytest.approx(content["mean"] / content["clean"])
    assert (small["note"], small["start"]) == ("It was made for a test.", "random")
    assert int(small["parameters"]) == 1830  # 608 + 584 + 584 + 54
    assert int(small["macs"]) == 256 * (600 + 576 + 576 + 48)
    # What cannot be measured of one system leaves a gap and a sentence, and the rest as it is.
    assert unmeasurable["macs"] == unmeasurable["latency_median_ms"] == ""
    assert unmeasurable["parameters"] == small["parameters"]
    assert float(unmeasurable["robustness"]) > 0
    assert "not measured: unmeasurable: its costs were not measured: variant unmeasurable" in text
    sentence = "unmeasurable, seed 0: its receptive fields were not measured: RuntimeError: planted"
    assert f"not measured: {sentence} second line of the message\n" in text
    assert sentence in (report / "report.html").read_text()
    fields = list(csv.DictReader((report / "erf.csv").open()))
    columns = {row["feature_map"]: row["column"] for row in fields}
    assert columns == {"stage1": "stage1", "context": "context", "fused": "head"}
    assert {row["system"] for row in fields} == {"small"}
    assert {row["num_images"] for row in fields} == {"2"}

    # The same command measures nothing again, but what is missing: here the last three corruptions.
    (other,) = report.parent.glob("unmeasurable.seed0.*")
    scores = other / "arena" / "robustness_2" / "robustness.csv"
    lines = scores.read_text().splitlines()
    planted = [lines[0], lines[1].replace(lines[1].split(",")[3], "0.5"), *lines[2:-3]]
    scores.write_text("\n".join(planted) + "\n")
    scores.with_suffix(".json").unlink()
    before = times(run.folder, "*") | times(report.parent, "costs.json")
    text = finish()
    assert times(run.folder, "*") | times(report.parent, "costs.json") == before
    kept = scores.read_text().splitlines()
    assert len(kept) == len(lines)
    assert kept[1].split(",")[3] == "0.5"
    assert kept[-3:] == lines[-3:]

    # Stored measurements stand for runs whose checkpoints and maps were removed.
    table = (report / "table.csv").read_text()
    for path in [*report.parent.rglob("*.ckpt"), *report.parent.rglob("erf_2.npz")]:
        path.unlink()
    arguments.append("--report")
    text = finish()
    assert (report / "table.csv").read_text() == table
    assert list(csv.DictReader((report / "erf.csv").open())) == fields
    assert "small: the figure has no row, because the maps" in (report / "report.html").read_text()
    assert sentence not in text


def test_options_and_notes(folder, tmp_path, fail, capsys, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    study = write_study(tmp_path, folder)
    output = f"--output={tmp_path / 'out'}"
    assert "num_images" in fail(capsys, ["arena", str(study), output, "--num_images=0"])
    with pytest.raises(SystemExit, match="1"):
        main(["arena", str(study), output, "--report"])
    text = capsys.readouterr().out
    assert "0 of 2 runs done" in text
    assert "no report: " in text
    study = write_study(tmp_path, folder, notes={"large": "None of the variants."})
    error = fail(capsys, ["arena", str(study), output])
    assert "notes: there is no variant 'large'; choose one of small, unmeasurable" in error
    study = write_study(tmp_path, folder, notes={"small": ["a", "list"]})
    assert "notes: 'small' is ['a', 'list']; give a sentence" in fail(
        capsys, ["arena", str(study), output]
    )


def test_images_have_one_size_with_sides_of_whole_strides():
    sizes = [(70, 100), (70, 100), (64, 100), (70, 100)]
    samples = [
        {"image": torch.full((3, *size), float(i)), "id": f"i{i}", "skipped": {}}
        for i, size in enumerate(sizes)
    ]
    samples[1]["skipped"] = {"i1": "i1 is damaged"}
    samples[0]["image"][:, 3, 2] = 7  # the first pixel of the crop
    batches = list(_images(SimpleNamespace(positions=range(4), samples=samples)))
    assert [batch["id"] for batch in batches] == [["i0"], ["i3"]]
    assert all(batch["image"].shape == (1, 3, 64, 96) for batch in batches)
    assert batches[0]["image"][0, 0, 0, 0] == 7
    narrow = [{"image": torch.zeros(3, 20, 33), "id": "a", "skipped": {}}]
    (batch,) = _images(SimpleNamespace(positions=[0], samples=narrow))
    assert batch["image"].shape == (1, 3, 20, 32)


@pytest.mark.parametrize("name", ["shapes", "camvid"])
def test_studies_of_the_five_systems(name):
    study = read_study(STUDIES / f"{name}.yaml", "small", resolve)
    assert {variant.name for variant in study.variants} >= SYSTEMS
    assert study.notes.keys() == {variant.name for variant in study.variants}
    assert study.seeds == (0, 1, 2)
    protocols = {str(v.config["model"]["inference"]) for v in study.variants}
    crops = {str(v.config["data"]["crop_size"]) for v in study.variants}
    assert len(protocols) == len(crops) == 1
    for variant in study.variants:
        with torch.device("meta"):
            network = variant.build_network()
        assert 3e6 < sum(p.numel() for p in network.parameters()) < 14e6, variant.name
