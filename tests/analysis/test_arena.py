"""Systems side by side: means over seeds, aligned feature maps, stored measurements, gaps."""

import json
import math

import numpy as np
import pytest

from segformer_pl.analysis.ablation import read_results, summarize_study
from segformer_pl.analysis.arena import (
    Radius,
    Robustness,
    RunMeasurements,
    StoredERF,
    align_maps,
    compare_systems,
    erf_file,
    mean_radius,
    read_erf,
    read_measurements,
    read_robustness,
    robustness_folder,
    starting_weights,
)
from segformer_pl.analysis.erf import ERF, LayerERF
from segformer_pl.analysis.run import Run

COST = {"variant": "base", "parameters": 5, "macs": 6, "latency_median_ms": 7.0}
COST |= {"activation_bytes": 8}
STAGES = ["stage1", "stage2"]


def counts(*right):
    """Counts of images with two classes of ten pixels each, of which ``right`` are correct."""
    one = [[[n, 10, n + 10 - n], [n, 10, n + 10 - n]] for n in right]
    return np.array(one)


def stored(tmp_path, **radii):
    values = {name: Radius(value, value - 1, value + 1) for name, value in radii.items()}
    return StoredERF(tmp_path / "erf.npz", 4, {"image_size": [8, 8]}, values, values)


@pytest.fixture
def results(tmp_path, write_run):
    """Two systems with two seeds, and one without a finished run."""
    folder = tmp_path / "demo"
    for seed, base in enumerate((6, 8)):
        write_run(folder, "base", seed, counts(base, 9))
        run = write_run(folder, "other", seed, counts(base - 2, 9), {"lr": 0.2})
        rows = f"step,val/boundary_iou\n9,{0.25 * (seed + 1)}\n"
        (run / "metrics.csv").write_text(rows)
    write_run(folder, "waiting", 0, None, {"lr": 0.3})
    return read_results(folder, "small")


def test_means_and_intervals_over_seeds_are_those_of_the_study(results, tmp_path):
    measured = {
        "other": {
            0: RunMeasurements(Robustness(0.5, 0.25, 20), stored(tmp_path, stage1=3.0)),
            1: RunMeasurements(Robustness(0.4, 0.3, 20), stored(tmp_path, stage1=5.0)),
        }
    }
    starts, notes = {"other": "random"}, {"other": "It is small."}
    base, other, waiting = compare_systems(results, measured, [COST], starts, notes)
    for system in (base, other):
        for measure in ("miou", "worst_decile"):
            expected = next(
                one
                for one in summarize_study(results, measure).variants
                if one.variant == system.name
            )
            assert system.measures[measure] == expected
    assert (other.start, other.note, other.num_seeds) == ("random", "It is small.", 2)
    assert base.start == "unknown"
    assert other.measures["boundary_iou"].values == {0: 0.25, 1: 0.5}
    robustness = other.measures["robustness"]
    assert robustness.mean == pytest.approx((0.5 + 0.75) / 2)
    # t interval of two values: 12.7062 standard errors
    assert robustness.high - robustness.mean == pytest.approx(12.7062 * 0.125, rel=1e-4)
    assert mean_radius(other, "stage1").mean == 4.0
    assert mean_radius(other, "head") is None
    assert base.cost == COST
    # Every gap has a sentence.
    assert base.missing == ("base, seeds 0, 1: its metrics.csv has no val/boundary_iou",)
    assert other.missing == ("other: its costs were not measured",)
    assert waiting.missing[0] == "waiting has no finished run"
    assert set(waiting.measures.values()) == {None}


def test_gaps_of_single_seeds(results, tmp_path):
    problem = "its receptive fields were not measured: RuntimeError: planted"
    measured = {
        "base": {
            0: RunMeasurements(Robustness(0.0042, 0.006, 20), None, (problem,)),
            1: RunMeasurements(Robustness(0.4, 0.1, 20), stored(tmp_path, a=math.nan), ()),
        }
    }
    costs = [{"variant": "base", "parameters": 3, "failure": "its costs were not measured: x"}]
    base = compare_systems(results, measured, costs, {}, {})[0]
    assert base.measures["robustness"].values == {1: 0.25}
    assert list(base.erfs) == [1]
    assert mean_radius(base, "a") is None
    assert "base: its costs were not measured: x" in base.missing
    assert f"base, seed 0: {problem}" in base.missing
    assert (
        "base, seed 0: its robustness is left out, because its mIoU on the clean images is 0.42 %, "
        "and below 1 % a ratio means nothing"
    ) in base.missing
    damaged = results.runs["base"][1].evaluations[-1].file
    damaged.write_bytes(b"no archive")
    again = compare_systems(results, measured, costs, {}, {})[0]
    assert list(again.measures["miou"].values) == [0]
    assert any("seed 1: its evaluation cannot be read" in text for text in again.missing)


