import pytest
import torch
from torchvision.transforms.v2 import functional as TF

from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD, Normalization


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    ("mean", "std"), [(IMAGENET_MEAN, IMAGENET_STD), ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))]
)
def test_equals_torchvision(mean, std, dtype):
    images = torch.rand(2, 3, 5, 7, dtype=dtype)
    normalized = Normalization(mean, std)(images)
    torch.testing.assert_close(normalized, TF.normalize(images, mean, std))


def test_default_is_imagenet():
    assert Normalization() == Normalization(IMAGENET_MEAN, IMAGENET_STD)
