"""Comparison of a checkpoint with the settings that it is used with."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from segformer_pl.checkpoints.facts import check_facts
from segformer_pl.checkpoints.networks import function_arguments
from segformer_pl.checkpoints.training_state import check_resumable
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.label_mapping import check_labels
from segformer_pl.errors import UserError


def check_settings(
    checkpoint: Mapping[str, Any],
    ckpt_path: str,
    option: str,
    model: dict[str, Any],
    data: Mapping[str, Any],
    is_fit: bool,
) -> None:
    """Refuse settings that contradict a checkpoint, and log those that differ from the checkpoint.

    Args:
        checkpoint: Content of the checkpoint.
        ckpt_path: File of the checkpoint, for messages.
        option: Option that gave the checkpoint, for messages.
        model: Arguments of the task as plain data.
        data: Arguments of the data module as plain data.
        is_fit: Whether the training is resumed; otherwise the network is evaluated.

    Raises:
        UserError: Network, labels, normalisation or parameter groups of the optimiser differ from
            those of the checkpoint, or it holds weights alone and training is to be resumed.
    """
    if is_fit:
        check_resumable(checkpoint, f"{option}: {ckpt_path!r}")
    current = dict(_leaves(model))
    stored = dict(_leaves(checkpoint.get("hyper_parameters", {})))
    network = "network.class_path"
    if stored.get(network, current[network]) != current[network]:
        raise UserError(
            f"{option}: {ckpt_path!r} contains a {stored[network]}, but model.network is a "
            f"{current[network]}; make them agree"
        )
    hyper_parameters = checkpoint.get("hyper_parameters", {})
    name = f"{option}: {ckpt_path!r}"
    normalization = (current["image_mean"], current["image_std"])
    check_facts(hyper_parameters, name, current["class_names"], normalization)
    entry = find_dataset(data["dataset"])
    data_state = checkpoint.get(StreamingSegmentationData.__name__, {})
    if data_state.get("dataset") == entry.name:
        check_labels(data_state, entry.name, entry.labels)
    if "network" in hyper_parameters:
        _check_network_arguments(ckpt_path, option, model["network"], hyper_parameters["network"])
    # With layer_decay < 1, the optimiser has one parameter group for each layer.
    has_layer_groups = [settings.get("layer_decay", 1) < 1 for settings in (current, stored)]
    if is_fit and has_layer_groups[0] != has_layer_groups[1]:
        raise UserError(
            f"model.layer_decay is {current['layer_decay']} here and was "
            f"{stored.get('layer_decay', 1)} in {ckpt_path!r}, but the optimiser's state for "
            "1 does not fit that for less than 1; start a new run with --model.weights"
        )
    # These parts are optional, so a key may be missing on one side.
    optional = ("network.", "loss.", "inference.")
    parts = {key for key in current.keys() | stored.keys() if key.startswith(optional)}
    for key in sorted((current.keys() & stored.keys()) | parts):
        if current.get(key) == stored.get(key):
            continue
        if is_fit or key.startswith(("network.", "inference.")):
            now, then = (settings.get(key, "not given") for settings in (current, stored))
            rank_zero_info(
                f"model.{key} is {now} here and was {then} in {ckpt_path}: the value here is used"
            )


def _check_network_arguments(
    ckpt_path: str, option: str, current: dict[str, Any], stored: dict[str, Any]
) -> None:
    """Raise UserError if the network was trained with other arguments.

    Not every argument changes the shapes of the parameters, so loading the weights does not detect
    all differences.
    """
    now_all = function_arguments(current, "model.network")
    then_all = function_arguments(stored, f"{option}: {ckpt_path!r}")
    if now_all is None or then_all is None:  # a network of the user's: compare the settings as text
        free = ("drop_path_rate", "dropout", "num_classes")
        now_all, then_all = (
            {
                key.replace("init_args.", ""): value
                for key, value in _leaves(spec)
                if not key.endswith(free) and value is not None
            }
            for spec in (current, stored)
        )
    for key in sorted(now_all.keys() | then_all.keys()):
        now, then = (_as_list(values.get(key, "not given")) for values in (now_all, then_all))
        if now != then:
            raise UserError(
                f"{option}: model.network.{key} is {now} here and was {then} in {ckpt_path!r}; "
                "make them agree, or load the weights into another network with --model.weights"
            )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the leaves of nested dicts with dotted keys: {"a": {"b": 1}} gives ("a.b", 1)."""
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), list(tree) if isinstance(tree, tuple) else tree
