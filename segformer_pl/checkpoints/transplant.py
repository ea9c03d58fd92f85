"""Load the weights of one SegFormer variant into another variant of the same widths and depths.

Kernels and position tables of another size are derived from those of the source; everything else is
copied. Each rule keeps what the source computes as far as the new shape can express it:

=====================  ============================  ==============================================
tensor                 change                        rule, and where it is exact
=====================  ============================  ==============================================
patch embedding        kernel K or padding P         :func:`resample_patch_kernel`: exact where the
                                                     new window contains the old one
sequence reduction     r to a multiple k r           :func:`pool_sr_kernel`: always the mean of the
                                                     k x k results of the smaller window
sequence reduction     any other r, both above 1     :func:`resize_sr_kernel`: exact on windows that
                                                     are resized from r to a larger r
sequence reduction     r = 1 to r > 1                untrained: mean of the r x r tokens, then a
                                                     LayerNorm that is initialised
sequence reduction     r > 1 to r = 1                left out; keys and values have to be trained
position table         another grid                  bilinear, as the network resizes it itself
position table         new                           zeros: exact
depthwise convolution  new                           identity: exact
position table,        no place in the model         left out
depthwise convolution
decode head            another head, or none         initialised as a whole
=====================  ============================  ==============================================
"""

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from segformer_pl.checkpoints.classifier import classifier_keys
from segformer_pl.checkpoints.conversion import export_weights
from segformer_pl.checkpoints.loading import encoder_arguments, load_matched
from segformer_pl.checkpoints.matching import Matched, match
from segformer_pl.checkpoints.networks import function_arguments, network_spec
from segformer_pl.checkpoints.report import LoadReport, listed
from segformer_pl.checkpoints.sources import Weights, WeightsSource, read_weights
from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Network

PATCH_KERNEL, SR_KERNEL = "patch_embed.proj.weight", "attn.sr.weight"
HEAD = "head."
# Facts about a source that hold for a network with the same classifier, and for any network.
CLASS_FACTS = ("class_names", "palette", "ignore_index")
IMAGE_FACTS = ("image_mean", "image_std")


@dataclass(frozen=True)
class TransplantReport:
    """Result of :func:`transplant`; ``str(report)`` is readable text.

    Attributes:
        load: The report of :func:`~segformer_pl.checkpoints.load_weights` on all tensors.
        num_copied: Number of the model's tensors that were copied as they are.
        resampled: What was derived from tensors of another shape, or replaces a missing one
            exactly, one sentence each.
        initialised: What is untrained, one sentence each.
        left_out: Trained tensors without a place in the model, one sentence each.
        initialised_keys: Keys of the untrained tensors.
    """

    load: LoadReport
    num_copied: int
    resampled: tuple[str, ...]
    initialised: tuple[str, ...]
    left_out: tuple[str, ...]
    initialised_keys: frozenset[str]

    @property
    def untrained(self) -> tuple[str, ...]:
        """Reasons why the network has to be trained before its predictions mean anything."""
        return self.initialised + self.left_out

    @property
    def sentences(self) -> list[str]:
        """The report in whole sentences."""
        return [
            f"{self.num_copied} tensors were copied from {self.load.source}.",
            *self.resampled,
            *self.left_out,
            *self.initialised,
            *(f"Argument {change}." for change in self.load.changed),
        ]

    def __str__(self) -> str:
        return "\n".join(self.sentences)


