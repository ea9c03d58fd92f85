"""From positions to samples: who reads what, and what becomes of it.

A position is the number of a sample in the sequence that all ranks and workers consume together
(order.py says which row stands there). Everything about a sample follows from ``(seed, position)``:
which picture it is, and every random number that its augmentation draws. Ranks take their part of
every global batch, :class:`RankSampler`; loader processes take the rank's batches in turn, as torch
deals them out. So a run can go on from any position, on any number of ranks and workers.
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
    FirstColors,
    PaletteColors,
    cell_bytes,
    check_orientation,
    decode_label,
)
from segformer_pl.data.files import UnreadableRows
from segformer_pl.data.order import EpochShuffle, Location, StoredOrder
from segformer_pl.data.sources import Row, Source
from segformer_pl.errors import UserError

Transforms = Callable[
    [EncodedImage, np.ndarray, np.random.Generator], tuple[torch.Tensor, torch.Tensor]
]
OnBadSample = Literal["raise", "skip"]

SUBSTITUTES = 10  # tries to find a sound sample in place of a bad one
BLANK = 32  # side in pixels of what stands for a bad picture in evaluation


class Sample(TypedDict):
    """One sample, see :class:`~segformer_pl.batch.Batch`.

    Attributes:
        image: (3, H, W).
        label: (H, W).
        id: Its name.
        seed: Its random number.
        skipped: Samples that could not be used in its place, and why.
        notices: What there is to notice about it.
        palettes: Palette indices that this process met first in it.
    """

    image: torch.Tensor
    label: torch.Tensor
    id: str
    seed: int
    skipped: dict[str, str]
    notices: dict[str, str]
    palettes: FirstColors


class Samples(torch.utils.data.Dataset[Sample]):
    """The sample at a position.

    Args:
        entry: The data set.
        source: Its rows.
        order: Which row stands at a position.
        transforms: ``(picture, train ids (H, W), generator) -> (image, label)``, see
            :mod:`segformer_pl.data.transforms`.
        on_bad_sample: Whether a row that cannot be used ends the run or is skipped. Its position
            counts all the same: in training another sample of the epoch takes it, in evaluation a
            picture of which no pixel counts.
    """

    def __init__(
        self,
        entry: DatasetEntry,
        source: Source,
        order: EpochShuffle | StoredOrder,
        transforms: Transforms,
        on_bad_sample: OnBadSample = "raise",
    ) -> None:
        self.entry = entry
        self.source = source
        self.order = order
        self.transforms = transforms
        self.on_bad_sample = on_bad_sample
        self._open: dict[int, tuple[int, Sequence[Row] | UnreadableRows]] = {}
        self._palettes = PaletteColors()  # of the samples that this process reads

    def __getitem__(self, position: int) -> Sample:
        """The sample at a position.

        Raises:
            UserError: The row cannot be used: unreadable, without picture or label, undecodable, or
                with a label outside the spec. One sentence says which and why.
        """
        order = self.order
        skipped: dict[str, str] = {}
        location = order.locate(position)
        seeds = np.random.SeedSequence([order.seed, location.epoch, position])
        rng = np.random.default_rng(seeds)
        notices: dict[str, str] = {}
        palettes: FirstColors = {}
        for _ in range(SUBSTITUTES):
            row, name = None, self._name(None, location)
            try:
                row = self._row(location)
                name = self._name(row, location)
                image, label, notices, palettes = self._load(row, name, rng)
                break
            except UserError as error:
                if row is None and not isinstance(error, UnreadableRows):
                    raise  # such as a network that is down: no row can be had
                if self.on_bad_sample == "raise":
                    raise
                skipped[name] = last = str(error)
            if isinstance(order, StoredOrder):
                image = torch.zeros(3, BLANK, BLANK)
                label = torch.full((BLANK, BLANK), self.entry.labels.ignore_index)
                break
            other = location.epoch * order.num_rows + int(rng.integers(order.num_rows))
            location = order.locate(other)
        else:
            raise UserError(
                f"{SUBSTITUTES} samples in a row cannot be used, the last because of: {last}"
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
        rows = next((rows for other, rows in self._open.values() if other == group), None)
        if rows is None:
            try:
                rows = self.source.read(group)
            except UnreadableRows as error:  # it would be read again for each of its rows
                rows = error
        self._open[location.lane] = (group, rows)
        if isinstance(rows, UnreadableRows):
            raise rows
        return rows[location.row]

    def _read_file(self, path: str) -> bytes:
        return self.source.read_file(path)

    def _name(self, row: Row | None, location: Location) -> str:
        """The row's id; a data set without ids has the places of its rows."""
        column = self.entry.id_column
        name = None if column is None or row is None else row[column]
        return self.source.name(location.group, location.row) if name is None else str(name)

    def _load(
        self, row: Row, name: str, rng: np.random.Generator
    ) -> tuple[torch.Tensor, torch.Tensor, dict[str, str], FirstColors]:
        """Decode, map labels to train ids, transform; what there is to notice; new colours."""
        entry = self.entry
        where = f"data set {entry.name!r}, sample {name!r}"
        in_image = f"{where}, column {entry.image_column!r}"
        in_label = f"{where}, column {entry.label_column!r}"
        read_file = self._read_file
        image = EncodedImage(cell_bytes(row[entry.image_column], in_image, read_file), in_image)
        encoded_label = cell_bytes(row[entry.label_column], in_label, read_file)
        label = decode_label(encoded_label, in_label, entry.labels.coding)
        notices = {
            "orientation": check_orientation(image, label, where),
            "frames": image.frames_notice(),
        }
        if label.values.shape[:2] != image.size:
            (height, width), (image_height, image_width) = label.values.shape[:2], image.size
            turned = ""
            if image.orientation != 1 or label.orientation != 1:
                turned = (
                    f", once turned as their EXIF orientations say (image {image.orientation}, "
                    f"label {label.orientation})"
                )
            remedy = "upright, without an EXIF orientation and " if turned else ""
            raise UserError(
                f"{where}: the label is {height}x{width} but the image is "
                f"{image_height}x{image_width} (height x width){turned}; store them {remedy}at one "
                "size"
            )
        train_ids = entry.labels.to_train_ids(label.values, where)
        # Last, because colours of a sample that is refused would reach no one.
        notices["palette"], palettes = self._palettes.compare(label, where)
        told = {kind: sentence for kind, sentence in notices.items() if sentence}
        return *self.transforms(image, train_ids, rng), told, palettes


