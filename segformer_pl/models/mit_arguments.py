"""Check the arguments of a Mix Transformer and derive values from them."""

from collections.abc import Sequence
from typing import Literal, get_args

from segformer_pl.errors import UserError

PosEncoding = Literal["mix_ffn", "learned", "none"]
KvBorder = Literal["drop", "keep"]


def default_paddings(patch_sizes: Sequence[int], strides: Sequence[int]) -> tuple[int, ...]:
    """Return the paddings of the patch embeddings: K // 2 where patches overlap (K > S), else 0."""
    return tuple(k // 2 if k > s else 0 for k, s in zip(patch_sizes, strides))


def min_size(
    patch_sizes: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
    sr_ratios: Sequence[int],
    kv_border: KvBorder,
) -> int:
    """Return the smallest side of an image, in pixels, that leaves each stage enough tokens.

    Computed from the last stage back to the image: a stage needs one token for the next stage, or
    ``sr_ratio`` tokens if its reduction drops the border.
    """
    side = 1
    for kernel, stride, padding, sr_ratio in reversed(
        list(zip(patch_sizes, strides, paddings, sr_ratios))
    ):
        tokens = max(side, sr_ratio if kv_border == "drop" else 1)
        side = max((tokens - 1) * stride + kernel - 2 * padding, 1)
    return side


def position_grids(
    image_size: int | None,
    patch_sizes: Sequence[int],
    strides: Sequence[int],
    paddings: Sequence[int],
) -> list[int]:
    """Return the side of each stage's position table in tokens; four zeros without tables.

    Raises:
        UserError: A stage has no token.
    """
    if image_size is None:
        return [0] * 4
    grids, side = [], image_size
    for stage, (kernel, stride, padding) in enumerate(zip(patch_sizes, strides, paddings), 1):
        side = (side + 2 * padding - kernel) // stride + 1
        if side < 1:
            raise UserError(
                f"image_size={image_size} leaves no token in stage {stage}; "
                "use larger images or smaller strides"
            )
        grids.append(side)
    return grids


def check_stage_arguments(**per_stage: Sequence[int]) -> None:
    """Check the arguments that have one value for each of the four stages.

    Args:
        per_stage: ``embed_dims``, ``depths``, ``num_heads``, ``sr_ratios``, ``patch_sizes``,
            ``strides`` and ``paddings`` of :class:`~segformer_pl.models.MixTransformer`.

    Raises:
        UserError: A sequence does not have four values, or its values are impossible.
    """
    for name, values in per_stage.items():
        lowest = 0 if name == "paddings" else 1
        if len(values) != 4 or any(v < lowest for v in values):
            raise UserError(
                f"{name}={tuple(values)}: give one integer of at least {lowest} for each of the "
                "four stages"
            )
    for s in range(4):
        dim, heads = per_stage["embed_dims"][s], per_stage["num_heads"][s]
        kernel, stride = per_stage["patch_sizes"][s], per_stage["strides"][s]
        padding = per_stage["paddings"][s]
        if dim % heads:
            raise UserError(
                f"stage {s + 1}: embed_dim {dim} is not a multiple of its {heads} heads; "
                "change embed_dims or num_heads"
            )
        if kernel < stride:
            raise UserError(
                f"stage {s + 1}: patch_size {kernel} is smaller than stride {stride}, so pixels "
                f"between patches would never be used; use a patch_size of at least {stride}"
            )
        if padding > kernel // 2:
            raise UserError(
                f"stage {s + 1}: padding {padding} is more than half of patch_size {kernel}, so "
                f"border patches would hold mostly padding; use at most {kernel // 2}"
            )


def check_pos_encoding(pos_encoding: PosEncoding, image_size: int | None) -> None:
    """Check that ``image_size`` is given for learned position tables, and only for them.

    Raises:
        UserError: ``pos_encoding`` is unknown, or ``image_size`` is missing or superfluous.
    """
    if pos_encoding not in get_args(PosEncoding):
        raise UserError(
            f"pos_encoding={pos_encoding!r}: choose one of {', '.join(get_args(PosEncoding))}"
        )
    if pos_encoding == "learned" and image_size is None:
        raise UserError(
            "pos_encoding='learned' needs image_size, the side in pixels of the training crops "
            "that its tables are laid out for"
        )
    if pos_encoding != "learned" and image_size is not None:
        raise UserError(
            f"image_size={image_size} has no meaning with pos_encoding={pos_encoding!r}: only "
            "learned tables have a size; leave it out"
        )


def check_kv_border(kv_border: KvBorder) -> None:
    """Check that ``kv_border`` is known.

    Raises:
        UserError: ``kv_border`` is unknown.
    """
    if kv_border not in get_args(KvBorder):
        raise UserError(f"kv_border={kv_border!r}: choose one of {', '.join(get_args(KvBorder))}")


def check_merged_queries(shares: Sequence[float]) -> None:
    """Check that the shares of merged squares are shares, one for each of the four stages.

    Raises:
        UserError: They are not.
    """
    if len(shares) != 4 or not all(0 <= share <= 1 for share in shares):
        raise UserError(
            f"merged_queries={tuple(shares)}: give a share from 0 to 1 of the 2x2 squares of "
            "tokens for each of the four stages"
        )


def check_drop_path_rate(rate: float) -> None:
    """Check that the rate of stochastic depth is a probability below 1.

    Raises:
        UserError: It is not.
    """
    if not 0 <= rate < 1:
        raise UserError(f"drop_path_rate={rate}: give a number of at least 0 and below 1")
