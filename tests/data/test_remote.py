"""Reading shards from a web server that injects faults: retries, timeouts, permanent errors."""

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
    """Serves byte ranges; each GET takes the next fault of ``server.faults``, if any is left."""

    protocol_version = "HTTP/1.1"  # connections stay open for the next request

    def do_GET(self):
        server = self.server
        file = server.folder / self.path.lstrip("/")
        if not file.is_file():
            return self.send_error(404)
        content = file.read_bytes()
        first, last = 0, len(content) - 1
        if requested := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(requested[1]), min(int(requested[2] or last), last)
        body = content[first : last + 1]
        server.requests.append((time.monotonic(), self.path))
        fault = server.faults.pop(0) if server.faults else None
        if fault == "redirect loop":
            self.send_response(302)
            self.send_header("Location", self.path)
            self.send_header("Content-Length", "0")
            self.end_headers()
            server.faults.append(fault)
            return None
        if fault == "whole":  # ignores the range
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            with contextlib.suppress(OSError):  # the client has closed the connection
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
        if fault == "short":  # a proxy that cuts the answer
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
            server.stopped.wait(5)
        elif fault == "drip":
            for byte in body:
                with contextlib.suppress(OSError):
                    self.wfile.write(bytes([byte]))
                    self.wfile.flush()
                if server.stopped.wait(0.1):
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
        if self.server.num_busy_heads > 0:  # the GET that follows a HEAD is refused as well
            self.server.num_busy_heads -= 1
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
    monkeypatch.setattr(remote, "READ_TIMEOUT", 0.5)
    monkeypatch.setattr(remote, "RETRY_SECONDS", 3.0)
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler))
    server.folder, server.faults, server.requests = tmp_path / "served", [], []
    server.num_busy_heads, server.retry_after = 0, lambda: "1"
    server.stopped = threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.stopped.set()
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


def test_footers_are_cached(server, shards):
    open_split(ENTRY, shards, "train")
    before = len(server.requests)
    assert before > 0
    assert open_split(ENTRY, shards, "train").group_rows == [2, 2, 2]
    assert len(server.requests) == before


def test_the_fingerprint_does_not_depend_on_the_location(server, shards):
    remote_fingerprint = open_split(ENTRY, shards, "train").fingerprint
    assert open_split(ENTRY, str(server.folder), "train").fingerprint == remote_fingerprint


@pytest.mark.parametrize("fault", ["drop", "slow", "drip", "short", "corrupt", 429, 500, 503])
@pytest.mark.parametrize("when", [pytest.param("footers", marks=pytest.mark.slow), "rows"])
def test_transient_faults_are_retried(server, shards, fault, when, caplog):
    if when == "footers":
        server.faults[:] = [fault, fault]
    source = open_split(ENTRY, shards, "train")
    if when == "rows":
        server.faults[:] = [fault, fault]
    assert ids(source) == [f"s{i}" for i in range(6)]
    assert server.faults == []
    assert "attempt 2" in caplog.text


def test_retry_after_sets_the_wait(server, shards):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = [429]
    source.read(0)
    (refused, _), (answered, _), *_ = server.requests
    assert answered - refused >= 1


def http_date():
    return formatdate(time.time() + 2, usegmt=True)  # whole seconds: 1 to 2 from now


@pytest.mark.parametrize("retry_after", [lambda: "1", http_date], ids=["seconds", "date"])
def test_retry_after_counts_when_a_file_is_opened(server, shards, retry_after):
    server.retry_after, server.num_busy_heads = retry_after, 1
    assert ids(open_split(ENTRY, shards, "train")) == [f"s{i}" for i in range(6)]
    (refused, _), (answered, _), *_ = server.requests
    assert answered - refused >= 0.9


def test_retries_are_limited_by_time_not_by_number(server, shards, monkeypatch):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = [503] * 30  # answered at once
    monkeypatch.setattr(remote, "MAX_WAIT", 0.02)
    assert [row["id"] for row in source.read(0)] == ["s0", "s1"]
    assert len(server.requests) > 30


