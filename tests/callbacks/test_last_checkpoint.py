"""The checkpoint from which an interrupted run is resumed."""

import csv
import os
import re
import zipfile

import pytest
import torch

from segformer_pl.atomic import previous
from segformer_pl.cli import main

pytestmark = pytest.mark.slow


def test_partial_files_of_a_killed_writer_are_removed_at_the_next_start(fit, tmp_path):
    partial = tmp_path / "checkpoints" / ".0123456789abcdef.partial"
    partial.parent.mkdir()
    partial.write_bytes(b"half")
    main([*fit, "--trainer.max_steps=1"])
    assert os.listdir(partial.parent) == ["last.ckpt"]


def test_a_damaged_checkpoint_falls_back_to_the_one_before(fit, tmp_path, capsys):
    """One flipped bit in the weights: torch.load notices nothing."""
    fit = [*fit, "--trainer.log_every_n_steps=1", "--last_checkpoint.keep=3"]
    fit.remove(f"--last_checkpoint.dirpath={tmp_path / 'checkpoints'}")
    main([*fit, "--trainer.max_steps=4"])
    (run,) = tmp_path.glob("runs/*/version_0")
    last = run / "checkpoints" / "last.ckpt"
    files = [last, previous(last, 1), previous(last, 2)]
    assert sorted(last.parent.iterdir()) == sorted(files)
    contents = [torch.load(file, weights_only=True, mmap=True) for file in files]
    assert [content["global_step"] for content in contents] == [4, 3, 2]

    flip_a_bit(last)
    torch.load(last, weights_only=True)
    before = previous(last).read_bytes()
    previous(last).write_bytes(before[: len(before) // 2])
    capsys.readouterr()
    with pytest.warns(UserWarning, match=r"last.ckpt' is damaged.*last.ckpt.2, .* is used instead"):
        main([*fit, "--trainer.max_steps=5", f"--ckpt_path={last}"])
    rows = csv.DictReader((run / "metrics.csv").open())
    steps = [int(row["step"]) for row in rows if row["train/loss"]]
    assert steps == sorted(set(steps)), "the run folder is continued, no step is there twice"
    assert torch.load(last, weights_only=True)["global_step"] == 5
    assert not list(tmp_path.rglob("version_1"))

    for file in last.parent.iterdir():
        flip_a_bit(file)
    with pytest.raises(SystemExit) as exit_:
        main([*fit, "--trainer.max_steps=6", f"--ckpt_path={last}"])
    assert re.match(r"error: ckpt_path: '.*last.ckpt' is damaged", str(exit_.value.code))


def flip_a_bit(file):
    """Change the largest tensor. Bytes between the entries of the archive hold nothing."""
    with zipfile.ZipFile(file) as archive:
        tensors = [entry for entry in archive.infolist() if "/data/" in entry.filename]
        largest = max(tensors, key=lambda entry: entry.file_size)
        tensor = archive.read(largest)
    content = bytearray(file.read_bytes())
    content[content.index(tensor) + len(tensor) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.usefixtures("without_figures")
def test_ranks_that_read_different_files_of_one_name_are_refused(
    fit, tmp_path, start_command, torchrun_environments
):
    """The cache of a file server can show one node an older last checkpoint than another."""
    commands = []
    for rank, environment in enumerate(torchrun_environments(2)):
        folder = tmp_path / str(rank)
        main([*fit, f"--trainer.max_steps={1 + rank}", f"--last_checkpoint.dirpath={folder}"])
        arguments = [*fit, "--trainer.max_steps=9", "--ckpt_path=last.ckpt"]
        commands.append(start_command(arguments, folder=folder, **environment))
    assert commands[1].wait() == 1
    assert "rank 1 has read step 2 from 'last.ckpt' and rank 0 step 1" in commands[1].output
    assert commands[0].wait() != 0
