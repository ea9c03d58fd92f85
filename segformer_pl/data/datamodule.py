"""The LightningDataModule that streams a segmentation data set of the catalogue."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from torch.utils.data import DataLoader, default_collate

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.labels import DataError
from segformer_pl.data.streaming import SampleStream, Split, TrainingStream, open_split
from segformer_pl.data.transforms import to_float, train_transforms

Batch = dict[str, Any]
SPLITS: dict[str, Split] = {"val": "validation", "test": "test"}  # in log keys, in file names


class StreamingSegmentationData(pl.LightningDataModule):
    """Streams a data set of the catalogue as batches of images, labels and ids.

    Batches: ``{"image": (B, 3, H, W) float32 RGB in 0 to 1, "label": (B, H, W) int64 train ids,
    "id": list of B str}``. Training batches come without end: give the trainer ``max_steps``.
    Validation and test visit every picture exactly once over all ranks and workers; prediction
    takes the validation pictures.

    Args:
        dataset: Name in the catalogue (:mod:`segformer_pl.data.catalog`).
        path: Folder with Parquet shards ``train*.parquet``, ``validation*.parquet`` and maybe
            ``test*.parquet``. ``shapes`` makes its own, in the user's cache folder.
        batch_size: Training pictures per device and step.
        eval_batch_size: Pictures per device and step in validation, test and prediction; 1 where
            picture sizes differ.
        num_workers: Loader processes per device.
        crop_size: Height and width of training crops in pixels; the whole picture by default.
        scale_range: Limits of the random scale factor in training; none by default.
        photometric: Whether to distort colours in training.
        seed: Of the training order.

    Raises:
        DataError: what is asked for is not there, or a row is broken; one sentence says which.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        path: Path | None = None,
        batch_size: PositiveInt = 8,
        eval_batch_size: PositiveInt = 1,
        num_workers: NonNegativeInt = 2,
        crop_size: tuple[PositiveInt, PositiveInt] | None = None,
        scale_range: tuple[float, float] | None = None,
        photometric: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__()
        self.entry = find_dataset(dataset)
        self.path = path
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.train_transforms = train_transforms(
            crop_size, scale_range, photometric, self.entry.labels.ignore_index
        )

    def prepare_data(self) -> None:
        self.folder()

    def folder(self) -> Path:
        """Where the shards are, made first if the data set is one that is made.

        Raises:
            DataError: the data set needs a path and none was given.
        """
        if self.path is not None:
            return Path(self.path)
        if self.entry.prepare is None:
            raise DataError(
                f"data.path: data set {self.entry.name!r} is read from a folder of yours; give "
                "--data.path FOLDER with its Parquet shards"
            )
        return self.entry.prepare()

    def reference_scores(self, split: Literal["val", "test"]) -> dict[str, float]:
        """Scores of this split that give a result its meaning, such as a known ceiling."""
        if self.entry.reference_scores is None:
            return {}
        return self.entry.reference_scores(self.folder(), SPLITS[split])

    def train_dataloader(self) -> DataLoader[Batch]:
        stream = TrainingStream(
            self.entry,
            open_split(self.entry, self.folder(), "train"),
            self.train_transforms,
            **self._share(),
            seed=self.seed,
            first_pass=self.trainer.global_step if self.trainer else 0,
        )
        return self._loader(stream, self.batch_size, drop_last=True)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("validation")

    def _eval_loader(self, split: Split) -> DataLoader[Batch]:
        rows = open_split(self.entry, self.folder(), split)
        stream = SampleStream(self.entry, rows, to_float(), **self._share())
        return self._loader(stream, self.eval_batch_size, drop_last=False)

    def _share(self) -> dict[str, int]:
        """Which part of the data is this process's; everything without a trainer."""
        if self.trainer is None:
            return {"rank": 0, "world_size": 1}
        return {"rank": self.trainer.global_rank, "world_size": self.trainer.world_size}

    def _loader(self, stream: SampleStream, batch_size: int, drop_last: bool) -> DataLoader[Batch]:
        return DataLoader(
            stream,
            batch_size=batch_size,
            num_workers=self.num_workers,
            collate_fn=collate,
            drop_last=drop_last,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )


def collate(samples: list[dict[str, Any]]) -> Batch:
    """Stack samples of one size.

    Raises:
        DataError: the sizes differ.
    """
    sizes = {tuple(sample["label"].shape): sample["id"] for sample in samples}
    if len(sizes) > 1:
        (first, first_id), (second, second_id) = list(sizes.items())[:2]
        raise DataError(
            f"sample {first_id!r} is {first[0]}x{first[1]} but {second_id!r} is "
            f"{second[0]}x{second[1]} (height x width) and one batch needs one size; set "
            "data.crop_size for training and data.eval_batch_size 1 for evaluation"
        )
    return default_collate(samples)
