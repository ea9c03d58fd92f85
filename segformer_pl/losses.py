"""Training losses on logits at the network's stride and label maps at full size.

Every loss is a module called as ``loss(logits, target, ignore_index)``::

    logits        (B, num_classes, h, w) at the network's stride
    target        (B, H, W) int64 train ids
    ignore_index  label of the pixels that do not count

It upsamples the logits to (H, W) and returns a scalar in float32 (or float64). If no pixel of the
batch is labelled, the loss is 0 with a gradient of 0, not nan.

Cross-entropy never stores the upsampled logits. It computes them in bands of rows
(:mod:`segformer_pl.upsampling`), together with the gradient.
"""

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.bands import bands
from segformer_pl.errors import UserError
from segformer_pl.upsampling import SeparableMap, bilinear_matrix

Average = Literal["all", "valid"]


class CrossEntropy(nn.Module):
    """Cross-entropy on bilinearly upsampled logits.

    Value and gradient equal those of ``F.interpolate`` followed by ``F.cross_entropy``; peak
    memory is a fraction of theirs.

    Args:
        average: Divisor of the sum over pixels. ``"all"``: the number of all pixels including the
            ignored ones, as in the reference code (mmsegmentation's ``avg_non_ignore=False``), so
            an image with few labelled pixels has little weight. ``"valid"``: the number of
            labelled pixels, or the sum of their class weights, as in torch.
        class_weights: Weight of each class, in the order of the train ids. Default: 1 for all.
        label_smoothing: Share of the target distribution that is spread evenly over all classes
            (Szegedy et al. 2016).

    Raises:
        UserError: A class weight is negative, nan or infinite, or all of them are 0.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        average: Average = "all",
        class_weights: Sequence[NonNegativeFloat] | None = None,
        label_smoothing: ClosedUnitInterval = 0.0,
    ) -> None:
        super().__init__()
        self.average = average
        self.label_smoothing = label_smoothing
        if class_weights is not None:
            _check_values(class_weights)
        weights = None if class_weights is None else torch.tensor(class_weights)
        self.register_buffer("class_weights", weights, persistent=False)

    def forward(self, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            logits: (B, num_classes, h, w) at the network's stride.
            target: (B, H, W) int64 train ids.
            ignore_index: Label of the pixels that do not count.

        Raises:
            UserError: The number of class weights is not the number of classes.
        """
        valid = target != ignore_index
        if self.average == "all":
            divisor = valid.new_tensor(valid.numel(), dtype=torch.float64)
        elif self.class_weights is None:
            divisor = valid.sum(dtype=torch.float64)
        else:
            _check_weights(self.class_weights, logits)
            divisor = self.class_weights.double()[target[valid]].sum()
        # Without a labelled pixel, or with weights of 0, the sum is 0 too.
        divisor = torch.where(divisor > 0, divisor, 1)
        return weighted_cross_entropy(
            logits, target, valid / divisor, self.class_weights, self.label_smoothing
        )


