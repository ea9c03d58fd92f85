"""Files of mmcv and mmengine: NumPy's arrays become plain data, and the log is left out.

The files are pickled from modules with the names of the real ones, as the packages would.
"""

import os
import sys
import types

import numpy as np
import pytest
import torch

from segformer_pl.checkpoints import load_weights, read_weights
from segformer_pl.checkpoints.files import load_file
from segformer_pl.errors import UserError
from segformer_pl.models.mit import MixTransformer
from tests.checkpoints.openmmlab import mmseg_state

PALETTE = np.array([[128, 64, 128], [244, 35, 232]], np.uint8)


@pytest.fixture
def history_buffer(monkeypatch):
    """The class ``HistoryBuffer`` of a module with mmengine's name, as far as a pickle sees it."""

    class HistoryBuffer:
        def __init__(self):
            self.max_length = 1000000
            self._log_history = np.array([0.7, 0.5])
            self._count_history = np.array([1, 1])

        def current(self):
            return self._log_history[-1]

        def __getstate__(self):
            return self.__dict__ | {"statistics_methods": {"current": HistoryBuffer.current}}

    name = "mmengine.logging.history_buffer"
    for part in ("mmengine", "mmengine.logging", name):
        monkeypatch.setitem(sys.modules, part, types.ModuleType(part))
    sys.modules[name].HistoryBuffer = HistoryBuffer
    HistoryBuffer.__qualname__ = "HistoryBuffer"
    HistoryBuffer.current.__qualname__ = "HistoryBuffer.current"
    HistoryBuffer.__module__ = HistoryBuffer.current.__module__ = name
    yield HistoryBuffer()
    assert name not in torch.serialization.get_safe_globals()


def small():
    return MixTransformer((4, 8, 8, 16), (1, 1, 1, 1), (1, 2, 2, 4))


def test_a_file_of_mmengines_runner_is_read(history_buffer, randomize, tmp_path, monkeypatch):
    theirs, ours = randomize(small()).float(), small()
    content = {
        "meta": {
            "dataset_meta": {"classes": ("road", "tree"), "palette": PALETTE.tolist()},
            "experiment_name": "segformer",
        },
        "state_dict": mmseg_state(theirs),
        "message_hub": {
            "log_scalars": {"train/loss": history_buffer},
            "runtime_info": {"best_score": np.float64(0.5), "iter": np.int64(7)},
        },
    }
    torch.save(content, tmp_path / "iter_7.pth")
    for part in [part for part in sys.modules if part.startswith("mmengine")]:
        monkeypatch.delitem(sys.modules, part)
    weights = read_weights(tmp_path / "iter_7.pth")
    assert weights.task == {"class_names": ["road", "tree"], "palette": PALETTE.tolist()}
    report = load_weights(ours, weights)
    assert report.layout == "mmsegmentation backbone"
    images = torch.randn(1, 3, 64, 64)
    for own, other in zip(ours.eval()(images), theirs.eval()(images)):
        torch.testing.assert_close(own, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("core", ["numpy.core.multiarray", "numpy._core.multiarray"])
def test_numpys_arrays_and_scalars_become_plain_data(tmp_path, monkeypatch, core):
    """The names are those of NumPy 1 and 2."""
    for function in (np._core.multiarray._reconstruct, np._core.multiarray.scalar):
        monkeypatch.setattr(function, "__module__", core)
    arrays = {
        "palette": PALETTE,
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "big endian": np.array([1, 258], ">i4"),
        "text": np.array(["road", "tree"]),
        "flags": np.array([True, False]),
        "empty": np.zeros(0, np.float32),
    }
    scalars = {"best_score": np.float32(0.5), "iter": np.int64(7), "name": np.str_("road")}
    torch.save({"state_dict": {}, **arrays, **scalars}, tmp_path / "w.pth")
    read = load_file(tmp_path / "w.pth")
    for name, array in arrays.items():
        assert read[name] == array.tolist(), name
    for name, scalar in scalars.items():
        assert read[name] == scalar.item()
        assert type(read[name]) is type(scalar.item())


def test_a_palette_of_mmcv_is_read(tmp_path):
    meta = {"CLASSES": ("road", "tree"), "PALETTE": PALETTE, "hook_msgs": {"best_score": 0.5}}
    torch.save({"state_dict": {"a": torch.ones(1)}, "meta": meta}, tmp_path / "w.pth")
    assert read_weights(tmp_path / "w.pth").task["palette"] == PALETTE.tolist()


class Planted:
    """An object whose pickle calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


@pytest.mark.parametrize(
    ("function", "arguments", "named"),
    [
        (os.system, ("touch {}",), "posix.system"),
        (eval, ("open('{}', 'w')",), "eval"),
        (getattr, ("", "join"), "builtins.getattr"),
        (bytes, (10,), None),  # a stand-in takes no arguments
        (np.frombuffer, (b"", np.dtype("u1")), r"numpy\S*frombuffer"),
        (np.array, (np.array([{}], object),), r"numpy\S*array"),
    ],
)
def test_code_beside_the_data_is_refused_and_not_run(tmp_path, function, arguments, named):
    trace = tmp_path / "ran"
    arguments = [a.format(trace) if isinstance(a, str) else a for a in arguments]
    content = {"state_dict": {"a": torch.ones(1)}, "x": Planted(function, *arguments)}
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(UserError, match=rf"holds code \({named}\)" if named else "is no file of"):
        load_file(tmp_path / "w.pth")
    assert not trace.exists()


def test_an_array_of_objects_is_refused(tmp_path):
    torch.save({"a": torch.ones(1), "x": np.array([None, {}])}, tmp_path / "w.pth")
    with pytest.raises(UserError, match=r"holds code \(numpy\.dtype\('O8'\)\)"):
        load_file(tmp_path / "w.pth")
