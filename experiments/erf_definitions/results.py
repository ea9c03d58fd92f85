"""Files of the results: tables as CSV and Markdown, and figures."""

import csv
import gzip
import io
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from orderings import Agreement, Interval, Ordering, interval
from PIL import Image
from scipy.stats import rankdata

from segformer_pl.analysis.erf.definitions import PROTOCOLS, Protocol
from segformer_pl.analysis.erf.panels import wrap
from segformer_pl.analysis.style import FAINT, INK
from segformer_pl.atomic import atomic_write, atomic_write_text

FIGURE_NUMBER = "radius_50"  # the number of the panel that compares definitions
DPI = 130


def is_published(ordering: Ordering) -> bool:
    return Protocol(ordering.definition, ordering.number) in PROTOCOLS.values()


def write_results(
    folder: Path,
    agreements: Mapping[str, Agreement],
    networks: Sequence[str],
    num_images: int,
    data: str,
) -> list[Path]:
    """Write all files and return their paths.

    Args:
        folder: Existing folder.
        agreements: Agreement of the orderings by layer.
        networks: Labels of the networks.
        num_images: Number of images measured.
        data: Name of the data set.
    """
    paths = [folder / name for name in ("numbers.csv", "correlations.csv", "table.md")]
    atomic_write_text(paths[0], _csv(_number_rows(agreements, networks)))
    atomic_write_text(
        paths[1],
        _csv(
            row
            for layer, agreement in agreements.items()
            for row in _pair_rows(
                layer,
                agreement,
                agreement.pairs(
                    lambda a, b: (
                        a.difference(b) is not None or (is_published(a) and is_published(b))
                    )
                ),
            )
        ),
    )
    sections = [_section(layer, agreement) for layer, agreement in agreements.items()]
    what = f"{len(networks)} networks, {num_images} validation images of {data}"
    atomic_write_text(
        paths[2], f"# Agreement of ERF orderings\n\n{what}.\n\n" + NOTE + "".join(sections)
    )
    paths.append(folder / "correlations_all.csv.gz")
    everything = _csv(
        row
        for layer, agreement in agreements.items()
        for row in _pair_rows(layer, agreement, agreement.pairs(lambda a, b: True))
    )
    with atomic_write(paths[-1]) as stream:
        stream.write(gzip.compress(everything.encode(), mtime=0))
    for layer, agreement in agreements.items():
        for name, draw in FIGURES.items():
            paths.append(folder / f"{name}_{layer}.png")
            figure = draw(agreement, networks, f"{layer}; {what}")
            drawn = io.BytesIO()
            figure.savefig(drawn, format="png", dpi=DPI)
            with atomic_write(paths[-1]) as stream:  # with a palette, a third of the size
                Image.open(drawn).convert("RGB").quantize(256, Image.Quantize.MAXCOVERAGE).save(
                    stream, "png", optimize=True
                )
    return paths


NOTE = """Kendall's tau-b of two orderings of the networks, mean over pairs of orderings, with the
95 % bootstrap interval over images (networks fixed). Intervals are too narrow where the tau between
halves of the images is below about 0.5. *Flipped*: pairs of networks in opposite order, of those
that both orderings resolve at 95 % (all pairs of networks together).

"""


def _csv(rows: Iterable[Mapping[str, Any]]) -> str:
    rows = list(rows)
    stream = io.StringIO()
    writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    for row in rows:
        writer.writerow(
            {
                key: f"{value:.4g}" if isinstance(value, float) else value
                for key, value in row.items()
            }
        )
    return stream.getvalue()


def _number_rows(
    agreements: Mapping[str, Agreement], networks: Sequence[str]
) -> Iterable[dict[str, Any]]:
    for layer, agreement in agreements.items():
        bounds = interval(agreement.values, agreement.num_images, (0.0, np.inf))
        ranks = rankdata(-bounds.value, axis=-1)
        for o, ordering in enumerate(agreement.orderings):
            for m, network in enumerate(networks):
                yield {
                    "layer": layer,
                    **ordering._asdict(),
                    "network": network,
                    "value": float(bounds.value[o, m]),
                    "low": float(bounds.low[o, m]),
                    "high": float(bounds.high[o, m]),
                    "rank": float(ranks[o, m]),
                }


def _pair_rows(
    layer: str, agreement: Agreement, pairs: Sequence[tuple[int, int]]
) -> Iterable[dict[str, Any]]:
    tau, rho = agreement.tau_interval, agreement.rho_interval
    for i, j in pairs:
        first, second = agreement.orderings[i], agreement.orderings[j]
        resolved, flipped = agreement.flips(i, j)
        yield {
            "layer": layer,
            **{f"{key}_1": value for key, value in first._asdict().items()},
            **{f"{key}_2": value for key, value in second._asdict().items()},
            **_bounds("tau", Interval(*(bound[i, j] for bound in tau))),
            **_bounds("rho", Interval(*(bound[i, j] for bound in rho))),
            "resolved_in_both": resolved,
            "flipped": flipped,
        }


