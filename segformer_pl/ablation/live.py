"""What is shown while a study runs: one live table in a terminal, plain lines elsewhere."""

import sys
import time
from collections.abc import Sequence
from typing import Any, Protocol, Self

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from segformer_pl.ablation.folder import State
from segformer_pl.ablation.progress import RunProgress

STYLES = {
    State.WAITING: "dim",
    State.INTERRUPTED: "yellow",
    State.RUNNING: "cyan",
    State.FAILED: "red",
    State.DONE: "green",
}
# Rows of the table's header, the line below it, and a margin.
EXTRA_LINES = 8
LINE_INTERVAL = 60.0  # seconds between two lines of progress without a terminal


class Display(Protocol):
    """Shows the progress of a study."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *exception: Any) -> None: ...

    def show(self, runs: Sequence[RunProgress], seconds_left: float | None) -> None:
        """Show the present progress of all runs."""

    def note(self, text: str) -> None:
        """Show a line that stays."""


class LiveTable:
    """A table of all runs that is redrawn in place, with the overall progress below it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = Live(console=console, auto_refresh=False)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._live.stop()

    def show(self, runs: Sequence[RunProgress], seconds_left: float | None) -> None:
        table = _table(runs, self._console.height - EXTRA_LINES)
        overall = Text(overall_progress(runs, seconds_left))
        self._live.update(Group(table, overall), refresh=True)

    def note(self, text: str) -> None:
        self._console.print(Text(text))


class PlainLines:
    """A line for each change, and one a minute, for files and pipes."""

    def __init__(self) -> None:
        self._states: dict[str, str] = {}
        self._time = time.monotonic()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: Any) -> None:
        pass

    def show(self, runs: Sequence[RunProgress], seconds_left: float | None) -> None:
        has_news = False
        for run in runs:
            state = state_of(run)
            if self._states.get(run.name, State.WAITING) != state:
                has_news = True
                self.note(f"{run.name}: {_described(run)}")
            self._states[run.name] = state
        if has_news or time.monotonic() - self._time > LINE_INTERVAL:
            self._time = time.monotonic()
            self.note(overall_progress(runs, seconds_left))

    def note(self, text: str) -> None:
        sys.stdout.write(f"{time.strftime('%H:%M:%S')}  {text}\n")
        sys.stdout.flush()


def make_display() -> Display:
    """Return a live table if standard output is a terminal, and plain lines otherwise."""
    console = Console()
    return LiveTable(console) if console.is_terminal else PlainLines()


def state_of(run: RunProgress) -> str:
    """Return the word that is shown for the state of a run."""
    if run.state == State.RUNNING and run.is_elsewhere:
        return "running elsewhere"
    if run.state == State.RUNNING and not run.has_started:
        return "submitted"
    return str(run.state)


def overall_progress(runs: Sequence[RunProgress], seconds_left: float | None) -> str:
    """Return the progress of the whole study in one line."""
    num = {state: sum(run.state == state for run in runs) for state in State}
    steps, total = sum(run.step for run in runs), sum(run.run.max_steps for run in runs)
    parts = [f"{num[State.DONE]} of {len(runs)} runs done"]
    parts += [f"{num[state]} {state}" for state in (State.RUNNING, State.FAILED) if num[state]]
    parts.append(f"{steps:,} of {total:,} steps")
    if seconds_left is not None and num[State.DONE] + num[State.FAILED] < len(runs):
        parts.append(f"about {duration(seconds_left)} left")
    return ", ".join(parts)


def duration(seconds: float) -> str:
    """Return a duration in its two largest units, such as ``2 h 05 min``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _table(runs: Sequence[RunProgress], max_rows: int) -> Table:
    table = Table("variant", box=None, pad_edge=False)
    for title in ("seed", "state", "step", "steps/s", "mIoU"):
        table.add_column(title, justify="left" if title == "state" else "right")
    shown = list(runs)
    if len(shown) > max(max_rows, 1):  # those that are moving or failed, then those that come next
        order = [State.RUNNING, State.FAILED, State.INTERRUPTED, State.WAITING, State.DONE]
        first = sorted(shown, key=lambda run: order.index(run.state))[: max(max_rows, 1)]
        shown = [run for run in shown if any(run is one for one in first)]
    for run in shown:
        speed = run.steps_per_second
        table.add_row(
            Text(run.run.variant.name),
            str(run.run.seed),
            Text(state_of(run), STYLES[run.state]),
            f"{run.step:,}/{run.run.max_steps:,}",
            "" if speed is None else f"{speed:.2f}",
            "" if run.miou is None else f"{100 * run.miou:.2f} %",
        )
    if hidden := len(runs) - len(shown):
        table.add_row(Text(f"and {hidden} more", "dim"))
    return table


def _described(run: RunProgress) -> str:
    text = state_of(run)
    if run.state == State.DONE and run.miou is not None:
        return f"{text}, mIoU {100 * run.miou:.2f} %"
    if run.state == State.FAILED and run.sentence:
        return f"{text}: {run.sentence}"
    if run.step and run.state in (State.RUNNING, State.INTERRUPTED):
        return f"{text}, step {run.step:,} of {run.run.max_steps:,}"
    return text
