"""Models of timm by their names."""

import difflib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from segformer_pl.errors import UserError


def load_timm() -> Any:
    """Import timm. That takes longer than the import of torch, and SegFormer does without it."""
    with torch.device("cpu"):  # on the meta device, constants of its modules would have no values
        import timm
        import timm.models
    return timm


@contextmanager
def on_meta() -> Iterator[None]:
    """Build networks on the meta device, for their shapes and counts alone.

    Tensors there have no values, but initialising them takes most of the time, so it is skipped.
    """
    with torch.device("meta"), SkipInitialization():
        yield


class SkipInitialization(TorchFunctionMode):
    """Context in which functions that change the values of a parameter do nothing."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: Sequence[Any] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        target = args[0] if args else kwargs.get("tensor")
        name = getattr(func, "__name__", "")
        # In torch, names of functions that change their argument end in an underscore.
        changes_values = name.endswith("_") and not name.startswith("_") and name not in _FLAGS
        if changes_values and isinstance(target, nn.Parameter):
            return target
        return func(*args, **kwargs)


_FLAGS = ("requires_grad_", "detach_")


def create_timm_model(
    name: str,
    pretrained: bool,
    arguments: Mapping[str, Any],
    family: str = "*",
    **fixed: Any,
) -> Any:
    """Build a model of timm.

    Args:
        name: Name of the model, with or without the tag of its weights.
        pretrained: Whether its weights are downloaded. On the meta device there are no values, so
            they are not.
        arguments: Arguments of the model that the user can change; messages name them.
        family: Pattern of the names that are suggested for a name that does not exist.
        fixed: Further arguments of the model.

    Raises:
        UserError: There is no such model, it does not take these arguments, or its weights cannot
            be loaded.
    """
    timm = load_timm()
    if not timm.is_model(name):
        close = difflib.get_close_matches(name.split(".")[0], timm.list_models(family), 3, 0.6)
        advice = f"did you mean {' or '.join(close)}?" if close else "see timm.list_models()"
        raise UserError(f"timm {timm.__version__} has no model {name!r}; {advice}")
    pretrained = pretrained and torch.get_default_device().type != "meta"
    try:
        return timm.create_model(name, pretrained=pretrained, **fixed, **arguments)
    except Exception as error:  # raised by the model, the HTTP library, the hub or the cache
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        reason = f"{type(error).__name__}: {lines[0] if lines else ''}"[:160]
        if pretrained:
            raise UserError(
                f"the weights of {name} cannot be loaded ({reason}); without network give "
                "pretrained false and a file of weights by --model.encoder_weights"
            ) from error
        given = ", ".join(f"{key} {value}" for key, value in arguments.items())
        raise UserError(
            f"timm cannot build {name}{' with ' if given else ''}{given} ({reason}); change the "
            "arguments or choose another model"
        ) from error
