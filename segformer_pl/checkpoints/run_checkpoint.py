"""Read the checkpoint of a run."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from io import BufferedReader
from itertools import chain, count, islice, takewhile
from pathlib import Path
from typing import Any, Self

from segformer_pl.atomic import previous
from segformer_pl.checkpoints.files import load_stream, open_file
from segformer_pl.checkpoints.sources import Weights, weights_from_content
from segformer_pl.checkpoints.training_state import check_content
from segformer_pl.errors import UserError


@dataclass(frozen=True)
class RunCheckpoint:
    """The checkpoint of a run: a trained network and the settings of its task and data.

    Attributes:
        name: Option and path of the file, for messages.
        content: Content of the file as it was written, on the CPU.
        digest: First 16 hexadecimal digits of the file's SHA-256.
    """

    name: str
    content: Mapping[str, Any]
    digest: str

    @classmethod
    def read(cls, ckpt: str | Path, option: str = "--ckpt") -> Self:
        """Read a checkpoint. The file is opened once, so that content and digest agree.

        Args:
            ckpt: Path of the file.
            option: Command-line option that gave the path, for messages.

        Raises:
            UserError: The file does not exist, is damaged, is no checkpoint, holds nan or infinity,
                or does not describe its network and data.
        """
        with _open(ckpt, option) as stream:
            content = _read(stream, ckpt)
            stream.seek(0)
            digest = hashlib.file_digest(stream, "sha256").hexdigest()[:16]
        described = content.keys() >= {"hyper_parameters", "datamodule_hyper_parameters"}
        if not described or "network" not in content["hyper_parameters"]:
            raise UserError(
                f"{option}: {str(ckpt)!r} does not describe its network and data, as checkpoints "
                "of `python -m segformer_pl fit` do; give one of those"
            )
        return cls(f"{option}: {str(ckpt)!r}", content, digest)

    @property
    def step(self) -> int:
        """Number of training steps before the checkpoint was written."""
        return self.content.get("global_step", 0)

    def weights(self) -> Weights:
        """Return the network's tensors, with the facts that the checkpoint states about them.

        Raises:
            UserError: A fact has the wrong form.
        """
        weights = weights_from_content(self.name, self.content)
        # The task's state dict also holds the buffers of the training loss.
        tensors = {key: t for key, t in weights.tensors.items() if not key.startswith("loss.")}
        return replace(weights, tensors=tensors)


def read_checkpoint(ckpt: str | Path, option: str) -> dict[str, Any]:
    """Return the content of a run's checkpoint as it was written, on the CPU.

    Args:
        ckpt: Path of the file.
        option: Command-line option that gave the path, for messages.

    Raises:
        UserError: The file does not exist, is damaged, is no checkpoint, or holds nan or infinity.
    """
    with _open(ckpt, option) as stream:
        return _read(stream, ckpt)


def read_previous(ckpt: str | Path) -> tuple[Path, dict[str, Any]] | None:
    """Read the newest intact one of the checkpoints that are kept beside a damaged one.

    Args:
        ckpt: Path of the damaged file, ``FILE``. The ones before it are ``FILE.1``, ``FILE.2``, ...

    Returns:
        The file and its content; None if none is intact, or if ``ckpt`` does not exist.
    """
    files = takewhile(Path.is_file, chain([Path(ckpt)], (previous(ckpt, n) for n in count(1))))
    for file in islice(files, 1, None):
        with suppress(UserError):
            return file, read_checkpoint(file, "")
    return None


@contextmanager
def _open(ckpt: str | Path, option: str) -> Iterator[BufferedReader]:
    try:
        os.stat(ckpt)  # Path.stat() would take '' for the current folder
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{option}: there is no file {str(ckpt)!r}; give a run's checkpoint"
        ) from error
    except (OSError, ValueError):
        pass  # open_file raises a UserError with the reason
    if Path(ckpt).suffix == ".safetensors":
        raise UserError(
            f"{option}: {str(ckpt)!r} holds weights alone; give a run's checkpoint (.ckpt), which "
            "describes the data too"
        )
    try:
        with open_file(Path(ckpt)) as stream:
            yield stream
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def _read(stream: BufferedReader, ckpt: str | Path) -> dict[str, Any]:
    return check_content(load_stream(stream, Path(ckpt)), f"'{ckpt}'")
