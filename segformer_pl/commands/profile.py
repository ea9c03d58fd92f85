"""``profile MODEL``: parameters, multiply-adds, memory and latency of a network."""

import json
import sys

import torch
from jsonargparse import Namespace

from segformer_pl.analysis.complexity import as_dict, complexity, measure_latency, table
from segformer_pl.commands.device import resolve_device
from segformer_pl.commands.networks import build_network
from segformer_pl.errors import UserError


def run(options: Namespace) -> None:
    """Run ``profile MODEL`` and print parameters, multiply-adds, activation memory and latency.

    Args:
        options: Options as ``options/profile.py`` parses them.

    Raises:
        UserError: There is no such network, or an argument does not fit it.
    """
    name, (height, width) = options.model, options.size
    if min(height, width, options.num_classes) < 1:
        raise UserError("--size and --num_classes: give integers of at least 1")
    device, dtype = resolve_device(options.device), getattr(torch, options.dtype)
    arguments = options.network | {"num_classes": options.num_classes}
    network = build_network(name, options.build, **arguments)
    cost = complexity(network, height, width)
    sys.stderr.write("measuring latency ...\n")
    latency = measure_latency(network, height, width, device, dtype)
    text = (
        json.dumps(as_dict(cost, latency), indent=2) if options.json else table(name, cost, latency)
    )
    sys.stdout.write(text + "\n")
