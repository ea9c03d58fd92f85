"""Files that are damaged, are no regular files, or hold nan or infinity."""

import io
import os
import random
import re
import zipfile
from contextlib import suppress

import pytest
import torch

from segformer_pl.checkpoints import load_file, non_finite, read_weights
from segformer_pl.checkpoints.run_checkpoint import read_checkpoint
from segformer_pl.errors import UserError


@pytest.fixture
def file(tmp_path):
    state = {f"layer{n}.weight": torch.randn(64, 64) for n in range(4)}
    torch.save({"state_dict": state}, tmp_path / "w.ckpt")
    return tmp_path / "w.ckpt"


def test_a_flipped_bit_is_detected_and_its_record_named(file):
    whole = file.read_bytes()
    with zipfile.ZipFile(file) as archive:
        records = [r for r in archive.infolist() if "/data/" in r.filename]
        starts = {}
        for record in records:
            starts[record.filename] = whole.index(archive.read(record))
    rng = random.Random(0)
    for _ in range(12):
        record = rng.choice(records)
        damaged = bytearray(whole)
        offset = starts[record.filename] + rng.randrange(record.file_size)
        damaged[offset] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with pytest.raises(UserError) as error:
            load_file(file)
        assert f"its record '{record.filename}' does not agree with the checksum" in str(
            error.value
        )
        # torch.load accepts the file, because it does not compare checksums.
        torch.load(file, weights_only=True)


def test_a_flipped_bit_anywhere_is_refused_or_harmless(file):
    whole, expected = file.read_bytes(), load_file(file)["state_dict"]
    rng = random.Random(1)
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        file.write_bytes(damaged)
        with suppress(UserError):
            tensors = load_file(file)["state_dict"]
            assert all(torch.equal(tensors[name], expected[name]) for name in expected)


def test_files_without_checksums_are_read(file, tmp_path):
    content = load_file(file)
    try:
        torch.serialization.set_crc32_options(False)
        torch.save(content, tmp_path / "off.pth")
    finally:
        torch.serialization.set_crc32_options(True)
    torch.save(content, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    for name in ("off.pth", "old.pth"):
        tensors = load_file(tmp_path / name)["state_dict"]
        assert all(torch.equal(tensors[key], content["state_dict"][key]) for key in tensors)


@pytest.fixture(params=["folder", "pipe", "empty", "text", "long name", "nul", "device", "zip"])
def other_file(request, tmp_path):
    path = tmp_path / "w.ckpt"
    if request.param == "folder":
        path.mkdir()
    elif request.param == "pipe":
        os.mkfifo(path)
    elif request.param == "empty":
        path.touch()
    elif request.param == "text":
        path.write_text("weights")
    elif request.param == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("data/0", b"text")
    return {
        "long name": tmp_path / f"{'w' * 5000}.ckpt",
        "nul": f"{tmp_path}/w\0.ckpt",
        "device": "/dev/zero",
    }.get(request.param, path)


def test_other_files_are_refused_in_one_sentence(other_file):
    for read in (read_weights, lambda path: read_checkpoint(path, "--ckpt")):
        with pytest.raises(ValueError, match=r"w|/dev/zero") as error:
            read(other_file)
        message = str(error.value)
        assert "\n" not in message
        assert len(message) < 500
        assert re.search(
            r"is a folder|not a regular|cut short|cannot be opened|holds neither", message
        )


def test_non_finite_values_are_counted_by_tensor():
    tensors = {
        "a": torch.tensor([1.0, torch.nan, torch.inf]),
        "b": torch.ones(2, dtype=torch.float16),
        "c": torch.tensor([-torch.inf], dtype=torch.bfloat16),
        "d": torch.arange(3),
        "e": torch.zeros(2).to(torch.float8_e5m2),
        "f": torch.empty(2, device="meta"),
        "g": torch.full((4,), 3e38),
    }
    assert non_finite(tensors) == {"a": 2, "c": 1}


def test_a_file_saved_through_memory_is_read(tmp_path):
    buffer = io.BytesIO()
    torch.save({"w": torch.ones(3)}, buffer)
    (tmp_path / "w.pth").write_bytes(buffer.getvalue())
    assert torch.equal(load_file(tmp_path / "w.pth")["w"], torch.ones(3))
