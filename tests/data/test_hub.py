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
FILE = f"hf://datasets/owner/set@{COMMIT}/data/train-00000-of-00001.parquet"
# By case: path and revision.
CASES = {
    "hub location of the entry": (None, COMMIT),
    "name": (f"owner/set@{COMMIT}", COMMIT),
    "pattern": (f"hf://datasets/owner/set@{COMMIT}/data/{{split}}-*.parquet", COMMIT),
    "name without a revision": ("owner/set", None),
}
# The client reads the address of the hub when it is imported, so this needs a new interpreter. Each
# case has a forked process of its own, because the client remembers what it has listed.
READ = """
import dataclasses, json, os, sys
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.sources import open_split

for path, revision in json.loads(sys.argv[1]):
    process = os.fork()
    if process:
        assert os.waitpid(process, 0)[1] == 0
        print("end of a case", file=sys.stderr, flush=True)
        continue
    entry = dataclasses.replace(find_dataset("shapes"), hub="owner/set", revision=revision)
    source = open_split(entry, path, "train")
    result = [source.files, source.group_rows, [row["id"] for row in source.read(1)]]
    print(json.dumps(result), flush=True)
    sys.stderr.flush()
    os._exit(0)
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


@pytest.fixture(scope="module")
def results(tmp_path_factory, row, write_shards):
    """By case: files, group rows, ids of the second row group, stderr."""
    folder = tmp_path_factory.mktemp("hub")
    (folder / "set").mkdir()
    write_shards(folder / "set" / "data", "train", [[row(f"s{i}") for i in range(6)]], 2)
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.files = {
        str(file.relative_to(folder / "set")): file.read_bytes()
        for file in (folder / "set").rglob("*.parquet")
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = os.environ | {
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_HOME": str(folder / "hf"),
        "XDG_CACHE_HOME": str(folder / "cache"),
    }
    process = subprocess.run(
        [sys.executable, "-c", READ, json.dumps(list(CASES.values()))],
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
    )
    server.shutdown()
    server.server_close()
    assert process.returncode == 0, process.stderr[-2000:]
    lines, errors = process.stdout.splitlines(), process.stderr.split("end of a case\n")
    assert len(lines) == len(CASES)
    return {case: [*json.loads(line), error] for case, line, error in zip(CASES, lines, errors)}


@pytest.mark.parametrize("case", ["hub location of the entry", "name", "pattern"])
def test_row_groups_are_read_from_the_hub(results, case):
    files, rows, ids, stderr = results[case]
    assert (files, rows, ids) == ([FILE], [2, 2, 2], ["s2", "s3"])
    assert "latest commit" not in stderr


def test_a_name_without_a_revision_means_the_latest_commit(results):
    files, rows, ids, stderr = results["name without a revision"]
    assert files == [FILE]
    assert (rows, ids) == ([2, 2, 2], ["s2", "s3"])
    assert f"to pin this commit, give --data.path owner/set@{COMMIT}" in stderr
