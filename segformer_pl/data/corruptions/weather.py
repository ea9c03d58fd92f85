"""Weather and dirt on the lens: corruptions of :data:`segformer_pl.data.corruptions.GROUPS`.

Flakes, drops and crystals have a fixed size in pixels, as in the original, so they are relatively
smaller in large images. Only fog scales with the image.
"""

import math

import cv2
import numpy as np
import numpy.typing as npt

from segformer_pl.data.corruptions.blur import gaussian, smear

FloatImage = npt.NDArray[np.float32]  # (H, W, 3) RGB in 0 to 1
Map = npt.NDArray[np.float32]  # (H, W)

WATER = (175 / 255, 238 / 255, 238 / 255)  # pale turquoise
MUD = (63 / 255, 42 / 255, 20 / 255)
WATER_DEPTH = 20  # distance in pixels from its edge beyond which a drop has constant thickness
# Measured on the frost photographs of imagecorruptions 1.1.2: mean colour, maximum deviation of one
# photograph's brightness from it, and standard deviation of brightness within one photograph.
FROST_COLOR = (0.57, 0.65, 0.69)
FROST_RANGE = 0.16
FROST_STD = 0.11
STEMS_AREA = 250  # image area in pixels per crystal


def snow(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Falling flakes over an image that is paler and brighter, as if covered with snow.

    Flakes are normal noise that is enlarged, thresholded and blurred along a line at 45 to 135
    degrees. They are added twice, the second time rotated by 180 degrees.
    """
    mean, std, zoom, threshold, radius, sigma, weight = (
        (0.1, 0.3, 3, 0.5, 10, 4, 0.8),
        (0.2, 0.3, 2, 0.5, 12, 4, 0.7),
        (0.55, 0.3, 4, 0.9, 12, 8, 0.7),
        (0.55, 0.3, 4.5, 0.85, 12, 8, 0.65),
        (0.55, 0.3, 2.5, 0.85, 12, 12, 0.55),
    )[severity - 1]
    height, width = image.shape[:2]
    small = (math.ceil(height / zoom), math.ceil(width / zoom))
    flakes = _enlarge(_normal(small, mean, std, rng), zoom, height, width)
    flakes = np.where(flakes < threshold, 0, np.minimum(flakes, 1)).astype(np.float32)
    flakes = smear(flakes, int(radius), sigma, rng.uniform(-135, -45))
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)[..., None]
    covered = np.float32(weight) * image + np.float32(1 - weight) * np.maximum(
        image, grey * 1.5 + 0.5
    )
    return covered + (flakes + flakes[::-1, ::-1])[..., None]


def spatter(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Drops on the lens: water at severity 1 to 3, mud at 4 and 5.

    Drops are the pixels where blurred normal noise exceeds a threshold. Mud covers the image.
    Water adds light by the original's steps, see :func:`_shine`. The light is normalised by its
    maximum, which rises with the number of pixels, so the mean light depends on the image's size,
    most at severity 1.
    """
    mean, std, sigma, threshold, strength, is_mud = (
        (0.65, 0.3, 4, 0.69, 0.6, False),
        (0.65, 0.3, 3, 0.68, 0.6, False),
        (0.65, 0.3, 2, 0.68, 0.5, False),
        (0.65, 0.3, 1, 0.65, 1.5, True),
        (0.67, 0.4, 1, 0.65, 1.5, True),
    )[severity - 1]
    noise = gaussian(_normal(image.shape[:2], mean, std, rng), sigma)
    wet = noise > threshold
    if is_mud:  # for mud, `strength` is the blur of its edges in pixels
        mud = gaussian(wet.astype(np.float32), strength)
        mud = np.where(mud < 0.8, 0, mud).astype(np.float32)[..., None]
        return image * (1 - mud) + mud * np.array(MUD, np.float32)
    light = np.float32(strength) * _shine(np.where(wet, noise, 0))[..., None]
    return image + light * np.array(WATER, np.float32)


def fog(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Add a plasma fractal, then scale the result so that the maximum possible value stays."""
    density, decay = ((1.5, 2), (2, 2), (2.5, 1.7), (2.5, 1.5), (3, 1.4))[severity - 1]
    height, width = image.shape[:2]
    brightest = image.max()
    haze = np.float32(density) * plasma(height, width, decay, rng)
    return (image + haze[..., None]) * (brightest / (brightest + np.float32(density)))


def frost(image: FloatImage, severity: int, rng: np.random.Generator) -> FloatImage:
    """Weighted sum of the image and ice crystals.

    **Not comparable with published results.** The original overlays one of its photographs of
    frost; here :func:`ice` renders the frost. The weights are the original's; mean colour and
    standard deviation match its photographs; the shapes of the crystals are our own.
    """
    height, width = image.shape[:2]
    image_weight, ice_weight = ((1, 0.4), (0.8, 0.6), (0.7, 0.7), (0.65, 0.7), (0.6, 0.75))[
        severity - 1
    ]
    return np.float32(image_weight) * image + np.float32(ice_weight) * ice(height, width, rng)


def plasma(height: int, width: int, decay: float, rng: np.random.Generator) -> Map:
    """Generate diamond-square noise in 0 to 1.

    The noise is generated on a torus whose side is the next power of two, and cropped to the upper
    left part. Its features therefore scale with the image. Each octave doubles the grid::

        g . g .        g: previous grid
        . c . c        c: centre, mean of 4 grid points + noise   (diamond step)
        g . g .        .: mean of 2 grid points and 2 centres + noise   (square step)
        . c . c

    Args:
        height: Height in pixels.
        width: Width in pixels.
        decay: Square root of the factor by which the amplitude falls from one octave to the next,
            as in the original.
        rng: Source of the random numbers.

    Returns:
        (height, width) float32.
    """
    grid, amplitude = np.zeros((1, 1), np.float32), 1.0
    while len(grid) < max(height, width, 2):
        side = len(grid)
        noise = np.float32(amplitude) * (2 * rng.random((3, side, side), np.float32) - 1)
        right, below = np.roll(grid, -1, axis=1), np.roll(grid, -1, axis=0)
        centres = (grid + right + below + np.roll(right, -1, axis=0)) / 4 + noise[0]
        finer = np.empty((2 * side, 2 * side), np.float32)
        finer[::2, ::2] = grid
        finer[1::2, 1::2] = centres
        finer[::2, 1::2] = (grid + right + centres + np.roll(centres, 1, axis=0)) / 4 + noise[1]
        finer[1::2, ::2] = (grid + below + centres + np.roll(centres, 1, axis=1)) / 4 + noise[2]
        grid, amplitude = finer, amplitude / decay**2
    grid -= grid.min()
    return (grid / grid.max())[:height, :width]


def ice(height: int, width: int, rng: np.random.Generator) -> FloatImage:
    """Render frost on a pane: straight crystals with side branches at 60 degrees, over thin ice.

    Args:
        height: Height in pixels.
        width: Width in pixels.
        rng: Source of the random numbers.

    Returns:
        (height, width, 3) in 0 to 1. Mean colour :data:`FROST_COLOR`, plus a random brightness of
        up to :data:`FROST_RANGE`; standard deviation :data:`FROST_STD`.
    """
    layer = np.zeros((height, width), np.uint8)
    stems = _crystals(height, width, rng)
    # Faint crystals first, so that bright ones lie on top. Coordinates have 4 fractional bits.
    for part, brightness in zip(np.array_split(stems, 4), (50, 90, 140, 240)):
        lines = np.rint(part * 16).astype(np.int32)
        cv2.polylines(layer, list(lines), False, brightness, 1, cv2.LINE_AA, 4)
    crystals = gaussian(layer.astype(np.float32) / np.float32(255), 0.7)
    relief = crystals + 0.6 * gaussian(crystals, 4) + 0.8 * plasma(height, width, 1.4, rng)
    relief += _normal((height, width), 0, 0.08, rng)
    relief -= relief.mean()
    relief *= FROST_STD / max(float(relief.std()), 1e-6)
    relief += np.float32(rng.uniform(-FROST_RANGE, FROST_RANGE))
    return np.clip(relief[..., None] + np.array(FROST_COLOR, np.float32), 0, 1)


def _crystals(height: int, width: int, rng: np.random.Generator) -> npt.NDArray[np.float64]:
    """Return the ends (x, y) of N lines, (N, 2, 2): stems, and branches on both sides of each."""
    number, branches = -(-height * width // STEMS_AREA), 7
    roots = rng.random((number, 2)) * (width, height)
    angles = rng.uniform(0, 2 * math.pi, number)
    lengths = rng.lognormal(math.log(35), 0.7, number)
    ends = roots + lengths[:, None] * _directions(angles)
    along = np.sort(rng.uniform(0.1, 1, (number, branches)))
    starts = roots[:, None] + along[..., None] * (ends - roots)[:, None]
    sides = angles[:, None] + np.resize((math.pi / 3, -math.pi / 3), branches)
    # Branches get shorter towards the tip of the stem.
    branch_lengths = lengths[:, None] * (1.05 - along) * rng.uniform(0.1, 0.5, along.shape)
    tips = starts + branch_lengths[..., None] * _directions(sides)
    lines = np.concatenate(
        [
            np.stack([roots, ends], 1)[:, None],
            np.stack([starts, tips], 2),
        ],
        axis=1,
    )
    return lines.reshape(-1, 2, 2)


def _directions(angles: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    return np.stack([np.cos(angles), np.sin(angles)], axis=-1)


def _shine(water: Map) -> Map:
    """Return the light of water drops, in 0 to 1: their relief, lit from the upper left.

    Args:
        water: (H, W) thickness of the water, 0 where the lens is dry.
    """
    levels = (water * 255).astype(np.uint8)
    edges = cv2.Canny(levels, 50, 150)
    depth = np.minimum(cv2.distanceTransform(255 - edges, cv2.DIST_L2, 5), WATER_DEPTH)
    relief = cv2.equalizeHist(cv2.blur(depth, (3, 3)).astype(np.uint8))
    relief = cv2.filter2D(relief, cv2.CV_8U, np.array([[-2, -1, 0], [-1, 1, 1], [0, 1, 2]]))
    light = np.multiply(levels, cv2.blur(relief, (3, 3)), dtype=np.float32)
    return (light / max(light.max(), 1)).astype(np.float32)


def _enlarge(noise: Map, zoom: float, height: int, width: int) -> Map:
    """Enlarge noise bilinearly with aligned corner pixels, and crop the upper left part."""
    steps = [(side - 1) / max(round(side * zoom) - 1, 1) for side in noise.shape]
    matrix = np.array([[steps[1], 0, 0], [0, steps[0], 0]])
    flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
    return cv2.warpAffine(  # type: ignore[return-value]
        noise, matrix, (width, height), flags=flags, borderMode=cv2.BORDER_REPLICATE
    )


def _normal(size: tuple[int, ...], mean: float, std: float, rng: np.random.Generator) -> Map:
    return np.float32(mean) + np.float32(std) * rng.standard_normal(size, np.float32)
