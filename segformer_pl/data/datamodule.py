"""The LightningDataModule that streams a segmentation data set of the catalogue."""

import operator
import os
import signal
import threading
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
from segformer_pl.data.decoding import PaletteColors
from segformer_pl.data.index import same_data
from segformer_pl.data.label_mapping import check_labels, describe_labels
from segformer_pl.data.order import EpochShuffle, StoredOrder
from segformer_pl.data.sources import Source, Split, open_split
from segformer_pl.data.streaming import OnBadSample, RankSampler, Sample, Samples, collate
from segformer_pl.data.transforms import TrainTransforms, to_tensors
from segformer_pl.errors import UserError
from segformer_pl.lightning_workarounds import replaces_samplers, set_batches_that_stepped

UNLABELLED_SAMPLES = 256  # on each device: without a label training ends, with one class it warns
SPLITS: dict[str, Split] = {"val": "validation", "test": "test"}  # in log keys, in file names


class StreamingSegmentationData(pl.LightningDataModule):
    """Streams a data set of the catalogue as batches of images, labels and ids.

    Batches are as :class:`~segformer_pl.batch.Batch` describes them.

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
            folder with Parquet shards ``train-00000-of-00002.parquet`` and so on; one with pictures
            ``images/<split>/*`` and ``labels/<split>/*.png``; a hub name ``owner/name`` or
            ``owner/name@revision``; a pattern with ``{split}`` of Parquet files, also ``hf://`` or
            ``https://``; or a list of such files for each split.
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
        UserError: What is asked for is not there, or a row is broken; one sentence says which.
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
        self._palettes = PaletteColors()  # of all splits and loader processes
        # Samples before a second class was seen; None once it was, or if training goes on.
        self._num_looked_at: int | None = None
        self._only_class: int | None = None  # seen in them
        self._consumed = 0  # before the training that is going on
        self._counter: pl.Trainer | None = None  # counts the steps of the training that is going on
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
            UserError: See :func:`~segformer_pl.data.sources.open_split`.
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

    def train_dataloader(self) -> DataLoader[Sample]:
        source = self.open("train")
        self._take_position(source)
        self._num_looked_at = None if self.consumed else 0
        self._only_class = None
        order = EpochShuffle(source.group_rows, source.group_bytes, self.seed)
        samples = Samples(self.entry, source, order, self.train_transforms, self.on_bad_sample)
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
        samples = Samples(self.entry, source, order, to_tensors, self.on_bad_sample)
        return self._loader(samples, self.eval_batch_size)

    def _loader(self, samples: Samples, batch_size: int, **start: Any) -> DataLoader[Sample]:
        if self.trainer is not None and replaces_samplers(self.trainer):
            raise UserError(
                "trainer.use_distributed_sampler is true, so the trainer would replace the sampler "
                "that gives each rank its own samples, and read others in another order; give "
                "Trainer(use_distributed_sampler=False)"
            )
        rank = self.trainer.global_rank if self.trainer else 0
        return DataLoader(
            samples,
            batch_size=batch_size,
            sampler=RankSampler(samples.order, rank, self._world_size, batch_size, **start),
            num_workers=self.num_workers,
            collate_fn=collate,
            worker_init_fn=_outlive_signals,
            pin_memory=torch.cuda.is_available(),
            persistent_workers=self.num_workers > 0,
        )

    @property
    def _world_size(self) -> int:
        return self.trainer.world_size if self.trainer else 1

    # Where the data stands. One counter says it: the trainer's optimiser steps.
    #
    #     first_step                                global_step
    #     |---- step ----|---- step ----|---- step ----|-- batches of a step to come --
    #     first_sample   + samples_per_step each       consumed
    #
    # Batches that loader processes have fetched ahead, or whose gradients wait for the rest of
    # their step, are not consumed: no weight knows of them, so a resumed run trains on them again.

    @property
    def consumed(self) -> int:
        """Samples in the optimiser steps so far, over all ranks: the whole state of the data."""
        if self._counter is None:
            return self._consumed
        num_steps = self._counter.global_step - self._here["first_step"]
        return self._here["first_sample"] + num_steps * self._here["samples_per_step"]

    @property
    def _samples_per_step(self) -> int:
        accumulate = self.trainer.accumulate_grad_batches if self.trainer else 1
        return self.batch_size * self._world_size * accumulate

    def _describe(self, source: Source) -> dict[str, Any]:
        return {
            "dataset": self.entry.name,
            "num_rows": sum(source.group_rows),
            "fingerprint": source.fingerprint,
            "seed": self.seed,
            "samples_per_step": self._samples_per_step,
            "labels": describe_labels(self.entry.labels),
        }

    def state_dict(self) -> dict[str, Any]:
        # Without a description nothing was trained. It outlives the training, for a checkpoint that
        # is saved afterwards.
        return self._here | {"consumed": self.consumed} if self._here else {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # The rest is compared when training starts: a checkpoint may be scored on other data.
        self.check_labels(state_dict)
        self._resumed = state_dict

    def check_labels(self, state_dict: Mapping[str, Any]) -> None:
        """See :func:`~segformer_pl.data.label_mapping.check_labels`."""
        check_labels(state_dict, self.entry.name, self.entry.labels)

    def _take_position(self, source: Source) -> None:
        """Go on where the checkpoint stands, if this is its data.

        Raises:
            UserError: It is not, the checkpoint does not say, or its position is not that of whole
                steps.
        """
        self._check_steps()
        step = self.trainer.global_step if self.trainer else 0
        here = self._describe(source) | {"first_step": step, "first_sample": self.consumed}
        there, self._resumed = self._resumed, None
        if there:
            self._check(there, here, step)
            if there["samples_per_step"] == here["samples_per_step"]:
                here |= {key: there.get(key, 0) for key in ("first_step", "first_sample")}
            else:
                here["first_sample"] = there["consumed"]
            self._count_batches_of_steps()
        elif step and not here["first_sample"]:
            raise UserError(
                "the checkpoint does not say how many samples were consumed, so training cannot go "
                "on without repeating some; start a new run from it with --model.weights"
            )
        self._here, self._counter = here, self.trainer

    def _check_steps(self) -> None:
        """All steps must be of as many samples, or their number would not tell the position."""
        trainer = self.trainer
        if trainer is None or getattr(trainer, "fast_dev_run", False):
            return
        if trainer.lightning_module and not trainer.lightning_module.automatic_optimization:
            raise UserError(
                f"{type(trainer.lightning_module).__name__} optimises by itself, so its steps do "
                "not tell how many samples were consumed; use automatic optimisation"
            )
        limit, accumulate = trainer.limit_train_batches, trainer.accumulate_grad_batches
        if isinstance(limit, int) and limit % accumulate:
            raise UserError(
                f"trainer.limit_train_batches is {limit}, which is no multiple of "
                f"trainer.accumulate_grad_batches {accumulate}, so the last step before the limit "
                "would be of fewer samples than the others; make it a multiple, or leave it out"
            )

    @staticmethod
    def _check(there: dict[str, Any], here: dict[str, Any], step: int) -> None:
        for key, what in {
            "dataset": "data set",
            "num_rows": "number of training pictures",
            "fingerprint": "fingerprint of the shards (names, row groups and their sizes)",
            "seed": "seed of the training order",
        }.items():
            same = same_data if key == "fingerprint" else operator.eq
            if key not in there or not same(there[key], here[key]):
                raise UserError(
                    f"the checkpoint was trained on other data: its {what} is {there.get(key)}, "
                    f"here it is {here[key]}; resume with the data and the seed of the "
                    "interrupted run, or start a new one from its weights with --model.weights"
                )
        if "-" not in there["fingerprint"]:
            rank_zero_warn(
                "the checkpoint is of an earlier version, which kept no hashes of the data: names, "
                "row groups and their sizes are those of the interrupted run, the contents may "
                "have changed"
            )
        first_step, first_sample = there.get("first_step", 0), there.get("first_sample", 0)
        consumed, size = there.get("consumed"), there.get("samples_per_step")
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
        if size != here["samples_per_step"]:
            rank_zero_warn(
                f"the interrupted run trained on {size} samples a step, this "
                f"one trains on {here['samples_per_step']} (devices x data.batch_size x "
                f"accumulate_grad_batches); it goes on at sample {consumed} exactly, but "
                "its steps are no longer those of the interrupted run"
            )

    def _count_batches_of_steps(self) -> None:
        """Set the trainer's counts of batches to those of its steps.

        The trainer makes a step whenever its count of batches is a multiple of
        ``accumulate_grad_batches``. The count in a checkpoint may include batches of a step that
        was never made, or be one of batches of another size.
        """
        assert self.trainer is not None
        accumulate, limit = self.trainer.accumulate_grad_batches, self.trainer.limit_train_batches
        loop = self.trainer.fit_loop.epoch_loop
        progress, steps = loop.batch_progress, loop.automatic_optimization.optim_progress
        total = steps.optimizer.step.total.completed * accumulate
        current = steps.optimizer.step.current.completed * accumulate
        if limit == current == progress.current.ready:
            return  # the end of an epoch of limit_train_batches, which the trainer handles itself
        # As if saved at the end of the step's last batch, which the trainer then completes.
        for count, num in ((progress.total, total), (progress.current, current)):
            count.ready = count.started = count.processed = num  # type: ignore[attr-defined]
            count.completed = max(num - 1, 0)
        progress.is_last_batch = False
        set_batches_that_stepped(self.trainer, max(self.trainer.global_step - 1, 0))
        if not current:
            self.trainer.fit_loop.restarting = False

    def on_before_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        in_training = self._here and self.trainer is not None and self.trainer.training
        if in_training and self._samples_per_step != self._here["samples_per_step"]:
            raise UserError(
                f"the samples of a step changed from {self._here['samples_per_step']} to "
                f"{self._samples_per_step} while training, so the number of steps no longer tells "
                "which were consumed; keep accumulate_grad_batches and data.batch_size as they are"
            )
        for name, why in batch.get("skipped", {}).items():
            if name not in self.skipped:
                self.skipped[name] = why
                rank_zero_warn(f"skipped, {len(self.skipped)} so far: {why}")
        for kind, sentence in batch.get("notices", {}).items():
            if kind not in self._notices:
                self._notices.add(kind)
                rank_zero_warn(f"{sentence} (told once; `doctor` counts such samples)")
        self._compare_palettes(batch)
        if self._num_looked_at is not None and self.trainer is not None and self.trainer.training:
            self._expect_labels(batch)
        return batch

    def _compare_palettes(self, batch: Batch) -> None:
        palettes = batch.get("palettes")
        if not palettes or "palette" in self._notices:
            return
        split = "validation"
        if self.trainer is not None and (self.trainer.training or self.trainer.testing):
            split = "train" if self.trainer.training else "test"
        if sentence := self._palettes.merge(palettes, split):
            self._notices.add("palette")
            rank_zero_warn(f"{sentence} (told once)")

    def _expect_labels(self, batch: Batch) -> None:
        """Refuse to train on nothing. The batch is not on its device yet, so nothing waits."""
        assert self._num_looked_at is not None
        labelled = batch["label"][batch["label"] != self.entry.labels.ignore_index]
        if labelled.numel():
            first, last = int(labelled.min()), int(labelled.max())
            if first != last or self._only_class not in (None, first):
                self._num_looked_at = None  # from now on there is nothing to look for
                return
            self._only_class = first
        self._num_looked_at += len(batch["id"])
        if self._num_looked_at >= UNLABELLED_SAMPLES:
            self._judge_labels()

    def _judge_labels(self) -> None:
        """Refuse to train on nothing; warn of training on one class."""
        labels, num_samples = self.entry.labels, self._num_looked_at
        if self._only_class is None:
            raise UserError(
                f"data set {self.entry.name!r}: none of the first {num_samples} training samples "
                "has a labelled pixel, so nothing was learnt from them; check labels.ignored and "
                "the label files"
            )
        self._num_looked_at = None
        remedy = ""
        if labels.coding == "values" and labels.num_classes == 2:
            remedy = " (masks of 0 and 255 need raw_to_train: {0: 0, 255: 1} and no 255 in ignored)"
        rank_zero_warn(
            f"data set {self.entry.name!r}: every labelled pixel of the first {num_samples} "
            f"training samples is {labels.names[self._only_class]!r}, so the network learns to "
            "answer nothing else; check that no other class is in labels.ignored, and "
            f"labels.raw_to_train{remedy}; `doctor` counts the classes"
        )

    def teardown(self, stage: str) -> None:
        self._consumed, self._counter = self.consumed, None
        self._resumed = None
        is_short = stage == "fit" and self._num_looked_at  # shorter than the limit
        if is_short and self.trainer and not self.trainer.interrupted and self._world_size == 1:
            self._judge_labels()  # of several ranks, another may have seen labels


def _outlive_signals(worker: int) -> None:
    """Leave signals to the process that trains; only it may end a loader process.

    Ctrl-C, and signals of job schedulers, reach a whole group of processes. A loader that ended
    would take the step away that the training is about to finish.
    """
    for name in ("SIGINT", "SIGUSR1", "SIGUSR2"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)
    if hasattr(signal, "sigwaitinfo"):  # where it is missing, SIGTERM ends the loader
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_for_parent, args=(os.getppid(),), daemon=True).start()


def _end_for_parent(parent: int) -> None:
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != parent:
        pass
    os._exit(0)
