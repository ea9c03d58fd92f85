"""Losses, gradients, predictions and receptive fields on a GPU are those of the CPU.

python -m pytest -m gpu tests/test_cuda.py
"""

import pytest
import torch

from segformer_pl import models
from segformer_pl.analysis.erf import effective_receptive_field
from segformer_pl.inference import Inference, Predictor
from segformer_pl.losses import CrossEntropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

NETWORKS = {
    "segformer_b0": lambda: models.segformer_b0(7),
    "setr_naive": lambda: models.setr_naive(7, "vit_tiny_patch16_224", 96, decoder_dim=32),
    "setr_pup": lambda: models.setr_pup(7, "vit_tiny_patch16_224", 96, decoder_dim=32),
    "setr_mla": lambda: models.setr_mla(7, "vit_tiny_patch16_224", 96, decoder_dim=32),
    "maskformer": lambda: models.maskformer(7, "resnet18", num_queries=12, decoder_dim=64),
    "maskformer_swin": lambda: models.maskformer_swin(7, num_queries=12, decoder_dim=64),
    "semask_fpn": lambda: models.semask_fpn(7, decoder_dim=32),
    "deeplabv3plus": lambda: models.deeplabv3plus(7, "resnet18", decoder_dim=32),
    "timm": lambda: models.SegFormer(models.TimmEncoder("tf_efficientnet_lite0"), 7, 64),
}


@pytest.fixture
def exact():
    """Convolutions in full float32, as on the CPU; matrix products are by default."""
    with torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def build(name, dtype=torch.float32):
    """Return a network on the CPU and the same one on the GPU."""
    torch.manual_seed(0)
    network = NETWORKS[name]().to(dtype).eval()
    twin = NETWORKS[name]().to(dtype).eval()
    twin.load_state_dict(network.state_dict())
    return network, twin.cuda()


def batch(dtype=torch.float32):
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(2, 3, 96, 96, generator=generator, dtype=dtype)
    target = torch.randint(0, 7, (2, 12, 12), generator=generator).repeat_interleave(8, 1)
    target = target.repeat_interleave(8, 2)
    target[:, :9] = 255
    return image, target


@pytest.mark.parametrize("name", NETWORKS)
def test_loss_and_gradients_equal_those_of_the_cpu(name):
    image, target = batch(torch.float64)
    results = []
    for network in build(name, torch.float64):
        device = next(network.parameters()).device
        loss = network.training_loss(image.to(device), target.to(device), CrossEntropy(), 255)
        loss.backward()
        results.append((loss.item(), {n: p.grad.cpu() for n, p in network.named_parameters()}))
    (loss, gradients), (loss_gpu, gradients_gpu) = results
    assert loss_gpu == pytest.approx(loss, rel=1e-9)
    for parameter, gradient in gradients.items():
        scale = max(gradient.abs().max().item(), 1e-12)
        assert (gradients_gpu[parameter] - gradient).abs().max().item() < 1e-6 * scale, parameter


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_is_finite_and_close(name, dtype, exact):
    image, target = batch()
    _, network = build(name)
    image, target = image.cuda(), target.cuda()
    expected = network.training_loss(image, target, CrossEntropy(), 255).item()
    with torch.autocast("cuda", dtype):
        loss = network.training_loss(image, target, CrossEntropy(), 255)
    loss.backward()
    assert loss.item() == pytest.approx(expected, rel=0.05)
    assert all(torch.isfinite(p.grad).all() for p in network.parameters())


@pytest.mark.parametrize("name", NETWORKS)
def test_masks_equal_those_of_the_cpu(name, exact):
    image = torch.randint(0, 256, (96, 96, 3), generator=torch.Generator().manual_seed(2))
    image = image.to(torch.uint8).numpy()
    names = [str(number) for number in range(7)]
    protocol = Inference(flip=True, pad_to=32)
    masks = [Predictor(n, names, protocol=protocol)(image) for n in build(name)]
    assert (masks[0] == masks[1]).mean() > 0.999


def test_receptive_fields_equal_those_of_the_cpu():
    image, _ = batch()
    network, twin = build("segformer_b0")
    fields = effective_receptive_field(network, image, batch_size=2)
    fields_gpu = effective_receptive_field(twin, image, batch_size=2)
    for layer in ("stage1", "stage4", "head"):
        expected = fields[layer].mean
        assert abs(fields_gpu[layer].mean - expected).max() < 1e-3 * expected.max()
