"""``compare RUN RUN [RUN ...]``: significance tests and seed statistics of trained runs."""

import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from textwrap import fill
from typing import Any

from jsonargparse import Namespace

from segformer_pl.analysis.comparison import (
    ClassDifference,
    Comparison,
    compare_evaluations,
    points,
)
from segformer_pl.analysis.configuration import (
    Configuration,
    differences,
    is_data_known,
    plain,
)
from segformer_pl.analysis.evaluation import load_evaluation
from segformer_pl.analysis.run import Run
from segformer_pl.analysis.run_groups import ComparedRun, Group, group_runs
from segformer_pl.errors import UserError, counted

FEW_BLOCKS = 20
# In simulations with 100 images, the nominal 95 % interval of a class's IoU covers the true value
# in 91 % of the data sets if 10 images contain the class, in 85 % if 5 do, in 80 % if 3 do.
FEW_IMAGES = 10
SHOWN_SETTINGS = 5
MAX_SETTING_LENGTH = 80  # characters
UNKNOWN_DATA = (
    "Whether runs with different data.path were trained on the same data is unknown, because a run "
    "folder without training_data.json does not identify its training data."
)
ONE_RUN_EACH = (
    "With one run of each, the tests below cover the choice of images and not of training seeds: "
    "they show whether these two trained networks differ on images like these, not whether one way "
    "of training is better. Give several seeds of each to see their spread."
)


def run(options: Namespace) -> None:
    """Run ``compare RUN RUN [RUN ...]`` and print the comparison.

    Args:
        options: Options as ``options/compare.py`` parses them.

    Raises:
        UserError: There are fewer than two runs, or the runs cannot be compared.
    """
    runs = [Path(run) for run in options.runs]
    if len(runs) < 2:
        raise UserError(f"run: '{runs[0]}' is the only run; give two or more runs to compare")
    compared = [_read(run) for run in runs]
    num_images = len(compared[0].evaluation.ids)
    if len(compared) == 2:
        results, lines = _two(compared[0], compared[1], options.block_size)
    else:
        groups = group_runs(compared, options.block_size)
        caveat = _spread_caveat(groups, [c for run in compared if (c := run.configuration)])
        results = {
            "num_images": num_images,
            "block_size": options.block_size,
            "caveat": caveat,
            "groups": [group.as_dict() for group in groups],
            "differences": dict(_differences(groups)),
        }
        lines = _grouped(groups, caveat, num_images, options.block_size)
    text = json.dumps(results, indent=2) if options.json else "\n".join(lines)
    sys.stdout.write(text + "\n")


def _read(source: Path) -> ComparedRun:
    """Return an evaluation with the configuration that its network was trained with, if known.

    Args:
        source: Run folder, whose last evaluation is read; or an npz file.
    """
    run = Run(source) if source.is_dir() else Run.of(source)
    evaluation = Run(source).last_evaluation() if source.is_dir() else load_evaluation(source)
    return ComparedRun(source, evaluation, run.configuration(evaluation.step) if run else None)


def _two(a: ComparedRun, b: ComparedRun, block_size: int) -> tuple[dict[str, Any], list[str]]:
    """Return the paired tests of two trained networks, as plain data and as lines of text."""
    comparison = compare_evaluations(a.evaluation, b.evaluation, block_size)
    caveat = _caveat(a.configuration, b.configuration)
    results = {"a": _described(a), "b": _described(b), "caveat": caveat} | comparison.as_dict()
    lines = [_header("A", a), _header("B", b), "", fill(caveat, 100), ""]
    lines += [fill(f"{comparison.verdict}.", 100), "", *_miou_table(comparison), ""]
    lines += [*_class_table(comparison.classes), ""]
    return results, [*lines, *(fill(remark, 100) for remark in _remarks(comparison))]


def _described(run: ComparedRun) -> dict[str, Any]:
    evaluation, configuration = run.evaluation, run.configuration
    seed = configuration.seed if configuration else None
    path, split, step = str(run.path), evaluation.split, evaluation.step
    return {"path": path, "split": split, "step": step, "seed": seed}


