"""Shards behind a web server that fails in all the ways that web servers fail."""

import re
import threading
import time
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest

from segformer_pl.data import remote
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.labels import DataError
from segformer_pl.data.sources import open_split

ENTRY = find_dataset("shapes")


class Handler(SimpleHTTPRequestHandler):
    """Serves byte ranges; takes the server's next fault, if there is one, for the next GET."""

    def do_GET(self):
        server = self.server
        file = server.folder / self.path.lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        first, last = 0, len(content) - 1
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(wanted[1]), min(int(wanted[2] or last), last)
        body = content[first : last + 1]
        server.requests.append((time.monotonic(), self.path))
        fault = server.faults.pop(0) if server.faults else None
        if isinstance(fault, int):
            self.send_response(fault)
            if fault == 429:
                self.send_header("Retry-After", "1")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        if fault == "short":  # a proxy's idea of an answer
            body = body[: len(body) // 2]
            last = first + len(body) - 1
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        if fault == "drop":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.connection.close()
        elif fault == "slow":
            self.wfile.write(body[:10])
            self.wfile.flush()
            server.patience.wait(5)
        elif fault == "corrupt":
            self.wfile.write(bytes(len(body)))
        else:
            self.wfile.write(body)
        return None

    def do_HEAD(self):
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        self.send_response(200)
        self.send_header("Content-Length", str(file.stat().st_size))
        self.send_header("Accept-Ranges", "bytes")
        self.end_headers()
        return None

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(remote, "SILENCE", 0.5)
    monkeypatch.setattr(remote, "ATTEMPTS", 4)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler))
    server.folder, server.faults, server.requests = tmp_path / "served", [], []
    server.patience = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.patience.set()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def shards(server, row, write_shards):
    rows = [row(f"s{i}") for i in range(6)]
    write_shards(server.folder, "train", [rows[:4], rows[4:]], row_group_size=2)
    names = sorted(path.name for path in server.folder.iterdir())
    return {"train": [f"{server.url}/{name}" for name in names]}


def ids(source):
    return [row["id"] for group in range(len(source.group_rows)) for row in source.read(group)]


def test_urls_are_read_row_group_by_row_group(shards):
    source = open_split(ENTRY, shards, "train")
    assert source.group_rows == [2, 2, 2]
    assert [row["id"] for row in source.read(1)] == ["s2", "s3"]


def test_a_pattern_of_urls(server, shards, row, write_shards):
    write_shards(server.folder, "validation", [[row("v")]])
    pattern = f"{server.url}/{{split}}-00000-of-00001.parquet"
    assert ids(open_split(ENTRY, pattern, "validation")) == ["v"]


def test_footers_are_read_once_on_a_machine(server, shards):
    open_split(ENTRY, shards, "train")
    before = len(server.requests)
    assert before > 0
    assert open_split(ENTRY, shards, "train").group_rows == [2, 2, 2]
    assert len(server.requests) == before


def test_the_fingerprint_does_not_depend_on_the_place(server, shards):
    there = open_split(ENTRY, shards, "train").fingerprint
    assert open_split(ENTRY, str(server.folder), "train").fingerprint == there


@pytest.mark.parametrize("fault", ["drop", "slow", "short", "corrupt", 429, 500, 503])
@pytest.mark.parametrize("when", [pytest.param("footers", marks=pytest.mark.slow), "rows"])
def test_a_passing_fault_is_waited_out(server, shards, fault, when, caplog):
    if when == "footers":
        server.faults[:] = [fault, fault]
    source = open_split(ENTRY, shards, "train")
    if when == "rows":
        server.faults[:] = [fault, fault]
    assert ids(source) == [f"s{i}" for i in range(6)]
    assert server.faults == []
    assert "attempt 2 of 4" in caplog.text


def test_the_server_says_how_long_to_wait(server, shards):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = [429]
    source.read(0)
    (refused, _), (answered, _), *_ = server.requests
    assert answered - refused >= 1


def test_a_lasting_fault_ends_in_one_sentence(server, shards):
    source = open_split(ENTRY, shards, "train")
    server.faults[:] = [503] * 20
    with pytest.raises(DataError) as raised:
        source.read(0)
    assert re.fullmatch(
        rf"{server.url}/train-00000-of-00002.parquet could not be read in 4 attempts \(.*503.*\); "
        r"when the network or the server is well again, resume from the last checkpoint",
        str(raised.value),
    )


@pytest.mark.parametrize("fault", [403, 404])
def test_what_will_not_pass_is_not_waited_for(server, shards, fault):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = [fault] * 5
    with pytest.raises(DataError, match=r"parquet cannot be read \(.*\); correct the address"):
        source.read(0)
    assert len(server.requests) == 1


def test_a_url_without_a_file(server, shards):
    with pytest.raises(DataError, match=r"nothing.parquet cannot be read \(.*404.*; correct"):
        open_split(ENTRY, {"train": [f"{server.url}/nothing.parquet"]}, "train")


def test_a_server_that_is_not_there(server, monkeypatch):
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    with pytest.raises(DataError, match=r"could not be read in 2 attempts \(.*ConnectorError"):
        open_split(ENTRY, {"train": ["http://127.0.0.1:9/train.parquet"]}, "train")
