"""MaskFormer in transformers' layout: keys and ``config.json`` (``facebook/maskformer-*``).

transformers has MaskFormer on ResNet and on Swin. As in :mod:`~segformer_pl.checkpoints.layouts`,
tables translate to *canonical* keys, in which our joint projections are split::

    transformers (on disk)                      canonical                        ours
    ...layers.0.self_attn.q_proj.weight         ...layers.0.self_attn.q.weight   |
    ...layers.0.self_attn.k_proj.weight         ...layers.0.self_attn.k.weight   | in_proj_weight
    ...layers.0.self_attn.v_proj.weight         ...layers.0.self_attn.v.weight   |

Source, for its key names and settings only: transformers 5.23, whose keys on disk are those of
version 4. Its keys in memory are read too.
"""

import re
from collections.abc import Mapping

from torch import Tensor

from segformer_pl.checkpoints.layouts import KeyTable, Layout, from_canonical, to_canonical

MODEL_TYPE = "maskformer"
CLASS_PATH = "segformer_pl.models.maskformer.MaskFormer"

_BACKBONE = "model.pixel_level_module.encoder."
_PIXELS = "model.pixel_level_module.decoder."
_QUERIES = "model.transformer_module."
_LAYER, _OUR_LAYER = f"{_QUERIES}decoder.layers.{{b}}.", "transformer_decoder.layers.{b}."
_BLOCK, _OUR_BLOCK = "model.encoder.layers.{s}.blocks.{b}.", "layers.{s}.blocks.{b}."
_UNIT, _OUR_UNIT = "encoder.stages.{s}.layers.{b}.", "backbone.layer{i}.{b}."

_ANCHOR = f"{_PIXELS}mask_projection.weight"
_RESNET_STEM = f"{_BACKBONE}embedder.embedder.convolution.weight"
_OUR_RESNET_STEM, _OUR_SWIN_STEM = (
    "encoder.backbone.conv1.weight",
    "encoder.patch_embed.proj.weight",
)

_RESNET: KeyTable = {
    "embedder.embedder.convolution": ("backbone.conv1",),
    "embedder.embedder.normalization": ("backbone.bn1",),
    **{f"{_UNIT}layer.{n}.convolution": (f"{_OUR_UNIT}conv{n + 1}",) for n in range(3)},
    **{f"{_UNIT}layer.{n}.normalization": (f"{_OUR_UNIT}bn{n + 1}",) for n in range(3)},
    f"{_UNIT}shortcut.convolution": (f"{_OUR_UNIT}downsample.0",),
    f"{_UNIT}shortcut.normalization": (f"{_OUR_UNIT}downsample.1",),
}
_SWIN: KeyTable = {
    "model.embeddings.patch_embeddings.projection": ("patch_embed.proj",),
    "model.embeddings.norm": ("patch_embed.norm",),
    f"{_BLOCK}layernorm_before": (f"{_OUR_BLOCK}norm1",),
    f"{_BLOCK}attention.self.query": (f"{_OUR_BLOCK}attn.q",),
    f"{_BLOCK}attention.self.key": (f"{_OUR_BLOCK}attn.k",),
    f"{_BLOCK}attention.self.value": (f"{_OUR_BLOCK}attn.v",),
    f"{_BLOCK}attention.self.{{p}}": (f"{_OUR_BLOCK}attn",),  # relative_position_bias_table
    f"{_BLOCK}attention.output.dense": (f"{_OUR_BLOCK}attn.proj",),
    f"{_BLOCK}layernorm_after": (f"{_OUR_BLOCK}norm2",),
    f"{_BLOCK}intermediate.dense": (f"{_OUR_BLOCK}mlp.fc1",),
    f"{_BLOCK}output.dense": (f"{_OUR_BLOCK}mlp.fc2",),
    # Patch merging ends a stage in transformers and begins the next one here.
    "model.encoder.layers.{s}.downsample.norm": ("layers.{i}.downsample.norm",),
    "model.encoder.layers.{s}.downsample.reduction": ("layers.{i}.downsample.reduction",),
    "hidden_states_norms.{s}": ("layers.{s}.norm",),
}


