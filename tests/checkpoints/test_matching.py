"""Weights of a user's network, which has its own keys and keeps the contract."""

import json

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn

from segformer_pl.checkpoints import export_weights, load_network, load_weights, read_weights
from segformer_pl.errors import UserError
from segformer_pl.models import mit_b0
from segformer_pl.models.segmenter import Segmenter

NAMES = ["sky", "road", "car"]


class Tiny(Segmenter):
    """A stem with a BatchNorm, which is the encoder, and a classifier; one weight constant."""

    classifier_paths = ("predict.1",)

    def __init__(self, num_classes: int, width: int = 4, slope: float = 0.1) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.slope = 3, num_classes, slope
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width))
        self.predict = nn.Sequential(nn.Dropout(), nn.Conv2d(width, num_classes, 1))

    def forward(self, images):
        return self.predict(self.feature_maps(images)["stem"])

    def feature_maps(self, images):
        return {"stem": nn.functional.leaky_relu(self.stem(images), self.slope)}

    def init_args(self):
        return {"num_classes": self.num_classes, "width": self.predict[1].in_channels}

    def layer_ids(self):
        return {name: 0 for name, _ in self.named_parameters() if name.startswith("stem.")}

    def weight_constants(self):
        return {"slope": self.slope}

    def set_weight_constants(self, constants):
        super().set_weight_constants({k: v for k, v in constants.items() if k != "slope"})
        self.slope = constants.get("slope", self.slope)


class Undeclared(Tiny):
    """A network that declares neither an encoder nor a classifier."""

    classifier_paths = ()

    def layer_ids(self):
        return {}


@pytest.fixture
def source(randomize):
    return randomize(Tiny(3, slope=0.25)).float().eval()


def image():
    return torch.linspace(-1, 1, 3 * 8 * 8).view(1, 3, 8, 8)


def refuse(network, source, **arguments):
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    constants = network.weight_constants()
    with pytest.raises(UserError) as error:
        load_weights(network, source, **arguments)
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert network.weight_constants() == constants
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("wrapper", ["", "network.", "module.", "model.", "network.module."])
def test_its_own_state_dict_is_loaded_after_any_prefix(source, wrapper):
    network = Tiny(3)
    state = {f"{wrapper}{name}": tensor for name, tensor in source.state_dict().items()}
    report = load_weights(network, state)
    for name, tensor in source.state_dict().items():
        assert torch.equal(network.state_dict()[name], tensor), name
    assert report.num_tensors == len(state)
    assert report.layout == "keys of the model"
    assert "slope 0.1: the model's own, the source does not state any" in str(report)
    stray = state | {"step": torch.zeros(())}
    assert "holds 1 tensor that the model has no place for (step)" in refuse(Tiny(3), stray)


def test_weights_that_do_not_fit_are_refused(source):
    state = source.state_dict()
    gap = {name: tensor for name, tensor in state.items() if name != "stem.1.running_var"}
    assert "lacks 1 tensor of the model (stem.1.running_var)" in refuse(Tiny(3), gap)
    assert "has stem.0.weight as 4x3x3x3, the model as 5x3x3x3, and" in refuse(Tiny(3, 5), state)
    state["stem.0.bias"][0] = torch.nan
    assert "nan or infinity in 1 value of stem.0.bias" in refuse(Tiny(3), state)
    message = refuse(Tiny(3), mit_b0().state_dict())
    assert "holds no tensor of a Tiny (stem.0.weight, stem.0.bias" in message
    assert "backbone" in refuse(Tiny(3), {"backbone.patch_embed1.proj.weight": torch.zeros(2)})


def test_classes_are_reordered_and_reinitialised(source):
    content = {"state_dict": source.state_dict(), "hyper_parameters": {"class_names": NAMES}}
    network = Tiny(3).eval()
    message = refuse(network, content, class_names=["car", "sky", "road"])
    assert "--model.match_classes by_name, which reorders the classifier" in message
    names = ["car", "tree", "sky"]
    report = load_weights(network, content, class_names=names, match_classes="by_name")
    weights = (source.predict[1].weight, network.predict[1].weight)
    assert torch.equal(weights[1][[0, 2]], weights[0][[2, 0]])
    assert "1 classes that the source does not have: tree" in str(report)
    report = load_weights(Tiny(5), content)
    assert set(report.reinitialized) == {"predict.1.weight", "predict.1.bias"}


