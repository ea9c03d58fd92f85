"""The package's own networks keep the contract."""

import inspect

import pytest
import torch
from torch import nn

from segformer_pl import models
from segformer_pl.errors import UserError
from segformer_pl.models import Encoder, MixTransformer, SegFormer, Segmenter
from segformer_pl.models.segmenter import check_segmenter

TINY = {"embed_dims": (2, 4, 4, 8), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 1, 2)}
VARIATIONS = [
    {},
    {"sr_ratios": (4, 2, 1, 1), "mlp_ratio": 2, "drop_path_rate": 0.3, "in_channels": 5},
    {"kv_border": "keep", "norm_eps": 0.25, "conv_norm_eps": 0.5},
    {"merged_queries": (0.5, 1, 0, 0.25)},
    {"patch_sizes": (4, 2, 2, 2)},
    {"patch_sizes": (8, 3, 2, 3), "strides": (8, 2, 1, 2), "paddings": (2, 1, 0, 1)},
    {"pos_encoding": "learned", "image_size": 64},
    {"pos_encoding": "none", "depths": (1, 1, 1, 1)},
]


def build(spec):
    """Build a network from its specification, as a checkpoint stores it."""
    arguments = {
        key: build(value) if isinstance(value, dict) else value
        for key, value in spec["init_args"].items()
    }
    return getattr(models, spec["class_path"].rsplit(".", 1)[1])(**arguments)


@pytest.mark.parametrize("arguments", VARIATIONS, ids=str)
def test_a_specification_rebuilds_the_network(arguments):
    encoder = MixTransformer(**TINY | arguments)
    network = SegFormer(encoder, 3, decoder_dim=4, in_indices=(1, 3), dropout=0.4).eval()
    again = build(network.spec())
    assert again.init_args() == network.init_args()
    stated = network.init_args()["encoder"]["init_args"]
    for key, value in (TINY | arguments).items():
        # Several image sizes give the same position tables; the smallest is returned.
        assert stated[key] == (61 if key == "image_size" else value), key
    again.load_state_dict(network.state_dict())
    images = torch.randn(2, encoder.in_channels, 64, 96)
    with torch.no_grad():
        assert torch.equal(again.eval()(images), network(images))


@pytest.mark.parametrize("arguments", VARIATIONS, ids=str)
def test_out_sizes_are_those_of_the_features(arguments):
    encoder = MixTransformer(**TINY | arguments).eval()
    for height, width in ((64, 64), (70, 101), (97, 64)):
        with torch.no_grad():
            features = encoder(torch.zeros(1, encoder.in_channels, height, width))
        sizes = encoder.out_sizes(height, width)
        assert [tuple(feature.shape[2:]) for feature in features] == sizes


@pytest.mark.parametrize("arguments", VARIATIONS, ids=str)
def test_min_size_is_the_smallest_image(arguments):
    network = SegFormer(MixTransformer(**TINY | arguments), 2, decoder_dim=4).eval()
    side = network.min_size
    with torch.no_grad():
        network(torch.zeros(1, network.in_channels, side, side))
        if side > 1:
            with pytest.raises((ValueError, RuntimeError)):
                network(torch.zeros(1, network.in_channels, side - 1, side))


def test_min_size_with_the_arguments_of_the_paper():
    with torch.device("meta"):
        assert models.segformer_b0(2).min_size == 29


def test_parts_hold_every_parameter_once():
    network = SegFormer(MixTransformer(**TINY), 2, decoder_dim=4)
    inside = [
        parameter
        for path in network.parts().values()
        for parameter in network.get_submodule(path).parameters()
    ]
    assert [id(p) for p in inside] == [id(p) for p in network.parameters()]


def test_weight_constants_are_set():
    network = SegFormer(MixTransformer(**TINY), 2, decoder_dim=4)
    assert network.weight_constants() == {"norm_eps": 1e-6, "conv_norm_eps": 1e-5}
    network.set_weight_constants({"conv_norm_eps": 0.5})
    assert network.weight_constants() == {"norm_eps": 1e-6, "conv_norm_eps": 0.5}
    assert {m.eps for m in network.encoder.modules() if isinstance(m, nn.LayerNorm)} == {1e-6, 0.5}
    with pytest.raises(UserError, match="the weights state tau, which MixTransformer does not"):
        network.set_weight_constants({"tau": 1.0, "norm_eps": 0.5})
    assert network.weight_constants()["norm_eps"] == 1e-6


class Plain(Encoder):
    """An encoder that implements only the abstract methods."""

    def __init__(self):
        super().__init__()
        self.in_channels, self.out_channels, self.out_strides = 3, (2, 4), (4, 8)
        self.fine, self.coarse = nn.Conv2d(3, 2, 4, 4), nn.Conv2d(2, 4, 3, 2, 1)

    def forward(self, images):
        fine = self.fine(images)
        return [fine, self.coarse(fine)]

    def init_args(self):
        return {}


