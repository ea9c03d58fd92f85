"""The images and videos that a command is given, and the names of its outputs for them."""

import glob
import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from segformer_pl.data.files import check_readable
from segformer_pl.data.image_suffixes import IMAGE_SUFFIXES
from segformer_pl.errors import UserError
from segformer_pl.video_file import is_video


def find_files(
    pattern: str,
    option: str,
    suffixes: Sequence[str] = IMAGE_SUFFIXES,
    outputs: Sequence[Path] = (),
) -> dict[Path, Path]:
    """Return the files of a path or a pattern, sorted, with the names of their outputs.

    Hidden files, and files that an earlier call wrote, are left out::

        in/a.jpg, in/b.jpg, in/b.png, in/sub/a.png, in/c.mp4, in/c/1.png    input "in"
        a         b.jpg     b.png     sub/a         c.mp4     c/1           names of the outputs

    A command may write a folder for a video, so one beside a folder ``c`` is not called ``c``.

    Args:
        pattern: A file, a folder that is searched recursively, or a glob pattern.
        option: Command-line option that gave the pattern, for messages.
        suffixes: Suffixes of the files to return from a folder.
        outputs: Folders of the outputs of the command, which are not searched.

    Returns:
        Input file -> relative path of its outputs, without the suffix that each of them gets. No
        two of these paths are equal, and that of a video is no folder of another one.

    Raises:
        UserError: There is no such file or folder, or nothing matches the pattern.
    """
    if not pattern:
        raise UserError(f"{option} is empty; give an image, a folder or a pattern")
    path = Path(pattern).expanduser()
    remedy = "give an image, a folder of images, or a quoted pattern like 'photos/**/*.jpg'"
    if path.is_file():
        return _with_output_names([path], path.parent, option)
    if path.is_dir():
        check_readable(path, option)
        base, matches = path, glob.glob(f"{glob.escape(str(path))}/**/*", recursive=True)
        matches = [file for file in matches if Path(file).suffix.lower() in suffixes]
        missing = f"folder {pattern!r} contains no image ({', '.join(suffixes[:4])}, ...)"
    elif glob.has_magic(pattern):
        fixed = next(number for number, part in enumerate(path.parts) if glob.has_magic(part))
        base, matches = Path(*path.parts[:fixed]), glob.glob(str(path), recursive=True)
        missing = f"no file matches {pattern!r}"
    else:
        raise UserError(f"{option}: there is no file or folder {pattern!r}; {remedy}")
    own_folders = [folder.resolve() for folder in outputs]
    files = [
        file
        for file in sorted(Path(os.path.normpath(file)) for file in matches)
        # A dangling link is kept, so that it is reported when it cannot be read.
        if (file.is_file() or not file.exists())
        and not any(file.resolve().is_relative_to(folder) for folder in own_folders)
    ]
    if not files:
        raise UserError(f"{option}: {missing}; {remedy}")
    return _with_output_names(files, Path(os.path.normpath(base)), option)


def _with_output_names(files: list[Path], base: Path, option: str) -> dict[Path, Path]:
    """Map files to their paths below ``base``, without suffix where that is unambiguous."""
    relative = {file: Path(os.path.relpath(file, base)) for file in files}
    outside = next((file for file, name in relative.items() if ".." in name.parts), None)
    if outside is not None:
        raise UserError(
            f"{option}: '{outside}' is not below '{base}', where the pattern starts; use '..' "
            "only before the first wildcard"
        )
    full_names = set(relative.values())
    folders = {folder for name in full_names for folder in name.parents}
    count = Counter(name.with_suffix("") for name in full_names)
    return {
        file: name
        if count[stem := name.with_suffix("")] > 1
        or stem in full_names - {name}
        or (is_video(file) and stem in folders)
        else stem
        for file, name in relative.items()
    }
