"""What figures say of how receptive fields were measured."""

from collections.abc import Mapping
from typing import Any

from segformer_pl.analysis.erf.result import ERF

UNITS = {"center": "unit in the middle"}
REDUCTIONS = {
    "relu": "sum of its positive channels",
    "l1": "sum of its channels' magnitudes",
    "sum": "sum of its channels",
    "random": "random projection of its channels",
}
GRADIENTS = {
    "abs": "magnitude of the gradient",
    "relu": "positive part of the gradient",
    "signed": "signed gradient",
}


def recipe_in_words(recipe: Mapping[str, Any]) -> str:
    """Unit, reduction and gradient of an :attr:`ERF.recipe`, for titles."""
    units, reduction = recipe.get("units", "center"), recipe.get("reduction", "relu")
    if isinstance(units, str):
        unit = UNITS.get(units, units)
    elif len(units) == 1:
        unit = "unit at row {}, column {}".format(*units[0])
    else:
        unit = f"{len(units)} units"
    return ", ".join(
        (
            unit,
            REDUCTIONS.get(reduction, f"its channel {reduction}"),
            GRADIENTS[recipe.get("gradient", "abs")],
        )
    )


def rows_of(fields: ERF | Mapping[str, ERF], who: str) -> dict[str, ERF]:
    """By heading, which says where the results were not measured alike."""
    rows = {"": fields} if isinstance(fields, ERF) else dict(fields)
    if not any(erf.layers for erf in rows.values()):
        raise ValueError(f"{who}: there is no field to draw")
    facts = {label: erf.recipe | {"pictures": erf.num_images} for label, erf in rows.items()}
    keys = dict.fromkeys(key for fact in facts.values() for key in fact)
    different = [
        key
        for key in keys
        if any(f.get(key) != g.get(key) for f in facts.values() for g in facts.values())
    ]
    if not different:
        return rows
    told = {
        label: "; ".join(f"{key.replace('_', ' ')}: {_plain(fact.get(key))}" for key in different)
        for label, fact in facts.items()
    }
    return {f"{label} ({told[label]})": erf for label, erf in rows.items()}


def _plain(fact: Any) -> str:
    is_size = isinstance(fact, list) and all(isinstance(value, int) for value in fact)
    return "x".join(map(str, fact)) if is_size else str(fact)
