"""Semantic segmentation as a LightningModule: steps, loss, metrics and optimiser."""

import math
from typing import Any, Self, cast

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
    read_weights,
)
from segformer_pl.checkpoints.facts import check_facts, checked_constants
from segformer_pl.checkpoints.matching import leave_out_auxiliary
from segformer_pl.checkpoints.training_state import (
    check_content,
    check_tensors,
    check_training_state,
    tensors_of,
)
from segformer_pl.divergence import DivergenceWatch, divergence_error
from segformer_pl.errors import UserError
from segformer_pl.freezing import (
    Freeze,
    check_complete,
    check_freeze,
    freeze_encoder,
    start_frozen,
    trained_groups,
)
from segformer_pl.inference import Inference, predict_classes, predict_pixels
from segformer_pl.losses import CrossEntropy, check_loss
from segformer_pl.metrics import SegmentationMetrics, StepOutput
from segformer_pl.metrics_log import log_metrics
from segformer_pl.models.segmenter import Segmenter, check_segmenter
from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD
from segformer_pl.optim import (
    MOMENTUM,
    OptimizerName,
    Schedule,
    build_optimizer,
    check_settings,
    lr_factor,
    parameter_groups,
    poly_with_warmup,
)


class SegmentationTask(pl.LightningModule):
    """LightningModule that trains and evaluates any segmenter of :mod:`segformer_pl.models`.

    A batch holds ``image`` (B, C, H, W), float in 0 to 1, usually RGB; ``label`` (B, H, W), int64
    train ids; and ``id``, a list of B strings. :class:`segformer_pl.batch.Batch` has the other
    keys.

    The task logs ``train/loss`` in every training step. For each evaluated split, ``val`` or
    ``test``, it logs ``<split>/loss``, ``/miou``, ``/macc``, ``/aacc``, ``/fwiou``,
    ``/boundary_iou``, ``/ece`` and ``/iou/<class>``, accumulated over the whole split and all
    ranks; :mod:`segformer_pl.metrics` defines them. Predictions are upsampled to the size of the
    label maps. ``<split>/loss`` is the mean cross-entropy over labelled pixels whatever the
    training loss, so that runs with different losses can be compared.

    The defaults are SegFormer's training recipe (Sec. 4.1 and the reference configurations):
    cross-entropy averaged over all pixels; AdamW with learning rate 6e-5, ten times that in the
    head, and weight decay 0.01 except on the encoder's norms; linear warm-up over 1500 steps, then
    linear decay to 0 at ``trainer.max_steps``.

    A checkpoint written from the command line describes its network and is loaded with
    ``SegmentationTask.load_from_checkpoint(file)``. If the task was built in Python, pass the
    network again: ``load_from_checkpoint(file, network=...)``.

    Args:
        network: Segmenter to train, see :mod:`segformer_pl.models.segmenter`. The command line also
            takes short names such as ``segformer_b0``.
        class_names: Class names in the order of the train ids. The command line takes them from
            the data set.
        palette: Colour of each class, RGB 0 to 255, in the order of the train ids. The command
            line takes it from the data set.
        ignore_index: Label of the pixels that the loss and the metrics leave out. The command line
            takes it from the data set.
        weights: Pretrained weights of the whole network: a file, a folder written by
            ``save_pretrained`` or a hub name ``owner/name@commit``, in any layout that
            :mod:`segformer_pl.checkpoints` supports. They are read once, when the task first runs,
            and not at all if a checkpoint is loaded. Classes and image normalisation stated in the
            weights must agree with those of the run.
        encoder_weights: Pretrained weights of the encoder alone, in the same forms. ``weights``
            and ``encoder_weights`` exclude each other.
        weights_state: Name of the copy to read where the file of ``weights`` or
            ``encoder_weights`` holds several, such as an average (EMA) beside the weights. Such a
            file is refused without it, with the names of its copies.
        match_classes: How the classes of ``weights`` are assigned to ``class_names``. ``"exact"``:
            names and order must be equal; if the number of classes differs, the classifier is
            re-initialised. ``"by_name"``: the classifier is reordered by class name, and classes
            that ``weights`` lack are re-initialised. ``"by_index"``: class i keeps its weights,
            whatever its name. A network with re-initialised classes can be trained but not
            evaluated.
        freeze: Part of the network that keeps its weights: ``"encoder"``, for a fine-tuning of the
            head alone. The encoder is then in evaluation mode also in training. Default: everything
            is trained.
        loss: Training loss, a module of :mod:`segformer_pl.losses` or your own, called as
            ``loss(logits, target, ignore_index)`` with logits at the network's stride. Default:
            ``CrossEntropy()``, the paper's loss. Must be left out for networks that define their
            own training loss.
        inference: Protocol of validation, test and prediction: resizing, sliding windows, scales
            and flips. Default: ``Inference()``, one pass over the whole image at its original size.
        lr: Base learning rate, used in the encoder.
        head_lr_mult: Factor on ``lr`` for all parameters outside the encoder.
        weight_decay: Weight decay, decoupled in AdamW, part of the gradient in SGD.
        optimizer: ``"adamw"``, or ``"sgd"`` with momentum.
        momentum: Momentum of SGD. AdamW has no such setting.
        warmup_steps: Number of linear warm-up steps.
        poly_power: Exponent of the polynomial learning-rate decay.
        min_lr: Learning rate at the end of the decay, the same in the encoder and the head, see
            :func:`segformer_pl.optim.poly_with_warmup`.
        schedule: Learning-rate schedule, ``"paper"`` or ``"mmseg1"``, see
            :func:`segformer_pl.optim.poly_factor`.
        layer_decay: Factor on the learning rate per encoder layer, counted down from the last, see
            :func:`segformer_pl.optim.parameter_groups`. The paper uses none, which is 1.
        reference_batch_size: Images per optimiser step, over all ranks, for which ``lr`` and
            ``min_lr`` are stated. A run with k times as many uses k times these rates (linear
            scaling, Goyal et al. 2017), as does a resumed run on other devices; warm-up and number
            of steps stay as they are. Default: ``lr`` and ``min_lr`` hold for any number.
        image_mean: Channel means for normalising images in 0 to 1.
        image_std: Channel standard deviations for normalising images in 0 to 1.

    Raises:
        UserError: Both kinds of weights are given, ``match_classes`` or ``weights_state`` is given
            without weights, a setting of the optimiser is out of range or would be ignored, or
            network, class names, normalisation and loss do not fit each other.
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
        weights_state: str | None = None,
        match_classes: MatchClasses = "exact",
        freeze: Freeze | None = None,
        loss: nn.Module | None = None,
        inference: Inference | None = None,
        lr: float = 6e-5,
        head_lr_mult: float = 10.0,
        weight_decay: float = 0.01,
        optimizer: OptimizerName = "adamw",
        momentum: float = MOMENTUM,
        warmup_steps: NonNegativeInt = 1500,
        poly_power: float = 1.0,
        min_lr: float = 0.0,
        schedule: Schedule = "paper",
        layer_decay: float = 1.0,
        reference_batch_size: int | None = None,
        image_mean: tuple[float, ...] = IMAGENET_MEAN,
        image_std: tuple[float, ...] = IMAGENET_STD,
    ) -> None:
        super().__init__()
        if weights is not None and encoder_weights is not None:
            raise UserError(
                "model.weights and model.encoder_weights are both given; give one of them "
                "(weights include an encoder)"
            )
        check_segmenter(network)
        if network.num_classes != len(class_names):
            raise UserError(
                f"the network has {network.num_classes} classes, but there are {len(class_names)} "
                "class names; give one for each"
            )
        if {len(image_mean), len(image_std)} != {network.in_channels}:
            raise UserError(
                f"the network takes {network.in_channels} channels, but model.image_mean has "
                f"{len(image_mean)} values and model.image_std {len(image_std)}; give one of each "
                "for every channel (`doctor` prints those of the training images), or for RGB "
                "images leave the network's in_channels out"
            )
        if match_classes != "exact" and weights is None:
            raise UserError(
                f"model.match_classes is {match_classes}, but there are no model.weights whose "
                "classes could be matched; leave it out or give model.weights"
            )
        if weights_state is not None and weights is None and encoder_weights is None:
            raise UserError(
                f"model.weights_state is {weights_state!r}, but neither model.weights nor "
                "model.encoder_weights is given; leave it out or give the file that holds it"
            )
        # Checked here because values of jsonargparse's restricted types cannot be stored in a
        # checkpoint as plain data.
        check_settings(
            optimizer,
            momentum,
            reference_batch_size,
            lr=lr,
            head_lr_mult=head_lr_mult,
            weight_decay=weight_decay,
            poly_power=poly_power,
            min_lr=min_lr,
            warmup_steps=warmup_steps,
        )
        if not all(0 < value < math.inf for value in image_std):  # NaN compares as false
            raise UserError(
                f"model.image_std is {list(image_std)}; give finite numbers above 0, because "
                "images are divided by them"
            )
        if loss is not None:
            check_loss(loss)
            if not network.takes_criterion:
                raise UserError(
                    f"model.loss is given, but {type(network).__name__} trains with a loss of its "
                    "own; leave model.loss out"
                )
        check_freeze(freeze, layer_decay)
        # Modules are left out because they would be pickled into checkpoints and written to
        # hparams.yaml. The command line adds their configuration as plain data (cli/training.py).
        self.save_hyperparameters(ignore=["network", "loss", "inference"])
        self.network = network
        self.loss = CrossEntropy() if loss is None else loss
        self.inference = Inference() if inference is None else inference
        self.class_names = class_names
        self.palette = palette
        self.ignore_index = ignore_index
        self.weights = weights
        self.encoder_weights = encoder_weights
        self.weights_state = weights_state
        self.match_classes = match_classes
        # LightningModule has a method `freeze`. These modules stay in evaluation mode.
        self._frozen = [] if freeze is None else freeze_encoder(network)
        self._weights_are_set = weights is None and encoder_weights is None
        # Constants read from weights are in no constructor argument, so checkpoints store them.
        self._constants_are_from_weights = False
        # Optimiser steps of the network in all, including those before a loaded checkpoint
        self.trained_steps = 0
        # Global step and buffers at the start of the current accumulation of gradients
        self._before_step: tuple[int, dict[str, Tensor]] = (-1, {})
        self._divergence_watch = DivergenceWatch()
        self._last_loss: Tensor | None = None
        self._last_lr: float | None = None
        self._last_step = 0
        self.lr = lr
        self.head_lr_mult = head_lr_mult
        self.weight_decay = weight_decay
        self.optimizer: OptimizerName = optimizer
        self.momentum = momentum
        self.warmup_steps = warmup_steps
        self.poly_power = poly_power
        self.min_lr = min_lr
        self.schedule = schedule
        self.layer_decay = layer_decay
        self.reference_batch_size = reference_batch_size
        # Not persistent, because the checkpoint has them in its hyperparameters.
        self.register_buffer("image_mean", torch.tensor(image_mean).view(-1, 1, 1), False)
        self.register_buffer("image_std", torch.tensor(image_std).view(-1, 1, 1), False)
        self.val_metrics = SegmentationMetrics(len(class_names), ignore_index)
        self.test_metrics = SegmentationMetrics(len(class_names), ignore_index)

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        for module in self._frozen:
            module.eval()
        return self

    def forward(self, images: Tensor) -> Tensor:
        """Return the network's logits.

        Args:
            images: (B, C, H, W) float in 0 to 1.

        Returns:
            (B, num_classes, h, w) logits at the network's stride.
        """
        return self.network(self.normalize(images))

    def normalize(self, images: Tensor) -> Tensor:
        """Normalise images (B, C, H, W) in 0 to 1 with the task's mean and standard deviation."""
        if images.shape[1] != self.network.in_channels:
            raise UserError(
                f"the images have {images.shape[1]} channels, but the network takes "
                f"{self.network.in_channels}; set its in_channels to {images.shape[1]}"
            )
        return (images - self.image_mean) / self.image_std

    def training_loss(self, images: Tensor, target: Tensor) -> Tensor:
        """Return the training loss of a batch, a scalar.

        Args:
            images: (B, C, H, W) float in 0 to 1.
            target: (B, H, W) int64 train ids.
        """
        images = self.normalize(images)
        return self.network.training_loss(images, target, self.loss, self.ignore_index)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        # Seed drop path and dropout by the batch's first sample, as augmentation is seeded by
        # sample, so that a resumed run and another number of devices draw the same numbers.
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
            return  # gradients are still being accumulated
        self._last_step = self.trained_steps = step
        self._divergence_watch.observe(self.network, step, self._last_loss, self._last_lr)

    def on_train_end(self) -> None:
        self._divergence_watch.check_pending()

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> StepOutput:
        """Predict a batch and add it to the validation metrics.

        Returns:
            The prediction and the batch's counts, for callbacks.
        """
        return self._evaluate(batch, self.val_metrics)

    def test_step(self, batch: dict[str, Any], batch_idx: int) -> StepOutput:
        """Predict a batch and add it to the test metrics; returns as :meth:`validation_step`."""
        return self._evaluate(batch, self.test_metrics)

    def predict_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Predict a batch: (B, H, W) int64 train ids at the size of the images."""
        images = batch["image"]
        size = (images.shape[2], images.shape[3])
        return predict_classes(self.network, images, size, self.inference, self.normalize)

    def on_validation_epoch_end(self) -> None:
        log_metrics(self, "val", self.val_metrics, self.class_names, self.trained_steps)

    def on_test_epoch_end(self) -> None:
        log_metrics(self, "test", self.test_metrics, self.class_names, self.trained_steps)

    def _evaluate(self, batch: dict[str, Any], metrics: SegmentationMetrics) -> StepOutput:
        images, target = batch["image"], batch["label"]
        pixels = predict_pixels(
            self.network, images, target, self.ignore_index, self.inference, self.normalize
        )
        counts = metrics.update(pixels.labels, target, pixels.confidence, pixels.losses)
        return {"pred": pixels.labels, **counts}

    def read_weights(self, network: nn.Module) -> LoadReport:
        """Load ``weights`` or ``encoder_weights`` into a network built like the task's.

        Args:
            network: Network to load into, in place.

        Raises:
            UserError: The weights cannot be read, do not fit the network, or state other classes
                or another image normalisation.
        """
        source = self.encoder_weights if self.weights is None else self.weights
        assert source is not None
        return load_weights(
            network,
            read_weights(source, self.weights_state),
            parts="encoder" if self.weights is None else "all",
            class_names=self.class_names,
            match_classes=self.match_classes,
            normalization=self._normalization(),
        )

    def _check_labels(self, report: LoadReport) -> None:
        """Check that the classifier was trained on the same raw label values as the data."""
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
                "model.encoder_weights leaves the head untrained, so its predictions would be "
                "meaningless; give --ckpt_path or --model.weights, or train it with `fit` first"
            )
        report = self.read_weights(self.network)
        self._check_labels(report)
        if not is_training:
            report.check_trained("model.weights")
        if self._frozen:
            check_complete(report.source, list(report.initialized))
        for difference in report.changed:
            rank_zero_warn(f"{report.source}: {difference}; using the arguments of this run")
        # Each rank initialised these parameters independently; broadcast rank 0's values.
        parameters = dict(self.network.named_parameters())
        for name in report.reinitialized:
            values = parameters[name].data
            values.copy_(self.trainer.strategy.broadcast(values.cpu()))
        self._weights_are_set = True
        self._constants_are_from_weights = True
        rank_zero_info(str(report))

    def on_fit_start(self) -> None:
        # Not in setup: Lightning has not resolved there whether a checkpoint will be loaded.
        self._start_from_weights(is_training=True)
        self._last_step = self.trainer.global_step
        if self._frozen:
            has_weights = self.weights is not None or self.encoder_weights is not None
            start_frozen(has_weights or self._last_step > 0)
        if self.reference_batch_size is not None:
            factor = self._lr_factor()
            rank_zero_info(
                f"learning rate: model.lr {self.lr:g} for {self.reference_batch_size} images per "
                f"step times {factor:g} is {self.lr * factor:g}, as this run has that many times "
                "as many images per step (model.reference_batch_size)"
            )

    def on_validation_start(self) -> None:
        self._divergence_watch.check_pending()
        self._start_from_weights(is_training=False)
        model = self.trainer.strategy.model
        if isinstance(model, DistributedDataParallel):
            # DDP would broadcast in the first forward pass, where all other ranks would wait for
            # one without a validation image. Broadcast here instead.
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
        # This hook runs before any callback writes a file.
        counts = non_finite(dict(tensors_of(checkpoint)))
        # Buffers may differ between ranks, but all ranks have to stop or none.
        if not self.trainer.strategy.reduce_boolean_decision(not counts):
            what = describe_non_finite(counts) if counts else "nan or infinity on another rank"
            raise divergence_error(
                f"there is {what}, in the weights or in the optimiser",
                self.trainer.global_step,
                self._last_loss,
                self._last_lr,
            )
        step, buffers = self._before_step
        if step == checkpoint["global_step"]:
            # Saved in the middle of an accumulation: running statistics already include batches
            # of the next step, which a resumed run repeats. Store those from before the step.
            # Under weight averaging, the trained weights are in "current_model_state".
            state = checkpoint.get("current_model_state", checkpoint["state_dict"])
            state.update({name: buffer for name, buffer in buffers.items() if name in state})
        if self._constants_are_from_weights:
            checkpoint["weight_constants"] = self.network.weight_constants()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        name = "the checkpoint"
        check_content(checkpoint, name)
        stated = checkpoint.get("hyper_parameters", {})
        check_facts(stated, name, self.class_names, self._normalization())
        trainer = self._trainer  # None in load_from_checkpoint, whose `strict` may be False
        is_training = trainer is not None and trainer.state.fn == TrainerFn.FITTING
        state = checkpoint["state_dict"]
        # In a training, the optimiser's state has to fit too.
        if not is_training and (report := leave_out_auxiliary(state, self.network, "network.")):
            rank_zero_info(f"the checkpoint: {report}")
        strict = trainer is not None and self.strict_loading
        check_tensors(checkpoint["state_dict"], self.state_dict(), name, strict)
        if is_training:
            check_training_state(checkpoint, self.optimizer, self._parameter_groups(), name)
        self._weights_are_set = True
        self.trained_steps = checkpoint.get("global_step", 0)
        if constants := checked_constants(name, checkpoint):
            self.network.set_weight_constants(constants)
            self._constants_are_from_weights = True

    def on_train_start(self) -> None:
        # Lightning restores the optimiser's settings with its state, so a resumed run would keep
        # the checkpoint's. Apply the settings of this run; where they are equal, nothing changes.
        optimizer = cast(LightningOptimizer, self.optimizers())
        schedule = cast(LambdaLR, self.lr_schedulers())
        for group, wanted in zip(optimizer.param_groups, self._parameter_groups()):
            group["initial_lr"], group["weight_decay"] = wanted["lr"], wanted["weight_decay"]
            if "momentum" in group:
                group["momentum"] = self.momentum
        schedule.base_lrs = [group["initial_lr"] for group in optimizer.param_groups]
        for group, lr_lambda in zip(optimizer.param_groups, schedule.lr_lambdas):
            group["lr"] = group["initial_lr"] * lr_lambda(schedule.last_epoch)

    def _lr_factor(self) -> float:
        return lr_factor(self.reference_batch_size, getattr(self.trainer, "datamodule", None))

    def _parameter_groups(self) -> list[dict[str, Any]]:
        groups = parameter_groups(
            self.network,
            self.lr * self._lr_factor(),
            self.weight_decay,
            self.head_lr_mult,
            self.layer_decay,
        )
        return trained_groups(groups) if self._frozen else groups

    def configure_optimizers(self) -> Any:
        max_steps = self.trainer.max_steps
        if max_steps < 1:
            raise UserError(
                "trainer.max_steps is not set, but the learning-rate schedule needs the number of "
                "steps; give --trainer.max_steps N"
            )
        # A fused optimiser undoes the scaling of the loss by itself, so Lightning refuses to clip
        # its gradients under mixed precision.
        is_fused = not (self.trainer.gradient_clip_val and "mixed" in str(self.trainer.precision))
        groups = self._parameter_groups()
        optimizer = build_optimizer(self.optimizer, groups, self.momentum, is_fused=is_fused)
        schedule = poly_with_warmup(
            optimizer,
            max_steps,
            self.warmup_steps,
            self.poly_power,
            self.schedule,
            self.min_lr * self._lr_factor(),
        )
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": schedule, "interval": "step"},
        }
