"""The validation images, evaluated in one setting after the other.

``robustness`` and ``test_time`` share this: the images and their origin, one data loader for all
settings, and what happens on Ctrl-C.
"""

import operator
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from segformer_pl.batch import Batch
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.index import same_data
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.streaming import Sample, Samples, Transforms, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import INTERRUPTED, UserError, counted


class ValidationSplit:
    """Images of a validation split.

    Args:
        data: Data of a run.
        num_images: Number of images, evenly spaced over the split. None: all.

    Raises:
        UserError: The split cannot be read, or has fewer images.
    """

    def __init__(self, data: StreamingSegmentationData, num_images: int | None) -> None:
        self.data = data
        self.source = data.open("validation")
        order = StoredOrder(self.source.group_rows)
        num_rows = order.num_rows
        if num_images is not None and num_images > num_rows:
            raise UserError(
                f"--num_images {num_images}: the validation split has "
                f"{counted(num_rows, 'image')}; give at "
                f"most {num_rows}, or leave the option out"
            )
        num_images = num_images or num_rows
        self.positions = [number * num_rows // num_images for number in range(num_images)]
        self.samples = data.samples("validation", self.source, order, to_tensors)

    def origin(self, checkpoint: str) -> dict[str, Any]:
        """Return what identifies results on these images.

        Args:
            checkpoint: Digest of the checkpoint.
        """
        return {
            "num_images": len(self.positions),
            "dataset": self.data.entry.name,
            "fingerprint": self.source.fingerprint,
            "checkpoint": checkpoint,
        }

    def evaluate(
        self,
        missing: Mapping[str, Transforms],
        evaluate: Callable[[str, Iterator[Batch]], None],
        num_settings: int,
        file: Path,
    ) -> None:
        """Evaluate settings one after the other.

        One data loader serves all of them, so its workers start once::

            missing settings     fog 3                 fog 4
            positions            0  2  4  6  8         0  2  4  6  8       (5 of 10 images)
            batches of 2         [0  2][4  6][8]       [0  2][4  6][8]     none holds two settings

        Args:
            missing: Transforms of the images by name of the setting.
            evaluate: Function that evaluates the batches of a setting and stores the result.
            num_settings: Number of settings with those that were evaluated before.
            file: Results file, for the message after Ctrl-C, which ends the process.
        """
        batches = iter(self._loader(list(missing.values())))
        num_batches = -(-len(self.positions) // self.data.eval_batch_size)
        num_done = num_settings - len(missing)
        total = len(missing) * len(self.positions)
        try:
            with tqdm(total=total, unit="image", disable=not missing) as progress:
                for name in missing:
                    progress.set_description(name)
                    evaluate(name, self._checked(islice(batches, num_batches), progress))
                    num_done += 1
        except KeyboardInterrupt:
            sys.stderr.write(
                f"interrupted: {num_done} of {num_settings} evaluations are in {file}; the same "
                "command continues with the others\n"
            )
            sys.exit(INTERRUPTED)

    def _checked(self, batches: Iterator[Batch], progress: "tqdm[Any]") -> Iterator[Batch]:
        for batch in batches:
            yield self.data.on_before_batch_transfer(batch, 0)  # warns of skipped samples
            progress.update(len(batch["id"]))

    def _loader(self, transforms: Sequence[Transforms]) -> DataLoader[Sample]:
        """Return a loader that yields all batches of one setting before those of the next."""
        size = self.data.eval_batch_size
        return DataLoader(
            TransformedSamples(self.samples, transforms),
            batch_sampler=[
                [(setting, position) for position in self.positions[first : first + size]]
                for setting in range(len(transforms))
                for first in range(0, len(self.positions), size)
            ],
            num_workers=self.data.num_workers,
            collate_fn=collate,
        )


class TransformedSamples(Dataset[Sample]):
    """Samples under several transforms, indexed by (index of the transforms, position).

    Args:
        samples: Samples of the split; their transforms are replaced at every access.
        transforms: Transforms to choose from.
    """

    def __init__(self, samples: Samples, transforms: Sequence[Transforms]) -> None:
        self.samples = samples
        self.transforms = transforms

    def __len__(self) -> int:
        return len(self.transforms) * self.samples.order.num_rows

    def __getitem__(self, key: tuple[int, int]) -> Sample:
        setting, position = key
        self.samples.transforms = self.transforms[setting]
        return self.samples[position]


def check_origin(file: Path, stored: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Check that a stored result is of the same checkpoint and images.

    Args:
        file: Results file, for the message.
        stored: Fields of the stored result.
        current: What :meth:`ValidationSplit.origin` returns now.

    Raises:
        UserError: One of the fields differs.
    """
    for key, description in {
        "checkpoint": "checkpoint (its SHA-256)",
        "num_images": "number of images",
        "dataset": "data set",
        "fingerprint": "fingerprint of the shards",
    }.items():
        same = same_data if key == "fingerprint" else operator.eq
        if not same(stored[key], current[key]):
            raise UserError(
                f"--output: {file} contains other results: its {description} is {stored[key]}, "
                f"here it is {current[key]}; give another folder, or remove that file"
            )
