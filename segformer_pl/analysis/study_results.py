"""The results of an ablation study, rebuilt from its run folders alone."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from segformer_pl.analysis.comparison import matched
from segformer_pl.analysis.configuration import Configuration, settings_digest
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.run import Run
from segformer_pl.errors import UserError

MAX_STEPS = "trainer.max_steps"
TEXTS = ("study", "budget", "variant", "reference", "digest")
INTEGERS = ("seed", "max_steps")


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
        runs: Finished runs by variant and seed, with an empty entry for a variant without any.
        unfinished: One sentence for each run that failed or is not finished.
        outdated: One sentence for each folder of other settings, or of a variant that the study no
            longer has. These runs do not count.
    """

    name: str
    question: str
    budget: str
    reference: str
    changes: dict[str, dict[str, Any]]
    runs: dict[str, dict[int, Run]]
    unfinished: list[str]
    outdated: list[str]


@dataclass(frozen=True)
class _Member:
    """A run folder of the study, and what its ``ablation.json`` says."""

    run: Run
    entry: dict[str, Any]
    configuration: Configuration | None  # None before the training has started

    @property
    def name(self) -> str:
        return self.run.folder.name

    @property
    def variant(self) -> str:
        return str(self.entry["variant"])

    @property
    def seed(self) -> int:
        return int(self.entry["seed"])

    @property
    def digest(self) -> str:
        return str(self.entry["digest"])

    @property
    def max_steps(self) -> int:
        return int(self.entry["max_steps"])


def read_results(
    folder: Path, budget: str, digests: Mapping[str, str] | None = None
) -> StudyResults:
    """Read the runs of one budget of a study.

    If settings of the study changed, the folder holds runs of several digests of a variant, and
    only those of one count. Without ``digests`` it is the digest of the run that was started last,
    judged by the time of its ``ablation.json``.

    Args:
        folder: Folder of the study, such as ``runs/ablations/reduction_ratio``.
        budget: Name of the budget.
        digests: Digest of the settings of each variant, in the order of the study. Other variants
            do not count.

    Raises:
        UserError: There are no such runs, a folder was edited by hand, or the runs do not belong
            together: other training data, evaluated images or classes, a variant and seed twice, or
            different numbers of training steps.
    """
    every = list(_members(folder))
    members = [member for member in every if member.entry["budget"] == budget]
    if not members:
        others = sorted({str(member.entry["budget"]) for member in every})
        found = f"only runs of budget {', '.join(others)}" if others else "no run of a study"
        raise UserError(
            f"'{folder}' holds {found}, and none of budget '{budget}'; run `ablate` with that "
            "--budget first, or give the folder of another study"
        )
    for member in members:
        _check_settings(member)
    newest = _newest_first(members)
    wanted = dict(digests) if digests else {m.variant: m.digest for m in reversed(newest)}
    current = [member for member in members if wanted.get(member.variant) == member.digest]
    outdated = [_outdated(m, wanted) for m in members if wanted.get(m.variant) != m.digest]
    if not current:
        raise UserError(
            f"all {len(members)} runs of budget '{budget}' in '{folder}' are of other settings "
            f"than the study has now, such as '{members[0].name}'; run `ablate` again"
        )
    _check_repetition(current)
    first = _newest_first(current)[0].entry
    finished = [member for member in current if _missing(member) is None]
    _check_together(finished)
    order = _order(str(first["reference"]), wanted, first.get("variants"))
    changes: dict[str, dict[str, Any]] = {variant: {} for variant in order}
    changes |= {member.variant: dict(member.entry.get("changes") or {}) for member in current}
    runs: dict[str, dict[int, Run]] = {variant: {} for variant in order}
    for member in sorted(finished, key=lambda one: one.seed):
        runs[member.variant][member.seed] = member.run
    return StudyResults(
        name=str(first["study"]),
        question=str(first.get("question") or ""),
        budget=budget,
        reference=str(first["reference"]),
        changes=changes,
        runs=runs,
        unfinished=[sentence for member in current if (sentence := _missing(member))],
        outdated=outdated,
    )


def _members(folder: Path) -> Iterator[_Member]:
    """Yield the run folders of a study by name; folders without ``ablation.json`` are no runs."""
    for path in sorted(folder.glob("*")):
        run = Run(path)
        if not run.ablation_file.is_file():
            continue
        entry = run.ablation
        if entry is None or not (
            all(isinstance(entry.get(key), str) for key in TEXTS)
            and all(type(entry.get(key)) is int for key in INTEGERS)
        ):
            raise UserError(
                f"'{run.ablation_file}' does not hold the place of a run in a study, as "
                "`ablate` writes it; move the folder away and run `ablate` again"
            )
        is_trained = run.config_file.is_file()
        yield _Member(run, entry, run.configuration(entry["max_steps"]) if is_trained else None)


