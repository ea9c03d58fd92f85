"""``erf``: effective receptive fields of a network's layers, as figures and numbers."""

import inspect
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from jsonargparse import Namespace
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from segformer_pl import __version__
from segformer_pl.analysis.erf import (
    ERF,
    NoFieldError,
    effective_receptive_field,
    explore,
    weights_hash,
)
from segformer_pl.analysis.erf.backbones import TimmStages
from segformer_pl.analysis.erf.captions import describe_settings
from segformer_pl.analysis.erf.plots import (
    plot_area_ratios,
    plot_difference,
    plot_erf,
    plot_radial_profiles,
)
from segformer_pl.analysis.report.explorer_page import write_explorer
from segformer_pl.atomic import atomic_write, make_writable_folder
from segformer_pl.checkpoints import load_network, read_weights
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.networks import find_segmenter
from segformer_pl.commands.options.networks import SEGMENTERS
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.errors import UserError, counted
from segformer_pl.inference import Predictor
from segformer_pl.inference.predictor import normalization_of
from segformer_pl.models.forward_check import class_maps_of, feature_maps_of
from segformer_pl.models.segmenter import Segmenter, check_segmenter
from segformer_pl.normalization import Normalization

DPI = 300
IMAGES_PER_READ = 8  # images read at a time; the measurement divides them by --batch_size
TIMM = "timm:"
EXPLORER_FILE = "erf_explorer.html"


class Subject(NamedTuple):
    """A network to measure.

    Attributes:
        network: The network.
        label: Name of its row in the figures.
        weights: Origin of its weights, such as ``"trained, step 1600"``.
        source: File or name that was given on the command line.
        normalization: Mean and standard deviation that its images are normalised with.
    """

    network: nn.Module
    label: str
    weights: str
    source: str
    normalization: Normalization = Normalization()


def run(options: Namespace) -> None:
    """Run ``erf``: write figures, numbers and maps of effective receptive fields.

    Args:
        options: Options as ``options/erf.py`` parses them.

    Raises:
        UserError: An argument, a file or the data cannot be used.
    """
    given = [key for key in ("ckpt", "weights", "model") if options[key] is not None]
    if len(given) != 1:
        raise UserError("give one of --ckpt, --weights and --model: the network to measure")
    options.device = resolve_device(options.device)
    if options.state is not None and options.weights is None:
        raise UserError("--state is for --weights, as a run's checkpoint holds one network")
    if options.size is not None and min(options.size) < 1:
        raise UserError("--size: give height and width of at least 1 pixel")
    checkpoint = None if options.ckpt is None else RunCheckpoint.read(options.ckpt)
    data = _data(options, checkpoint)
    if checkpoint is not None:
        subjects = [_trained(checkpoint, options.ckpt)]
    elif options.weights is not None:
        subjects = [subject_from_file(options.weights, options.state)]
    else:
        subjects = [_random(options.model, data)]
    if options.against is not None:
        subjects.append(against(options.against, data))
    for subject in subjects:
        _check_bands(subject, data)
    if options.reduction.isdigit():
        options.reduction = int(options.reduction)
    folder = Path(options.output)
    make_writable_folder(folder, "--output")
    for subject in subjects:
        _try(subject, data, options)
    results = [_measure(subject, data, options, options.num_images) for subject in subjects]
    _write(folder, subjects, results)
    if options.explore:
        _write_explorer(folder / EXPLORER_FILE, subjects, data, options)


def _data(options: Namespace, checkpoint: RunCheckpoint | None) -> StreamingSegmentationData:
    given = {key: value for key, value in options.data.as_dict().items() if value is not None}
    changes = {**given, "num_workers": 0}
    if checkpoint is not None:
        if "dataset" in given and "path" not in given:
            # The path in the checkpoint is that of the run's data set, not of this one.
            stated = checkpoint.content["datamodule_hyper_parameters"].get("num_bands", 3)
            return StreamingSegmentationData(**{"num_bands": stated, **changes})
        return load_data(checkpoint, **changes)
    if options.data.dataset is None:
        raise UserError(
            "--data.dataset is not given; give the data set whose images are measured on, or a "
            "--ckpt, which determines it"
        )
    return StreamingSegmentationData(**changes)


def _trained(checkpoint: RunCheckpoint, source: str) -> Subject:
    predictor = Predictor.from_weights(checkpoint.weights())
    return Subject(
        predictor.network,
        f"{type(predictor.network).__name__}, {Path(source).name}",
        f"trained, step {checkpoint.step}",
        source,
        predictor.normalization,
    )