def test_an_undeclared_classifier_is_not_reordered(source):
    content = {"state_dict": source.state_dict(), "hyper_parameters": {"class_names": NAMES}}
    message = refuse(Undeclared(3), content, class_names=["car", "sky", "road"])
    assert "its classifier cannot be reordered" in message
    report = load_weights(Undeclared(3), content, class_names=NAMES)
    assert "classes: those of the data set, in the same order" in str(report)
    load_weights(Undeclared(3), content, class_names=list("abc"), match_classes="by_index")
    assert "has predict.1.weight as 3x4x1x1, the model as 5x4x1x1" in refuse(Undeclared(5), content)


def test_the_encoder_alone_is_loaded_with_its_running_statistics(source):
    network = Tiny(7)
    before = network.predict[1].weight.clone()
    report = load_weights(network, source.state_dict(), parts="encoder")
    for name, tensor in source.stem.state_dict().items():
        assert torch.equal(network.stem.state_dict()[name], tensor), name
    assert torch.equal(network.predict[1].weight, before)
    assert set(report.dropped) == {"predict.1.weight", "predict.1.bias"}
    message = refuse(Undeclared(3), source.state_dict(), parts="encoder")
    assert "a Undeclared has no encoder that could be loaded alone" in message


class Backbone(nn.Module):
    """A classification network, whose stem is the encoder of a :class:`Wrapping`."""

    def __init__(self, has_classes=True):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3, 4, 1), nn.BatchNorm2d(4)
        if has_classes:
            self.fc = nn.Linear(4, 1000)


class Wrapping(Tiny):
    """The same network with its encoder deeper in the tree, as with an encoder of timm."""

    classifier_paths = ("other_head",)

    def __init__(self, num_classes: int) -> None:
        super().__init__(num_classes)
        del self.stem, self.predict
        self.encoder = nn.ModuleDict({"backbone": Backbone(has_classes=False)})
        self.other_head = nn.Conv2d(4, num_classes, 1)

    def init_args(self):
        return {"num_classes": self.num_classes}

    def layer_ids(self):
        return {name: 0 for name, _ in self.named_parameters() if name.startswith("encoder.")}


@pytest.mark.parametrize("wrapper", ["", "encoder.backbone.", "module.encoder.backbone."])
def test_a_backbone_without_its_classes_fills_an_encoder(randomize, wrapper):
    backbone = randomize(Backbone()).float()
    state = {f"{wrapper}{name}": tensor for name, tensor in backbone.state_dict().items()}
    if not wrapper:
        before = Wrapping(2).state_dict().keys()
        network = Wrapping(2)
        report = load_weights(network, state, parts="encoder")
        assert set(report.dropped) == {"encoder.backbone.fc.weight", "encoder.backbone.fc.bias"}
        assert network.state_dict().keys() == before
    else:  # under the prefix of the encoder's own modules, unknown tensors are mistakes
        assert "no place for" in refuse(Wrapping(2), state, parts="encoder")
        state = {key: tensor for key, tensor in state.items() if ".fc." not in key}
        network = Wrapping(2)
        load_weights(network, state, parts="encoder")
    for name, tensor in network.encoder["backbone"].state_dict().items():
        assert torch.equal(tensor, backbone.state_dict()[name]), name


def test_the_encoder_of_another_segmenter_is_loaded(randomize):
    state = randomize(Wrapping(2)).float().state_dict()
    head = {"decode.conv.weight": torch.zeros(3), "decode.norm.bias": torch.zeros(2)}
    other = {key: t for key, t in state.items() if key.startswith("encoder.")} | head
    network = Wrapping(5)
    report = load_weights(network, other, parts="encoder")
    assert set(report.dropped) == set(head)
    assert torch.equal(
        network.encoder["backbone"].conv.weight, state["encoder.backbone.conv.weight"]
    )
    deeper = other | {"encoder.backbone.conv2.weight": torch.zeros(2)}
    assert "no place for (encoder.backbone.conv2.weight)" in refuse(
        Wrapping(5), deeper, parts="encoder"
    )
    gap = {key: tensor for key, tensor in other.items() if "norm.bias" not in key}
    assert "lacks 1 tensor of the model" in refuse(Wrapping(5), gap, parts="encoder")
    # Names that are equal by chance make no backbone.
    stranger = {"conv.weight": torch.zeros(4, 3, 3, 3)}
    stranger |= {f"blocks.{number}.weight": torch.zeros(2) for number in range(3)}
    assert "holds no tensor of a Wrapping" in refuse(Wrapping(5), stranger, parts="encoder")


