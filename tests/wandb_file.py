"""Read the file of an offline run of Weights & Biases back.

It is a log in the format of LevelDB: blocks of 32 KiB, in which a record is whole or in pieces,
each after its checksum, length and kind. The first seven bytes name the format.
"""

import json
import struct
import time

from wandb.proto import wandb_internal_pb2

BLOCK = 32768
HEADER = struct.Struct("<IHB")
FULL, FIRST, MIDDLE, LAST = 1, 2, 3, 4


def records(file):
    """Yield the records of a ``run-ID.wandb`` file."""
    content = file.read_bytes()
    assert content[:4] == b":W&B"
    position, pieces = 7, []
    while position + HEADER.size <= len(content):
        if BLOCK - position % BLOCK < HEADER.size:  # the rest of a block is padding
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = HEADER.unpack_from(content, position)
        position += HEADER.size
        pieces.append(content[position : position + length])
        position += length
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(b"".join(pieces))
            pieces = []
            yield record


def wait_for_end(file, timeout=60):
    """Wait for the last records: W&B's process writes them after ``finish`` has returned."""
    deadline = time.monotonic() + timeout
    while not any(record.HasField("exit") for record in records(file)):
        assert time.monotonic() < deadline, f"{file} has no end"
        time.sleep(0.05)


def history(file):
    """Return the logged rows, each as values by key; a value of several parts is a dict."""
    rows = []
    for record in records(file):
        if record.HasField("history"):
            rows.append({})
            for item in record.history.item:
                *outer, last = item.nested_key or [item.key]
                place = rows[-1]
                for key in outer:
                    place = place.setdefault(key, {})
                place[last] = json.loads(item.value_json)
    return rows


def artifacts(file, kind):
    """Return the logged artifacts of a type: name, and names of the files."""
    logged = [record.artifact for record in records(file) if record.HasField("artifact")]
    return [
        (one.name, [entry.path for entry in one.manifest.contents])
        for one in logged
        if one.type == kind
    ]
