"""Files are written completely or not at all, also on full disks and in killed processes."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from segformer_pl.atomic import (
    WriteError,
    atomic_write,
    atomic_write_text,
    keep_previous,
    previous,
    remove_partial_files,
)


def test_writes_and_replaces_and_creates_parent_folders(tmp_path):
    file = tmp_path / "new" / "folder" / "file.txt"
    atomic_write_text(file, "première")
    atomic_write_text(file, "deuxième")
    assert file.read_text(encoding="utf-8") == "deuxième"
    assert [path.name for path in file.parent.iterdir()] == ["file.txt"]


def test_permissions_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        atomic_write_text(tmp_path / "file", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_an_error_in_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")

    def fail():
        with atomic_write(file) as stream:
            stream.write(b"half")
            raise KeyError

    with pytest.raises(KeyError):
        fail()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("name", "message", "is_name_error"),
    [
        ("n" * 300, "File name too long; give a shorter name", True),
        ("folder", "Is a directory; give a folder that can be written", True),
        ("file/below", "'{}/file' is a file; give a folder that can be written", True),
        ("/proc/file", "No such file or directory; give a folder that can be written", False),
    ],
)
def test_the_message_says_what_to_do(tmp_path, name, message, is_name_error):
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    with pytest.raises(WriteError) as error:
        atomic_write_text(tmp_path / name, "x")
    assert str(error.value).endswith(f": {message.format(tmp_path)}")
    assert error.value.is_name_error == is_name_error


def test_a_killed_writer_leaves_the_old_file(tmp_path):
    file = tmp_path / "file"
    file.write_text("old")
    program = (
        "import sys, time\n"
        "from segformer_pl.atomic import atomic_write\n"
        "with atomic_write(sys.argv[1]) as stream:\n"
        "    stream.write(b'x' * 100_000); stream.flush()\n"
        "    print('half', flush=True); time.sleep(60)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(file)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "half\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert file.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2  # the file and the partial file
    remove_partial_files(tmp_path)
    assert list(tmp_path.iterdir()) == [file]


def test_a_symbolic_link_is_replaced_and_not_followed(tmp_path):
    outside = tmp_path / "outside"
    outside.write_text("precious")
    (tmp_path / "file").symlink_to(outside)
    atomic_write_text(tmp_path / "file", "new")
    assert outside.read_text() == "precious"
    assert not (tmp_path / "file").is_symlink()


def test_a_full_disk_leaves_the_old_file_and_raises_one_sentence(tmp_path):
    """A limit on the file size simulates the full disk: the write fails half-way."""
    file = tmp_path / "file"
    file.write_text("old")
    program = (
        "import resource, signal, sys\n"
        "from segformer_pl.atomic import WriteError, atomic_write\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))\n"
        "try:\n"
        "    with atomic_write(sys.argv[1]) as stream:\n"
        "        stream.write(b'x' * 100_000)\n"
        "except WriteError as error:\n"
        "    print(error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(file)], capture_output=True, text=True, check=True
    )
    assert done.stdout == (
        f"cannot write {str(file)!r}: File too large; free space or give a folder that can be "
        "written\n"
    )
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_file_in_place_of_a_parent_folder_raises_one_sentence(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(WriteError, match=r"cannot write '.*below': '.*/file' is a file; give"):
        atomic_write_text(tmp_path / "file" / "below", "x")


def test_two_concurrent_writers_leave_one_complete_file(tmp_path):
    program = (
        "import sys\n"
        "from segformer_pl.atomic import atomic_write_text\n"
        "for _ in range(200):\n"
        "    atomic_write_text(sys.argv[1], sys.argv[2] * 10_000)\n"
    )
    file = tmp_path / "file"
    writers = [
        subprocess.Popen([sys.executable, "-c", program, str(file), letter]) for letter in "ab"
    ]
    deadline = time.monotonic() + 60
    while any(writer.poll() is None for writer in writers) and time.monotonic() < deadline:
        if file.exists():
            text = file.read_text()
            assert text in ("a" * 10_000, "b" * 10_000)
    assert [writer.wait() for writer in writers] == [0, 0]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("has_links", [True, False])
def test_earlier_contents_are_kept(tmp_path, monkeypatch, has_links):
    if not has_links:
        monkeypatch.setattr(os, "link", refuse_to_link)
    file = tmp_path / "last.ckpt"
    for content in ("1", "2", "3", "4"):
        with keep_previous(file, 2):
            assert content == "1" or file.exists()
            atomic_write_text(file, content)
    kept = [file, previous(file), previous(file, 2)]
    assert [path.read_text() for path in kept] == ["4", "3", "2"]
    with pytest.raises(WriteError), keep_previous(file, 2):
        raise WriteError("the disk is full")
    with keep_previous(file, 0):
        atomic_write_text(file, "5")
    assert [path.read_text() for path in kept] == ["5", "3", "2"]
    with keep_previous(file, 2):
        pass  # nothing was written
    with keep_previous(file, 2):
        atomic_write_text(file, "6")
    assert file.read_text() == "6"
    assert previous(file).read_text() == "5"
    assert sorted(tmp_path.iterdir()) == kept


def refuse_to_link(*arguments):
    raise OSError(errno.EPERM, "Operation not permitted")
