"""How checkpoints get onto the disk."""

import io
from pathlib import Path
from typing import Any

import torch
from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO

from segformer_pl.atomic import atomic_write


def is_local(path: str | Path) -> bool:
    """Whether a path is one of this machine's file systems, not a URL such as ``s3://``."""
    return isinstance(url_to_fs(str(path))[0], LocalFileSystem)


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, syncs it and renames it over the previous one.

    Lightning's own writes to the temporary folder and moves, which on another file system copies
    over the only checkpoint: a kill or a full disk in the midst of it leaves a part of a file.
    Paths that are not local, such as ``s3://``, are left to Lightning. The command line gives this
    to every trainer; in Python, ``Trainer(plugins=[AtomicCheckpointIO()])``.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """See :meth:`TorchCheckpointIO.save_checkpoint`.

        Raises:
            WriteError: The disk is full, the folder is read-only, or the like; the previous file
                is intact.
        """
        if storage_options is not None or not is_local(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        # In memory first: torch's writer turns a full disk into an error of its own.
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)
        with atomic_write(url_to_fs(str(path))[1]) as stream:
            stream.write(buffer.getbuffer())
