"""``shapes``: a synthetic segmentation data set that tests whether a network uses long context.

Images are generated from a seed and written as Parquet shards with the columns of a hub data set.
Classes differ in shape, never in colour: objects and backgrounds have random muted colours and
textures, may overlap, and come in small and large scales. All shapes have the same area at the same
scale. On average, every second image has an unlabelled region.

Two classes are locally identical: rings. The class of all rings of an image is the colour of its
beacon, a saturated dot near the border::

    +----------------------+
    |                      |   b: beacon, blue or orange
    | b <-- >= 24 px --> O |   O: ring; ring_blue if the beacon is blue,
    |                      |      ring_orange if it is orange
    +----------------------+

The beacon is at least :data:`BEACON_DISTANCE` pixels away from every ring pixel, and its colour is
independent of everything else. A network with a smaller receptive field can only guess the class,
which bounds its mIoU by :func:`locality_ceiling`.
"""

import json
import math
import shutil
import tempfile
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import numpy.typing as npt
import platformdirs
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image
from tqdm.auto import tqdm

from segformer_pl.atomic import WriteError, advice, make_writable_folder

Float = npt.NDArray[np.float64]

CLASS_NAMES = ("background", "disc", "triangle", "cross", "ring_blue", "ring_orange")
COLORS = (
    (60, 60, 60),
    (240, 228, 66),
    (0, 158, 115),
    (204, 121, 167),
    (0, 114, 178),
    (230, 159, 0),
)
UNLABELLED = 255

VERSION = 1  # part of the cache folder's name; increase it with every change of the images
SEED = 0
IMAGE_SIZE = 64  # height and width in pixels
BEACON_DISTANCE = 24  # minimum distance in pixels between a ring and the beacon
BEACON_RADIUS = 6.0
BEACON_COLORS = {"ring_blue": (0.0, 0.35, 1.0), "ring_orange": (1.0, 0.55, 0.0)}
RADII = (8.0, 16.0)  # log-uniform radius in pixels of the disc with the shape's area
MAX_OVERLAP = 0.2  # share of a shape's area that may cover shapes drawn before
NUM_IMAGES = {"train": 6000, "validation": 500}
IMAGES_PER_SHARD = 500
ROW_GROUP_SIZE = 100
STATISTICS_FILE = "ring_distances.json"

_TRIANGLE_INRADIUS = np.sqrt(np.pi / (3 * np.sqrt(3)))
_CROSS_ARM = np.sqrt(np.pi * 9 / 20)
_RING_HOLE = 0.45  # inner radius divided by outer radius
_RING_RADIUS = 1 / np.sqrt(1 - _RING_HOLE**2)


def _disc(x: Float, y: Float) -> Float:
    return np.hypot(x, y) - 1


def _triangle(x: Float, y: Float) -> Float:
    half_width = np.sqrt(3) / 2
    sides = np.maximum(-y, np.maximum(half_width * x + y / 2, -half_width * x + y / 2))
    return sides - _TRIANGLE_INRADIUS


def _cross(x: Float, y: Float) -> Float:
    x, y = np.abs(x), np.abs(y)
    long, short = np.maximum(x, y), np.minimum(x, y)
    return np.maximum(long - _CROSS_ARM, short - _CROSS_ARM / 3)


def _ring(x: Float, y: Float) -> Float:
    radius = np.hypot(x, y) / _RING_RADIUS
    return np.maximum(radius - 1, _RING_HOLE - radius) * _RING_RADIUS


# Signed distance to the outline (negative inside) of each shape, scaled to the unit disc's area.
OUTLINES = {
    "disc": _disc,
    "triangle": _triangle,
    "cross": _cross,
    "ring_blue": _ring,
    "ring_orange": _ring,
}


class GeneratedSample(NamedTuple):
    """A generated image with its label.

    Attributes:
        image: (S, S, 3) uint8 RGB, where S is :data:`IMAGE_SIZE`.
        label: (S, S) uint8 train ids, 255 for unlabelled pixels.
        ring: Class name of the rings in this image.
        ring_distances: (N,) distances in pixels from each of the N labelled ring pixels to the
            edge of the beacon.
    """

    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    ring: str
    ring_distances: Float


