"""The dataset of samples by position, the sampler of each rank, and the collate function.

A position is the index of a sample in the sequence that all ranks and workers consume together;
``order.py`` maps it to a stored row. A sample is a function of ``(seed, position)`` alone: which
image it is, and every random number of its augmentation. Each rank takes its part of every global
batch (:class:`RankSampler`), and torch's ``DataLoader`` gives the rank's batches to its workers in
turn. A run can therefore resume from any position, with any world size and number of workers.

Two ranks with ``batch_size=3`` and two workers each::

    position          0  1  2    3  4  5    6  7  8    9 10 11   12 13 14   15 16 17
    rank              |- 0 -|    |- 1 -|    |- 0 -|    |- 1 -|    |- 0 -|    |- 1 -|
    worker of rank    |- 0 -|    |- 0 -|    |- 1 -|    |- 1 -|    |- 0 -|    |- 0 -|
    global batch      |------ 0 -------|    |------ 1 -------|    |------ 2 -------|

    resumed at 6 on one rank, accumulate_grad_batches=2:
    batch                                   |- 0 -|    |- 1 -|    |- 2 -|    |- 3 -|
    optimiser step                          |------ 1 -------|    |------ 2 -------|
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypedDict

import numpy as np
import torch
from torch.utils.data import Sampler, default_collate

from segformer_pl.batch import Batch
from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.decoding import (
    EncodedImage,
    NumBands,
    cell_bytes,
    check_orientation,
    decode_label,
)
from segformer_pl.data.files import UnreadableRows
from segformer_pl.data.order import EpochShuffle, Location, StoredOrder
from segformer_pl.data.palette_colors import FirstColors, PaletteColors
from segformer_pl.data.sources import Row, Source, Split
from segformer_pl.errors import UserError

Transforms = Callable[
    [EncodedImage, np.ndarray, np.random.Generator], tuple[torch.Tensor, torch.Tensor]
]
OnBadSample = Literal["raise", "skip"]

MAX_SUBSTITUTES = 10  # samples tried in place of a bad one
BLANK_SIZE = 32  # side in pixels of the blank image that replaces a bad one in evaluation


class Sample(TypedDict):
    """One sample; :class:`~segformer_pl.batch.Batch` stacks several.

    Attributes:
        image: Float32 tensor of shape (num_bands, H, W), in 0 to 1; the first three bands are RGB.
        label: Int64 tensor of train ids, shape (H, W).
        id: Id of the sample.
        seed: Random number that depends on the data seed and the position alone.
        skipped: Reason by id, for each bad sample that this sample replaces.
        notices: Warning by kind, about this sample.
        palettes: Colour by palette index, for the indices that are new to this worker.
    """

    image: torch.Tensor
    label: torch.Tensor
    id: str
    seed: int
    skipped: dict[str, str]
    notices: dict[str, str]
    palettes: FirstColors


class Samples(torch.utils.data.Dataset[Sample]):
    """Map-style dataset whose index is a position.

    Args:
        entry: Catalogue entry of the data set.
        source: Stored rows of the split.
        order: Order that maps positions to rows.
        transforms: Joint transforms ``(encoded image, train ids (H, W), generator) -> (image,
            label)``; see :mod:`segformer_pl.data.transforms`.
        on_bad_sample: Whether a bad row raises an error or is skipped. A skipped row keeps its
            position. In training another sample of the epoch replaces it, in evaluation a blank
            image whose pixels are all ignored.
        num_bands: Number of bands that images are read with, see
            :class:`~segformer_pl.data.decoding.EncodedImage`.
        split: Name of the split for messages, since several splits may have the same ids.
    """

    def __init__(
        self,
        entry: DatasetEntry,
        source: Source,
        order: EpochShuffle | StoredOrder,
        transforms: Transforms,
        on_bad_sample: OnBadSample = "raise",
        num_bands: NumBands = 3,
        split: Split | None = None,
    ) -> None:
        self.entry = entry
        self.where = f"data set {entry.name!r}{'' if split is None else f', split {split}'}"
        self.source = source
        self.order = order
        self.transforms = transforms
        self.on_bad_sample = on_bad_sample
        self.num_bands = num_bands
        # Lane -> the row group that is open for it, and its rows or the error on reading them.
        self._open: dict[int, tuple[int, Sequence[Row] | UnreadableRows]] = {}
        self._palettes = PaletteColors()  # of the samples that this worker has read

    def __len__(self) -> int:
        """Return the number of stored rows; in training, positions go on beyond it."""
        return self.order.num_rows

    def __getitem__(self, position: int) -> Sample:
        """Load, decode and augment the sample at a position.

        Raises:
            UserError: The row is bad: it is unreadable, has no image or label, cannot be decoded,
                or its label has a value that the data set does not define.
        """
        order = self.order
        skipped: dict[str, str] = {}
        location = order.locate(position)
        seeds = np.random.SeedSequence([order.seed, location.epoch, position])
        rng = np.random.default_rng(seeds)
        notices: dict[str, str] = {}
        palettes: FirstColors = {}
        # Each turn tries one row. The same generator draws the substitutes and the augmentation,
        # so the sample remains a function of (seed, position).
        for _ in range(MAX_SUBSTITUTES):
            row, name = None, self._name(None, location)
            try:
                row = self._row(location)
                name = self._name(row, location)
                image, label, notices, palettes = self._load(row, name, rng)
                break
            except UserError as error:
                if row is None and not isinstance(error, UnreadableRows):
                    raise  # not about this row, such as a network that is down
                if self.on_bad_sample == "raise":
                    raise
                skipped[name] = last = str(error)
            if isinstance(order, StoredOrder):
                image = torch.zeros(self.num_bands, BLANK_SIZE, BLANK_SIZE)
                label = torch.full((BLANK_SIZE, BLANK_SIZE), self.entry.labels.ignore_index)
                break
            substitute = location.epoch * order.num_rows + int(rng.integers(order.num_rows))
            location = order.locate(substitute)
        else:
            raise UserError(
                f"{MAX_SUBSTITUTES} samples in a row cannot be used, the last because of: {last}"
            )
        seed = int(seeds.generate_state(1)[0])
        return {
            "image": image,
            "label": label,
            "id": name,
            "seed": seed,
            "skipped": skipped,
            "notices": notices,
            "palettes": palettes,
        }

    def _row(self, location: Location) -> Row:
        group = location.group
        # Two lanes may share a row group that the border between them cuts.
        rows = next((rows for opened, rows in self._open.values() if opened == group), None)
        if rows is None:
            try:
                rows = self.source.read(group)
            except UnreadableRows as error:
                rows = error  # keep it, or the row group would be read again for each of its rows
        self._open[location.lane] = (group, rows)
        if isinstance(rows, UnreadableRows):
            raise rows
        return rows[location.row]

    def _read_file(self, path: str) -> bytes:
        return self.source.read_file(path)

    def _name(self, row: Row | None, location: Location) -> str:
        """Return the row's id; without one, the shard and the index of the row in it."""
        column = self.entry.id_column
        name = None if column is None or row is None else row[column]
        return self.source.name(location.group, location.row) if name is None else str(name)

    def _load(
        self, row: Row, name: str, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, str], FirstColors]:
        """Decode and augment a row; return image, label, warnings by kind, and new colours."""
        entry = self.entry
        where = f"{self.where}, sample {name!r}"
        in_image = f"{where}, column {entry.image_column!r}"
        in_label = f"{where}, column {entry.label_column!r}"
        read_file = self._read_file
        encoded_image = cell_bytes(row[entry.image_column], in_image, read_file)
        image = EncodedImage(encoded_image, in_image, self.num_bands)
        encoded_label = cell_bytes(row[entry.label_column], in_label, read_file)
        label = decode_label(encoded_label, in_label, entry.labels.coding)
        notices = {
            "orientation": check_orientation(image, label, where),
            "frames": image.frames_notice(),
            "bands": image.bands_notice(),
        }
        if label.values.shape[:2] != image.size:
            (height, width), (image_height, image_width) = label.values.shape[:2], image.size
            oriented = ""
            if image.orientation != 1 or label.orientation != 1:
                oriented = (
                    f", after applying their EXIF orientations (image {image.orientation}, "
                    f"label {label.orientation})"
                )
            remedy = "upright, without an EXIF orientation and " if oriented else ""
            raise UserError(
                f"{where}: the label is {height}x{width} but the image is "
                f"{image_height}x{image_width} (height x width){oriented}; store them {remedy}at "
                "one size"
            )
        train_ids = entry.labels.to_train_ids(label.values, where)
        # Compare palettes last: the new colours of a bad sample would be lost.
        notices["palette"], palettes = self._palettes.compare(label, where)
        present = {kind: notice for kind, notice in notices.items() if notice}
        return *self.transforms(image, train_ids, rng), present, palettes


