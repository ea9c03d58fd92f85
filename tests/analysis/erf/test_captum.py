"""Maps of single units against Captum's attributions."""

import numpy as np
import pytest
import timm
import torch

from segformer_pl.analysis.erf import effective_receptive_field
from segformer_pl.models import segformer_b0

pytestmark = [
    pytest.mark.slow,  # Captum takes seconds to import
    pytest.mark.filterwarnings("ignore:Input Tensor 0 did not already require gradients"),
]


def images(*size):
    return torch.randn(2, 3, *size, dtype=torch.float64)


@pytest.fixture(scope="module")
def network(randomize):
    torch.manual_seed(0)
    return randomize(segformer_b0(5)).eval()


# Pixel (40, 33) of 64x96 belongs to these units of maps at stride 4, 8, 16 and 32.
UNITS = {"stage1": (10, 8), "stage2": (5, 4), "stage3": (2, 2), "stage4": (1, 1), "head": (10, 8)}


@pytest.mark.parametrize("layer", UNITS)
def test_saliency_of_single_channels(network, layer):
    from captum.attr import Saliency

    batch = images(64, 96)
    row, column = UNITS[layer]
    # The head ends in a ReLU: take a channel that is positive in both images.
    with torch.no_grad():
        vectors = network.feature_maps(batch)[layer][:, :, row, column]
    channel = int(vectors.amin(0).argmax())
    settings = {"layers": [layer], "units": [(40, 33)], "reduction": channel}
    saliency = Saliency(lambda inputs: network.feature_maps(inputs)[layer])
    for gradient in ("abs", "signed"):
        erf = effective_receptive_field(network, batch, gradient=gradient, **settings)[layer]
        target = (channel, row, column)
        theirs = saliency.attribute(batch.clone(), target=target, abs=gradient == "abs")
        expected = theirs.sum(1).mean(0).detach().numpy()
        np.testing.assert_allclose(erf.mean, expected, rtol=1e-9, atol=1e-12 * abs(expected).max())
    # The neighbouring unit has another map.
    beside = saliency.attribute(batch.clone(), target=(channel, row, column + 1), abs=False)
    apart = np.abs(erf.mean - beside.sum(1).mean(0).detach().numpy()).max()
    assert apart > 1e-2 * np.abs(erf.mean).max()


def test_saliency_of_the_default_reduction(network):
    """The sum of the positive channels of the unit in the middle."""
    from captum.attr import Saliency

    batch = images(64, 96)
    saliency = Saliency(lambda inputs: network(inputs)[:, :, 8, 12].relu().sum(1))
    expected = saliency.attribute(batch.clone()).sum(1).mean(0).detach().numpy()
    erf = effective_receptive_field(network, batch, layers=["output"])["output"]
    np.testing.assert_allclose(erf.mean, expected, rtol=1e-9, atol=1e-12 * expected.max())


def test_neuron_gradients_of_a_module_inside_a_network(randomize):
    from captum.attr import NeuronGradient

    network = randomize(timm.create_model("resnet18", num_classes=3)).eval()
    batch = images(64, 64)
    settings = {"units": [(40, 33)], "reduction": 5, "gradient": "signed"}
    erf = effective_receptive_field(network, batch, layers=["layer2"], **settings)["layer2"]
    theirs = NeuronGradient(network, network.layer2).attribute(batch.clone(), (5, 5, 4))
    expected = theirs.sum(1).mean(0).detach().numpy()
    np.testing.assert_allclose(erf.mean, expected, rtol=1e-9, atol=1e-12 * abs(expected).max())
