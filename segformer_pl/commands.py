"""The project's own commands, those that do not train: ``profile`` and ``convert``."""

import inspect
import json
import sys
from collections.abc import Callable
from typing import Any, NoReturn

import torch
from lightning.pytorch.cli import LightningArgumentParser

from segformer_pl import models
from segformer_pl.analysis.complexity import as_dict, complexity, measure_latency, table
from segformer_pl.data import DataError
from segformer_pl.models.checkpoints import export_weights, load_network, read_weights
from segformer_pl.models.checkpoints.export import LAYOUTS

PROG = "python -m segformer_pl"


class SegformerArgumentParser(LightningArgumentParser):
    """Says what is wrong in one sentence, and lets links reach into a function's arguments."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # With abbreviations, --trainer.max_step would pass for trainer.max_steps.
        super().__init__(*args, allow_abbrev=False, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        if not self.exit_on_error:
            super().error(message, ex)
        cause: BaseException | None = ex
        while cause is not None and not isinstance(cause, DataError):
            cause = cause.__cause__ or cause.__context__
        sentence = " ".join(line.strip() for line in str(cause or message).splitlines())
        sys.stderr.write(f"error: {sentence} (what is accepted: {self.prog} --help)\n")
        self.exit(2)

    # jsonargparse 4.53 passes linked_targets on to this method as it does to
    # add_class_arguments, but only the latter takes it.
    def add_function_arguments(
        self, *args: Any, linked_targets: set[str] | None = None, **kwargs: Any
    ) -> list[str]:
        return super().add_function_arguments(*args, **kwargs)


def profile(arguments: list[str]) -> None:
    """``profile MODEL``: parameters, multiply-adds, activation memory and latency of a network."""
    segmenters = [
        name
        for name in models.__all__
        if inspect.isfunction(build := getattr(models, name))
        and "num_classes" in inspect.signature(build).parameters
    ]
    parser = SegformerArgumentParser(
        prog=f"{PROG} profile",
        description="Parameters, multiply-adds (executed, and by the paper's recipe), activation "
        "memory and latency of a network, in total and part by part. After MODEL, every argument "
        "of the model can be given too, such as --sr_ratios [4,4,2,1]; profile MODEL --help lists "
        "them.",
    )
    parser.add_argument("model", choices=segmenters, help="network to profile")
    parser.add_argument(
        "--size",
        type=int,
        nargs=2,
        default=[512, 512],
        metavar=("H", "W"),
        help="picture in pixels",
    )
    parser.add_argument("--num-classes", type=int, default=150, help="the paper's tables have 150")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    parser.add_argument(
        "--device",
        choices=["cpu", "cuda"],
        default="cuda" if torch.cuda.is_available() else "cpu",
        help="where latency is measured",
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        default="float32",
        help="of weights and picture while latency is measured",
    )
    build = None
    if arguments and arguments[0] in segmenters:
        build = getattr(models, arguments[0])
        parser.add_function_arguments(build, skip={"num_classes"})
    options = parser.instantiate_classes(parser.parse_args(arguments)).as_dict()
    if build is None:
        parser.error("give MODEL first, then its options")
    name, (height, width), in_json = options.pop("model"), options.pop("size"), options.pop("json")
    device, dtype = options.pop("device"), getattr(torch, options.pop("dtype"))
    if min(height, width, options["num_classes"]) < 1:
        raise ValueError("--size and --num-classes: give integers of at least 1")
    if device == "cuda" and not torch.cuda.is_available():
        raise ValueError("--device cuda: this machine has no CUDA device that torch can use")
    network = build(**options)
    cost = complexity(network, height, width, options["in_channels"])
    sys.stderr.write("measuring latency ...\n")
    latency = measure_latency(network, height, width, options["in_channels"], device, dtype)
    text = json.dumps(as_dict(cost, latency), indent=2) if in_json else table(name, cost, latency)
    sys.stdout.write(text + "\n")


def convert(arguments: list[str]) -> None:
    """``convert SOURCE DEST --to LAYOUT``: weights of any known layout into another."""
    parser = SegformerArgumentParser(
        prog=f"{PROG} convert",
        description="Write weights of any known layout in another one.",
    )
    parser.add_argument(
        "source",
        help="file (.pth, .bin, .safetensors, Lightning .ckpt), folder written by save_pretrained, "
        "or hub name owner/name@commit",
    )
    parser.add_argument(
        "destination",
        help="folder for huggingface and smp, .pth file for nvlabs, .safetensors file for native; "
        "must not exist",
    )
    parser.add_argument("--to", choices=list(LAYOUTS), required=True, help="whose layout")
    options = parser.parse_args(arguments)
    weights = read_weights(options.source)
    network, report = load_network(weights)
    remarks = export_weights(
        network, options.destination, options.to, weights.task, weights.preprocessor
    )
    lines = [str(report), f"written to '{options.destination}': layout {options.to}", *remarks]
    sys.stdout.write("\n  ".join(lines) + "\n")


COMMANDS: dict[str, Callable[[list[str]], None]] = {"profile": profile, "convert": convert}
