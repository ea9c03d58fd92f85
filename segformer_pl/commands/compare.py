"""``compare RUN_A RUN_B``: is the difference between two runs real?"""

import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import fill

from jsonargparse.typing import PositiveInt

from segformer_pl.analysis.comparison import (
    ClassDifference,
    Comparison,
    compare_evaluations,
    points,
)
from segformer_pl.analysis.evaluation import Evaluation, load_evaluation
from segformer_pl.commands.parser import PROG, SegformerArgumentParser

FEW_BLOCKS = 20
# In simulations of 100 pictures the 95 % interval of a class's IoU covers it in 91 % of the sets
# if 10 pictures hold the class, 85 % if 5 do, 80 % if 3 do.
FEW_PICTURES = 10
SEEDS = (
    "Not covered is the spread between training seeds: this says whether these two trained "
    "networks differ on pictures like these, not whether one way of training is better, which "
    "takes several seeds of each."
)


def compare(arguments: list[str]) -> None:
    """``compare RUN_A RUN_B``: is the difference between two runs real?"""
    parser = SegformerArgumentParser(
        prog=f"{PROG} compare",
        description="Is the difference in mIoU between two runs more than the choice of pictures "
        "explains? Paired bootstrap for the intervals, paired permutation test for p, for mIoU "
        "and each class, from the counts that a validation leaves in its run folder. Both runs "
        f"must have been validated on the same pictures. {SEEDS}",
    )
    for name in ("run_a", "run_b"):
        parser.add_argument(
            name,
            type=Path,
            help="run folder, whose last evaluation is taken, or an .npz file of its evaluation "
            "folder",
        )
    parser.add_argument(
        "--block-size",
        type=PositiveInt,
        default=1,
        help="contiguous pictures, in stored order, that are drawn together. Neighbouring pictures "
        "of a video resemble each other, and taken for independent they make intervals too narrow "
        "and p too small: give the number of pictures over which they do",
    )
    parser.add_argument("--json", action="store_true", help="print JSON (fractions), not a table")
    options = parser.parse_args(arguments)
    runs = [options.run_a, options.run_b]
    a, b = (load_evaluation(run) for run in runs)
    comparison = compare_evaluations(a, b, options.block_size)
    if options.json:
        described = [
            {"path": str(run), "split": e.split, "step": e.step} for run, e in zip(runs, (a, b))
        ]
        known = {"a": described[0], "b": described[1]} | comparison.as_dict()
        sys.stdout.write(json.dumps(known, indent=2) + "\n")
    else:
        lines = [*_header(runs, [a, b]), "", f"{comparison.verdict}.", "", *_scores(comparison), ""]
        lines += [*_classes(comparison.classes), ""]
        lines += [fill(remark, 100) for remark in _remarks(comparison)]
        sys.stdout.write("\n".join(lines) + "\n")


def _header(runs: list[Path], evaluations: list[Evaluation]) -> Iterator[str]:
    for letter, run, evaluation in zip("AB", runs, evaluations):
        yield f"{letter}  {run}: {evaluation.split}, step {evaluation.step:,}"


def _scores(comparison: Comparison) -> Iterator[str]:
    blocks = ""
    if comparison.block_size > 1:
        blocks = f" in {comparison.num_blocks} blocks of {comparison.block_size}"
    yield f"{'':<4}{'mIoU':>8}   95 % interval, {comparison.num_pictures:,} pictures{blocks}"
    for letter, miou in (("A", comparison.miou_a), ("B", comparison.miou_b)):
        yield (
            f"{letter:<4}{100 * miou.value:>6.2f} %   {100 * miou.low:.2f} to "
            f"{100 * miou.high:.2f} %"
        )


def _classes(classes: tuple[ClassDifference, ...]) -> Iterator[str]:
    listed = [c for c in classes if not math.isnan(c.difference.value)]
    width = max(len("class"), *(len(c.name) for c in listed))
    yield (
        f"{'class':<{width}}{'A':>8}{'B':>8}{'B - A':>9}   {'95 % interval':<17}{'p':>9}"
        f"{'pictures':>12}"
    )
    for c in listed:
        interval = f"{points(c.difference.low):>6} to {points(c.difference.high):>6}"
        yield (
            f"{c.name:<{width}}{100 * c.iou_a:>8.2f}{100 * c.iou_b:>8.2f}"
            f"{points(c.difference.value):>9}   {interval:<17}{c.p_value:>9.2g}"
            f"{' *' if c.is_significant else '  '}{c.num_pictures:>10}"
        )
    yield (
        "IoU in %, differences in points. p is corrected for the number of classes (Holm), * marks"
    )
    yield "p < 0.05; each interval is for its class alone. pictures: that have labels of the class."


def _remarks(comparison: Comparison) -> Iterator[str]:
    absent = [c for c in comparison.classes if math.isnan(c.difference.value)]
    if nowhere := [c.name for c in absent if math.isnan(c.iou_a) and math.isnan(c.iou_b)]:
        yield f"Absent in both: {', '.join(nowhere)}."
    for c in absent:
        if c.name not in nowhere:
            one, other = "BA" if math.isnan(c.iou_a) else "AB"
            yield (
                f"{c.name} is labelled nowhere and predicted by {one} alone, so that it counts as "
                f"0 in the mIoU of {one} and not at all in that of {other}."
            )
    rare = [c.name for c in comparison.classes if 0 < c.num_pictures < FEW_PICTURES]
    if rare:
        yield (
            f"{len(rare)} of {len(comparison.classes)} classes have labels in fewer than "
            f"{FEW_PICTURES} pictures; their intervals are rough and mostly too narrow."
        )
    unit = "pictures" if comparison.block_size == 1 else "blocks"
    if comparison.num_blocks < FEW_BLOCKS:
        yield (
            f"There are only {comparison.num_blocks} {unit}, so that every interval and p is rough."
        )
    if comparison.block_size == 1:
        yield (
            "Pictures are taken for independent of each other. If neighbours resemble each other, "
            "as in a video, give --block-size; otherwise intervals are too narrow and p too small."
        )
    else:
        yield "Blocks of neighbouring pictures are taken for independent of each other."
    yield SEEDS