def test_columns_follow_the_networks_and_end_with_the_head():
    maps = {
        "a": [*STAGES, "fused"],
        "b": [*STAGES, "aspp", "head"],
        "c": ["stage1", "blocks", "pixels", "head"],
        "d": ["only"],
        "e": [],
    }
    columns = align_maps(maps)
    assert list(columns) == ["stage1", "blocks", "pixels", "stage2", "aspp", "head"]
    assert columns["head"] == {"a": "fused", "b": "head", "c": "head", "d": "only"}
    assert columns["stage2"] == {"a": "stage2", "b": "stage2"}
    # A map that is named head without being the last one
    columns = align_maps({"f": ["stage1", "head", "classes"]})
    assert columns == {
        "stage1": {"f": "stage1"},
        "head (inner)": {"f": "head"},
        "head": {"f": "classes"},
    }
    assert align_maps({}) == {"head": {}}


def test_weights_at_the_start():
    def start(**model):
        return starting_weights({"model": model})

    nested = {"init_args": {"encoder": {"init_args": {"name": "resnet18", "pretrained": True}}}}
    assert start(weights=None, network={"class_path": "Net"}) == "random"
    assert start(encoder_weights="runs/lite0.safetensors") == "encoder from lite0"
    assert start(weights="b0.pth", encoder_weights="x") == "all weights from b0"
    assert start(network=nested) == "encoder with pretrained weights of timm"
    nested["init_args"]["encoder"]["init_args"]["pretrained"] = False
    assert start(network=nested) == "random"


def test_stored_robustness(tmp_path):
    origin = {"num_images": 20, "dataset": "shapes", "fingerprint": "0-1", "checkpoint": "ab"}
    file = tmp_path / "robustness.json"
    assert read_robustness(tmp_path) is None
    file.write_text(json.dumps(origin | {"clean": 0.5, "mean": 0.2, "groups": {}}))
    assert read_robustness(tmp_path) == (Robustness(0.5, 0.2, 20), origin)
    file.write_text(json.dumps(origin | {"clean": None, "mean": 0.2}))
    assert math.isnan(read_robustness(tmp_path)[0].ratio)
    assert Robustness(0.01, 0.005, 20).ratio == pytest.approx(0.5)
    assert all(math.isnan(Robustness(clean, 0.005, 20).ratio) for clean in (0.0, 0.0099))
    for text in ("{", "[1]", "{}", json.dumps(origin | {"clean": "x", "mean": 0.2})):
        file.write_text(text)
        assert read_robustness(tmp_path) is None


def test_stored_receptive_fields(tmp_path):
    file = erf_file(Run(tmp_path), 4)
    assert file == tmp_path / "arena" / "erf_4"
    assert read_erf(file) is None
    mean = np.ones((16, 16))
    layer = LayerERF(
        "stage1", mean, mean, np.ones((2, 16, 16), "f4"), np.array([1, 1]), (8, 8), (4, 4), "abs"
    )
    file.parent.mkdir()
    ERF({"stage1": layer}, 2, settings={"image_size": [16, 16]}, about={"origin": {"a": 1}}).save(
        file
    )
    found, about = read_erf(file)
    assert about["origin"] == {"a": 1}
    assert found.radius_50["stage1"].value == pytest.approx(layer.radius(0.5))
    assert found.radius_95["stage1"].value == pytest.approx(layer.radius(0.95))
    assert (found.num_images, found.settings) == (2, {"image_size": [16, 16]})
    text = file.with_name("erf_4.json").read_text()
    file.with_name("erf_4.json").write_text(text.replace("radius_50", "radius"))
    assert read_erf(file) is None
    file.with_name("erf_4.json").write_text(text)
    file.with_name("erf_4.npz").unlink()
    without_maps, _ = read_erf(file)
    assert without_maps == found
    assert not without_maps.file.is_file()


def test_measurements_of_a_run_without_its_checkpoint(tmp_path):
    run = Run(tmp_path)
    folder = robustness_folder(run, 4)
    folder.mkdir(parents=True)
    scores = {"num_images": 4, "clean": 0.5, "mean": 0.2}
    (folder / "robustness.json").write_text(json.dumps(scores))
    found = read_measurements(run, 4)
    assert found.robustness == Robustness(0.5, 0.2, 4)
    assert found.erf is None
    (problem,) = found.problems
    assert problem.startswith("its receptive fields were not measured on 4 images, and ")
    assert problem.endswith("its checkpoint 'checkpoints/last.ckpt' is missing")
    (problem,) = read_measurements(run, 5).problems  # the same of all seeds, so that they share it
    assert problem.startswith("its robustness and its receptive fields were not measured on 5 ")
