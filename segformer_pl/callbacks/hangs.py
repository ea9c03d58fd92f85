"""Where the threads of ranks that stand still are, and which rank is to blame for it."""

import os
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import CodeType, FrameType
from typing import NamedTuple

from segformer_pl.callbacks.rank_status import Failure, RankStatus

LOADER = os.path.join("torch", "utils", "data", "")
# Files of torch in which a rank waits for others. Gradients are reduced in the backward pass.
COMMUNICATION = tuple(
    os.path.join("torch", *parts)
    for parts in (("distributed", ""), ("nn", "parallel", ""), ("autograd", "graph.py"))
)
PACKAGES = f"site-packages{os.sep}"
STANDARD_LIBRARY = sysconfig.get_path("stdlib")
MAX_NAMED = 4  # ranks of a sentence

Lines = tuple[tuple[CodeType, int], ...]


class Position(NamedTuple):
    """Where a thread is.

    Attributes:
        lines: Code and line number of every frame, from the innermost to the outermost.
        activity: ``loading data``, ``communicating`` or ``computing``.
        where: Function, file and line of the innermost frame outside of Python's standard library.
    """

    lines: Lines
    activity: str
    where: str


def position_of(frame: FrameType) -> Position:
    """Return where the thread of a frame is.

    Args:
        frame: Innermost frame of the thread.
    """
    frames = [frame]
    while (outer := frames[-1].f_back) is not None:
        frames.append(outer)
    files = [one.f_code.co_filename for one in frames]
    index = next((i for i, file in enumerate(files) if not _is_standard(file)), 0)
    activity = "computing"
    if any(LOADER in file for file in files):
        activity = "loading data"
    elif any(part in files[index] for part in COMMUNICATION):
        activity = "communicating"
    parts = Path(files[index].rpartition(PACKAGES)[2]).parts
    shown = os.path.join(*parts[-4:])
    where = f"{frames[index].f_code.co_name}, {shown}, line {frames[index].f_lineno}"
    return Position(tuple((one.f_code, one.f_lineno) for one in frames), activity, where)


def describe_hang(statuses: Mapping[int, RankStatus]) -> Failure:
    """Return the ranks to blame for a hang, and the sentence about it.

    Args:
        statuses: Status by rank, of all ranks whose run has not ended.
    """
    blamed: Sequence[int] = ()
    for activity in ("loading data", "computing"):
        ranks = [rank for rank, status in statuses.items() if status.activity == activity]
        if ranks and len(ranks) < len(statuses):
            blamed = ranks
            break
    seconds = min(status.still for status in statuses.values())
    others = [rank for rank in statuses if rank not in blamed]

    def describe(ranks: Sequence[int]) -> str:
        named = [statuses[rank] for rank in ranks[:MAX_NAMED]]
        parts = [f"{one.name} is {one.activity} {one.moment} ({one.where})" for one in named]
        if len(ranks) > MAX_NAMED:
            parts.append(f"{len(ranks) - MAX_NAMED} more ranks")
        return ", ".join(parts)

    if not blamed:
        return Failure((), f"all ranks have stood still for {seconds:.0f} s: {describe(others)}")
    return Failure(
        tuple(blamed),
        f"{describe(blamed)} and has stood still there for {seconds:.0f} s; its output has its "
        f"stack; the other ranks wait for it: {describe(others[:1])}",
    )


def _is_standard(file: str) -> bool:
    return file.startswith("<") or (file.startswith(STANDARD_LIBRARY) and PACKAGES not in file)
