"""Export a network to a file or folder that another code base, or this one, opens."""

import inspect
import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save
from torch import Tensor

from segformer_pl.atomic import WriteError, atomic_write, atomic_write_text
from segformer_pl.checkpoints import maskformer_layout
from segformer_pl.checkpoints.facts import protocol_from_preprocessor
from segformer_pl.checkpoints.layouts import (
    NATIVE,
    NVLABS,
    SMP,
    TRANSFORMERS_DISK,
    Layout,
    from_canonical,
)
from segformer_pl.checkpoints.loading import encoder_arguments, variants
from segformer_pl.checkpoints.matching import canonical_tensors, native_prefix
from segformer_pl.checkpoints.networks import build
from segformer_pl.checkpoints.report import listed
from segformer_pl.checkpoints.sources import SUFFIXES
from segformer_pl.errors import UserError
from segformer_pl.models.mit import MixTransformer
from segformer_pl.models.segmenter import Encoder, Segmenter
from segformer_pl.normalization import IMAGENET_MEAN, IMAGENET_STD

ExportLayout = Literal["huggingface", "nvlabs", "smp", "native"]

LAYOUTS = {"huggingface": TRANSFORMERS_DISK, "nvlabs": NVLABS, "smp": SMP, "native": NATIVE}
# The networks that a layout can hold. The native one holds every network of the contract.
SERVES = {
    "huggingface": "SegFormer on MiT, MiT alone, and MaskFormer on Swin or ResNet",
    "nvlabs": "SegFormer on MiT and MiT alone",
    "smp": "SegFormer on MiT",
}
CONV_SEG_CHANNELS = 128  # `channels` of the decode head in the reference's configurations
FILE_SUFFIX = {"nvlabs": ".pth", "native": ".safetensors"}  # the other layouts are folders

# Arguments of MixTransformer that are fixed in the other code bases. Some layouts can express other
# values of some of them, see _check_expressible.
ENCODER_DEFAULTS = {
    name: parameter.default
    for name, parameter in inspect.signature(MixTransformer).parameters.items()
    if parameter.default is not inspect.Parameter.empty
} | {"paddings": (3, 1, 1, 1)}


def export_weights(
    model: Any,
    destination: str | Path,
    layout: ExportLayout,
    task: Mapping[str, Any] | None = None,
    preprocessor: Mapping[str, Any] | None = None,
) -> list[str]:
    """Export a network in the layout of a code base. On an error no file is left behind.

    - ``"huggingface"``: a folder that ``SegformerForSemanticSegmentation.from_pretrained`` opens
      (``SegformerModel`` for an encoder alone), or ``MaskFormerForInstanceSegmentation``, with
      ``config.json``, ``model.safetensors`` and ``preprocessor_config.json``. The metadata of
      ``model.safetensors`` hold what these files cannot state and this package reads: the
      specification, the constants and the test-time protocol;
    - ``"smp"``: a folder that ``segmentation_models_pytorch.from_pretrained`` opens;
    - ``"nvlabs"``: a ``.pth`` file with ``state_dict`` and ``meta``; for an encoder alone the bare
      state dict;
    - ``"native"``: a ``.safetensors`` file with the network's own keys, for any network that keeps
      the contract. Its metadata hold the specification (``spec()``), the facts of the task and the
      constants that the weights depend on.

    Args:
        model: A segmenter or an encoder. Layouts other than ``"native"`` serve SegFormer and MiT,
            ``"huggingface"`` MaskFormer too.
        destination: Path of the file or folder to write, which must not exist.
        layout: Layout of the result.
        task: Facts about classes, images and network that are stored with the weights, see
            :class:`~segformer_pl.checkpoints.sources.Weights`.
        preprocessor: Content of the source's ``preprocessor_config.json``, if it had one.

    Returns:
        Remarks on what the other code base will do differently, one sentence each.

    Raises:
        UserError: The destination exists, has the wrong form or cannot be written, or the layout
            cannot express the network.
    """
    destination = Path(destination).expanduser()
    task = dict(task or {})
    check_destination(destination, layout)
    _check_expressible(model, layout)
    tensors = _tensors(model, layout)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        # Write beside the destination and rename at the end, so that it is complete or absent.
        with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".export-") as work:
            temporary = Path(work) / destination.name
            if layout == "huggingface":
                remarks = _write_huggingface(model, temporary, tensors, task, preprocessor or {})
            elif layout == "smp":
                remarks = _write_smp(model, temporary, tensors)
            elif layout == "nvlabs":
                remarks = _write_nvlabs(model, temporary, tensors, task)
            else:
                remarks = _write_native(model, temporary, tensors, task)
            os.replace(temporary, destination)
    except OSError as error:
        reason: Any = error.__cause__ if isinstance(error, WriteError) else error
        raise UserError(
            f"'{destination}' cannot be written ({reason.strerror}); give another place"
        ) from error
    return remarks + _eps_remarks(model, layout) + _lost_facts(task, layout)


