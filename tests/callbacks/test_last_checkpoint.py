"""The checkpoint from which an interrupted run is resumed."""

import os
import socket

import pytest

from segformer_pl.cli import main

pytestmark = pytest.mark.slow


def test_partial_files_of_a_killed_writer_are_removed_at_the_next_start(fit, tmp_path):
    partial = tmp_path / "checkpoints" / ".0123456789abcdef.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    main([*fit, "--trainer.max_steps=1"])
    assert os.listdir(partial.parent) == ["last.ckpt"]


@pytest.mark.usefixtures("without_figures")
def test_ranks_that_read_different_files_of_one_name_are_refused(fit, tmp_path, start_command):
    """The cache of a file server can show one node an older last checkpoint than another."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "1"}
    shared |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    commands = []
    for rank in "01":
        folder = tmp_path / rank
        main([*fit, f"--trainer.max_steps={1 + int(rank)}", f"--last_checkpoint.dirpath={folder}"])
        arguments = [*fit, "--trainer.max_steps=9", "--ckpt_path=last.ckpt"]
        variables = shared | {"RANK": rank, "LOCAL_RANK": rank}
        commands.append(start_command(arguments, folder=folder, **variables))
    assert commands[1].wait() == 1
    assert "rank 1 has read step 2 from 'last.ckpt' and rank 0 step 1" in commands[1].output
    assert commands[0].wait() != 0