def draw(rng: np.random.Generator) -> GeneratedSample:
    """Generate one image and its label.

    Args:
        rng: Source of all random numbers.
    """
    size = IMAGE_SIZE
    y, x = np.mgrid[:size, :size].astype(np.float64)
    background = _muted_color(rng)
    canvas = _textured(rng, background, x, y)
    label = np.zeros((size, size), np.uint8)

    ring = str(rng.choice(list(BEACON_COLORS)))
    beacon_x, beacon_y = _beacon_center(rng)
    to_beacon = np.hypot(x - beacon_x, y - beacon_y) - BEACON_RADIUS

    others = rng.choice(["disc", "triangle", "cross"], size=rng.integers(1, 4)).tolist()
    rings = [ring] * int(rng.integers(1, 3))
    for name in [*others, *rings]:
        radius = float(np.exp(rng.uniform(*np.log(RADII))))
        for _ in range(100):
            center_x, center_y = rng.uniform(0.6 * radius, size - 0.6 * radius, 2)
            angle = rng.uniform(0, 2 * np.pi)
            cos, sin = np.cos(angle) / radius, np.sin(angle) / radius
            local_x = cos * (x - center_x) + sin * (y - center_y)
            local_y = cos * (y - center_y) - sin * (x - center_x)
            distance = OUTLINES[name](local_x, local_y) * radius
            inside = distance < 0
            gap = BEACON_DISTANCE if name == ring else 1
            is_clear = to_beacon[inside].min(initial=np.inf) >= gap
            if is_clear and (label[inside] > 0).mean() <= MAX_OVERLAP:
                break
            radius = max(0.95 * radius, RADII[0])  # a smaller shape is easier to place
        else:
            continue  # no free position after 100 tries: leave the shape out
        color = _muted_color(rng, away_from=background)
        _paint(canvas, _textured(rng, color, x, y), distance)
        label[inside] = CLASS_NAMES.index(name)

    _paint(canvas, np.array(BEACON_COLORS[ring]), to_beacon)

    if rng.random() < 0.5:
        half_axes = rng.uniform(4, 10, 2)
        center_x, center_y = rng.uniform(0, size, 2)
        ellipse = ((x - center_x) / half_axes[0]) ** 2 + ((y - center_y) / half_axes[1]) ** 2
        label[ellipse < 1] = UNLABELLED

    canvas += rng.normal(0, 0.02, canvas.shape)
    image = (canvas.clip(0, 1) * 255).round().astype(np.uint8)
    return GeneratedSample(image, label, ring, to_beacon[label == CLASS_NAMES.index(ring)])


def _beacon_center(rng: np.random.Generator) -> tuple[float, float]:
    """Draw the beacon's centre (x, y), uniformly along the border, with all of it inside."""
    low, high = BEACON_RADIUS + 1, IMAGE_SIZE - BEACON_RADIUS - 2
    along, across = rng.uniform(low, high), low if rng.random() < 0.5 else high
    return (along, across) if rng.random() < 0.5 else (across, along)


def _muted_color(rng: np.random.Generator, away_from: Float | None = None) -> Float:
    """Draw an RGB colour in 0.15 to 0.85 of low saturation, over 0.3 away from ``away_from``."""
    while True:
        grey = rng.uniform(0.25, 0.75)
        color = (grey + rng.uniform(-0.15, 0.15, 3)).clip(0.15, 0.85)
        if away_from is None or np.linalg.norm(color - away_from) > 0.3:
            return color


def _textured(rng: np.random.Generator, color: Float, x: Float, y: Float) -> Float:
    """Return (S, S, 3): the colour, modulated by stripes, checks or blotches of random scale."""
    kind = rng.integers(3)
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / rng.uniform(4, 16)
    u = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    v = np.sin(frequency * (np.cos(angle) * y - np.sin(angle) * x))
    pattern = (u, u * v, np.sin(2 * u + 3 * v + phase))[kind]
    return color + rng.uniform(0.02, 0.06) * pattern[..., None]


def _paint(canvas: Float, color: Float, distance: Float) -> None:
    """Blend ``color`` into the canvas in place, with an anti-aliased edge at distance 0."""
    opacity = (0.5 - distance).clip(0, 1)[..., None]
    canvas += opacity * (color - canvas)


def cache_folder() -> Path:
    """Return the folder of this version of the data set in the user's cache folder."""
    name = f"shapes-v{VERSION}-seed{SEED}-{IMAGE_SIZE}px"
    return platformdirs.user_cache_path("segformer_pl") / name


def prepare() -> Path:
    """Return the cache folder of the data set, after generating the data set if needed."""
    folder = cache_folder()
    if not folder.is_dir():
        generate(folder)
    return folder


def generate(folder: Path, num_images: Mapping[str, int] | None = None) -> None:
    """Generate the data set: Parquet shards and ring statistics of every split.

    The files are identical byte by byte for the same library versions. They are written to a
    temporary folder, which is renamed once it is complete, so an interrupted or concurrent call
    never leaves a partial data set.

    Args:
        folder: Target folder; it must not exist.
        num_images: Number of images of each split. Default: :data:`NUM_IMAGES`.

    Raises:
        WriteError: The folder cannot be written, for example because the disk is full.
    """
    make_writable_folder(folder.parent)
    # mkdtemp's folder is readable for its owner alone, a folder in it for everybody who may.
    private = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    draft = private / folder.name
    try:
        draft.mkdir()
        statistics = {
            split: _write_split(draft, split_index, split, count)
            for split_index, (split, count) in enumerate((num_images or NUM_IMAGES).items())
        }
        (draft / STATISTICS_FILE).write_text(json.dumps(statistics, indent=1) + "\n")
        try:
            draft.rename(folder)
        except OSError:
            # If the folder exists now, another process has written the same files.
            if not folder.is_dir():
                raise
    except OSError as error:
        raise WriteError(
            f"cannot write {str(folder)!r}: {error.strerror or error}; {advice(error.errno)}"
        ) from error
    finally:
        shutil.rmtree(private, ignore_errors=True)


