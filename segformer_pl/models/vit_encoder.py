"""Plain vision transformers of timm (ViT, DeiT) as an encoder, at any size of images.

::

    images (B, C_in, H, W)
      |  patch embedding: convolution of kernel and stride P           h = H / P, w = W / P
    tokens (B, h * w, C)
      |  prefix tokens before them (class, distillation, registers), position table added
    tokens (B, prefix + h * w, C)
      |  blocks 0, 1, 2, ...; after each block of ``out_indices``: a map (B, C, h, w)
"""

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import AdaptedWeights, Encoder
from segformer_pl.models.timm_models import create_timm_model, load_timm, on_meta
from segformer_pl.models.tokens import to_channels_first

# Parameters of timm's model that become tokens in front of the image's, in timm's order.
PREFIX_TOKENS = ("cls_token", "dist_token", "reg_token")

FAMILY = "*it*"  # pattern of the names of vision transformers: vit_*, deit_*


class ViTEncoder(Encoder):
    """A plain vision transformer of timm: maps of several blocks, all of one stride.

    It takes every model that timm builds as a ``VisionTransformer``: ``vit_*_patch16_*`` and
    ``deit*``, also distilled, hybrid (``vit_*_r50_*``) and with registers. Blocks after the last
    used one are left out, and so are the final norm and the classifier. Maps are the output of the
    blocks without a norm.

    The position table is stored at ``image_size``. For another size of images it is resampled in
    every forward pass, bilinearly with ``align_corners=False``, which is how SETR's code resamples
    pretrained tables when it loads them; timm resamples bicubically with antialiasing. The rows of
    prefix tokens stay as they are. A pretrained table is resampled once, in the same way.

    Parameters have the names of timm's model after ``backbone.``.

    Args:
        name: Name of the model in timm, with or without the tag of its weights
            (``vit_base_patch16_384.augreg_in21k_ft_in1k``).
        image_size: Size of the images that the position table is stored for, in pixels: the side,
            or height and width. Usually the training crop.
        out_indices: Blocks whose outputs are the maps, counted from 0, ascending. Default: four,
            evenly spaced up to the last, such as 2, 5, 8, 11.
        class_token: Whether the prefix tokens run through the blocks. If not, they and their rows
            of the position table are left out.
        pretrained: Whether the weights are downloaded from the Hugging Face hub.
        in_channels: Number of channels of the images. Pretrained filters are adapted by timm.

    Raises:
        UserError: timm has no such model or it is no plain vision transformer, ``image_size`` is no
            multiple of the patch, ``out_indices`` do not fit, or the weights cannot be downloaded.
    """

    training_arguments = ("pretrained",)

    def __init__(
        self,
        name: str,
        image_size: int | tuple[int, int] = 512,
        out_indices: Sequence[int] | None = None,
        class_token: bool = True,
        pretrained: bool = False,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        shape = vit_shape(name)
        size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
        if len(size) != 2:
            raise UserError(
                f"image_size={image_size}: give the side of a square, or height and width"
            )
        if any(side < shape.stride or side % shape.stride for side in size):
            raise UserError(
                f"image_size={image_size}: {name} has patches of {shape.stride}x{shape.stride} "
                f"pixels; give a multiple of {shape.stride}, or height and width that are"
            )
        if out_indices is None:
            out_indices = evenly_spaced(shape.depth)
        indices = tuple(out_indices)
        if indices != tuple(sorted(set(indices) & set(range(shape.depth)))) or not indices:
            raise UserError(
                f"out_indices={indices}: {name} has blocks 0 to {shape.depth - 1}; name at least "
                "one of them, each once, in ascending order"
            )
        self.name, self.image_size, self.class_token = name, size, class_token
        self.in_channels = in_channels
        self.min_size = shape.stride
        self.out_channels = (shape.dim,) * len(indices)
        self.out_strides = (shape.stride,) * len(indices)
        # On the meta device there are no values to download.
        pretrained = pretrained and torch.get_default_device().type != "meta"
        grid = (size[0] // shape.stride, size[1] // shape.stride)
        arguments: dict[str, Any] = {"in_chans": in_channels}
        # timm would resample a pretrained table bicubically, so take it at its own size.
        if not pretrained:
            arguments["img_size"] = size
        model = create_timm_model(
            name, pretrained, arguments, FAMILY, num_classes=0, dynamic_img_size=True
        )
        self.backbone = VisionTransformerBlocks(model, indices, class_token)
        self.backbone.resize_table(grid)
        # As in MixTransformer: channels-last maps give channels-last gradients.
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return the maps of images (B, in_channels, H, W).

        Returns:
            Maps (B, C, H / P, W / P) of the chosen blocks, from the first to the last.

        Raises:
            UserError: A side of the images is no multiple of the patch P.
        """
        height, width = images.shape[2:]
        patch = self.out_strides[0]
        # Padding here would not do: the maps would cover more than the image, and inference, which
        # stretches class maps over the image, would shift every prediction. `pad_to` cuts off what
        # it has added.
        if height % patch or width % patch or min(height, width) < patch:
            raise UserError(
                f"{self.name} takes images whose sides are multiples of {patch}, and these have "
                f"{height}x{width} pixels; give such a size (data.crop_size in training, --size in "
                f"profile and erf), or the inference setting pad_to {patch}"
            )
        return self.backbone(images.contiguous(memory_format=torch.channels_last))

    def init_args(self) -> dict[str, Any]:
        """Return the arguments; ``pretrained`` is False, as the weights are stored themselves."""
        return {
            "name": self.name,
            "image_size": self.image_size,
            "out_indices": self.backbone.out_indices,
            "class_token": self.class_token,
            "pretrained": False,
            "in_channels": self.in_channels,
        }

    def adapt_weights(
        self, tensors: Mapping[str, Tensor], stated: Mapping[str, Any]
    ) -> AdaptedWeights:
        """Adapt a file of timm's classification network, or of this encoder at another size.

        The position table is resampled to ``image_size`` as in :meth:`forward`. If the source does
        not state its size, its grid is taken to be square. Blocks after the last used one are left
        out.
        """
        prefix, num_blocks = "backbone.blocks.", len(self.backbone.blocks)
        left_out = {
            key: f"the encoder uses {num_blocks} blocks"
            for key in tensors
            if key.startswith(prefix)
            and int(key.removeprefix(prefix).partition(".")[0]) >= num_blocks
        }
        adapted = {key: tensor for key, tensor in tensors.items() if key not in left_out}
        resampled = {}
        key = "backbone.pos_embed"
        size, stride = stated.get("image_size"), self.out_strides[0]
        height, width = (size, size) if isinstance(size, int) else size or (0, 0)
        grid = (height // stride, width // stride) if size else None
        if key in adapted and (changed := self.backbone.adapt_table(adapted[key], grid)):
            adapted[key], resampled[key] = changed
        return AdaptedWeights(adapted, left_out, resampled)

    def layer_ids(self) -> dict[str, int]:
        """Return the layer of every parameter: that of its block, counted from 0.

        Patch embedding, prefix tokens and position table belong to block 0.
        """
        names = (name for name, _ in self.named_parameters())
        prefix = "backbone.blocks."
        return {
            name: int(name.removeprefix(prefix).split(".")[0]) if name.startswith(prefix) else 0
            for name in names
        }

    def no_weight_decay(self) -> set[str]:
        """Return the parameters of norms, the position table and the prefix tokens."""
        return {
            f"{path}.{name}"
            for path, module in self.named_modules()
            for name, _ in module.named_parameters(recurse=False)
            if "norm" in type(module).__name__.lower() or name in ("pos_embed", *PREFIX_TOKENS)
        }


class VisionTransformerBlocks(nn.Module):
    """The used part of timm's ``VisionTransformer``, with its parameter names.

    Args:
        model: timm's model, built with ``dynamic_img_size=True``. Its modules are taken over.
        out_indices: Blocks whose outputs are returned, ascending.
        class_token: Whether the prefix tokens are kept.
    """

    def __init__(self, model: Any, out_indices: tuple[int, ...], class_token: bool) -> None:
        super().__init__()
        self.out_indices = out_indices
        self.patch_embed = model.patch_embed
        self.grid: tuple[int, int] = tuple(model.patch_embed.grid_size)
        # In DeiT III and others, rows of the table belong to patches alone.
        num_rows = 0 if model.no_embed_class else model.num_prefix_tokens
        self.num_prefix_rows_in_timm = num_rows
        self.prefix_names = tuple(
            name for name in PREFIX_TOKENS if class_token and getattr(model, name, None) is not None
        )
        for name in self.prefix_names:
            self.register_parameter(name, getattr(model, name))
        table = model.pos_embed
        if not class_token:
            rows = table.detach()[:, num_rows:]
            table, num_rows = nn.Parameter(rows.clone(memory_format=torch.contiguous_format)), 0
        self.pos_embed = table
        self.num_prefix_rows = num_rows
        self.norm_pre = model.norm_pre
        self.blocks = nn.ModuleList(model.blocks[: out_indices[-1] + 1])

    def forward(self, images: Tensor) -> list[Tensor]:
        """Return maps (B, C, h, w) of images (B, C_in, h * P, w * P)."""
        tokens = self.patch_embed(images)  # (B, h, w, C)
        batch, height, width, _ = tokens.shape
        tokens = tokens.flatten(1, 2)
        table = self.position_table((height, width))
        prefix = [getattr(self, name).expand(batch, -1, -1) for name in self.prefix_names]
        num_prefix = sum(token.shape[1] for token in prefix)
        if self.num_prefix_rows:
            tokens = torch.cat([*prefix, tokens], dim=1) + table
        else:
            tokens = torch.cat([*prefix, tokens + table], dim=1)
        tokens = self.norm_pre(tokens)
        maps = []
        for index, block in enumerate(self.blocks):
            tokens = block(tokens)
            if index in self.out_indices:
                patches = tokens[:, num_prefix:].unflatten(1, (height, width))
                maps.append(to_channels_first(patches))
        return maps

    def position_table(self, grid: tuple[int, int]) -> Tensor:
        """Return the position table (1, prefix rows + h * w, C) for a grid of h x w patches."""
        # An exported graph serves all sizes, so it must not depend on this comparison. Resampling
        # to the same grid is the identity.
        if not torch.compiler.is_exporting() and grid == self.grid:
            return self.pos_embed
        prefix, patches = self.pos_embed.tensor_split([self.num_prefix_rows], dim=1)
        return torch.cat([prefix, resample_table(patches, self.grid, grid)], dim=1)

    def resize_table(self, grid: tuple[int, int]) -> None:
        """Store the position table for a grid of h x w patches."""
        if grid != self.grid:
            self.pos_embed = nn.Parameter(self.position_table(grid).detach().contiguous())
            self.grid = grid

    def adapt_table(self, table: Tensor, grid: tuple[int, int] | None) -> tuple[Tensor, str] | None:
        """Adapt a position table of another size, or one with more prefix rows, to this network.

        Args:
            table: The table (1, prefix rows + h * w, C).
            grid: Its grid (h, w); None if unknown. Then it is taken to be square.

        Returns:
            The adapted table and how that was done; None if it fits already, or in no way.
        """
        if table.ndim != 3 or (table.shape == self.pos_embed.shape and grid in (None, self.grid)):
            return None
        counts = dict.fromkeys((self.num_prefix_rows_in_timm, self.num_prefix_rows))
        for num_rows in counts:
            num_patches = table.shape[1] - num_rows
            side = math.isqrt(max(num_patches, 0))
            old = (side, side) if grid is None else grid
            if (
                num_patches > 0
                and math.prod(old) == num_patches
                and num_rows >= self.num_prefix_rows
            ):
                break
        else:
            return None
        rows, patches = table.tensor_split([num_rows], dim=1)
        rules = []
        if old != self.grid:
            patches = resample_table(patches, old, self.grid)
            sizes = ("{}x{}".format(*size) for size in (old, self.grid))
            rules.append("bilinearly from a grid of {} to {} patches".format(*sizes))
        if num_rows > self.num_prefix_rows:
            rows = rows[:, : self.num_prefix_rows]
            rules.append(f"without the rows of {num_rows} prefix tokens")
        return torch.cat([rows, patches], dim=1), ", ".join(rules)


def resample_table(table: Tensor, grid: tuple[int, int], new_grid: tuple[int, int]) -> Tensor:
    """Resample a position table (1, h * w, C) without prefix rows to another grid, bilinearly."""
    patches = table.unflatten(1, grid).permute(0, 3, 1, 2)
    patches = F.interpolate(patches, size=new_grid, mode="bilinear", align_corners=False)
    return patches.flatten(2).transpose(1, 2)


class ViTShape(NamedTuple):
    """Shape of a vision transformer.

    Attributes:
        depth: Number of blocks.
        dim: Channels of the tokens.
        stride: Side of a patch in pixels.
    """

    depth: int
    dim: int
    stride: int


@lru_cache(maxsize=64)
def vit_shape(name: str) -> ViTShape:
    """Return the shape of a vision transformer of timm, by its name.

    Raises:
        UserError: timm has no such model, or it is no plain vision transformer.
    """
    with on_meta():
        model = create_timm_model(name, False, {}, FAMILY, num_classes=0)
    is_plain = isinstance(model, load_timm().models.VisionTransformer)
    if not is_plain or model.pos_embed is None:
        raise UserError(
            f"{name} is no plain vision transformer but a {type(model).__name__}; choose a model "
            "of timm such as vit_base_patch16_384 or deit_base_distilled_patch16_384"
        )
    info = cast(list[dict[str, Any]], model.feature_info)[0]
    return ViTShape(len(model.blocks), info["num_chs"], info["reduction"])


def evenly_spaced(depth: int) -> tuple[int, ...]:
    """Return four blocks, evenly spaced up to the last; all of them where there are fewer."""
    return tuple(sorted({depth * i // 4 - 1 for i in range(1, 5)} - {-1}))
