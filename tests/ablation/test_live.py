"""What is shown while a study runs."""

import pytest
from rich.console import Console

from segformer_pl.ablation.folder import State
from segformer_pl.ablation.live import (
    LiveTable,
    PlainLines,
    duration,
    overall_progress,
)
from segformer_pl.ablation.progress import RunProgress


class Named:
    """The parts of a StudyRun that are shown."""

    def __init__(self, variant, seed, max_steps=800):
        self.variant, self.seed, self.max_steps = self, seed, max_steps
        self.name = variant


def progress(variant, seed, state, step=0, miou=None, **others):
    return RunProgress(Named(variant, seed), (), state, step=step, miou=miou, **others)


@pytest.fixture
def runs():
    return [
        progress("r8-4-2-1", 0, State.DONE, 800, 0.4321),
        progress("r8-4-2-1", 1, State.RUNNING, 400, 0.25, has_started=True),
        progress("r1-1-1-1", 0, State.FAILED, sentence="RuntimeError: [bold]x[/bold]"),
        progress("r1-1-1-1", 1, State.RUNNING, 80, is_elsewhere=True),
        progress("r2-2-2-2", 0, State.RUNNING),
        progress("drop_path=0.1+depth=2-2", 0, State.WAITING),
    ]


def shown(runs, height=40, width=100):
    console = Console(record=True, width=width, height=height, force_terminal=True)
    with LiveTable(console) as table:
        table.show(runs, 3723)
    return console.export_text()


def test_the_table_has_a_row_for_each_run(runs):
    text = shown(runs)
    rows = {tuple(line.split()[:2]): line for line in text.splitlines()}
    assert "800/800" in rows["r8-4-2-1", "0"]
    assert "43.21 %" in rows["r8-4-2-1", "0"]
    assert "running elsewhere" in rows["r1-1-1-1", "1"]
    assert "waiting" in rows["drop_path=0.1+depth=2-2", "0"]
    assert "submitted" in rows["r2-2-2-2", "0"]
    assert "1 of 6 runs done, 3 running, 1 failed, 1,280 of 4,800 steps" in text
    assert "about 1 h 02 min left" in text


def test_a_low_terminal_shows_what_moves(runs):
    many = [progress("done", seed, State.DONE, 800) for seed in range(30)]
    text = shown([*many, *runs], height=12)
    assert "running elsewhere" in text
    assert "failed" in text
    assert "and 32 more" in text
    assert len(text.splitlines()) <= 2 * 12  # drawn twice, at the end once more


def test_plain_lines_are_written_for_changes_alone(runs, capsys):
    display = PlainLines()
    with display:
        display.show(runs, None)
        first = capsys.readouterr().out
        display.show(runs, None)
        assert capsys.readouterr().out == ""
        runs[1].state = State.DONE
        display.show(runs, 5)
    assert "r1-1-1-1, seed 0: failed: RuntimeError: [bold]x[/bold]" in first  # no markup
    assert "drop_path" not in first  # it has not begun
    lines = capsys.readouterr().out.splitlines()
    assert "r8-4-2-1, seed 1: done, mIoU 25.00 %" in lines[0]
    assert len(lines) == 2


def test_durations():
    assert [duration(s) for s in (8, 75, 3720)] == ["8 s", "1 min 15 s", "1 h 02 min"]
    assert overall_progress([progress("a", 0, State.DONE, 800)], 5) == (
        "1 of 1 runs done, 800 of 800 steps"
    )
