"""The classifier of a source is reordered or re-initialised for the classes of the model."""

import pytest
import torch

from segformer_pl.checkpoints import load_weights
from segformer_pl.checkpoints.layouts import NVLABS, from_canonical
from segformer_pl.checkpoints.matching import canonical_tensors
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer
from segformer_pl.models.mit import MixTransformer

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