class RankSampler(Sampler[int]):
    """The positions that one rank reads, in its order.

    In training every global batch holds the next ``world_size * batch_size`` positions, and rank r
    takes the r-th run of ``batch_size`` of them, without end. So the ranks' batches are also those
    that a single process would take one after the other to accumulate their gradients. In
    evaluation each rank takes one run of the rows; their lengths differ by one at most, and no
    row is taken twice.

    Give the trainer ``use_distributed_sampler=False``, as the command line does: by default it
    would replace this sampler on several ranks.

    Args:
        order: The order of the samples.
        rank: This process.
        world_size: Number of processes.
        batch_size: Samples per batch of a rank.
        start: Called whenever a pass begins: the first position, in training.
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
            return iter(self._share())
        return self._endless(self.start())

    def _endless(self, position: int) -> Iterator[int]:
        position += self.rank * self.batch_size
        while True:
            yield from range(position, position + self.batch_size)
            position += self.world_size * self.batch_size

    def _share(self) -> range:
        first, last = (
            rank * self.order.num_rows // self.world_size for rank in (self.rank, self.rank + 1)
        )
        return range(first, last)

    def __len__(self) -> int:
        # The longest share, on all ranks: one that finds its own to be empty would leave the
        # validation, and the others waiting for its scores.
        if isinstance(self.order, StoredOrder):
            return -(-self.order.num_rows // self.world_size)
        raise TypeError("training has no end; trainer.max_steps sets its length")


def collate(samples: list[Sample]) -> Batch:
    """Stack samples of one size; blank ones are left out where there are others.

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
            "data.crop_size for training and data.eval_batch_size 1 for evaluation"
        )
    return {
        "image": default_collate([sample["image"] for sample in kept]),
        "label": default_collate([sample["label"] for sample in kept]),
        "id": [sample["id"] for sample in kept],
        "seed": [sample["seed"] for sample in kept],
        "skipped": {name: why for sample in samples for name, why in sample["skipped"].items()},
        "notices": {kind: told for sample in kept for kind, told in sample["notices"].items()},
        "palettes": {
            index: first for sample in kept for index, first in sample["palettes"].items()
        },
    }
