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
from typing import Any

import torch
from torch import Tensor

from segformer_pl.checkpoints.layouts import KeyTable, Layout, from_canonical, to_canonical
from segformer_pl.errors import UserError

_MODELS = "segformer_pl.models"

# transformers' depths and kind of block of the ResNets that timm has -> name in timm
_RESNETS: dict[tuple[tuple[int, ...], str], str] = {
    ((2, 2, 2, 2), "basic"): "resnet18",
    ((3, 4, 6, 3), "basic"): "resnet34",
    ((3, 4, 6, 3), "bottleneck"): "resnet50",
    ((3, 4, 23, 3), "bottleneck"): "resnet101",
    ((3, 8, 36, 3), "bottleneck"): "resnet152",
}
# Channels and depths of the published Swins, and their window -> name in timm
_SWINS: dict[tuple[int, tuple[int, ...], int], str] = {
    (96, (2, 2, 6, 2), 7): "swin_tiny_patch4_window7_224",
    (96, (2, 2, 18, 2), 7): "swin_small_patch4_window7_224",
    (128, (2, 2, 18, 2), 7): "swin_base_patch4_window7_224",
    (128, (2, 2, 18, 2), 12): "swin_base_patch4_window12_384",
    (192, (2, 2, 18, 2), 7): "swin_large_patch4_window7_224",
    (192, (2, 2, 18, 2), 12): "swin_large_patch4_window12_384",
}
# Settings of transformers that our network has no argument for, and their only possible value
_FIXED: dict[str, dict[str, Any]] = {
    "backbone_config": {
        "patch_size": 4,
        "mlp_ratio": 4.0,
        "qkv_bias": True,
        "use_absolute_embeddings": False,
        "layer_norm_eps": 1e-5,
        "downsample_in_first_stage": False,
        "downsample_in_bottleneck": False,
    },
    "decoder_config": {"activation_function": "relu", "position_embedding_type": "sine"},
}

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
    return _wrapper(tensors) is not None


def _wrapper(tensors: Mapping[str, Tensor]) -> str | None:
    """Return the prefix of all keys, such as ``"module."``; None for another network."""
    prefixes = [key.removesuffix(_ANCHOR) for key in tensors if key.endswith(_ANCHOR)]
    # A wrapper is a chain of attributes, and not the "my_" of "my_model.pixel_level_module".
    return next((prefix for prefix in prefixes if not prefix or prefix.endswith(".")), None)


def own_keys(
    tensors: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, str], list[str]]:
    """Translate a state dict of transformers' MaskFormer to the keys of ours.

    Returns:
        Tensors by our keys; keys that were dropped on purpose -> reason; unknown keys.
    """
    wrapper = _wrapper(tensors) or ""
    outside = [key for key in tensors if not key.startswith(wrapper)]
    tensors = {k.removeprefix(wrapper): t for k, t in tensors.items() if k.startswith(wrapper)}
    dropped = {
        key: reason
        for key in tensors
        for pattern, reason in _DROPPED.items()
        if re.fullmatch(pattern, key)
    }
    kept = {key: tensor for key, tensor in tensors.items() if key not in dropped}
    layout = _RESNET_LAYOUT if _RESNET_STEM in tensors else _SWIN_LAYOUT
    canonical, _, unknown = to_canonical(layout, _BACKBONE, kept)
    return from_canonical(_OURS, "encoder.", canonical)[0], dropped, outside + unknown


def is_ours(state: Mapping[str, Tensor]) -> bool:
    """Return whether a state dict has the keys of our MaskFormer."""
    return {"pixel_decoder.embedding.weight", "transformer_decoder.query_pos.weight"} <= set(state)


def check_heads(name: str, config: Mapping[str, Any], model: Any) -> None:
    """Compare the number of heads that a ``config.json`` states with that of our MaskFormer.

    Args:
        name: Name of the source, for messages.
        config: Content of ``config.json``; may be empty.
        model: The network to load into.

    Raises:
        UserError: They differ, which no tensor's shape shows.
    """
    stated = (config.get("decoder_config") or {}).get("decoder_attention_heads")
    heads = model.init_args().get("decoder_heads")
    if None not in (stated, heads) and stated != heads:
        raise UserError(
            f"{name} was trained with decoder_heads {stated}, and the model has {heads}; build the "
            "model that the weights are for"
        )