def subject_from_file(source: str, state: str | None = None) -> Subject:
    """Return the network of weights in any known layout, which may be an encoder alone.

    Args:
        source: See :func:`~segformer_pl.checkpoints.read_weights`.
        state: Name of the copy to read from a file that holds several.
    """
    weights = read_weights(source, state)
    network, _ = load_network(weights)
    label = f"{type(network).__name__}, {Path(source).name}"
    return Subject(network.eval(), label, "from a file", source, normalization_of(weights))


def _random(name: str, data: StreamingSegmentationData) -> Subject:
    build = find_segmenter(name)
    try:
        inspect.signature(build).bind(num_classes=1)
    except TypeError as error:
        raise UserError(
            f"--model: {name!r} cannot be built from num_classes alone ({error}); give a function "
            "or class whose other arguments have defaults"
        ) from error
    torch.manual_seed(0)  # the same random weights each time
    network = build(num_classes=data.entry.labels.num_classes)
    check_segmenter(network)
    return Subject(network.eval(), name, "random weights", name)


def against(source: str, data: StreamingSegmentationData) -> Subject:
    if source in SEGMENTERS:
        return _random(source, data)
    if not source.startswith(TIMM):
        return _trained(RunCheckpoint.read(source, "--against"), source)
    name, _, weights = source.removeprefix(TIMM).partition(":")
    torch.manual_seed(0)
    network = TimmStages(name, weights or None).eval()
    origin = {"": "random weights", "pretrained": "timm's weights"}.get(weights, "from a file")
    normalization = Normalization(network.mean, network.std)
    return Subject(network, f"timm {name}", origin, source, normalization)


def _check_bands(subject: Subject, data: StreamingSegmentationData) -> None:
    """Refuse a network that takes other channels than images are read with."""
    channels: Any = subject.network.in_channels
    if channels != data.num_bands:
        raise UserError(
            f"{subject.source!r}: the network takes images of {channels} channels, and those of "
            f"data set {data.entry.name!r} are read with {data.num_bands}; give --data.num_bands "
            "(3 or 4) and networks that agree with it"
        )


