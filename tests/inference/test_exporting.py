"""Exported files predict like the predictor that they were made from, or are not kept."""

import copy
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F

from segformer_pl import __version__, models
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, Predictor, exporting
from segformer_pl.inference.exporting import export_graph
from segformer_pl.inference.targets import TARGETS
from segformer_pl.models import SegFormer
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.segmenter import Segmenter
from segformer_pl.normalization import Normalization

NAMES = ["sky", "road", "car"]
PALETTE = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
NORMALIZATION = Normalization((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
SIZES = [(64, 64), (65, 97), (128, 33)]


class Small(Segmenter):
    """Few operations, so that it is traced quickly. Its map has a stride of 4."""

    min_size = 4

    def __init__(self):
        super().__init__()
        self.in_channels, self.num_classes = 3, len(NAMES)
        self.features = nn.Conv2d(3, 8, 7, stride=4, padding=3)
        self.norm = nn.BatchNorm2d(8)
        self.classifier = nn.Conv2d(8, len(NAMES), 1)

    def feature_maps(self, images):
        return {"features": self.norm(self.features(images)).relu()}

    def forward(self, images):
        return self.classifier(self.feature_maps(images)["features"])

    def init_args(self):
        return {}


def predictor_of(network, protocol=None):
    """Return a predictor whose logits are centred, so that all classes occur."""
    network.float().eval()
    with torch.no_grad():
        *_, classifier = (m for m in network.modules() if isinstance(m, nn.Conv2d))
        if classifier.out_channels == len(NAMES):
            classifier.bias -= network(torch.randn(1, 3, 64, 64)).mean((0, 2, 3))
    return Predictor(network, NAMES, PALETTE, NORMALIZATION, protocol)


@pytest.fixture
def small(randomize):
    return predictor_of(randomize(Small()))


def images(*sizes):
    rng = np.random.default_rng(0)
    for height, width in sizes:
        coarse = rng.integers(0, 256, (height // 8 + 1, width // 8 + 1, 3), np.uint8)
        yield f"{height}x{width}", np.array(Image.fromarray(coarse).resize((width, height)))


@pytest.fixture(scope="module")
def segformer(randomize):
    torch.manual_seed(0)
    encoder = MixTransformer((4, 4, 8, 8), (1, 1, 1, 1), (1, 1, 2, 2))
    return predictor_of(randomize(SegFormer(encoder, len(NAMES), decoder_dim=8)))


@pytest.fixture(scope="module")
def onnx_file(segformer, tmp_path_factory):
    """SegFormer for images of any size."""
    pytest.importorskip("onnxruntime")
    file = tmp_path_factory.mktemp("onnx") / "model.onnx"
    found = export_graph(segformer, file, "onnx", images(*SIZES), ignore_index=255)
    assert found.num_images == len(SIZES)
    assert found.share > 0.9995
    assert found.classes == {0, 1, 2}
    return file


def test_one_onnx_file_takes_any_number_of_images_of_any_size(segformer, onnx_file):
    run, _ = TARGETS["onnx"].open(onnx_file)
    for _, pixels in images((47, 61), (32, 160)):  # other sizes than those it was verified on
        masks = run(torch.from_numpy(np.stack([pixels, pixels[::-1], pixels])))
        assert masks.dtype == torch.uint8
        assert masks.shape == (3, *pixels.shape[:2])
        assert (masks[0].numpy() == segformer(pixels)).mean() > 0.999
        assert (masks[1].numpy() == segformer(pixels[::-1])).mean() > 0.999
        assert torch.equal(masks[0], masks[2])
    assert sorted(path.name for path in onnx_file.parent.iterdir()) == ["model.onnx"]


def test_the_onnx_file_describes_itself_and_keeps_the_epsilons(segformer, onnx_file):
    import onnx

    model = onnx.load(onnx_file)
    stated = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert stated == {
        "segformer_pl": __version__,
        "network": "SegFormer",
        "input": "(batch, height, width, 3) uint8, RGB",
        "output": "(batch, height, width) uint8, class indices",
        "image_mean": [0.4, 0.5, 0.6],
        "image_std": [0.2, 0.25, 0.3],
        "class_names": NAMES,
        "palette": PALETTE,
        "ignore_index": 255,
        "weight_constants": {"norm_eps": 1e-6, "conv_norm_eps": 1e-5},
        "image_size": None,
        "resize_to": None,
        "pad_to": None,
    }
    (given,), (result,) = model.graph.input, model.graph.output
    dims = [dim.dim_param or dim.dim_value for dim in given.type.tensor_type.shape.dim]
    assert (given.name, dims) == ("images", ["batch", "height", "width", 3])
    assert result.name == "classes"
    found = sorted(
        round(attribute.f, 9)
        for node in model.graph.node
        if node.op_type == "LayerNormalization"
        for attribute in node.attribute
        if attribute.name == "epsilon"
    )
    norms = [m for m in segformer.network.modules() if isinstance(m, nn.LayerNorm)]
    assert found == sorted(norm.eps for norm in norms)


def test_the_documented_reader_needs_neither_torch_nor_this_package(segformer, onnx_file, tmp_path):
    text = (Path(__file__).parents[2] / "docs" / "export.md").read_text()
    (program,) = re.findall(r"^```python\n(import json.*?)^```", text, re.DOTALL | re.MULTILINE)
    (_, pixels), *_ = images((61, 83))
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    (tmp_path / "model.onnx").symlink_to(onnx_file)
    program += "\nimport sys\nassert not {'torch', 'segformer_pl'} & set(sys.modules)\n"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    mask = segformer(pixels)
    found = np.asarray(Image.open(tmp_path / "mask.png"))
    assert (found == mask).mean() > 0.999
    colors = np.asarray(Image.open(tmp_path / "mask.png").convert("RGB"))
    assert np.array_equal(colors, np.array(PALETTE, np.uint8)[found])
    assert done.stdout.split() == [NAMES[i] for i in np.unique(found)]


@pytest.mark.slow
def test_torch_export_of_segformer(segformer, tmp_path):
    file = tmp_path / "model.pt2"
    export_graph(segformer, file, "torch-export", images(*SIZES, (47, 61), (256, 40)))
    with pytest.raises(Exception, match=r"(?i)guard|size|expected"):
        TARGETS["torch-export"].open(file).run(torch.zeros(1, 8, 64, 3, dtype=torch.uint8))


@pytest.mark.parametrize(
    "to", ["torch-export", "onnx", "openvino", pytest.param("aoti", marks=pytest.mark.slow)]
)
def test_every_target_predicts_alike_and_describes_itself(small, tmp_path, to):
    target = TARGETS[to]
    for package in target.packages:
        pytest.importorskip(package)
    file = tmp_path / "sub" / f"model{target.suffixes[0]}"
    found = export_graph(small, file, to, images(*SIZES))
    assert found.worst_share > 0.9995
    names = {path.name for path in file.parent.iterdir()}
    assert names == {f"model{suffix}" for suffix in target.suffixes}
    graph = target.open(file)
    stated = {name: json.loads(value) for name, value in graph.description.items()}
    assert (stated["class_names"], stated["image_mean"]) == (NAMES, [0.4, 0.5, 0.6])
    assert stated["input"].startswith("(batch," if target.any_batch else "(1,")
    for _, pixels in images((50, 31)):
        mask = graph.run(torch.from_numpy(pixels)[None])[0].numpy()
        assert (mask == small(pixels)).mean() > 0.999


def test_a_stated_size_is_in_the_graph(small, tmp_path):
    small.protocol = Inference(image_size=(40, 56))
    small.network.traces_any_size = False  # it sees images of one size
    plain = Predictor(small.network, NAMES, PALETTE, NORMALIZATION)
    ((_, pixels),) = images((65, 97))
    for to in ("torch-export", "onnx"):
        target = TARGETS[to]
        for package in target.packages:
            pytest.importorskip(package)
        file = tmp_path / f"{to}{target.suffixes[0]}"
        export_graph(small, file, to, images(*SIZES))
        graph = target.open(file)
        assert json.loads(graph.description["image_size"]) == [40, 56]
        mask = graph.run(torch.from_numpy(pixels)[None])[0].numpy()
        assert (mask == small(pixels)).mean() > 0.999
        assert (mask == plain(pixels)).mean() < 0.999  # the size matters
    pytest.importorskip("openvino")
    with pytest.raises(
        UserError, match=r"to \[40, 56\] with antialiasing .*, which openvino lacks"
    ):
        export_graph(small, tmp_path / "m.xml", "openvino", images(*SIZES))


@pytest.mark.parametrize("protocol", [{"pad_to": 16}, {"resize_to": 16}], ids=str)
def test_padding_and_resizing_are_in_the_graph(small, tmp_path, protocol):
    small.protocol = Inference(**protocol)
    export_graph(small, tmp_path / "m.pt2", "torch-export", images(*SIZES))
    plain = Predictor(small.network, NAMES, PALETTE, NORMALIZATION)
    run, _ = TARGETS["torch-export"].open(tmp_path / "m.pt2")
    ((_, pixels),) = images((65, 97))
    mask = run(torch.from_numpy(pixels)[None])[0].numpy()
    assert (mask == plain(pixels)).mean() < 0.999  # the protocol matters


def test_the_network_alone_serves_every_protocol(small, tmp_path):
    pytest.importorskip("onnxruntime")
    small.protocol = Inference(window=(48, 48), scales=(1, 1.5), flip=True)
    found = export_graph(small, tmp_path / "m.onnx", "onnx", images(*SIZES), network_only=True)
    assert found.worst_share > 0.9995
    batch = torch.randn(2, 3, 45, 61)
    with torch.no_grad():
        expected = small.network(batch)
    maps = TARGETS["onnx"].open(tmp_path / "m.onnx").run(batch)
    assert (maps - expected).abs().max() < 1e-5 * expected.abs().max()


def test_a_fixed_size(small, tmp_path):
    file = tmp_path / "m.pt2"
    export_graph(small, file, "torch-export", images((40, 56)), size=(40, 56))
    run, description = TARGETS["torch-export"].open(file)
    assert json.loads(description["input"]) == "(1, 40, 56, 3) uint8, RGB"
    with pytest.raises(Exception, match="40"):
        run(torch.zeros(1, 41, 56, 3, dtype=torch.uint8))


def wrong_mean(predictor):
    predictor.normalization = Normalization((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def wrong_epsilon(predictor):
    predictor.network.norm.eps = 0.3


def swapped_classes(predictor):
    with torch.no_grad():
        for parameter in predictor.network.classifier.parameters():
            parameter.copy_(parameter[[1, 0, 2]].clone())


@pytest.mark.parametrize("fault", [wrong_mean, wrong_epsilon, swapped_classes])
def test_a_planted_fault_is_detected_and_leaves_no_file(small, tmp_path, monkeypatch, fault):
    trace = exporting.trace

    def faulty(predictor, *arguments):
        planted = copy.deepcopy(predictor)
        fault(planted)
        return trace(planted, *arguments)

    monkeypatch.setattr(exporting, "trace", faulty)
    with pytest.raises(UserError, match=r"predicts other classes .* 64x64 agrees in .* no file"):
        export_graph(small, tmp_path / "m.pt2", "torch-export", images((64, 64)))
    assert list(tmp_path.iterdir()) == []


SWIN = {"embed_dim": 8, "depths": [1, 1, 2, 1], "num_heads": [1, 2, 4, 8], "window_size": 4}
SYSTEMS = {
    "setr_pup": {"backbone": "test_vit", "image_size": 64, "decoder_dim": 8},
    "semask_fpn": {"decoder_dim": 8, **SWIN},
    "maskformer": {
        **{"backbone": "test_resnet", "num_queries": 8, "decoder_dim": 64, "decoder_layers": 1},
        **{"decoder_heads": 2, "decoder_mlp_dim": 16},
    },
    "deeplabv3plus": {"backbone": "test_resnet", "decoder_dim": 8},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "to", "protocol", "size"),
    [
        # torch 2.15 cannot store math.ceil of a size, which timm computes in this backbone.
        ("deeplabv3plus", "onnx", {}, None),
        ("maskformer", "torch-export", {}, None),
        ("setr_pup", "torch-export", {"pad_to": 16}, None),
        ("semask_fpn", "torch-export", {}, (65, 97)),
    ],
)
def test_other_systems(name, to, protocol, size, randomize, tmp_path):
    network = randomize(getattr(models, name)(len(NAMES), **SYSTEMS[name]))
    predictor = predictor_of(network, Inference(**protocol))
    sizes = [(64, 64), (65, 97), (47, 130)] if size is None else [size]
    file = tmp_path / f"m{TARGETS[to].suffixes[0]}"
    export_graph(predictor, file, to, images(*sizes), size=size)


def test_a_network_of_fixed_sizes_says_so(small, tmp_path):
    small.network.traces_any_size = False
    with pytest.raises(UserError, match=r"trace Small for images of any size; give .* --size"):
        export_graph(small, tmp_path / "m.pt2", "torch-export", images((64, 64)))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"to": "keras"}, "to 'keras': choose one of torch-export, onnx, openvino, aoti"),
        ({"file": "m.onnx"}, r"m.onnx' does not end in \.pt2, which torch-export is"),
        ({"file": "there.pt2"}, r"there.pt2' exists already; remove it"),
        ({"images": ()}, "there is no image to compare predictions on"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_impossible_arguments_are_refused(small, tmp_path, changes, sentence):
    (tmp_path / "there.pt2").write_bytes(b"")
    given = {"file": "m.pt2", "to": "torch-export", "images": images((64, 64))} | changes
    with pytest.raises(UserError, match=sentence):
        export_graph(small, tmp_path / given.pop("file"), **given)
    assert [path.name for path in tmp_path.iterdir()] == ["there.pt2"]


def test_a_protocol_that_does_not_fit_into_a_graph_is_refused(small, tmp_path):
    small.protocol = Inference(window=(32, 32), flip=True)
    remedy = r"give --inference.window null --inference.flip false, or --network_only"
    with pytest.raises(UserError, match=f"sets window, flip, and .*; {remedy}"):
        export_graph(small, tmp_path / "m.pt2", "torch-export", images((64, 64)))


def test_a_missing_package_is_named(small, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"to onnx needs the package onnxscript.*\[export\]'"):
        export_graph(small, tmp_path / "m.onnx", "onnx", images((64, 64)))


def test_a_network_that_cannot_be_traced_is_refused(small, tmp_path):
    class Reading(Small):
        def forward(self, given):
            return super().forward(given) * (1 if given.mean().item() > 0 else 2)

    predictor = predictor_of(Reading())
    with pytest.raises(UserError, match=r"Reading cannot be exported for .* any size .*--size"):
        export_graph(predictor, tmp_path / "m.pt2", "torch-export", images((64, 64)))
    assert list(tmp_path.iterdir()) == []


def test_interpolate_is_the_upsampling_of_the_engine():
    """The graph upsamples with ``interpolate``, the predictor with matrices in float64."""
    from segformer_pl.upsampling import bilinear_matrix

    maps = torch.randn(1, 3, 13, 17)
    rows, columns = bilinear_matrix(13, 65).float(), bilinear_matrix(17, 97).float()
    expected = rows @ maps @ columns.T
    found = F.interpolate(maps, size=(65, 97), mode="bilinear", align_corners=False)
    assert (found - expected).abs().max() < 1e-5
