"""A study: one question, variants of one base experiment, and the seeds and budgets of its runs.

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
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError, ArgumentParser
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt

from segformer_pl.analysis.configuration import (
    SEED,
    plain,
    settings_digest,
    training_configuration,
)
from segformer_pl.checkpoints.networks import build
from segformer_pl.data.catalog import find_dataset
from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Segmenter, check_segmenter

# Names become parts of the names of run folders, <variant>.seed<seed>.<budget>.<digest>.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._=+-]*")
MAX_NAME = 100  # characters; names of files have at most 255, with a variant, a budget and suffixes

# YAML files of a `fit`, later ones winning -> its complete settings
Resolve = Callable[[list[str]], dict[str, Any]]


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


@dataclass(frozen=True)
class Variant:
    """One of the trainings that a study compares.

    Attributes:
        name: Name in the study.
        changes: Settings in which it differs from the base, by dotted name.
        config: Complete settings of its ``fit``, with the first seed of the study.
        digest: Digest of the settings that determine what is trained, without the seed.
    """

    name: str
    changes: dict[str, Any]
    config: dict[str, Any]
    digest: str

    @property
    def num_classes(self) -> int:
        """Number of classes of the data set."""
        return find_dataset(self.config["data"]["dataset"]).labels.num_classes

    @property
    def image_size(self) -> tuple[int, int] | None:
        """Height and width of the training images in pixels; None if nothing states them."""
        data = self.config["data"]
        size = data.get("crop_size") or find_dataset(data["dataset"]).size
        return None if size is None else (int(size[0]), int(size[1]))

    def build_network(self) -> Segmenter:
        """Build the network with random weights.

        Raises:
            UserError: The network cannot be built with these arguments.
        """
        spec = self.config["model"]["network"]
        arguments = {**spec.get("init_args", {}), "num_classes": self.num_classes}
        network = build({**spec, "init_args": arguments}, f"variant '{self.name}'")
        check_segmenter(network)
        assert isinstance(network, Segmenter)
        return network


@dataclass(frozen=True)
class StudyRun:
    """The training of one variant with one seed.

    Attributes:
        variant: What is trained.
        seed: Its seed.
        folder: Its run folder, whose name states variant, seed, budget and digest.
    """

    variant: Variant
    seed: int
    folder: Path

    @property
    def max_steps(self) -> int:
        """Number of training steps."""
        return self.variant.config["trainer"]["max_steps"]


@dataclass(frozen=True)
class Study:
    """A study with one of its budgets, complete and checked; see :func:`read_study`.

    Attributes:
        name: Name of the file without its suffix.
        question: The question that the study answers.
        budget: Name of the budget.
        file: The study file.
        reference: Name of the variant that the others are compared with.
        variants: Variants, the reference first.
        seeds: Seeds of each variant.
        evaluations: Further evaluations of each trained network, by name: settings of ``validate``.
        transplant: Weights that every variant starts from; None for random weights, or those that
            the base states.
        spread: Spread of mIoU to plan with, if the file states one.
        notes: Sentences about variants, by their name.
    """

    name: str
    question: str
    budget: str
    file: Path
    reference: str
    variants: tuple[Variant, ...]
    seeds: tuple[int, ...]
    evaluations: dict[str, dict[str, Any]]
    transplant: str | None
    spread: Spread | None
    notes: dict[str, str]

    def runs(self, output: Path) -> tuple[StudyRun, ...]:
        """Return the runs in the order of execution: all variants of the first seed come first.

        So an interrupted study has complete seeds, whose variants can be compared.

        Args:
            output: Folder of all studies, such as ``runs/ablations``.
        """
        return tuple(
            StudyRun(
                variant,
                seed,
                output / self.name / f"{variant.name}.seed{seed}.{self.budget}.{variant.digest}",
            )
            for seed in self.seeds
            for variant in self.variants
        )


def read_study(
    file: Path, budget: str, resolve: Resolve, settings: Mapping[str, Any] | None = None
) -> Study:
    """Read a study file and complete the settings of all its variants.

    Args:
        file: Study file.
        budget: Name of one of its budgets.
        resolve: Function that maps YAML files to the complete settings of a ``fit`` with them.
        settings: Further settings of ``fit`` by dotted name, for all variants.

    Raises:
        UserError: The file cannot be read or has a mistake, its base does not exist, a setting does
            not exist, or a variant is impossible.
    """
    content = _read(file)
    if budget not in content.budgets:
        raise UserError(
            f"{file}: there is no budget '{budget}'; choose one of {', '.join(content.budgets)}"
        )
    chosen = content.budgets[budget]
    base = file.parent / (chosen.base or content.base)
    if not base.is_file():
        raise UserError(f"{file}: base: there is no file '{base}'; paths are relative to the study")
    seeds = [int(seed) for seed in chosen.seeds or content.seeds]
    if not seeds or len(set(seeds)) < len(seeds):
        raise UserError(f"{file}: seeds: {seeds}; give at least one, and each of them once")
    changes = _changes(content, file)
    reference = content.reference or next(iter(changes))
    if reference not in changes:
        raise UserError(
            f"{file}: reference: there is no variant '{reference}'; choose one of "
            f"{', '.join(changes)}"
        )
    for name in content.notes:
        if name not in changes:
            raise UserError(
                f"{file}: notes: there is no variant '{name}'; choose one of {', '.join(changes)}"
            )
    names = [reference, *(name for name in changes if name != reference)]
    common = {**chosen.settings, SEED: seeds[0]}
    if content.transplant is not None:
        common["model.weights"] = content.transplant
    variants = tuple(
        _variant(file, name, changes[name], [common, changes[name], settings or {}], base, resolve)
        for name in names
    )
    _check_names(file, [budget, *content.evaluations])
    for name, evaluation in content.evaluations.items():
        # `validate` has the same settings as `fit`.
        origin = f"{file}: evaluations: '{name}'"
        _resolve(origin, base, [common, changes[reference], evaluation], resolve)
    _check_different(file, variants)
    _check_same_data(file, variants)
    return Study(
        name=file.stem,
        question=content.question,
        budget=budget,
        file=file,
        reference=reference,
        variants=variants,
        seeds=tuple(seeds),
        evaluations=content.evaluations,
        transplant=content.transplant,
        spread=content.spread,
        notes=content.notes,
    )


def nested(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings with dotted names as nested dictionaries, which YAML files consist of.

    >>> nested({"model.lr": 0.1, "model.network": {"class_path": "Net"}})
    {'model': {'lr': 0.1, 'network': {'class_path': 'Net'}}}
    """
    tree: dict[str, Any] = {}
    for key, value in settings.items():
        *parents, last = key.split(".")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                raise UserError(
                    f"'{key}' is set, and '{parent}' in it is {node!r}; give one of them"
                )
        if isinstance(value, dict) and isinstance(node.get(last), dict):
            node[last] = nested({**_dotted(node[last]), **_dotted(value)})
        else:
            node[last] = value
    return tree