def _bounds(name: str, bounds: Interval) -> dict[str, float]:
    return {
        name: float(bounds.value),
        f"{name}_low": float(bounds.low),
        f"{name}_high": float(bounds.high),
    }


def _section(layer: str, agreement: Agreement) -> str:
    """Return the summary of a layer in Markdown."""
    definitions = list(dict.fromkeys(one.definition for one in agreement.orderings))
    names = {protocol: name for name, protocol in PROTOCOLS.items()}

    def protocol(ordering: Ordering) -> str | None:
        return names.get(Protocol(ordering.definition, ordering.number))

    rows: dict[str, list[tuple[int, int]]] = {
        f"{field} alone": agreement.pairs(lambda a, b, field=field: a.difference(b) == field)  # type: ignore[misc]
        for field in Ordering._fields
    }
    rows["published protocol, same size"] = agreement.pairs(
        lambda a, b: a.size == b.size and bool(protocol(a) and protocol(b))
    )
    for i, one in enumerate(definitions):
        for other in definitions[i + 1 :]:
            rows[f"definition {one} / {other}"] = agreement.pairs(
                lambda a, b, both={one, other}: (
                    a.difference(b) == "definition"  # type: ignore[misc]
                    and {a.definition, b.definition} == both
                )
            )
    published = list(PROTOCOLS)
    for i, one in enumerate(published):
        for other in published[i + 1 :]:
            rows[f"{one} / {other}"] = agreement.pairs(
                lambda a, b, both={one, other}: (
                    a.size == b.size  # type: ignore[misc]
                    and {protocol(a), protocol(b)} == both
                )
            )
    for name in published:
        rows[f"size, by {name}"] = agreement.pairs(
            lambda a, b, name=name: protocol(a) == protocol(b) == name  # type: ignore[misc]
        )
    lines = [
        f"## {layer}\n\n"
        f"Tau between two halves of the images, mean over orderings: "
        f"{np.nanmean(agreement.halves):.2f} (least {np.nanmin(agreement.halves):.2f}).\n",
        "| what differs | pairs of orderings | tau | rho | least tau | of | flipped |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, pairs in rows.items():
        if (summary := agreement.summary(pairs)) is None:
            continue
        first, second = summary["pair"]
        changed = [f"{a} / {b}" if a != b else str(a) for a, b in zip(first, second, strict=True)]
        lines.append(
            f"| {name} | {summary['pairs']} | {_text(summary['tau'])} | {_text(summary['rho'])} | "
            f"{_text(summary['least'])} | {', '.join(changed)} | "
            f"{summary['flipped']} of {summary['resolved']} |"
        )
    return "\n".join(lines) + "\n\n"


def _text(bounds: Interval) -> str:
    return f"{bounds.value:.2f} ({bounds.low:.2f} to {bounds.high:.2f})"


def plot_definitions(agreement: Agreement, networks: Sequence[str], title: str) -> Figure:
    """Draw tau of every two definitions and sizes, all by one number."""
    rows = [
        (i, f"{one.definition} {one.size}")
        for i, one in enumerate(agreement.orderings)
        if one.number == FIGURE_NUMBER
    ]
    rows.sort(key=lambda row: agreement.orderings[row[0]].definition)  # sizes stay in order
    return _plot_matrix(agreement, rows, f"definition and image size, by {FIGURE_NUMBER}; {title}")


def plot_protocols(agreement: Agreement, networks: Sequence[str], title: str) -> Figure:
    """Draw tau of every two protocols and sizes."""
    rows = [(i, f"{name} {agreement.orderings[i].size}") for i, name in _protocol_rows(agreement)]
    return _plot_matrix(agreement, rows, f"protocol and image size; {title}")


def _protocol_rows(agreement: Agreement) -> list[tuple[int, str]]:
    """Return index of the ordering and name, by protocol, then by size."""
    return [
        (i, name)
        for name, protocol in PROTOCOLS.items()
        for i, one in enumerate(agreement.orderings)
        if (one.definition, one.number) == protocol
    ]


def _plot_matrix(agreement: Agreement, rows: Sequence[tuple[int, str]], title: str) -> Figure:
    """Draw tau with its interval; the diagonal is the tau between two halves of the images."""
    indices = [index for index, _ in rows]
    bounds = Interval(*(bound[indices][:, indices] for bound in agreement.tau_interval))
    matrix = bounds.value.copy()
    np.fill_diagonal(matrix, agreement.halves[indices])
    side = 0.47 * len(rows)
    figure = Figure(figsize=(side + 2.8, side + 2.2), layout="constrained")
    axes = figure.subplots()
    colors = colormaps["RdBu"].with_extremes(bad=FAINT)
    drawn = axes.imshow(np.ma.masked_invalid(matrix), cmap=colors, vmin=-1, vmax=1)
    for i in range(len(rows)):
        for j in range(len(rows)):
            if not np.isfinite(matrix[i, j]):
                continue
            style = {"ha": "center", "color": "white" if abs(matrix[i, j]) > 0.65 else INK}
            middle = i - 0.13 if i != j else i
            axes.text(j, middle, f"{matrix[i, j]:.2f}", va="center", fontsize=7.5, **style)
            if i != j:
                low, high = bounds.low[i, j], bounds.high[i, j]
                axes.text(j, i + 0.26, f"{low:.1f}, {high:.1f}", va="center", fontsize=5.2, **style)
    labels = [label for _, label in rows]
    axes.set_xticks(range(len(rows)), labels, rotation=90, fontsize=8)
    axes.set_yticks(range(len(rows)), labels, fontsize=8)
    axes.tick_params(length=0)
    sizes = len({one.size for one in agreement.orderings})
    for edge in range(sizes, len(rows), sizes):
        axes.axhline(edge - 0.5, color="white", linewidth=2)
        axes.axvline(edge - 0.5, color="white", linewidth=2)
    bar = figure.colorbar(drawn, ax=axes, shrink=0.6, aspect=30)
    bar.set_label("Kendall's tau-b")
    note = (
        "small: 95 % CI over images (bootstrap); diagonal: tau between two halves of the images; "
        "grey: all networks equal"
    )
    figure.suptitle(f"{wrap(title, side + 2.6)}\n{wrap(note, side + 2.6)}", fontsize=8, color=INK)
    return figure


def plot_ranks(agreement: Agreement, networks: Sequence[str], title: str) -> Figure:
    """Draw the rank of every network in every published protocol and size; 1 is the largest ERF.

    Colours follow the rank in the first column, so that crossing colours are changes of order.
    """
    columns = _protocol_rows(agreement)
    values = agreement.values[0, [index for index, _ in columns]]
    ranks = rankdata(-values, axis=-1)
    order = np.argsort(ranks[0], kind="stable")
    figure = Figure(
        figsize=(3.4 + 0.5 * len(columns), 1.6 + 0.24 * len(networks)), layout="constrained"
    )
    axes = figure.subplots()
    # The end of the map is too light on white.
    colors = dict(zip(order, colormaps["viridis"](np.linspace(0, 0.9, len(networks)))))
    for network in range(len(networks)):
        style = {"color": colors[network], "linewidth": 1.6, "marker": "o", "markersize": 4}
        axes.plot(range(len(columns)), ranks[:, network], **style)
    for column, side, alignment in ((0, -1, "right"), (len(columns) - 1, 1, "left")):
        # Networks of equal rank get labels one above the other.
        for place, network in enumerate(np.argsort(ranks[column], kind="stable"), 1):
            end = column + 0.5 * side
            line = {"color": "#bbbbbb", "linewidth": 0.6, "zorder": 0}
            axes.plot((column + 0.1 * side, end), (ranks[column, network], place), **line)
            axes.text(
                *(end + 0.08 * side, place, networks[network]),
                ha=alignment,
                va="center",
                fontsize=7,
                color=INK,
                parse_math=False,
            )
    sizes = len({one.size for one in agreement.orderings})
    for start in range(0, len(columns), sizes):
        if start:
            axes.axvline(start - 0.5, color="#bbbbbb", linewidth=0.8, zorder=0)
        axes.text(
            start + (sizes - 1) / 2,
            0.1,
            columns[start][1].replace(", ", "\n"),
            ha="center",
            va="bottom",
            fontsize=8,
            color=INK,
        )
    axes.set_xticks(
        range(len(columns)), [str(agreement.orderings[i].size) for i, _ in columns], fontsize=8
    )
    axes.set_xlim(-0.6, len(columns) - 0.4)
    axes.set_ylim(len(networks) + 0.6, 0.4)
    axes.set_yticks([])
    axes.set_xlabel("image size in pixels")
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.set_title(f"rank by size of the ERF (1 at the top), {title}", fontsize=9, pad=34)
    return figure


FIGURES = {"definitions": plot_definitions, "protocols": plot_protocols, "ranks": plot_ranks}
