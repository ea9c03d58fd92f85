"""Atomic writing of checkpoints."""

import io
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from segformer_pl.atomic import atomic_write


def is_local(path: str | Path) -> bool:
    """Return whether a path is on a local file system and not a URL such as ``s3://``."""
    return isinstance(url_to_fs(str(path))[0], LocalFileSystem)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint to a temporary file in the target's folder, syncs it and renames it.

    Lightning writes to the system's temporary folder and moves the file. Where that is another file
    system, moving means copying over the only checkpoint, and a kill or a full disk during the copy
    leaves a truncated file. Remote paths, such as ``s3://``, are left to Lightning.

    The command line uses this class in every trainer; in Python, give
    ``Trainer(plugins=[AtomicCheckpointIO()])``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write a checkpoint, as :meth:`TorchCheckpointIO.save_checkpoint` does, but atomically.

        Raises:
            WriteError: The file cannot be written, such as on a full disk; the previous file is
                intact.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # Serialise in memory first, since torch's file writer hides the OSError of a full disk.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_write(url_to_fs(str(path))[1]) as stream:
            stream.write(buffer.getbuffer())
