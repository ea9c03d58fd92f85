"""Checkpoints are written atomically, whatever file system the temporary folder is on."""

import os
import signal
import tempfile
import time

import pytest
import torch

from segformer_pl.atomic import WriteError
from segformer_pl.callbacks import AtomicCheckpointIO

pytestmark = pytest.mark.slow


def test_the_temporary_folder_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "nowhere"))
    file = tmp_path / "new" / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint({"a": torch.ones(3)}, str(file))
    AtomicCheckpointIO().save_checkpoint({"a": torch.zeros(3)}, file)
    assert torch.load(file, weights_only=True)["a"].tolist() == [0, 0, 0]
    assert [child.name for child in file.parent.iterdir()] == ["last.ckpt"]
    assert AtomicCheckpointIO().load_checkpoint(file, weights_only=True)["a"].sum() == 0


def test_remote_paths_are_left_to_lightning():
    import fsspec

    AtomicCheckpointIO().save_checkpoint({"a": 1}, "memory://folder/last.ckpt")
    with fsspec.open("memory://folder/last.ckpt") as stream:
        assert torch.load(stream, weights_only=True) == {"a": 1}


def test_an_unwritable_path_is_one_error_message(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match=r"cannot write '.*last.ckpt': .*; give a folder that"):
        AtomicCheckpointIO().save_checkpoint({}, tmp_path / "file" / "last.ckpt")


@pytest.mark.slow
@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="needs a second file system")
def test_a_kill_during_writing_leaves_the_previous_checkpoint(start_command, tmp_path):
    """With Lightning's own writer, 4 of 4 kills left a truncated checkpoint."""
    program = tmp_path / "write.py"
    program.write_text(
        "import sys, tempfile, torch\n"
        "from segformer_pl.callbacks import AtomicCheckpointIO\n"
        "tempfile.tempdir = sys.argv[2]\n"
        "state = {'number': 0, 'weights': torch.ones(20_000_000)}\n"
        "while True:\n"
        "    state['number'] += 1\n"
        "    AtomicCheckpointIO().save_checkpoint(state, sys.argv[1])\n"
    )
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        file = os.path.join(folder, "last.ckpt")
        for delay in (0.0, 0.05):
            before = set(os.listdir(folder))

            def is_writing(before=before):
                return os.path.exists(file) and set(os.listdir(folder)) - before - {"last.ckpt"}

            writer = start_command([file, temporary], program=program)
            writer.wait_for(is_writing)
            time.sleep(delay)
            os.kill(writer.pid, signal.SIGKILL)
            assert writer.wait() == -signal.SIGKILL
            state = torch.load(file, weights_only=True)
            assert state["number"] >= 1
            assert state["weights"].sum() == 20_000_000
        assert list(temporary.iterdir()) == []


@pytest.mark.slow
def test_a_full_disk_ends_the_run_with_one_error_message(fit, start_command, tmp_path):
    """A limit on the size of a file stands in for the disk."""
    last = tmp_path / "checkpoints" / "last.ckpt"
    assert start_command([*fit, "--trainer.max_steps=1"], figures=False).wait() == 0
    before = last.read_bytes()
    resumed = [*fit, "--trainer.max_steps=3", f"--ckpt_path={last}"]
    full = start_command(resumed, largest_file=50_000, figures=False)
    assert full.wait() == 1
    sentence, command = full.output.splitlines()[-2:]
    assert sentence == (
        f"error: cannot write {str(last)!r}: File too large; free space or give a folder that can "
        "be written; then resume with"
    )
    assert command.startswith("python -m segformer_pl fit ")
    assert command.count("--ckpt_path") == 1
    assert command.endswith(f"--ckpt_path={last}")
    assert "Traceback" not in full.output
    assert last.read_bytes() == before
    assert os.listdir(last.parent) == ["last.ckpt"]
