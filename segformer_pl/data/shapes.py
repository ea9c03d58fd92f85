"""``shapes``: an embedded segmentation data set that measures whether a network uses long context.

Pictures are generated from a seed and written as Parquet shards with the columns of a hub data
set. Classes are told by shape, never by colour: objects and backgrounds have random muted colours
and textures, may overlap, and come in small and large scales; all shapes have the same area at the
same scale. Part of every second picture is unlabelled.

Two classes are locally identical. A ring is a ``ring_blue`` if the beacon of its picture, a
saturated dot at the border, is blue, and a ``ring_orange`` if it is orange; the beacon lies at
least :data:`BEACON_DISTANCE` pixels away from every ring pixel and its colour is drawn
independently of everything else. A network that does not see that far cannot do better than
guess, which bounds its mIoU by :func:`locality_ceiling`.
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

VERSION = 1  # raise it with every change of the pictures: cached folders are told apart by it
SEED = 0
IMAGE_SIZE = 64  # pixels a side
BEACON_DISTANCE = 24  # pixels, the least between a ring pixel and a beacon pixel
BEACON_RADIUS = 6.0
BEACON_COLORS = {"ring_blue": (0.0, 0.35, 1.0), "ring_orange": (1.0, 0.55, 0.0)}
RADII = (8.0, 16.0)  # pixels, of the disc with the shape's area; the logarithm is uniform
MAX_OVERLAP = 0.2  # of a shape's area may cover shapes that were drawn before
NUM_IMAGES = {"train": 6000, "validation": 500}
IMAGES_PER_SHARD = 500
ROW_GROUP_SIZE = 100
STATISTICS_FILE = "ring_distances.json"

_TRIANGLE_INRADIUS = np.sqrt(np.pi / (3 * np.sqrt(3)))
_CROSS_ARM = np.sqrt(np.pi * 9 / 20)
_RING_HOLE = 0.45  # of the outer radius
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


# Signed distance to the outline, negative inside, of a shape with the area of the unit disc.
OUTLINES = {
    "disc": _disc,
    "triangle": _triangle,
    "cross": _cross,
    "ring_blue": _ring,
    "ring_orange": _ring,
}


class Sample(NamedTuple):
    """One picture.

    image: (S, S, 3) uint8 RGB. label: (S, S) uint8, 255 where unlabelled.
    ring: the class of this picture's rings, which its beacon tells.
    ring_distances: for every labelled ring pixel its distance to the nearest beacon pixel, px.
    """

    image: npt.NDArray[np.uint8]
    label: npt.NDArray[np.uint8]
    ring: str
    ring_distances: Float


def draw(rng: np.random.Generator) -> Sample:
    """Draw one picture."""
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
            radius = max(0.95 * radius, RADII[0])
        else:
            continue
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
    return Sample(image, label, ring, to_beacon[label == CLASS_NAMES.index(ring)])


def _beacon_center(rng: np.random.Generator) -> tuple[float, float]:
    """A point along the picture's border, uniform, the whole beacon inside."""
    low, high = BEACON_RADIUS + 1, IMAGE_SIZE - BEACON_RADIUS - 2
    along, across = rng.uniform(low, high), low if rng.random() < 0.5 else high
    return (along, across) if rng.random() < 0.5 else (across, along)


def _muted_color(rng: np.random.Generator, away_from: Float | None = None) -> Float:
    """RGB in 0.15-0.85 with little saturation, at least 0.3 away from ``away_from``."""
    while True:
        grey = rng.uniform(0.25, 0.75)
        color = (grey + rng.uniform(-0.15, 0.15, 3)).clip(0.15, 0.85)
        if away_from is None or np.linalg.norm(color - away_from) > 0.3:
            return color


def _textured(rng: np.random.Generator, color: Float, x: Float, y: Float) -> Float:
    """(S, S, 3): the colour, modulated by stripes, checks or blotches of a random scale."""
    kind = rng.integers(3)
    angle, phase = rng.uniform(0, 2 * np.pi, 2)
    frequency = 2 * np.pi / rng.uniform(4, 16)
    u = np.sin(frequency * (np.cos(angle) * x + np.sin(angle) * y) + phase)
    v = np.sin(frequency * (np.cos(angle) * y - np.sin(angle) * x))
    pattern = (u, u * v, np.sin(2 * u + 3 * v + phase))[kind]
    return color + rng.uniform(0.02, 0.06) * pattern[..., None]


