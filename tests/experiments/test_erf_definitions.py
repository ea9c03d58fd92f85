"""The experiment erf_definitions: statistics against scipy, known orders, resuming, files."""

import csv
import gzip
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.stats import kendalltau, spearmanr
from torch import nn

from segformer_pl.analysis.erf.definitions import DEFINITIONS, NUMBERS, PROTOCOLS
from segformer_pl.errors import UserError

FOLDER = Path(__file__).parents[2] / "experiments" / "erf_definitions"
MODULES = ("orderings", "results", "erf_definitions")


@pytest.fixture(scope="module")
def script():
    """The script, whose folder is on the path as when it is run."""
    sys.path.insert(0, str(FOLDER))
    try:
        import erf_definitions

        yield erf_definitions
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def orderings(script):
    return sys.modules["orderings"]


def test_rank_correlations_are_those_of_scipy(orderings):
    rng = np.random.default_rng(0)
    values = rng.integers(0, 6, (4, 5, 9)).astype(float)  # with ties
    values[0, 0] = rng.random(9)
    tau, rho = orderings.kendall_tau(values), orderings.spearman_rho(values)
    for r, rows in enumerate(values):
        for i, one in enumerate(rows):
            for j, other in enumerate(rows):
                assert tau[r, i, j] == pytest.approx(kendalltau(one, other).statistic, abs=1e-12)
                assert rho[r, i, j] == pytest.approx(spearmanr(one, other).statistic, abs=1e-12)
    constant = np.array([[1.0, 1, 1], [1, 2, 3]])
    assert np.isnan(orderings.kendall_tau(constant)[0]).all()
    assert orderings.kendall_tau(constant)[1, 1] == pytest.approx(1)


def test_image_weights(orderings):
    weights = orderings.image_weights(7, 200, 3, seed=1)
    assert weights.shape == (1 + 200 + 6, 7)
    np.testing.assert_allclose(weights.sum(1), 1)
    np.testing.assert_allclose(weights[0], 1 / 7)
    bootstrap = weights[1:201] * 7
    np.testing.assert_allclose(bootstrap, bootstrap.round(), atol=1e-12)
    assert bootstrap.max() >= 3
    for first, second in zip(weights[201::2] > 0, weights[202::2] > 0):
        assert (first ^ second).all()
        assert first.sum() == 3
    assert len({tuple(row) for row in weights[201::2]}) > 1
    np.testing.assert_array_equal(weights, orderings.image_weights(7, 200, 3, seed=1))
    assert (weights != orderings.image_weights(7, 200, 3, seed=2)).any()


def agreement_of(orderings, per_image, halves=10, resamples=200):
    """Agreement of orderings by means over images; ``per_image`` is (orderings, networks, N)."""
    num_images = per_image.shape[-1]
    weights = orderings.image_weights(num_images, resamples, halves, 0)
    rows = np.einsum("omn,rn->rom", per_image, weights)
    names = [orderings.Ordering(64, f"d{o}", "radius_50") for o in range(len(per_image))]
    return orderings.Agreement(names, rows, num_images, resamples)


def test_a_resolved_flip_is_counted_and_noise_is_not(orderings):
    """Networks 0 to 3 have numbers 0, 1, 2, 3 in ordering 0. Ordering 1 swaps the last two.
    Ordering 2 differs too, by less than the noise of its images."""
    rng = np.random.default_rng(3)
    true = np.array([[0, 1, 2, 3], [0, 1, 3, 2], [0.03, 0, 0.02, 0.01]])
    noise = rng.normal(size=(3, 4, 20)) * np.array([0.1, 0.1, 1.0])[:, None, None]
    noise -= noise.mean(-1, keepdims=True)  # the order over all images is that of `true`
    agreement = agreement_of(orderings, true[..., None] + noise)
    assert agreement.tau[0, 0, 1] == pytest.approx(4 / 6)
    assert agreement.flips(0, 1) == (6, 1)
    assert agreement.flips(0, 0) == (6, 0)
    assert agreement.tau[0, 0, 2] == pytest.approx(-2 / 6)
    assert agreement.flips(0, 2) == (0, 0)
    assert agreement.halves[0] == pytest.approx(1)
    assert agreement.halves[2] < 0.5
    bounds = agreement.tau_interval
    assert bounds.low[0, 1] == pytest.approx(4 / 6)
    assert bounds.high[0, 1] == pytest.approx(4 / 6)
    assert bounds.low[0, 2] < bounds.high[0, 2]
    summary = agreement.summary([(0, 1), (0, 2)])
    assert summary["tau"].value == pytest.approx(
        (agreement.tau[0, 0, 1] + agreement.tau[0, 0, 2]) / 2
    )
    assert (summary["resolved"], summary["flipped"]) == (6, 1)


