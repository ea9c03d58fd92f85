"""The results of an ablation study, rebuilt from its run folders alone."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from segformer_pl.analysis.run import Run


@dataclass(frozen=True)
class StudyResults:
    """The finished runs of one budget of a study.

    Attributes:
        name: Name of the study.
        question: What the study asks.
        budget: Name of the budget.
        reference: Name of the variant that the others are compared with.
        changes: Changed settings of each variant by dotted key; the reference first, then in the
            order of the study.
        runs: Finished runs by variant and seed. A variant without a finished run is empty.
        unfinished: One sentence for each run that failed or is not finished.
        outdated: One sentence for each variant that also has runs of other settings, which do not
            count.
    """

    name: str
    question: str
    budget: str
    reference: str
    changes: dict[str, dict[str, Any]]
    runs: dict[str, dict[int, Run]]
    unfinished: list[str]
    outdated: list[str]


def read_results(
    folder: Path, budget: str, digests: Mapping[str, str] | None = None
) -> StudyResults:
    """Read the runs of one budget of a study.

    Args:
        folder: Folder of the study, such as ``runs/ablations/reduction_ratio``.
        budget: Name of the budget.
        digests: Digest of the settings of each variant, in the order of the study. Runs of other
            variants or digests do not count.

    Raises:
        UserError: There are no such runs, or they do not belong together.
    """
    raise NotImplementedError
