"""The 16 corruptions of Cityscapes-C at 5 severities, for 8-bit RGB images of any size.

The benchmark is Hendrycks and Dietterich 2019 (ImageNet-C), applied to Cityscapes by Kamann and
Rother 2020 (arXiv 1908.05005) and used in SegFormer's Table 5 and Fig. 7. The reference
implementation, "the original" in this package, is ``imagecorruptions`` 1.1.2 (Apache-2.0), which
does not run on NumPy 2. The constants and their meaning are those of the original. The code is our
own, except that the light of water drops follows the original's steps. Constants are in pixels, so
one severity is milder on larger images.

Differences from the original:

- Results are rounded to 8-bit levels; the original truncates.
- Random numbers come from a generator that the caller passes in.
- ``frost`` renders its frost instead of using the original's photographs, so its results are not
  comparable with published ones.
- Further differences are documented at each function.

``make test-references`` compares every corruption except frost with the original.
"""

import difflib
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from segformer_pl.data.corruptions.blur import (
    defocus_blur,
    gaussian_blur,
    glass_blur,
    motion_blur,
)
from segformer_pl.data.corruptions.digital import (
    brightness,
    contrast,
    jpeg_compression,
    saturate,
)
from segformer_pl.data.corruptions.noise import (
    gaussian_noise,
    impulse_noise,
    shot_noise,
    speckle_noise,
)
from segformer_pl.data.corruptions.weather import fog, frost, snow, spatter
from segformer_pl.data.decoding import EncodedImage
from segformer_pl.data.transforms import ImageAndLabel, RGBImage, TrainIds, to_image_and_label
from segformer_pl.errors import UserError

Corruption = Callable[[npt.NDArray[np.float32], int, np.random.Generator], npt.NDArray[np.float32]]

# In the order of Table 5. Corruptions map (H, W, 3) float32 in 0 to 1 to the same shape; their
# results may exceed 0 to 1.
GROUPS: dict[str, dict[str, Corruption]] = {
    group: {function.__name__: function for function in functions}
    for group, functions in {
        "blur": (motion_blur, defocus_blur, glass_blur, gaussian_blur),
        "noise": (gaussian_noise, impulse_noise, shot_noise, speckle_noise),
        "digital": (brightness, contrast, saturate, jpeg_compression),
        "weather": (snow, spatter, fog, frost),
    }.items()
}
CORRUPTIONS: dict[str, Corruption] = {
    name: function for functions in GROUPS.values() for name, function in functions.items()
}
SEVERITIES = range(1, 6)
# The severities over which the paper averages (Sec. 4.4, App. D).
PAPER_SEVERITIES = {
    name: range(1, 4) if group == "noise" else SEVERITIES
    for group, functions in GROUPS.items()
    for name in functions
}


def corrupt(image: RGBImage, name: str, severity: int, rng: np.random.Generator) -> RGBImage:
    """Return a corrupted copy of an image.

    Args:
        image: (H, W, 3) uint8 RGB image of any size.
        name: Name of the corruption, a key of :data:`CORRUPTIONS`.
        severity: Severity, 1 to 5.
        rng: Source of all random numbers.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: The corruption or the severity does not exist, or ``image`` is not (H, W, 3)
            uint8.
    """
    check(name, severity)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(
            f"the image to corrupt has shape {image.shape} and type {image.dtype}; give (H, W, 3) "
            "uint8 RGB"
        )
    scaled = image.astype(np.float32) / np.float32(255)
    corrupted = CORRUPTIONS[name](scaled, severity, rng)
    return np.rint(np.clip(corrupted, 0, 1) * np.float32(255)).astype(np.uint8)


def check(name: str, severity: int) -> None:
    """Check that a corruption and a severity exist.

    Args:
        name: Name of the corruption.
        severity: Severity.

    Raises:
        UserError: The corruption or the severity does not exist.
    """
    if name not in CORRUPTIONS:
        close = difflib.get_close_matches(name, CORRUPTIONS, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"there are: {', '.join(CORRUPTIONS)}"
        raise UserError(f"there is no corruption {name!r}; {hint}")
    if severity not in SEVERITIES:
        raise UserError(f"{name}: there is no severity {severity!r}; give 1, 2, 3, 4 or 5")


class CorruptedImages:
    """Transforms that corrupt the image, used in place of :func:`.transforms.to_tensors`.

    The random numbers of an image depend on the seed, the image's position in the stored order,
    the corruption and the severity, and on nothing else.

    Args:
        name: Name of the corruption, a key of :data:`CORRUPTIONS`.
        severity: Severity, 1 to 5.
        seed: Seed of the random numbers.

    Raises:
        UserError: The corruption or the severity does not exist.
    """

    def __init__(self, name: str, severity: int, seed: int) -> None:
        check(name, severity)
        self.name = name
        self.severity = severity
        self.seed = seed

    def __call__(
        self, image: EncodedImage, label: TrainIds, rng: np.random.Generator
    ) -> ImageAndLabel:
        """Corrupt an image and convert it and its label to tensors.

        Args:
            image: The encoded image.
            label: (H, W) train ids, which are not changed.
            rng: Generator of the sample, which identifies its position.

        Returns:
            Image (3, H, W) float32 RGB in 0 to 1, label (H, W) int64.
        """
        image_seed = int(rng.integers(1 << 63))
        seeds = [self.seed, image_seed, self.severity, *self.name.encode()]
        pixels = corrupt(image.decode(), self.name, self.severity, np.random.default_rng(seeds))
        return to_image_and_label(pixels, label)
