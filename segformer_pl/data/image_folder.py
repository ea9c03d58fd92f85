"""Images and labels as files: ``images/<split>/NAME.jpg`` with ``labels/<split>/NAME.png``."""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.files import file_size, listed, read_file
from segformer_pl.data.index import fingerprint
from segformer_pl.errors import UserError

# What Pillow reads of the formats that images are stored in; a test asks it.
PICTURES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".bmp", ".dib", ".tif", ".tiff", ".webp"),
    *(".jp2", ".j2k", ".jpc", ".jpf", ".jpx", ".j2c", ".ppm", ".pgm", ".pbm", ".pnm", ".gif"),
    *(".tga", ".avif"),
)


class PictureFolder:
    """Images ``images/<split>/NAME.jpg`` with labels ``labels/<split>/NAME.png``.

    Every pair is a row group of its own. A name may lie in sub-folders, the same for both; the
    image may have any suffix of :data:`PICTURES`. A name ends at its last dot: ``clip.001.jpg``
    goes with ``clip.001.png``.

    Attributes:
        remarks: What was not read, as (level, sentence): a label without an image is an ``error``
            in the data, a file that is no image is worth a ``warning``.

    Raises:
        UserError: An image has no label, two images share one, or a file cannot be read.
    """

    columns: list[str] | None = None

    def __init__(self, folder: Path, split: str, entry: DatasetEntry) -> None:
        self.folder, self.entry = folder, entry
        images, labels = folder / "images" / split, folder / "labels" / split
        by_name, other_images = _by_name(images, PICTURES)
        if not by_name:
            hint = f" (files of other kinds: {listed(other_images)})" if other_images else ""
            raise UserError(
                f"data.path: there is no picture in {str(images)!r}{hint}; give a folder with "
                f"pictures in images/{split} and labels of the same names, .png, in labels/{split}"
            )
        label_of, other_labels = _by_name(labels, (".png",))
        for kind, files_of in (("pictures", by_name), ("labels", label_of)):
            shared = next((files for files in files_of.values() if len(files) > 1), None)
            if shared:
                raise UserError(
                    f"data.path: the {kind} {listed([str(file) for file in shared])} have one "
                    "name, so it is not clear which of them is a sample; keep one, or give each "
                    "a label of its own name"
                )
        unlabelled = [files[0] for name, files in by_name.items() if name not in label_of]
        if unlabelled:
            stems = {_name(Path(file)): file for file in other_labels}
            name = _name(unlabelled[0].relative_to(images))
            alone = [str(f[0].relative_to(labels)) for n, f in label_of.items() if n not in by_name]
            remedy = "add them"
            if there := stems.get(name):
                remedy = f"there is {there!r}: convert labels to PNG"
            elif there := _nearest(name, [*alone, *other_labels]):
                remedy = f"there is {there!r}: name labels like their images"
            raise UserError(
                f"data.path: {len(unlabelled)} of {len(by_name)} pictures in {str(images)!r} "
                f"have no label in {str(labels)!r}, the first is {unlabelled[0].name!r}; {remedy}, "
                "or take the pictures away"
            )
        self.remarks = list(_remarks(images, labels, by_name, label_of, other_images))
        self._pairs = [(files[0], label_of[name][0], name) for name, files in by_name.items()]
        sizes = [[name, _size(image), _size(label)] for image, label, name in self._pairs]
        self.group_rows = [1] * len(self._pairs)
        self.group_bytes = [0] * len(self._pairs)
        self.fingerprint = fingerprint([[name, size] for name, size, _ in sizes], sizes)

    def read(self, group: int) -> Sequence[Mapping[str, Any]]:
        image, label, name = self._pairs[group]
        row = {
            self.entry.image_column: read_file(image),
            self.entry.label_column: read_file(label),
        }
        return [row if self.entry.id_column is None else row | {self.entry.id_column: name}]

    def read_file(self, path: str) -> bytes:
        raise UserError(f"the row names the file {path!r}")  # rows of files hold their content

    def name(self, group: int, row: int) -> str:
        return self._pairs[group][2]


def _by_name(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """Files with one of the suffixes by their name, in the order of their paths; and the others."""
    by_name: dict[str, list[Path]] = {}
    others = []
    for file in sorted(_files_below(folder, frozenset())):
        relative = file.relative_to(folder)
        if file.suffix.lower() in suffixes:
            by_name.setdefault(_name(relative), []).append(file)
        else:
            others.append(str(relative))
    return by_name, others


def _files_below(folder: Path, above: frozenset[str]) -> Iterator[Path]:
    """All files below, also where links lead to folders, unless a link leads back up.

    Hidden ones are passed over: file managers and editors leave them, such as ``._NAME.png``.
    """
    real = os.path.realpath(folder)
    if real in above:
        return
    try:
        entries = list(os.scandir(folder))
    except FileNotFoundError:
        return
    except OSError as error:
        raise UserError(
            f"data.path: {str(folder)!r} cannot be read ({error.strerror}); give a folder that can"
        ) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(folder / entry.name, above | {real})
        else:
            yield folder / entry.name


def _name(file: Path) -> str:
    """Without suffix, in composed form: some systems store an é as e and an accent."""
    return unicodedata.normalize("NFC", str(file.with_suffix("")))


def _nearest(name: str, labels: Sequence[str]) -> str | None:
    """The shortest label that has the name of an image as a part of its own, such as NAME_mask."""
    part = re.compile(rf"(?<![0-9a-z]){re.escape(name.casefold())}(?![0-9])")
    near = [label for label in labels if part.search(_name(Path(label)).casefold())]
    return min(near, key=len, default=None)


def _size(file: Path) -> int:
    try:
        return file_size(file)
    except UserError as error:
        raise UserError(f"data.path: {error}") from error


def _remarks(
    images: Path,
    labels: Path,
    by_name: Mapping[str, Any],
    label_of: Mapping[str, Sequence[Path]],
    other_images: Sequence[str],
) -> Iterator[tuple[str, str]]:
    alone = [files[0] for name, files in label_of.items() if name not in by_name]
    # Files beside an image, such as its .json, belong to it.
    unread = [file for file in other_images if _name(Path(file)) not in by_name]
    if alone:
        first = _name(alone[0].relative_to(labels))
        there = next((file for file in unread if _name(Path(file)) == first), None)
        yield (
            "error",
            f"data.path: {len(alone)} of {len(label_of)} labels in {str(labels)!r} have no picture "
            f"in {str(images)!r} and are not used, the first is {alone[0].name!r}"
            + (f" (there is {there!r}, which is not read)" if there else "")
            + "; add the pictures, or take the labels away",
        )
    if unread:
        yield (
            "warning",
            f"data.path: {len(unread)} files in {str(images)!r} are not read, for their suffix is "
            f"none of a picture: {listed(unread)}; convert them to PNG or JPEG if they are some",
        )
