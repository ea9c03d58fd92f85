"""Training losses: logits at the network's own stride, labels at pixel size.

Every loss is a module called as ``loss(logits, labels, ignore_index)`` with logits (B, num_classes,
h, w) and labels (B, H, W) int64 train ids, upsamples the logits to the labels by itself and returns
a float32 (or float64) scalar. Without a single labelled pixel it is 0 with a gradient of 0, not
nan.

Cross-entropy never holds the upsampled logits: it takes them band by band (upsampling.py), with
the gradient on the way.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.errors import UserError
from segformer_pl.upsampling import SeparableMap, bands, bilinear_matrix

Average = Literal["all", "valid"]


class CrossEntropy(nn.Module):
    """Cross-entropy on bilinearly upsampled logits.

    Equal to ``F.interpolate`` and ``F.cross_entropy`` in value and gradient, without their memory.

    Args:
        average: ``"all"`` divides the sum by the number of all pixels, ignored ones too, as the
            reference code does (mmsegmentation's ``avg_non_ignore=False``), so that a picture
            with few labels weighs little; ``"valid"`` by that of the labelled pixels, or by the
            sum of their class weights, as torch does.
        class_weights: Weight of every class, by train id.
        label_smoothing: Share of the target that is spread over all classes (Szegedy et al. 2016).

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

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """See the module's docstring.

        Raises:
            UserError: There is not one class weight for every class.
        """
        valid = labels != ignore_index
        if self.average == "all":
            divisor = valid.new_tensor(valid.numel(), dtype=torch.float64)
        elif self.class_weights is None:
            divisor = valid.sum(dtype=torch.float64)
        else:
            _check_weights(self.class_weights, logits)
            divisor = self.class_weights.double()[labels[valid]].sum()
        # Without a labelled pixel, or with weights of 0, the sum is 0 too.
        divisor = torch.where(divisor > 0, divisor, 1)
        return weighted_cross_entropy(
            logits, labels, valid / divisor, self.class_weights, self.label_smoothing
        )


class OhemCrossEntropy(nn.Module):
    """Cross-entropy of the hard pixels alone (online hard example mining, Shrivastava et al. 2016).

    A pixel is hard if the probability of its label is below ``threshold``. Where fewer than
    ``min_kept`` times the number of pictures are, the hardest so many of the batch are taken, and
    those as hard as the last of them. The mean is over the pixels taken.

    Args:
        threshold: Probability of the label that is too good to train on.
        min_kept: Pixels per picture that are trained on at least.
    """

    def __init__(
        self, threshold: ClosedUnitInterval = 0.7, min_kept: NonNegativeInt = 100_000
    ) -> None:
        super().__init__()
        self.threshold = threshold
        self.min_kept = min_kept

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """See the module's docstring."""
        valid = labels != ignore_index
        with torch.no_grad():
            probability = torch.exp(-pixel_cross_entropy(logits, labels, ignore_index))
        probability.masked_fill_(~valid, torch.inf)
        num_kept = min(self.min_kept * len(labels), int(valid.sum()))
        threshold = torch.tensor(self.threshold, dtype=probability.dtype, device=logits.device)
        if num_kept:
            hardest = probability.flatten().kthvalue(num_kept).values
            # Of the rank asked for inclusive, of the threshold exclusive.
            kept = (probability < threshold) | (probability <= hardest)
        else:
            kept = probability < threshold
        weights = kept.to(probability.dtype) / kept.sum().clamp(min=1)
        return weighted_cross_entropy(logits, labels, weights)


class Focal(nn.Module):
    """Focal loss: cross-entropy times ``(1 - p) ** gamma``, p the label's probability.

    Lin et al. 2017, over the softmax of all classes; mean over the labelled pixels.

    Args:
        gamma: How much less the easy pixels count; 0 is cross-entropy.
    """

    def __init__(self, gamma: NonNegativeFloat = 2.0) -> None:
        super().__init__()
        self.gamma = gamma

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """See the module's docstring."""
        upsampled = _upsample(logits, labels)
        losses = F.cross_entropy(upsampled, labels, ignore_index=ignore_index, reduction="none")
        # 1 - p by expm1: near p = 1 the power of a rounded difference has a wrong gradient.
        focal = losses * (-torch.expm1(-losses)).clamp(min=1e-12) ** self.gamma
        return focal.sum() / (labels != ignore_index).sum().clamp(min=1)


class Dice(nn.Module):
    """Soft Dice loss: 1 - 2 |P and L| / (|P| + |L|), of the whole batch.

    Milletari et al. 2016, with plain sums in the denominator; mean over the classes that are
    labelled in the batch.
    """

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """See the module's docstring."""
        probabilities, targets = _labelled_pixels(logits, labels, ignore_index)
        found = probabilities.sum(0)
        right = probabilities.gather(1, targets[:, None])[:, 0]
        intersection = torch.zeros_like(found).index_add(0, targets, right)
        labelled = torch.bincount(targets, minlength=len(found))
        present = labelled > 0
        if not present.any():
            return found.sum()  # of no pixel: 0, with a gradient
        return 1 - (2 * intersection / (found + labelled))[present].mean()


class Lovasz(nn.Module):
    """Lovász-softmax loss: the convex extension of 1 - IoU (Berman et al. 2018).

    Of the whole batch; mean over the classes that are labelled in it.
    """

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """See the module's docstring."""
        probabilities, targets = _labelled_pixels(logits, labels, ignore_index)
        # Taken apart at once: a class picked out by its index would have a gradient of full size.
        by_class = probabilities.T.contiguous().unbind(0)
        losses = []
        for train_id in targets.unique().tolist():
            truth = (targets == train_id).to(probabilities.dtype)
            errors, order = (truth - by_class[train_id]).abs().sort(descending=True)
            losses.append((errors * _jaccard_gradient(truth[order])).sum())
        return torch.stack(losses).mean() if losses else probabilities.sum()


class WeightedSum(nn.Module):
    """A weighted sum of losses.

    Args:
        losses: Modules called as ``loss(logits, labels, ignore_index)``.
        weights: One factor for each.

    Raises:
        UserError: There are not as many weights as losses.
    """

    def __init__(self, losses: list[nn.Module], weights: list[float]) -> None:
        super().__init__()
        if len(losses) != len(weights):
            raise UserError(
                f"{len(losses)} losses but {len(weights)} weights; give one weight for each loss"
            )
        self.losses = nn.ModuleList(losses)
        self.weights = weights

    def forward(self, logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
        """See the module's docstring."""
        values = [
            weight * loss(logits, labels, ignore_index)
            for loss, weight in zip(self.losses, self.weights)
        ]
        return torch.stack(values).sum()


def pixel_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Cross-entropy of every pixel on upsampled logits, 0 where ignored; without a gradient.

    Args:
        logits: (B, num_classes, h, w).
        labels: (B, H, W) int64 train ids.
        ignore_index: The label that does not count.

    Returns:
        (B, H, W) nats, float32 (or float64).
    """
    targets = labels.masked_fill(labels == ignore_index, 0)
    with torch.no_grad(), torch.autocast(logits.device.type, enabled=False):
        maps, upsampling = _prepare(logits, labels)
        losses = maps.new_empty(labels.shape)
        for images, rows in _bands(labels, maps):
            band = upsampling.band(maps[images], rows)
            own = band.gather(3, targets[images, rows, :, None]).squeeze(3)
            losses[images, rows] = _log_sum_exp(band, band.softmax(3)) - own
    return losses.masked_fill_(labels == ignore_index, 0)


def weighted_cross_entropy(
    logits: Tensor,
    labels: Tensor,
    pixel_weights: Tensor,
    class_weights: Tensor | None = None,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Sum of weighted cross-entropies on upsampled logits, that of ``F.cross_entropy`` per pixel.

    The gradient is found in the forward pass, while a band of upsampled logits is at hand, and
    kept at the logits' own size. It cannot be differentiated again.

    Args:
        logits: (B, num_classes, h, w).
        labels: (B, H, W) int64 train ids; anything where the pixel's weight is 0.
        pixel_weights: (B, H, W), without a gradient.
        class_weights: (num_classes,), of the labels.
        label_smoothing: Share of the target that is spread over all classes.

    Raises:
        UserError: There is not one class weight for every class.
    """
    if class_weights is not None:
        _check_weights(class_weights, logits)
    with torch.autocast(logits.device.type, enabled=False):
        value: Tensor = _WeightedCrossEntropy.apply(
            logits, labels, pixel_weights, class_weights, label_smoothing
        )
    return value


class _WeightedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        labels: Tensor,
        pixel_weights: Tensor,
        class_weights: Tensor | None,
        label_smoothing: float,
    ) -> Tensor:
        maps, upsampling = _prepare(logits, labels)
        num_classes = maps.shape[3]
        pixel_weights = pixel_weights.to(maps.dtype)
        targets = labels.masked_fill(pixel_weights == 0, 0)
        needs_gradient = ctx.needs_input_grad[0]
        gradient = torch.zeros_like(maps) if needs_gradient else None
        total = torch.zeros((), dtype=torch.float64, device=maps.device)
        # The target is t = own at the label + spread at every class; the loss is
        # sum(t) logsumexp(u) - t . u, its gradient sum(t) softmax(u) - t.
        weights = maps.new_ones(num_classes) if class_weights is None else class_weights.to(maps)
        spread = weights * (label_smoothing / num_classes)
        for images, rows in _bands(labels, maps):
            target, pixel_weight = targets[images, rows, :, None], pixel_weights[images, rows]
            own = (1 - label_smoothing) * weights[target.squeeze(3)]
            mass = own + spread.sum()
            band = upsampling.band(maps[images], rows)
            probabilities = band.softmax(3)
            losses = mass * _log_sum_exp(band, probabilities)
            losses -= own * band.gather(3, target).squeeze(3)
            if label_smoothing:
                losses -= band @ spread
            total += (losses * pixel_weight).sum(dtype=torch.float64)
            if gradient is not None:
                probabilities *= (mass * pixel_weight)[..., None]
                probabilities.scatter_add_(3, target, -(own * pixel_weight)[..., None])
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


def _prepare(logits: Tensor, labels: Tensor) -> tuple[Tensor, SeparableMap]:
    """Class-last logits (B, h, w, num_classes) in at least float32, and their upsampling."""
    precise = logits.detach().float() if logits.dtype.itemsize < 4 else logits.detach()
    maps = precise.permute(0, 2, 3, 1).contiguous()
    rows, columns = (
        bilinear_matrix(small, large) for small, large in zip(maps.shape[1:3], labels.shape[1:])
    )
    return maps, SeparableMap(rows, columns, maps)


def _bands(labels: Tensor, maps: Tensor) -> Iterator[tuple[slice, slice]]:
    batch, height, width = labels.shape
    return bands(batch, height, width, maps.shape[3], maps.device.type)


def _log_sum_exp(band: Tensor, probabilities: Tensor) -> Tensor:
    # Through the most likely class, whose probability is never small; less than half the time of
    # torch.logsumexp.
    return band.amax(3) - probabilities.amax(3).log()


def _check_values(class_weights: Sequence[float]) -> None:
    bad = [weight for weight in class_weights if not (math.isfinite(weight) and weight >= 0)]
    if bad:
        raise UserError(
            f"class_weights: {bad[0]} at train id {list(class_weights).index(bad[0])} is no "
            "weight; give finite numbers of at least 0"
        )
    if not any(class_weights):
        raise UserError(
            "class_weights are all 0, so that nothing would be learnt; give at least one class a "
            "weight above 0"
        )


def _check_weights(class_weights: Tensor, logits: Tensor) -> None:
    if len(class_weights) != logits.shape[1]:
        raise UserError(
            f"there are {len(class_weights)} class weights but {logits.shape[1]} classes; give one "
            "for each class, in the order of the train ids"
        )


def _upsample(logits: Tensor, labels: Tensor) -> Tensor:
    precise = logits.float() if logits.dtype.itemsize < 4 else logits
    return F.interpolate(precise, size=labels.shape[1:], mode="bilinear", align_corners=False)


def _labelled_pixels(logits: Tensor, labels: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Softmax (P, num_classes) and train ids (P,) of the P labelled pixels."""
    valid = labels != ignore_index
    return _upsample(logits, labels).softmax(1).movedim(1, 3)[valid], labels[valid]


def _jaccard_gradient(truth: Tensor) -> Tensor:
    """Gradient of the Lovász extension of 1 - IoU (Berman et al. 2018, Sec. 3).

    Args:
        truth: (P,) 1 where a pixel is of the class, in the order of falling errors.
    """
    hits = truth.cumsum(0)
    jaccard = 1 - (truth.sum() - hits) / (
        truth.sum() + torch.arange(1, len(truth) + 1).to(hits) - hits
    )
    return torch.cat([jaccard[:1], jaccard.diff()])