def save_pretrained(model: Any, folder: Path, task: Mapping[str, Any]) -> str | None:
    """Write a network as the files of a hub repository; files of the same names are replaced.

    The layout is that of transformers where it can express the network. Otherwise
    ``model.safetensors`` is a native file, beside a ``config.json`` with the class names.

    Args:
        model: A segmenter.
        folder: An existing folder.
        task: Facts about classes and images, see :func:`export_weights`.

    Returns:
        Name of the class of transformers that opens the folder; None if there is none.

    Raises:
        UserError: A file cannot be written, or the network is not described by plain data.
    """
    opener = transformers_class(model)
    with tempfile.TemporaryDirectory(dir=folder, prefix=".export-") as work:
        written = Path(work) / "files"
        if opener is not None:
            export_weights(model, written, "huggingface", task)
        else:
            export_weights(model, written / "model.safetensors", "native", task)
            config = {"architectures": [type(model).__name__], "num_channels": model.in_channels}
            _write_json(written / "config.json", config | _labels(task["class_names"]))
        for file in written.iterdir():
            os.replace(file, folder / file.name)
    return opener


def transformers_class(model: Any) -> str | None:
    """Return the class of transformers that opens a network's weights; None if none does."""
    try:
        _check_expressible(model, "huggingface")
        _foreign_state(model, "huggingface")
    except UserError:
        return None
    return _transformers_config(model)["architectures"][0]


def check_destination(destination: str | Path, layout: ExportLayout) -> None:
    """Check a destination. The command calls this before it reads any weights.

    Args:
        destination: Path of the file or folder to write.
        layout: Layout of the export.

    Raises:
        UserError: The layout is unknown, or the destination exists or has the wrong form for it.
    """
    destination = Path(destination).expanduser()
    if layout not in LAYOUTS:
        raise UserError(f"layout={layout!r}: choose one of {', '.join(LAYOUTS)}")
    if destination.exists():
        raise UserError(f"'{destination}' exists already; remove it or give another path")
    suffix = FILE_SUFFIX.get(layout, "")
    if suffix and destination.suffix != suffix:
        raise UserError(
            f"layout {layout} is a file that ends in {suffix}, and '{destination}' does not; "
            f"give a path with {suffix}"
        )
    if not suffix and destination.suffix in SUFFIXES:
        raise UserError(
            f"layout {layout} is a folder, and '{destination}' looks like a file; leave out "
            f"{destination.suffix}"
        )


def _tensors(model: Any, layout: ExportLayout) -> dict[str, Tensor]:
    """Return the network's tensors under the layout's keys."""
    state = model.state_dict() if layout == "native" else _foreign_state(model, layout)
    # Convolution weights are channels-last in memory; files hold them in contiguous order.
    return {
        key: tensor.detach().cpu().contiguous(memory_format=torch.contiguous_format)
        for key, tensor in state.items()
    }


def _foreign_state(model: Any, layout: ExportLayout) -> dict[str, Tensor]:
    if _is_maskformer(model):
        return maskformer_layout.transformers_state(model)
    table: Layout = LAYOUTS[layout]
    segmenter, *encoder = table.encoder_prefixes
    if isinstance(model, Segmenter):
        prefix = segmenter
    elif encoder:
        prefix = encoder[0]
    else:
        raise UserError(
            f"layout {layout} is for whole segmenters, and this is an encoder alone; use nvlabs, "
            "huggingface or native"
        )
    state, inexpressible = from_canonical(table, prefix, canonical_tensors(model))
    if inexpressible:
        raise UserError(
            f"layout {layout} cannot express this network ({listed(inexpressible)}); use native"
        )
    return state


