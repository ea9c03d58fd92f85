"""Measure how far orderings of networks by their ERF depend on its definition and the image size.

    python experiments/erf_definitions/erf_definitions.py NETWORK [NETWORK ...]
        [--layers NAME ...] [--sizes N ...] [--num_images N] [--definitions NAME ...]
        [--data.dataset NAME] [--data.path PATH] [--resamples N] [--seed N] [--batch_size N]
        [--device cpu|cuda] [--threads N] [--output FOLDER]

Question: which claims about receptive fields survive a change of the definition (RepLKNet's,
openerf 0.6.1's, the magnitude of gradients, their energy), of the number taken from the map, and of
the image size? Hardware: any; the time is that of two backward passes for every network, image,
size and layer, and of the resampling (about as much). Expectation: orderings by RepLKNet's
definition, by magnitude and by energy agree (tau > 0.8 at one number and size); openerf's differs,
most of all behind a LayerNorm; small images change the order more than any definition
(RepLKNet's issue 25 at 224 pixels).

A NETWORK is the checkpoint of a run, the name of a model (random weights), or a network of timm as
timm:NAME, timm:NAME:pretrained or timm:NAME:FILE; LABEL=NETWORK names its row. The images are
validation images of --data.dataset, or else of the run of the first checkpoint, resized to squares.

Each network is measured once for every size. Its numbers, from all images and from every
resampling, are stored in FOLDER/networks, and a second call continues where the first one stopped.
The maps of single images are kept in a scratch file of FOLDER until then. The results:

    numbers.csv             every number with its interval and rank
    correlations.csv        Kendall's tau-b and Spearman's rho of pairs of orderings that differ in
                            one thing (definition, size or number), or that publications use
    correlations_all.csv.gz the same of every pair
    table.md                summary
    definitions_LAYER.png   tau of every two definitions and sizes, at one number
    protocols_LAYER.png     tau of every two protocols (definition with its own number) and sizes
    ranks_LAYER.png         ranks of the networks by protocol and size

Intervals are over images (bootstrap, all networks and orderings with the same samples); networks
and trainings are fixed. An interval of tau below 1 is not by itself evidence of different orders:
noise alone makes tau smaller. Evidence is a pair of networks in opposite order that both orderings
resolve; the table counts these. The tau between two halves of the images, on the diagonal of the
figures, says whether there are enough images: below about 0.5 the intervals are too narrow.
"""

import argparse
import json
import re
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from orderings import Agreement, Array, Ordering, image_weights
from results import write_results
from tqdm import tqdm

from segformer_pl import __version__
from segformer_pl.analysis.erf import weights_hash
from segformer_pl.analysis.erf.definitions import (
    DEFINITIONS,
    NUMBERS,
    gradient_maps,
    weighted_maps,
)
from segformer_pl.atomic import atomic_write, make_writable_folder
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.checkpoints.run_data import load_data
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.erf import TIMM, Subject, against, image_batches
from segformer_pl.commands.options.networks import SEGMENTERS
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.errors import UserError

HALVES = 25  # pairs of random halves of the images
VALUES_PER_BLOCK = 2**22  # of the maps of all resamplings, which bounds the memory


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n")[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("networks", nargs="+", metavar="NETWORK", help="at least three networks")
    parser.add_argument("--layers", nargs="+", default=["stage4", "head"], help="layers to measure")
    parser.add_argument(
        "--sizes", nargs="+", type=int, default=[256, 512, 1024], help="sides of the images, px"
    )
    parser.add_argument("--num_images", type=int, default=50, help="number of validation images")
    parser.add_argument(
        "--definitions", nargs="+", default=list(DEFINITIONS), choices=list(DEFINITIONS)
    )
    parser.add_argument("--data.dataset", dest="dataset", help="data set of the catalogue")
    parser.add_argument("--data.path", dest="path", help="folder of the data set")
    parser.add_argument("--resamples", type=int, default=500, help="bootstrap samples")
    parser.add_argument("--seed", type=int, default=0, help="seed of the resampling")
    parser.add_argument("--batch_size", type=int, help="images per pass; default: 512x512 pixels")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", default="erf_definitions", help="folder of the results")
    return parser.parse_args(arguments)


def split_label(network: str) -> tuple[str, str]:
    """Return label and source of a network given as NETWORK or LABEL=NETWORK.

    The default label of a checkpoint is the name of its run folder without the hash.
    """
    if "=" in network:
        label, _, source = network.partition("=")
        return label, source
    path = Path(network)
    if path.parent.name == "checkpoints":
        return re.sub(r"\.[0-9a-f]{8}$", "", path.parent.parent.name), network
    return network.removeprefix(TIMM), network


def open_data(options: argparse.Namespace, networks: dict[str, str]) -> StreamingSegmentationData:
    """Return the data set named in the options, or that of the first checkpoint."""
    if options.dataset is not None:
        return StreamingSegmentationData(dataset=options.dataset, path=options.path, num_workers=0)
    for source in networks.values():
        if source not in SEGMENTERS and not source.startswith(TIMM):
            return load_data(RunCheckpoint.read(source), path=options.path, num_workers=0)
    raise UserError("give --data.dataset, or the checkpoint of a run, which determines the data")


def describe(options: argparse.Namespace, size: int, ids: list[str], subject: Subject) -> str:
    """Return everything that the stored numbers of a network depend on, as JSON."""
    description = {
        "format": 1,
        "weights_hash": weights_hash(subject.network),
        "normalization": [list(subject.normalization.mean), list(subject.normalization.std)],
        "size": size,
        "layers": options.layers,
        "definitions": {name: vars(DEFINITIONS[name]) for name in options.definitions},
        "numbers": {name: vars(number) for name, number in NUMBERS.items()},
        "image_ids": ids,
        "resamples": options.resamples,
        "halves": HALVES,
        "seed": options.seed,
        "segformer_pl": __version__,
    }
    return json.dumps(description)


