"""The report on a load of weights."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from segformer_pl.errors import UserError, counted

Parts = Literal["all", "encoder"]


@dataclass(frozen=True)
class LoadReport:
    """Result of :func:`~segformer_pl.checkpoints.load_weights`; ``str(report)`` is readable text.

    Attributes:
        source: Where the weights came from.
        layout: Layout of the source's keys, and whether it held a segmenter or an encoder.
        parts: Parts of the model that were requested.
        num_tensors: Number of tensors of the model that were set.
        constants: The model's ``weight_constants()`` after loading, which no tensor holds.
        constants_reason: Origin of these constants.
        dropped: Keys of the source that were left out on purpose -> reason.
        reinitialized: Keys of the model that were re-initialised -> reason.
        inflated: Keys of the model that were adapted to another number of input channels -> rule.
        resampled: Keys of the model whose tensors the encoder changed to fit -> rule.
        initialized: Keys of the model that such a source never has, and that were left as
            initialised -> reason.
        missing: Keys of the model that the source lacks; empty if strict.
        unexpected: Keys of the source that the model lacks; empty if strict.
        remarks: What the source states about itself, and how it agrees with the run.
        changed: Arguments of the network that differ from those of the training and that no tensor
            shows, one sentence each. The network then computes another function than it was
            trained for.
        data: What the source states about the data that its classifier was trained on, in the order
            of the model's classes; empty if the classifier was re-initialised.
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
    resampled: Mapping[str, str] = field(default_factory=dict)
    initialized: Mapping[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    unexpected: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()
    changed: tuple[str, ...] = ()
    data: Mapping[str, Any] = field(default_factory=dict)

    def check_trained(self, option: str) -> None:
        """Check that the network can be evaluated without further training.

        Args:
            option: Option that gave the weights, for messages.

        Raises:
            UserError: It computes another function than it was trained for, or its classifier is
                new.
        """
        if self.changed:
            raise UserError(
                f"{option}: {self.changed[0]}, so this is not the network that was trained; set "
                "the arguments of the trained network, or train this one with `fit` first"
            )
        if self.reinitialized:
            reason = next(iter(self.reinitialized.values()))
            raise UserError(
                f"{option}: the classifier would be re-initialised ({reason}), so its "
                "predictions would be meaningless; train it with `fit` first"
            )

    def __str__(self) -> str:
        what = "the encoder" if self.parts == "encoder" else "the model"
        lines = [
            f"{counted(self.num_tensors, 'tensor')} of {what} set from {self.source}: {self.layout}"
        ]
        if self.constants:
            values = ", ".join(f"{name} {value:g}" for name, value in self.constants.items())
            lines.append(f"{values}: {self.constants_reason}")
        lines += self.remarks
        for title, reasons in (
            ("left out", self.dropped),
            ("re-initialised", self.reinitialized),
            ("adapted", self.inflated),
            ("resampled", self.resampled),
            ("left as initialised", self.initialized),
        ):
            for reason in dict.fromkeys(reasons.values()):
                keys = [key for key, other in reasons.items() if other == reason]
                lines.append(f"{title}: {listed(keys)}: {reason}")
        if self.missing:
            lines.append(f"NOT in the source, left as they were: {listed(self.missing)}")
        if self.unexpected:
            lines.append(f"NOT in the model, left out: {listed(self.unexpected)}")
        return "\n  ".join(lines)


def listed(names: Sequence[str], limit: int = 3) -> str:
    """Join the first names and count the others, for a message."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"
