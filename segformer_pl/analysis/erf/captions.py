"""Texts of figures: the settings of a measurement, and where results differ in them."""

from collections.abc import Mapping
from typing import Any

from segformer_pl.analysis.erf.result import ERF
from segformer_pl.errors import UserError

UNITS = {"center": "middle unit"}
REDUCTIONS = {
    "relu": "sum of positive channels",
    "l1": "sum of channel magnitudes",
    "sum": "sum of channels",
    "random": "random projection of channels",
}
GRADIENTS = {
    "abs": "absolute gradient",
    "relu": "positive part of the gradient",
    "signed": "signed gradient",
}


def describe_settings(settings: Mapping[str, Any]) -> str:
    """Return unit, reduction and gradient of :attr:`ERF.settings`, for a title."""
    units, reduction = settings.get("units", "center"), settings.get("reduction", "relu")
    if isinstance(units, str):
        unit = UNITS.get(units, units)
    elif len(units) == 1:
        unit = "unit at row {}, column {}".format(*units[0])
    else:
        unit = f"{len(units)} units"
    return ", ".join(
        (
            unit,
            REDUCTIONS.get(reduction, f"channel {reduction}"),
            GRADIENTS[settings.get("gradient", "abs")],
        )
    )


def label_rows(results: ERF | Mapping[str, ERF], caller: str) -> dict[str, ERF]:
    """Return results by the heading of their row.

    A heading names the settings and the number of images where the results differ in them.

    Args:
        results: One result, or several by name.
        caller: Name of the function for which this is done, for the message.

    Raises:
        UserError: There is no result, or none has a layer.
    """
    rows = {"": results} if isinstance(results, ERF) else dict(results)
    if not any(erf.layers for erf in rows.values()):
        raise UserError(f"{caller}: there is no receptive field to draw")
    facts = {label: erf.settings | {"images": erf.num_images} for label, erf in rows.items()}
    keys = dict.fromkeys(key for fact in facts.values() for key in fact)
    different = [
        key
        for key in keys
        if any(f.get(key) != g.get(key) for f in facts.values() for g in facts.values())
    ]
    if not different:
        return rows
    texts = {
        label: "; ".join(f"{key.replace('_', ' ')}: {_text(fact.get(key))}" for key in different)
        for label, fact in facts.items()
    }
    return {f"{label} ({texts[label]})": erf for label, erf in rows.items()}


def _text(value: Any) -> str:
    is_size = isinstance(value, list) and all(isinstance(side, int) for side in value)
    return "x".join(map(str, value)) if is_size else str(value)
