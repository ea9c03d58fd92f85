"""Every protocol, compared with a plain full-size implementation of the reference's steps."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from segformer_pl import bands, upsampling
from segformer_pl.inference import (
    Inference,
    engine,
    predict_classes,
    predict_pixels,
    predict_probabilities,
)

IGNORED = 255


class Network(nn.Module):
    """Three classes at stride 4. The receptive field exceeds a cell, so that borders matter."""

    num_classes = 3
    output = "logits"

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 7, stride=4, padding=3).double()
        self.sizes = []

    def forward(self, images):
        self.sizes.append(tuple(images.shape[2:]))
        return 3 * self.conv(images)


@pytest.fixture
def network():
    return Network()


@pytest.fixture(params=[200, 1_300_000], ids=["narrow bands", "one band"])
def _band(request, monkeypatch):
    monkeypatch.setitem(bands.BAND_ELEMENTS, "cpu", request.param)


def random_images(height=40, width=56, batch=2):
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def resize(images, size):
    return F.interpolate(images, size=size, mode="bilinear", align_corners=False)


def whole(network, images):
    return resize(network(images), images.shape[2:])


def sliding(network, images, window, stride, weights):
    """Sum of the windows' weighted logits over the sum of the weights."""
    height, width = images.shape[2:]
    rows, columns = min(window[0], height), min(window[1], width)
    total, weight = 0, 0
    for i in range(max(height - rows + stride[0] - 1, 0) // stride[0] + 1):
        for j in range(max(width - columns + stride[1] - 1, 0) // stride[1] + 1):
            top, left = min(i * stride[0], height - rows), min(j * stride[1], width - columns)
            here = (slice(None), slice(None), slice(top, top + rows), slice(left, left + columns))
            logits = whole(network, images[here])
            mask = torch.zeros_like(images[:, :1])
            mask[here] = weights(rows, columns)
            placed = torch.zeros(len(images), 3, height, width, dtype=torch.float64)
            placed[here] = logits * weights(rows, columns)
            total, weight = total + placed, weight + mask
    return total / weight


def uniform(rows, columns):
    return torch.ones(rows, columns, dtype=torch.float64)


def hann(rows, columns):
    sides = [
        torch.sin(torch.pi * torch.arange(1, side + 1, dtype=torch.float64) / (side + 1)) ** 2
        for side in (rows, columns)
    ]
    return torch.outer(*sides)


def check(inference, network, images, size, expected):
    """Compare labels, probabilities and losses with those of the expected probabilities."""
    probabilities = predict_probabilities(network, images, size, inference)
    torch.testing.assert_close(probabilities, expected, rtol=0, atol=1e-12)
    assert torch.equal(predict_classes(network, images, size, inference), expected.argmax(1))
    labels = torch.randint(3, (len(images), *size))
    labels[:, :3] = IGNORED
    pixels = predict_pixels(network, images, labels, IGNORED, inference)
    losses = -expected.gather(1, labels.clamp(max=2)[:, None])[:, 0].log()
    torch.testing.assert_close(
        pixels.losses, losses.where(labels != IGNORED, 0.0), rtol=1e-9, atol=1e-12
    )
    torch.testing.assert_close(pixels.confidence, expected.amax(1), rtol=0, atol=1e-12)
    assert torch.equal(pixels.labels, expected.argmax(1))


@pytest.mark.usefixtures("_band")
@pytest.mark.parametrize("size", [(40, 56), (33, 71), (80, 50)])
def test_whole_images_are_predicted_at_any_output_size(network, size):
    images = random_images()
    expected = resize(whole(network, images), size).softmax(1)
    check(Inference(), network, images, size, expected)


@pytest.mark.usefixtures("_band")
def test_images_are_fitted_into_the_base_size_and_resized_to_multiples(network):
    """AlignedResize of the reference: a keep-ratio resize, then a second resize, no padding."""
    images = random_images(40, 56)
    # 100 / 56 = 1.786 and 50 / 40 = 1.25: the short side decides. 50 x 70, then 64 x 96.
    aligned = resize(resize(images, (50, 70)), (64, 96))
    expected = resize(whole(network, aligned), (40, 56)).softmax(1)
    network.sizes.clear()
    check(Inference(base_size=(100, 50), resize_to=32), network, images, (40, 56), expected)
    assert set(network.sizes) == {(64, 96)}


@pytest.mark.parametrize(
    ("size", "scale", "expected"),
    [
        ((683, 512), 1.0, (683, 512)),  # ADE20K: the short side is 512 already
        ((300, 400), 1.0, (512, 683)),  # 512 / 300: 682.67 rounds up
        ((100, 900), 1.0, (228, 2048)),  # the long side decides
        ((300, 400), 1.25, (640, 853)),
        ((1024, 2048), 0.5, (512, 1024)),
    ],
)
def test_view_sizes_are_rounded_as_in_mmcv(size, scale, expected):
    base = (2048, 1024) if size == (1024, 2048) else (2048, 512)
    assert Inference(base_size=base).view_size(size, scale) == expected


@pytest.mark.parametrize(
    ("protocol", "expected"),
    [
        (Inference(), True),
        (Inference(pad_to=32), True),
        (Inference(resize_to=8), True),
        (Inference(resize_to=32), False),
        (Inference(base_size=(56, 40)), True),
        (Inference(base_size=(112, 80)), False),
        (Inference(window=(40, 64)), True),
        (Inference(window=(40, 40)), False),
        (Inference(scales=(0.5,)), False),
        (Inference(scales=(1.0, 0.5)), False),
        (Inference(flip=True), False),
    ],
)
def test_one_window_needs_few_upsampled_pixels(protocol, expected, network, monkeypatch):
    """Only then ``predict_classes`` leaves out the bands, with the same result."""
    images, upsampled = random_images(40, 56), []
    original = engine.upsampled_argmax
    monkeypatch.setattr(
        engine, "upsampled_argmax", lambda *given: upsampled.append(1) or original(*given)
    )
    labels = predict_classes(network, images, (40, 56), protocol)
    assert bool(upsampled) == expected == protocol.is_one_window((40, 56))
    probabilities = predict_probabilities(network, images, (40, 56), protocol)
    assert torch.equal(labels, probabilities.argmax(1))


@pytest.mark.usefixtures("_band")
@pytest.mark.parametrize("size", [(40, 56), (31, 90)])
@pytest.mark.parametrize(("name", "weights"), [("uniform", uniform), ("hann", hann)])
def test_overlapping_windows_are_averaged(network, name, weights, size):
    images = random_images()
    logits = sliding(network, images, (24, 32), (16, 20), weights)
    inference = Inference(window=(24, 32), stride=(16, 20), window_weights=name)
    check(inference, network, images, size, resize(logits, size).softmax(1))


def test_the_cityscapes_protocol_has_three_windows(network):
    """Windows of 1024 at stride 768 in 1024 x 2048: three, the last one moved back."""
    small = Inference(window=(32, 32), stride=(24, 24))
    predict_classes(network, random_images(32, 64, 1), (32, 64), small)
    assert network.sizes == [(32, 32)] * 3


def test_an_image_smaller_than_the_window_is_one_window(network):
    images = random_images(20, 28)
    expected = whole(network, images).softmax(1)
    check(Inference(window=(64, 64)), network, images, (20, 28), expected)


@pytest.mark.usefixtures("_band")
def test_scales_and_flip_average_probabilities(network):
    images = random_images()
    total = 0
    for height, width in ((20, 28), (40, 56), (50, 70)):
        view = resize(images, (height, width))
        for flipped in (False, True):
            logits = resize(whole(network, view.flip(3) if flipped else view), (40, 56))
            total = total + (logits.flip(3) if flipped else logits).softmax(1)
    inference = Inference(scales=(0.5, 1.0, 1.25), flip=True)
    check(inference, network, images, (40, 56), total / 6)


@pytest.mark.usefixtures("_band")
def test_windows_scales_and_flips_combine(network):
    images = random_images()
    total = 0
    for scale in (0.75, 1.5):
        view = resize(images, (int(40 * scale + 0.5), int(56 * scale + 0.5)))
        for flipped in (False, True):
            logits = sliding(network, view.flip(3) if flipped else view, (24, 32), (20, 20), hann)
            logits = resize(logits, (37, 60))
            total = total + (logits.flip(3) if flipped else logits).softmax(1)
    inference = Inference(
        window=(24, 32), stride=(20, 20), window_weights="hann", scales=(0.75, 1.5), flip=True
    )
    check(inference, network, images, (37, 60), total / 4)


def test_padding_is_cut_off(network):
    images = random_images(37, 50)
    padded = F.pad(images, (0, 14, 0, 27))
    expected = whole(network, padded)[:, :, :37, :50].softmax(1)
    network.sizes.clear()
    check(Inference(pad_to=32), network, images, (37, 50), expected)
    assert set(network.sizes) == {(64, 64)}


def test_few_windows_are_held_at_a_time(network, monkeypatch):
    """Memory does not grow with the height of the image."""
    monkeypatch.setitem(bands.BAND_ELEMENTS, "cpu", 8 * 32 * 3)
    held = []
    class_maps = engine.View.class_maps

    def recorded(view, rows):
        result = class_maps(view, rows)
        held.append(len(view.opened))
        return result

    monkeypatch.setattr(engine.View, "class_maps", recorded)
    narrow = Inference(window=(16, 32), stride=(12, 32))
    predict_classes(network, random_images(400, 32, 1), (400, 32), narrow)
    assert len(network.sizes) == 33  # each window once
    assert max(held) <= 3


@pytest.mark.slow
def test_large_images_are_preprocessed_window_by_window(network):
    """The image stays in 8 bits, and the placing matrices do not grow with its area."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (1, 3, 96, 2000), generator=generator, dtype=torch.uint8)
    preprocessed = []

    def preprocess(part):
        preprocessed.append(tuple(part.shape[2:]))
        return part / 255 - 0.5

    settings = Inference(window=(32, 40), stride=(24, 32), flip=True)
    arguments = network.float(), images, (96, 2000), settings, preprocess
    labels = predict_classes(*arguments, torch.uint8)
    assert labels.dtype == torch.uint8
    assert set(preprocessed) == {(32, 40)}
    assert torch.equal(
        labels, predict_classes(network, preprocess(images), (96, 2000), settings).byte()
    )
    axes = engine.window_axes(8000, 512, 512, 8000, "uniform")
    assert {axis.place().shape for axis in axes} == {(512, 512)}


def test_bands_hold_no_full_size_map_of_all_classes(network, monkeypatch):
    elements = []
    original = upsampling.SeparableMap.band

    def recorded(self, maps, rows):
        band = original(self, maps, rows)
        elements.append(band.numel())
        return band

    monkeypatch.setattr(upsampling.SeparableMap, "band", recorded)
    monkeypatch.setitem(bands.BAND_ELEMENTS, "cpu", 5000)
    predict_classes(network, random_images(128, 128, 1), (128, 128), Inference(scales=(1.0, 0.5)))
    assert max(elements) <= 5000 < 128 * 128 * 3


def test_logits_are_upsampled_before_the_decision():
    # Class 2 has the highest logit between two cells and in neither of them, so upsampling the
    # cells' labels would never give it.
    logits = torch.tensor([[[[3.0, 0.0]], [[0.0, 3.0]], [[2.4, 2.4]]]])
    assert logits.argmax(dim=1).tolist() == [[[0, 1]]]
    labels = predict_classes(Constant(logits), torch.zeros(1, 3, 4, 8), (1, 4))
    assert labels.tolist() == [[[0, 2, 2, 1]]]


def test_the_loss_is_exact_where_the_probability_underflows():
    logits = torch.tensor([[[[0.0]], [[200.0]]]])
    pixels = predict_pixels(
        Constant(logits), torch.zeros(1, 3, 4, 4), torch.zeros(1, 1, 1).long(), IGNORED
    )
    assert pixels.losses.item() == 200.0


def test_half_precision_logits_are_converted_to_float32(network):
    network.float()
    network.register_forward_hook(lambda *call: call[2].bfloat16())
    half = predict_probabilities(network, random_images().float(), (40, 56))
    assert half.dtype == torch.float32


def test_every_window_runs_under_autocast(network):
    """Windows are computed while bands are read, and all of them inside the trainer's autocast."""
    dtypes = []
    network.float().conv.register_forward_hook(lambda *call: dtypes.append(call[2].dtype))
    with torch.autocast("cpu", torch.bfloat16):
        inference = Inference(window=(16, 16), stride=(16, 16), scales=(1.0, 2.0))
        probabilities = predict_probabilities(
            network, random_images(48, 32).float(), (48, 32), inference
        )
    assert set(dtypes) == {torch.bfloat16}
    assert probabilities.dtype == torch.float32


def test_windows_without_an_output_pixel_are_left_out(network):
    images = random_images(128, 128, 1)
    windows = Inference(window=(16, 16), stride=(16, 16))
    labels = predict_classes(network, images, (2, 2), windows)
    expected = resize(sliding(network, images, (16, 16), (16, 16), uniform), (2, 2)).argmax(1)
    assert torch.equal(labels, expected)


class Constant:
    """A network that returns the same class maps for every input."""

    def __init__(self, class_maps, output="logits"):
        self.class_maps, self.output, self.num_classes = class_maps, output, class_maps.shape[1]

    def __call__(self, images):
        return self.class_maps


def test_scores_are_normalised_by_their_sum_and_not_by_a_softmax():
    scores = torch.tensor([[[[3.0, 0.0]], [[1.0, 0.0]], [[0.0, 0.0]]]])
    images, target = torch.zeros(1, 3, 1, 2), torch.tensor([[[0, 1]]])
    network = Constant(scores, "scores")
    probabilities = predict_probabilities(network, images, (1, 2))
    assert probabilities[0, :, 0, 0].tolist() == [0.75, 0.25, 0.0]
    # Where no class has a score, probabilities are 0 and not nan.
    assert probabilities[0, :, 0, 1].tolist() == [0.0, 0.0, 0.0]
    pixels = predict_pixels(network, images, target, IGNORED)
    assert pixels.labels.tolist() == [[[0, 0]]]
    assert pixels.confidence.tolist() == [[[0.75, 0.0]]]
    assert pixels.losses[0, 0, 0].item() == pytest.approx(-torch.tensor(0.75).log().item())
    assert pixels.losses.isfinite().all()
    # The mean over views is that of their probabilities; both views are the same here.
    both = predict_probabilities(network, images, (1, 2), Inference(scales=(1.0, 1.0)))
    assert torch.equal(both, probabilities)


def test_the_network_runs_once_for_every_window(network):
    protocol = Inference(window=(24, 32), stride=(16, 24), scales=(1.0, 0.5), flip=True)
    predict_classes(network, random_images(40, 56), (40, 56), protocol)
    assert len(network.sizes) == 2 * (2 * 2) + 2 * 1  # windows of scale 1, whole images of 0.5
