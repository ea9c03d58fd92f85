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
from segformer_pl.analysis.erf.jackknife import jackknife, student_t
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
    """The mean of a map's pixel is a number whose sampling is known."""
    rng = np.random.default_rng(1)
    for num_images in (5, 40):
        covered = 0
        for _ in range(200):
            field = field_of(rng.normal(5.0, 1.0, (num_images, 1, 1)))
            value, low, high = field.interval(lambda erf: float(erf.mean[0, 0]))
            assert value == pytest.approx(field.mean[0, 0], rel=1e-4)
            covered += low <= 5.0 <= high
        assert 0.91 < covered / 200 < 0.99


def speckled(rng, num_images, shape):
    """A Gaussian field of sigma 10 under noise that is new in every picture and pixel."""
    rows, columns = np.ogrid[:64, :64]
    envelope = np.exp(-((rows - 32) ** 2 + (columns - 32) ** 2) / 200)
    return field_of(envelope * rng.gamma(shape, size=(num_images, 64, 64)))


def area_50(erf):
    return 100 * erf.area_ratio(0.5)


@pytest.mark.parametrize("num_images", [16, 50])
@pytest.mark.slow
def test_intervals_of_areas_cover_the_area_that_endless_pictures_have(num_images):
    """2 pi ln 2 sigma^2 / 64^2 = 10.6 %. The area of the mean map is nearly one below."""
    rng = np.random.default_rng(num_images)
    truth = 100 * 2 * np.pi * np.log(2) * 100 / 64**2
    plain, found = [], []
    for _ in range(40):
        field = speckled(rng, num_images, 0.5)
        plain.append(area_50(field))
        found.append(field.interval(area_50))
    values, low, high = np.array(found).T
    assert ((low <= values) & (values <= high)).all()
    assert 0.8 <= ((low <= truth) & (truth <= high)).mean() <= 1
    assert abs(values.mean() - truth) < 0.1 < truth - np.mean(plain)


def test_areas_over_different_numbers_of_pictures_agree():
    rng = np.random.default_rng(0)
    few, many = speckled(rng, 12, 1.0), speckled(rng, 100, 1.0)
    assert area_50(many) - area_50(few) > 0.4
    assert few.interval(area_50).value == pytest.approx(many.interval(area_50).value, abs=0.3)


def test_students_t():
    """Two-sided 95 and 99 %, from any table."""
    for freedom, bound in {1: 12.706, 2: 4.303, 3: 3.182, 7: 2.365, 15: 2.131, 30: 2.042}.items():
        assert student_t(0.95, freedom) == pytest.approx(bound, abs=6e-4)
    assert student_t(0.99, 15) == pytest.approx(2.947, abs=6e-4)


@pytest.mark.slow
def test_student_t_of_scipy():
    from scipy.stats import t

    for freedom in (1, 2, 3, 8, 15, 40):
        for level in (0.5, 0.9, 0.95, 0.999):
            expected = t.ppf((1 + level) / 2, freedom)
            assert student_t(level, freedom) == pytest.approx(expected, rel=1e-9)


def test_groups_of_unequal_size_count_by_their_pictures():
    """Of a mean the pseudo-values are those of the pictures: nothing is corrected."""
    rng = np.random.default_rng(0)
    counts = np.array([3, 3, 2, 1])
    pictures = [rng.normal(size=count) for count in counts]
    whole = np.concatenate(pictures).mean()
    without = [
        np.concatenate([*pictures[:group], *pictures[group + 1 :]]).mean() for group in range(4)
    ]
    value, low, high = jackknife(whole, without, counts, 0.95)
    assert value == pytest.approx(whole)
    assert (low + high) / 2 == pytest.approx(whole)


def test_an_interval_is_the_same_each_time_and_needs_two_pictures():
    maps = np.random.default_rng(0).random((6, 16, 16))
    field = field_of(maps)
    assert field.interval(LayerERF.rms_radius) == field.interval(LayerERF.rms_radius)
    curve = field.band(lambda erf: erf.radial_profile().energy)
    assert curve.value.shape == curve.low.shape == (17,)
    assert (curve.low <= curve.high).all()
    value, low, high = field_of(maps[:1]).interval(LayerERF.rms_radius)
    assert value > 0
    assert np.isnan([low, high]).all()