class OhemCrossEntropy(nn.Module):
    """Cross-entropy over hard pixels: online hard example mining (Shrivastava et al. 2016).

    A pixel is hard if the predicted probability of its label is below ``threshold``. If fewer than
    ``min_kept * B`` pixels of the batch are hard, the ``min_kept * B`` pixels with the lowest
    probability are kept, ties included. The loss is the mean over the kept pixels.

    Args:
        threshold: A pixel whose label has at least this probability is easy and left out.
        min_kept: Minimum number of kept pixels per image.
    """

    def __init__(
        self, threshold: ClosedUnitInterval = 0.7, min_kept: NonNegativeInt = 100_000
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.min_kept = min_kept

    def forward(self, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            logits: (B, num_classes, h, w) at the network's stride.
            target: (B, H, W) int64 train ids.
            ignore_index: Label of the pixels that do not count.
        """
        valid = target != ignore_index
        with torch.no_grad():
            probability = torch.exp(-pixel_cross_entropy(logits, target, ignore_index))
        probability.masked_fill_(~valid, torch.inf)
        num_kept = min(self.min_kept * len(target), int(valid.sum()))
        threshold = torch.tensor(self.threshold, dtype=probability.dtype, device=logits.device)
        if num_kept:
            hardest = probability.flatten().kthvalue(num_kept).values
            # Strict for the threshold; the hardest `num_kept` pixels include the last of them.
            kept = (probability < threshold) | (probability <= hardest)
        else:
            kept = probability < threshold
        weights = kept.to(probability.dtype) / kept.sum().clamp(min=1)
        return weighted_cross_entropy(logits, target, weights)


class Focal(nn.Module):
    """Focal loss (Lin et al. 2017): cross-entropy times ``(1 - p) ** gamma``.

    ``p`` is the softmax probability of the label. The loss is the mean over the labelled pixels.

    Args:
        gamma: Focusing parameter. The larger it is, the less easy pixels count. 0 is cross-entropy.
    """

    def __init__(self, gamma: NonNegativeFloat = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            logits: (B, num_classes, h, w) at the network's stride.
            target: (B, H, W) int64 train ids.
            ignore_index: Label of the pixels that do not count.
        """
        upsampled = _upsample(logits, target)
        losses = F.cross_entropy(upsampled, target, ignore_index=ignore_index, reduction="none")
        # Near p = 1 the difference 1 - p is rounded and its power has a wrong gradient, so
        # compute 1 - p = 1 - exp(-loss) by expm1.
        focal = losses * (-torch.expm1(-losses)).clamp(min=1e-12) ** self.gamma
        return focal.sum() / (target != ignore_index).sum().clamp(min=1)


class Dice(nn.Module):
    """Soft Dice loss (Milletari et al. 2016): 1 - 2 |P ∩ T| / (|P| + |T|).

    P are the predicted probabilities of a class and T its target pixels. Sums are over the whole
    batch, without squares in the denominator; the loss is the mean over the classes present in the
    target.
    """

    def forward(self, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            logits: (B, num_classes, h, w) at the network's stride.
            target: (B, H, W) int64 train ids.
            ignore_index: Label of the pixels that do not count.
        """
        probabilities, train_ids = _labelled_pixels(logits, target, ignore_index)
        pred_sums = probabilities.sum(0)
        label_probabilities = probabilities.gather(1, train_ids[:, None])[:, 0]
        intersection = torch.zeros_like(pred_sums).index_add(0, train_ids, label_probabilities)
        target_sums = torch.bincount(train_ids, minlength=len(pred_sums))
        is_present = target_sums > 0
        if not is_present.any():
            return pred_sums.sum()  # an empty sum: 0, connected to the graph
        return 1 - (2 * intersection / (pred_sums + target_sums))[is_present].mean()


class Lovasz(nn.Module):
    """Lovász-softmax loss: the convex extension of 1 - IoU (Berman et al. 2018).

    IoU is over the whole batch; the loss is the mean over the classes present in the target.
    """

    def forward(self, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            logits: (B, num_classes, h, w) at the network's stride.
            target: (B, H, W) int64 train ids.
            ignore_index: Label of the pixels that do not count.
        """
        probabilities, train_ids = _labelled_pixels(logits, target, ignore_index)
        # Indexing one class allocates a gradient of the size of all classes, so unbind them once.
        by_class = probabilities.T.contiguous().unbind(0)
        losses = []
        for train_id in train_ids.unique().tolist():
            mask = (train_ids == train_id).to(probabilities.dtype)
            errors, order = (mask - by_class[train_id]).abs().sort(descending=True)
            losses.append((errors * _jaccard_gradient(mask[order])).sum())
        return torch.stack(losses).mean() if losses else probabilities.sum()


class WeightedSum(nn.Module):
    """Weighted sum of losses.

    Args:
        losses: Modules called as ``loss(logits, target, ignore_index)``.
        weights: Factor of each loss.

    Raises:
        UserError: The number of weights is not the number of losses.
    """

    def __init__(self, losses: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        if len(losses) != len(weights):
            raise UserError(
                f"{len(losses)} losses but {len(weights)} weights; give one weight for each loss"
            )
        self.losses = nn.ModuleList(losses)
        self.weights = weights

    def forward(self, logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
        """Return the loss of a batch, a scalar.

        Args:
            logits: (B, num_classes, h, w) at the network's stride.
            target: (B, H, W) int64 train ids.
            ignore_index: Label of the pixels that do not count.
        """
        values = [
            weight * loss(logits, target, ignore_index)
            for loss, weight in zip(self.losses, self.weights)
        ]
        return torch.stack(values).sum()


def pixel_cross_entropy(logits: Tensor, target: Tensor, ignore_index: int) -> Tensor:
    """Return the cross-entropy of every pixel on upsampled logits, without a gradient.

    Args:
        logits: (B, num_classes, h, w) at the network's stride.
        target: (B, H, W) int64 train ids.
        ignore_index: Label of the pixels that do not count.

    Returns:
        (B, H, W) in nats, float32 (or float64); 0 at ignored pixels.
    """
    train_ids = target.masked_fill(target == ignore_index, 0)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        maps, upsampling = _prepare(logits, target)
        losses = maps.new_empty(target.shape)
        for images, rows in _bands(target, maps):
            band = upsampling.band(maps[images], rows)
            index = train_ids[images, rows, :, None]
            losses[images, rows] = -band.log_softmax(3).gather(3, index).squeeze(3)
    return losses.masked_fill_(target == ignore_index, 0)


def weighted_cross_entropy(
    logits: Tensor,
    target: Tensor,
    pixel_weights: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Return the pixel-weighted sum of ``F.cross_entropy`` on upsampled logits.

    The forward pass computes the gradient too, band by band, while the upsampled logits of a band
    are in memory, and stores it at the size of the logits::

        for each band of output rows:
            band     = upsample(logits)[rows]                 (B, R, W, num_classes)
            loss     += sum(pixel_weights * cross_entropy(band, target[rows]))
            gradient += upsample^T(d loss / d band)           (B, h, w, num_classes)

    There are no second derivatives.

    Args:
        logits: (B, num_classes, h, w) at the network's stride.
        target: (B, H, W) int64 train ids; any value where the pixel's weight is 0.
        pixel_weights: (B, H, W) weights, not differentiated.
        class_weights: (num_classes,) weights by train id.
        label_smoothing: Share of the target distribution that is spread evenly over all classes.

    Raises:
        UserError: The number of class weights is not the number of classes.
    """
    if class_weights is not None:
        _check_weights(class_weights, logits)
    with torch.autocast(logits.device.type, enabled=False):
        value: Tensor = _WeightedCrossEntropy.apply(
            logits, target, pixel_weights, class_weights, label_smoothing
        )
    return value


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        pixel_weights: Tensor,
        class_weights: Tensor | None,
        label_smoothing: float,
    ) -> Tensor:
        maps, upsampling = _prepare(logits, target)
        num_classes = maps.shape[3]
        pixel_weights = pixel_weights.to(maps.dtype)
        train_ids = target.masked_fill(pixel_weights == 0, 0)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(maps) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=maps.device)
        # With label smoothing and class weights the target distribution of a pixel is
        #     t = label_mass at the label + spread at every class.
        # For upsampled logits u, the loss is -t . log_softmax(u) and its gradient is
        # sum(t) softmax(u) - t.
        weights = maps.new_ones(num_classes) if class_weights is None else class_weights.to(maps)
        spread = weights * (label_smoothing / num_classes)
        for images, rows in _bands(target, maps):
            index, pixel_weight = train_ids[images, rows, :, None], pixel_weights[images, rows]
            label_mass = (1 - label_smoothing) * weights[index.squeeze(3)]
            mass = label_mass + spread.sum()
            band = upsampling.band(maps[images], rows)
            log_probabilities = band.log_softmax(3)
            losses = -label_mass * log_probabilities.gather(3, index).squeeze(3)
            if label_smoothing:
                losses -= log_probabilities @ spread
            total += (losses * pixel_weight).sum(dtype=torch.float64)
            if gradient is not None:
                probabilities = log_probabilities.exp_()
                probabilities *= (mass * pixel_weight)[..., None]
                probabilities.scatter_add_(3, index, -(label_mass * pixel_weight)[..., None])
                if label_smoothing:
                    probabilities -= pixel_weight[..., None] * spread
                upsampling.add_transposed(probabilities, rows, gradient[images])
        ctx.save_for_backward(gradient)
        ctx.dtype = logits.dtype
        return total.to(maps.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = (gradient * grad_output).to(ctx.dtype)
        return scaled.permute(0, 3, 1, 2), None, None, None, None


def _prepare(logits: Tensor, target: Tensor) -> tuple[Tensor, SeparableMap]:
    """Return logits as (B, h, w, num_classes) in at least float32, and their upsampling."""
    precise = logits.detach().float() if logits.dtype.itemsize < 4 else logits.detach()
    maps = precise.permute(0, 2, 3, 1).contiguous()
    rows, columns = (
        bilinear_matrix(small, large) for small, large in zip(maps.shape[1:3], target.shape[1:])
    )
    return maps, SeparableMap(rows, columns, maps)


def _bands(target: Tensor, maps: Tensor) -> Iterator[tuple[slice, slice]]:
    batch, height, width = target.shape
    return bands(batch, height, width, maps.shape[3], maps.device.type)


def _check_values(class_weights: Sequence[float]) -> None:
    bad = [weight for weight in class_weights if not (math.isfinite(weight) and weight >= 0)]
    if bad:
        raise UserError(
            f"class_weights: {bad[0]} at train id {list(class_weights).index(bad[0])} is not a "
            "valid weight; give finite numbers of at least 0"
        )
    if not any(class_weights):
        raise UserError(
            "class_weights are all 0, so nothing would be learnt; give at least one class a "
            "weight above 0"
        )


def _check_weights(class_weights: Tensor, logits: Tensor) -> None:
    if len(class_weights) != logits.shape[1]:
        raise UserError(
            f"there are {len(class_weights)} class weights but {logits.shape[1]} classes; give one "
            "weight for each class, in the order of the train ids"
        )


def _upsample(logits: Tensor, target: Tensor) -> Tensor:
    precise = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.interpolate(precise, size=target.shape[1:], mode="bilinear", align_corners=False)


def _labelled_pixels(logits: Tensor, target: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Return softmax (P, num_classes) and train ids (P,) of the P labelled pixels."""
    valid = target != ignore_index
    return _upsample(logits, target).softmax(1).movedim(1, 3)[valid], target[valid]


def _jaccard_gradient(mask: Tensor) -> Tensor:
    """Gradient of the Lovász extension of 1 - IoU (Berman et al. 2018, Algorithm 1).

    Args:
        mask: (P,) 1 where the target is the class and else 0, sorted by decreasing error.

    Returns:
        (P,) gradient by the sorted errors.
    """
    intersection = mask.cumsum(0)
    jaccard = 1 - (mask.sum() - intersection) / (
        mask.sum() + torch.arange(1, len(mask) + 1).to(intersection) - intersection
    )
    return torch.cat([jaccard[:1], jaccard.diff()])


def check_loss(loss: nn.Module) -> None:
    """Check that a loss takes three arguments; torch's own losses take two.

    Raises:
        UserError: The loss cannot be called with logits, target and ``ignore_index``.
    """
    try:
        inspect.signature(loss.forward).bind(None, None, None)
    except TypeError as error:
        raise UserError(
            f"model.loss: {type(loss).__name__} cannot be called as loss(logits, target, "
            "ignore_index) with logits at the network's stride; take one of segformer_pl.losses, "
            "or wrap it"
        ) from error
