"""The commands besides Lightning's own ``fit``, ``validate`` and ``test``; one file each."""

from collections.abc import Callable

from segformer_pl.commands.compare import compare
from segformer_pl.commands.convert import convert
from segformer_pl.commands.erf import erf
from segformer_pl.commands.predict import predict
from segformer_pl.commands.profile import profile
from segformer_pl.commands.robustness import robustness

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "predict": predict,
    "compare": compare,
    "robustness": robustness,
    "erf": erf,
    "profile": profile,
    "convert": convert,
}