def network_spec(
    name: str, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the specification of the network that weights of transformers belong to.

    Sizes follow from the shapes. What shapes do not show comes from ``config.json``, or else is as
    in the published networks.

    Args:
        name: Name of the source, for messages.
        tensors: State dict of transformers.
        config: Content of ``config.json``; may be empty.

    Raises:
        UserError: The source is incomplete, or its network has settings that ours does not have.
    """
    ours, _, _ = own_keys(tensors)
    for section, fixed in _FIXED.items():
        stated = config.get(section) or {}
        for key, value in fixed.items():
            if stated.get(key, value) != value:
                raise UserError(
                    f"{name} states {key} {stated[key]} in the {section} of its config.json, and "
                    f"MaskFormer of this package has {value}; it cannot be loaded"
                )
    backbone, decoder = (config.get(key) or {} for key in _FIXED)
    try:
        num_queries, dim = ours["transformer_decoder.query_pos.weight"].shape
        encoder = _encoder_spec(name, ours, backbone)
        arguments = {
            "encoder": encoder,
            "num_classes": len(ours["class_head.weight"]) - 1,
            "num_queries": num_queries,
            "decoder_dim": dim,
            "decoder_layers": _count(ours, r"transformer_decoder\.layers\.(\d+)\."),
            "decoder_heads": decoder.get("decoder_attention_heads", 8),
            "decoder_mlp_dim": len(ours["transformer_decoder.layers.0.fc1.weight"]),
            "dropout": decoder.get("dropout", 0.1),
        }
    except KeyError as error:
        raise UserError(
            f"{name} lacks {error}, so its network cannot be built; give complete weights"
        ) from error
    losses = ("mask_weight", "dice_weight", "no_object_weight")
    arguments |= {key: float(config[key]) for key in losses if key in config}
    return {"class_path": f"{_MODELS}.maskformer.MaskFormer", "init_args": arguments}


def _encoder_spec(
    name: str, ours: Mapping[str, Tensor], backbone: Mapping[str, Any]
) -> dict[str, Any]:
    if _OUR_RESNET_STEM in ours:
        depths = tuple(_count(ours, rf"encoder\.backbone\.layer{i}\.(\d+)\.") for i in range(1, 5))
        is_deep = "encoder.backbone.layer1.0.conv3.weight" in ours
        kind = depths, "bottleneck" if is_deep else "basic"
        if kind not in _RESNETS:
            raise UserError(
                f"{name} holds a ResNet of {_numbers(depths)} {kind[1]} blocks, which timm does "
                f"not have; {', '.join(_RESNETS.values())} can be loaded"
            )
        arguments = {
            "name": _RESNETS[kind],
            "in_channels": ours[_OUR_RESNET_STEM].shape[1],
        }
        return {"class_path": f"{_MODELS}.timm_encoder.TimmEncoder", "init_args": arguments}
    dim, channels = ours[_OUR_SWIN_STEM].shape[:2]
    stages = [f"encoder.layers.{s}.blocks." for s in range(4)]
    depths = tuple(_count(ours, rf"{re.escape(stage)}(\d+)\.") for stage in stages)
    tables = [ours[f"{stage}0.attn.relative_position_bias_table"] for stage in stages]
    window = (round(len(tables[0]) ** 0.5) + 1) // 2
    arguments = {
        "name": _SWINS.get((dim, depths, window), _SWINS[96, (2, 2, 6, 2), 7]),
        "drop_path_rate": backbone.get("drop_path_rate", 0.3),
        "in_channels": channels,
    }
    if (dim, depths, window) not in _SWINS:
        heads = tuple(table.shape[1] for table in tables)
        arguments |= {"embed_dim": dim, "depths": depths, "num_heads": heads}
        arguments |= {"window_size": window}
    return {"class_path": f"{_MODELS}.swin.SwinEncoder", "init_args": arguments}


def transformers_state(model: Any) -> dict[str, Tensor]:
    """Return the state dict of our MaskFormer under the keys of transformers on disk.

    Raises:
        UserError: transformers has no such MaskFormer.
    """
    state = model.state_dict()
    name = model.encoder.init_args().get("name", "").partition(".")[0]
    is_resnet = name in _RESNETS.values() and model.encoder.out_strides == (4, 8, 16, 32)
    if not is_resnet and _OUR_SWIN_STEM not in state:
        raise UserError(
            "layout huggingface has MaskFormer on Swin and on timm's "
            f"{', '.join(_RESNETS.values())}, and this one is on {name or 'another encoder'}; use "
            "native"
        )
    layout = _RESNET_LAYOUT if is_resnet else _SWIN_LAYOUT
    canonical, _, _ = to_canonical(_OURS, "encoder.", state)
    if model.encoder.out_channels[-1] == len(state["transformer_decoder.projection.weight"]):
        raise UserError(
            "layout huggingface has no projection of the coarsest map where decoder_dim equals its "
            "channels, as here; use native"
        )
    tensors, unknown = from_canonical(layout, _BACKBONE, canonical)
    if unknown:
        raise UserError(
            f"layout huggingface cannot express this network ({unknown[0]}); use native"
        )
    # Tensors of transformers that our network does not have
    weights = torch.ones(model.num_classes + 1)
    weights[-1] = model.loss.no_object_weight
    tensors[_WEIGHTS] = weights
    if not is_resnet:
        last = state["encoder.layers.3.norm.weight"]
        tensors |= {
            f"{_UNUSED_NORM}weight": torch.ones_like(last),
            f"{_UNUSED_NORM}bias": torch.zeros_like(last),
        }
        for s, stage in enumerate(model.encoder.stages):
            for b, block in enumerate(stage.blocks):
                key = _BACKBONE + _BLOCK.format(s=s, b=b) + "attention.self"
                tensors[key + _INDEX] = block.attn.relative_position_index
    return tensors


def transformers_config(model: Any) -> dict[str, Any]:
    """Return the settings of our MaskFormer as in ``config.json``, without the classes."""
    arguments, encoder = model.init_args(), model.encoder
    drop, heads = arguments["dropout"], arguments["decoder_heads"]
    decoder = {
        "model_type": "detr",
        "d_model": arguments["decoder_dim"],
        "num_queries": arguments["num_queries"],
        "decoder_layers": arguments["decoder_layers"],
        "decoder_ffn_dim": arguments["decoder_mlp_dim"],
        "decoder_attention_heads": heads,
        "encoder_attention_heads": heads,
        **dict.fromkeys(("dropout", "attention_dropout", "activation_dropout"), drop),
    }
    stages = [f"stage{n}" for n in range(1, 5)]
    if _OUR_SWIN_STEM in model.state_dict():
        blocks = [list(stage.blocks) for stage in encoder.stages]
        backbone = {
            "model_type": "swin",
            "embed_dim": encoder.out_channels[0],
            "depths": [len(stage) for stage in blocks],
            "num_heads": [stage[0].attn.num_heads for stage in blocks],
            "window_size": blocks[0][0].window[0],
            "drop_path_rate": encoder.init_args()["drop_path_rate"],
        }
    else:
        names = {name: kind for kind, name in _RESNETS.items()}
        depths, kind = names[encoder.init_args()["name"].partition(".")[0]]
        backbone = {
            "model_type": "resnet",
            "embedding_size": 64,
            "hidden_sizes": encoder.out_channels,
            "depths": depths,
            "layer_type": kind,
        }
    dims = dict.fromkeys(("fpn_feature_size", "mask_feature_size"), arguments["decoder_dim"])
    losses = {key: arguments[key] for key in ("mask_weight", "dice_weight", "no_object_weight")}
    return {
        "model_type": "maskformer",
        "architectures": ["MaskFormerForInstanceSegmentation"],
        "backbone_config": {
            **backbone,
            "num_channels": encoder.in_channels,
            "out_features": stages,
        },
        "decoder_config": decoder,
        "cross_entropy_weight": 1.0,
        **dims,
        **losses,
    }


def _count(keys: Mapping[str, Tensor], pattern: str) -> int:
    """Return how many numbers the group of a pattern takes in the keys."""
    return len({found[1] for key in keys if (found := re.match(pattern, key))})


def _numbers(values: tuple[int, ...]) -> str:
    return ", ".join(map(str, values))
