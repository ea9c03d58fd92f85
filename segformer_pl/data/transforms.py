"""Joint transforms of image and label, on torchvision v2 and its tv_tensors.

A sample is ``{"image": tv_tensors.Image (3, H, W) uint8, "label": tv_tensors.Mask (H, W) int64,
"id": str}``. After the transforms the image is float in 0 to 1.

The training pipeline has the paper's ingredients (random scale, crop, flip, photometric
distortion); its exact parameters and order (NVlabs' ``RandomCrop`` with ``cat_max_ratio``, the
truncations of ``PhotoMetricDistortion``) are not reproduced yet.
"""

from typing import Any

import torch
from torchvision import tv_tensors
from torchvision.transforms import v2

# Padding is the mean colour of ImageNet, which a network sees as 0.
PADDING_COLOR = (123.675, 116.28, 103.53)


class RandomScale(v2.Transform):
    """Scale image (bilinear, antialiased) and label (nearest) by a factor drawn uniformly."""

    def __init__(self, scale_range: tuple[float, float]) -> None:
        super().__init__()
        self.scale_range = scale_range

    def make_params(self, flat_inputs: list[Any]) -> dict[str, Any]:
        height, width = v2.functional.get_size(flat_inputs[0])
        low, high = self.scale_range
        scale = torch.empty(()).uniform_(low, high).item()
        return {"size": [max(round(height * scale), 1), max(round(width * scale), 1)]}

    def transform(self, inpt: Any, params: dict[str, Any]) -> Any:
        if isinstance(inpt, str):
            return inpt
        return v2.functional.resize(inpt, size=params["size"], antialias=True)


def train_transforms(
    crop_size: tuple[int, int] | None,
    scale_range: tuple[float, float] | None,
    photometric: bool,
    ignore_index: int,
) -> v2.Transform:
    """Random scale, random crop (padded where the picture is smaller), flip, colour jitter.

    Args:
        crop_size: Height and width of the crop in pixels, or None for the whole picture.
        scale_range: Limits of the random scale factor, or None for none.
        photometric: Whether to distort brightness, contrast, saturation and hue.
        ignore_index: Label of the padding.

    Raises:
        ValueError: the limits of the scale are not positive or not in order.
    """
    if scale_range is not None and not 0 < scale_range[0] <= scale_range[1]:
        raise ValueError(
            f"data.scale_range {list(scale_range)}: give two factors above 0, the smaller one first"
        )
    steps: list[v2.Transform] = []
    if scale_range is not None:
        steps.append(RandomScale(scale_range))
    if crop_size is not None:
        fill = {tv_tensors.Image: PADDING_COLOR, tv_tensors.Mask: ignore_index}
        steps.append(v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill))
    steps.append(v2.RandomHorizontalFlip())
    if photometric:
        # Amplitudes of the reference: brightness 32 of 255, hue 18 of 180.
        jitter = v2.ColorJitter(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.1)
        steps.append(v2.RandomApply([jitter], p=0.5))
    return v2.Compose([*steps, to_float()])


def to_float() -> v2.Transform:
    """uint8 0 to 255 -> float32 0 to 1; the label is left alone."""
    return v2.ToDtype({tv_tensors.Image: torch.float32, "others": None}, scale=True)
