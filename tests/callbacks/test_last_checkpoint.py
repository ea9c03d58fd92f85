"""The checkpoint from which an interrupted run is resumed."""

import os

import pytest

from segformer_pl.cli import main

pytestmark = pytest.mark.slow


def test_partial_files_of_a_killed_writer_are_removed_at_the_next_start(fit, tmp_path):
    partial = tmp_path / "checkpoints" / ".0123456789abcdef.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    main([*fit, "--trainer.max_steps=1"])
    assert os.listdir(partial.parent) == ["last.ckpt"]
