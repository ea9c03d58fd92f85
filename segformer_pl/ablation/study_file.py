"""The content of a study file, checked as far as it needs no settings of ``fit``.

A study file, with settings of ``fit`` under their dotted names::

    question: Does a larger reduction ratio cost the classes that need long context?
    base: shapes.yaml                    # relative to the study file
    reference: r8-4-2-1                  # default: the first variant
    variants:
      r8-4-2-1: {}
      r1-1-1-1: {model.network.init_args.sr_ratios: [1, 1, 1, 1]}
    seeds: [0, 1, 2]
    budgets:
      smoke: {seeds: [0, 1], settings: {trainer.max_steps: 4, trainer.val_check_interval: 4}}
      full: {base: ../camvid_b0.yaml, settings: {trainer.max_steps: 8000}}

Instead of ``variants``, ``axes`` gives a grid of values. The axis
``{model.network.init_args.drop_path_rate: [0.0, 0.1]}`` has the variants ``drop_path_rate=0.0`` and
``drop_path_rate=0.1``.
"""

import copy
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from segformer_pl.analysis.configuration import plain
from segformer_pl.errors import UserError
from segformer_pl.yaml_file import read_mapping

# Names become parts of the names of run folders, <variant>.seed<seed>.<budget>.<digest>.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
MAX_NAME = 100  # characters; names of files have at most 255, with a variant, a budget and suffixes


@dataclass(frozen=True)
class Spread:
    """Standard deviations of mIoU, as fractions, from which a study can be planned.

    Attributes:
        seeds: Between the differences (variant minus reference) of several seeds.
        images: Of the difference, over the choice of validation images.
    """

    seeds: NonNegativeFloat
    images: NonNegativeFloat


@dataclass(frozen=True)
class Budget:
    """How much is trained.

    Attributes:
        settings: Settings of ``fit`` by dotted name.
        base: Experiment file instead of that of the study.
        seeds: Seeds instead of those of the study.
    """

    settings: dict[str, Any] = field(default_factory=dict)
    base: str | None = None
    seeds: list[NonNegativeInt] | None = None


@dataclass(frozen=True)
class StudyFile:
    """The content of a study file.

    Attributes:
        question: The question that the study answers, a sentence.
        base: Experiment file (settings of ``fit``), relative to the study file.
        budgets: Budgets by name.
        seeds: Seeds of each variant.
        variants: Changes of the base by name of the variant: dotted name of a setting -> value.
        axes: Values by dotted name of a setting; the variants are all their combinations.
        reference: Variant that the others are compared with. Default: the first one.
        evaluations: Further evaluations of each trained network, by name: settings of ``validate``.
        transplant: Weights that every variant starts from, adapted to its shapes; a file or hub
            name, as ``model.weights``.
        spread: Spread of mIoU to plan with, while there are no finished runs.
        notes: Sentences about variants, by their name, which the report of ``arena`` shows.
    """

    question: str
    base: str
    budgets: dict[str, Budget]
    seeds: list[NonNegativeInt]
    variants: dict[str, dict[str, Any]] | None = None
    axes: dict[str, list[Any]] | None = None
    reference: str | None = None
    evaluations: dict[str, dict[str, Any]] = field(default_factory=dict)
    transplant: str | None = None
    spread: Spread | None = None
    notes: dict[str, str] = field(default_factory=dict)


def read_study_file(file: Path) -> StudyFile:
    content = read_mapping(file, "a study, such as those in experiments/ablations")
    _check_entries(file, content)
    _check_parts(file, content)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudyFile)
    try:
        read = parser.parse_object(copy.deepcopy(content))  # it changes its argument
    except ArgumentError as error:
        raise UserError(f"{file}: {' '.join(str(error).split())}") from error
    # The parser's instantiate_classes would also build networks and callbacks that are values of
    # settings, so settings are taken as they are in the file.
    budgets = {
        name: Budget((given or {}).get("settings") or {}, budget.base, budget.seeds)
        for (name, budget), given in zip(read.budgets.items(), content["budgets"].values())
    }
    settings = {
        key: content[key] for key in ("variants", "axes", "evaluations") if content.get(key)
    }
    spread = None if read.spread is None else Spread(**vars(read.spread))
    return StudyFile(**{**vars(read), **settings, "budgets": budgets, "spread": spread})


