"""The files of tensors in a folder that ``save_pretrained`` of transformers wrote.

::

    model.safetensors                        one file
    model.fp16.safetensors                   a variant, such as half precision
    model.safetensors.index.json             shards: tensor -> file
    model-00001-of-00002.safetensors
    pytorch_model.bin, ...                   the same as pickles
"""

import json
import re
from pathlib import Path

from segformer_pl.errors import UserError

# (file, index of its shards), in the order of preference
_FORMS = (
    ("model.safetensors", "model.safetensors.index.json"),
    ("pytorch_model.bin", "pytorch_model.bin.index.json"),
)
TENSOR_FILES = tuple(file for file, _ in _FORMS)

# Patterns of file names, of which a download needs the first that a repository has.
DOWNLOADS = (
    ("model.safetensors",),
    ("model.safetensors.index.json", "model-*.safetensors"),
    ("pytorch_model.bin",),
    ("pytorch_model.bin.index.json", "pytorch_model-*.bin"),
    ("model.safetensors.index.*.json", "model*.safetensors"),
    ("pytorch_model.bin.index.*.json", "pytorch_model*.bin"),
)

_VARIANT = r"\.(?P<variant>[\w-]+)\."
_FILES = re.compile(r"(model|pytorch_model)(\.[\w-]+)?\.(safetensors|bin)")
_SHARD = re.compile(r".*-\d{5}-of-\d{5}")


def is_tensor_file(file: Path) -> bool:
    """Return whether a file is one that ``save_pretrained`` wrote, beside its ``config.json``."""
    is_named = _FILES.fullmatch(file.name) is not None
    return is_named and (file.parent / "config.json").is_file()


def tensor_files(folder: Path, name: str) -> list[Path]:
    """Return the files that hold the tensors of a folder: one, or all shards. Empty if none do.

    Files without a variant are preferred to those with one, and ``.safetensors`` to ``.bin``.

    Args:
        folder: The folder.
        name: Its name, for messages.

    Raises:
        UserError: Several variants are there and nothing else, or an index of shards is damaged.
    """
    for file, index in _FORMS:
        if (folder / file).is_file():
            return [folder / file]
        if (folder / index).is_file():
            return _shards(folder / index)
    for file, index in _FORMS:
        variants = _variants(folder, file) | _variants(folder, index)
        if len(variants) > 1:
            raise UserError(
                f"folder {name!r} holds the variants {', '.join(sorted(variants))}; give the file "
                f"of one, such as '{min(variants.values())}'"
            )
        for found in variants.values():
            return _shards(found) if found.suffix == ".json" else [found]
    return []


def check_shards(files: list[Path]) -> None:
    """Raise a UserError if one of the files that :func:`tensor_files` returned is missing."""
    if missing := [file for file in files if not file.is_file()]:
        raise UserError(
            f"'{missing[0].parent}' lacks {missing[0].name}, which its index names as one of "
            f"{len(files)} shards; copy or fetch all of them"
        )


def _variants(folder: Path, file: str) -> dict[str, Path]:
    """Return the files with a variant in their names: variant -> file."""
    stem, _, suffix = file.rpartition(".")
    pattern = re.compile(re.escape(stem) + _VARIANT + re.escape(suffix))
    found = {path: pattern.fullmatch(path.name) for path in folder.iterdir()}
    variants = {match["variant"]: path for path, match in found.items() if match}
    return {name: path for name, path in variants.items() if not _SHARD.fullmatch(name)}


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_valid = all(Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"'{index}' is no index of shards ({type(error).__name__}); fetch it again"
        ) from error
    if not names or not is_valid:
        raise UserError(f"'{index}' names no files beside it; fetch it again")
    return [index.parent / name for name in names]
