"""The LightningDataModule that streams a segmentation data set of the catalogue."""

import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from jsonargparse.typing import NonNegativeInt, PositiveInt
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch.utils.data import DataLoader

from segformer_pl.batch import Batch
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.decoding import NumBands
from segformer_pl.data.index import same_data
from segformer_pl.data.label_mapping import check_labels, describe_labels
from segformer_pl.data.loader import SignalSafeLoader, ignore_signals
from segformer_pl.data.order import EpochShuffle, StoredOrder
from segformer_pl.data.palette_colors import PaletteColors
from segformer_pl.data.sources import Source, Split, open_split
from segformer_pl.data.streaming import (
    OnBadSample,
    RankSampler,
    Sample,
    Samples,
    Transforms,
    collate,
)
from segformer_pl.data.transforms import TrainTransforms, to_tensors
from segformer_pl.errors import UserError
from segformer_pl.lightning_workarounds import replaces_samplers, set_batches_that_stepped

# Samples per device after which training stops if no pixel had a label, or warns if all labelled
# pixels had the same class.
UNLABELLED_SAMPLES = 256
SPLITS: dict[str, Split] = {"val": "validation", "test": "test"}  # log key -> split


class StreamingSegmentationData(pl.LightningDataModule):
    """Streams a data set of the catalogue as batches of images, labels and ids.

    :class:`~segformer_pl.batch.Batch` describes the batches.

    Training batches come without end, so set ``max_steps`` in the trainer. The samples of a step
    and their augmentation depend on ``seed`` and on the number of samples consumed before, and not
    on the number of devices or workers. Checkpoints store that number, so a resumed run continues
    with the next sample, also on other devices. If ``batch_size`` times the number of devices times
    ``trainer.accumulate_grad_batches`` stays the same, every step equals that of an uninterrupted
    run.

    Validation and test read every image exactly once over all ranks and workers. Prediction reads
    the validation images.

    Args:
        dataset: Name in the catalogue (:mod:`segformer_pl.data.catalog`), or path of a YAML file
            that describes your own data set in the same form.
        path: Location of the data; default: the hub location in the catalogue. A folder with
            Parquet shards ``train-00000-of-00002.parquet`` and so on; a folder with images
            ``images/<split>/*`` and labels ``labels/<split>/*.png``; a hub name ``owner/name`` or
            ``owner/name@revision``; a pattern of Parquet files with ``{split}``, also ``hf://`` or
            ``https://``; or a list of Parquet files for each split. In a folder, ``val`` and other
            usual names of a split are read if there is one of them. The data set ``shapes`` is
            generated in the user's cache folder.
        batch_size: Training images per device and batch.
        eval_batch_size: Images per device and batch in validation, test and prediction; must be 1
            if image sizes differ.
        num_workers: Data-loader workers per device.
        crop_size: Height and width of the training crop in pixels; default: the whole image.
        scale_range: Smallest and largest factor of random scaling in training; default: no scaling.
        base_size: Long and short side in pixels of the box that images are fitted into at scale 1;
            default: the image's own size.
        num_bands: Number of bands that images are read with: 3, RGB, without alpha or another
            further band; or 4, which every image has to store with 8 bits each, as a TIFF or a PNG
            with an alpha channel. The first three are RGB then too. The network's ``in_channels``
            has to be the same.
        photometric: Whether to apply photometric distortion to the RGB of training images.
        on_bad_sample: Whether a damaged image or label, or an unknown label value, ends the run
            (``raise``) or is reported and skipped (``skip``).
        seed: Seed of the sampling order and of the augmentation.

    Raises:
        UserError: The data set or its location does not exist, or a row is bad; the message is one
            sentence.
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
        num_bands: NumBands = 3,
        photometric: bool = False,
        on_bad_sample: OnBadSample = "raise",
        seed: int = 0,
    ) -> None:
        super().__init__()
        # A checkpoint that holds a Path cannot be loaded with weights_only.
        path = str(path) if isinstance(path, Path) else path
        # Checkpoints store these arguments, so that one can be evaluated on the same data.
        self.save_hyperparameters(logger=False)
        self.entry = find_dataset(dataset)
        self.path = path
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.num_workers = num_workers
        self.num_bands = num_bands
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
        self._notices: set[str] = set()  # kinds of notice that were shown
        self._palettes = PaletteColors()  # of all splits and workers
        # Training samples checked for labels; None once two classes occurred, and in resumed runs.
        self._num_checked: int | None = None
        self._only_class: int | None = None  # the one class in these samples
        self._consumed = 0  # samples before the current training
        self._counter: pl.Trainer | None = None  # trainer of the current training; counts steps
        self._saved: dict[str, Any] | None = None  # state of the checkpoint to resume from
        self._description: dict[str, Any] = {}  # data and position of this training, once started

    def prepare_data(self) -> None:
        # Fetch row counts of remote data into the cache, once per machine.
        command = self.trainer.state.fn if self.trainer else None
        needed: dict[str, Split] = {
            "validate": "validation",
            "predict": "validation",
            "test": "test",
        }
        self.open(needed.get(command.value if command else "fit", "train"))

    def open(self, split: Split) -> Source:
        """Open the source of a split.

        Raises:
            UserError: The data cannot be read; see :func:`~segformer_pl.data.sources.open_split`.
        """
        return open_split(self.entry, self.location(), split)

    def samples(
        self,
        split: Split,
        source: Source,
        order: EpochShuffle | StoredOrder,
        transforms: Transforms,
        on_bad_sample: OnBadSample | None = None,
    ) -> Samples:
        """Return the samples of a split.

        Args:
            split: Split, for messages.
            source: Source of the split.
            order: Order of its rows.
            transforms: Transforms of its images and labels.
            on_bad_sample: Default: that of these data.
        """
        how = self.on_bad_sample if on_bad_sample is None else on_bad_sample
        return Samples(self.entry, source, order, transforms, how, self.num_bands, split)

    def location(self) -> str | dict[str, list[str]] | None:
        """Return ``path``, or the folder of a generated data set, which is generated if missing."""
        if self.path is None and self.entry.prepare is not None:
            return str(self.entry.prepare())
        return self.path

    def reference_scores(self, split: Literal["val", "test"]) -> dict[str, float]:
        """Return known scores of a split to compare with, such as an upper bound."""
        location = self.location()
        if self.entry.reference_scores is None or not isinstance(location, str):
            return {}
        return self.entry.reference_scores(Path(location), SPLITS[split])

    def train_dataloader(self) -> DataLoader[Sample]:
        source = self.open("train")
        self._set_position(source)
        self._num_checked = None if self.consumed else 0
        self._only_class = None
        order = EpochShuffle(source.group_rows, source.group_bytes, self.seed)
        samples = self.samples("train", source, order, self.train_transforms)
        return self._loader(samples, self.batch_size, start=lambda: self.consumed)

    def val_dataloader(self) -> DataLoader[Sample]:
        return self._eval_loader("validation")

    def test_dataloader(self) -> DataLoader[Sample]:
        return self._eval_loader("test")

    def predict_dataloader(self) -> DataLoader[Sample]:
        return self._eval_loader("validation")

    def _eval_loader(self, split: Split) -> DataLoader[Sample]:
        source = self.open(split)
        order = StoredOrder(source.group_rows)
        samples = self.samples(split, source, order, to_tensors)
        return self._loader(samples, self.eval_batch_size)

    def _loader(self, samples: Samples, batch_size: int, **start: Any) -> DataLoader[Sample]:
        if self.trainer is not None and replaces_samplers(self.trainer):
            raise UserError(
                "trainer.use_distributed_sampler is true, so Lightning would replace the sampler "
                "that gives each rank its samples; use Trainer(use_distributed_sampler=False)"
            )
        rank = self.trainer.global_rank if self.trainer else 0
        return SignalSafeLoader(
            samples,
            batch_size=batch_size,
            sampler=RankSampler(samples.order, rank, self._world_size, batch_size, **start),
            num_workers=self.num_workers,
            collate_fn=collate,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    # The position of the data is the number of samples consumed. It follows from the trainer's
    # count of optimiser steps. For samples_per_step = 4, first_step = 2 and first_sample = 8:
    #
    #     global_step   2             3              4
    #     steps         |-- step 3 ---|--- step 4 ---|-- batches of step 5 ...
    #     consumed      8             12             16
    #
    #     consumed = first_sample + (global_step - first_step) * samples_per_step
    #
    # Batches that workers have prefetched, or whose gradients wait for the rest of their step, do
    # not count: they have not changed the weights, so a resumed run must train on them.

    @property
    def consumed(self) -> int:
        """Number of samples in all optimiser steps so far, over all ranks."""
        if self._counter is None:
            return self._consumed
        num_steps = self._counter.global_step - self._description["first_step"]
        return self._description["first_sample"] + num_steps * self._description["samples_per_step"]

    @property
    def samples_per_step(self) -> int:
        """Training images of an optimiser step over all ranks, the global batch."""
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        return self.batch_size * self._world_size * accumulate

    def _describe(self, source: Source) -> dict[str, Any]:
        return {
            "dataset": self.entry.name,
            "num_rows": sum(source.group_rows),
            "fingerprint": source.fingerprint,
            "seed": self.seed,
            "samples_per_step": self.samples_per_step,
            "labels": describe_labels(self.entry.labels),
        }

    def state_dict(self) -> dict[str, Any]:
        # Empty before the first training. The description is kept after a training, so that a
        # checkpoint saved afterwards has it as well.
        return self._description | {"consumed": self.consumed} if self._description else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # Compare only the labels now. A checkpoint may be evaluated on other data, so the rest is
        # compared when training starts.
        self.check_labels(state_dict)
        self._saved = state_dict

    def check_labels(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint was trained with the label specification of this data set.

        Raises:
            UserError: It was not; see :func:`~segformer_pl.data.label_mapping.check_labels`.
        """
        check_labels(state_dict, self.entry.name, self.entry.labels)

    def _set_position(self, source: Source) -> None:
        """Start at the position of the checkpoint, if there is one.

        Raises:
            UserError: The checkpoint was trained on other data, has no position, or its position
                lies within a step.
        """
        self._check_steps()
        step = self.trainer.global_step if self.trainer else 0
        current = self._describe(source) | {"first_step": step, "first_sample": self.consumed}
        saved, self._saved = self._saved, None
        if saved:
            module = self.trainer.lightning_module if self.trainer else None
            self._check_resumption(saved, current, step, module)
            if saved["samples_per_step"] == current["samples_per_step"]:
                current |= {key: saved.get(key, 0) for key in ("first_step", "first_sample")}
            else:
                current["first_sample"] = saved["consumed"]
            self._count_batches_of_steps()
        elif step and not current["first_sample"]:
            raise UserError(
                "the checkpoint does not say how many samples were consumed, so training cannot "
                "resume without repeating some; start a new run from it with --model.weights"
            )
        self._description, self._counter = current, self.trainer

    def _check_steps(self) -> None:
        """Check that every step has the same number of samples, so that steps give the position.

        Raises:
            UserError: The module optimises manually, or a limit would cut a step short.
        """
        trainer = self.trainer
        if trainer is None or getattr(trainer, "fast_dev_run", False):
            return
        if trainer.lightning_module and not trainer.lightning_module.automatic_optimization:
            raise UserError(
                f"{type(trainer.lightning_module).__name__} uses manual optimisation, so its steps "
                "do not tell how many samples were consumed; use automatic optimisation"
            )
        limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
        if isinstance(limit, int) and limit % accumulate:
            raise UserError(
                f"trainer.limit_train_batches is {limit}, which is no multiple of "
                f"trainer.accumulate_grad_batches {accumulate}, so the last step before the limit "
                "would have fewer samples than the others; make it a multiple, or leave it out"
            )

    @staticmethod
    def _check_resumption(
        saved: dict[str, Any], current: dict[str, Any], step: int, module: Any
    ) -> None:
        """Check that a saved description is of the current data and of whole steps.

        Args:
            saved: State in the checkpoint.
            current: Description of this training.
            step: Optimiser steps of the checkpoint.
            module: LightningModule of this training.

        Raises:
            UserError: The data, the seed or the position do not agree.
        """
        for key, what in {
            "dataset": "data set",
            "num_rows": "number of training images",
            "fingerprint": "fingerprint of the shards (names, row groups and their sizes)",
            "seed": "seed of the training order",
        }.items():
            same = same_data if key == "fingerprint" else operator.eq
            if key not in saved or not same(saved[key], current[key]):
                raise UserError(
                    f"the checkpoint was trained on other data: its {what} is {saved.get(key)}, "
                    f"here it is {current[key]}; resume with the data and the seed of the "
                    "interrupted run, or start a new one from its weights with --model.weights"
                )
        if "-" not in saved["fingerprint"]:
            rank_zero_warn(
                "the checkpoint is of an earlier version, which stored no hashes of the contents: "
                "names, row groups and their sizes are those of the interrupted run, but the "
                "contents may have changed"
            )
        first_step, first_sample = saved.get("first_step", 0), saved.get("first_sample", 0)
        consumed, size = saved.get("consumed"), saved.get("samples_per_step")
        numbers = (first_step, first_sample, consumed, size)
        if not (
            all(type(number) is int and number >= 0 for number in numbers)
            and first_step <= step
            and consumed == first_sample + (step - first_step) * size
        ):
            since = f" since sample {first_sample} at step {first_step}" if first_step else ""
            raise UserError(
                f"the checkpoint says that {consumed} samples were consumed at step {step}, which "
                f"is not what whole steps of {size} samples{since} consume; training from it would "
                "lose or repeat samples: resume from another checkpoint, or start a new run from "
                "its weights with --model.weights"
            )
        if size != current["samples_per_step"]:
            rate = "model.lr stays as it is, unless model.reference_batch_size is given"
            if getattr(module, "reference_batch_size", None) is not None:
                rate = "the learning rate is scaled in proportion (model.reference_batch_size)"
            rank_zero_warn(
                f"the interrupted run trained on {size} samples per step, this one trains on "
                f"{current['samples_per_step']} (devices x data.batch_size x "
                f"accumulate_grad_batches); it resumes at sample {consumed}, but its steps are no "
                f"longer those of the interrupted run, and {rate}"
            )

    def _count_batches_of_steps(self) -> None:
        """Set the trainer's counts of batches to whole steps.

        Lightning makes a step whenever its count of batches is a multiple of
        ``accumulate_grad_batches``. The count in a checkpoint may include batches of a step that
        was not completed, or may count batches of another size.
        """
        assert self.trainer is not None
        accumulate, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        loop = self.trainer.fit_loop.epoch_loop
        progress, steps = loop.batch_progress, loop.automatic_optimization.optim_progress
        total = steps.optimizer.step.total.completed * accumulate
        current = steps.optimizer.step.current.completed * accumulate
        if limit == current == progress.current.ready:
            return  # the end of an epoch of limit_train_batches, which Lightning handles itself
        # The state at the end of a step's last batch, which Lightning completes on resuming.
        for count, num in ((progress.total, total), (progress.current, current)):
            count.ready = count.started = count.processed = num  # type: ignore[attr-defined]
            count.completed = max(num - 1, 0)
        progress.is_last_batch = False
        set_batches_that_stepped(self.trainer, max(self.trainer.global_step - 1, 0))
        if not current:
            self.trainer.fit_loop.restarting = False

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        in_training = self._description and self.trainer is not None and self.trainer.training
        if in_training and self.samples_per_step != self._description["samples_per_step"]:
            raise UserError(
                f"the samples of a step changed from {self._description['samples_per_step']} to "
                f"{self.samples_per_step} while training, so the number of steps no longer tells "
                "how many were consumed; keep accumulate_grad_batches and data.batch_size fixed"
            )
        for name, why in batch.get("skipped", {}).items():
            if name not in self.skipped:
                self.skipped[name] = why
                rank_zero_warn(f"skipped, {len(self.skipped)} so far: {why}")
        for kind, notice in batch.get("notices", {}).items():
            if kind not in self._notices:
                self._notices.add(kind)
                rank_zero_warn(f"{notice} (shown once; `doctor` counts such samples)")
        self._compare_palettes(batch)
        if self._num_checked is not None and self.trainer is not None and self.trainer.training:
            self._check_for_labels(batch)
        return batch

    def _compare_palettes(self, batch: Batch) -> None:
        """Warn once if an index has different colours in label files of any split or worker."""
        palettes = batch.get("palettes")
        if not palettes or "palette" in self._notices:
            return
        split = "validation"
        if self.trainer is not None and (self.trainer.training or self.trainer.testing):
            split = "train" if self.trainer.training else "test"
        if notice := self._palettes.merge(palettes, split):
            self._notices.add("palette")
            rank_zero_warn(f"{notice} (shown once)")

    def _check_for_labels(self, batch: Batch) -> None:
        """Count samples until a second class occurs, and judge the labels after enough of them.

        The batch is still on the CPU here, so reading it does not synchronise with the device.
        """
        assert self._num_checked is not None
        labelled = batch["label"][batch["label"] != self.entry.labels.ignore_index]
        if labelled.numel():
            first, last = int(labelled.min()), int(labelled.max())
            if first != last or self._only_class not in (None, first):
                self._num_checked = None  # two classes: no further checks
                return
            self._only_class = first
        self._num_checked += len(batch["id"])
        if self._num_checked >= UNLABELLED_SAMPLES:
            self._judge_labels()

    def _judge_labels(self) -> None:
        """Raise if no pixel was labelled; warn if all labelled pixels have one class."""
        labels, num_samples = self.entry.labels, self._num_checked
        if self._only_class is None:
            raise UserError(
                f"data set {self.entry.name!r}: none of the first {num_samples} training samples "
                "has a labelled pixel, so there is nothing to learn; check labels.ignored and the "
                "label files"
            )
        self._num_checked = None
        remedy = ""
        if labels.coding == "values" and labels.num_classes == 2:
            remedy = " (masks of 0 and 255 need raw_to_train: {0: 0, 255: 1} and no 255 in ignored)"
        rank_zero_warn(
            f"data set {self.entry.name!r}: every labelled pixel of the first {num_samples} "
            f"training samples is {labels.names[self._only_class]!r}, so the network learns to "
            "predict nothing else; check that no other class is in labels.ignored, and "
            f"labels.raw_to_train{remedy}; `doctor` counts the classes"
        )

    def teardown(self, stage: str) -> None:
        self._consumed, self._counter = self.consumed, None
        self._saved = None
        is_short = stage == "fit" and self._num_checked  # ended before UNLABELLED_SAMPLES
        if is_short and self.trainer and not self.trainer.interrupted and self._world_size == 1:
            self._judge_labels()  # not with several ranks, where another may have had labels
