"""The model card of a network on the hub: what it is, how to use it, and what its run measured.

A card is Markdown after a block of metadata, which the hub reads. What is not known is left out,
and so are the folders of local files.
"""

import math
import platform
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from segformer_pl import __version__
from segformer_pl.analysis.comparison import miou_interval
from segformer_pl.analysis.evaluation import Evaluation
from segformer_pl.analysis.recipe import departures, remarks, scope
from segformer_pl.analysis.report.provenance_facts import PartFacts, describe_parts
from segformer_pl.analysis.run import Run
from segformer_pl.analysis.style import printable
from segformer_pl.errors import UserError
from segformer_pl.metrics import TARGET, class_accuracy, expected_calibration_error
from segformer_pl.models.segmenter import Segmenter

FIGURE = "receptive_fields.png"
SPLITS = {"test": "test", "val": "validation"}  # the first one that exists is that of the classes
DASH = "\u2013"

_HUB_SOURCE = re.compile(r"(?P<repo>[\w.-]+/[\w.-]+)@[0-9a-f]{40}")


class Dataset(NamedTuple):
    """The data set that a network was trained on.

    Attributes:
        name: Name in the catalogue, or of the user's file.
        title: Full name.
        source: Authors and publication; None if they are not known.
        hub: Location on the hub, ``owner/name``; None if there is none.
        revision: Commit on the hub.
    """

    name: str
    title: str
    source: str | None = None
    hub: str | None = None
    revision: str | None = None


class ClassRow(NamedTuple):
    """One class of an evaluation, its numbers as text."""

    name: str
    iou: str
    accuracy: str
    share: str


@dataclass(frozen=True)
class Result:
    """An evaluation of the network.

    Attributes:
        split: ``validation`` or ``test``.
        evaluation: The evaluation.
        metrics: Names and values, as text.
    """

    split: str
    evaluation: Evaluation
    metrics: list[tuple[str, str]]

    @property
    def num_images(self) -> int:
        """Number of images."""
        return len(self.evaluation.ids)

    @property
    def classes(self) -> list[ClassRow]:
        """The classes in the order of their train ids."""
        total = self.evaluation.counts.sum(axis=0)
        share = total[:, TARGET] / max(total[:, TARGET].sum(), 1)
        values = zip(self.evaluation.iou, class_accuracy(total), share, strict=True)
        return [
            ClassRow(name, *map(_percent, numbers))
            for name, numbers in zip(self.evaluation.class_names, values, strict=True)
        ]


@dataclass(frozen=True)
class Training:
    """What a card states of the run that trained the network.

    Attributes:
        dataset: The data set.
        step: Number of training steps.
        settings: Names and values of settings, as text.
        results: Evaluations of the network after this number of steps.
        protocol: The test-time protocol, as text.
        monitor: Metric by which the checkpoint was chosen among others; None if it was not.
        config: Configuration of the run, for its departures from the published recipe.
        figure: Figure of receptive fields; None if the run has none.
        parts: Hardware, duration, code and packages of the processes that trained the network.
    """

    dataset: Dataset
    step: int
    protocol: str
    monitor: str | None = None
    settings: list[tuple[str, str]] = field(default_factory=list)
    results: list[Result] = field(default_factory=list)
    config: Mapping[str, Any] = field(default_factory=dict)
    figure: Path | None = None
    parts: list[PartFacts] = field(default_factory=list)

    @property
    def base_model(self) -> str | None:
        """Repository of the initial weights; None if they were not on the hub."""
        model = self.config.get("model") or {}
        given = (str(model.get(key)) for key in ("weights", "encoder_weights"))
        found = filter(None, map(_HUB_SOURCE.fullmatch, given))
        return next((match["repo"] for match in found), None)