def _paint(canvas: Float, color: Float, distance: Float) -> None:
    """Blend ``color`` over the canvas, in place, with an anti-aliased edge at distance 0."""
    opacity = (0.5 - distance).clip(0, 1)[..., None]
    canvas += opacity * (color - canvas)


def cache_folder() -> Path:
    """Where this version of the data set is kept: the user's cache folder of the platform."""
    name = f"shapes-v{VERSION}-seed{SEED}-{IMAGE_SIZE}px"
    return platformdirs.user_cache_path("segformer_pl") / name


def prepare() -> Path:
    """Generate the data set into the cache folder unless it is there, and return the folder."""
    folder = cache_folder()
    if not folder.is_dir():
        generate(folder)
    return folder


def generate(folder: Path, num_images: Mapping[str, int] | None = None) -> None:
    """Write the Parquet shards and the statistics of every split.

    The same bytes every time with the same library versions. The folder appears under its name
    only when it is complete, so an interrupted or concurrent call leaves nothing half-made.

    Args:
        folder: Where to; must not exist.
        num_images: Number of pictures of each split; default :data:`NUM_IMAGES`.

    Raises:
        WriteError: The disk is full, the folder is read-only, or the like.
    """
    make_writable_folder(folder.parent)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        statistics = {
            split: _write_split(draft, split_index, split, count)
            for split_index, (split, count) in enumerate((num_images or NUM_IMAGES).items())
        }
        (draft / STATISTICS_FILE).write_text(json.dumps(statistics, indent=1) + "\n")
        try:
            draft.rename(folder)
        except OSError:
            if not folder.is_dir():  # another process was first, with the same bytes
                raise
    except OSError as error:
        raise WriteError(
            f"cannot write {str(folder)!r}: {error.strerror or error}; {advice(error.errno)}"
        ) from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_split(folder: Path, split_index: int, split: str, count: int) -> dict[str, list[int]]:
    """Write one split; returns its ring-pixel histograms, see :func:`locality_ceiling`."""
    histograms = {name: np.zeros(2 * IMAGE_SIZE, np.int64) for name in BEACON_COLORS}
    num_shards = math.ceil(count / IMAGES_PER_SHARD)
    progress = tqdm(total=count, desc=f"generating shapes/{split}", unit="picture")
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
    buffer = BytesIO()
    Image.fromarray(image).save(buffer, format="PNG")
    return buffer.getvalue()


def locality_ceiling(folder: Path, split: str, radius: float = BEACON_DISTANCE) -> float:
    """Best mIoU, in expectation, of any predictor that sees ``radius`` pixels around a pixel.

    Everything but the rings is taken to be perfect. A ring pixel whose beacon is farther away
    than ``radius`` looks the same in both classes, so the best that can be done is to call some
    fraction of these pixels blue; the ceiling is the mIoU at the best fraction (with equal areas
    one half, which gives each of the two classes an IoU of 1/3).

    Args:
        folder: A folder written by :func:`generate`.
        split: Which split.
        radius: Reach of the predictor in pixels, counted in whole pixels. The default is the
            farthest reach that sees no beacon at all.

    Raises:
        FileNotFoundError: the folder holds no such statistics.
    """
    histograms = json.loads((folder / STATISTICS_FILE).read_text())[split]
    blue, orange = (np.asarray(histograms[name]) for name in BEACON_COLORS)
    reach = math.floor(radius)
    seen_blue, hidden_blue = blue[:reach].sum(), blue[reach:].sum()
    seen_orange, hidden_orange = orange[:reach].sum(), orange[reach:].sum()
    called_blue = np.linspace(0, 1, 1001)
    intersections = np.array(
        [seen_blue + called_blue * hidden_blue, seen_orange + (1 - called_blue) * hidden_orange]
    )
    unions = np.array(
        [blue.sum() + called_blue * hidden_orange, orange.sum() + (1 - called_blue) * hidden_blue]
    )
    # A class that is neither there nor called is left out of the mean, as in the metric.
    present = unions > 0
    ious = np.divide(intersections, unions, out=np.zeros_like(unions), where=present)
    others = len(CLASS_NAMES) - len(BEACON_COLORS)
    return float(((others + ious.sum(axis=0)) / (others + present.sum(axis=0))).max())


def reference_scores(folder: Path, split: str) -> dict[str, float]:
    """Scores that give a result its meaning: here the ceiling of a short-sighted network.

    Empty for a folder that :func:`generate` did not write.
    """
    if not (folder / STATISTICS_FILE).is_file():
        return {}
    return {"locality_ceiling": locality_ceiling(folder, split)}
