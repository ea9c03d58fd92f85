"""The project's own commands, those that do not train; one file each."""

from collections.abc import Callable

from segformer_pl.commands.convert import convert
from segformer_pl.commands.erf import erf
from segformer_pl.commands.profile import profile

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "profile": profile,
    "convert": convert,
    "erf": erf,
}
