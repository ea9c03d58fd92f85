"""Read tensors, and what is known about them, from wherever weights are kept.

A file (``.pth``, ``.bin``, ``.safetensors``, a Lightning ``.ckpt``), a folder written by
transformers' or segmentation_models_pytorch's ``save_pretrained``, a name on the Hugging Face hub,
or a state dict in memory. Nothing here knows any tensor's name.
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

from segformer_pl.checkpoints.facts import (
    checked_constants,
    checked_facts,
    names_from_id2label,
    normalization_from_preprocessor,
)
from segformer_pl.checkpoints.files import check_regular, check_usable, damaged, load_file
from segformer_pl.errors import UserError

Source = str | os.PathLike[str] | Mapping[str, Tensor]

TENSOR_FILES = ("model.safetensors", "pytorch_model.bin")
SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")

_HUB_NAME = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+?)(@(?P<revision>[\w./-]+))?")
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class Weights:
    """Tensors by their foreign names, and what came with them.

    Attributes:
        name: Where they came from, for messages.
        tensors: The state dict, on the CPU.
        config: ``config.json`` of a folder.
        preprocessor: ``preprocessor_config.json`` of a folder.
        task: Hyperparameters of the :class:`~segformer_pl.task.SegmentationTask` that they were
            trained in: ``network`` (class path and arguments), ``class_names``, ``palette``,
            ``image_mean`` and ``image_std`` (for images in 0 to 1); each only if the source states
            it.
        data: What a run's checkpoint says of the data that it was trained on: ``dataset``, the
            name, and ``labels``, what its raw values meant.
        constants: Constants that the weights depend on and that no tensor holds, by name; empty
            if the source does not state them.
    """

    name: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any] = field(default_factory=dict)
    preprocessor: Mapping[str, Any] = field(default_factory=dict)
    task: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    constants: Mapping[str, float] = field(default_factory=dict)


def read_weights(source: Source) -> Weights:
    """Read a source, whatever it is.

    Raises:
        UserError: It is not there, cut short, holds code, or holds no tensors, or some that
            cannot be weights.
    """
    weights = _read(source)
    tensors = weights.tensors
    if isinstance(source, Mapping):  # without values it can describe a network on the meta device
        tensors = {name: tensor for name, tensor in tensors.items() if not tensor.is_meta}
    check_usable(tensors, weights.name)
    return weights


def _read(source: Source) -> Weights:
    if isinstance(source, Mapping):
        return weights_from_content("the state dict", source)
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
        check_regular(path)  # says why not
    else:
        return _read_folder(path, str(source)) if is_folder else _read_file(path)
    if isinstance(source, str) and path.suffix not in SUFFIXES:
        hub_name = _HUB_NAME.fullmatch(source)
        if hub_name is not None:
            return _read_hub(hub_name["repo"], hub_name["revision"])
    raise UserError(
        f"there is no file or folder {str(source)!r}; give weights as a file "
        f"({', '.join(SUFFIXES)}), a folder written by save_pretrained, or a hub name "
        "like 'nvidia/mit-b0@COMMIT'"
    )


def _read_file(path: Path) -> Weights:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    return weights_from_content(f"'{path}'", load_file(path))


def _read_safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    size = check_regular(path)
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise damaged(path, size, error) from error
    if "segformer_pl" not in metadata:
        return Weights(f"'{path}'", tensors)
    try:
        known = json.loads(metadata["segformer_pl"])
        task = known["task"]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, size, error) from error
    name = f"'{path}'"
    facts, constants = checked_facts(name, task), checked_constants(name, known)
    return Weights(name, tensors, task=facts, constants=constants)


def weights_from_content(name: str, content: Any) -> Weights:
    """Find the state dict in what a file holds, and what stands beside it.

    Args:
        name: The file, for messages.
        content: What ``torch.load`` returned.

    Raises:
        UserError: It holds no state dict, or states facts in another form.
    """
    tensors: Any = content
    beside: Mapping[str, Any] = {}
    for key in ("state_dict", "model"):
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            tensors, beside = content[key], content
            break
    if not isinstance(tensors, Mapping) or not all(
        isinstance(key, str) and isinstance(value, Tensor) for key, value in tensors.items()
    ):
        raise UserError(
            f"{name} holds a {type(content).__name__} with no state dict in it; give one that "
            "holds named tensors, alone or as its 'state_dict'"
        )
    stated = beside.get("hyper_parameters")
    task = {} if stated is None else checked_facts(name, stated)
    task |= _facts_of_mmcv(beside, name)
    data = beside.get("StreamingSegmentationData") or {}
    if not isinstance(data, Mapping):
        raise UserError(f"{name} describes its data by a {type(data).__name__}, not by names")
    constants = checked_constants(name, beside)
    return Weights(name, tensors, task=task, data=data, constants=constants)


def _facts_of_mmcv(content: Mapping[str, Any], name: str) -> dict[str, Any]:
    """What mmcv (``meta.CLASSES``) and mmengine (``meta.dataset_meta.classes``) say of classes."""
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
    return checked_facts(name, facts)


def _read_folder(folder: Path, name: str) -> Weights:
    file = next((folder / f for f in TENSOR_FILES if (folder / f).is_file()), None)
    if file is None:
        raise UserError(
            f"folder {name!r} holds neither {' nor '.join(TENSOR_FILES)}; give the folder that "
            "save_pretrained wrote, or a file"
        )
    config = _read_json(folder / "config.json")
    preprocessor = _read_json(folder / "preprocessor_config.json")
    task = normalization_from_preprocessor(preprocessor, f"{name!r}, preprocessor_config.json")
    names = config.get("id2label") and names_from_id2label(config["id2label"], repr(name))
    if names:
        task["class_names"] = names
    extra = {"palette": "palette", "ignore_index": "semantic_loss_ignore_index"}
    task |= {ours: config[theirs] for ours, theirs in extra.items() if theirs in config}
    return replace(
        _read_file(file), name=repr(name), config=config, preprocessor=preprocessor, task=task
    )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"'{file}' is no JSON ({error}); fetch it again") from error
    if not isinstance(content, dict):
        raise UserError(f"'{file}' holds a {type(content).__name__}, not settings by name")
    return content


def _read_hub(repo: str, revision: str | None) -> Weights:
    import huggingface_hub as hub
    from huggingface_hub import errors

    name = f"{repo}@{revision}" if revision else repo
    is_pinned = revision is not None and _COMMIT.fullmatch(revision)
    if is_pinned and (folder := _fetch(repo, revision, local_files_only=True)):
        return _read_folder(folder, name)
    try:
        # Also a quick question whether there is network: downloads try again for half a minute.
        commit = hub.HfApi().model_info(repo, revision=revision, timeout=10).sha
        if not is_pinned:
            raise UserError(
                f"hub name {name!r} pins no commit, so it could mean other weights tomorrow; "
                f"write '{repo}@{commit}', which is what it means today"
            )
        folder = _fetch(repo, revision)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise UserError(
            f"the hub has no {name!r}, or hides it from you ({type(error).__name__}); check the "
            "name, or give a file or folder that is on this machine"
        ) from error
    except UserError:
        raise
    except Exception as error:  # of the network library, the hub and the cache
        raise UserError(
            f"the hub cannot be reached for {name!r} ({type(error).__name__}); without network "
            "give a file or folder that is on this machine, or fill the cache where there is "
            f"network: hf download {repo} --revision COMMIT"
        ) from error
    if folder is None:
        raise UserError(
            f"hub repository {name!r} holds neither {' nor '.join(TENSOR_FILES)}; give one that "
            "save_pretrained wrote"
        )
    return _read_folder(folder, name)


def _fetch(repo: str, revision: str | None, local_files_only: bool = False) -> Path | None:
    """The folder in the cache, with one of the files of tensors; None if there is none."""
    from huggingface_hub import errors, snapshot_download

    for file in TENSOR_FILES:
        try:
            folder = Path(
                snapshot_download(
                    repo,
                    revision=revision,
                    allow_patterns=["*config.json", file],
                    local_files_only=local_files_only,
                )
            )
        except errors.LocalEntryNotFoundError:
            if local_files_only:
                return None
            raise
        if (folder / file).is_file():
            return folder
    return None
