"""The LightningDataModule that streams a segmentation data set of the catalogue."""

from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.labels import DataError
from segformer_pl.data.order import EpochShuffle, StoredOrder
from segformer_pl.data.sources import Source, Split, open_split
from segformer_pl.data.streaming import OnBadSample, RankSampler, Samples, collate
from segformer_pl.data.transforms import TrainTransforms, to_tensors

Batch = dict[str, Any]
UNLABELLED_SAMPLES = 256  # on each device, after which a training without labels ends
SPLITS: dict[str, Split] = {"val": "validation", "test": "test"}  # in log keys, in file names


class StreamingSegmentationData(pl.LightningDataModule):
    """Streams a data set of the catalogue as batches of images, labels and ids.

    Batches: ``{"image": (B, 3, H, W) float32 RGB in 0 to 1, "label": (B, H, W) int64 train ids,
    "id": list of B str, "seed": list of B int, "skipped": {id: why}, "notices": {kind:
    sentence}}``; seeds are random numbers that belong to the samples (streaming.py).

    Training batches come without end: give the trainer ``max_steps``. Which samples a step takes,
    and how they are augmented, depends on ``seed`` and on the number of samples consumed before,
    not on the number of devices or workers. That number is in the checkpoints, and a run that
    resumes from one goes on exactly there, also on other devices: keep ``batch_size`` times the
    number of devices times ``trainer.accumulate_grad_batches`` and every step is that of an
    uninterrupted run.

    Validation and test visit every picture exactly once over all ranks and workers; prediction
    takes the validation pictures.

    Args:
        dataset: Name in the catalogue (:mod:`segformer_pl.data.catalog`), or a YAML file that
            describes a data set of yours in the same form.
        path: Where it is stored, if not at the place on the hub that the catalogue knows: a
            folder with Parquet shards ``train*.parquet``, ``validation*.parquet``,
            ``test*.parquet``; one with pictures ``images/<split>/*`` and ``labels/<split>/*.png``;
            a hub name ``owner/name`` or ``owner/name@revision``; a pattern with ``{split}`` of
            Parquet files, also ``hf://`` or ``https://``; or a list of such files for each split.
            ``shapes`` makes its own, in the user's cache folder.
        batch_size: Training pictures per device and step.
        eval_batch_size: Pictures per device and step in validation, test and prediction; 1 where
            picture sizes differ.
        num_workers: Loader processes per device.
        crop_size: Height and width of training crops in pixels; the whole picture by default.
        scale_range: Limits of the random scale factor in training; none by default.
        base_size: Long and short side in pixels that pictures are fitted into at scale 1; their
            own size by default.
        photometric: Whether to distort colours in training.
        on_bad_sample: Whether a damaged picture or label, or a label value that the data set does
            not know, ends the run (``raise``) or is reported and passed over (``skip``).
        seed: Of order and augmentation.

    Raises:
        DataError: what is asked for is not there, or a row is broken; one sentence says which.
    """

    def __init__(
        self,
        dataset: str = "shapes",
        path: str | Path | dict[str, list[str]] | None = None,
        batch_size: PositiveInt = 8,
        eval_batch_size: PositiveInt = 1,
        num_workers: NonNegativeInt = 2,
        crop_size: tuple[PositiveInt, PositiveInt] | None = None,
        scale_range: tuple[float, float] | None = None,
        base_size: tuple[PositiveInt, PositiveInt] | None = None,
        photometric: bool = False,
        on_bad_sample: OnBadSample = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        path = str(path) if isinstance(path, Path) else path  # checkpoints hold plain data
        # Into checkpoints, so that a checkpoint alone says what to score it on.
        self.save_hyperparameters(logger=False)
        self.entry = find_dataset(dataset)
        self.path = path
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.on_bad_sample = on_bad_sample
        self.seed = seed
        self.train_transforms = TrainTransforms(
            crop_size=crop_size,
            scale_range=scale_range,
            base_size=base_size,
            photometric=photometric,
            ignore_index=self.entry.labels.ignore_index,
        )
        self.skipped: dict[str, str] = {}
        self._notices: set[str] = set()  # kinds that were told
        # Samples before the first labelled pixel; None once there was one, or if training goes on.
        self._unlabelled: int | None = None
        self._consumed = 0
        self._batches_before: int | None = None  # those behind _consumed, while a run is on
        self._resumed: dict[str, Any] | None = None
        self._here: dict[str, Any] = {}  # what a checkpoint must agree with, once training began

    def prepare_data(self) -> None:
        # Row counts of remote data are fetched here, once on a machine, and kept in the cache.
        command = self.trainer.state.fn if self.trainer else None
        needed: dict[str, Split] = {
            "validate": "validation",
            "predict": "validation",
            "test": "test",
        }
        self.open(needed.get(command.value if command else "fit", "train"))

    def open(self, split: Split) -> Source:
        """The rows of a split.

        Raises:
            DataError: see :func:`~segformer_pl.data.sources.open_split`.
        """
        return open_split(self.entry, self.location(), split)

    def location(self) -> str | dict[str, list[str]] | None:
        """``path``, or the folder of a data set that is made, made first if need be."""
        if self.path is None and self.entry.prepare is not None:
            return str(self.entry.prepare())
        return self.path

    def reference_scores(self, split: Literal["val", "test"]) -> dict[str, float]:
        """Scores of this split that give a result its meaning, such as a known ceiling."""
        location = self.location()
        if self.entry.reference_scores is None or not isinstance(location, str):
            return {}
        return self.entry.reference_scores(Path(location), SPLITS[split])

    def train_dataloader(self) -> DataLoader[Batch]:
        source = self.open("train")
        self._take_position(source)
        self._unlabelled = None if self._consumed else 0
        order = EpochShuffle(source.group_rows, source.group_bytes, self.seed)
        samples = Samples(self.entry, source, order, self.train_transforms, self.on_bad_sample)
        return self._loader(samples, self.batch_size, start=lambda: self.consumed)

    def val_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Batch]:
        return self._eval_loader("validation")

    def _eval_loader(self, split: Split) -> DataLoader[Batch]:
        source = self.open(split)
        order = StoredOrder(source.group_rows)
        samples = Samples(self.entry, source, order, to_tensors, self.on_bad_sample)
        return self._loader(samples, self.eval_batch_size)

    def _loader(self, samples: Samples, batch_size: int, **start: Any) -> DataLoader[Batch]:
        rank = self.trainer.global_rank if self.trainer else 0
        return DataLoader(
            samples,
            batch_size=batch_size,
            sampler=RankSampler(samples.order, rank, self._world_size, batch_size, **start),
            num_workers=self.num_workers,
            collate_fn=collate,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    # Where the data stands. The trainer counts the batches that were trained on, so that those
    # that loader processes have fetched ahead need no bookkeeping.

    @property
    def consumed(self) -> int:
        """Training samples consumed so far, over all ranks: the whole state of the data."""
        if self._batches_before is None:
            return self._consumed
        num_batches = self._num_batches() - self._batches_before
        return self._consumed + num_batches * self._samples_per_batch

    @property
    def _samples_per_batch(self) -> int:
        return self.batch_size * self._world_size

    def _num_batches(self) -> int:
        """Batches that this rank has trained on since the training began, resumed or not."""
        return self._progress.total.processed if self.trainer else 0

    @property
    def _progress(self) -> Any:
        assert self.trainer is not None
        return self.trainer.fit_loop.epoch_loop.batch_progress

    def _describe(self, source: Source) -> dict[str, Any]:
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        return {
            "dataset": self.entry.name,
            "num_rows": sum(source.group_rows),
            "fingerprint": source.fingerprint,
            "seed": self.seed,
            "samples_per_step": self._samples_per_batch * accumulate,
        }

    def state_dict(self) -> dict[str, Any]:
        # Without a description nothing was trained. It outlives the training, for a checkpoint that
        # is saved afterwards.
        return self._here | {"consumed": self.consumed} if self._here else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Compared when training starts: a checkpoint may be scored on other data.
        self._resumed = state_dict

    def _take_position(self, source: Source) -> None:
        """Go on where the checkpoint stands, if this is its data.

        Raises:
            DataError: it is not, or the checkpoint does not say.
        """
        self._consumed = self.consumed
        self._batches_before = self._num_batches()
        self._here = self._describe(source)
        there, self._resumed = self._resumed, None
        if there:
            self._check(there)
            self._consumed = there["consumed"]
            self._count_batches_anew()
        elif self._batches_before and not self._consumed:
            raise DataError(
                "the checkpoint does not say how many samples were consumed, so training cannot go "
                "on without repeating some; start a new run from it with --model.weights"
            )

    def _check(self, there: dict[str, Any]) -> None:
        for key, what in {
            "dataset": "data set",
            "num_rows": "number of training pictures",
            "fingerprint": "fingerprint of the shards (names, row groups and their sizes)",
            "seed": "seed of the training order",
        }.items():
            if there[key] != self._here[key]:
                raise DataError(
                    f"the checkpoint was trained on other data: its {what} is {there[key]}, here "
                    f"it is {self._here[key]}; resume with the data and the seed of the "
                    "interrupted run, or start a new one from its weights with --model.weights"
                )
        if there["samples_per_step"] != self._here["samples_per_step"]:
            rank_zero_warn(
                f"the interrupted run trained on {there['samples_per_step']} samples a step, this "
                f"one trains on {self._here['samples_per_step']} (devices x data.batch_size x "
                f"accumulate_grad_batches); it goes on at sample {there['consumed']} exactly, but "
                "its steps are no longer those of the interrupted run"
            )

    def _count_batches_anew(self) -> None:
        """The trainer accumulates by its count of batches, which were of another size."""
        progress = self._progress
        shift = self._consumed // self._samples_per_batch - progress.total.processed
        progress.increment_by(max(shift, -progress.current.ready), progress.is_last_batch)
        self._batches_before = self._num_batches()

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        for name, why in batch.get("skipped", {}).items():
            if name not in self.skipped:
                self.skipped[name] = why
                rank_zero_warn(f"skipped, {len(self.skipped)} so far: {why}")
        for kind, sentence in batch.get("notices", {}).items():
            if kind not in self._notices:
                self._notices.add(kind)
                rank_zero_warn(f"{sentence} (told once; `doctor` counts such samples)")
        if self._unlabelled is not None and self.trainer is not None and self.trainer.training:
            self._expect_labels(batch)
        return batch

    def _expect_labels(self, batch: Batch) -> None:
        """Refuse to train on nothing. The batch is not on its device yet, so nothing waits."""
        if bool((batch["label"] != self.entry.labels.ignore_index).any()):
            self._unlabelled = None  # from now on there is nothing to look for
        elif self._unlabelled is not None:
            self._unlabelled += len(batch["id"])
            if self._unlabelled >= UNLABELLED_SAMPLES:
                self._refuse_to_train_on_nothing()

    def _refuse_to_train_on_nothing(self) -> None:
        raise DataError(
            f"data set {self.entry.name!r}: none of the first {self._unlabelled} training samples "
            "has a labelled pixel, so nothing was learnt from them; check labels.ignored and the "
            "label files"
        )

    def teardown(self, stage: str) -> None:
        if stage == "fit" and self._unlabelled:  # the training was shorter than the limit
            self._refuse_to_train_on_nothing()
        self._consumed, self._batches_before = self.consumed, None
        self._resumed = None