def _caveat(a: Configuration | None, b: Configuration | None) -> str:
    """Return what the comparison of two runs does not show."""
    if a is None or b is None:
        unknown = " and ".join(n for n, c in zip("AB", (a, b)) if c is None)
        return (
            f"The training configuration of {unknown} is unknown: there is no config.yaml of a "
            f"training. {ONE_RUN_EACH}"
        )
    if different := differences([a, b]):
        unknown = "" if is_data_known([a, b]) else f" {UNKNOWN_DATA}"
        return f"A and B differ in {_settings(different)}.{unknown} {ONE_RUN_EACH}"
    if a.seed != b.seed or a.seed is None:
        return (
            f"A and B are two seeds of one configuration ({_seed(a)}, {_seed(b)}): their "
            "difference is the effect of the seed, and neither is a better way of training."
        )
    return (
        f"A and B have one configuration and one seed ({a.seed}): they differ in something that "
        "is not in their config.yaml, such as the evaluated step, and no configurations are "
        "compared."
    )


def _settings(different: dict[str, list[Any]]) -> str:
    """Return the first few settings with their values, such as ``model.lr (0.003; 0.006)``."""
    return _few([f"{key} ({'; '.join(map(_short, values))})" for key, values in different.items()])


def _few(settings: list[str]) -> str:
    more = len(settings) - SHOWN_SETTINGS
    return ", ".join(settings[:SHOWN_SETTINGS]) + (f" and {more} more" if more > 0 else "")


def _short(value: Any) -> str:
    """Return a value as text; a long one is cut in the middle, as paths can differ at both ends."""
    text = plain(value)
    return (
        text
        if len(text) <= MAX_SETTING_LENGTH
        else f"{text[: MAX_SETTING_LENGTH // 2]}...{text[-MAX_SETTING_LENGTH // 2 :]}"
    )


def _seed(configuration: Configuration) -> str:
    return "no seed" if configuration.seed is None else f"seed {configuration.seed}"


def _header(letter: str, run: ComparedRun) -> str:
    seed = "" if run.configuration is None else f", {_seed(run.configuration)}"
    images = "" if run.evaluation.images.is_complete else f", {run.evaluation.images}"
    return (
        f"{letter}  {run.path}: {run.evaluation.split}, step {run.evaluation.step:,}{seed}{images}"
    )


def _grouped(groups: Sequence[Group], caveat: str, num_images: int, block_size: int) -> list[str]:
    """Return the caveat, the runs by configuration, and the differences of their means."""
    num_runs = sum(len(group.runs) for group in groups)
    blocks = "" if block_size == 1 else f" in blocks of {block_size}"
    num_groups = f"{len(groups)} configurations" if len(groups) > 1 else "one configuration"
    lines = [
        f"{counted(num_runs, 'run')} of {num_groups}, evaluated on {num_images:,} images{blocks}",
        "",
    ]
    lines += [fill(caveat, 100), ""]
    for group in groups:
        stated = _few([f"{key} {_short(value)}" for key, value in group.settings.items()])
        lines += [fill(f"{group.name}  {stated}".rstrip(), 100, subsequent_indent="   ")]
        lines.append(f"   {'seed':>8}{'mIoU':>10}   {'95 % CI over images':<20}{'step':>9}   run")
        for run in group.runs:
            interval = f"{100 * run.miou.low:.2f} to {100 * run.miou.high:.2f} %"
            seed = "none" if run.seed is None else run.seed
            lines.append(
                f"   {seed:>8}{100 * run.miou.value:>8.2f} %   {interval:<20}{run.step:>9,}   "
                f"{run.path}"
            )
        if len(group.runs) > 1:
            lines.append(
                f"   {'mean':>8}{100 * group.mean:>8.2f} %   standard deviation "
                f"{100 * group.standard_deviation:.2f} points over {len(group.runs)} seeds"
            )
        lines.append("")
    for (pair, difference), other in zip(_differences(groups), groups[1:]):
        lines.append(
            fill(
                f"{pair} of the means: {points(difference)} points of mIoU. "
                f"{_order(groups[0], other)}",
                100,
            )
        )
    remark = (
        "The standard deviation is over the given seeds. The confidence intervals are over images "
        "(bootstrap), for each network by itself; they do not include the spread between seeds."
    )
    return [*lines, *([""] if len(groups) > 1 else []), fill(remark, 100)]


