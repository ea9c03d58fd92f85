"""The 16 corruptions of Cityscapes-C at 5 severities, on any picture of 8 bits.

Benchmark: Hendrycks and Dietterich 2019 (ImageNet-C) as applied to Cityscapes by Kamann and Rother
2020 (arXiv 1908.05005); SegFormer's Table 5 and Fig. 7. The constants are those of the package
``imagecorruptions`` 1.1.2 (Apache-2.0), "the original" below, which does not run on NumPy 2. What
they mean was taken from it, the code was not, but for the light of water drops, which takes its
steps. They are in pixels, so the same severity is milder on larger pictures.

Our own, everywhere: results are rounded to whole levels, where the original cuts decimals off, and
random numbers come from a generator that is passed in. What else differs is said at each function.
``make test-references`` compares all but frost with the original itself.
``frost`` draws its frost instead of using the original's photographs and is therefore not
comparable with published results.
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
from segformer_pl.data.transforms import ImageAndLabel, Pixels, TrainIds, to_image_and_label
from segformer_pl.errors import UserError

Function = Callable[[npt.NDArray[np.float32], int, np.random.Generator], npt.NDArray[np.float32]]

# In the order of Table 5. The functions take (H, W, 3) in 0 to 1 and need not keep to it.
GROUPS: dict[str, dict[str, Function]] = {
    group: {function.__name__: function for function in functions}
    for group, functions in {
        "blur": (motion_blur, defocus_blur, glass_blur, gaussian_blur),
        "noise": (gaussian_noise, impulse_noise, shot_noise, speckle_noise),
        "digital": (brightness, contrast, saturate, jpeg_compression),
        "weather": (snow, spatter, fog, frost),
    }.items()
}
CORRUPTIONS: dict[str, Function] = {
    name: function for functions in GROUPS.values() for name, function in functions.items()
}
SEVERITIES = range(1, 6)
# The severities that the paper takes its means over (Sec. 4.4, App. D).
PAPER_SEVERITIES = {
    name: range(1, 4) if group == "noise" else SEVERITIES
    for group, functions in GROUPS.items()
    for name in functions
}


def corrupt(image: Pixels, name: str, severity: int, rng: np.random.Generator) -> Pixels:
    """A corrupted copy of a picture.

    Args:
        image: (H, W, 3) uint8 RGB, of any size.
        name: One of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        rng: Where every random number comes from.

    Returns:
        (H, W, 3) uint8 RGB.

    Raises:
        UserError: There is no such corruption or severity, or the picture is of another form.
    """
    check(name, severity)
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
        raise UserError(
            f"a picture to corrupt has shape {image.shape} and type {image.dtype}; give (H, W, 3) "
            "uint8 RGB"
        )
    picture = image.astype(np.float32) / np.float32(255)
    corrupted = CORRUPTIONS[name](picture, severity, rng)
    return np.rint(np.clip(corrupted, 0, 1) * np.float32(255)).astype(np.uint8)


def check(name: str, severity: int) -> None:
    """Raise UserError, in one sentence, for a corruption or severity that there is not."""
    if name not in CORRUPTIONS:
        near = difflib.get_close_matches(name, CORRUPTIONS, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are: {', '.join(CORRUPTIONS)}"
        raise UserError(f"there is no corruption {name!r}; {hint}")
    if severity not in SEVERITIES:
        raise UserError(f"{name}: there is no severity {severity!r}; give 1, 2, 3, 4 or 5")


class CorruptedPictures:
    """What makes samples of corrupted pictures, in place of :func:`.transforms.to_tensors`.

    The random numbers of a picture depend on the seed, on the picture (its position in the stored
    order), on the corruption and on the severity, and on nothing else.

    Args:
        name: One of :data:`CORRUPTIONS`.
        severity: 1 to 5.
        seed: Of the random numbers.

    Raises:
        UserError: There is no such corruption or severity.
    """

    def __init__(self, name: str, severity: int, seed: int) -> None:
        check(name, severity)
        self.name = name
        self.severity = severity
        self.seed = seed

    def __call__(
        self, image: EncodedImage, label: TrainIds, rng: np.random.Generator
    ) -> ImageAndLabel:
        """Image (3, H, W) float32 RGB in 0 to 1, label (H, W) int64, which stays as it is."""
        picture = int(rng.integers(1 << 63))
        own = np.random.default_rng([self.seed, picture, self.severity, *self.name.encode()])
        return to_image_and_label(corrupt(image.decode(), self.name, self.severity, own), label)
