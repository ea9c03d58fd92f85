"""A trained network with other arguments and the same weights, for inference without training."""

from collections.abc import Mapping
from typing import Any

from segformer_pl.checkpoints.networks import build
from segformer_pl.checkpoints.sources import Weights
from segformer_pl.checkpoints.transplant import transplant
from segformer_pl.errors import UserError, brief


def changed_network(trained: Any, weights: Weights, changes: Mapping[str, Any], name: str) -> Any:
    """Build a trained network anew with some arguments changed, and transplant its weights.

    Args:
        trained: The network as it was trained.
        weights: The weights that it was built from.
        changes: Arguments of the network, or of its encoder, to change.
        name: Name of the changes, for messages.

    Raises:
        UserError: A change names no argument, has an impossible value, or leaves a part of the
            network untrained.
    """
    spec = trained.spec()
    for argument, value in changes.items():
        if not _replace(spec, argument, value):
            raise UserError(
                f"{name}: a {type(trained).__name__} has no argument {argument!r}; correct the name"
            )
    try:
        network: Any = build(spec, name)
    except UserError as error:
        cause = error.__cause__
        text = brief(cause) if isinstance(cause, Exception) else str(error)
        raise UserError(f"{name}: {text}") from error
    network.to(next(trained.parameters()).dtype)
    try:
        report = transplant(network, weights)
    except UserError as error:
        raise UserError(f"{name}: {error}") from error
    if report.untrained:
        reason = report.untrained[0].rstrip(".")
        raise UserError(
            f"{name} needs training, so it cannot be evaluated at test time: "
            f"{reason[0].lower()}{reason[1:]}; leave this argument as it was trained"
        )
    return network


def _replace(spec: dict[str, Any], name: str, value: Any) -> bool:
    """Replace an argument of a network or of one inside it; return whether there is one."""
    arguments = spec["init_args"]
    if name in arguments:
        arguments[name] = value
        return True
    inner = [a for a in arguments.values() if isinstance(a, dict) and "init_args" in a]
    return any(_replace(one, name, value) for one in inner)
