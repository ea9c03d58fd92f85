"""Read tensors, and the facts that are stored beside them, from any source.

A source is a file (``.pth``, ``.bin``, ``.safetensors``, a Lightning ``.ckpt``), a folder written
by ``save_pretrained`` of transformers or segmentation_models_pytorch, a name on the Hugging Face
hub, or a state dict in memory. This module does not depend on what the tensors are.
"""

import json
import os
import re
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from segformer_pl.checkpoints import hub
from segformer_pl.checkpoints.facts import (
    are_placeholders,
    checked_constants,
    checked_facts,
    names_from_id2label,
    normalization_from_preprocessor,
    protocol_from_preprocessor,
)
from segformer_pl.checkpoints.files import (
    check_regular,
    check_usable,
    damaged,
    load_file,
    open_file,
)
from segformer_pl.checkpoints.pretrained_folder import (
    TENSOR_FILES,
    check_shards,
    is_tensor_file,
    tensor_files,
)
from segformer_pl.checkpoints.state_dicts import find_state_dict
from segformer_pl.errors import UserError

WeightsSource = str | os.PathLike[str] | Mapping[str, Tensor]

SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Weights:
    """A state dict in the source's own layout, and the facts that the source states about it.

    Attributes:
        name: Name of the source, for messages.
        tensors: The state dict. Read from a file or folder, it is on the CPU.
        config: Content of a folder's ``config.json``.
        preprocessor: Content of a folder's ``preprocessor_config.json``.
        task: Hyperparameters of the :class:`~segformer_pl.task.SegmentationTask` that trained the
            weights, as far as the source states them: ``network`` (class path and arguments),
            ``class_names``, ``palette``, ``ignore_index``, ``inference``, ``image_mean`` and
            ``image_std`` (for images in 0 to 1).
        data: Training data of a run's checkpoint: ``dataset``, its name, and ``labels``, the
            meaning of its raw values.
        constants: Constants that the weights depend on and that no tensor holds, by name. Empty if
            the source does not state them.
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)


def read_weights(source: WeightsSource, state: str | None = None) -> Weights:
    """Read weights from a file, a folder, the hub or a state dict.

    Args:
        source: Path of a file or folder, hub name ``owner/name@commit``, or a state dict.
        state: Name of the copy to read from a file that holds several, such as an average (EMA)
            beside the weights; see :mod:`~segformer_pl.checkpoints.state_dicts`. A file that holds
            several is refused without it, with their names.

    Raises:
        UserError: The source does not exist, is cut short, holds code, holds no tensors or several
            copies of them, or holds tensors that cannot be weights.
    """
    weights = _read(source, state)
    tensors = weights.tensors
    # A state dict on the meta device has shapes and no values. It fits a network on that device.
    if isinstance(source, Mapping):
        tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    check_usable(tensors, weights.name)
    return weights


def _read(source: WeightsSource, state: str | None) -> Weights:
    if isinstance(source, Mapping):
        return weights_from_content("the state dict", source, state)
    if not isinstance(source, str | os.PathLike):
        raise UserError(
            f"weights cannot come from a {type(source).__name__}; give a file, a folder, a hub "
            "name or a state dict"
        )
    path = Path(os.path.expanduser(source))
    try:
        is_folder = stat.S_ISDIR(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        pass
    except (OSError, ValueError):
        check_regular(path)  # raises a UserError with the reason
    else:
        if is_folder:
            return _read_folder(path, str(source), state)
        if is_tensor_file(path):
            return _read_folder(path.parent, str(source), state, [path])
        return _read_file(path, state)
    if isinstance(source, str) and path.suffix not in SUFFIXES:
        hub_name = _HUB_NAME.fullmatch(source)
        if hub_name is not None:
            folder = hub.pinned_folder(hub_name["repo"], hub_name["revision"])
            return _read_folder(folder, source, state)
    raise UserError(
        f"there is no file or folder {str(source)!r}; give weights as a file "
        f"({', '.join(SUFFIXES)}), a folder written by save_pretrained, or a hub name "
        "like 'nvidia/mit-b0@COMMIT'"
    )


def _read_file(path: Path, state: str | None) -> Weights:
    if path.suffix == ".safetensors":
        return _read_safetensors(path, state)
    return weights_from_content(f"'{path}'", load_file(path), state)


def _read_safetensors(path: Path, state: str | None) -> Weights:
    from safetensors import SafetensorError, safe_open

    with open_file(path) as stream:  # whose errors safe_open's do not tell from damage
        size = os.fstat(stream.fileno()).st_size
    try:
        with safe_open(path, framework="pt") as file:
            content = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path, size, error) from error
    name = f"'{path}'"
    tensors = find_state_dict(name, content, state)
    if "segformer_pl" not in metadata:
        return Weights(name, tensors)
    try:
        known = json.loads(metadata["segformer_pl"])
        task = known["task"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, size, error) from error
    facts, constants = checked_facts(name, task), checked_constants(name, known)
    return Weights(name, tensors, task=facts, constants=constants)


def weights_from_content(name: str, content: Any, state: str | None = None) -> Weights:
    """Extract the state dict, and the facts beside it, from the content of a file.

    Args:
        name: Name of the file, for messages.
        content: Return value of ``torch.load``.
        state: See :func:`read_weights`.

    Raises:
        UserError: The content holds no state dict or several, or a fact in the wrong form.
    """
    tensors = find_state_dict(name, content, state)
    is_alone = all(isinstance(value, Tensor) for value in content.values())
    beside: Mapping[str, Any] = {} if is_alone else content
    stated = beside.get("hyper_parameters")
    task = {} if stated is None else checked_facts(name, stated)
    task |= _facts_of_mmcv(beside, name)
    data = beside.get("StreamingSegmentationData") or {}
    if not isinstance(data, Mapping):
        raise UserError(
            f"{name} describes its data by a {type(data).__name__}; it has to be a dict"
        )
    constants = checked_constants(name, beside)
    return Weights(name, tensors, task=task, data=data, constants=constants)


def _facts_of_mmcv(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return the classes that mmcv (``meta.CLASSES``) or mmengine (``meta.dataset_meta``) state."""
    meta = content.get("meta")
    if not isinstance(meta, Mapping):
        return {}
    newer = meta.get("dataset_meta")
    if isinstance(newer, Mapping):
        names, palette = newer.get("classes"), newer.get("palette")
    else:
        names, palette = meta.get("CLASSES"), meta.get("PALETTE")
    facts = {"class_names": names, "palette": palette}
    facts = {key: list(v) if isinstance(v, tuple) else v for key, v in facts.items() if v}
    facts = checked_facts(name, facts)
    if are_placeholders(facts.get("class_names", [""])):
        del facts["class_names"]
    return facts


