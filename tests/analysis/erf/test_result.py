"""Results: merging and files."""

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


def layer_of(maps, gradient="abs", num_groups=16):
    moments = Moments.zeros(*maps.shape[1:], num_groups)
    moments.add(maps)
    return LayerERF.from_moments("x", moments, (4, 4), (2, 2), gradient)


@pytest.mark.parametrize("key", ["weights_hash", "mean", "std"])
def test_results_of_different_networks_are_not_merged(key):
    with pytest.raises(ValueError, match=f"of one network, not of several: their {key} are a and"):
        merge([ERF({}, 1, about={key: "a"}), ERF({}, 1, about={key: "b"})])
    merge([ERF({}, 1, about={key: "a"}), ERF({}, 1)])


def test_results_of_different_layers_are_not_merged():
    one = layer_of(np.ones((2, 8, 8)))
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
            assert (a.position, a.grid, a.gradient) == (b.position, b.grid, b.gradient)
        assert (loaded.num_images, loaded.not_finite) == (2, ["image 1"])
        assert loaded.about == about
        assert loaded.settings == erf.settings
    described = json.loads(files[1].read_text())
    head = described["numbers"]["head"]
    assert head["radius_50"][0] == erf["head"].interval(lambda e: e.radius(0.5)).value
    assert head["radius_50"][0] == pytest.approx(erf["head"].radius(0.5), rel=0.2)
    assert 0 <= head["area_smallest_95"][1] <= head["area_smallest_95"][2] <= 1
    assert head["radius_50"][1] <= head["radius_50"][0] <= head["radius_50"][2]
    assert head["lattice_share_32"] is None or head["lattice_share_32"] <= 1
    assert described["settings"]["reduction"] == "relu"
    assert described["image_ids"] == loaded.image_ids == ["image 0", "image 2"]
    assert [layer["num_images"] for layer in described["layers"]] == [2, 2]


def test_weakest_pixels_and_their_intervals_survive_a_file(tmp_path):
    """In half precision, values below 6e-8 of the largest one would be lost."""
    maps = np.full((4, 32, 32), 1e-11)
    maps[:, 4, 4] = 1.0
    maps *= np.random.default_rng(0).uniform(0.5, 2.0, size=maps.shape)
    before = ERF({"x": layer_of(maps)}, 4)
    before.save(tmp_path / "erf.npz")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["erf.json", "erf.npz"]
    after = load_erf(tmp_path / "erf")
    assert after["x"].interval(faint) == before["x"].interval(faint)
    assert after["x"].interval(faint).value > 0


def faint(erf):
    return float(erf.mean[10:].sum())


def test_missing_and_foreign_files(tmp_path):
    with pytest.raises(ValueError, match="there is no file"):
        load_erf(tmp_path / "erf")
    np.savez(tmp_path / "erf.npz")
    (tmp_path / "erf.json").write_text("{}")
    with pytest.raises(ValueError, match="hold no ERF"):
        load_erf(tmp_path / "erf")


@pytest.mark.parametrize("damage", ["cut", "changed", "emptied", "no json", "a list", "older"])
def test_damaged_files_get_one_sentence(tmp_path, damage):
    maps, described = ERF({"x": layer_of(np.ones((2, 8, 8)))}, 2).save(tmp_path / "erf")
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
    message = r"or are damaged \(\w+\); measure"
    if damage == "older":
        message = "has format 1, and formats 2 and 3 can be read; measure it again"
    with pytest.raises(ValueError, match=message):
        load_erf(tmp_path / "erf")


def test_hash_distinguishes_weights():
    network = segformer_b0(3)
    first = weights_hash(network)
    assert first == weights_hash(network)
    with torch.no_grad():
        network.head.classifier.bias[0] += 1e-6
    assert weights_hash(network) != first


def test_results_of_different_settings_are_not_merged():
    with pytest.raises(ValueError, match="equal settings"):
        merge([ERF({}, 1, settings={"a": 1}), ERF({}, 1, settings={"a": 2})])


def test_files_of_format_2_can_be_read(tmp_path):
    """Its keys `recipe`, `pictures` and `pixel` are now `settings`, `image_ids` and `position`."""
    layer = layer_of(np.random.default_rng(0).random((3, 8, 8)))
    written = ERF({"x": layer}, 3, settings={"units": "center"}, image_ids=["a", "b", "c"])
    _, file = written.save(tmp_path / "erf")
    new = json.loads(file.read_text())
    old = {key: value for key, value in new.items() if key not in ("settings", "image_ids")}
    old |= {"format": 2, "recipe": new["settings"], "pictures": new["image_ids"]}
    old["layers"] = [
        {"pixel" if key == "position" else key: value for key, value in one.items()}
        for one in new["layers"]
    ]
    file.write_text(json.dumps(old))
    loaded = load_erf(file)
    assert (loaded.settings, loaded.image_ids) == (written.settings, written.image_ids)
    assert loaded["x"].position == layer.position
    np.testing.assert_array_equal(loaded["x"].groups, layer.groups)
