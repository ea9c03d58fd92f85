"""A study: one question, variants of one base experiment, and the seeds and budgets of its runs.

:mod:`.study_file` describes the file. Here the settings of every variant are completed and checked.
"""

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentError

from segformer_pl.ablation.study_file import (
    Spread,
    changes_of_variants,
    check_names,
    read_study_file,
)
from segformer_pl.analysis.configuration import SEED, settings_digest, training_configuration
from segformer_pl.checkpoints.networks import build
from segformer_pl.data.catalog import find_dataset
from segformer_pl.errors import UserError
from segformer_pl.models.segmenter import Segmenter, check_segmenter

MAX_SEED = 2**32 - 1  # numpy's

# YAML files, later ones winning, and the command that reads them -> its complete settings
Resolve = Callable[[list[str], str], dict[str, Any]]


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
        resolve: Function that maps YAML files and the name of a command, ``fit``, to its complete
            settings, and raises a UserError for those that the command would refuse.
        settings: Further settings of ``fit`` by dotted name, for all variants.

    Raises:
        UserError: The file cannot be read or has a mistake, its base does not exist, a setting does
            not exist, or a variant is impossible.
    """
    content = read_study_file(file)
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
    if max(seeds) > MAX_SEED:
        raise UserError(f"{file}: seeds: {max(seeds)} is too large; give at most {MAX_SEED}")
    changes = changes_of_variants(content, file)
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
    check_names(file, [budget, *content.evaluations])
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


def resolve_layers(
    origin: str,
    files: Sequence[str],
    layers: Sequence[Mapping[str, Any]],
    resolve: Resolve,
    command: str,
) -> dict[str, Any]:
    """Return the complete settings of files with layers of settings, later ones winning.

    Args:
        origin: Where the settings come from, for the message.
        files: YAML files.
        layers: Settings by dotted name, or nested.
        resolve: See :func:`read_study`.
        command: Command that reads them.

    Raises:
        UserError: The command would refuse the settings.
    """
    try:
        with tempfile.TemporaryDirectory() as folder:
            paths = [*files, *(str(Path(folder, f"{index}.yaml")) for index in range(len(layers)))]
            for path, layer in zip(paths[len(files) :], layers):
                Path(path).write_text(yaml.safe_dump(nested(layer)), encoding="utf-8")
            return resolve(paths, command)
    except (UserError, ArgumentError) as error:
        raise UserError(f"{origin}: {' '.join(str(error).split())}") from error


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


def _variant(
    file: Path,
    name: str,
    changes: dict[str, Any],
    layers: Sequence[Mapping[str, Any]],
    base: Path,
    resolve: Resolve,
) -> Variant:
    origin = f"{file}: variant '{name}'"
    config = resolve_layers(origin, [str(base)], layers, resolve, "fit")
    configuration = training_configuration({0: config}, None)
    assert configuration is not None
    variant = Variant(name, changes, config, settings_digest(configuration))
    _check_trainer(origin, config["trainer"])
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


def _check_trainer(origin: str, trainer: Mapping[str, Any]) -> None:
    """Check that runs can resume, and that the last step is validated and its result stored.

    Variants are compared after the last step.
    """
    if trainer["enable_checkpointing"] is False:
        raise UserError(
            f"{origin}: trainer.enable_checkpointing is false, but runs of a study resume from "
            "checkpoints and are evaluated from them; leave it out"
        )
    if trainer["fast_dev_run"]:
        raise UserError(
            f"{origin}: trainer.fast_dev_run is {trainer['fast_dev_run']}, which stores no result; "
            "leave it out, and give a small trainer.max_steps"
        )
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
        for part, key in (
            ("data", "dataset"),
            ("data", "path"),
            ("trainer", "limit_val_batches"),
        ):
            one, other = first.config[part][key], variant.config[part][key]
            if one != other:
                raise UserError(
                    f"{file}: {part}.{key} is {one} in variant '{first.name}' and {other} in "
                    f"'{variant.name}', and variants are compared on the same images; make a "
                    "study of each"
                )
