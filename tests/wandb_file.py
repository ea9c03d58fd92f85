"""Read the file of an offline run of Weights & Biases back.

It is a log in the format of LevelDB: blocks of 32 KiB, in which a record is whole or in pieces,
each after its checksum, length and kind. The first seven bytes name the format.
"""

import json
import struct

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


def history(file):
    """Return the logged rows, each as values by key."""
    return [
        {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in row.item}
        for row in (record.history for record in records(file) if record.HasField("history"))
    ]


def artifacts(file):
    """Return name, type and names of the files of the logged artifacts."""
    found = []
    for record in records(file):
        if record.HasField("request") and record.request.HasField("log_artifact"):
            found.append(record.request.log_artifact.artifact)
        elif record.HasField("artifact"):
            found.append(record.artifact)
    return [(one.name, one.type, [entry.path for entry in one.manifest.contents]) for one in found]