def _check_entries(file: Path, content: Mapping[str, Any]) -> None:
    """Check the named entries of a study, for which the parser's messages list types of Python."""
    kinds = {
        "variants": (dict, "its changes by dotted name, or {} for none"),
        "axes": (list, "a list of at least one value"),
        "evaluations": (dict, "settings of `validate` by dotted name, or {} for none"),
        "budgets": (dict, "its settings, such as {settings: {trainer.max_steps: 4}}"),
        "notes": (str, "a sentence for the report"),
    }
    known = [one.name for one in fields(StudyFile)]
    for key in content:
        if key not in known:
            raise UserError(f"{file}: '{key}' is no entry of a study; they are {', '.join(known)}")
    for key, (kind, what) in kinds.items():
        entries = content.get(key)
        if entries is None:
            continue
        if key == "budgets" and not entries:
            raise UserError(f"{file}: budgets: give at least one, by name: {what}")
        if not isinstance(entries, dict):
            raise UserError(f"{file}: {key}: give names, and for each of them {what}")
        for name, value in entries.items():
            if not isinstance(name, str):
                raise UserError(
                    f"{file}: {key}: the name {name!r} is no text for YAML; write it in quotes"
                )
            if not isinstance(value, kind) or value == []:
                raise UserError(f"{file}: {key}: '{name}' is {value!r}; give {what}")


def _check_parts(file: Path, content: Mapping[str, Any]) -> None:
    """Check seeds, spread and the entries of budgets, as :func:`_check_entries` does."""
    budgets = content.get("budgets") or {}
    known = [one.name for one in fields(Budget)]
    for name, budget in budgets.items():
        for key in budget:
            if key not in known:
                raise UserError(
                    f"{file}: budgets: '{name}' has '{key}', and a budget has {', '.join(known)}; "
                    "settings of `fit` belong into its settings"
                )
        if not isinstance(budget.get("settings") or {}, dict):
            raise UserError(
                f"{file}: budgets: '{name}': settings is {budget['settings']!r}; give settings of "
                "`fit` by dotted name"
            )
    places = {"seeds": content.get("seeds")}
    places |= {f"budgets: '{name}': seeds": one.get("seeds") for name, one in budgets.items()}
    for place, seeds in places.items():
        if seeds is not None and not (
            isinstance(seeds, list) and all(type(seed) is int and seed >= 0 for seed in seeds)
        ):
            raise UserError(
                f"{file}: {place} is {seeds!r}; give a list of integers of at least 0, such as "
                "[0, 1, 2]"
            )
    spread = content.get("spread")
    parts = {one.name for one in fields(Spread)}
    if spread is not None and not (isinstance(spread, dict) and spread.keys() == parts):
        raise UserError(
            f"{file}: spread is {spread!r}; give standard deviations of mIoU as fractions, such as "
            "{seeds: 0.01, images: 0.003}"
        )


def changes_of_variants(content: StudyFile, file: Path) -> dict[str, dict[str, Any]]:
    """Return the changes of every variant by its name."""
    if bool(content.variants) == bool(content.axes):
        raise UserError(f"{file}: give either variants or axes, with at least one entry")
    variants = content.variants or dict(_grid(content.axes or {}))
    check_names(file, variants)
    for name, changes in variants.items():
        for key in changes:
            if "." not in key:
                raise UserError(
                    f"{file}: variant '{name}' changes '{key}', which is no setting; give its "
                    "dotted name, such as model.network.init_args.sr_ratios (seeds are no setting "
                    "of a variant)"
                )
    return variants


def _grid(axes: Mapping[str, Sequence[Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    for values in itertools.product(*axes.values()):
        changes = dict(zip(axes, values))
        name = "+".join(f"{key.rpartition('.')[2]}={_short(v)}" for key, v in changes.items())
        yield name, changes


def _short(value: Any) -> str:
    return "-".join(map(_short, value)) if isinstance(value, list) else plain(value)


def check_names(file: Path, names: Sequence[str] | Mapping[str, Any]) -> None:
    for name in names:
        if not NAME.fullmatch(name):
            raise UserError(
                f"{file}: the name '{name}' is used for folders; use letters, digits and . _ = + - "
                "(a grid's values can be given names as variants)"
            )
        if len(name) > MAX_NAME:
            raise UserError(
                f"{file}: the name '{name[:20]}...' has {len(name)} characters and is used for "
                f"folders; use at most {MAX_NAME} (a grid's values can be given names as variants)"
            )