def measure(
    subject: Subject, batches: Any, weights: Array, options: argparse.Namespace, scratch: Path
) -> Array:
    """Return the numbers (layers, definitions, numbers, R) of a network at one size.

    The maps of all images are written to ``scratch``, a file for each layer and definition, and
    averaged block by block. Definitions that share maps share the file.
    """
    files: dict[tuple[str, str], np.memmap] = {}
    positions = {}
    wanted = {name: DEFINITIONS[name] for name in options.definitions}
    done = 0
    for ids, layers in gradient_maps(
        subject.network,
        batches,
        options.layers,
        wanted,
        preprocess=subject.normalization,
        batch_size=options.batch_size,
    ):
        for layer, (position, maps) in layers.items():
            positions[layer] = position
            written: dict[int, np.memmap] = {}
            for name, tensor in maps.items():
                shape = (weights.shape[1], *tensor.shape[1:])
                if id(tensor) in written:
                    files[layer, name] = written[id(tensor)]
                    continue
                if (layer, name) not in files:
                    path = scratch / f"{len(files)}.maps"
                    files[layer, name] = np.memmap(path, np.float32, "w+", shape=shape)
                files[layer, name][done : done + len(ids)] = tensor.cpu().numpy()
                written[id(tensor)] = files[layer, name]
        done += len(ids)
    if done != weights.shape[1]:
        raise UserError(f"{subject.label}: {done} of {weights.shape[1]} images could be read")
    result = np.empty((len(options.layers), len(wanted), len(NUMBERS), len(weights)))
    for (layer, name), maps_ in files.items():
        block = max(VALUES_PER_BLOCK // maps_[0].size, 1)
        place = result[options.layers.index(layer), options.definitions.index(name)]
        for start in range(0, len(weights), block):
            means = weighted_maps(maps_, weights[start : start + block], wanted[name])
            for row, mean in enumerate(means, start):
                place[:, row] = [number.of(mean, positions[layer]) for number in NUMBERS.values()]
    return result


def stored(file: Path, description: str) -> Array | None:
    """Return the stored numbers of a network, or None if there are none.

    Raises:
        UserError: They were measured with other settings or other weights.
    """
    if not file.is_file():
        return None
    with np.load(file, allow_pickle=False) as content:
        if str(content["description"]) != description:
            raise UserError(
                f"'{file}' was measured with other settings, weights or images; give another "
                "--output, or delete it"
            )
        return np.asarray(content["numbers"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure, compare and write the results.

    Raises:
        UserError: An argument, a network or the data cannot be used.
    """
    options = parse_arguments(arguments)
    torch.set_num_threads(options.threads)
    resolve_device(options.device)
    labelled = [split_label(network) for network in options.networks]
    networks = dict(labelled)
    if len(networks) < max(len(labelled), 3):
        raise UserError(
            "give at least three networks with different labels (LABEL=NETWORK); they are "
            + ", ".join(label for label, _ in labelled)
        )
    if options.num_images < 4:
        raise UserError(f"--num_images {options.num_images}: halves of less than 4 have no order")
    if min(options.sizes) < 1 or len(set(options.sizes)) < len(options.sizes):
        raise UserError("--sizes: give different sides of at least 1 pixel")
    folder = Path(options.output)
    make_writable_folder(folder, "--output")
    make_writable_folder(folder / "networks", "--output")
    data = open_data(options, networks)
    ids = [
        name for batch in image_batches(data, options.num_images, (32, 32)) for name in batch["id"]
    ]
    weights = image_weights(len(ids), options.resamples, HALVES, options.seed)
    numbers = np.empty(
        (
            *(len(networks), len(options.sizes), len(options.layers)),
            *(len(options.definitions), len(NUMBERS), len(weights)),
        )
    )
    progress = tqdm(total=len(networks) * len(options.sizes), unit="measurement")
    for row, (label, source) in enumerate(networks.items()):
        subject = against(source, data)
        subject.network.to(options.device)
        for column, size in enumerate(options.sizes):
            name = re.sub(r"[^\w.+-]", "_", label)
            file = folder / "networks" / f"{name}.{size}.npz"
            description = describe(options, size, ids, subject)
            values = stored(file, description)
            if values is None:
                batches = image_batches(data, options.num_images, (size, size))
                with tempfile.TemporaryDirectory(dir=folder) as scratch:
                    values = measure(subject, batches, weights, options, Path(scratch))
                with atomic_write(file) as stream:
                    np.savez_compressed(stream, numbers=values, description=description)
            numbers[row, column] = values
            progress.update()
    progress.close()
    orderings = [
        Ordering(size, definition, number)
        for size in options.sizes
        for definition in options.definitions
        for number in NUMBERS
    ]
    agreements = {}
    for index, layer in enumerate(options.layers):
        # (networks, sizes, definitions, numbers, R) -> (R, orderings, networks)
        rows = numbers[:, :, index].reshape(len(networks), len(orderings), -1).transpose(2, 1, 0)
        if not np.isfinite(rows[0]).all():
            o, m = np.argwhere(~np.isfinite(rows[0]))[0]
            raise UserError(
                f"{list(networks)[m]}, layer {layer!r}: the map of definition "
                f"{orderings[o].definition!r} is zero at size {orderings[o].size}"
            )
        agreements[layer] = Agreement(orderings, rows, len(ids), options.resamples)
    for path in write_results(folder, agreements, list(networks), len(ids), data.entry.name):
        sys.stdout.write(f"written: {path}\n")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        sys.exit(f"error: {error}")
