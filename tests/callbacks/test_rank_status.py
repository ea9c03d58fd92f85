"""Ranks that end, stop or report a failure, as real processes connected to a server."""

import os
import signal
import socket
import time

import pytest

from segformer_pl.callbacks.rank_status import (
    Failure,
    RankStatus,
    ServerAddress,
    StatusClient,
    StatusServer,
    end_of,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")

INTERVAL = 0.05
SILENCE = 1.0


def status(rank, still=0.0):
    return RankStatus(f"rank {rank}", still, "in step 4", "computing", "here")


class Ranks:
    """A server, a client in this process (rank 0), and clients in processes of their own."""

    def __init__(self, find_hang):
        self.server = StatusServer(
            INTERVAL, SILENCE, find_hang, lambda _, last: end_of(last.name, last.moment)
        )
        self.server.start()
        self.address = ServerAddress("localhost", self.server.port, self.server.token, "rank 0")
        self.processes = {}
        self.client = self.connect(0)

    def connect(self, rank, on_failure=lambda failure: None, still=0.0):
        arguments = (self.address, rank, INTERVAL, SILENCE, lambda: status(rank, still), on_failure)
        client = StatusClient(*arguments)
        client.start()
        return client

    def start(self, rank, action=lambda client: None, **options):
        """Start a rank; it ends with status 7 if it is told of a failure, and waits otherwise."""
        self.processes[rank] = os.fork()
        if not self.processes[rank]:
            client = self.connect(rank, on_failure=lambda failure: os._exit(7), **options)
            action(client)
            time.sleep(60)
            os._exit(1)

    def wait_until_connected(self, world_size):
        deadline = time.monotonic() + 20
        while len(self.server._ranks) < world_size:
            assert time.monotonic() < deadline
            time.sleep(0.01)

    def end(self):
        for process in self.processes.values():
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
        self.client.end()
        self.server.close(0.0)


@pytest.fixture
def ranks():
    started = []

    def start(find_hang=lambda statuses: None):
        started.append(Ranks(find_hang))
        return started[-1]

    yield start
    for one in started:
        one.end()


def was_told(process):
    deadline = time.monotonic() + 60
    while not (ended := os.waitpid(process, os.WNOHANG))[0]:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return os.waitstatus_to_exitcode(ended[1]) == 7


def test_a_killed_rank_is_named_at_once_to_all_others(ranks):
    run = ranks()

    def fork_a_worker(client):
        if not os.fork():
            time.sleep(5)  # a data-loader worker, which outlives its rank
            os._exit(0)

    run.start(1, fork_a_worker)
    run.start(2)
    run.wait_until_connected(3)
    begin = time.monotonic()
    os.kill(run.processes[1], signal.SIGKILL)
    failure = run.client.wait_for_failure(20)
    assert time.monotonic() - begin < SILENCE
    assert failure == Failure((1,), end_of("rank 1", "in step 4"))
    assert was_told(run.processes.pop(2))
    os.waitpid(run.processes.pop(1), 0)


def test_a_stopped_rank_is_named_after_the_silence(ranks):
    run = ranks()
    run.start(1)
    run.wait_until_connected(2)
    os.kill(run.processes[1], signal.SIGSTOP)
    failure = run.client.wait_for_failure(20)
    assert failure.ranks == (1,)
    assert failure.sentence.startswith("rank 1 has given no sign of life for 1 s: its process")


def test_the_first_report_of_a_failure_reaches_all(ranks):
    run = ranks()
    run.start(1)
    run.start(2, lambda client: client.report("rank 2 failed in step 4: UserError: no image"))
    failure = run.client.wait_for_failure(20)
    assert failure == Failure((2,), "rank 2 failed in step 4: UserError: no image")
    assert all(was_told(run.processes.pop(rank)) for rank in (1, 2))
    run.client.report("rank 0 failed: a consequence")
    assert run.client.failure == run.server.failure == failure


def test_a_hang_is_told_once_all_ranks_are_still(ranks):
    def find_hang(statuses):
        is_hang = len(statuses) == 2 and min(one.still for one in statuses.values()) > 5
        return Failure((1,), "rank 1 hangs") if is_hang else None

    run = ranks(find_hang)
    run.start(1, still=9.0)
    assert run.client.wait_for_failure(10 * INTERVAL) is None  # rank 0 moves
    run.client.get_status = lambda: status(0, still=8.0)
    assert run.client.wait_for_failure(20) == Failure((1,), "rank 1 hangs")


def test_rank_0_is_named_if_it_ends_or_stops():
    for signum, sentence in (
        (signal.SIGKILL, end_of("rank 0", "in step 4")),
        (signal.SIGSTOP, "rank 0 has given no sign of life"),
    ):
        reader, writer = os.pipe()
        process = os.fork()
        if not process:
            server = StatusServer(INTERVAL, SILENCE, lambda _: None, lambda *_: "")
            server.start()
            os.write(writer, f"{server.port} {server.token}".encode())
            time.sleep(60)
            os._exit(0)
        port, token = os.read(reader, 100).decode().split()
        address = ServerAddress("localhost", int(port), token, "rank 0")
        client = StatusClient(
            address, 1, INTERVAL, SILENCE, lambda: status(1), lambda failure: None
        )
        client.start()
        time.sleep(3 * INTERVAL)
        assert client.failure is None
        os.kill(process, signum)
        assert client.wait_for_failure(20) is not None
        assert client.failure.ranks == (0,)
        assert client.failure.sentence.startswith(sentence)
        os.kill(process, signal.SIGKILL)
        os.waitpid(process, 0)


def test_strangers_and_normal_ends_are_no_failures(ranks):
    run = ranks()
    for text in (
        b"GET / HTTP/1.1\r\n\r\n",
        b'{"token": "x", "rank": 0}\n',
        b"[1]\n",
        b"\xff\n",
        b"",
    ):
        with socket.create_connection(("localhost", run.server.port)) as stranger:
            stranger.sendall(text)
    other = run.connect(1)
    other.end()
    run.client.end()
    run.server.close(20)
    run.server.join(20)
    assert not run.server.is_alive()
    assert run.server.failure is None
    assert run.client.failure is None
    assert other.failure is None
