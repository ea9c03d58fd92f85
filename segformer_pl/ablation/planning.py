"""What a study costs and what it can resolve, before any of it is trained."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from segformer_pl.ablation.costs import VariantCost, variant_costs
from segformer_pl.ablation.study import Study
from segformer_pl.ablation.study_file import Spread
from segformer_pl.analysis.ablation import read_results, summarize_study
from segformer_pl.analysis.comparison import points
from segformer_pl.analysis.run import Run
from segformer_pl.analysis.study_power import (
    ONE_POINT,
    minimum_detectable_difference,
    seeds_for_difference,
)
from segformer_pl.errors import UserError, counted


def study_costs(study: Study) -> list[VariantCost] | None:
    """Count and time the variants on images of the training size; None if that is not known."""
    size = study.variants[0].image_size
    if size is None:
        return None
    uses_gpu = any(v.config["trainer"]["accelerator"] != "cpu" for v in study.variants)
    device = "cuda" if uses_gpu and torch.cuda.is_available() else "cpu"
    return variant_costs(study.variants, study.reference, *size, device=device)


def costs_of_report(study: Study, costs: Sequence[VariantCost]) -> list[dict[str, Any]]:
    """Return the content of ``costs.json``, which the report reads."""
    digests = {variant.name: variant.digest for variant in study.variants}
    return [
        {
            "variant": cost.name,
            "digest": digests[cost.name],
            "parameters": cost.cost.num_parameters,
            "macs": cost.cost.macs,
            "paper_macs": cost.cost.paper_macs,
            "activation_bytes": cost.cost.activation_bytes,
            "latency_median_ms": cost.latency.median_ms,
            "latency_iqr_ms": cost.latency.iqr_ms,
            "device": cost.latency.device,
            "num_threads": cost.latency.num_threads,
            "stages": [
                {"name": part.name, "keys": part.key_length, "attention_macs": part.attention_macs}
                for part in cost.cost.parts
                if part.key_length is not None
            ],
        }
        for cost in costs
    ]


def has_costs(file: Path, study: Study) -> bool:
    """Return whether a ``costs.json`` holds the costs of these variants."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        stored = {cost["variant"]: cost["digest"] for cost in content}
    except (OSError, ValueError, TypeError, KeyError):
        return False
    return stored == {variant.name: variant.digest for variant in study.variants}


def find_spread(study: Study, folder: Path) -> tuple[Spread, str] | None:
    """Return the spread of the differences of mIoU to plan with, and where it comes from.

    Finished runs of the study come before the spread that its file states, and runs of the planned
    budget before those of other ones.

    Args:
        study: The study.
        folder: Its folder, such as ``runs/ablations/reduction_ratio``.
    """
    for budget in [study.budget, *sorted(set(_budgets(folder)) - {study.budget})]:
        digests = {v.name: v.digest for v in study.variants} if budget == study.budget else None
        try:
            summary = summarize_study(read_results(folder, budget, digests))
        except UserError:
            continue
        pairs = [
            (one.se_seeds**2 * one.num_seeds, one.se_images**2)
            for one in summary.differences
            if one.num_seeds > 1 and math.isfinite(one.se_seeds) and math.isfinite(one.se_images)
        ]
        if pairs:
            of_seeds, of_images = (sum(column) / len(pairs) for column in zip(*pairs))
            seeds = max(one.num_seeds for one in summary.differences)
            origin = (
                f"{counted(seeds, 'seed')} of finished runs, budget {budget}, "
                f"{summary.num_images:,} images"
            )
            return Spread(math.sqrt(of_seeds), math.sqrt(of_images)), origin
    return None if study.spread is None else (study.spread, "stated in the study")


def resolution(study: Study, found: tuple[Spread, str] | None) -> list[str]:
    """Return what the planned seeds and images can resolve, as lines of text."""
    if found is None:
        return [
            "minimum detectable difference: unknown, because there are no two seeds of finished "
            "runs and the study states no spread; train two seeds at a small budget first, or "
            "state a spread"
        ]
    num = len(study.variants) - 1
    if not num:
        return ["minimum detectable difference: none, because there is nothing to compare with"]
    (spread, origin), num_seeds = found, len(study.seeds)
    spreads = (
        f"standard deviation between seeds {points(spread.seeds)[1:]}, between images "
        f"{points(spread.images)[1:]} points ({origin})"
    )
    if num_seeds < 2:
        return [
            "minimum detectable difference: unlimited with one seed, because nothing separates the "
            f"variant from the seed; plan two or more ({spreads})"
        ]
    smallest = minimum_detectable_difference(spread.seeds, spread.images, num_seeds, num)
    lines = [
        f"minimum detectable difference: {points(smallest)[1:]} points of mIoU with {num_seeds} "
        f"seeds, a power of 80 % and {num} comparisons (Holm)",
        spreads,
    ]
    if smallest <= ONE_POINT:
        return [*lines, "this study can resolve a difference of 1 point"]
    needed = seeds_for_difference(ONE_POINT, spread.seeds, spread.images, num)
    advice = (
        "no number of seeds would, because the images alone leave more than that"
        if needed is None
        else f"{counted(needed, 'seed')} would"
    )
    return [*lines, f"this study CANNOT resolve a difference of 1 point; {advice}"]


def _budgets(folder: Path) -> Iterator[str]:
    for path in folder.glob("*"):
        entry = Run(path).ablation
        if entry and isinstance(entry.get("budget"), str):
            yield entry["budget"]
