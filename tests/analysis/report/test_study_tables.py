"""Tables of a study: changes in one line, Markdown that shows text as it is."""

import pytest

from segformer_pl.analysis.report.study_tables import (
    Column,
    Table,
    changes_text,
    cost_table,
    markdown_table,
    markdown_text,
)


def test_changes_are_short():
    assert changes_text({}) == "–"
    changes = {"model.network.init_args.sr_ratios": [1, 1, 1, 1], "model.lr": 0.001}
    assert changes_text(changes) == "sr_ratios = [1, 1, 1, 1]; model.lr = 0.001"
    assert len(changes_text({"x": list(range(500))})) < 80


@pytest.mark.parametrize("letter", list("\\`*_[]<>|~&#!@$"))
def test_markup_is_escaped(letter):
    assert markdown_text(f"a{letter}b") == f"a\\{letter}b"


def test_markdown_table():
    columns = (Column("#"), Column("variant", False), Column("difference (points)"))
    table = Table(columns, (("1", "a|b\nc", "+1.00"), ("2", "d", "−2.00")))
    assert markdown_table(table, frozenset({"d"})).splitlines() == [
        "| \\# | variant | difference (points) |",
        "| ---: | --- | ---: |",
        "| 1 | a\\|b\\\\nc | +1.00 |",
        "| 2 | d | **−2.00** |",
    ]


def test_costs_that_are_not_known_are_dashes():
    costs = {
        "a": {"parameters": 3_716_000, "macs": 520_000_000, "paper_macs": None},
        "b": {"latency_median_ms": 12.34, "latency_iqr_ms": 0.56, "stages": [{"keys": 64}]},
    }
    table = cost_table(costs)
    assert [column.heading for column in table.columns][2:] == [
        "params (M)",
        "MACs (G)",
        "latency (ms)",
        "activations (MB)",
        "stage 1: keys / MACs (M)",
    ]
    assert table.rows == (
        ("1", "a", "3.72", "0.52", "–", "–", "– / –"),
        ("2", "b", "–", "–", "12.3 (IQR 0.6)", "–", "64 / –"),
    )