def transplant(model: Any, source: WeightsSource | Weights) -> TransplantReport:
    """Set a SegFormer's or MiT's weights from those of another variant of the same widths.

    The module's documentation lists what may differ, and what is done about it. Classes and input
    channels may differ too, see :func:`~segformer_pl.checkpoints.load_weights`. What the source
    lacks and no rule derives stays as the model was initialised. On an error the model is left as
    it was.

    Args:
        model: A segmenter or an encoder with the keys of our SegFormer or MiT.
        source: See :func:`~segformer_pl.checkpoints.sources.read_weights`.

    Raises:
        UserError: The source cannot be read, is no SegFormer, has other widths, depths or heads, or
            a patch embedding of both another kernel and another stride.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    if not isinstance(model, Network):
        raise UserError(
            f"weights cannot be transplanted into a {type(model).__name__}; give a network of "
            "segformer_pl.models"
        )
    matched = match(weights, model, "all")
    if matched.layout is None:
        raise UserError(
            f"{weights.name}: weights are transplanted between variants of SegFormer, and a "
            f"{type(model).__name__} is none; start it from its own weights with --model.weights"
        )
    # The task's state dict also holds the buffers of the training loss.
    matched.unknown = [key for key in matched.unknown if not key.startswith("loss.")]
    changes = _Changes(weights, model, matched)
    changes.derive_patch_kernels()
    changes.derive_reductions()
    changes.derive_positions()
    changes.match_heads()
    report = load_matched(model, weights, matched)
    reinitialized = [
        f"{listed(list(report.reinitialized))}: initialised, because of {reason}."
        for reason in dict.fromkeys(report.reinitialized.values())
    ]
    return TransplantReport(
        load=report,
        num_copied=report.num_tensors - len(changes.set_keys),
        resampled=tuple(changes.resampled),
        initialised=(*changes.initialised, *reinitialized),
        left_out=tuple(changes.left_out),
        initialised_keys=frozenset(changes.initialised_keys),
    )


def write_transplanted(
    source: WeightsSource | Weights, network: Any, file: str | Path
) -> list[str]:
    """Transplant weights into a network, and write it as a native file for ``--model.weights``.

    What is untrained is stored as the network was initialised, so build it under the seed of the
    run. A file of this name is replaced.

    Args:
        source: See :func:`~segformer_pl.checkpoints.sources.read_weights`.
        network: The network that is going to be trained; its weights are set.
        file: Path of the file, ending in ``.safetensors``.

    Returns:
        What was copied, resampled, left out and initialised, in sentences.

    Raises:
        UserError: See :func:`transplant`; or the file cannot be written.
    """
    weights = source if isinstance(source, Weights) else read_weights(source)
    report = transplant(network, weights)
    classifier = set(classifier_keys(network))
    untrained = report.initialised_keys | report.load.reinitialized.keys()
    known = IMAGE_FACTS + (CLASS_FACTS if classifier.isdisjoint(untrained) else ())
    facts = {key: weights.task[key] for key in known if key in weights.task}
    Path(file).unlink(missing_ok=True)
    export_weights(network, file, "native", facts)
    return report.sentences


def resample_patch_kernel(kernel: Tensor, padding: int, size: int, new_padding: int) -> Tensor:
    """Adapt the kernel of a patch embedding to another size and padding, at the same stride.

    Both windows lie on the same pixels of the same image, so pixels keep their weights. Pixels that
    only the new window sees get the weight 0. The weight of a pixel that only the old window saw is
    added to that of the nearest pixel of the new one, which is its best linear prediction if pixels
    are correlated like a separable Markov field with correlations near 1, the classical model of
    images (Jain 1989). K = 7, P = 3 to K = 4, P = 0::

        pixel of the image     -3 -2 -1  0  1  2  3
        old weights             a  b  c  d  e  f  g
        new weights                      |  e  f  g
                                         a + b + c + d

    The result is exact on every image if the new window contains the old one, and else on images
    that do not change beyond the border of the new window, such as constant ones. PI-resize
    (FlexiViT, Beyer et al. 2023) answers another question: there the image and the stride are
    resized with the kernel.

    Args:
        kernel: Weights, (C_out, C_in, K, K).
        padding: Padding P of the old window.
        size: Size of the new window.
        new_padding: Padding of the new window.

    Returns:
        Weights, (C_out, C_in, size, size), float64.
    """
    old = torch.arange(kernel.shape[-1], device=kernel.device)
    nearest = (old - padding + new_padding).clamp(0, size - 1)
    moves = F.one_hot(nearest, size).double().T  # (size, K)
    return moves @ kernel.double() @ moves.T


def pool_sr_kernel(kernel: Tensor, factor: int) -> Tensor:
    """Pool the kernel of a sequence reduction to a window that is an integer times as large.

    The result of the larger window is the mean of the results of the ``factor * factor`` smaller
    ones inside it, before the LayerNorm. The kernel is tiled and divided by their number.

    Args:
        kernel: Weights, (C, C, r, r).
        factor: New r over the old one.

    Returns:
        Weights, (C, C, factor r, factor r), float64.
    """
    return kernel.double().repeat(1, 1, factor, factor) / factor**2


def resize_sr_kernel(kernel: Tensor, size: int) -> Tensor:
    """Resize the kernel of a sequence reduction by PI-resize (FlexiViT, Beyer et al. 2023, eq. 2).

    For the matrix B that resizes a window of tokens along one axis, the new kernel minimises the
    difference between its result on resized windows and the old result on the originals, over
    windows of independent tokens. To a larger window, B interpolates linearly and the difference is
    0. To a smaller one, B averages the tokens that a new token covers (FlexiViT interpolates, which
    skips tokens), and the difference is 0 on windows that are constant over these.

    Args:
        kernel: Weights, (C, C, r, r).
        size: New r.

    Returns:
        Weights, (C, C, size, size), float64.
    """
    unit = torch.eye(kernel.shape[-1], dtype=torch.float64)[:, None]
    if size > kernel.shape[-1]:
        resize = F.interpolate(unit, size=size, mode="linear", align_corners=False)[:, 0].T
    else:
        resize = _averages(kernel.shape[-1], size)
    solve = torch.linalg.pinv(resize.T).to(kernel.device)  # (size, r)
    return solve @ kernel.double() @ solve.T


def _averages(length: int, size: int) -> Tensor:
    """Return the matrix (size, length) of means over ``length / size`` tokens, in fractions."""
    edges = torch.arange(size + 1, dtype=torch.float64) * length / size
    tokens = torch.arange(length, dtype=torch.float64)
    overlap = torch.minimum(edges[1:, None], tokens + 1) - torch.maximum(edges[:-1, None], tokens)
    return overlap.clamp(min=0) * size / length


@dataclass
class _Changes:
    """Bring the source's tensors to the shapes of the model's, in ``matched``, and record how."""

    weights: Weights
    model: Any
    matched: Matched
    set_keys: set[str] = field(default_factory=set)  # canonical keys that were not copied
    initialised_keys: set[str] = field(default_factory=set)
    resampled: list[str] = field(default_factory=list)
    initialised: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)

    @property
    def source(self) -> dict[str, Tensor]:
        return self.matched.source_tensors

    @property
    def ours(self) -> dict[str, Tensor]:
        return self.matched.model_tensors

    def derive_patch_kernels(self) -> None:
        stages = [
            (stage, key)
            for stage in range(4)
            if self._differs(key := f"encoder.stages.{stage}.{PATCH_KERNEL}")
        ]
        if not stages:
            return
        theirs = function_arguments(network_spec(self.weights), self.weights.name) or {}
        ours = encoder_arguments(self.model)
        for stage, key in stages:
            old, new = (tensors[key].shape[-1] for tensors in (self.source, self.ours))
            strides = [arguments["strides"][stage] for arguments in (theirs, ours)]
            if strides[0] != strides[1]:
                raise UserError(
                    f"stage {stage + 1}: the patch embedding has kernel {old} and stride "
                    f"{strides[0]} in {self.weights.name}, and kernel {new} and stride "
                    f"{strides[1]} here; a kernel can be resampled at the same stride only"
                )
            paddings = [arguments["paddings"][stage] for arguments in (theirs, ours)]
            self._set(key, resample_patch_kernel(self.source[key], paddings[0], new, paddings[1]))
            is_inside = paddings[1] >= paddings[0] and new - paddings[1] >= old - paddings[0]
            rule = (
                "pixels that only the new window sees have the weight 0, which changes no result"
                if is_inside
                else "the weights of pixels outside of the new window were added to those of its "
                "nearest pixel"
            )
            self.resampled.append(
                f"Stage {stage + 1}, patch embedding: resampled from kernel {old} and padding "
                f"{paddings[0]} to {new} and {paddings[1]}; {rule}."
            )

    def derive_reductions(self) -> None:
        for stage, keys in self._by_stage(self.ours, f".{SR_KERNEL}").items():
            unlike = [key for key in keys if self._differs(key)]
            new = self.ours[keys[0]].shape[-1]
            for key in unlike:
                old = self.source[key].shape[-1]
                factor = new // old if new % old == 0 else None
                kernel = self.source[key]
                self._set(
                    key,
                    pool_sr_kernel(kernel, factor) if factor else resize_sr_kernel(kernel, new),
                )
            if unlike:
                rule = (
                    f"pooled; each result is the mean of the {factor**2} of the smaller window"
                    if factor
                    else "resized by PI-resize (FlexiViT)"
                )
                self.resampled.append(
                    f"Stage {stage}, kernels of the sequence reduction: from sr_ratio {old} to "
                    f"{new}, {rule}."
                )
            absent = self._absent(keys, (SR_KERNEL, "attn.q.weight"))
            for key in absent:
                block = key.removesuffix(SR_KERNEL)
                mean = torch.eye(len(self.ours[key]))[:, :, None, None].expand(-1, -1, new, new)
                self._set(key, mean / new**2)
                values = {"sr.bias": 0.0, "norm.weight": 1.0, "norm.bias": 0.0}
                for name, value in values.items():
                    self._fill(f"{block}attn.{name}", value)
                self.initialised_keys |= {key, *(f"{block}attn.{name}" for name in values)}
            if absent:
                self.initialised.append(
                    f"Stage {stage}: sr_ratio is 1 in the source and {new} here, so its sequence "
                    f"reduction is untrained and starts as the mean of {new}x{new} tokens, "
                    "followed by a LayerNorm that the source does not have."
                )
        for stage, keys in self._by_stage(self.source, f".{SR_KERNEL}").items():
            unused = [key for key in keys if key not in self.ours]
            names = ("sr.weight", "sr.bias", "norm.weight", "norm.bias")
            self._leave_out(
                [f"{key.removesuffix(SR_KERNEL)}attn.{name}" for key in unused for name in names],
                f"Stage {stage}: sr_ratio is 1 here and was larger in the source, so the trained "
                "sequence reduction was left out; keys and values are computed from tokens that "
                "their projections were not trained on.",
            )

    def derive_positions(self) -> None:
        for stage, keys in self._by_stage(self.ours, ".pos_embed").items():
            (key,) = keys
            size = self.ours[key].shape[-2:]
            if self._differs(key):
                old = self.source[key].shape[-1]
                table = self.source[key].double()
                self._set(key, F.interpolate(table, size, mode="bilinear", align_corners=False))
                self.resampled.append(
                    f"Stage {stage}, position table: interpolated from {old}x{old} to "
                    f"{size[0]}x{size[1]} tokens."
                )
            elif key not in self.source:
                self._fill(key, 0.0)
                self.resampled.append(
                    f"Stage {stage}, position table: zeros, because the source has none."
                )
        for stage, keys in self._by_stage(self.source, ".pos_embed").items():
            unused = [key for key in keys if key not in self.ours]
            self._leave_out(
                unused, f"Stage {stage}: the trained position table was left out, as here is none."
            )
        for stage, keys in self._by_stage(self.ours, ".mlp.dwconv.weight").items():
            absent = self._absent(keys, ("dwconv", "fc1"))
            for key in absent:
                identity = torch.zeros(self.ours[key].shape)
                identity[:, :, 1, 1] = 1
                self._set(key, identity)
                self._fill(key.replace(".weight", ".bias"), 0.0)
            if absent:
                self.resampled.append(
                    f"Stage {stage}, depthwise convolutions: the identity, because the source has "
                    "none."
                )
        for stage, keys in self._by_stage(self.source, ".mlp.dwconv.weight").items():
            unused = [key for key in keys if key not in self.ours]
            self._leave_out(
                [key.replace(".weight", end) for key in unused for end in (".weight", ".bias")],
                f"Stage {stage}: the trained depthwise convolutions were left out, as here are "
                "none.",
            )

    def match_heads(self) -> None:
        """Keep the model's head if the source has another one, apart from the classes."""
        ours = {key: tensor for key, tensor in self.ours.items() if key.startswith(HEAD)}
        theirs = {key: tensor for key, tensor in self.source.items() if key.startswith(HEAD)}
        classifier = set(classifier_keys(self.model))
        is_same = ours.keys() == theirs.keys() and all(
            theirs[key].shape[key in classifier :] == tensor.shape[key in classifier :]
            for key, tensor in ours.items()
        )
        if is_same:
            return
        if theirs:
            self._leave_out(
                list(theirs), "The trained decode head was left out, as it is another one here."
            )
        for key, tensor in ours.items():
            self._set(key, tensor)
        self.initialised_keys |= ours.keys()
        if ours:
            reason = "has another one" if theirs else "holds none"
            self.initialised.append(
                f"The decode head is untrained, because {self.weights.name} {reason}."
            )

    def _differs(self, key: str) -> bool:
        """Whether both have the tensor, with another height and width, and it can be resampled."""
        if key not in self.source or key not in self.ours:
            return False
        theirs, ours = self.source[key], self.ours[key]
        can_be = theirs.ndim == 4 and theirs.is_floating_point()
        return can_be and len({*theirs.shape[2:]}) == 1 and theirs.shape[2:] != ours.shape[2:]

    def _absent(self, keys: list[str], names: tuple[str, str]) -> list[str]:
        """Return the keys that the source lacks, of blocks of which it has another tensor.

        A source without the block is not filled, but refused for its depths.
        """
        return [k for k in keys if k not in self.source and k.replace(*names) in self.source]

    def _by_stage(self, tensors: Mapping[str, Tensor], suffix: str) -> dict[int, list[str]]:
        """Return the keys with a suffix by stage, counted from 1."""
        stages: dict[int, list[str]] = defaultdict(list)
        for key in tensors:
            if key.startswith("encoder.stages.") and key.endswith(suffix):
                stages[int(key.split(".")[2]) + 1].append(key)
        return stages

    def _set(self, key: str, tensor: Tensor) -> None:
        self.source[key] = tensor
        self.set_keys.add(key)

    def _fill(self, key: str, value: float) -> None:
        self._set(key, torch.full(self.ours[key].shape, value))

    def _leave_out(self, keys: list[str], sentence: str) -> None:
        present = [key for key in keys if key in self.source]
        for key in present:
            del self.source[key]
            self.matched.dropped[key] = sentence
        if present:
            self.left_out.append(sentence)
