"""The training loss of MaskFormer: classification of a set of masks (Cheng et al. 2021, Sec. 3.2).

The network predicts Q pairs of a class and a mask for an image, and the label map holds N classes,
each with the binary mask of its pixels. A one-to-one assignment of lowest cost decides which query
has to predict which class; all other queries have to predict "no object"::

    labels of an image           cost (Q, N)              query   has to predict
    a a a b b                    class   a     b            0      class b, mask of b
    a a c c b      -->   query 0       0.9   0.1   -->      1      class a, mask of a
    a c c c c            query 1       0.2   0.7            2      no object, any mask
                         query 2       0.8   0.6            ...

Symbols: B images, Q queries, K classes, N classes present in an image, (h, w) the size of the
predicted masks, (H, W) that of the labels, P pixels.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from segformer_pl.errors import UserError

IgnoredPixels = Literal["background", "left_out"]

# Focal loss (Lin et al. 2017): weight of the mask's own pixels, and exponent of the modulation.
ALPHA, GAMMA = 0.25, 2


class MaskTargets(NamedTuple):
    """What the queries of one image have to predict.

    Attributes:
        classes: The N classes present, ascending, (N,) int64.
        labels: Label map, (H, W) int64. The mask of a class is where it has that value.
        counted: Pixels that the mask losses count, (H, W) bool. None: all.
    """

    classes: Tensor
    labels: Tensor
    counted: Tensor | None

    def pixels(self, mask_logits: Tensor) -> tuple[Tensor, Tensor]:
        """Return the counted pixels of predicted masks and of the masks of all classes.

        The labels are brought to the size of the predictions by nearest neighbours, as in the
        original.

        Args:
            mask_logits: (M, h, w).

        Returns:
            Mask logits (M, P), and masks (N, P) bool.
        """
        labels, counted = (
            None if each is None else _resize_labels(each, mask_logits)
            for each in (self.labels, self.counted)
        )
        assert labels is not None
        if counted is None:
            mask_logits, labels = mask_logits.flatten(1), labels.flatten()
        else:
            mask_logits, labels = mask_logits[:, counted], labels[counted]
        return mask_logits, labels == self.classes[:, None]


class LossTerms(NamedTuple):
    """The three parts of the loss of one decoder layer, not weighted; scalars."""

    classes: Tensor
    focal: Tensor
    dice: Tensor


@dataclass(frozen=True)
class MaskClassificationLoss:
    """Loss of predicted classes and masks, after an assignment of queries to classes.

    The loss of one decoder layer is ``cross-entropy + mask_weight * focal + dice_weight * dice``,
    and all layers count alike, each with an assignment of its own. The same weights are those of
    the assignment's cost, in which the class term is minus the probability of the class.

    An image with more classes than queries keeps some classes unassigned: those that make the cost
    of the others lowest. The losses are divided by the number of all classes nevertheless.

    Args:
        num_classes: Number of classes K. Index K of the class logits is "no object".
        mask_weight: Weight of the focal loss of masks.
        dice_weight: Weight of the dice loss of masks.
        no_object_weight: Weight of the queries without a class in the cross-entropy.
        ignored_pixels: ``"background"``: pixels to ignore are outside of every mask, as in the
            original. ``"left_out"``: the mask losses and the assignment do not count them.

    Raises:
        UserError: A weight is negative, or ``ignored_pixels`` has another value.
    """

    num_classes: int
    mask_weight: float = 20.0
    dice_weight: float = 1.0
    no_object_weight: float = 0.1
    ignored_pixels: IgnoredPixels = "background"

    def __post_init__(self) -> None:
        for name in ("mask_weight", "dice_weight", "no_object_weight"):
            value = getattr(self, name)
            if not 0 <= value < float("inf"):
                raise UserError(f"{name}={value}: give a finite number of at least 0")
        if self.ignored_pixels not in get_args(IgnoredPixels):
            raise UserError(
                f"ignored_pixels={self.ignored_pixels!r}: choose one of "
                f"{', '.join(get_args(IgnoredPixels))}"
            )

    def __call__(
        self, layers: Iterable[tuple[Tensor, Tensor]], target: Tensor, ignore_index: int
    ) -> Tensor:
        """Return the loss of a batch, a scalar.

        It is computed in float32, or float64 for such predictions: in float16 the sums over the
        pixels of a mask would overflow.

        Args:
            layers: Class logits (B, Q, K+1) and mask logits (B, Q, h, w) of each decoder layer.
            target: Class indices, (B, H, W) int64.
            ignore_index: Class index of the pixels that belong to no class.

        Raises:
            UserError: A label is neither a class nor ``ignore_index``.
        """
        targets = self.targets(target, ignore_index)
        num_masks = mean_num_masks(targets, target.device)
        total = torch.zeros((), device=target.device)
        for class_logits, mask_logits in layers:
            with torch.autocast(target.device.type, enabled=False):
                terms = self.terms(class_logits, mask_logits, targets, num_masks)
                masks = self.mask_weight * terms.focal + self.dice_weight * terms.dice
                total = total + terms.classes + masks
        return total

    def targets(self, target: Tensor, ignore_index: int) -> list[MaskTargets]:
        """Return the classes and masks of every image.

        Classes without a pixel in the crop have no mask.

        Args:
            target: Class indices, (B, H, W) int64.
            ignore_index: Class index of the pixels that belong to no class.

        Raises:
            UserError: A label is neither a class nor ``ignore_index``.
        """
        targets = []
        for labels in target:
            present = labels.unique()
            classes = present[present != ignore_index]
            wrong = classes[(classes < 0) | (classes >= self.num_classes)]
            if len(wrong):
                raise UserError(
                    f"a label map holds the value {wrong[0]}, which is neither one of the "
                    f"{self.num_classes} classes of the network (0 to {self.num_classes - 1}) nor "
                    f"the ignored value {ignore_index}; correct the labels or the data set's "
                    "mapping of them"
                )
            leaves_out = self.ignored_pixels == "left_out"
            counted = labels != ignore_index if leaves_out else None
            targets.append(MaskTargets(classes, labels, counted))
        return targets

    def terms(
        self,
        class_logits: Tensor,
        mask_logits: Tensor,
        targets: Sequence[MaskTargets],
        num_masks: Tensor,
    ) -> LossTerms:
        """Return the parts of the loss of one decoder layer.

        Args:
            class_logits: (B, Q, K+1).
            mask_logits: (B, Q, h, w).
            targets: Classes and masks of the B images.
            num_masks: Divisor of the mask losses, a scalar.
        """
        class_logits, mask_logits = _precise(class_logits), _precise(mask_logits)
        expected = torch.full_like(class_logits[..., 0], self.num_classes, dtype=torch.int64)
        # Empty sums that are connected with the masks, for batches without any class.
        focal = dice = mask_logits[:, :0].sum()
        for index, image in enumerate(targets):
            queries, assigned = self.match(class_logits[index], mask_logits[index], image)
            if not len(queries):
                continue
            expected[index, queries] = image.classes[assigned]
            # Upsampled masks and their losses take many times the memory of what is stored here,
            # so the backward pass computes them again.
            image_focal, image_dice = checkpoint(
                _mask_losses,
                mask_logits[index, queries],
                image._replace(classes=image.classes[assigned]),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            focal, dice = focal + image_focal, dice + image_dice
        weights = class_logits.new_ones(self.num_classes + 1)
        weights[-1] = self.no_object_weight
        classes = F.cross_entropy(class_logits.transpose(1, 2), expected, weights)
        return LossTerms(classes, focal / num_masks, dice / num_masks)

    @torch.no_grad()
    def match(
        self, class_logits: Tensor, mask_logits: Tensor, target: MaskTargets
    ) -> tuple[Tensor, Tensor]:
        """Assign queries to the classes of an image such that the cost is lowest.

        Args:
            class_logits: (Q, K+1).
            mask_logits: (Q, h, w).
            target: Classes and masks of the image.

        Returns:
            ``(queries, indices)`` of min(N, Q) pairs: query i has to predict class
            ``target.classes[indices[i]]``.
        """
        from scipy.optimize import linear_sum_assignment  # slow to import

        cost = self.cost(_precise(class_logits), _precise(mask_logits), target)
        # Predictions that are not finite are assigned only where no others are left. scipy would
        # stop the training in the assignment; the loss, which is not finite then, names the reason.
        worst = torch.finfo(cost.dtype).max
        cost = cost.nan_to_num(nan=worst, posinf=worst, neginf=worst)
        queries, indices = linear_sum_assignment(cost.cpu().numpy())
        to_device = target.classes.device
        return torch.from_numpy(queries).to(to_device), torch.from_numpy(indices).to(to_device)

    def cost(self, class_logits: Tensor, mask_logits: Tensor, target: MaskTargets) -> Tensor:
        """Return the cost (Q, N) of assigning a query to a class.

        Args:
            class_logits: (Q, K+1).
            mask_logits: (Q, h, w). The masks of the classes are brought to this size.
            target: Classes and masks of the image.
        """
        probabilities = class_logits.softmax(1)[:, target.classes]
        logits, masks = target.pixels(mask_logits)
        inside, outside = _focal(logits, torch.tensor(True)), _focal(logits, torch.tensor(False))
        foreground, own = masks.to(logits).T, logits.sigmoid()
        # Sums over the pixels of every pair as matrix products
        focal = (inside - outside) @ foreground + outside.sum(1, keepdim=True)
        focal = focal / max(logits.shape[1], 1)
        overlap = own @ foreground
        sizes = own.sum(1, keepdim=True) + foreground.sum(0)
        dice = 1 - (2 * overlap + 1) / (sizes + 1)
        return self.mask_weight * focal + self.dice_weight * dice - probabilities


def mean_num_masks(targets: Sequence[MaskTargets], device: torch.device) -> Tensor:
    """Return the number of masks in the batch, averaged over all ranks and at least 1; a scalar."""
    number = torch.tensor(float(sum(len(image.classes) for image in targets)), device=device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(number)
        number /= dist.get_world_size()
    return number.clamp(min=1)


def _mask_losses(mask_logits: Tensor, target: MaskTargets) -> tuple[Tensor, Tensor]:
    """Return the sums of the focal and the dice losses of M masks.

    Args:
        mask_logits: (M, h, w), upsampled here to the labels' size.
        target: The M classes that these masks are assigned to.
    """
    size = target.labels.shape
    upsampled = F.interpolate(mask_logits[None], size, mode="bilinear", align_corners=False)[0]
    logits, masks = target.pixels(upsampled)
    focal = _focal(logits, masks).mean(1)
    own, foreground = logits.sigmoid(), masks.to(logits)
    overlap, sizes = (own * foreground).sum(1), own.sum(1) + foreground.sum(1)
    dice = 1 - (2 * overlap + 1) / (sizes + 1)
    return focal.sum(), dice.sum()


def _focal(logits: Tensor, masks: Tensor) -> Tensor:
    """Return the focal loss of every pixel.

    Args:
        logits: Logits of the pixel being inside the mask, (M, P).
        masks: Whether it is, bool, broadcast to (M, P).
    """
    masks = masks.to(logits.device)
    signed = torch.where(masks, logits, -logits)  # logit of the right answer
    weights = torch.where(masks, ALPHA, 1 - ALPHA).to(logits)
    return weights * torch.sigmoid(-signed) ** GAMMA * -F.logsigmoid(signed)


def _resize_labels(labels: Tensor, like: Tensor) -> Tensor:
    size = like.shape[-2:]
    if labels.shape == size:
        return labels
    # float32 holds all class indices exactly.
    return F.interpolate(labels[None, None].float(), size, mode="nearest")[0, 0].to(labels)


def _precise(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype.itemsize < 4 else tensor
