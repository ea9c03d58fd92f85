"""``erf``: what each layer of a network really sees."""

import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm.auto import tqdm

from segformer_pl import __version__, models
from segformer_pl.analysis.erf import (
    ERF,
    NoFieldError,
    effective_receptive_field,
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
from segformer_pl.atomic import atomic_write, make_writable_folder
from segformer_pl.checkpoints import load_network, read_weights
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.parser import PROG, SegformerArgumentParser, segmenter_names
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.errors import UserError
from segformer_pl.inference import Predictor
from segformer_pl.inference.predictor import normalization_of
from segformer_pl.normalization import Normalization

DPI = 300
PICTURES_IN_A_BATCH = 8  # as read; the measurement takes them apart as it needs
TIMM = "timm:"


class Subject(NamedTuple):
    """A network to measure; ``label`` names its row, ``weights`` says where they are from,
    ``source`` how it was asked for, ``normalization`` how its images are normalised."""

    network: nn.Module
    label: str
    weights: str
    source: str
    normalization: Normalization = Normalization()


def erf(arguments: list[str]) -> None:
    """``erf``: figures, numbers and maps of effective receptive fields."""
    segmenters = segmenter_names()
    parser = SegformerArgumentParser(
        prog=f"{PROG} erf",
        description="Measure the effective receptive field of the unit in the middle of every "
        "layer (stage 1 to 4 and the head; the paper's Figure 3), averaged over validation "
        "pictures. Writes erf, erf_profile and erf_area as .png and .pdf, the maps and numbers as "
        "erf.npz and erf.json; with --against also erf_difference and the second network's "
        "against.npz and .json.",
    )
    parser.add_argument("--ckpt", help="checkpoint of a run; brings its network and data")
    parser.add_argument(
        "--weights", help="weights of any known layout, in place of --ckpt: file, folder, hub name"
    )
    parser.add_argument(
        "--model", choices=segmenters, help="network with random weights, in place of --ckpt"
    )
    parser.add_argument(
        "--against",
        help="second row: a checkpoint, a model name (random weights), or a network of timm: "
        "timm:NAME (random weights), timm:NAME:pretrained, timm:NAME:FILE",
    )
    parser.add_argument(
        "--data.dataset", help="data set of the catalogue; default the checkpoint's"
    )
    parser.add_argument("--data.path", help="where the data set is stored")
    parser.add_argument("--num_images", type=int, default=100, help="the paper averages over 100")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        metavar=("H", "W"),
        help="resize pictures, bicubic, aspect ignored (RepLKNet: 1024 1024); default their own",
    )
    parser.add_argument("--layers", nargs="+", help="feature maps or modules; default all maps")
    parser.add_argument(
        "--reduction", default="relu", help="relu, l1, sum, random, or a channel's number"
    )
    parser.add_argument("--gradient", default="abs", choices=["abs", "relu"])
    parser.add_argument("--batch_size", type=int, help="pictures in a pass; bounds the memory")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
    )
    parser.add_argument("--output", default="erf", help="folder for the files")
    options = parser.parse_args(arguments)
    given = [key for key in ("ckpt", "weights", "model") if options[key] is not None]
    if len(given) != 1:
        raise UserError("give one of --ckpt, --weights and --model: whose field to measure")
    resolve_device(options.device)
    if options.size is not None and min(options.size) < 1:
        raise UserError("--size: give height and width of at least 1 pixel")
    checkpoint = None if options.ckpt is None else RunCheckpoint.read(options.ckpt)
    data = _data(options, checkpoint)
    if checkpoint is not None:
        subjects = [_trained(checkpoint, options.ckpt)]
    elif options.weights is not None:
        subjects = [subject_from_file(options.weights)]
    else:
        subjects = [_random(options.model, data)]
    if options.against is not None:
        subjects.append(_against(options.against, segmenters, data))
    if options.reduction.isdigit():
        options.reduction = int(options.reduction)
    folder = Path(options.output)
    make_writable_folder(folder, "--output")
    for subject in subjects:
        _try(subject, data, options)
    results = [_measure(subject, data, options, options.num_images) for subject in subjects]
    _write(folder, subjects, results)


