"""Streaming from the hub: the client of ``datasets`` against a local HTTP server."""

import json
import os
import re
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import pytest

pytestmark = pytest.mark.slow

COMMIT = "a" * 40
READ = """
import dataclasses, json, sys
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.sources import open_split

path, revision = json.loads(sys.argv[1])
entry = dataclasses.replace(find_dataset("shapes"), hub="owner/set", revision=revision)
source = open_split(entry, path, "train")
print(json.dumps([source.files, source.group_rows, [row["id"] for row in source.read(1)]]))
"""


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's HTTP interface that its client uses."""

    def do_GET(self):
        self.answer(with_body=True)

    def do_HEAD(self):
        self.answer(with_body=False)

    def answer(self, with_body):
        path, files = unquote(self.path.split("?")[0]), self.server.files
        if tree := re.fullmatch(r"/api/datasets/owner/set/tree/\w+/?(.*)", path):
            folder = f"{tree[1]}/" if tree[1] else ""
            members = [name for name in files if name.startswith(folder)]
            listing = [
                {"type": "file", "path": name, "size": len(files[name]), "oid": "0" * 40}
                for name in members
                if "/" not in name.removeprefix(folder)
            ]
            folders = {name.removeprefix(folder).split("/")[0] for name in members}
            listing += [
                {"type": "directory", "path": folder + name, "size": 0, "oid": "0" * 40}
                for name in folders
                if folder + name not in files
            ]
            self.send(200 if members else 404, json.dumps(listing).encode(), with_body)
        elif path.startswith("/api/datasets/owner/set"):
            siblings = [{"rfilename": name} for name in files]
            info = {"id": "owner/set", "sha": COMMIT, "siblings": siblings}
            self.send(200, json.dumps(info).encode(), with_body)
        elif file := re.fullmatch(r"/datasets/owner/set/resolve/\w+/(.*)", path):
            self.send_file(file[1], files, with_body)
        else:
            self.send(404, b"", with_body, {"X-Error-Code": "RepoNotFound"})

    def send_file(self, name, files, with_body):
        if name not in files:
            self.send(404, b"", with_body, {"X-Error-Code": "EntryNotFound"})
            return
        content = files[name]
        headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{name}"', "Accept-Ranges": "bytes"}
        requested = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
        if requested:
            first, last = int(requested[1]), int(requested[2])
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            self.send(206, content[first : last + 1], with_body, headers)
        else:
            self.send(200, content, with_body, headers)

    def send(self, status, body, with_body, headers=()):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        for key, value in dict(headers).items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(body)

    def log_message(self, *args):
        pass


@pytest.fixture
def read(tmp_path, row, write_shards):
    """Function (path, revision) -> files, group rows, ids of the second row group, stderr."""
    (tmp_path / "set").mkdir()
    write_shards(tmp_path / "set" / "data", "train", [[row(f"s{i}") for i in range(6)]], 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {
        str(file.relative_to(tmp_path / "set")): file.read_bytes()
        for file in (tmp_path / "set").rglob("*.parquet")
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(tmp_path / "hf"),
        "XDG_CACHE_HOME": str(tmp_path / "cache"),
    }

    def open_and_read(path, revision=COMMIT):
        process = subprocess.run(
            [sys.executable, "-c", READ, json.dumps([path, revision])],
            env=environment,
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert process.returncode == 0, process.stderr[-2000:]
        return [*json.loads(process.stdout), process.stderr]

    yield open_and_read
    server.shutdown()
    server.server_close()


FILE = f"hf://datasets/owner/set@{COMMIT}/data/train-00000-of-00001.parquet"


@pytest.mark.parametrize(
    "path",
    [None, f"owner/set@{COMMIT}", f"hf://datasets/owner/set@{COMMIT}/data/{{split}}-*.parquet"],
    ids=["hub location of the entry", "name", "pattern"],
)
def test_row_groups_are_read_from_the_hub(read, path):
    files, rows, ids, stderr = read(path)
    assert (files, rows, ids) == ([FILE], [2, 2, 2], ["s2", "s3"])
    assert "latest commit" not in stderr


def test_a_name_without_a_revision_means_the_latest_commit(read):
    files, rows, ids, stderr = read("owner/set", None)
    assert files == [FILE]
    assert (rows, ids) == ([2, 2, 2], ["s2", "s3"])
    assert f"to pin this commit, give --data.path owner/set@{COMMIT}" in stderr
