"""The source for image and label files: ``images/<split>/a.jpg``, ``labels/<split>/a.png``."""

import os
import re
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from segformer_pl.data.catalog import DatasetEntry
from segformer_pl.data.files import file_size, listed, read_file
from segformer_pl.data.image_suffixes import IMAGE_SUFFIXES
from segformer_pl.data.index import fingerprint
from segformer_pl.errors import UserError


class ImageFolder:
    """Pairs of image and label files; implements :class:`~segformer_pl.data.sources.Source`.

    The pairs are ``images/<split>/NAME.jpg`` and ``labels/<split>/NAME.png``, each a row group of
    one row. A name may include sub-folders, and an image may have any suffix of
    :data:`~segformer_pl.data.image_suffixes.IMAGE_SUFFIXES`. A name ends at its last dot:
    ``clip.001.jpg`` belongs to ``clip.001.png``.

    Args:
        folder: Folder that holds ``images`` and ``labels``.
        split: Name of the split as stored.
        entry: Catalogue entry with the names of the columns to return.

    Attributes:
        remarks: Files that are left out, as (level, message). A label without an image is an
            ``error`` in the data set, a file that is no image is a ``warning``.

    Raises:
        UserError: An image has no label, two files have the same name, or a file cannot be read.
    """

    columns: list[str] | None = None

    def __init__(self, folder: Path, split: str, entry: DatasetEntry) -> None:
        self.folder, self.entry = folder, entry
        images, labels = folder / "images" / split, folder / "labels" / split
        images_by_name, other_images = _by_name(images, IMAGE_SUFFIXES)
        if not images_by_name:
            hint = f" (files of other kinds: {listed(other_images)})" if other_images else ""
            raise UserError(
                f"data.path: no images in {str(images)!r}{hint}; give a folder with images in "
                f"images/{split} and labels of the same names, .png, in labels/{split}"
            )
        if not labels.exists():
            raise UserError(f"data.path: {_describe_missing_labels(folder, split)}")
        labels_by_name, other_labels = _by_name(labels, (".png",))
        for kind, by_name in (("images", images_by_name), ("labels", labels_by_name)):
            shared = next((files for files in by_name.values() if len(files) > 1), None)
            if shared:
                raise UserError(
                    f"data.path: the {kind} {listed([str(file) for file in shared])} have the same "
                    "name, so it is not clear which of them is a sample; keep one, or give each "
                    "image its own name and label"
                )
        unlabelled = [
            files[0] for name, files in images_by_name.items() if name not in labels_by_name
        ]
        if unlabelled:
            stems = {_name(Path(file)): file for file in other_labels}
            name = _name(unlabelled[0].relative_to(images))
            unused = [
                str(files[0].relative_to(labels))
                for other, files in labels_by_name.items()
                if other not in images_by_name
            ]
            remedy = "add them"
            if similar := stems.get(name):
                remedy = f"there is {similar!r}: convert labels to PNG"
            elif similar := _similar_label(name, [*unused, *other_labels]):
                remedy = f"there is {similar!r}: name labels like their images"
            raise UserError(
                f"data.path: {len(unlabelled)} of {len(images_by_name)} images in {str(images)!r} "
                f"have no label in {str(labels)!r}, the first is {unlabelled[0].name!r}; {remedy}, "
                "or remove the images"
            )
        self.remarks = list(_remarks(images, labels, images_by_name, labels_by_name, other_images))
        self._pairs = [
            (files[0], labels_by_name[name][0], name) for name, files in images_by_name.items()
        ]
        sizes = [[name, _size(image), _size(label)] for image, label, name in self._pairs]
        self.group_rows = [1] * len(self._pairs)
        self.group_bytes = [0] * len(self._pairs)
        self.fingerprint = fingerprint([[name, size] for name, size, _ in sizes], sizes)

    def read(self, group: int) -> Sequence[Mapping[str, Any]]:
        """Return the one row of a pair; image and label stay encoded.

        Raises:
            UserError: A file cannot be read.
        """
        image, label, name = self._pairs[group]
        row = {
            self.entry.image_column: read_file(image),
            self.entry.label_column: read_file(label),
        }
        return [row if self.entry.id_column is None else row | {self.entry.id_column: name}]

    def read_file(self, path: str) -> bytes:
        """Raise an error: rows of this source always hold the content of their files."""
        raise UserError(f"the row names the file {path!r}")

    def name(self, group: int, row: int) -> str:
        """Return the name that image and label share."""
        return self._pairs[group][2]


