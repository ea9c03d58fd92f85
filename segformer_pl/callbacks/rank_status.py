"""What every rank is doing, collected by rank 0, and the failure of a rank, told to all others.

Rank 0 serves a TCP port, and every rank, rank 0 included, holds one connection to it. The messages
are lines of JSON::

    server of rank 0              rank 1                      rank 2
      | <-- token, status ---------- |                           |
      | <-- token, status -------------------------------------- |
      |                           SIGKILL                        |
      | <-- end of connection ------ x                           |
      | --- failure: rank 1 ended ... in step 4 ---------------> |

The system closes the connections of a process when it ends, whatever ended it, so the others learn
of it at once and by name. No tool of torch does this: its ``TCPStore`` does not tell that a client
has gone, NCCL waits for its timeout, and gloo's error does not name the rank.
"""

import json
import os
import secrets
import selectors
import socket
import threading
import time
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from typing import Any, NamedTuple

CONNECT_SECONDS = 30.0
MAX_BYTES = 1 << 16

_sockets: "weakref.WeakSet[socket.socket]" = weakref.WeakSet()


def _close_sockets() -> None:
    for one in list(_sockets):
        one.close()


# A data-loader worker would keep the connections of its rank open after the rank has ended.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_sockets)


class RankStatus(NamedTuple):
    """What a rank is doing.

    Attributes:
        name: How sentences name the rank, such as ``rank 1 (process 4242 on node7)``.
        still: Seconds for which its main thread has been in the same lines of code.
        moment: Part of the run, such as ``in step 4``.
        activity: ``loading data``, ``communicating`` or ``computing``.
        where: Function, file and line of the main thread.
    """

    name: str
    still: float
    moment: str
    activity: str
    where: str


class ServerAddress(NamedTuple):
    """Where rank 0 serves.

    Attributes:
        host: Host name or address of the machine of rank 0.
        port: Port.
        token: Secret of this run; every program can connect to the port.
        name: How sentences name rank 0.
    """

    host: str
    port: int
    token: str
    name: str


class Failure(NamedTuple):
    """Why the run cannot go on.

    Attributes:
        ranks: Ranks that have failed; empty if all hang and none of them is to blame.
        sentence: The reason, without a full stop.
    """

    ranks: tuple[int, ...]
    sentence: str


class Ticks:
    """Ticks of an interval.

    Silence is counted in ticks and not on a clock: a job that was suspended for an hour, all its
    ranks alike, has missed a single tick.

    Args:
        interval: Seconds between two ticks.
    """

    def __init__(self, interval: float) -> None:
        self.interval = interval
        self._next = time.monotonic() + interval

    def remaining(self) -> float:
        """Return the seconds until the next tick."""
        return max(self._next - time.monotonic(), 0.0)

    def is_due(self) -> bool:
        """Return whether the tick is due, and if so, begin to wait for the next one."""
        if self.remaining():
            return False
        self._next = time.monotonic() + self.interval
        return True


class Peer:
    """One end of a connection, which sends and receives lines of JSON.

    Args:
        connection: The socket.
        timeout: Seconds that sending may take, so that a stopped process blocks no other.
    """

    def __init__(self, connection: socket.socket, timeout: float) -> None:
        self.connection = connection
        self.status: RankStatus | None = None
        self.silent = 0.0  # seconds since the last message
        self._buffer = b""
        self._lock = threading.Lock()
        connection.settimeout(timeout)
        _sockets.add(connection)

    def send(self, message: Mapping[str, Any]) -> None:
        """Send a message. The receiving side notices a lost connection, so this raises nothing."""
        with self._lock, suppress(OSError):
            self.connection.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> Iterator[dict[str, Any]]:
        """Wait for data, and yield the complete messages.

        Raises:
            EOFError: The connection is closed, or the other side is no rank.
            TimeoutError: Nothing came in time.
        """
        try:
            data = self.connection.recv(MAX_BYTES)
        except TimeoutError:
            raise
        except OSError:
            data = b""
        *lines, self._buffer = (self._buffer + data).split(b"\n")
        self.silent = 0.0
        for line in lines:
            try:
                message = json.loads(line)
            except ValueError as error:
                raise EOFError("no message of a rank") from error
            if not isinstance(message, dict):
                raise EOFError("no message of a rank")
            yield message
        if not data or len(self._buffer) > MAX_BYTES:
            raise EOFError("the connection is closed")


def end_of(name: str, moment: str) -> str:
    """Return the sentence about a rank whose connection was closed, for a reason unknown."""
    return (
        f"{name} ended without a message {moment}, as if it was killed; if memory ran out, dmesg "
        "on its machine shows it"
    )


def silence_of(name: str, seconds: float) -> str:
    """Return the sentence about a rank that gives no sign of life."""
    return (
        f"{name} has given no sign of life for {seconds:.0f} s: its process is stopped, or its "
        "machine is down or cannot be reached"
    )


FindHang = Callable[[Mapping[int, RankStatus]], Failure | None]