@pytest.mark.slow
@pytest.mark.parametrize("shared", [0.0, 0.8])
def test_intervals_cover_the_true_tau(orderings, shared):
    """Two orderings of 8 networks by means over 12 images, with noise as large as the differences,
    of which a share is the same in both orderings: 90 % of the intervals or more cover."""
    rng = np.random.default_rng(0)
    covered = 0
    for study in range(100):
        common, *own = rng.normal(size=(3, 8))
        true = common + np.array(own)
        noise = np.sqrt(1 - shared) * rng.normal(size=(2, 8, 12))
        noise += np.sqrt(shared) * rng.normal(size=(8, 12))
        weights = orderings.image_weights(12, 200, 0, study)
        rows = np.einsum("omn,rn->rom", true[..., None] + 2 * noise, weights)
        bounds = orderings.interval(orderings.kendall_tau(rows)[:, 0, 1], 12)
        tau = kendalltau(*true).statistic
        covered += bounds.low - 1e-9 <= tau <= bounds.high + 1e-9
    assert covered >= 90


def test_interval_of_undefined_values(orderings):
    replicates = np.array([[np.nan, 0.5], [0.1, np.nan], [0.2, 0.5], [0.3, 0.5]])
    bounds = orderings.interval(replicates, 4)
    assert np.isnan(bounds.low[0])
    assert (bounds.low[1], bounds.high[1]) == (0.5, 0.5)
    nothing = orderings.interval(np.full((3, 2), np.nan), 4)
    assert np.isnan(nothing.high).all()


@pytest.mark.slow
def test_resolved_differences_have_their_level(orderings):
    """Of studies in which all networks are equal, about 5 % resolve any pair."""
    rng = np.random.default_rng(0)
    false = sum(
        agreement_of(orderings, rng.normal(size=(1, 5, 12)), halves=1).resolved.any()
        for _ in range(300)
    )
    assert 3 <= false <= 27


def test_pairs_that_differ_in_one_thing(orderings):
    first = orderings.Ordering(64, "energy", "radius_50")
    assert first.difference(first._replace(size=96)) == "size"
    assert first.difference(first._replace(number="area_50")) == "number"
    assert first.difference(first._replace(size=96, definition="openerf")) is None
    assert first.difference(first) is None