def _attention(theirs: str, ours: str) -> dict[str, tuple[str, ...]]:
    names = {"q_proj": "q", "k_proj": "k", "v_proj": "v", "out_proj": "out_proj"}
    in_memory = {"o_proj": "out_proj"}
    return {
        f"{_LAYER}{theirs}.{name}": (f"{_OUR_LAYER}{ours}.{target}",)
        for name, target in (names | in_memory).items()
    }


_HEADS: KeyTable = {
    # transformers numbers the maps from the coarsest one on.
    **{
        f"{_PIXELS}fpn.layers.{2 - s}.{theirs}.{n}": (f"pixel_decoder.{ours}.{s}.{n}",)
        for s in range(3)
        for theirs, ours in (("proj", "laterals"), ("block", "fusions"))
        for n in range(2)
    },
    **{f"{_PIXELS}fpn.stem.{n}": (f"pixel_decoder.fusions.3.{n}",) for n in range(2)},
    f"{_PIXELS}mask_projection": ("pixel_decoder.embedding",),
    f"{_QUERIES}input_projection": ("transformer_decoder.projection",),
    f"{_QUERIES}queries_embedder": ("transformer_decoder.query_pos",),
    **_attention("self_attn", "self_attn"),
    **_attention("encoder_attn", "cross_attn"),
    f"{_LAYER}self_attn_layer_norm": (f"{_OUR_LAYER}norm1",),
    f"{_LAYER}encoder_attn_layer_norm": (f"{_OUR_LAYER}norm2",),
    f"{_LAYER}final_layer_norm": (f"{_OUR_LAYER}norm3",),
    **{f"{_LAYER}{name}": (f"{_OUR_LAYER}{name}",) for name in ("fc1", "fc2")},
    **{f"{_LAYER}mlp.{name}": (f"{_OUR_LAYER}{name}",) for name in ("fc1", "fc2")},  # in memory
    f"{_QUERIES}decoder.layernorm": ("transformer_decoder.norm",),
    "class_predictor": ("class_head",),
    **{f"mask_embedder.{n}.0": (f"mask_head.{2 * n}",) for n in range(3)},
}

# Tensors of transformers that our network does not have
_WEIGHTS = "criterion.empty_weight"
_UNUSED_NORM = f"{_BACKBONE}model.layernorm."
_INDEX = ".relative_position_index"
_DROPPED = {
    re.escape(_WEIGHTS): "the loss's weights of the classes",
    rf"{re.escape(_UNUSED_NORM)}(weight|bias)": "built by transformers and never used",
    rf".*{re.escape(_INDEX)}": "follows from the window's size",
}


def _layout(encoder: KeyTable) -> Layout:
    return Layout("transformers MaskFormer", _ANCHOR, {_BACKBONE: "segmenter"}, encoder, _HEADS)


_RESNET_LAYOUT, _SWIN_LAYOUT = _layout(_RESNET), _layout(_SWIN)
_JOINT = ("q", "k", "v")
_OURS = Layout(
    name="segformer_pl",
    anchor="class_head.weight",
    encoder_prefixes={"encoder.": "segmenter"},
    encoder={f"{_OUR_BLOCK}attn.qkv": tuple(f"{_OUR_BLOCK}attn.{name}" for name in _JOINT)},
    head={
        f"{_OUR_LAYER}{attention}.in_proj_{{p}}": tuple(
            f"{_OUR_LAYER}{attention}.{name}" for name in _JOINT
        )
        for attention in ("self_attn", "cross_attn")
    },
    open=True,
)


def is_transformers_maskformer(tensors: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict is a MaskFormer of transformers."""
    return _ANCHOR in tensors


def own_keys(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Translate a state dict of transformers' MaskFormer to the keys of ours.

    Returns:
        Tensors by our keys; keys that were dropped on purpose -> reason; unknown keys.
    """
    dropped = {
        key: reason
        for key in tensors
        for pattern, reason in _DROPPED.items()
        if re.fullmatch(pattern, key)
    }
    kept = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    layout = _RESNET_LAYOUT if _RESNET_STEM in tensors else _SWIN_LAYOUT
    canonical, _, unknown = to_canonical(layout, _BACKBONE, kept)
    return from_canonical(_OURS, "encoder.", canonical)[0], dropped, unknown
