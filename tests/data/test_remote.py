"""Shards behind a web server that fails in all the ways that web servers fail."""

import contextlib
import gc
import multiprocessing
import os
import re
import threading
import time
from email.utils import formatdate
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer

import pytest
from torch.utils.data import DataLoader

from segformer_pl.data import remote
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.order import StoredOrder
from segformer_pl.data.sources import open_split
from segformer_pl.data.streaming import Samples, collate
from segformer_pl.data.transforms import to_tensors
from segformer_pl.errors import UserError

pytestmark = pytest.mark.slow

ENTRY = find_dataset("shapes")


class Handler(SimpleHTTPRequestHandler):
    """Serves byte ranges; takes the server's next fault, if there is one, for the next GET."""

    protocol_version = "HTTP/1.1"  # connections stay open for the next request

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
        if fault == "in circles":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            server.faults.append(fault)
            return None
        if fault == "whole":  # as if no range had been asked for
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client has seen enough
                self.wfile.write(content)
            self.close_connection = True
            return None
        if isinstance(fault, int):
            self.send_response(fault)
            if fault == 429:
                self.send_header("Retry-After", server.retry_after())
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
        elif fault == "drip":
            for byte in body:
                with contextlib.suppress(OSError):
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                if server.patience.wait(0.1):
                    break
        elif fault == "corrupt":
            self.wfile.write(bytes(len(body)))
        else:
            self.wfile.write(body)
        return None

    def do_HEAD(self):
        file = self.server.folder / self.path.lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        if self.server.busy_openings > 0:  # HEAD is followed by a GET, busy as well
            self.server.busy_openings -= 1
            self.server.faults.append(429)
            self.send_response(429)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
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
    monkeypatch.setattr(remote, "PATIENCE", 3.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler))
    server.folder, server.faults, server.requests = tmp_path / "served", [], []
    server.busy_openings, server.retry_after = 0, lambda: "1"
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


@pytest.mark.parametrize("fault", ["drop", "slow", "drip", "short", "corrupt", 429, 500, 503])
@pytest.mark.parametrize("when", [pytest.param("footers", marks=pytest.mark.slow), "rows"])
def test_a_passing_fault_is_waited_out(server, shards, fault, when, caplog):
    if when == "footers":
        server.faults[:] = [fault, fault]
    source = open_split(ENTRY, shards, "train")
    if when == "rows":
        server.faults[:] = [fault, fault]
    assert ids(source) == [f"s{i}" for i in range(6)]
    assert server.faults == []
    assert "attempt 2" in caplog.text


def test_the_server_says_how_long_to_wait(server, shards):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = [429]
    source.read(0)
    (refused, _), (answered, _), *_ = server.requests
    assert answered - refused >= 1


def http_date():
    return formatdate(time.time() + 2, usegmt=True)  # in whole seconds: 1 to 2 from now


@pytest.mark.parametrize("retry_after", [lambda: "1", http_date], ids=["seconds", "date"])
def test_the_server_says_how_long_to_wait_before_a_file_is_opened(server, shards, retry_after):
    server.retry_after, server.busy_openings = retry_after, 1
    assert ids(open_split(ENTRY, shards, "train")) == [f"s{i}" for i in range(6)]
    (refused, _), (answered, _), *_ = server.requests
    assert answered - refused >= 0.9


def test_patience_is_a_time_and_not_a_number_of_attempts(server, shards, monkeypatch):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = [503] * 30  # of a server that says so at once
    monkeypatch.setattr(remote, "LONGEST_WAIT", 0.02)
    assert [row["id"] for row in source.read(0)] == ["s0", "s1"]
    assert len(server.requests) > 30


def test_a_lasting_fault_ends_in_one_sentence(server, shards, monkeypatch):
    source = open_split(ENTRY, shards, "train")
    monkeypatch.setattr(remote, "PATIENCE", 0.2)
    server.faults[:] = [503] * 20
    with pytest.raises(UserError) as raised:
        source.read(0)
    assert re.fullmatch(
        rf"{server.url}/train-00000-of-00002.parquet could not be read for \d s \(.*503.*\); "
        r"once the network or the server is back, resume from the last checkpoint",
        str(raised.value),
    )