def _data(options: Any, checkpoint: RunCheckpoint | None) -> StreamingSegmentationData:
    changes = {"dataset": options.data.dataset, "path": options.data.path, "num_workers": 0}
    if checkpoint is not None:
        if options.data.dataset is not None and options.data.path is None:
            # The run's own path belongs to the run's own data set.
            return StreamingSegmentationData(dataset=options.data.dataset, num_workers=0)
        return load_data(checkpoint, **changes)
    if options.data.dataset is None:
        raise UserError(
            "--data.dataset: say which data set's images to take; --ckpt brings its own"
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


def subject_from_file(source: str) -> Subject:
    """Weights of any layout, which may be those of an encoder alone."""
    weights = read_weights(source)
    network, _ = load_network(weights)
    label = f"{type(network).__name__}, {Path(source).name}"
    return Subject(network.eval(), label, "from a file", source, normalization_of(weights))


def _random(name: str, data: StreamingSegmentationData) -> Subject:
    torch.manual_seed(0)  # the same random weights each time
    network = getattr(models, name)(num_classes=data.entry.labels.num_classes)
    return Subject(network.eval(), name, "random weights", name)


def _against(source: str, segmenters: list[str], data: StreamingSegmentationData) -> Subject:
    if source in segmenters:
        return _random(source, data)
    if not source.startswith(TIMM):
        return _trained(RunCheckpoint.read(source, "--against"), source)
    name, _, weights = source.removeprefix(TIMM).partition(":")
    torch.manual_seed(0)
    network = TimmStages(name, weights or None).eval()
    known = {"": "random weights", "pretrained": "timm's weights"}.get(weights, "from a file")
    normalization = Normalization(network.mean, network.std)
    return Subject(network, f"timm {name}", known, source, normalization)


def _pictures(
    data: StreamingSegmentationData, num_images: int, size: tuple[int, int] | None
) -> Iterator[dict[str, Any]]:
    """Batches of validation pictures spread evenly over the split, for stored order can be by
    class or place; the same ones each time."""
    if num_images < 1:
        raise UserError("--num_images: give an integer of at least 1")
    samples: Any = data.val_dataloader().dataset
    num_rows = samples.order.num_rows
    count = min(num_images, num_rows)
    images: list[Tensor] = []
    names: list[str] = []
    for number in range(count):
        sample = samples[number * num_rows // count]
        if sample["id"] in sample["skipped"]:
            sys.stderr.write(f"skipped: {sample['skipped'][sample['id']]}\n")
            continue
        image = sample["image"][None]
        if size is not None:
            image = F.interpolate(image, tuple(size), mode="bicubic", antialias=True).clamp(0, 1)
        if images and image.shape != images[0].shape:
            raise UserError(
                f"the pictures of {data.entry.name!r} have different sizes and their fields cannot "
                "be averaged; give --size H W"
            )
        images.append(image)
        names.append(sample["id"])
        if len(images) == PICTURES_IN_A_BATCH:
            yield {"image": torch.cat(images), "id": names}
            images, names = images[:0], []
    if images:
        yield {"image": torch.cat(images), "id": names}


def _try(subject: Subject, data: StreamingSegmentationData, options: Any) -> None:
    """One picture, so that a layer that is not there is found before the others are measured."""
    with suppress(NoFieldError):  # of this picture; others may have one
        _measure(subject, data, options, min(options.num_images, 1))


def _measure(
    subject: Subject, data: StreamingSegmentationData, options: Any, num_images: int
) -> ERF:
    network = subject.network.to(options.device)
    pictures = _pictures(data, num_images, options.size)
    return effective_receptive_field(
        network,
        tqdm(pictures, desc=subject.label, unit="batch", leave=False),
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
    rows = {
        f"{subject.label} ({subject.weights})": result for subject, result in zip(subjects, results)
    }
    first = results[0]
    height, width = first.settings["image_size"]
    title = (
        f"mean of {first.num_images} validation pictures of {first.about['data']}, "
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
        for what, names in {
            "value or gradient not finite, left out": result.not_finite,
            "no such unit, left out": result.without_units,
        }.items():
            if names:
                sys.stdout.write(f"{what}: {len(names)} pictures: {', '.join(names)}\n")
    sys.stdout.write("written: " + ", ".join(str(file) for file in files) + "\n")


def _save(figure: Figure, path: Path) -> list[Path]:
    files = [path.with_suffix(suffix) for suffix in (".png", ".pdf")]
    for file in files:
        with atomic_write(file) as stream:
            figure.savefig(stream, format=file.suffix[1:], dpi=DPI)
    return files


def _table(result: ERF, numbers: dict[str, dict[str, Any]]) -> str:
    """Numbers with their 95 % intervals over pictures, as text."""
    about, size = result.about, result.settings["image_size"]
    lines = [
        f"{about['model']} ({about['weights']}), {result.num_images} "
        f"{'picture' if result.num_images == 1 else 'pictures'} of "
        f"{size[0]}x{size[1]} pixels, "
        + ("95 % intervals" if result.num_images > 1 else "no intervals"),
        f"{'layer':<10}{'radius 50 %, px':>24}{'radius 95 %, px':>24}{'area 50 %, %':>26}"
        f"{'within 16 px, %':>24}",
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
            f"the discs with 95 % of the fields of {', '.join(filling)} are wider than the "
            "picture, whose border cuts fields off: to compare them, measure on larger pictures "
            "(--size; RepLKNet takes 1024 1024)"
        )
    return "\n".join(lines) + "\n"