def image_batches(
    data: StreamingSegmentationData, num_images: int, size: tuple[int, int] | None
) -> Iterator[dict[str, Any]]:
    """Yield batches of validation images, evenly spaced over the split.

    The stored order can be by class or by place, so the first images need not represent the split.
    Two images of ten are samples 0 and 5. The choice depends on the two numbers alone.
    """
    if num_images < 1:
        raise UserError("--num_images: give an integer of at least 1")
    samples: Any = data.val_dataloader().dataset
    num_samples = samples.order.num_rows
    count = min(num_images, num_samples)
    images: list[Tensor] = []
    ids: list[str] = []
    for number in range(count):
        sample = samples[number * num_samples // count]
        if sample["id"] in sample["skipped"]:
            sys.stderr.write(f"skipped: {sample['skipped'][sample['id']]}\n")
            continue
        image = sample["image"][None]
        if size is not None:
            image = F.interpolate(image, tuple(size), mode="bicubic", antialias=True).clamp(0, 1)
        if images and image.shape != images[0].shape:
            raise UserError(
                f"the images of {data.entry.name!r} have different sizes, so their receptive "
                "fields cannot be averaged; give --size H W"
            )
        images.append(image)
        ids.append(sample["id"])
        if len(images) == IMAGES_PER_READ:
            yield {"image": torch.cat(images), "id": ids}
            images, ids = images[:0], []
    if images:
        yield {"image": torch.cat(images), "id": ids}


def _try(subject: Subject, data: StreamingSegmentationData, options: Namespace) -> None:
    """Measure one image, so that wrong arguments are refused before any long measurement."""
    try:
        with suppress(NoFieldError):  # other images may have a receptive field
            _measure(subject, data, options, min(options.num_images, 1))
    except UserError:
        raise
    except Exception:  # any type: the network may be the user's
        if isinstance(subject.network, Segmenter):
            images = next(image_batches(data, 1, options.size))["image"].to(options.device)
            with torch.no_grad():
                feature_maps_of(subject.network, subject.normalization(images))
                class_maps_of(subject.network, subject.normalization(images))
        raise


def _measure(
    subject: Subject, data: StreamingSegmentationData, options: Namespace, num_images: int
) -> ERF:
    network = subject.network.to(options.device)
    batches = image_batches(data, num_images, options.size)
    return effective_receptive_field(
        network,
        tqdm(batches, desc=subject.label, unit="batch", leave=False),
        layers=options.layers,
        reduction=options.reduction,
        gradient=options.gradient,
        preprocess=subject.normalization,
        batch_size=options.batch_size,
        about={
            "model": subject.label,
            "weights": subject.weights,
            "source": subject.source,
            "weights_hash": weights_hash(network),
            "mean": subject.normalization.mean,
            "std": subject.normalization.std,
            "data": data.entry.name,
            "split": "validation",
            "segformer_pl": __version__,
            "torch": torch.__version__,
            "device": options.device,
        },
    )


def _write(folder: Path, subjects: list[Subject], results: list[ERF]) -> None:
    rows = {_heading(subject): result for subject, result in zip(subjects, results)}
    first = results[0]
    height, width = first.settings["image_size"]
    title = (
        f"mean over {first.num_images} validation images of {first.about['data']}, "
        f"{height}x{width} pixels; {describe_settings(first.settings)}"
    )
    plots = {"erf": plot_erf, "erf_profile": plot_radial_profiles, "erf_area": plot_area_ratios}
    files = []
    for name, plot in plots.items():
        files += _save(plot(rows, title), folder / name)
    if len(results) > 1:
        labels = (subjects[0].label, subjects[1].label)
        figure = plot_difference(results[0], results[1], labels, title)
        files += _save(figure, folder / "erf_difference")
    for name, result in zip(("erf", "against"), results):
        numbers = result.numbers()
        files += result.save(folder / name, numbers)
        sys.stdout.write(_table(result, numbers))
        for reason, ids in {
            "left out, value or gradient not finite": result.not_finite,
            "left out, no such unit": result.without_units,
        }.items():
            if ids:
                sys.stdout.write(f"{reason}: {counted(len(ids), 'image')}: {', '.join(ids)}\n")
    sys.stdout.write("written: " + ", ".join(str(file) for file in files) + "\n")


def _heading(subject: Subject) -> str:
    return f"{subject.label} ({subject.weights})"


def _write_explorer(
    file: Path, subjects: list[Subject], data: StreamingSegmentationData, options: Namespace
) -> None:
    """Write the page of the first image that was measured."""
    batch = next(image_batches(data, options.num_images, options.size))
    image = batch["image"][0]
    explorations = {
        _heading(subject): explore(
            subject.network,
            image,
            layers=options.layers,
            reduction=options.reduction,
            gradient=options.gradient,
            preprocess=subject.normalization,
            progress=f"{subject.label}, explorer",
        )
        for subject in subjects
    }
    write_explorer(file, image[:3], batch["id"][0], explorations)
    sys.stdout.write(f"written: {file}\n")


def _save(figure: Figure, path: Path) -> list[Path]:
    files = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for file in files:
        with atomic_write(file) as stream:
            figure.savefig(stream, format=file.suffix[1:], dpi=DPI)
    return files


def _table(result: ERF, numbers: dict[str, dict[str, Any]]) -> str:
    """Return the numbers of each layer as a table, with 95 % confidence intervals over images."""
    about, size = result.about, result.settings["image_size"]
    lines = [
        f"{about['model']} ({about['weights']}), {result.num_images} "
        f"{'image' if result.num_images == 1 else 'images'} of {size[0]}x{size[1]} pixels, "
        + ("[95 % CI over images]" if result.num_images > 1 else "no intervals"),
        f"{'layer':<10}{'radius of 50 % (px)':>24}{'radius of 95 % (px)':>24}"
        f"{'area of 50 % (% of image)':>26}{'share in 16 px (%)':>24}",
    ]
    for name, row in numbers.items():
        cells = [
            (row["radius_50"], 1),
            (row["radius_95"], 1),
            (row["area_smallest_50"], 100),
            (row["center_share_16"], 100),
        ]
        texts = [
            f"{factor * value:.3g}"
            + (f" [{factor * low:.3g}, {factor * high:.3g}]" if result.num_images > 1 else "")
            for (value, low, high), factor in cells
        ]
        widths = (24, 24, 26, 24)
        lines.append(f"{name:<10}" + "".join(f"{t:>{w}}" for t, w in zip(texts, widths)))
    filling = [n for n, row in numbers.items() if 2 * row["radius_95"][0] > min(size)]
    if filling:
        lines.append(
            f"the discs that hold 95 % of the ERF of {', '.join(filling)} are wider than the "
            "image, whose border cuts the ERF off: to compare these layers, measure on larger "
            "images (--size; RepLKNet: 1024 1024)"
        )
    return "\n".join(lines) + "\n"
