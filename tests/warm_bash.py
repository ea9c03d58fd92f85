"""Run a bash script in which ``$PYTHON`` is no new interpreter but a fork of this process.

    python tests/warm_bash.py SCRIPT [ARGUMENTS ...]

Started by the fork server, it has imported everything, which takes longer than most commands of the
scripts. ``$PYTHON`` is a small client: it passes its arguments, environment, folder and streams
through a socket and waits for the status.
"""

import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import weakref
from pathlib import Path

import fork_server

CLIENT = """#!{python} -ISu
import json, os, signal, socket, sys

server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
request = [sys.argv[1:], dict(os.environ), os.getcwd()]
socket.send_fds(server, [json.dumps(request).encode() + b"\\n"], [0, 1, 2])
answers = server.makefile()
process = int(answers.readline())
signal.signal(signal.SIGTERM, lambda *_: os.kill(process, signal.SIGTERM))
status = int(answers.readline())
if status < 0:
    signal.signal(-status, signal.SIG_DFL)
    os.kill(os.getpid(), -status)
sys.exit(status)
"""
LONGEST = 1 << 20  # bytes of a request


def serve(listener):
    """Answer one connection after the other, each with a process of its own."""
    while True:
        connection, _ = listener.accept()
        received, streams, _, _ = socket.recv_fds(connection, LONGEST, 3)
        while not received.endswith(b"\n"):
            received += connection.recv(LONGEST)
        arguments, environment, folder = json.loads(received)
        process = os.fork()
        if process == 0:
            for number, stream in enumerate(streams):
                os.dup2(stream, number)
            os.closerange(3, max(streams) + 1)
            os.chdir(folder)
            os.environ.clear()
            os.environ.update(environment)
            weakref.finalize._registry.clear()  # of the folder below, deleted at the parent's end
            fork_server.run(*arguments[arguments[0] == "-m" :])
        for stream in streams:
            os.close(stream)
        connection.sendall(f"{process}\n".encode())
        threading.Thread(target=wait, args=(process, connection)).start()


def wait(process, connection):
    _, status = os.waitpid(process, 0)
    connection.sendall(f"{os.waitstatus_to_exitcode(status)}\n".encode())
    connection.close()


def main(script, *arguments):
    with tempfile.TemporaryDirectory() as folder, socket.socket(socket.AF_UNIX) as listener:
        address = str(Path(folder, "socket"))
        listener.bind(address)
        listener.listen()
        client = Path(folder, "python")
        client.write_text(CLIENT.format(python=sys.executable, address=address))
        client.chmod(0o755)
        threading.Thread(target=serve, args=(listener,), daemon=True).start()
        environment = os.environ | {"PYTHON": str(client)}
        status = subprocess.run(["bash", script, *arguments], env=environment).returncode
    sys.exit(status)


if __name__ == "__main__":
    main(*sys.argv[1:])