def _describe_missing_labels(folder: Path, split: str) -> str:
    """Return that a split has no folder of labels, and which other folder may hold them."""
    images, labels = folder / "images", folder / "labels"
    others = [
        str(other / split)
        for other in sorted(folder.glob("[!.]*"))
        if other not in (images, labels) and (other / split).is_dir()
    ]
    remedy = f"put the labels there, .png, under the names of the images in {str(images / split)!r}"
    if others:
        remedy = (
            f"if {listed(others)} holds the labels, move it there, as the folder beside images has "
            "to be called labels"
        )
    return f"there is no folder {str(labels / split)!r}; {remedy}"


def _by_name(folder: Path, suffixes: Sequence[str]) -> tuple[dict[str, list[Path]], list[str]]:
    """Return the files with one of the suffixes by name, sorted by path; and all other files."""
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
    """Yield all files below a folder; follow links to folders except those that lead back up.

    Hidden files, such as the ``._NAME.png`` of some file managers, are left out.

    Args:
        folder: Folder to search.
        above: Real paths of the folders above it, where a link would lead in a circle.
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
            f"data.path: {str(folder)!r} cannot be read ({error.strerror}); check the access rights"
        ) from error
    for entry in entries:
        if entry.name.startswith("."):
            continue
        if entry.is_dir():
            yield from _files_below(folder / entry.name, above | {real})
        else:
            yield folder / entry.name


def _name(file: Path) -> str:
    """Return a path without suffix, in composed Unicode: macOS stores é as e and an accent."""
    return unicodedata.normalize("NFC", str(file.with_suffix("")))


def _similar_label(name: str, labels: Sequence[str]) -> str | None:
    """Return the shortest label path that contains an image's name, such as ``NAME_mask.png``."""
    part = re.compile(rf"(?<![0-9a-z]){re.escape(name.casefold())}(?![0-9])")
    similar = [label for label in labels if part.search(_name(Path(label)).casefold())]
    return min(similar, key=len, default=None)


def _size(file: Path) -> int:
    try:
        return file_size(file)
    except UserError as error:
        raise UserError(f"data.path: {error}") from error


def _remarks(
    images: Path,
    labels: Path,
    images_by_name: Mapping[str, Any],
    labels_by_name: Mapping[str, Sequence[Path]],
    other_images: Sequence[str],
) -> Iterator[tuple[str, str]]:
    """Yield a remark about labels without an image, and one about files that are no image."""
    unused = [files[0] for name, files in labels_by_name.items() if name not in images_by_name]
    # A file with an image's name, such as its .json, belongs to the image.
    unread = [file for file in other_images if _name(Path(file)) not in images_by_name]
    if unused:
        first = _name(unused[0].relative_to(labels))
        same_name = next((file for file in unread if _name(Path(file)) == first), None)
        yield (
            "error",
            f"data.path: {len(unused)} of {len(labels_by_name)} labels in {str(labels)!r} have no "
            f"image in {str(images)!r} and are not used, the first is {unused[0].name!r}"
            + (f" (there is {same_name!r}, which is not read)" if same_name else "")
            + "; add the images, or remove the labels",
        )
    if unread:
        yield (
            "warning",
            f"data.path: {len(unread)} files in {str(images)!r} are not read, because they have no "
            f"image suffix: {listed(unread)}; convert them to PNG or JPEG if they are images",
        )
