"""What loading weights did to a network."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

Parts = Literal["all", "encoder"]


@dataclass(frozen=True)
class LoadReport:
    """What :func:`~segformer_pl.checkpoints.load_weights` did; ``str()`` of it is for people.

    Attributes:
        source: Where the weights came from.
        layout: The layout of their names, and whether they were a segmenter or an encoder.
        parts: What was to be loaded.
        num_tensors: How many tensors of the model were set.
        constants: The model's ``weight_constants()``, which no tensor holds, as they are now.
        constants_reason: Why these.
        dropped: Names in the source that were left out on purpose -> why.
        reinitialized: Names in the model that were initialised again -> why.
        inflated: Names in the model that were adapted to other input channels -> by which rule.
        missing: Names in the model that the source does not have; empty if strict.
        unexpected: Names in the source that the model has no place for; empty if strict.
        remarks: What the source states about itself and how it agrees with the run.
        changed: Arguments of the network that differ from those of the training, which no tensor
            shows, one sentence each: the network computes something else than it was trained to.
        data: What the source states about the data that its classifier was trained on, for the
            classes that the model has now, in the model's order; empty if the classifier is new.
    """

    source: str
    layout: str
    parts: Parts
    num_tensors: int
    constants: Mapping[str, float]
    constants_reason: str
    dropped: Mapping[str, str] = field(default_factory=dict)
    reinitialized: Mapping[str, str] = field(default_factory=dict)
    inflated: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        what = "the encoder" if self.parts == "encoder" else "the model"
        lines = [f"{self.num_tensors} tensors of {what} set from {self.source}: {self.layout}"]
        if self.constants:
            values = ", ".join(f"{name} {value:g}" for name, value in self.constants.items())
            lines.append(f"{values}: {self.constants_reason}")
        lines += self.remarks
        for title, reasons in (
            ("left out", self.dropped),
            ("drawn anew", self.reinitialized),
            ("adapted", self.inflated),
        ):
            for why in dict.fromkeys(reasons.values()):
                names = [name for name, reason in reasons.items() if reason == why]
                lines.append(f"{title}: {listed(names)}: {why}")
        if self.missing:
            lines.append(f"NOT in the source, left as they were: {listed(self.missing)}")
        if self.unexpected:
            lines.append(f"NOT in the model, left out: {listed(self.unexpected)}")
        return "\n  ".join(lines)


def listed(names: Sequence[str], limit: int = 3) -> str:
    """Join the first names and count the others, for a message."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