@pytest.mark.parametrize("fault", [403, 404])
def test_what_will_not_pass_is_not_waited_for(server, shards, fault):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = [fault] * 5
    with pytest.raises(UserError, match=r"parquet cannot be read \(.*\); correct the address"):
        source.read(0)
    assert len(server.requests) == 1


def test_redirects_in_a_circle_are_not_waited_for(server, shards):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = ["in circles"]
    with pytest.raises(
        UserError, match=r"cannot be read \(TooManyRedirects.*; correct the address"
    ):
        source.read(0)
    assert len(server.requests) < 20


def test_a_server_without_ranges_is_said_to_be_one(server, row, write_shards):
    # Larger than what is asked for at once: a smaller file comes whole in any case.
    large = [row(f"s{i}") | {"image": {"bytes": os.urandom(4 << 20)}} for i in range(4)]
    write_shards(server.folder, "train", [large], row_group_size=1)
    url = f"{server.url}/train-00000-of-00001.parquet"
    source = open_split(ENTRY, {"train": [url]}, "train")
    server.requests.clear()
    server.faults[:] = ["whole"] * 5
    with pytest.raises(UserError, match=r"does not answer requests for a part .*; download the"):
        source.read(2)
    assert len(server.requests) == 1


@pytest.mark.parametrize("page", [b"<!DOCTYPE html><title>Log in</title>", b'{"error": 1}'])
def test_a_page_in_place_of_a_shard_is_said_at_once(server, page, caplog):
    server.folder.mkdir()
    (server.folder / "train.parquet").write_bytes(page * 20)
    sentence = r"train.parquet is no Parquet file, it begins with .*; if the server asks for a logi"
    with pytest.raises(UserError, match=sentence):
        open_split(ENTRY, {"train": [f"{server.url}/train.parquet"]}, "train")
    assert "attempt" not in caplog.text


def test_a_name_that_no_one_knows_is_a_slip_in_the_address(server):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be read \(ClientConnectorDNSError.*; correct the"):
        open_split(ENTRY, {"train": ["http://no.such.host.invalid/a.parquet"]}, "train")
    assert time.monotonic() - start < 2


def test_a_file_that_was_replaced_on_the_server(server, shards, row, write_shards):
    source = open_split(ENTRY, shards, "train")
    write_shards(server.folder, "train", [[row("other")], [row("other")]])
    with pytest.raises(UserError, match=r"00001-of-00002.parquet' has other row groups than when"):
        source.read(2)


def test_loader_processes_open_connections_of_their_own(server, shards, caplog):
    # An inherited connection, and the inherited loop that watches it, are still the parent's.
    source = open_split(ENTRY, shards, "train")
    samples = Samples(ENTRY, source, StoredOrder(source.group_rows), to_tensors)
    for _ in range(3):
        assert samples[0]["id"] == "s0"
        samples._open.clear()
        start = time.monotonic()
        loader = DataLoader(samples, 1, num_workers=2, sampler=range(6), collate_fn=collate)
        assert [batch["id"] for batch in loader] == [[f"s{i}"] for i in range(6)]
        samples._open.clear()
        assert [samples[position]["id"] for position in (5, 0, 3)] == ["s5", "s0", "s3"]
        assert time.monotonic() - start < 5
    assert caplog.text == ""  # nothing had to be read again


def test_a_forked_process_does_not_close_the_connections_of_its_parent(server, shards, caplog):
    # It would take them out of the list of those that the parent's loop waits for (epoll), and the
    # parent would wait for ever.
    def first_bytes():
        fs, path = remote.file_system(shards["train"][0])
        return fs.cat_file(path, 0, 4)

    assert first_bytes() == b"PAR1"
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    child.start()
    child.join()
    assert remote.patiently(first_bytes, shards["train"][0]) == b"PAR1"
    assert caplog.text == ""


def test_a_url_without_a_file(server, shards):
    with pytest.raises(UserError, match=r"nothing.parquet cannot be read \(.*404.*; correct"):
        open_split(ENTRY, {"train": [f"{server.url}/nothing.parquet"]}, "train")


def test_a_server_that_is_not_there(server, monkeypatch):
    monkeypatch.setattr(remote, "PATIENCE", 0.5)
    with pytest.raises(UserError, match=r"could not be read for \d s \(.*ConnectorError"):
        open_split(ENTRY, {"train": ["http://127.0.0.1:9/train.parquet"]}, "train")
