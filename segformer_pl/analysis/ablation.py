"""Statistics of an ablation study: what its seeds and its images resolve, and what they do not."""

from dataclasses import dataclass

from segformer_pl.analysis.comparison import ClassDifference
from segformer_pl.analysis.study_results import StudyResults, read_results

__all__ = [
    "MEASURES",
    "Measure",
    "StudyResults",
    "StudySummary",
    "VariantDifference",
    "VariantSummary",
    "minimum_detectable_difference",
    "read_results",
    "summarize_study",
]


@dataclass(frozen=True)
class Measure:
    """A metric of a set of images.

    Attributes:
        title: What it is, in a few words for tables, such as ``mIoU``.
    """

    title: str


MEASURES = {
    "miou": Measure("mIoU"),
    "image_miou": Measure("mIoU per image"),
    "class_miou": Measure("mIoU per image and class"),
    "worst_decile": Measure("mIoU per image, worst 10 %"),
    "worst_decile_by_class": Measure("mIoU per image and class, worst 10 %"),
}


@dataclass(frozen=True)
class VariantSummary:
    """A variant over its seeds.

    Attributes:
        variant: Name of the variant.
        values: Value of each seed, a fraction.
        mean: Mean over the seeds.
        low: Lower bound of the 95 % t interval over seeds; nan with one seed.
        high: Upper bound.
        sd: Standard deviation over seeds (n - 1); nan with one seed.
    """

    variant: str
    values: dict[int, float]
    mean: float
    low: float
    high: float
    sd: float


@dataclass(frozen=True)
class VariantDifference:
    """The difference of a variant from the reference, over the seeds that both have.

    Attributes:
        variant: Name of the variant.
        num_seeds: Number of common seeds.
        values: Difference of each seed, variant - reference, as fractions.
        value: Mean of the differences.
        low: Lower bound of the 95 % interval over seeds and images; over images alone with one
            seed.
        high: Upper bound.
        se_seeds: Standard error of ``value`` from the choice of seeds; nan with one seed.
        se_images: Standard error of ``value`` from the choice of images.
        df: Degrees of freedom of the t interval (Satterthwaite).
        p_value: Two-sided p-value of the t test; nan with one seed.
        p_holm: The same, Holm-corrected for the number of variants; nan with one seed.
        effect_size: Hedges' g: the difference in standard deviations over seeds; nan with one seed.
        is_resolved: Whether ``p_holm`` is less than 5 %.
        seeds_for_one_point: Number of seeds, in total, that resolve a difference of one point with
            a power of 80 %; None if no number does, or if it is not known.
        verdict: The outcome in one sentence.
        classes: IoU of each class, averaged over seeds; A is the reference and B the variant.
    """

    variant: str
    num_seeds: int
    values: dict[int, float]
    value: float
    low: float
    high: float
    se_seeds: float
    se_images: float
    df: float
    p_value: float
    p_holm: float
    effect_size: float
    is_resolved: bool
    seeds_for_one_point: int | None
    verdict: str
    classes: tuple[ClassDifference, ...]

    @property
    def share_of_images(self) -> float:
        """Share of the variance of ``value`` that comes from the choice of images."""
        return self.se_images**2 / (self.se_images**2 + self.se_seeds**2)


@dataclass(frozen=True)
class StudySummary:
    """Statistics of a study in one measure.

    Attributes:
        measure: Key of :data:`MEASURES`.
        variants: The variants, the reference first, without those that have no finished run.
        differences: Differences of the other variants from the reference.
        num_images: Number of images.
        method: How intervals and p-values were computed, one paragraph.
    """

    measure: str
    variants: tuple[VariantSummary, ...]
    differences: tuple[VariantDifference, ...]
    num_images: int
    method: str


def summarize_study(
    results: StudyResults,
    measure: str = "miou",
    evaluation: str | None = None,
    block_size: int = 1,
) -> StudySummary:
    """Compute the statistics of a study.

    Args:
        results: Runs of the study.
        measure: Key of :data:`MEASURES`.
        evaluation: Name of the additional evaluation to use; None for the validation at the end of
            the training.
        block_size: Number of contiguous images that are resampled together, as neighbouring frames
            of a video are similar.

    Raises:
        UserError: There is nothing to compare, or an argument names nothing.
    """
    raise NotImplementedError


def minimum_detectable_difference(
    sd_seeds: float,
    sd_images: float,
    num_seeds: int,
    num_comparisons: int,
    power: float = 0.8,
) -> float:
    """Return the smallest true difference that the study finds with the given power.

    Args:
        sd_seeds: Standard deviation between seeds of the difference to the reference.
        sd_images: Standard error of that difference from the choice of images, of the whole set.
        num_seeds: Number of seeds of each variant.
        num_comparisons: Number of variants that are compared with the reference.
        power: Probability of finding the difference.

    Returns:
        A difference in the unit of the standard deviations; infinity with one seed.
    """
    raise NotImplementedError
