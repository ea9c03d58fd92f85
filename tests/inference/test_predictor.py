"""A predictor is loaded from a source of weights and predicts masks of images."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from segformer_pl.checkpoints import export_weights
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, Predictor
from segformer_pl.models import SegFormer, mit_b0
from segformer_pl.models.mit import MixTransformer
from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD, Normalization

NAMES = ["sky", "road", "car"]
PALETTE = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]


@pytest.fixture
def network(randomize):
    encoder = MixTransformer((4, 4, 8, 8), (1, 1, 1, 1), (1, 1, 2, 2), sr_ratios=(4, 2, 2, 1))
    network = randomize(SegFormer(encoder, 3, decoder_dim=8)).float().eval()
    with torch.no_grad():  # centre the logits, so that an image has several classes
        network.head.classifier.bias -= network(torch.randn(1, 3, 64, 64)).mean((0, 2, 3))
    return network


@pytest.fixture
def pixels():
    return np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)


def expected(network, pixels, mean=IMAGENET_MEAN, std=IMAGENET_STD):
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (mean, std))
    with torch.no_grad():
        logits = network((images - mean) / std)
    logits = nn.functional.interpolate(logits, size=pixels.shape[:2], mode="bilinear")
    return logits[0]


def test_every_type_of_image_gives_the_same_mask(network, pixels, tmp_path):
    predictor = Predictor(network.train(), NAMES, PALETTE)
    mask = predictor(pixels)
    logits = expected(network, pixels)  # the predictor has set evaluation mode
    assert (mask.shape, mask.dtype) == ((40, 56), np.uint8)
    assert (mask != logits.argmax(0).numpy()).mean() < 0.005  # rounding where two classes are equal
    assert len(np.unique(mask)) > 1
    image = Image.fromarray(pixels)
    image.save(tmp_path / "a.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees clockwise for display
    Image.fromarray(np.rot90(pixels).copy()).save(tmp_path / "turned.png", exif=exif)
    for same in (
        tmp_path / "a.png",
        str(tmp_path / "a.png"),
        image,
        tmp_path / "turned.png",
        Image.open(tmp_path / "turned.png"),
        pixels[:, ::-1][:, ::-1],  # not contiguous in memory
        torch.from_numpy(pixels).permute(2, 0, 1),
        torch.from_numpy(pixels).permute(2, 0, 1) / 255,
        torch.from_numpy(pixels).permute(2, 0, 1).double() / 255,
    ):
        assert np.array_equal(predictor(same), mask)
    batch = torch.from_numpy(pixels).permute(2, 0, 1)[None].repeat(2, 1, 1, 1) / 255
    classes = predictor.predict_batch(batch)
    assert (classes.shape, classes.dtype) == ((2, 40, 56), torch.int64)
    assert np.array_equal(classes[1].numpy(), mask)
    again, probabilities = predictor.probabilities(pixels)
    assert np.array_equal(again, mask)
    assert (probabilities.shape, probabilities.dtype) == ((3, 40, 56), np.float16)
    assert np.abs(probabilities - logits.softmax(0).numpy()).max() < 2e-3
    again, confidence = predictor.confidence(pixels)
    assert np.array_equal(again, mask)
    assert confidence.dtype == np.float16
    assert np.array_equal(confidence, probabilities.max(0))


@pytest.mark.parametrize(
    ("image", "sentence"),
    [
        (np.zeros((4, 4, 3), np.float32), r"cannot be a float32 array of shape \(4, 4, 3\)"),
        (np.zeros((4, 4), np.uint8), r"cannot be a uint8 array of shape \(4, 4\)"),
        (torch.zeros(1, 3, 4, 4), r"cannot be a float32 tensor of shape \(1, 3, 4, 4\); give one"),
        (torch.zeros(4, 4, 4), r"cannot be a float32 tensor of shape \(4, 4, 4\)"),
        (torch.zeros(3, 4, 4, dtype=torch.int64), r"cannot be a int64 tensor of shape"),
        (torch.full((3, 4, 4), 255.0), "values from 255 to 255; give a tensor in 0 to 1"),
        (torch.full((3, 4, 4), torch.nan), "values from nan to nan; give a tensor in 0 to 1"),
        (["a.png"], "cannot be a list; give a file, a Pillow image, an array"),
        (Image.new("F", (4, 4)), "an image of mode F holds numbers without a known range"),
        ("nowhere.png", "nowhere.png: it cannot be read"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_other_objects_are_refused(network, image, sentence):
    with pytest.raises(UserError, match=sentence):
        Predictor(network, NAMES)(image)


def test_an_image_size_ignores_the_aspect_ratio(network, pixels):
    predictor = Predictor(network, NAMES, protocol=Inference(image_size=(64, 32), scales=(1.0, 2)))
    sizes = []
    network.register_forward_pre_hook(lambda module, given: sizes.append(given[0].shape[2:]))
    assert predictor(pixels).shape == pixels.shape[:2]
    assert set(sizes) == {(64, 32), (128, 64)}
    with pytest.raises(UserError, match=r"base_size .* and image_size .* exclude each other"):
        Inference(base_size=(64, 32), image_size=(64, 32))


def test_the_protocol_is_applied(network, pixels):
    protocol = Inference(window=(32, 32), flip=True)
    predictor = Predictor(network, NAMES, protocol=protocol)
    sizes = []
    network.register_forward_pre_hook(lambda module, given: sizes.append(given[0].shape[2:]))
    predictor(pixels)
    assert set(sizes) == {(32, 32)}


def test_an_optimized_predictor_predicts_the_same(network, pixels):
    predictor = Predictor(network, NAMES, PALETTE, Normalization((0.4,) * 3), Inference(pad_to=32))
    fast = predictor.optimize()
    assert fast.network is not network
    assert predictor.network is network
    assert sum(1 for _ in fast.network.parameters()) < sum(1 for _ in network.parameters())
    for fact in ("class_names", "palette", "normalization", "protocol"):
        assert getattr(fast, fact) == getattr(predictor, fact)
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        expected = network(images)
        assert (fast.network(images) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (fast(pixels) == predictor(pixels)).mean() > 0.999


@pytest.mark.slow
def test_a_compiled_predictor_predicts_the_same_and_can_be_folded_again(network, pixels):
    predictor = Predictor(network, NAMES)
    fast = predictor.optimize(compile=True)
    for image in (pixels, pixels[:37, :53]):
        assert (fast(image) == predictor(image)).mean() > 0.999
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        again = fast.optimize().network(images)
        assert (again - network(images)).abs().max() < 1e-5 * again.abs().max()


def test_non_finite_outputs_are_refused(network, pixels):
    network.head.classifier.weight.data.fill_(torch.inf)
    predictor = Predictor(network, NAMES)

    def predict_batch(pixels):
        return predictor.predict_batch(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 255)

    for predict in (predictor, predictor.probabilities, predictor.confidence, predict_batch):
        with pytest.raises(UserError, match="outputs hold nan or infinity, so there is no mask"):
            predict(pixels)


def test_facts_that_contradict_the_network_are_refused(network):
    with pytest.raises(UserError, match="the network has 3 classes, but there are 2 class names"):
        Predictor(network, NAMES[:2])
    with pytest.raises(UserError, match=r"takes 3 channels, but its images are normalised with"):
        Predictor(network, NAMES, normalization=Normalization((0.5,), (0.5,)))


FACTS = {
    "class_names": NAMES,
    "palette": PALETTE,
    "image_mean": [0.1, 0.2, 0.3],
    "image_std": [0.4, 0.5, 0.6],
}
PROTOCOL = {
    "class_path": "segformer_pl.inference.Inference",
    "init_args": {"window": None, "scales": [1.0], "flip": True, "pad_to": 32},
}


@pytest.mark.parametrize(
    ("layout", "name"), [("native", "w.safetensors"), ("huggingface", "w"), ("run", "w.ckpt")]
)
def test_facts_of_a_source_are_loaded(network, pixels, tmp_path, layout, name):
    network.set_weight_constants({"norm_eps": 1e-5, "conv_norm_eps": 1e-5})
    if layout == "run":
        state = {f"network.{key}": value for key, value in network.state_dict().items()}
        stated = FACTS | {"network": network.spec(), "inference": PROTOCOL}
        constants = network.weight_constants()
        content = {"state_dict": state, "hyper_parameters": stated, "weight_constants": constants}
        torch.save(content, tmp_path / name)
    else:
        facts = FACTS | ({"inference": PROTOCOL} if layout == "native" else {})
        export_weights(network, tmp_path / name, layout, facts)
    predictor = Predictor.load(tmp_path / name)
    assert predictor.class_names == NAMES
    assert predictor.palette == PALETTE
    assert predictor.normalization == Normalization((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))
    if layout == "huggingface":
        assert predictor.protocol == Inference()
    else:
        assert predictor.protocol == Inference(flip=True, pad_to=32, scales=[1.0])
    here = Predictor(network, NAMES, PALETTE, predictor.normalization, predictor.protocol)
    assert np.array_equal(predictor(pixels), here(pixels))


@pytest.mark.slow
def test_defaults_replace_facts_that_a_source_does_not_state(tmp_path):
    network = SegFormer(mit_b0(), 2, decoder_dim=8)
    torch.save(network.state_dict(), tmp_path / "w.pth")
    predictor = Predictor.load(tmp_path / "w.pth")
    assert predictor.class_names == ["class 0", "class 1"]
    assert predictor.palette is None
    assert predictor.normalization == Normalization()
    assert predictor.protocol == Inference()
    assert predictor.device == torch.device("cpu")
    assert not predictor.network.training


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"class_names": ["sky"]}, "'.*w.ckpt': the network has 3 classes, but there are 1"),
        ({"class_names": [1, 2, 3]}, "it has to be a list of strings"),
        ({"inference": {"class_path": "os.system"}}, "inference protocol as .*os.system"),
        ({"inference": {**PROTOCOL, "init_args": {"angle": 3}}}, "protocol that cannot be used"),
        ({"inference": {**PROTOCOL, "init_args": {"scales": []}}}, "scales is empty"),
    ],
)
def test_a_source_that_contradicts_itself_is_refused(network, tmp_path, changes, sentence):
    stated = FACTS | {"network": network.spec()} | changes
    content = {"state_dict": network.state_dict(), "hyper_parameters": stated}
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=sentence) as error:
        Predictor.load(tmp_path / "w.ckpt")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("stated", "protocol"),
    [
        ({"size": {"height": 64, "width": 32}}, Inference(image_size=[64, 32])),
        ({"size": 64}, Inference(image_size=[64, 64])),
        ({"size": {"shortest_edge": 64, "longest_edge": 99}}, Inference(base_size=[99, 64])),
        ({"size": {"height": 64, "width": 32}, "do_resize": False}, Inference()),
        ({"size": {"shortest_edge": 64}}, Inference()),
        ({}, Inference()),
    ],
)
def test_the_size_that_a_folder_states_is_used(network, tmp_path, stated, protocol):
    export_weights(network, tmp_path / "w", "huggingface", FACTS, {"do_normalize": True} | stated)
    assert Predictor.load(tmp_path / "w").protocol == protocol


def test_weights_of_16_bits_predict(network, pixels, tmp_path):
    torch.save(
        {
            "state_dict": network.half().state_dict(),
            "hyper_parameters": FACTS | {"network": network.spec()},
        },
        tmp_path / "w.ckpt",
    )
    predictor = Predictor.load(tmp_path / "w.ckpt")
    assert next(predictor.network.parameters()).dtype == torch.float32
    assert predictor(pixels).shape == pixels.shape[:2]


def test_a_copy_of_the_weights_is_chosen(network, pixels, tmp_path):
    average = {
        key: t * 2 if t.is_floating_point() else t for key, t in network.state_dict().items()
    }
    content = {"state_dict": network.state_dict(), "ema_state_dict": average}
    content["hyper_parameters"] = FACTS | {"network": network.spec()}
    torch.save(content, tmp_path / "w.ckpt")
    predictor = Predictor.load(tmp_path / "w.ckpt", state="ema_state_dict")
    own, expected = predictor.network.state_dict(), average
    assert all(torch.equal(own[key], expected[key]) for key in own)


@pytest.mark.parametrize(("layout", "name"), [("native", "w.safetensors"), ("huggingface", "w")])
def test_arguments_are_changed_at_equal_weights(network, tmp_path, layout, name):
    export_weights(network, tmp_path / name, layout, FACTS)
    trained = Predictor.load(tmp_path / name)
    merging = Predictor.load(tmp_path / name, changes={"merged_queries": [1, 0.5, 0, 0]})
    assert (merging.class_names, merging.normalization) == (NAMES, trained.normalization)
    assert merging.network.weight_constants() == trained.network.weight_constants()
    encoder = MixTransformer(**network.encoder.init_args() | {"merged_queries": (1, 0.5, 0, 0)})
    expected = SegFormer(encoder, 3, decoder_dim=8).eval()
    expected.load_state_dict(network.state_dict())
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected.set_weight_constants(merging.network.weight_constants())
        assert torch.equal(merging.network(images), expected(images))
        assert not torch.allclose(trained.network(images), expected(images), rtol=1e-3)
    for changes, sentence in (
        ({"merge": [1, 1, 1, 1]}, r"with \{'merge': .*: a SegFormer has no argument 'merge'"),
        ({"merged_queries": [2, 0, 0, 0]}, r"merged_queries=\(2, 0, 0, 0\): give a share"),
        ({"sr_ratios": [4, 2, 2, 2]}, "needs training.*: stage 4: sr_ratio is 1 in the source"),
    ):
        with pytest.raises(UserError, match=sentence):
            Predictor.load(tmp_path / name, changes=changes)


def test_an_encoder_is_refused(tmp_path):
    torch.save(mit_b0().state_dict(), tmp_path / "w.pth")
    with pytest.raises(UserError, match="holds an encoder and no decode head, so it cannot"):
        Predictor.load(tmp_path / "w.pth")
    with pytest.raises(UserError, match="there is no file or folder"):
        Predictor.load(tmp_path / "nowhere.pth")
