"""Any convolutional network or hierarchical transformer of timm as an encoder."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from segformer_pl.errors import UserError, counted
from segformer_pl.models.paper_macs import counted_macs
from segformer_pl.models.segmenter import Encoder
from segformer_pl.models.timm_models import create_timm_model, load_timm, on_meta

# Strides of MiT's maps, which the MLP head expects. Convolutional networks also have finer ones.
STRIDES = (4, 8, 16, 32)
_POSITIONS = ("relative_position_bias_table", "pos_embed")


class TimmEncoder(Encoder):
    """A backbone of timm, whose feature maps are those of MiT: strides 4, 8, 16, 32.

    Convolutional networks (``resnet50c``, ``efficientnet_lite0``, ``convnext_tiny``) and
    hierarchical transformers (``pvt_v2_b0``, ``swinv2_tiny_window8_256``) have such maps. Maps that
    timm returns channels-last are brought to (B, C, H, W). Not supported are backbones with maps of
    one stride (for ViT take a :class:`~segformer_pl.models.vit_encoder.ViTEncoder`), those that
    timm builds for a single size of images (MaxViT, Hiera), and Swin, whose shifted windows timm
    computes in another way than the segmentation networks with Swin (take a
    :class:`~segformer_pl.models.swin.SwinEncoder`). Swin V2 takes any size that is divisible by 32.

    The maps are as the backbone returns them, without an additional norm, as in Table 1d of the
    SegFormer paper.

    Args:
        name: Name of the model in timm, with or without the tag of its weights
            (``resnet18.a1_in1k``).
        pretrained: Whether the weights are downloaded from the Hugging Face hub. Without network,
            set them from a file: ``model.encoder_weights`` on the command line.
        out_indices: Indices of the feature maps among those that timm's ``feature_info`` lists.
            Default: the last one of each stride of 4, 8, 16 and 32.
        in_channels: Number of channels of the images. Pretrained filters are adapted by timm.
        drop_path_rate: Rate of stochastic depth. Default: the one of timm's model.
        output_stride: Largest stride, 8, 16 or 32. Later strides are replaced by dilation, which
            keeps the weights: 16 gives maps of strides 4, 8, 16 and 16, and 8 gives 4, 8, 8 and 8.
            As in torchvision and mmsegmentation, the first block of a dilated stage has the
            dilation of the stage before. Default: no dilation.

    Raises:
        UserError: timm has no such model, the model has no feature pyramid or does not take these
            arguments, or its weights cannot be downloaded.
    """

    training_arguments = ("pretrained", "drop_path_rate")

    def __init__(
        self,
        name: str,
        pretrained: bool = False,
        out_indices: Sequence[int] | None = None,
        in_channels: int = 3,
        drop_path_rate: float | None = None,
        output_stride: int | None = None,
    ) -> None:
        super().__init__()
        indices = None if out_indices is None else tuple(out_indices)
        known = _pyramid(name, indices, in_channels, drop_path_rate, output_stride)
        self.in_channels, self.output_stride = in_channels, output_stride
        self.name, self.out_indices, self.drop_path_rate = name, known.indices, drop_path_rate
        self.out_channels, self.out_strides = known.channels, known.strides
        # Below it the coarsest map has one pixel, which sees mostly padding.
        self.min_size = max(known.strides)
        self.size_divisor = max(known.strides) if known.needs_whole_patches else 1
        self.is_channels_last = known.is_channels_last
        arguments = dict(known.arguments) | {"out_indices": known.indices}
        self.backbone = create_timm_model(name, pretrained, arguments, features_only=True)
        # As in MixTransformer: channels-last maps give channels-last gradients.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the feature pyramid of images (B, in_channels, H, W).

        Returns:
            Feature maps (B, C_i, H_i, W_i), from the finest to the coarsest.

        Raises:
            UserError: The backbone does not take images of this size.
        """
        height, width = images.shape[2:]
        if height % self.size_divisor or width % self.size_divisor:
            raise UserError(
                f"{self.name} takes images whose sides are multiples of {self.size_divisor}, and "
                f"these have {height}x{width} pixels; give a data.crop_size and "
                f"model.inference.resize_to {self.size_divisor}"
            )
        maps = self.backbone(images.contiguous(memory_format=torch.channels_last))
        if self.is_channels_last:
            maps = [feature_map.permute(0, 3, 1, 2) for feature_map in maps]
        return list(maps)

    def init_args(self) -> dict[str, Any]:
        """Return the arguments; ``pretrained`` is False, as the weights are stored themselves."""
        return {
            "name": self.name,
            "pretrained": False,
            "out_indices": self.out_indices,
            "in_channels": self.in_channels,
            "drop_path_rate": self.drop_path_rate,
            "output_stride": self.output_stride,
        }

    def own_key(self, key: str) -> str:
        """Return the key of timm's model with feature maps for one of its classification network.

        Where maps come from inside a sequence of modules, as in ConvNeXt, timm takes the sequence
        apart: ``stages.0.blocks.1.gamma`` becomes ``stages_0.blocks.1.gamma``.
        """
        children = dict(self.backbone.named_children())
        steps = key.split(".")
        for i in range(len(steps) - 1):
            if steps[i] in children:
                return key
            if (joined := f"{steps[i]}_{steps[i + 1]}") in children:
                return ".".join([*steps[:i], joined, *steps[i + 2 :]])
        return key

    def parts(self) -> dict[str, str]:
        """Return timm's own division: stem, norm and stages."""
        return {path: f"backbone.{path}" for path in _part_paths(self.backbone)}

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of every parameter: one layer for each block, from the image on.

        A block is what timm numbers (``layer1.0``, ``blocks.2.1``, ``stages_0.blocks.1``). Stem and
        downsampling belong to the block that follows, what follows the last block to that one. A
        backbone without such blocks (VGG, DenseNet) has one layer for each convolution.
        """
        names = [name for name, _ in self.named_parameters()]
        modules = dict(self.named_modules())
        blocks = [_block(name, modules) for name in names]
        if not any(blocks):
            blocks = [_convolution(name, modules) for name in names]
        ids, layer, last = {}, -1, None
        for name, block in zip(names, blocks):
            if block is not None and block != last:
                layer, last = layer + 1, block
            ids[name] = (layer, block is None)
        # Parameters between blocks belong to the next one.
        return {
            name: min(max(number + is_between, 0), layer)
            for name, (number, is_between) in ids.items()
        }

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of norms, and the position tables."""
        return {
            f"{path}.{name}"
            for path, module in self.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if "norm" in type(module).__name__.lower() or name in _POSITIONS
        }

    def out_sizes(self, height: int, width: int) -> list[tuple[int, int]]:
        # Computed by the backbone itself, as some round down (VGG, DenseNet, ConvNeXt).
        dims = (1, 2) if self.is_channels_last else (2, 3)
        return [(m.shape[dims[0]], m.shape[dims[1]]) for m in self._maps_on_meta(height, width)]

    def paper_macs(self, height: int, width: int) -> int | None:
        """Return the multiply-adds by the rules of Table 1d, None for a backbone with attention."""
        return counted_macs(self.backbone, lambda: self._maps_on_meta(height, width))

    def _maps_on_meta(self, height: int, width: int) -> list[Tensor]:
        """Return the backbone's maps of one image as tensors of the right shape without values."""
        with torch.device("meta"):
            state = {
                name: torch.empty(tensor.shape, dtype=tensor.dtype)
                for name, tensor in (
                    *self.backbone.named_parameters(),
                    *self.backbone.named_buffers(),
                )
            }
            dtype = next(self.parameters()).dtype
            images = torch.empty(1, self.in_channels, height, width, dtype=dtype)
        modes = {module: module.training for module in self.backbone.modules()}
        self.backbone.eval()
        try:
            with torch.no_grad():
                return functional_call(self.backbone, state, (images,))
        finally:
            for module, training in modes.items():
                module.training = training


