"""The classifier of a source is reordered or re-initialised for the classes of the model."""

import pytest
import torch
from torch import nn

from segformer_pl.checkpoints import load_weights
from segformer_pl.checkpoints.layouts import NVLABS, from_canonical
from segformer_pl.checkpoints.matching import canonical_tensors
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.segmenter import Segmenter

NAMES = ["sky", "road", "car"]
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def small(num_classes=3, **arguments):
    arguments = {"num_heads": (1, 2, 2, 4)} | arguments
    encoder = MixTransformer(embed_dims=(4, 8, 8, 16), depths=(1, 1, 1, 1), **arguments)
    return SegFormer(encoder, num_classes, decoder_dim=8)


@pytest.fixture
def run(randomize):
    """Content of a run's checkpoint: tensors and hyperparameters of the task."""
    network = randomize(small()).float().eval()
    state = {f"network.{k}": v.contiguous() for k, v in network.state_dict().items()}
    return {
        "state_dict": state,
        "hyper_parameters": {"class_names": NAMES, "image_mean": MEAN, "image_std": STD},
    }


def logits(network):
    return network.eval()(torch.linspace(-1, 1, 3 * 32 * 32).view(1, 3, 32, 32))


def nvlabs_state(network):
    return from_canonical(NVLABS, "backbone.", canonical_tensors(network))[0]


