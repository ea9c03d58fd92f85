"""What a checkpoint says of itself, compared with the settings that it is to be used with."""

from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_info

from segformer_pl.checkpoints.facts import check_facts
from segformer_pl.checkpoints.networks import function_arguments
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.label_mapping import check_labels
from segformer_pl.errors import UserError


def check_settings(
    checkpoint: Mapping[str, Any],
    ckpt_path: str,
    model: dict[str, Any],
    data: Mapping[str, Any],
    is_fit: bool,
) -> None:
    """Refuse settings that contradict a checkpoint, and name those that differ from its own.

    Args:
        checkpoint: The checkpoint.
        ckpt_path: Its file, for messages.
        model: The task's arguments as plain data.
        data: The data module's arguments as plain data.
        is_fit: Whether the training goes on, rather than the network being evaluated.

    Raises:
        UserError: The network, the labels, the normalisation or the groups of the optimiser are
            others than those of the checkpoint.
    """
    here = dict(_leaves(model))
    there = dict(_leaves(checkpoint.get("hyper_parameters", {})))
    network = "network.class_path"
    if there.get(network, here[network]) != here[network]:
        raise UserError(
            f"ckpt_path: {ckpt_path!r} holds a {there[network]}, but model.network is a "
            f"{here[network]}; make them agree"
        )
    stated = checkpoint.get("hyper_parameters", {})
    name = f"ckpt_path: {ckpt_path!r}"
    images = (here["image_mean"], here["image_std"])
    check_facts(stated, name, here["class_names"], images)
    entry = find_dataset(data["dataset"])
    trained = checkpoint.get(StreamingSegmentationData.__name__, {})
    if trained.get("dataset") == entry.name:
        check_labels(trained, entry.name, entry.labels)
    if "network" in stated:
        _check_network_arguments(ckpt_path, model["network"], stated["network"])
    grouped = [settings.get("layer_decay", 1) < 1 for settings in (here, there)]
    if is_fit and grouped[0] != grouped[1]:
        raise UserError(
            f"model.layer_decay is {here['layer_decay']} here and was "
            f"{there.get('layer_decay', 1)} in {ckpt_path!r}: between 1 and less, the "
            "optimiser's state does not fit; start a new run with --model.weights"
        )
    # Parts that may be left out, so that one of the two may not have the key at all.
    optional = ("network.", "loss.", "inference.")
    parts = {key for key in here.keys() | there.keys() if key.startswith(optional)}
    for key in sorted((here.keys() & there.keys()) | parts):
        if here.get(key) == there.get(key):
            continue
        if is_fit or key.startswith(("network.", "inference.")):
            now, then = (of.get(key, "not given") for of in (here, there))
            rank_zero_info(
                f"model.{key} is {now} here and was {then} in {ckpt_path}: what is here is used"
            )


def _check_network_arguments(ckpt_path: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    """Raise UserError if the network was trained with arguments that shapes may not tell apart."""
    ours = function_arguments(here, "model.network")
    theirs = function_arguments(there, f"ckpt_path: {ckpt_path!r}")
    if ours is None or theirs is None:  # a network of the user's, whose arguments are only texts
        free = ("drop_path_rate", "dropout", "num_classes")
        ours, theirs = (
            {
                key.replace("init_args.", ""): value
                for key, value in _leaves(spec)
                if not key.endswith(free) and value is not None
            }
            for spec in (here, there)
        )
    for key in sorted(ours.keys() | theirs.keys()):
        now, then = (_as_list(of.get(key, "not given")) for of in (ours, theirs))
        if now != then:
            raise UserError(
                f"ckpt_path: model.network.{key} is {now} here and was {then} in {ckpt_path!r}; "
                "make them agree, or give the weights to another network with --model.weights"
            )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), list(tree) if isinstance(tree, tuple) else tree
