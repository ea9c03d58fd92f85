"""Uncertainty over pictures, files, and the sums behind them."""

import json

import numpy as np
import pytest
import torch

from segformer_pl.analysis.erf import (
    ERF,
    LayerERF,
    effective_receptive_field,
    load_erf,
    merge,
    weights_hash,
)
from segformer_pl.analysis.erf.moments import Moments
from segformer_pl.models import segformer_b0


def field_of(maps, gradient="abs", num_groups=16):
    moments = Moments.zeros(*maps.shape[1:], num_groups)
    moments.add(maps)
    return LayerERF.from_moments("x", moments, (4, 4), (2, 2), gradient)


def test_running_moments_are_those_of_the_whole():
    maps = np.random.default_rng(0).gamma(1.0, size=(40, 8, 9)) + 1e3
    whole = field_of(maps)
    np.testing.assert_allclose(whole.mean, maps.mean(0), rtol=1e-12)
    np.testing.assert_allclose(whole.variance, maps.var(0, ddof=1), rtol=1e-8)
    np.testing.assert_allclose(whole.standard_error, maps.std(0, ddof=1) / np.sqrt(40), rtol=1e-8)
    assert list(whole.group_counts) == [3] * 8 + [2] * 8
    np.testing.assert_allclose(whole.groups[1], maps[1::16].mean(0), rtol=1e-5)
    parts = [ERF({"x": field_of(part)}, len(part)) for part in np.split(maps, [1, 14])]
    merged = merge(parts)["x"]
    np.testing.assert_allclose(merged.mean, whole.mean, rtol=1e-12)
    np.testing.assert_allclose(merged.variance, whole.variance, rtol=1e-8)
    assert merged.num_images == 40
    assert np.isnan(field_of(maps[:1]).variance).all()


def test_intervals_cover_the_truth_as_often_as_they_say():
    """The mean of a map's pixel is a number whose sampling is known; the bootstrap's percentiles
    are a little narrow at 16 groups, about 92 % for 95."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(120):
        field = field_of(rng.normal(5.0, 1.0, (32, 1, 1)))
        _, low, high = field.interval(lambda erf: float(erf.mean[0, 0]), num_resamples=60)
        covered += low <= 5.0 <= high
    assert 0.86 < covered / 120 < 0.98


def test_an_interval_is_the_same_each_time_and_needs_two_pictures():
    maps = np.random.default_rng(0).random((6, 16, 16))
    field = field_of(maps)
    np.random.seed(0)  # noqa: NPY002
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    assert field.interval(LayerERF.rms_radius) == field.interval(LayerERF.rms_radius)
    assert (np.random.get_state()[1] == before).all()  # noqa: NPY002
    value, low, high = field_of(maps[:1]).interval(LayerERF.rms_radius)
    assert value > 0
    assert np.isnan([low, high]).all()


def test_numbers_that_make_no_sense_are_refused():
    maps = np.random.default_rng(0).normal(size=(2, 8, 8))
    with pytest.raises(ValueError, match="a signed map has no extent"):
        field_of(maps, "signed").radius()
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        field_of(abs(maps)).area_ratio(50)
    with pytest.raises(ValueError, match="give 'smallest' or 'square'"):
        field_of(abs(maps)).area_ratio(0.5, "round")
    with pytest.raises(ValueError, match="one recipe"):
        merge([ERF({}, 1, recipe={"a": 1}), ERF({}, 1, recipe={"a": 2})])


def test_files(tmp_path):
    images = torch.rand(3, 3, 64, 64)
    images[1] = torch.nan
    network = segformer_b0(5)
    about = {"model": "segformer_b0", "weights": "random", "hash": weights_hash(network)}
    erf = effective_receptive_field(network, images, layers=["stage4", "head"], about=about)
    files = erf.save(tmp_path / "folder" / "erf.v1")
    assert [file.name for file in files] == ["erf.v1.npz", "erf.v1.json"]
    for given in (tmp_path / "folder" / "erf.v1.npz", files[1]):
        loaded = load_erf(given)
        assert list(loaded.layers) == ["stage4", "head"]
        for name in loaded.layers:
            a, b = loaded[name], erf[name]
            np.testing.assert_array_equal(a.mean, b.mean)
            np.testing.assert_allclose(a.standard_error, b.standard_error, rtol=1e-6)
            np.testing.assert_allclose(a.groups, b.groups, atol=1e-3 * b.groups.max())
            assert (a.pixel, a.grid, a.gradient) == (b.pixel, b.grid, b.gradient)
        assert (loaded.num_images, loaded.not_finite) == (2, ["picture 1"])
        assert loaded.about == about
        assert loaded.recipe == erf.recipe
    described = json.loads(files[1].read_text())
    head = described["numbers"]["head"]
    assert head["radius_50"][0] == erf["head"].radius(0.5)
    assert head["radius_50"][1] <= head["radius_50"][0] <= head["radius_50"][2]
    assert head["lattice_share_32"] is None or head["lattice_share_32"] <= 1
    assert described["recipe"]["reduction"] == "relu"


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_erf(tmp_path / "erf")
    np.savez(tmp_path / "erf.npz")
    (tmp_path / "erf.json").write_text("{}")
    with pytest.raises(ValueError, match="holds no ERF"):
        load_erf(tmp_path / "erf")


def test_the_hash_tells_weights_apart():
    network = segformer_b0(3)
    first = weights_hash(network)
    assert first == weights_hash(network)
    with torch.no_grad():
        network.head.classifier.bias[0] += 1e-6
    assert weights_hash(network) != first