def _dotted(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            flat |= _dotted(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat


def _read(file: Path) -> StudyFile:
    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"study: '{file}' cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise UserError(f"study: '{file}' is not UTF-8 text; give a YAML file") from error
    except yaml.YAMLError as error:
        raise UserError(f"{file}: no valid YAML ({' '.join(str(error).split())})") from error
    if not isinstance(content, dict):
        raise UserError(f"{file}: no study; see the files in experiments/ablations")
    _check_entries(file, content)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(StudyFile)
    try:
        read = parser.parse_object(copy.deepcopy(content))  # it changes its argument
    except ArgumentError as error:
        raise UserError(f"{file}: {_sentence(error)}") from error
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


def _changes(content: StudyFile, file: Path) -> dict[str, dict[str, Any]]:
    """Return the changes of every variant by its name."""
    if bool(content.variants) == bool(content.axes):
        raise UserError(f"{file}: give either variants or axes, with at least one entry")
    variants = content.variants or dict(_grid(content.axes or {}))
    _check_names(file, variants)
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


def _check_names(file: Path, names: Sequence[str] | Mapping[str, Any]) -> None:
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


def _variant(
    file: Path,
    name: str,
    changes: dict[str, Any],
    layers: Sequence[Mapping[str, Any]],
    base: Path,
    resolve: Resolve,
) -> Variant:
    origin = f"{file}: variant '{name}'"
    config = _resolve(origin, base, layers, resolve)
    configuration = training_configuration({0: config}, None)
    assert configuration is not None
    variant = Variant(name, changes, config, settings_digest(configuration))
    _check_steps(origin, config["trainer"])
    try:
        with torch.device("meta"):  # shapes alone; no memory, no random numbers
            network = variant.build_network()
    except UserError as error:
        raise UserError(f"{file}: {error}") from error
    size = variant.image_size
    if size is not None and min(size) < network.min_size:
        raise UserError(
            f"{origin}: its network needs images of at least {network.min_size} pixels a side, and "
            f"the training images have {size[0]}x{size[1]}; give a larger data.crop_size or leave "
            "the variant out"
        )
    return variant


def _resolve(
    origin: str, base: Path, layers: Sequence[Mapping[str, Any]], resolve: Resolve
) -> dict[str, Any]:
    """Return the complete settings of the base with layers of settings, later ones winning."""
    try:
        with tempfile.TemporaryDirectory() as folder:
            files = [str(base)]
            for index, layer in enumerate(layers):
                files.append(str(Path(folder, f"{index}.yaml")))
                Path(files[-1]).write_text(yaml.safe_dump(nested(layer)), encoding="utf-8")
            return resolve(files)
    except (UserError, ArgumentError) as error:
        raise UserError(f"{origin}: {_sentence(error)}") from error


def _sentence(error: Exception) -> str:
    return " ".join(str(error).split())


def _check_steps(origin: str, trainer: Mapping[str, Any]) -> None:
    """Check that the last step is validated, because variants are compared after it."""
    steps, interval = trainer["max_steps"], trainer["val_check_interval"]
    if not isinstance(steps, int) or steps < 1:
        raise UserError(f"{origin}: trainer.max_steps is {steps}; give an integer of at least 1")
    batches = interval // trainer["accumulate_grad_batches"] if isinstance(interval, int) else 0
    if batches < 1 or steps % batches:
        raise UserError(
            f"{origin}: trainer.val_check_interval is {interval}, so the last of {steps} steps is "
            "not validated, and variants are compared after it; give a divisor of "
            "trainer.max_steps"
        )


def _check_different(file: Path, variants: Sequence[Variant]) -> None:
    by_digest: dict[str, str] = {}
    for variant in variants:
        other = by_digest.setdefault(variant.digest, variant.name)
        if other != variant.name:
            raise UserError(
                f"{file}: the variants '{other}' and '{variant.name}' have the same settings; "
                "leave one of them out"
            )


def _check_same_data(file: Path, variants: Sequence[Variant]) -> None:
    """Check that all variants are validated on the same images, by which they are compared."""
    first = variants[0]
    for variant in variants[1:]:
        for part, key in (("data", "dataset"), ("trainer", "limit_val_batches")):
            one, other = first.config[part][key], variant.config[part][key]
            if one != other:
                raise UserError(
                    f"{file}: {part}.{key} is {one} in variant '{first.name}' and {other} in "
                    f"'{variant.name}', and variants are compared on the same images; make a "
                    "study of each"
                )