def test_arguments_and_constants_of_the_training_are_compared(source):
    spec = {"class_path": "mine.Tiny", "init_args": {"num_classes": 9, "width": 8, "slope": 0.5}}
    content = {"state_dict": source.state_dict(), "hyper_parameters": {"network": spec}}
    network = Tiny(3)
    report = load_weights(network, content)
    assert report.changed == ("width is 4 here and 8 in the source",)
    assert network.slope == 0.5
    assert "slope 0.5: the arguments of the run that the source comes from" in str(report)
    content["weight_constants"] = {"slope": 0.75}
    assert load_weights(network, content).constants == {"slope": 0.75}
    content["weight_constants"] = {"curve": 0.75}
    assert "was trained with curve 0.75, and a Tiny has no such constant" in refuse(
        Tiny(3), content
    )
    for wrong in ([1.0], {"slope": "steep"}, {"slope": float("inf")}):
        content["weight_constants"] = wrong
        assert "it has to be a dict of numbers" in refuse(Tiny(3), content)


@torch.no_grad()
def test_the_native_layout_stores_any_network(source, tmp_path):
    file = tmp_path / "w.safetensors"
    assert export_weights(source, file, "native", {"class_names": NAMES}) == []
    with safe_open(file, framework="pt") as content:
        known = json.loads(content.metadata()["segformer_pl"])
    assert known["task"]["network"] == source.spec()
    assert known["weight_constants"] == {"slope": 0.25}
    network, report = load_network(file)
    assert type(network) is Tiny
    assert network.slope == 0.25
    assert "slope 0.25: stated in the source" in str(report)
    assert torch.equal(network.eval()(image()), source(image()))
    assert read_weights(file).task["class_names"] == NAMES
    for layout, name in (("huggingface", "x"), ("smp", "x"), ("nvlabs", "x.pth")):
        with pytest.raises(UserError, match=r"serves SegFormer .*and this is a Tiny; use native,"):
            export_weights(source, tmp_path / name, layout)


def test_a_description_that_is_not_plain_data_is_refused(source, tmp_path, monkeypatch):
    monkeypatch.setattr(Tiny, "init_args", lambda self: {"act": nn.ReLU()})
    with pytest.raises(UserError, match="is not described by plain data"):
        export_weights(source, tmp_path / "w.safetensors", "native")
    assert list(tmp_path.iterdir()) == []


def test_a_description_of_another_number_of_classes_is_refused(source, tmp_path):
    spec = source.spec() | {"init_args": {"num_classes": 4, "width": 4}}
    content = {"state_dict": source.state_dict(), "hyper_parameters": {"network": spec}}
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(UserError, match=r"describes another network .*3 classes in the source"):
        load_network(tmp_path / "w.ckpt")


@torch.no_grad()
def test_a_native_file_of_an_earlier_version_loads(request):
    """Its metadata hold `norm_eps` in place of weight constants."""
    folder = request.config.rootpath / "tests" / "fixtures"
    network, report = load_network(folder / "native_norm_eps.safetensors")
    assert report.constants == {"norm_eps": 0.25, "conv_norm_eps": 0.125}
    assert network.spec()["init_args"]["dropout"] == 0.2
    images = torch.linspace(-1, 1, 3 * 32 * 64).view(1, 3, 32, 64)
    expected = torch.from_numpy(np.load(folder / "native_norm_eps_logits.npy"))
    torch.testing.assert_close(network.eval()(images), expected, rtol=1e-5, atol=1e-5)
    facts = read_weights(folder / "native_norm_eps.safetensors").task
    assert facts["class_names"] == NAMES
    assert facts["image_mean"] == [0.1, 0.2, 0.3]


def test_a_native_file_that_could_not_be_read_again_is_not_written(tmp_path):
    class_arguments = Tiny.init_args
    network = Tiny(num_classes=3)
    network.init_args = lambda: class_arguments(network) | {"widht": 4}
    with pytest.raises(UserError, match="unexpected keyword argument 'widht'"):
        export_weights(network, tmp_path / "tiny.safetensors", "native")
    assert list(tmp_path.iterdir()) == []