class StatusServer(threading.Thread):
    """Collects the status of all ranks, and tells all of them when one fails or hangs.

    Args:
        interval: Seconds between two messages of a rank.
        silence: Seconds without a message after which a rank counts as lost.
        find_hang: Function (status by rank) -> failure if they hang, else None.
        describe_end: Function (rank, last status) -> sentence about the end of its process.
    """

    def __init__(
        self,
        interval: float,
        silence: float,
        find_hang: FindHang,
        describe_end: Callable[[int, RankStatus], str],
    ) -> None:
        super().__init__(daemon=True, name="rank status server")
        self.interval = interval
        self.silence = silence
        self.find_hang = find_hang
        self.describe_end = describe_end
        self.token = secrets.token_hex(16)
        self.failure: Failure | None = None
        self._is_closed = False
        self._ranks: dict[int, Peer] = {}  # those whose run has not ended
        is_dual = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if is_dual else socket.AF_INET
        self._listener = socket.create_server(
            ("", 0), family=family, dualstack_ipv6=is_dual, backlog=socket.SOMAXCONN
        )
        _sockets.add(self._listener)
        self.port: int = self._listener.getsockname()[1]

    def run(self) -> None:
        ticks = Ticks(self.interval)
        with selectors.DefaultSelector() as selector:
            selector.register(self._listener, selectors.EVENT_READ, None)
            while not self._is_closed:
                for key, _ in selector.select(ticks.remaining()):
                    if key.data is None:
                        peer = Peer(self._listener.accept()[0], self.interval)
                        selector.register(peer.connection, selectors.EVENT_READ, peer)
                    elif not self._receive(key.data):
                        selector.unregister(key.fileobj)
                        key.data.connection.close()
                if ticks.is_due():
                    self._judge()
        self._listener.close()

    def close(self, timeout: float) -> None:
        """Wait for the end of the run on all ranks, and stop.

        Args:
            timeout: Longest time to wait, in seconds.
        """
        deadline = time.monotonic() + timeout
        while self._ranks and time.monotonic() < deadline:
            time.sleep(0.01)
        self._send({"end": True})
        self._is_closed = True

    def _receive(self, peer: Peer) -> bool:
        """Handle the messages of a peer; return whether its connection is still open."""
        rank = next((rank for rank, one in self._ranks.items() if one is peer), None)
        try:
            for message in peer.receive():
                if rank is None:
                    if message.get("token") != self.token:
                        return False
                    rank = int(message["rank"])
                    self._ranks[rank] = peer
                if "status" in message:
                    peer.status = RankStatus(*message["status"])
                if "failure" in message:
                    self._tell(Failure((rank,), message["failure"]))
                if "end" in message:
                    del self._ranks[rank]
                    return False
        except EOFError:
            if rank is not None and peer.status is not None:
                del self._ranks[rank]
                self._tell(Failure((rank,), self.describe_end(rank, peer.status)))
            return False
        return True

    def _judge(self) -> None:
        """Look for silent ranks and for a hang, and show the others that rank 0 is alive."""
        for rank, peer in self._ranks.items():
            peer.silent += self.interval
            if peer.silent >= self.silence and peer.status is not None:
                self._tell(Failure((rank,), silence_of(peer.status.name, peer.silent)))
        statuses = {rank: peer.status for rank, peer in sorted(self._ranks.items()) if peer.status}
        if statuses and (failure := self.find_hang(statuses)):
            self._tell(failure)
        self._send({})

    def _tell(self, failure: Failure) -> None:
        if self.failure is None:  # further failures are consequences of the first one
            self.failure = failure
            self._send({"failure": failure})

    def _send(self, message: Mapping[str, Any]) -> None:
        for peer in list(self._ranks.values()):
            peer.send(message)


class StatusClient(threading.Thread):
    """Sends the status of this rank to rank 0, and receives the failure of another rank.

    Args:
        server: Where rank 0 serves, as all ranks were told.
        rank: Global rank of this process.
        interval: Seconds between two messages.
        silence: Seconds without a message after which rank 0 counts as lost.
        get_status: Function that returns the status of this rank.
        on_failure: Function that is called once, in this thread, with the failure.

    Raises:
        OSError: The server cannot be reached.
    """

    def __init__(
        self,
        server: ServerAddress,
        rank: int,
        interval: float,
        silence: float,
        get_status: Callable[[], RankStatus],
        on_failure: Callable[[Failure], None],
    ) -> None:
        super().__init__(daemon=True, name="rank status client")
        self.server = server
        self.interval = interval
        self.silence = silence
        self.get_status = get_status
        self.on_failure = on_failure
        self.failure: Failure | None = None
        self._is_told = threading.Event()
        self._has_ended = False
        connection = socket.create_connection((server.host, server.port), CONNECT_SECONDS)
        self._peer = Peer(connection, interval)
        self._peer.send({"token": server.token, "rank": rank, "status": get_status()})

    def run(self) -> None:
        ticks = Ticks(self.interval)
        while self.failure is None and not self._has_ended:
            if ticks.is_due():
                self._peer.silent += self.interval
                self._peer.send({"status": self.get_status()})
            try:
                for message in self._peer.receive():
                    if "failure" in message:
                        ranks, sentence = message["failure"]
                        self._fail(Failure(tuple(ranks), sentence))
                    if "end" in message:
                        return
            except TimeoutError:
                if self._peer.silent >= self.silence:
                    self._fail(Failure((0,), silence_of(self.server.name, self._peer.silent)))
            except EOFError:
                if not self._has_ended:
                    sentence = end_of(self.server.name, self.get_status().moment)
                    self._fail(Failure((0,), sentence))

    def _fail(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            self._is_told.set()
            self.on_failure(failure)

    def report(self, sentence: str) -> None:
        """Tell all ranks that this one has failed, and wait until they are told.

        Args:
            sentence: What has happened, without a full stop.
        """
        self._peer.send({"failure": sentence})
        self.wait_for_failure(5 * self.interval)

    def wait_for_failure(self, timeout: float) -> Failure | None:
        """Wait for the failure of any rank and return it; None if there is none in time.

        Args:
            timeout: Longest time to wait, in seconds.
        """
        self._is_told.wait(timeout)
        return self.failure

    def end(self) -> None:
        """Tell rank 0 that the run has ended normally on this rank."""
        self._has_ended = True
        self._peer.send({"end": True})