def refuse(content, network=None, **arguments):
    with pytest.raises(UserError) as error:
        load_weights(network or small(), content, **arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


@torch.no_grad()
def test_matched_by_name_each_class_keeps_its_logits(run):
    source, network = small(), small()
    load_weights(source, run)
    there = logits(source)
    report = load_weights(network, run, class_names=["car", "sky", "road"], match_classes="by_name")
    assert torch.equal(logits(network), there[:, [2, 0, 1]])
    assert "classes matched by name: 3 of 3 are in the source" in str(report)
    assert report.reinitialized == {}


@torch.no_grad()
def test_matched_by_name_classes_that_the_source_lacks_are_reinitialised(run):
    source, network = small(), small(5)
    load_weights(source, run)
    names = ["tree", "road", "Sky", "wall", "car"]
    report = load_weights(network, run, class_names=names, match_classes="by_name")
    there, here = logits(source), logits(network)
    assert torch.equal(here[:, [1, 2, 4]], there[:, [1, 0, 2]])
    assert not any(torch.equal(here[:, n], there[:, c]) for n in (0, 3) for c in range(3))
    assert "2 classes that the source does not have: tree, wall" in str(report)


@torch.no_grad()
def test_raw_values_follow_their_classes(run):
    labels = {"coding": "values", "names": NAMES, "raw": [[0], [1], [2]], "ignored": [255]}
    run["StreamingSegmentationData"] = {"dataset": "mine", "labels": labels}
    names = ["car", "tree", "sky"]
    report = load_weights(small(), run, class_names=names, match_classes="by_name")
    assert report.data["labels"] == labels | {"names": names, "raw": [[2], [], [0]]}
    assert report.reinitialized
    assert load_weights(small(), run, class_names=NAMES).data["labels"] == labels
    assert not load_weights(small(5), run, class_names=["a", "b", "c", "d", "e"]).data


def test_matched_by_index_names_are_not_compared(run):
    source, network = small(), small()
    load_weights(source, run)
    report = load_weights(
        network, run, class_names=["Himmel", "Weg", "Auto"], match_classes="by_index"
    )
    assert torch.equal(logits(network), logits(source))
    assert "classes taken in their order" in str(report)
    assert "has 3 classes and the data set 5" in refuse(
        run, small(5), class_names=list("abcde"), match_classes="by_index"
    )


def test_another_number_of_classes_can_still_be_trained_on(run):
    report = load_weights(small(5), run, class_names=list("abcde"))
    assert "3 classes in the source, 5 in the model" in str(report)


def test_another_number_of_classes_reinitialises_the_classifier(randomize):
    source, network = randomize(small()).float(), small(num_classes=7)
    old = network.head.classifier.weight.data.fill_(9.0).clone()
    report = load_weights(network, nvlabs_state(source))
    assert set(report.reinitialized) == {"head.classifier.weight", "head.classifier.bias"}
    assert "3 classes in the source, 7 in the model" in str(report)
    assert not torch.equal(network.head.classifier.weight, old)
    for key, tensor in source.state_dict().items():
        if "classifier" not in key:
            assert torch.equal(network.state_dict()[key], tensor), key


class Auxiliary(Segmenter):
    """A main and an auxiliary classifier, one of them in the encoder; the main one has a row more.

    The main classifier is a convolution without bias, the auxiliary one a Sequential.
    """

    classifier_paths = ("main", "auxiliary.0")

    def __init__(self, num_classes: int, num_further: int = 1) -> None:
        super().__init__()
        self.in_channels, self.num_classes, self.num_further = 3, num_classes, num_further
        self.stem = nn.Conv2d(3, 4, 3, 4, 1)
        self.auxiliary = nn.Sequential(nn.Conv2d(4, num_classes, 1), nn.Sigmoid())
        self.main = nn.Conv2d(4, num_classes + num_further, 1, bias=False)

    def forward(self, images):
        return self.main(self.stem(images))[:, : self.num_classes]

    def feature_maps(self, images):
        return {"stem": self.stem(images)}

    def init_args(self):
        return {"num_classes": self.num_classes, "num_further": self.num_further}

    def layer_ids(self):
        return {name: 0 for name, _ in self.named_parameters() if name.split(".")[0] != "main"}


KEYS = ("main.weight", "auxiliary.0.weight", "auxiliary.0.bias")


@pytest.fixture
def auxiliary_run(randomize):
    """Content of a checkpoint of a network with two classifiers and a row that is no class."""
    state = randomize(Auxiliary(3)).float().state_dict()
    return {"state_dict": state, "hyper_parameters": {"class_names": NAMES}}


@pytest.mark.parametrize("num_further", [0, 1, 2])
def test_all_classifiers_are_reordered_and_further_rows_keep_their_place(randomize, num_further):
    state = randomize(Auxiliary(3, num_further)).float().state_dict()
    content = {"state_dict": state, "hyper_parameters": {"class_names": NAMES}}
    network = Auxiliary(5, num_further)
    before = {key: network.state_dict()[key].clone() for key in KEYS}
    names = ["tree", "road", "Sky", "wall", "car"]
    report = load_weights(network, content, class_names=names, match_classes="by_name")
    assert set(report.reinitialized) == set(KEYS)
    for key in KEYS:
        found = network.state_dict()[key]
        assert torch.equal(found[[1, 2, 4]], state[key][[1, 0, 2]]), key
        assert torch.equal(found[5:], state[key][3:]), key
        for new in (0, 3):  # initialised anew, not copied from a class of the source
            assert not any(torch.equal(found[new], row) for row in (before[key][new], *state[key]))
    assert len(network.main.weight) == 5 + num_further


def test_all_classifiers_are_reinitialised_for_another_number_of_classes(auxiliary_run):
    network = Auxiliary(7)
    before = {key: network.state_dict()[key].clone() for key in KEYS}
    report = load_weights(network, auxiliary_run, class_names=list("abcdefg"))
    assert report.reinitialized == dict.fromkeys(KEYS, "3 classes in the source, 7 in the model")
    assert all(not torch.equal(network.state_dict()[key], before[key]) for key in KEYS)
    assert torch.equal(network.stem.weight, auxiliary_run["state_dict"]["stem.weight"])


def test_classifiers_that_disagree_on_the_number_of_classes_are_refused(auxiliary_run):
    # Without its further row, the main classifier would have one class fewer than the auxiliary.
    assert "has main.weight as 4x4x1x1, the model as 3x4x1x1" in refuse(
        auxiliary_run, Auxiliary(3, 0)
    )
    auxiliary_run["state_dict"]["auxiliary.0.bias"] = torch.zeros(4)
    assert "as 3x4x1x1, the model as 5x4x1x1, and 2 more" in refuse(auxiliary_run, Auxiliary(5))


def test_the_encoder_alone_is_loaded_without_the_classifier_inside_of_it(auxiliary_run):
    network = Auxiliary(7)
    before = {key: network.state_dict()[key].clone() for key in KEYS}
    report = load_weights(network, auxiliary_run, parts="encoder", class_names=list("abcdefg"))
    assert all(torch.equal(network.state_dict()[key], before[key]) for key in KEYS)
    assert torch.equal(network.stem.weight, auxiliary_run["state_dict"]["stem.weight"])
    assert set(report.dropped) == set(KEYS)
    assert report.reinitialized == {}