def test_numbers_that_make_no_sense_are_refused():
    maps = np.random.default_rng(0).normal(size=(2, 8, 8))
    with pytest.raises(ValueError, match="a signed map has no extent"):
        field_of(maps, "signed").radius()
    with pytest.raises(ValueError, match="a share between 0 and 1"):
        field_of(abs(maps)).area_ratio(50)
    for share in (0, 50):
        with pytest.raises(ValueError, match="a share between 0 and 1"):
            field_of(abs(maps)).radius(share)
    with pytest.raises(ValueError, match="a radius of at least 0"):
        field_of(abs(maps)).center_share(-1)
    with pytest.raises(ValueError, match="a confidence between 0 and 1"):
        field_of(abs(maps)).interval(LayerERF.rms_radius, level=95)
    with pytest.raises(ValueError, match="give 'smallest', 'square' or 'replknet'"):
        field_of(abs(maps)).area_ratio(0.5, "round")
    with pytest.raises(ValueError, match="one recipe"):
        merge([ERF({}, 1, recipe={"a": 1}), ERF({}, 1, recipe={"a": 2})])


@pytest.mark.parametrize("key", ["weights_hash", "mean", "std"])
def test_results_of_different_networks_are_not_merged(key):
    with pytest.raises(ValueError, match=f"of one network, not of several: their {key} are a and"):
        merge([ERF({}, 1, about={key: "a"}), ERF({}, 1, about={key: "b"})])
    merge([ERF({}, 1, about={key: "a"}), ERF({}, 1)])


def test_results_of_different_layers_are_not_merged():
    one = field_of(np.ones((2, 8, 8)))
    with pytest.raises(ValueError, match="the same layers, not of a and b"):
        merge([ERF({"a": one}, 2), ERF({"b": one}, 2)])


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
            np.testing.assert_array_equal(a.groups, b.groups)
            assert (a.pixel, a.grid, a.gradient) == (b.pixel, b.grid, b.gradient)
        assert (loaded.num_images, loaded.not_finite) == (2, ["picture 1"])
        assert loaded.about == about
        assert loaded.recipe == erf.recipe
    described = json.loads(files[1].read_text())
    head = described["numbers"]["head"]
    assert head["radius_50"][0] == erf["head"].interval(lambda e: e.radius(0.5)).value
    assert head["radius_50"][0] == pytest.approx(erf["head"].radius(0.5), rel=0.2)
    assert 0 <= head["area_smallest_95"][1] <= head["area_smallest_95"][2] <= 1
    assert head["radius_50"][1] <= head["radius_50"][0] <= head["radius_50"][2]
    assert head["lattice_share_32"] is None or head["lattice_share_32"] <= 1
    assert described["recipe"]["reduction"] == "relu"
    assert described["pictures"] == loaded.pictures == ["picture 0", "picture 2"]
    assert [layer["num_images"] for layer in described["layers"]] == [2, 2]


def test_the_faintest_pixels_and_their_intervals_survive_a_file(tmp_path):
    """Halves of the largest value would end at 6e-8 of it."""
    maps = np.full((4, 32, 32), 1e-11)
    maps[:, 4, 4] = 1.0
    maps *= np.random.default_rng(0).uniform(0.5, 2.0, size=maps.shape)
    before = ERF({"x": field_of(maps)}, 4)
    before.save(tmp_path / "erf.npz")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["erf.json", "erf.npz"]
    after = load_erf(tmp_path / "erf")
    assert after["x"].interval(faint) == before["x"].interval(faint)
    assert after["x"].interval(faint).value > 0


def faint(erf):
    return float(erf.mean[10:].sum())


def test_files_that_are_none(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_erf(tmp_path / "erf")
    np.savez(tmp_path / "erf.npz")
    (tmp_path / "erf.json").write_text("{}")
    with pytest.raises(ValueError, match="hold no ERF"):
        load_erf(tmp_path / "erf")


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "no json", "a list", "older"])
def test_damaged_files_get_one_sentence(tmp_path, damage):
    maps, described = ERF({"x": field_of(np.ones((2, 8, 8)))}, 2).save(tmp_path / "erf")
    whole = maps.read_bytes()
    if damage == "cut":
        maps.write_bytes(whole[: len(whole) // 2])
    elif damage == "changed":
        at = len(whole) // 4
        maps.write_bytes(
            whole[:at] + bytes(255 - byte for byte in whole[at : at + 40]) + whole[at + 40 :]
        )
    elif damage == "emptied":
        maps.write_bytes(b"")
    else:
        text = {"no json": "{", "a list": "[]", "older": '{"format": 1}'}[damage]
        described.write_text(text)
    message = "has format 1, not 2" if damage == "older" else r"or are damaged \(\w+\); measure"
    with pytest.raises(ValueError, match=message):
        load_erf(tmp_path / "erf")


def test_the_hash_tells_weights_apart():
    network = segformer_b0(3)
    first = weights_hash(network)
    assert first == weights_hash(network)
    with torch.no_grad():
        network.head.classifier.bias[0] += 1e-6
    assert weights_hash(network) != first