def test_reading_is_given_up_after_the_time_limit(server, shards, monkeypatch):
    source = open_split(ENTRY, shards, "train")
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.2)
    server.faults[:] = [503] * 20
    with pytest.raises(UserError) as raised:
        source.read(0)
    assert re.fullmatch(
        rf"{server.url}/train-00000-of-00002.parquet could not be read for \d s \(.*503.*\); "
        r"once the network or the server is back, resume from the last checkpoint",
        str(raised.value),
    )


@pytest.mark.parametrize("fault", [403, 404])
def test_permanent_errors_are_not_retried(server, shards, fault):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = [fault] * 5
    with pytest.raises(UserError, match=r"parquet cannot be read \(.*\); correct the address"):
        source.read(0)
    assert len(server.requests) == 1


def test_a_redirect_loop_is_not_retried(server, shards):
    source = open_split(ENTRY, shards, "train")
    server.requests.clear()
    server.faults[:] = ["redirect loop"]
    with pytest.raises(
        UserError, match=r"cannot be read \(TooManyRedirects.*; correct the address"
    ):
        source.read(0)
    assert len(server.requests) < 20


def test_a_server_without_ranges_is_an_error(server, row, write_shards):
    # Larger than one request of fsspec, which reads a smaller file as a whole anyway.
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
def test_a_web_page_instead_of_a_shard_is_not_retried(server, page, caplog):
    server.folder.mkdir()
    (server.folder / "train.parquet").write_bytes(page * 20)
    sentence = r"train.parquet is no Parquet file, it begins with .*; if the server asks for a logi"
    with pytest.raises(UserError, match=sentence):
        open_split(ENTRY, {"train": [f"{server.url}/train.parquet"]}, "train")
    assert "attempt" not in caplog.text


def test_an_unknown_host_is_not_retried(server):
    start = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be read \(ClientConnectorDNSError.*; correct the"):
        open_split(ENTRY, {"train": ["http://no.such.host.invalid/a.parquet"]}, "train")
    assert time.monotonic() - start < 2


def test_a_file_replaced_on_the_server_is_an_error(server, shards, row, write_shards):
    source = open_split(ENTRY, shards, "train")
    write_shards(server.folder, "train", [[row("other")], [row("other")]])
    with pytest.raises(UserError, match=r"00001-of-00002.parquet' has other row groups than when"):
        source.read(2)


def test_workers_open_their_own_connections(server, shards, caplog):
    # A forked worker inherits connections and the event loop, which the parent still uses.
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
    assert caplog.text == ""  # no retry


def test_a_forked_process_keeps_the_connections_of_its_parent_open(server, shards, caplog):
    # Closing them would remove them from the epoll set of the parent's event loop, and the parent
    # would wait for ever.
    def first_bytes():
        fs, path = remote.file_system(shards["train"][0])
        return fs.cat_file(path, 0, 4)

    assert first_bytes() == b"PAR1"
    child = multiprocessing.get_context("fork").Process(target=gc.collect)
    child.start()
    child.join()
    assert remote.read_with_retries(first_bytes, shards["train"][0]) == b"PAR1"
    assert caplog.text == ""


def test_a_missing_file_on_the_server(server, shards):
    with pytest.raises(UserError, match=r"nothing.parquet cannot be read \(.*404.*; correct"):
        open_split(ENTRY, {"train": [f"{server.url}/nothing.parquet"]}, "train")


def test_an_unreachable_server(server, monkeypatch):
    monkeypatch.setattr(remote, "RETRY_SECONDS", 0.5)
    with pytest.raises(UserError, match=r"could not be read for \d s \(.*ConnectorError"):
        open_split(ENTRY, {"train": ["http://127.0.0.1:9/train.parquet"]}, "train")