def _check_expressible(model: Any, layout: ExportLayout) -> None:
    """Refuse a network that the other code base would silently compute in another way.

    Raises:
        UserError: The layout serves other networks, or cannot express an argument of this one.
    """
    if layout == "native" or (layout == "huggingface" and _is_maskformer(model)):
        return
    if native_prefix(model) is None:
        advice = "huggingface or native" if _is_maskformer(model) else "native"
        raise UserError(
            f"layout {layout} serves {SERVES[layout]}, and this is {_described(model)}; use "
            f"{advice}, as native serves every network"
        )
    arguments = encoder_arguments(model)
    # Epsilons have a remark of their own, and drop path acts in training only.
    ignored = {"norm_eps", "conv_norm_eps", "drop_path_rate"}
    if layout == "huggingface":
        free = {"num_heads", "mlp_ratio", "sr_ratios", "patch_sizes", "strides", "in_channels"}
        fixed = ENCODER_DEFAULTS | {"paddings": tuple(k // 2 for k in arguments["patch_sizes"])}
    else:
        free = {"in_channels"} if layout == "smp" else set()
        fixed = ENCODER_DEFAULTS
        if (arguments["embed_dims"], arguments["depths"]) not in variants():
            fixed = fixed | {"embed_dims": "those of a variant"}
    changed = [
        f"{name} {arguments[name]}"
        for name, value in fixed.items()
        if name not in free | ignored and arguments[name] != value
    ]
    if (indices := model.init_args().get("in_indices", (0, 1, 2, 3))) != (0, 1, 2, 3):
        changed.append(f"in_indices {indices}")
    if changed:
        raise UserError(
            f"layout {layout} cannot express this network ({', '.join(changed)}); use native"
        )


def _described(model: Any) -> str:
    """Return the class of a network, and that of the encoder in it."""
    inside = [type(child).__name__ for child in model.children() if isinstance(child, Encoder)]
    return " on ".join([f"a {type(model).__name__}", *inside[:1]])


def _is_maskformer(model: Any) -> bool:
    return maskformer_layout.is_ours(model.state_dict())


def _eps_remarks(model: Any, layout: ExportLayout) -> list[str]:
    """Return a remark if the other code base computes with other LayerNorm epsilons."""
    ours, theirs = model.weight_constants(), LAYOUTS[layout].constants
    if not theirs or theirs == ours or _is_maskformer(model):
        return []
    return [
        f"LayerNorm epsilons are {ours['norm_eps']:g} in blocks and stages and "
        f"{ours['conv_norm_eps']:g} after convolutions here, and {theirs['norm_eps']:g} and "
        f"{theirs['conv_norm_eps']:g} there: expect logits that differ by about 1e-6 of their size"
    ]


def _lost_facts(task: Mapping[str, Any], layout: ExportLayout) -> list[str]:
    """Return a remark on the facts that the layout cannot store."""
    lost = {
        "nvlabs": ("image_mean", "image_std"),
        "smp": ("class_names", "palette", "image_mean", "image_std"),
    }
    names = [name for name in lost.get(layout, ()) if task.get(name)]
    if not names:
        return []
    return [f"the layout cannot store {', '.join(names)}; keep them elsewhere"]


def _write_huggingface(
    model: Any,
    folder: Path,
    tensors: dict[str, Tensor],
    task: Mapping[str, Any],
    preprocessor: Mapping[str, Any],
) -> list[str]:
    remarks = []
    is_maskformer = _is_maskformer(model)
    config = _transformers_config(model)
    config["dtype"] = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    if isinstance(model, Segmenter):
        num_classes = model.num_classes
        names = task.get("class_names", [])
        if len(names) != num_classes:
            if names:
                remarks.append(
                    f"the source names {len(names)} classes and has {num_classes}, so config.json "
                    "names them LABEL_0, LABEL_1, ..."
                )
            names = [f"LABEL_{n}" for n in range(num_classes)]
        config |= {"semantic_loss_ignore_index": task.get("ignore_index", 255), **_labels(names)}
        if task.get("palette"):  # transformers ignores and keeps entries that it does not know
            config["palette"] = [list(color) for color in task["palette"]]
    is_protocol_stated = protocol_from_preprocessor(preprocessor) is not None
    beside = {} if is_protocol_stated else {"inference": task.get("inference")}
    processor = "MaskFormerImageProcessor" if is_maskformer else "SegformerImageProcessor"
    default = "the shorter side to 800 pixels" if is_maskformer else "every image to 512x512"
    if not preprocessor:
        preprocessor = {
            "image_processor_type": processor,
            "do_resize": False,
            "do_rescale": True,
            "rescale_factor": 1 / 255,
            "do_normalize": True,
            "image_mean": task.get("image_mean", IMAGENET_MEAN),
            "image_std": task.get("image_std", IMAGENET_STD),
            "do_reduce_labels": False,
        }
        remarks.append(
            "preprocessor_config.json normalises and does not resize, while transformers' own "
            f"default resizes {default}"
        )
    if model.in_channels == 3:
        # Without it, transformers fails on grey images and on palettes.
        preprocessor = {"do_convert_rgb": True, **preprocessor}
        remarks.append(
            "transformers converts every Pillow image to RGB (do_convert_rgb), which drops alpha "
            "and keeps the colour below it, as `predict` does; blend transparent images yourself"
        )
    folder.mkdir()
    _write_json(folder / "config.json", config)
    _write_json(folder / "preprocessor_config.json", preprocessor)
    _write_safetensors(folder / "model.safetensors", tensors, _description(model, beside))
    return remarks


def _labels(class_names: Sequence[str]) -> dict[str, Any]:
    """Return the entries of transformers' ``config.json`` that name the classes."""
    return {
        "id2label": {str(n): name for n, name in enumerate(class_names)},
        "label2id": {name: n for n, name in enumerate(class_names)},
    }


def _transformers_config(model: Any) -> dict[str, Any]:
    if _is_maskformer(model):
        return maskformer_layout.transformers_config(model)
    return _segformer_config(model)


def _segformer_config(model: Any) -> dict[str, Any]:
    arguments = encoder_arguments(model)
    config: dict[str, Any] = {
        "model_type": "segformer",
        "architectures": ["SegformerModel"],
        "num_channels": arguments["in_channels"],
        "num_encoder_blocks": 4,
        "hidden_sizes": arguments["embed_dims"],
        "depths": arguments["depths"],
        "num_attention_heads": arguments["num_heads"],
        "sr_ratios": arguments["sr_ratios"],
        "patch_sizes": arguments["patch_sizes"],
        "strides": arguments["strides"],
        "mlp_ratios": [arguments["mlp_ratio"]] * 4,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "drop_path_rate": arguments["drop_path_rate"],
        "layer_norm_eps": arguments["norm_eps"],
        "initializer_range": 0.02,
        "reshape_last_stage": True,
    }
    if isinstance(model, Segmenter):
        whole = model.init_args()
        config |= {
            "architectures": ["SegformerForSemanticSegmentation"],
            "decoder_hidden_size": whole["decoder_dim"],
            "classifier_dropout_prob": whole["dropout"],
        }
    return config


def _write_smp(model: Any, folder: Path, tensors: dict[str, Tensor]) -> list[str]:
    arguments, whole = encoder_arguments(model), model.init_args()
    config = {
        "_model_class": "Segformer",
        "encoder_name": f"mit_{variants()[arguments['embed_dims'], arguments['depths']]}",
        "encoder_weights": None,
        "encoder_depth": 5,
        "decoder_segmentation_channels": whole["decoder_dim"],
        "in_channels": arguments["in_channels"],
        "classes": whole["num_classes"],
        "activation": None,
        "upsampling": 4,
        "aux_params": None,
    }
    folder.mkdir()
    _write_json(folder / "config.json", config)
    _write_safetensors(folder / "model.safetensors", tensors)
    return [
        "segmentation_models_pytorch upsamples the logits inside the network, with "
        "align_corners=True, takes sides that are multiples of 32, and has no dropout"
    ]


def _write_nvlabs(
    model: Any,
    file: Path,
    tensors: dict[str, Tensor],
    task: Mapping[str, Any],
) -> list[str]:
    if not isinstance(model, Segmenter):
        _save(file, tensors)
        return []
    # init_segmentor of mmsegmentation 0.x reads both entries; without a palette, it draws colours.
    names = task.get("class_names") or [f"LABEL_{n}" for n in range(model.num_classes)]
    like = next(iter(tensors.values()))
    unused = {
        "decode_head.conv_seg.weight": like.new_zeros(model.num_classes, CONV_SEG_CHANNELS, 1, 1),
        "decode_head.conv_seg.bias": like.new_zeros(model.num_classes),
    }
    meta = {"CLASSES": names, "PALETTE": task.get("palette")}
    _save(file, {"state_dict": tensors | unused, "meta": meta})
    return [
        "decode_head.conv_seg, which the reference code builds and never uses, is zero in the file"
    ]


def _write_native(
    model: Any,
    file: Path,
    tensors: dict[str, Tensor],
    task: Mapping[str, Any],
) -> list[str]:
    _write_safetensors(file, tensors, _description(model, task))
    return []


def _description(model: Any, task: Mapping[str, Any]) -> dict[str, str]:
    """Return the metadata of a file by which this package builds the network again."""
    metadata = {
        "task": {**task, "network": model.spec()},
        "weight_constants": model.weight_constants(),
    }
    try:
        text = json.dumps(metadata)
    except TypeError as error:
        raise UserError(
            f"the network or its task is not described by plain data ({error}); return numbers, "
            "strings and lists from init_args()"
        ) from error
    with torch.device("meta"):
        build(model.spec(), "init_args()")  # what is written here can be read again
    return {"segformer_pl": text}


def _save(file: Path, content: dict[str, Any]) -> None:
    # Serialise to memory first: on a full disk torch.save would raise an error that is no OSError.
    buffer = BytesIO()
    torch.save(content, buffer)
    with atomic_write(file) as stream:
        stream.write(buffer.getbuffer())


def _write_json(file: Path, content: Mapping[str, Any]) -> None:
    atomic_write_text(file, json.dumps(content, indent=2) + "\n")


def _write_safetensors(
    file: Path, tensors: dict[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    # On a full disk safetensors' save_file would raise an error that is no OSError.
    with atomic_write(file) as stream:
        stream.write(save(tensors, metadata={"format": "pt", **(metadata or {})}))
