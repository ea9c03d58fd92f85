"""The commands besides ``fit``, ``validate``, ``test`` and ``doctor``; one file each.

``recipe`` is not in ``COMMANDS``: it needs the parser of ``fit``, which :mod:`segformer_pl.cli`
passes to it. ``parser.py`` and ``device.py`` are shared by the commands, and
``validation_split.py`` by those that evaluate many settings.
"""

from collections.abc import Callable

from segformer_pl.commands.compare import compare
from segformer_pl.commands.convert import convert
from segformer_pl.commands.erf import erf
from segformer_pl.commands.export import export
from segformer_pl.commands.predict import predict
from segformer_pl.commands.profile import profile
from segformer_pl.commands.robustness import robustness
from segformer_pl.commands.scaling import scaling
from segformer_pl.commands.test_time import evaluate_at_test_time

COMMANDS: dict[str, Callable[[list[str]], None]] = {
    "predict": predict,
    "compare": compare,
    "robustness": robustness,
    "test_time": evaluate_at_test_time,
    "erf": erf,
    "profile": profile,
    "scaling": scaling,
    "convert": convert,
    "export": export,
}
