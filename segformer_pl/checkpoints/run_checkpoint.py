"""The checkpoint of a run, read once."""

import hashlib
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BufferedReader
from pathlib import Path
from typing import Any, Self

from segformer_pl.checkpoints.files import load_stream, open_file
from segformer_pl.checkpoints.sources import Weights, weights_from_content
from segformer_pl.checkpoints.training_state import check_content
from segformer_pl.errors import UserError


@dataclass(frozen=True)
class RunCheckpoint:
    """What the command line stored in a checkpoint: a trained network, its task and its data.

    Attributes:
        name: The checkpoint and the option that it was given by, for messages.
        content: What it holds, on the CPU, as it was written.
        digest: SHA-256 of the file, its first 16 digits.
    """

    name: str
    content: Mapping[str, Any]
    digest: str

    @classmethod
    def read(cls, ckpt: str | Path, option: str = "--ckpt") -> Self:
        """Read a checkpoint, opening the file once.

        Args:
            ckpt: The file.
            option: The option that it was given by, for messages.

        Raises:
            UserError: There is no such file, it is damaged or no checkpoint, holds nan, or does not
                describe its network and data.
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
        """Training steps before it was written."""
        return self.content.get("global_step", 0)

    def weights(self) -> Weights:
        """Return the network's tensors, with what the checkpoint states about them.

        Raises:
            UserError: A fact has another form than it has to have.
        """
        weights = weights_from_content(self.name, self.content)
        # A training loss can have buffers of its own.
        tensors = {key: t for key, t in weights.tensors.items() if not key.startswith("loss.")}
        return replace(weights, tensors=tensors)


def read_checkpoint(ckpt: str | Path, option: str) -> dict[str, Any]:
    """Return what a checkpoint of a run holds, on the CPU, as it was written.

    Args:
        ckpt: The file.
        option: The option that it was given by, for messages.

    Raises:
        UserError: There is no such file, it is damaged, or no checkpoint, or holds nan.
    """
    with _open(ckpt, option) as stream:
        return _read(stream, ckpt)


@contextmanager
def _open(ckpt: str | Path, option: str) -> Iterator[BufferedReader]:
    try:
        os.stat(ckpt)  # not that of Path, for which '' is the current folder
    except (FileNotFoundError, NotADirectoryError) as error:
        raise UserError(
            f"{option}: there is no file {str(ckpt)!r}; give a run's checkpoint"
        ) from error
    except (OSError, ValueError):
        pass  # open_file says why
    try:
        with open_file(Path(ckpt)) as stream:
            yield stream
    except UserError as error:
        raise UserError(f"{option}: {error}") from error


def _read(stream: BufferedReader, ckpt: str | Path) -> dict[str, Any]:
    return check_content(load_stream(stream, Path(ckpt)), f"'{ckpt}'")