class Blur(nn.Module):
    """One convolution with kernel K; RGB of opposite sign on request, outside the middle."""

    def __init__(self, kernel, opposite=False):
        super().__init__()
        self.layer = nn.Conv2d(3, 2, kernel, padding=kernel // 2)
        with torch.no_grad():
            self.layer.weight.fill_(1.0)
            if opposite:
                self.layer.weight[:, 0] = -2.1
                self.layer.weight[:, :, kernel // 2, kernel // 2] = 1
            self.layer.bias.fill_(1e3)

    def feature_maps(self, images):
        return {"head": self.layer(images)}


def numbers_of(script, network, tmp_path, num_images=4):
    options = SimpleNamespace(layers=["head"], definitions=list(DEFINITIONS), batch_size=2)
    batches = [{"image": torch.rand(num_images, 3, 32, 32), "id": list("abcd")[:num_images]}]
    subject = SimpleNamespace(network=network, normalization=lambda x: x, label="blur")
    weights = np.full((3, num_images), 1 / num_images)
    tmp_path.mkdir(exist_ok=True)
    return script.measure(subject, batches, weights, options, tmp_path)[0, :, :, 0]


@pytest.mark.slow
def test_known_order_and_a_known_flip(script, tmp_path):
    """Kernels of 3, 7, 11 and 21 pixels are in this order by every definition and number that can
    tell them apart. In the last network red outweighs green and blue everywhere but in the middle,
    where the mean over RGB is negative: openerf sees the middle pixel alone, the others see all."""
    plain = np.stack([
        numbers_of(script, Blur(kernel), tmp_path / str(kernel)) for kernel in (3, 7, 11, 21)
    ])  # fmt: skip
    for d, definition in enumerate(DEFINITIONS):
        for n, number in enumerate(NUMBERS):
            column = plain[:, d, n]
            assert (np.diff(column) >= 0).all(), (definition, number, column)
            if number in ("radius_50", "area_50", "square_50", "square_50_log"):
                assert (np.diff(column) > 0).all(), (definition, number, column)
    flipped = numbers_of(script, Blur(21, opposite=True), tmp_path / "flip")
    radius = list(NUMBERS).index("radius_50")
    by = dict(zip(DEFINITIONS, range(len(DEFINITIONS))))
    for name in ("replknet", "magnitude", "energy", "equal_images"):
        assert flipped[by[name], radius] > plain[2, by[name], radius]
    assert flipped[by["openerf"], radius] < plain[0, by["openerf"], radius]


def test_missing_images_are_refused(script, tmp_path):
    options = SimpleNamespace(layers=["head"], definitions=["energy"], batch_size=None)
    batches = [{"image": torch.rand(2, 3, 32, 32), "id": ["a", "b"]}]
    subject = SimpleNamespace(network=Blur(3), normalization=lambda x: x, label="blur")
    with pytest.raises(UserError, match="blur: 2 of 5 images could be read"):
        script.measure(subject, batches, np.full((1, 5), 0.2), options, tmp_path)


def test_labels(script):
    path = "runs/study/r8-4-2-1.seed0.small.0a1b2c3d/checkpoints/last.ckpt"
    assert script.split_label(path) == ("r8-4-2-1.seed0.small", path)
    assert script.split_label(f"paper={path}") == ("paper", path)
    assert script.split_label("timm:resnet18") == ("resnet18", "timm:resnet18")
    assert script.split_label("segformer_b0") == ("segformer_b0", "segformer_b0")


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder with five training and five validation images and their labels."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for split in ("train", "validation"):
        for number in range(5):
            for kind, shape, high in (("images", (40, 40, 3), 255), ("labels", (40, 40), 6)):
                file = folder / kind / split / f"{number}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(rng.integers(0, high, shape, np.uint8)).save(file)
    return folder


@pytest.mark.slow
def test_the_script(script, images, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "HALVES", 2)
    monkeypatch.setattr(sys.modules["results"], "DPI", 30)
    output = tmp_path / "out"
    networks = [
        "timm:resnet10t",
        "timm:test_convnext",
        "again=timm:resnet10t",
    ]
    settings = ["--data.dataset", "shapes", "--data.path", str(images), "--sizes", "64", "96"]
    settings += ["--layers", "stage4", "--num_images", "4", "--resamples", "6", "--threads", "1"]
    definitions = ["replknet", "openerf"]
    settings += ["--output", str(output), "--definitions", *definitions]
    script.main([*networks, *settings])
    assert {path.name for path in output.iterdir()} == {
        *("networks", "numbers.csv", "correlations.csv", "correlations_all.csv.gz", "table.md"),
        *("definitions_stage4.png", "protocols_stage4.png", "ranks_stage4.png"),
    }
    rows = list(csv.DictReader((output / "numbers.csv").open()))
    per_network = 2 * len(definitions) * len(NUMBERS)
    assert len(rows) == len(networks) * per_network
    by_network = {
        name: [row["value"] for row in rows if row["network"] == name]
        for name in ("resnet10t", "again", "test_convnext")
    }
    assert by_network["resnet10t"] == by_network["again"] != by_network["test_convnext"]
    everything = gzip.decompress((output / "correlations_all.csv.gz").read_bytes()).decode()
    assert everything.count("\n") == 1 + per_network * (per_network - 1) // 2
    for row in csv.DictReader((output / "correlations.csv").open()):
        assert -1 <= float(row["tau_low"]) <= float(row["tau_high"]) <= 1 or row["tau"] == "nan"
    text = (output / "table.md").read_text()
    assert "3 networks, 4 validation images of shapes" in text
    assert "| definition replknet / openerf |" in text
    files = {path: path.stat().st_mtime_ns for path in (output / "networks").iterdir()}
    assert len(files) == 6

    # A second call measures only what is missing, and writes the same.
    numbers = (output / "numbers.csv").read_bytes()
    (output / "networks" / "again.96.npz").unlink()
    measured = []
    measure = script.measure
    monkeypatch.setattr(script, "measure", lambda *all_: measured.append(1) or measure(*all_))
    script.main([*networks, *settings])
    assert measured == [1]
    assert (output / "numbers.csv").read_bytes() == numbers
    with pytest.raises(UserError, match="measured with other settings, weights or images"):
        script.main([*networks, *settings, "--seed", "1"])
    with pytest.raises(UserError, match="at least three networks with different labels"):
        script.main([networks[0], networks[0], networks[1], *settings])
    with pytest.raises(UserError, match=r"give --data\.dataset, or the checkpoint of a run"):
        script.main([*networks, "--output", str(tmp_path / "other")])


def test_protocols_name_definitions_and_numbers():
    for definition, number in PROTOCOLS.values():
        assert definition in DEFINITIONS
        assert number in NUMBERS