@dataclass(frozen=True)
class _Pyramid:
    """What timm's model returns.

    Attributes:
        indices: Indices of the feature maps in timm's ``feature_info``.
        channels: Channels of the maps.
        strides: Strides of the maps.
        is_channels_last: Whether the maps are (B, H, W, C).
        needs_whole_patches: Whether sides of images have to be divisible by the coarsest stride.
        arguments: Names and values of the arguments to build the model with.
    """

    indices: tuple[int, ...]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    is_channels_last: bool
    needs_whole_patches: bool
    arguments: tuple[tuple[str, Any], ...]


@lru_cache(maxsize=64)
def _pyramid(
    name: str,
    out_indices: tuple[int, ...] | None,
    in_channels: int,
    drop_path_rate: float | None,
    output_stride: int | None,
) -> _Pyramid:
    """Examine a model of timm on the meta device, without weights and data.

    Raises:
        UserError: See :class:`TimmEncoder`.
    """
    arguments: dict[str, Any] = {"in_chans": in_channels}
    if drop_path_rate is not None:
        arguments["drop_path_rate"] = drop_path_rate
    with on_meta():
        model = create_timm_model(name, False, arguments, features_only=True)
        if load_timm().models.is_model_in_modules(name, ["swin_transformer"]):
            raise UserError(
                f"timm's {name} computes other windows than the segmentation networks with Swin "
                "where the window does not divide a map; choose another, or a network on a "
                "SwinEncoder, such as maskformer_swin"
            )
        strides = model.feature_info.reduction()
        if out_indices is None:
            last = {stride: index for index, stride in enumerate(strides) if stride in STRIDES}
            indices = tuple(last.values())
            if len(indices) < 2:
                raise UserError(
                    f"{name} has feature maps of strides {_numbers(strides)} and not several of "
                    "4, 8, 16 and 32, so it is no hierarchical encoder; choose another, such as "
                    "resnet50c or pvt_v2_b0; a plain vision transformer is the backbone of SETR"
                )
        else:
            indices = out_indices
            chosen = [strides[i] for i in indices if 0 <= i < len(strides)]
            if not indices or len(chosen) < len(indices) or chosen != sorted(set(chosen)):
                raise UserError(
                    f"out_indices={indices}: {name} has feature maps 0 to {len(strides) - 1} of "
                    f"strides {_numbers(strides)}; name some of them, each of another stride, from "
                    "the finest to the coarsest"
                )
        arguments["out_indices"] = indices
        # The stages are chosen by the strides without dilation, with which several may share one.
        if output_stride is not None:
            arguments["output_stride"] = output_stride
            model = _create_dilated(name, arguments)
        else:
            model = create_timm_model(name, False, arguments, features_only=True)
        try:
            maps = _try_sizes(model, in_channels, (64, 96))
            if maps is None:  # Swin V2: by default only images of the size in its name
                model = create_timm_model(
                    name, False, arguments | {"strict_img_size": False}, features_only=True
                )
                arguments["strict_img_size"] = False
                maps = _try_sizes(model, in_channels, (64, 96))
        except UserError:
            maps = None
        if maps is None:
            raise UserError(
                f"{name} takes images of a single size alone, as timm builds it; choose a "
                "convolutional network or PVT, or take a SwinEncoder"
            )
        needs_whole_patches = _try_sizes(model, in_channels, (65, 97)) is None
    strides = tuple(model.feature_info.reduction())
    channels = tuple(model.feature_info.channels())
    shapes = [tuple(feature_map.shape) for feature_map in maps]
    sizes = [(64 // s, 96 // s) for s in strides]
    is_channels_last = shapes == [(1, *size, c) for size, c in zip(sizes, channels)]
    if not is_channels_last and shapes != [(1, c, *size) for size, c in zip(sizes, channels)]:
        raise UserError(
            f"{name} returns maps of shapes {shapes} for an image of 64x96 pixels, and not of the "
            f"strides {_numbers(strides)} that it states; choose another model"
        )
    _check_gradients(name, model, maps, indices)
    del arguments["out_indices"]
    known = tuple(arguments.items())
    return _Pyramid(indices, channels, strides, is_channels_last, needs_whole_patches, known)


def _create_dilated(name: str, arguments: dict[str, Any]) -> Any:
    """Build a model of timm whose largest stride is ``arguments["output_stride"]``.

    Raises:
        UserError: timm cannot limit the model's strides.
    """
    output_stride = arguments["output_stride"]
    if output_stride not in STRIDES[1:]:
        raise UserError(f"output_stride={output_stride}: choose one of {_numbers(STRIDES[1:])}")
    try:
        model = create_timm_model(name, False, arguments, features_only=True)
    except UserError:  # depends on the model: it has no such argument, or takes only 32
        model = None
    if model is None or max(model.feature_info.reduction()) != output_stride:
        raise UserError(
            f"timm cannot give {name} an output_stride of {output_stride}; leave it out, or choose "
            "a convolutional network whose strides timm replaces by dilation, such as resnet50c"
        )
    return model


def _try_sizes(model: nn.Module, in_channels: int, size: tuple[int, int]) -> list[Tensor] | None:
    """Return the maps of an image of this size, None if the model refuses it."""
    try:
        return list(model.eval()(torch.empty(1, in_channels, *size)))
    except (AssertionError, RuntimeError, ValueError, TypeError):  # depends on the model
        return None


def _check_gradients(
    name: str, model: nn.Module, maps: Sequence[Tensor], indices: tuple[int, ...]
) -> None:
    """Check that every parameter takes part, as DistributedDataParallel requires.

    Raises:
        UserError: A parameter does not.
    """
    torch.stack([feature_map.sum() for feature_map in maps]).sum().backward()
    unused = [key for key, parameter in model.named_parameters() if parameter.grad is None]
    if unused:
        raise UserError(
            f"{name} with out_indices={indices} leaves {counted(len(unused), 'parameter')} "
            "unused, such as "
            f"{unused[0]}; add the index of its coarsest map"
        )


def _numbers(values: Sequence[int]) -> str:
    return ", ".join(map(str, values))


def _part_paths(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Yield the paths of stem, norm and stages: children with parameters, in order.

    A list of lists of blocks is divided further, and so is a module that holds all others.
    """
    own = any(True for _ in module.parameters(recurse=False))
    children = {
        name: child
        for name, child in module.named_children()
        if any(True for _ in child.parameters())
    }
    for name, child in children.items():
        holds_lists = isinstance(child, nn.Sequential | nn.ModuleList) and all(
            isinstance(item, nn.Sequential | nn.ModuleList) for item in child
        )
        is_wrapper = len(children) == 1 and not own and not prefix
        if holds_lists or is_wrapper:
            yield from _part_paths(child, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _block(name: str, modules: dict[str, nn.Module]) -> str | None:
    """Return the path of the block that a parameter belongs to: its first numbered module."""
    match = re.match(r"(?:[^.]*[^.\d][^.]*\.)+?\d+(?:\.\d+)*(?=\.)", name)
    if match is None or not any(True for _ in modules[match[0]].children()):
        return None
    return match[0]


def _convolution(name: str, modules: dict[str, nn.Module]) -> str | None:
    path = name.rpartition(".")[0]
    return path if isinstance(modules[path], nn.Conv2d | nn.Linear) else None
