"""Stand-ins for the classes of NumPy and mmengine that files of OpenMMLab hold beside tensors.

A file of mmcv or mmengine holds more than tensors: NumPy arrays (a palette), NumPy scalars
(``best_score``) and, from mmengine's Runner, the curves of its log (``HistoryBuffer``). A pickle
names the function that restores each of them. ``torch.load(weights_only=True)`` runs none but
torch's own, so it refuses these files, although they are plain data.

Here each of these names stands for a function of this module, which calls nothing that the file
names. Arrays become lists, scalars become Python's, and the log is left out. All other names are
refused as before.
"""

import pickle
import re
from contextlib import AbstractContextManager
from typing import Any

import numpy as np
import torch

# Booleans, numbers and text: a type code and a number of bytes or characters.
_PLAIN = re.compile(r"b1|[iufc]\d+|[SU]\d+")


class _DType:
    """Stands for ``numpy.dtype``, of which a pickle states code and byte order."""

    def __init__(self, code: str, *_: Any) -> None:
        if _PLAIN.fullmatch(code) is None:
            # Object arrays hold objects of any kind. torch.load puts this text into its own.
            raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")
        self.code = code
        self.byte_order: Any = "="

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.byte_order = state[1]

    def read(self, raw: bytes) -> Any:
        """Return the array (N,) of these bytes."""
        return np.frombuffer(raw, np.dtype(self.code).newbyteorder(self.byte_order))


class _Array(list[Any]):
    """Stands for ``numpy.ndarray``: a list of lists of the array's values."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, is_fortran, raw = state
        values = dtype.read(raw).reshape(shape, order="F" if is_fortran else "C")
        self[:] = np.atleast_1d(values).tolist()


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _DType, raw: bytes) -> Any:
    return dtype.read(raw)[0].item()


def _no_bytes() -> bytes:
    """Stand for ``bytes``, whose call without arguments is the content of an empty array."""
    return b""


class _HistoryBuffer:
    """Stands for mmengine's ``HistoryBuffer``, whose content is left out."""

    def __setstate__(self, state: Any) -> None:
        pass


def _method(owner: Any, name: str) -> None:
    """Stand for ``getattr``, by which a pickle names the methods of ``HistoryBuffer``."""
    if owner is not _HistoryBuffer:
        raise pickle.UnpicklingError(f"GLOBAL builtins.getattr of {owner!r}")


_STAND_INS: list[Any] = [
    (_DType, "numpy.dtype"),
    (_Array, "numpy.ndarray"),
    (_HistoryBuffer, "mmengine.logging.history_buffer.HistoryBuffer"),
    (_method, "builtins.getattr"),
    (_no_bytes, "builtins.bytes"),
    *(
        (function, f"numpy.{core}.multiarray.{name}")
        for core in ("core", "_core")  # of NumPy 1 and 2
        for name, function in (("_reconstruct", _reconstruct), ("scalar", _scalar))
    ),
]


def plain_data() -> AbstractContextManager[None]:
    """Return a context in which ``torch.load(weights_only=True)`` reads these files."""
    return torch.serialization.safe_globals(_STAND_INS)