def describe_training(
    run: Run, step: int, dataset: Dataset, protocol: str, monitor: str | None
) -> Training:
    """Collect what a run folder states of the network after some of its steps.

    Args:
        run: The run.
        step: Number of training steps of the network.
        dataset: The data set.
        protocol: The test-time protocol, as text.
        monitor: Metric by which the checkpoint was chosen among others; None if it was not.

    Raises:
        UserError: A configuration or an evaluation of the run is damaged.
    """
    config = [part for start, part in run.configs.items() if start == 0 or start < step][-1]
    results = [
        _result(run, SPLITS[file.split], file.load())
        for file in sorted(run.evaluations, key=lambda file: list(SPLITS).index(file.split))
        if file.step == step
    ]
    figures = [file for at, file in run.figures("erf").items() if at <= step]
    settings = _settings(run, config, step, dataset)
    figure = figures[-1] if figures else None
    parts = [
        facts
        for part, facts in zip(run.parts, describe_parts(run), strict=True)
        if part.stage == "fit" and (part.step == 0 or part.step < step)
    ]
    return Training(dataset, step, protocol, monitor, settings, results, config, figure, parts)


def model_card(
    network: Segmenter,
    class_names: Sequence[str],
    transformers_class: str | None,
    training: Training | None = None,
    repo: str = "owner/name",
    licence: str | None = None,
    provenance: Mapping[str, str] | None = None,
) -> ModelCard:
    """Return the model card of a network.

    Args:
        network: The network.
        class_names: Class names by train id.
        transformers_class: Class of transformers that opens the files; None if none does.
        training: The run that trained it, if it is known.
        repo: Name of the repository, ``owner/name``.
        licence: Identifier of the licence of the weights; None if it is not known.
        provenance: What else is known about the origin of the weights.
    """
    architecture = type(network).__name__
    versions = {
        "segformer_pl": __version__,
        "torch": version("torch"),
        "python": platform.python_version(),
    }
    config = training.config if training else {}
    template = _environment().get_template("model_card.md.j2")
    body = template.render(
        repo=repo,
        title=repo.rpartition("/")[2],
        architecture=architecture,
        num_parameters=sum(parameter.numel() for parameter in network.parameters()),
        class_names=class_names,
        transformers_class=transformers_class,
        publication=network.publication,
        training=training,
        scope=scope(config) if config else "",
        departures=departures(config) if config else [],
        remarks=remarks(config) if config else [],
        figure=FIGURE if training and training.figure else None,
        licence=licence,
        provenance={**(provenance or {}), "card written with": _listed(versions)},
    )
    dataset = training.dataset if training else None
    results = [
        result for one in (training.results if training else []) for result in _index(one, dataset)
    ]
    data = ModelCardData(
        library_name="transformers" if transformers_class else "segformer_pl",
        pipeline_tag="image-segmentation",
        license=licence,
        tags=["segformer_pl", "semantic-segmentation", architecture.lower()],
        datasets=[dataset.hub] if dataset and dataset.hub else None,
        base_model=training.base_model if training else None,
        model_name=repo.rpartition("/")[2],
        eval_results=results or None,
    )
    if not results:
        data.model_name = None  # which is only the name in the index of results
    text = f"---\n{data.to_yaml()}\n---\n\n{body}"
    return ModelCard(text.encode(errors="replace").decode())  # UTF-8 has no unpaired surrogates


def _environment() -> jinja2.Environment:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("segformer_pl.analysis", "report"),
        autoescape=False,  # Markdown; `text` escapes what is not ours
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters["text"] = _text
    return environment


def _text(value: Any) -> str:
    """Make foreign text fit for one line of Markdown, in which none of it is markup."""
    shown = re.sub(r"(?<![\w.:/@-])(?:~|/)[^\s,;'\"]*/", "", str(value))  # folders of local files
    # An underscore within a word is no markup.
    markup = r"([\\`*{}\[\]<>|~$&#]|(?<![^\W_])_|_(?![^\W_]))"
    return re.sub(markup, r"\\\1", printable(shown, 300))


def _listed(values: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())