def _spread_caveat(groups: Sequence[Group], configurations: Sequence[Configuration]) -> str:
    """Return what the spread between a few seeds does not show."""
    caveat = (
        "Nothing is tested here: a few seeds show how far runs of one configuration lie apart, not "
        "which configuration is better."
    )
    if len(groups) > 1 and not is_data_known(configurations):
        caveat = f"{UNKNOWN_DATA} {caveat}"
    if single := [group.name for group in groups if len(group.runs) == 1]:
        return (
            f"There is only one run of {', '.join(single)}, so the spread between its seeds is "
            f"unknown. {caveat}"
        )
    return caveat


def _differences(groups: Sequence[Group]) -> Iterator[tuple[str, float]]:
    """Yield the difference of each group's mean mIoU from the first group's."""
    for group in groups[1:]:
        yield f"{group.name} - {groups[0].name}", group.mean - groups[0].mean


def _order(a: Group, b: Group) -> str:
    """Return a sentence that says whether the mIoU ranges of two groups overlap; "" if unknown."""
    if len(a.runs) == 1 or len(b.runs) == 1:
        return ""
    low, high = sorted((a, b), key=lambda group: group.mean)
    if max(run.miou.value for run in low.runs) < min(run.miou.value for run in high.runs):
        return f"Every run of {high.name} has a higher mIoU than every run of {low.name}."
    return "Their runs overlap."


def _miou_table(comparison: Comparison) -> Iterator[str]:
    blocks = ""
    if comparison.block_size > 1:
        blocks = f" in {comparison.num_blocks} blocks of {comparison.block_size}"
    yield f"{'':<4}{'mIoU':>8}   95 % CI, {comparison.num_images:,} images{blocks}"
    for letter, miou in (("A", comparison.miou_a), ("B", comparison.miou_b)):
        yield (
            f"{letter:<4}{100 * miou.value:>6.2f} %   {100 * miou.low:.2f} to "
            f"{100 * miou.high:.2f} %"
        )


def _class_table(classes: tuple[ClassDifference, ...]) -> Iterator[str]:
    listed = [c for c in classes if not math.isnan(c.difference.value)]
    width = max(len("class"), *(len(c.name) for c in listed))
    yield (
        f"{'class':<{width}}{'A':>8}{'B':>8}{'B - A':>9}   {'95 % CI':<17}{'p':>9}{'images':>12}"
    )
    for c in listed:
        interval = f"{points(c.difference.low):>6} to {points(c.difference.high):>6}"
        yield (
            f"{c.name:<{width}}{100 * c.iou_a:>8.2f}{100 * c.iou_b:>8.2f}"
            f"{points(c.difference.value):>9}   {interval:<17}{c.p_value:>9.2g}"
            f"{' *' if c.is_significant else '  '}{c.num_images:>10}"
        )
    yield (
        "IoU in %, B - A in percentage points. p is corrected for the number of classes (Holm); "
        "* marks"
    )
    yield "p < 0.05. Each CI is for its class alone. images: number that have labels of the class."


def _remarks(comparison: Comparison) -> Iterator[str]:
    absent = [c for c in comparison.classes if math.isnan(c.difference.value)]
    if unused := [c.name for c in absent if math.isnan(c.iou_a) and math.isnan(c.iou_b)]:
        yield f"Absent in both: {', '.join(unused)}."
    for c in absent:
        if c.name not in unused:
            one, other = "BA" if math.isnan(c.iou_a) else "AB"
            yield (
                f"{c.name} has no labels and is predicted by {one} alone, so it counts as 0 in the "
                f"mIoU of {one} and is left out of that of {other}."
            )
    rare = [c.name for c in comparison.classes if 0 < c.num_images < FEW_IMAGES]
    if rare:
        yield (
            f"{len(rare)} of {len(comparison.classes)} classes have labels in fewer than "
            f"{FEW_IMAGES} images; their intervals are rough and mostly too narrow."
        )
    unit = "images" if comparison.block_size == 1 else "blocks"
    if comparison.num_blocks < FEW_BLOCKS:
        yield (f"There are only {comparison.num_blocks} {unit}, so every interval and p is rough.")
    if comparison.block_size == 1:
        yield (
            "Images are treated as independent. If neighbours resemble each other, as in a video, "
            "give --block_size; otherwise intervals are too narrow and p too small."
        )
    else:
        yield "Blocks of neighbouring images are treated as independent."