def test_segformer_takes_a_convolutional_encoder():
    network = SegFormer(Plain(), 5, decoder_dim=4, in_indices=(0, 1))
    assert network(torch.zeros(2, 3, 20, 32)).shape == (2, 5, 5, 8)
    assert network.encoder.out_sizes(20, 32) == [(5, 8), (3, 4)]
    assert list(network.feature_maps(torch.zeros(1, 3, 32, 32))) == ["stage1", "stage2", "head"]
    assert network.parts() == {"fine": "encoder.fine", "coarse": "encoder.coarse", "head": "head"}
    assert set(network.layer_ids().values()) == {0}
    assert len(network.layer_ids()) == 4
    assert network.no_weight_decay() == set()
    assert network.weight_constants() == {}
    assert network.paper_macs(64, 64) is None
    assert network.min_size == 1
    assert network.spec() == {
        "class_path": "segformer_pl.models.segformer.SegFormer",
        "init_args": {
            "encoder": {"class_path": f"{__name__}.Plain", "init_args": {}},
            "num_classes": 5,
            "decoder_dim": 4,
            "in_indices": (0, 1),
            "dropout": 0.1,
        },
    }


def test_a_network_that_lacks_an_abstract_method_is_refused():
    class Half(Segmenter):
        def forward(self, images):
            return images

    with pytest.raises(TypeError, match="feature_maps"):
        Half()


class Sound(Segmenter):
    def __init__(self, **changes):
        super().__init__()
        self.in_channels, self.num_classes = 3, 2
        self.classifier = nn.Conv2d(3, 2, 1)
        for name, value in changes.items():
            setattr(self, name, value)

    def forward(self, images):
        return self.classifier(images)

    def feature_maps(self, images):
        return {"images": images}

    def init_args(self):
        return self.arguments if hasattr(self, "arguments") else {}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_classes": None}, "num_classes is None; let the constructor of Sound set it"),
        ({"in_channels": 0}, "in_channels is 0"),
        ({"min_size": 7.5}, r"min_size is 7\.5"),
        ({"output": "probs"}, "output is 'probs'; let Sound choose one of logits, scores"),
        ({"classifier_paths": ("classifier", "clasifier")}, "name 'clasifier', and Sound has no"),
        ({"classifier_paths": "classifier"}, "are 'classifier'; let Sound set them to a tuple"),
        ({"classifier_paths": ("classifier",), "num_classes": 3}, "weight has no row for each of"),
        ({"auxiliary_paths": "aux"}, "auxiliary_paths are 'aux'; let Sound set them to a tuple"),
        ({"arguments": [2]}, r"init_args\(\) of Sound returns a list"),
    ],
)
def test_what_the_contract_asks_for_is_checked(changes, message):
    check_segmenter(Sound(classifier_paths=("classifier",)))
    check_segmenter(Sound(classifier_paths=("classifier",), num_classes=1))  # one further row
    with pytest.raises(UserError, match=message):
        check_segmenter(Sound(**changes))
    with pytest.raises(UserError, match="is a Conv2d, which does not inherit from"):
        check_segmenter(nn.Conv2d(3, 2, 1))


@pytest.mark.parametrize(
    ("owner", "message"),
    [
        (
            "network",
            r"^Sound\.layer_ids\(\) leaves out 3 parameters, such as encoder\.coarse\.bias, ",
        ),
        ("encoder", r"^Plain\.layer_ids\(\) leaves out 3 parameters, such as coarse\.bias, which"),
    ],
)
def test_every_parameter_of_an_encoder_has_a_layer(owner, message, monkeypatch):
    """Otherwise it would train at the head's learning rate."""
    network = Sound(encoder=Plain())
    assert network.layer_ids().keys() == network.encoder_parameters()
    check_segmenter(network)
    one, prefix = (network, "encoder.") if owner == "network" else (network.encoder, "")
    monkeypatch.setattr(one, "layer_ids", lambda: {f"{prefix}fine.weight": 0})
    with pytest.raises(UserError, match=message):
        check_segmenter(network)


def test_a_network_of_a_user_answers_for_its_encoder():
    """All that the contract asks of a segmenter with an encoder as one of its children."""
    encoder = MixTransformer(**TINY)
    network = Sound(encoder=encoder, dropout=nn.Dropout())
    stages = {f"stage{s}": f"encoder.stages.{s - 1}" for s in (1, 2, 3, 4)}
    assert network.parts() == {"classifier": "classifier", **stages}
    assert network.layer_ids() == {f"encoder.{n}": i for n, i in encoder.layer_ids().items()}
    assert network.no_weight_decay() == {f"encoder.{n}" for n in encoder.no_weight_decay()}
    network.set_weight_constants({"norm_eps": 0.5})
    assert network.weight_constants() == {"norm_eps": 0.5, "conv_norm_eps": 1e-5}
    with pytest.raises(UserError, match="the weights state tau, which MixTransformer does not"):
        network.set_weight_constants({"tau": 1.0})
    assert Sound().encoder_parameters() == set()


def test_training_arguments_are_arguments():
    classes = [one for one in vars(models).values() if inspect.isclass(one)]
    networks = [one for one in classes if issubclass(one, Segmenter | Encoder)]
    assert len(networks) == 11
    for network in networks:
        assert set(network.training_arguments) <= inspect.signature(network).parameters.keys()


def test_the_head_uses_every_stage_of_its_encoder_by_default():
    network = SegFormer(Plain(), num_classes=2, decoder_dim=8)
    assert network.head.in_indices == tuple(range(len(network.encoder.out_channels)))