def _percent(value: float) -> str:
    return DASH if math.isnan(value) else f"{100 * value:.1f} %"


def _result(run: Run, split: str, evaluation: Evaluation) -> Result:
    miou, (low, high) = _percent(evaluation.miou), miou_interval(evaluation)
    if not math.isnan(low):
        miou += f" (95 % CI {_percent(low)} to {_percent(high)})"
    boundary = _logged(run, f"{evaluation.split}/boundary_iou", evaluation.step)
    values = {
        "mean accuracy of the classes (mAcc)": evaluation.macc,
        "pixel accuracy (aAcc)": evaluation.aacc,
        "frequency-weighted IoU": evaluation.fwiou,
        "mean boundary IoU": boundary,
        "mean over images of the mIoU of each (mIoU^I)": evaluation.miou_i,
        "expected calibration error": float(expected_calibration_error(evaluation.calibration)),
    }
    known = [(name, _percent(v)) for name, v in values.items() if not math.isnan(v)]
    return Result(split, evaluation, [("mIoU", miou), *known])


def _logged(run: Run, name: str, step: int) -> float:
    """Return a logged value after a number of training steps; nan if there is none."""
    try:
        series = run.metrics.get(name)
    except (FileNotFoundError, UserError):  # the evaluations are files of their own
        return math.nan
    if series is None:
        return math.nan
    return next((float(v) for at, v in zip(series.step, series.value) if at == step), math.nan)


def _index(result: Result, dataset: Dataset | None) -> list[EvalResult]:
    """Return the entries of the hub's index of results, as fractions."""
    assert dataset is not None
    evaluation = result.evaluation
    values = {
        ("mean_iou", "mIoU"): evaluation.miou,
        ("mean_accuracy", "mAcc"): evaluation.macc,
        ("accuracy", "aAcc"): evaluation.aacc,
    }
    return [
        EvalResult(
            task_type="image-segmentation",
            task_name="Semantic segmentation",
            dataset_type=dataset.hub or dataset.name,
            dataset_name=dataset.title,
            dataset_split=result.split,
            dataset_revision=dataset.revision,
            metric_type=kind,
            metric_name=name,
            metric_value=round(value, 4),
        )
        for (kind, name), value in values.items()
        if not math.isnan(value)
    ]


def _settings(
    run: Run, config: Mapping[str, Any], step: int, dataset: Dataset
) -> list[tuple[str, str]]:
    """Return the settings of a training that a reader looks for, as far as they are stated."""
    model, data, trainer = (config.get(part) or {} for part in ("model", "data", "trainer"))
    network = model.get("network") or {}
    per_step = [part for start, part in run.ranks.items() if start == 0 or start < step]
    images = run.training_data
    weights = model.get("weights") or model.get("encoder_weights")
    if weights is None:
        is_pretrained = (network.get("init_args") or {}).get("pretrained") is True
        weights = "pretrained backbone of timm" if is_pretrained else "random"
    elif Path(str(weights)).suffix:
        weights = Path(str(weights)).name
    values: dict[str, Any] = {
        "network": str(network.get("class_path", "")).rpartition(".")[2] or None,
        "data set": ", ".join(filter(None, [dataset.title, dataset.source])),
        "training images": images and f"{images.num_rows:,}, fingerprint {images.fingerprint}",
        "steps": f"{step:,} of {trainer['max_steps']:,}" if trainer.get("max_steps") else step,
        "images per step": per_step[-1].get("images per step") if per_step else None,
        "crop": data.get("crop_size") and " x ".join(map(str, data["crop_size"])),
        "optimizer": model.get("optimizer"),
        "learning rate": model.get("lr"),
        "weight decay": model.get("weight_decay"),
        "warm-up steps": model.get("warmup_steps"),
        "initial weights": weights,
        "frozen": model.get("freeze"),
        "precision": trainer.get("precision"),
        "seed": config.get("seed_everything"),
    }
    return [(name, str(value)) for name, value in values.items() if value is not None]