def _write_split(folder: Path, split_index: int, split: str, count: int) -> dict[str, list[int]]:
    """Write the shards of one split.

    Returns:
        For each ring class, the number of ring pixels by whole distance to the beacon in pixels.
    """
    histograms = {name: np.zeros(2 * IMAGE_SIZE, np.int64) for name in BEACON_COLORS}
    num_shards = math.ceil(count / IMAGES_PER_SHARD)
    progress = tqdm(total=count, desc=f"generating shapes/{split}", unit="image")
    for shard in range(num_shards):
        rows = []
        for index in range(shard * IMAGES_PER_SHARD, min((shard + 1) * IMAGES_PER_SHARD, count)):
            sample = draw(np.random.default_rng([SEED, split_index, index]))
            np.add.at(histograms[sample.ring], np.floor(sample.ring_distances).astype(int), 1)
            rows.append(
                {
                    "image": {"bytes": _png(sample.image), "path": None},
                    "label": {"bytes": _png(sample.label), "path": None},
                    "id": f"{split}-{index:05d}",
                }
            )
            progress.update()
        features = datasets.Features(
            {"image": datasets.Image(), "label": datasets.Image(), "id": datasets.Value("string")}
        )
        pq.write_table(
            pa.Table.from_pylist(rows, schema=features.arrow_schema),
            folder / f"{split}-{shard:05d}-of-{num_shards:05d}.parquet",
            row_group_size=ROW_GROUP_SIZE,
        )
    progress.close()
    return {name: histogram.tolist() for name, histogram in histograms.items()}


def _png(image: npt.NDArray[np.uint8]) -> bytes:
    """Encode an image as PNG."""
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def locality_ceiling(folder: Path, split: str, radius: float = BEACON_DISTANCE) -> float:
    """Return the best expected mIoU of a predictor with a receptive field of limited radius.

    All pixels except ring pixels are assumed to be predicted correctly. A ring pixel that is at
    least ``radius`` away from the beacon gives no evidence about its class, so the predictor can
    only call some fraction f of these hidden pixels blue::

        IoU of ring_blue   = (visible_blue + f * hidden_blue) / (blue + f * hidden_orange)
        IoU of ring_orange = (visible_orange + (1 - f) * hidden_orange)
                             / (orange + (1 - f) * hidden_blue)

    The ceiling is the mIoU at the best fraction. With equal areas and no visible pixels, f is one
    half and both classes have an IoU of 1/3.

    Args:
        folder: Folder written by :func:`generate`.
        split: Name of the split.
        radius: Radius in pixels of the predictor's receptive field, rounded down. The default is
            the largest radius at which no beacon is visible.

    Returns:
        mIoU in 0 to 1.

    Raises:
        FileNotFoundError: The folder holds no ring statistics.
    """
    histograms = json.loads((folder / STATISTICS_FILE).read_text())[split]
    blue, orange = (np.asarray(histograms[name]) for name in BEACON_COLORS)
    reach = math.floor(radius)
    visible_blue, hidden_blue = blue[:reach].sum(), blue[reach:].sum()
    visible_orange, hidden_orange = orange[:reach].sum(), orange[reach:].sum()
    fraction = np.linspace(0, 1, 1001)
    intersections = np.array(
        [visible_blue + fraction * hidden_blue, visible_orange + (1 - fraction) * hidden_orange]
    )
    unions = np.array(
        [blue.sum() + fraction * hidden_orange, orange.sum() + (1 - fraction) * hidden_blue]
    )
    # As in the metric, a class that neither occurs nor is predicted is left out of the mean.
    present = unions > 0
    ious = np.divide(intersections, unions, out=np.zeros_like(unions), where=present)
    others = len(CLASS_NAMES) - len(BEACON_COLORS)
    return float(((others + ious.sum(axis=0)) / (others + present.sum(axis=0))).max())


def reference_scores(folder: Path, split: str) -> dict[str, float]:
    """Return reference values to compare a result with: the mIoU ceiling without long context.

    Args:
        folder: Folder of the data set.
        split: Name of the split.

    Returns:
        ``{"locality_ceiling": mIoU}``; empty if :func:`generate` did not write the folder.
    """
    if not (folder / STATISTICS_FILE).is_file():
        return {}
    return {"locality_ceiling": locality_ceiling(folder, split)}
