"""Semantic segmentation as a LightningModule: one shared step, loss, scores, optimiser."""

import inspect
from typing import Any, cast

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from jsonargparse.typing import NonNegativeInt
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR

from segformer_pl.checkpoints import (
    LoadReport,
    MatchClasses,
    describe_non_finite,
    load_weights,
    non_finite,
)
from segformer_pl.checkpoints.facts import check_facts, checked_constants
from segformer_pl.checkpoints.training_state import (
    check_content,
    check_tensors,
    check_training_state,
    tensors_of,
)
from segformer_pl.divergence import DivergenceWatch, divergence
from segformer_pl.errors import UserError
from segformer_pl.inference import Inference, predict_classes, predict_pixels
from segformer_pl.losses import CrossEntropy
from segformer_pl.metrics import SegmentationMetrics, StepOutput
from segformer_pl.models.segmenter import Segmenter
from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD
from segformer_pl.optim import Schedule, parameter_groups, poly_with_warmup


class SegmentationTask(pl.LightningModule):
    """Trains and scores any segmenter of :mod:`segformer_pl.models`.

    Takes batches ``{"image": (B, C, H, W) float RGB in 0 to 1, "label": (B, H, W) int64 train
    ids, "id": list of B str}``. Logs ``train/loss``, and for ``val`` and ``test``
    ``<split>/loss``, ``/miou``, ``/macc``, ``/aacc``, ``/fwiou``, ``/boundary_iou``, ``/ece`` and
    ``/iou/<class>``, over the whole set and all ranks (:mod:`segformer_pl.metrics` defines them).
    Whatever the training loss, ``<split>/loss`` is the mean cross-entropy over labelled pixels,
    so that runs can be compared. Scores are taken at the size of the labels.

    The defaults are the paper's recipe (Sec. 4.1 and the reference configurations): AdamW,
    learning rate 6e-5 and ten times that in the head, weight decay 0.01 but none on the encoder's
    norms, linear warm-up over 1500 steps, then linear decay to 0 at ``trainer.max_steps``;
    cross-entropy averaged over all pixels.

    A checkpoint of a task that was built by the command line describes its network and loads with
    ``SegmentationTask.load_from_checkpoint(file)``; one of a task built in Python needs the
    network again, ``load_from_checkpoint(file, network=...)``.

    Args:
        network: The segmenter, see :mod:`segformer_pl.models.segmenter`.
        class_names: Names by train id; linked from the data set on the command line.
        palette: RGB 0-255 by train id; linked.
        ignore_index: Label that neither trains nor scores; linked.
        weights: Weights of the whole network to start from: a file, a folder written by
            ``save_pretrained`` or a hub name ``owner/name@commit``, of any layout that
            :mod:`segformer_pl.checkpoints` knows. Read once, when the task first runs, and
            never if a checkpoint is loaded. What they state about their classes and about the
            normalisation of images has to agree with the run.
        encoder_weights: Likewise for the encoder alone; give one of the two.
        match_classes: Which class of ``weights`` becomes which of ``class_names``. ``"exact"``:
            they have the same names in the same order, or are of another number, and then the
            classifier is drawn anew. ``"by_name"``: the classifier is reordered, and drawn anew
            for classes that ``weights`` do not have. ``"by_index"``: class i is class i, whatever
            they are called. A classifier that is drawn anew can be trained and not scored.
        loss: The training loss per pixel, of :mod:`segformer_pl.losses` or yours: called as
            ``loss(logits, labels, ignore_index)`` with logits at the network's stride. Default:
            the paper's, ``CrossEntropy()``. Refused for a network that trains with a loss of its
            own.
        inference: How pictures are looked at in validation, test and prediction. Default: whole,
            once, at their own size, ``Inference()``.
        lr: Base learning rate, of the encoder.
        head_lr_mult: Learning rate of everything outside the encoder, over ``lr``.
        weight_decay: AdamW's decoupled weight decay.
        warmup_steps: Steps of linear warm-up.
        poly_power: Power of the polynomial decay.
        schedule: ``"paper"`` or ``"mmseg1"``, see :func:`segformer_pl.optim.poly_factor`.
        layer_decay: Factor on the learning rate of every further layer below the encoder's last,
            see :func:`segformer_pl.optim.parameter_groups`; 1 in the paper.
        image_mean: Mean that the images are normalised with, per channel.
        image_std: Standard deviation likewise.
    """

    image_mean: Tensor
    image_std: Tensor
    network: Segmenter

    def __init__(
        self,
        network: Segmenter,
        class_names: list[str],
        palette: list[list[int]],
        ignore_index: int = 255,
        weights: str | None = None,
        encoder_weights: str | None = None,
        match_classes: MatchClasses = "exact",
        loss: nn.Module | None = None,
        inference: Inference | None = None,
        lr: float = 6e-5,
        head_lr_mult: float = 10.0,
        weight_decay: float = 0.01,
        warmup_steps: NonNegativeInt = 1500,
        poly_power: float = 1.0,
        schedule: Schedule = "paper",
        layer_decay: float = 1.0,
        image_mean: tuple[float, ...] = IMAGENET_MEAN,
        image_std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if weights is not None and encoder_weights is not None:
            raise UserError(
                "weights and encoder_weights are both given, and the first hold an encoder too; "
                "give one of them"
            )
        if match_classes != "exact" and weights is None:
            raise UserError(
                f"model.match_classes is {match_classes}, but there are no model.weights whose "
                "classes could be matched; leave it out"
            )
        # Not jsonargparse's restricted types, whose values a checkpoint could not hold as data.
        for name, value in {
            "lr": lr,
            "head_lr_mult": head_lr_mult,
            "weight_decay": weight_decay,
            "poly_power": poly_power,
        }.items():
            if value < 0:
                raise UserError(f"model.{name} is {value}; give a number of at least 0")
        if loss is not None:
            _check_loss(loss)
            if not network.takes_criterion:
                raise UserError(
                    f"model.loss is given, but {type(network).__name__} trains with a loss of its "
                    "own; leave model.loss out"
                )
        # The command line adds the texts that describe these (see cli.py). Objects must not go
        # in: they would be pickled into checkpoints and spelled out in hparams.yaml.
        self.save_hyperparameters(ignore=["network", "loss", "inference"])
        self.network = network
        self.loss = CrossEntropy() if loss is None else loss
        self.inference = Inference() if inference is None else inference
        self.class_names = class_names
        self.palette = palette
        self.ignore_index = ignore_index
        self.weights = weights
        self.encoder_weights = encoder_weights
        self.match_classes = match_classes
        self._weights_are_set = weights is None and encoder_weights is None
        # Constants that came with weights are in no argument, so checkpoints must store them.
        self._constants_are_from_weights = False
        self.trained_steps = 0  # training steps that the network has had, before a checkpoint too
        # (global step, buffers) when the first of the batches was begun that the next step takes
        self._before_step: tuple[int, dict[str, Tensor]] = (-1, {})
        self._watch = DivergenceWatch()
        self._last_loss: Tensor | None = None
        self._last_lr: float | None = None
        self._last_step = 0
        self.lr = lr
        self.head_lr_mult = head_lr_mult
        self.weight_decay = weight_decay
        self.warmup_steps = warmup_steps
        self.poly_power = poly_power
        self.schedule = schedule
        self.layer_decay = layer_decay
        # Not in the checkpoint's tensors: they are in its hyperparameters.
        self.register_buffer("image_mean", torch.tensor(image_mean).view(-1, 1, 1), False)
        self.register_buffer("image_std", torch.tensor(image_std).view(-1, 1, 1), False)
        self.val_metrics = SegmentationMetrics(len(class_names), ignore_index)
        self.test_metrics = SegmentationMetrics(len(class_names), ignore_index)

    def forward(self, images: Tensor) -> Tensor:
        """(B, C, H, W) in 0 to 1 -> logits (B, num_classes, h, w) at the network's stride."""
        return self.network(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Images in 0 to 1 -> what the network was trained on."""
        return (images - self.image_mean) / self.image_std

    def training_loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the scalar that training minimises.

        Args:
            images: (B, C, H, W) in 0 to 1.
            target: (B, H, W) int64 train ids.
        """
        images = self.normalize(images)
        return self.network.training_loss(images, target, self.loss, self.ignore_index)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        # What the network draws (drop path, dropout) belongs to the batch's first sample, as its
        # augmentation does: the same in a resumed run, and on another number of devices.
        if "seed" in batch:
            torch.manual_seed(batch["seed"][0])
        loss = self.training_loss(batch["image"], batch["label"])
        self.log("train/loss", loss, prog_bar=True)
        self._last_loss = loss.detach()
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._last_lr = max(group["lr"] for group in optimizer.param_groups)

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        step = self.trainer.global_step
        if step == self._last_step or self._last_loss is None or self._last_lr is None:
            return  # gradients are being accumulated
        self._last_step = self.trained_steps = step
        self._watch.observe(self.network, step, self._last_loss, self._last_lr)

    def on_train_end(self) -> None:
        self._watch.settle()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> StepOutput:
        """Predict a batch and add it to the metrics of the split."""
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> StepOutput:
        """As :meth:`validation_step`."""
        return self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """(B, H, W) int64 train ids at the size of the images."""
        images = batch["image"]
        size = (images.shape[2], images.shape[3])
        return predict_classes(self.network, images, size, self.inference, self.normalize)

    def on_validation_epoch_end(self) -> None:
        self._log_metrics("val", self.val_metrics)

    def on_test_epoch_end(self) -> None:
        self._log_metrics("test", self.test_metrics)

    def _evaluate(self, batch: dict[str, Any], metrics: SegmentationMetrics) -> StepOutput:
        images, target = batch["image"], batch["label"]
        pixels = predict_pixels(
            self.network, images, target, self.ignore_index, self.inference, self.normalize
        )
        counts = metrics.update(pixels.labels, target, pixels.confidence, pixels.losses)
        return {"pred": pixels.labels, **counts}

    def _log_metrics(self, split: str, metrics: SegmentationMetrics) -> None:
        # Here and not in the step: every rank gets here, also one that had no batch at all, so
        # the sums over ranks cannot wait for ever.
        values = metrics.compute()
        metrics.reset()
        iou, num_labelled = values.pop("iou"), values.pop("num_labelled")
        if not num_labelled and not self.trainer.sanity_checking:
            raise UserError(
                f"not one pixel of the {split} images carries a label, so there is nothing to "
                "score; check labels.ignored of the data set and the label files"
            )
        if not values["loss"].isfinite() and not self.trainer.sanity_checking:
            sentence = (
                f"the network's outputs for the {split} images hold nan or infinity (mean loss "
                f"{values['loss'].item():g}), so their scores mean nothing"
            )
            if self.trainer.state.fn != TrainerFn.FITTING:
                raise UserError(
                    f"{sentence}; give other weights, or --trainer.precision 32-true if this was "
                    "in 16 bits"
                )
            rank_zero_warn(sentence)  # DivergenceWatch ends a training whose weights are not finite
        self.log_dict(
            {f"{split}/{key}": value.float() for key, value in values.items()},
            prog_bar=True,
            sync_dist=True,
        )
        self.log_dict(
            {f"{split}/iou/{name}": value.float() for name, value in zip(self.class_names, iou)},
            sync_dist=True,
        )
        if self.trainer.state.fn != TrainerFn.FITTING and self.trained_steps:
            # Lightning takes the step of a row from a metric of this name, and from the fit loop
            # otherwise, which stands at 0. As in training, a step is logged by its index.
            self.log("step", float(self.trained_steps - 1), rank_zero_only=True)
        # Scores that the data set knows of itself, such as a ceiling, belong beside the run's.
        data: Any = getattr(self.trainer, "datamodule", None)
        if hasattr(data, "reference_scores"):
            known = data.reference_scores(split)
            self.log_dict({f"{split}/{name}": value for name, value in known.items()})

    def read_weights(self, network: nn.Module) -> LoadReport:
        """Set a network like this task's to the ``weights`` or ``encoder_weights``.

        Raises:
            UserError: They cannot be read, do not fit, or mean other classes or images.
        """
        source = self.encoder_weights if self.weights is None else self.weights
        assert source is not None
        return load_weights(
            network,
            source,
            parts="encoder" if self.weights is None else "all",
            class_names=self.class_names,
            match_classes=self.match_classes,
            normalization=self._normalization(),
        )

    def _check_labels(self, report: LoadReport) -> None:
        """The classifier that was read means the same raw values of label images as the data."""
        data: Any = getattr(self.trainer, "datamodule", None)
        if report.data and hasattr(data, "check_labels"):
            data.check_labels(report.data)

    def _normalization(self) -> tuple[list[float], list[float]]:
        return self.image_mean.flatten().tolist(), self.image_std.flatten().tolist()

    def _start_from_weights(self, is_training: bool) -> None:
        if self._weights_are_set:
            return
        if self.weights is None and not is_training:
            raise UserError(
                "model.encoder_weights leaves the head untrained, and its scores would mean "
                "nothing; give --ckpt_path or --model.weights, or train it with `fit` first"
            )
        report = self.read_weights(self.network)
        self._check_labels(report)
        if report.changed and not is_training:
            raise UserError(
                f"model.weights: {report.changed[0]}, so that this is not the network that was "
                "trained; build that one, or train this one with `fit` first"
            )
        for difference in report.changed:
            rank_zero_warn(f"{report.source}: {difference}; what is here is used")
        if report.reinitialized and not is_training:
            reason = next(iter(report.reinitialized.values()))
            raise UserError(
                f"model.weights: the classifier would be drawn anew ({reason}), and its scores "
                "would mean nothing; train it with `fit` first"
            )
        # Processes must begin alike, and each drew these for itself.
        drawn = dict(self.network.named_parameters())
        for name in report.reinitialized:
            drawn[name].data.copy_(self.trainer.strategy.broadcast(drawn[name].data.cpu()))
        self._weights_are_set = True
        self._constants_are_from_weights = True
        rank_zero_info(str(report))

    def on_fit_start(self) -> None:
        # Not earlier, in setup: there Lightning does not tell yet whether a checkpoint will be
        # loaded, as one is without being asked for when a cluster job is requeued.
        self._start_from_weights(is_training=True)
        self._last_step = self.trainer.global_step

    def on_validation_start(self) -> None:
        self._watch.settle()
        self._start_from_weights(is_training=False)
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            # DDP would do this in the first forward pass, where a rank that has no image to score
            # keeps the others waiting for ever.
            for buffer in self.buffers():
                dist.broadcast(buffer, 0)
            model.require_forward_param_sync = False

    def on_test_start(self) -> None:
        self._start_from_weights(is_training=False)

    def on_predict_start(self) -> None:
        self._start_from_weights(is_training=False)

    def on_train_batch_start(self, batch: dict[str, Any], batch_idx: int) -> None:
        if batch_idx % self.trainer.accumulate_grad_batches == 0:
            several = self.trainer.accumulate_grad_batches > 1
            buffers = {name: b.clone() for name, b in self.named_buffers()} if several else {}
            self._before_step = (self.trainer.global_step, buffers)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        # Whoever writes it, and before anything is written.
        counts = non_finite(dict(tensors_of(checkpoint)))
        # Buffers may differ between ranks, and all of them have to go on or none.
        if not self.trainer.strategy.reduce_boolean_decision(not counts):
            what = describe_non_finite(counts) if counts else "nan or infinity on another rank"
            raise divergence(
                f"there is {what}, in the weights or in the optimiser",
                self.trainer.global_step,
                self._last_loss,
                self._last_lr,
            )
        step, buffers = self._before_step
        if step == checkpoint["global_step"]:
            # Running statistics have seen batches of the next step, which a resumed run sees again.
            # An average of weights keeps the weights themselves apart.
            state = checkpoint.get("current_model_state", checkpoint["state_dict"])
            state.update({name: buffer for name, buffer in buffers.items() if name in state})
        if self._constants_are_from_weights:
            checkpoint["weight_constants"] = self.network.weight_constants()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = "the checkpoint"
        check_content(checkpoint, name)
        stated = checkpoint.get("hyper_parameters", {})
        check_facts(stated, name, self.class_names, self._normalization())
        trainer = self._trainer  # None in load_from_checkpoint, which can be asked not to be strict
        strict = trainer is not None and self.strict_loading
        check_tensors(checkpoint["state_dict"], self.state_dict(), name, strict)
        if trainer is not None and trainer.state.fn == TrainerFn.FITTING:
            check_training_state(checkpoint, self._parameter_groups(), name)
        self._weights_are_set = True
        self.trained_steps = checkpoint.get("global_step", 0)
        if constants := checked_constants(name, checkpoint):
            self.network.set_weight_constants(constants)
            self._constants_are_from_weights = True

    def on_train_start(self) -> None:
        # A resumed run gets the checkpoint's optimiser settings back together with its state. The
        # settings asked for now win; without a change this does nothing.
        optimizer = cast(LightningOptimizer, self.optimizers())
        schedule = cast(LambdaLR, self.lr_schedulers())
        for group, wanted in zip(optimizer.param_groups, self._parameter_groups()):
            group["initial_lr"], group["weight_decay"] = wanted["lr"], wanted["weight_decay"]
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, lr_lambda in zip(optimizer.param_groups, schedule.lr_lambdas):
            group["lr"] = group["initial_lr"] * lr_lambda(schedule.last_epoch)

    def _parameter_groups(self) -> list[dict[str, Any]]:
        return parameter_groups(
            self.network,
            self.lr,
            self.weight_decay,
            self.head_lr_mult,
            self.layer_decay,
        )

    def configure_optimizers(self) -> Any:
        max_steps = self.trainer.max_steps
        if max_steps < 1:
            raise UserError(
                "trainer.max_steps is not set, and the learning-rate schedule is counted in steps; "
                "give --trainer.max_steps N"
            )
        optimizer = torch.optim.AdamW(self._parameter_groups(), lr=self.lr, fused=True)
        schedule = poly_with_warmup(
            optimizer, max_steps, self.warmup_steps, self.poly_power, self.schedule
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }


def _check_loss(loss: nn.Module) -> None:
    """Raises:
    UserError: It cannot be called as the task does, as torch's own losses cannot.
    """
    try:
        inspect.signature(loss.forward).bind(None, None, None)
    except TypeError as error:
        raise UserError(
            f"model.loss: {type(loss).__name__} cannot be called as loss(logits, labels, "
            "ignore_index) with logits at the network's stride; take one of segformer_pl.losses, "
            "or wrap it"
        ) from error