def _check_settings(member: _Member) -> None:
    """Check that a folder still holds the settings that it was made with."""
    configuration, folder = member.configuration, member.run.folder
    ending = f".seed{member.seed}.{member.entry['budget']}.{member.digest}"
    if not folder.name.endswith(ending):
        raise UserError(
            f"the name of the folder '{folder}' does not end with '{ending}', which its "
            "ablation.json says; restore the name, or move the folder away and run `ablate` again"
        )
    if configuration is None:
        return
    if source := member.entry.get("transplant"):
        # The study states the source; the run started from a file made of it for its variant.
        settings = {**configuration.settings, "model.weights": source}
        configuration = replace(configuration, settings=settings)
    if (digest := settings_digest(configuration)) != member.digest:
        raise UserError(
            f"the settings in '{member.run.config_file}' have the digest '{digest}' instead of "
            f"'{member.digest}', so they were edited after the run was started; restore them, or "
            "move the folder away and run `ablate` again"
        )
    if configuration.seed != member.seed:
        raise UserError(
            f"'{member.run.config_file}' has the seed {configuration.seed} and ablation.json the "
            f"seed {member.seed}, so one of them was edited; restore it, or move the folder away "
            "and run `ablate` again"
        )


def _check_repetition(members: Sequence[_Member]) -> None:
    by_place: dict[tuple[str, int], _Member] = {}
    for member in members:
        other = by_place.setdefault((member.variant, member.seed), member)
        if other is not member:
            raise UserError(
                f"'{other.run.folder}' and '{member.run.folder}' are both seed {member.seed} of "
                f"variant '{member.variant}', and would count twice; move one of them away"
            )


def _check_together(finished: Sequence[_Member]) -> None:
    """Check that finished runs have the same data, images, classes and training length."""
    if not finished:
        return
    first = finished[0]
    evaluation = _evaluation(first)
    data = first.run.training_data
    for member in finished[1:]:
        other = member.run.training_data
        for one, known in ((first, data), (member, other)):
            if known is None:
                raise UserError(
                    f"the training data of '{one.run.folder}' are not known, because its "
                    "training_data.json is missing or damaged; restore the file, or move the "
                    "folder away and run `ablate` again"
                )
        if data != other:
            raise UserError(
                f"'{first.name}' was trained on {data} and '{member.name}' on {other}, so their "
                "difference is not that of the variants; move the runs on the wrong data away and "
                "run `ablate` again"
            )
        is_axis = any(MAX_STEPS in (m.entry.get("changes") or {}) for m in (first, member))
        if member.max_steps != first.max_steps and not is_axis:
            raise UserError(
                f"'{first.name}' was trained for {first.max_steps:,} steps and '{member.name}' for "
                f"{member.max_steps:,}, which is no setting of the variants; delete the runs of "
                "the wrong length and run `ablate` again"
            )
        matched(evaluation, _evaluation(member), (f"'{first.name}'", f"'{member.name}'"))


def _evaluation(member: _Member) -> Evaluation:
    file = next(f for f in reversed(member.run.evaluations) if f.split == "val")
    return file.load()


def _missing(member: _Member) -> str | None:
    """Return what a run lacks as a sentence; None if it is finished."""
    run, place = member.run, f"{member.variant}, seed {member.seed}"
    last = max((file.step for file in run.evaluations if file.split == "val"), default=0)
    if last == member.max_steps:
        names = member.entry.get("evaluations") or []
        steps = {name: one.evaluations[-1].step for name, one in run.named_evaluations.items()}
        absent = [name for name in names if steps.get(name) != last]
        if not absent:
            return None
        state = f"has not been evaluated as {', '.join(map(str, absent))}"
    else:
        state = f"has been evaluated at step {last:,} of {member.max_steps:,}"
        state = state if last else f"has not been evaluated at all, of {member.max_steps:,} steps"
    if run.failure:
        return f"{place}, failed and {state}: {run.failure}"
    return f"{place}, {state}"


def _newest_first(members: Sequence[_Member]) -> list[_Member]:
    def age(member: _Member) -> tuple[float, str]:
        return -member.run.ablation_file.stat().st_mtime, member.name

    return sorted(members, key=age)


def _outdated(member: _Member, wanted: Mapping[str, str]) -> str:
    if member.variant not in wanted:
        return f"'{member.name}' is of a variant that the study no longer has"
    return (
        f"'{member.name}' has other settings than variant '{member.variant}' has now, digest "
        f"{member.digest} instead of {wanted[member.variant]}"
    )


def _order(reference: str, wanted: Mapping[str, str], listed: Any) -> list[str]:
    """Return the variants, the reference first, then in the order of the study as far as known."""
    names = [str(name) for name in listed] if isinstance(listed, list) else sorted(wanted)
    known = [name for name in names if name in wanted] + [n for n in wanted if n not in names]
    return [reference, *(name for name in known if name != reference)]
