"""What hierarchical transformers share: the layout of tokens, and the layers of parameters."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn


def to_channels_first(tokens: Tensor) -> Tensor:
    """Return tokens (B, H, W, C) as (B, C, H, W), a view in channels-last memory format."""
    return tokens.permute(0, 3, 1, 2)


def to_tokens(feature_map: Tensor) -> Tensor:
    """Return a feature map (B, C, H, W) as tokens (B, H, W, C), a view."""
    return feature_map.permute(0, 2, 3, 1)


def layer_ids_of_stages(path: str, stages: Iterable[Any]) -> dict[str, int]:
    """Return the layer of every parameter: one layer for each block, from the image on.

    Args:
        path: Path of the stages in the encoder.
        stages: Stages with children ``blocks`` and ``norm``. The norm belongs to a stage's last
            block, all else to its first.
    """
    ids = {}
    first = 0
    for s, stage in enumerate(stages):
        last = first + len(stage.blocks) - 1
        for name, _ in stage.named_parameters():
            child, *rest = name.split(".")
            if child == "blocks":
                layer = first + int(rest[0])
            else:
                layer = last if child == "norm" else first
            ids[f"{path}.{s}.{name}"] = layer
        first = last + 1
    return ids


def norms_and(module: nn.Module, *tables: str) -> set[str]:
    """Return the names of the parameters of LayerNorms, and of those that are called like tables.

    Transformers train them without weight decay.
    """
    return {
        f"{path}.{name}"
        for path, child in module.named_modules()
        for name, _ in child.named_parameters(recurse=False)
        if isinstance(child, nn.LayerNorm) or name in tables
    }