def _read_folder(
    folder: Path, name: str, state: str | None, files: list[Path] | None = None
) -> Weights:
    """Read a folder: its own files of tensors or the given ones, and the facts beside them."""
    files = tensor_files(folder, name) if files is None else files
    if not files:
        raise UserError(
            f"folder {name!r} holds neither {' nor '.join(TENSOR_FILES)}; give the folder that "
            "save_pretrained wrote, or a file"
        )
    check_shards(files)
    config = _read_json(folder / "config.json")
    preprocessor = _read_json(folder / "preprocessor_config.json")
    task = normalization_from_preprocessor(preprocessor, f"{name!r}, preprocessor_config.json")
    if protocol := protocol_from_preprocessor(preprocessor):
        task["inference"] = protocol
    names = config.get("id2label") and names_from_id2label(config["id2label"], repr(name))
    if names:
        task["class_names"] = names
    extra = {"palette": "palette", "ignore_index": "semantic_loss_ignore_index"}
    task |= {ours: config[theirs] for ours, theirs in extra.items() if theirs in config}
    task = checked_facts(repr(name), task)
    first, *shards = (_read_file(file, state) for file in files)
    tensors = dict(first.tensors)
    for shard in shards:
        tensors |= shard.tensors
    # A native file states more than the folder does.
    facts = {"config": config, "preprocessor": preprocessor, "task": {**task, **first.task}}
    return replace(first, name=repr(name), tensors=tensors, **facts)


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{file}' is not valid JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(
            f"'{file}' holds a {type(content).__name__}; it has to hold a JSON object of settings"
        )
    return content
