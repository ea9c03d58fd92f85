"""Measure training samples per second of one data-loader worker.

    python experiments/benchmarks/data_throughput.py [--camvid FOLDER] [--rounds N]

Three pipelines turn the bytes of an image and its label image into a training sample. They run on
one thread, interleaved in one process:

- decoding alone, an upper bound for every pipeline that decodes whole images;
- segformer_pl's training pipeline;
- torchvision's transforms in their usual order, which scale the whole image and then crop.

There are two sources, both at scales of 0.5 to 2: images like those of CamVid (480x360 JPEG, or
CamVid itself) and like those of Cityscapes (2048x1024 PNG, generated).
"""

import argparse
import io
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torchvision import tv_tensors
from torchvision.transforms import v2
from tqdm import tqdm

from segformer_pl.data.decoding import EncodedImage, decode_label
from segformer_pl.data.transforms import TrainTransforms

Rows = list[tuple[bytes, bytes]]
Pipeline = Callable[[bytes, bytes, int], object]

CAMVID_CROP, CITYSCAPES_CROP = (352, 480), (1024, 1024)
SCALES = (0.5, 2.0)


def generate(height: int, width: int, noise: float, number: int, **encoding: object) -> Rows:
    """Generate images of smooth areas, edges and noise, with labels of large regions."""
    rows = []
    for seed in range(number):
        rng = np.random.default_rng(seed)
        y, x = np.mgrid[:height, :width] * (360 / height)
        regions = ((y + 40 * np.sin(x / rng.uniform(40, 90))) // 45 + x // 120).astype(int) % 11
        colors = rng.integers(30, 220, (11, 3))
        shade = 25 * np.sin(x / 9) * np.sin(y / 7)
        pixels = colors[regions] + shade[..., None] + rng.normal(0, noise, (height, width, 3))
        image, label = io.BytesIO(), io.BytesIO()
        Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8)).save(image, **encoding)
        Image.fromarray(regions.astype(np.uint8)).save(label, "PNG")
        rows.append((image.getvalue(), label.getvalue()))
    return rows


def camvid(folder: Path, number: int) -> Rows:
    shard = next(iter(sorted(folder.glob("train*.parquet"))))
    table = pq.ParquetFile(shard).read(["image", "label"]).slice(0, number).to_pylist()
    return [(row["image"]["bytes"], row["label"]["bytes"]) for row in table]


def decode(image: bytes, label: bytes, seed: int) -> object:
    return EncodedImage(image, "").decode(), decode_label(label, "")


def segformer_pl_pipeline(crop_size: tuple[int, int]) -> Pipeline:
    transforms = TrainTransforms(crop_size, SCALES, None, photometric=True, ignore_index=255)

    def load(image: bytes, label: bytes, seed: int) -> object:
        rng = np.random.default_rng(seed)
        return transforms(EncodedImage(image, ""), decode_label(label, "").values, rng)

    return load


class RandomScale(v2.Transform):
    """Scale image and label by a random factor in ``SCALES``."""

    def make_params(self, flat_inputs: list[object]) -> dict[str, object]:
        height, width = v2.functional.get_size(flat_inputs[0])
        scale = torch.empty(()).uniform_(*SCALES).item()
        return {"size": [round(height * scale), round(width * scale)]}

    def transform(self, inpt: object, params: dict[str, object]) -> object:
        return v2.functional.resize(inpt, **params)


def torchvision_pipeline(crop_size: tuple[int, int]) -> Pipeline:
    fill = {tv_tensors.Image: 124, tv_tensors.Mask: 255}
    jitter = v2.ColorJitter(brightness=32 / 255, contrast=0.5, saturation=0.5, hue=0.1)
    transforms = v2.Compose(
        [
            RandomScale(),
            v2.RandomCrop(crop_size, pad_if_needed=True, fill=fill),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([jitter], p=0.5),
            v2.ToDtype({tv_tensors.Image: torch.float32, tv_tensors.Mask: torch.int64}, scale=True),
        ]
    )

    def load(image: bytes, label: bytes, seed: int) -> object:
        torch.manual_seed(seed)
        pixels = np.asarray(Image.open(io.BytesIO(image)).convert("RGB"))
        ids = np.asarray(Image.open(io.BytesIO(label)))
        return transforms(
            tv_tensors.Image(torch.tensor(pixels).permute(2, 0, 1)),
            tv_tensors.Mask(torch.tensor(ids)),
        )

    return load


def measure(name: str, rows: Rows, crop_size: tuple[int, int], rounds: int) -> str:
    pipelines = {
        "decoding alone": decode,
        "segformer_pl": segformer_pl_pipeline(crop_size),
        "torchvision": torchvision_pipeline(crop_size),
    }
    rates: dict[str, list[float]] = {pipeline: [] for pipeline in pipelines}
    for round_ in tqdm(range(rounds + 1), name, leave=False):
        for pipeline, load in pipelines.items():
            begin = time.perf_counter()
            for index, (image, label) in enumerate(rows):
                load(image, label, round_ * len(rows) + index)
            if round_:  # the first round warms up
                rates[pipeline].append(len(rows) / (time.perf_counter() - begin))
    ours = rates["segformer_pl"]
    lines = [f"{name}, {len(rows)} images of {len(rows[0][0]) / 1000:.0f} kB, crop {crop_size}"]
    for pipeline, measured in rates.items():
        ratio = statistics.median(own / other for own, other in zip(ours, measured))
        lines.append(
            f"  {pipeline:15s} {statistics.median(measured):8.1f} samples/s "
            f"({min(measured):.1f} to {max(measured):.1f})   segformer_pl is {ratio:.2f} x"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--camvid", type=Path, help="folder with CamVid's Parquet shards")
    parser.add_argument("--rounds", type=int, default=9, help="measured rounds")
    options = parser.parse_args()
    torch.set_num_threads(1)
    small = (
        camvid(options.camvid, 32)
        if options.camvid
        else generate(360, 480, 4.0, 32, format="JPEG", quality=95, subsampling=0)
    )
    large = generate(1024, 2048, 1.0, 4, format="PNG")
    for name, rows, crop_size in (
        ("CamVid" if options.camvid else "like CamVid", small, CAMVID_CROP),
        ("like Cityscapes", large, CITYSCAPES_CROP),
    ):
        sys.stdout.write(measure(name, rows, crop_size, options.rounds) + "\n")


if __name__ == "__main__":
    main()