class RankSampler(Sampler[int]):
    """Positions of one rank, in the order in which it reads them.

    In training, each global batch holds the next ``world_size * batch_size`` positions, without
    end. Rank r takes the r-th block of ``batch_size`` of them. One rank that accumulates gradients
    over ``world_size`` batches reads the same blocks one after the other.

    In evaluation, each rank takes one contiguous block of the stored rows. The lengths differ by
    one at most and no row is repeated. Seven rows on two ranks: 0-2 and 3-6.

    Set ``use_distributed_sampler=False`` in the trainer, as the command line does. By default
    Lightning replaces this sampler when there are several ranks.

    Args:
        order: Order of the samples; a :class:`StoredOrder` means evaluation.
        rank: Rank of this process.
        world_size: Number of ranks.
        batch_size: Samples per batch and rank.
        start: Function that returns the first position of the global sequence; called at the start
            of each training iterator.
    """

    def __init__(
        self,
        order: EpochShuffle | StoredOrder,
        rank: int,
        world_size: int,
        batch_size: int,
        start: Callable[[], int] = int,
    ) -> None:
        self.order = order
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.start = start

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.order, StoredOrder):
            return iter(self._block())
        return self._endless(self.start())

    def _endless(self, position: int) -> Iterator[int]:
        position += self.rank * self.batch_size
        while True:
            yield from range(position, position + self.batch_size)
            position += self.world_size * self.batch_size

    def _block(self) -> range:
        begin, end = (
            rank * self.order.num_rows // self.world_size for rank in (self.rank, self.rank + 1)
        )
        return range(begin, end)

    def __len__(self) -> int:
        # Return the longest block on every rank. With length 0, a rank would skip validation while
        # the others wait for its metrics.
        if isinstance(self.order, StoredOrder):
            return -(-self.order.num_rows // self.world_size)
        raise TypeError("training has no end; trainer.max_steps sets its length")


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one size into a batch.

    Blank images, which replace bad samples in evaluation, are dropped unless there is nothing else.

    Raises:
        UserError: The sizes differ.
    """
    kept = [sample for sample in samples if sample["id"] not in sample["skipped"]] or samples[:1]
    sizes = {tuple(sample["label"].shape): sample["id"] for sample in kept}
    if len(sizes) > 1:
        (first, first_id), (second, second_id) = list(sizes.items())[:2]
        raise UserError(
            f"sample {first_id!r} is {first[0]}x{first[1]} but {second_id!r} is "
            f"{second[0]}x{second[1]} (height x width) and one batch needs one size; set "
            "--data.crop_size '[512,512]' (height and width) for training and "
            "--data.eval_batch_size 1 for evaluation"
        )
    return {
        "image": default_collate([sample["image"] for sample in kept]),
        "label": default_collate([sample["label"] for sample in kept]),
        "id": [sample["id"] for sample in kept],
        "seed": [sample["seed"] for sample in kept],
        "skipped": {name: why for sample in samples for name, why in sample["skipped"].items()},
        "notices": {kind: text for sample in kept for kind, text in sample["notices"].items()},
        "palettes": {
            index: first for sample in kept for index, first in sample["palettes"].items()
        },
    }
