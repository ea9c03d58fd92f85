"""jsonargparse's messages about wrong values, as sentences.

jsonargparse lists every type of an option with the reason why the value is none of it, in many
lines and with Python's names of the types::

    Parser key "trainer.precision": Does not validate against any of the Union subtypes
    Subtypes: [typing.Literal[64, 32, 16], ...]
    Errors:
      - Expected a <class 'int'>
    Given value type: <class 'str'>
    Given value: fp17
"""

import re
from argparse import Action
from collections.abc import Iterable, Mapping, Sequence
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

from segformer_pl.errors import did_you_mean

WORDS = {
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "a text",
    "NoneType": "null",
    "list": "a list",
    "tuple": "a list",
    "Sequence": "a list",
    "Iterable": "a list",
    "dict": "a mapping",
    "PositiveInt": "a whole number above 0",
    "NonNegativeInt": "a whole number of at least 0",
    "PositiveFloat": "a number above 0",
    "NonNegativeFloat": "a number of at least 0",
    "timedelta": "a duration",
}
KEY = re.compile(r'Parser key "([^"]+)":\s*(.*)', re.DOTALL)
CLASS_PATH = re.compile(r"Problem with given class_path '([^']+)':\s*(.*)", re.DOTALL)
# Where a message quotes the value
VALUE = (
    re.compile(r"Given value: (.*)\Z", re.DOTALL),
    re.compile(r"Got value: ([^\n]*)"),
    re.compile(r"Expected a path but (\S+) either"),
    re.compile(r"Not of type \w+: (\S+) does not conform"),
    re.compile(r"Not of type \w+: .*?: '(.*)'"),
)
# Where a message names the type
KIND = re.compile(r"(?:Expected a <class '|Not a valid subclass of |Not of type )([\w.]+)")
# Beginnings of the reasons of types that the value was not meant for
OTHER_TYPE = ("Expected a ", "Not a valid subclass of", "Not of type ")


def readable(message: str, actions: Sequence[Action], examples: Mapping[str, str]) -> str:
    """Return a message of jsonargparse as one sentence: which option, its value, what to give.

    Args:
        message: The message.
        actions: Arguments of the parser and its subcommands.
        examples: Values of some options whose types say too little.
    """
    by_name = {action.dest: action for action in actions}
    required = re.fullmatch(r"the following arguments are required: (.*)", message)
    missing = required[1].split(", ") if required else []
    if missing and by_name.keys() >= set(missing):
        return _missing([by_name[name] for name in missing])
    # None for an option without a type
    types = {a.dest: getattr(a, "_typehint", None) for a in actions if a.option_strings}
    unknown = re.fullmatch(r"unrecognized arguments: --([\w.]+).*", message, re.IGNORECASE)
    if unknown:
        hint = did_you_mean(f"--{unknown[1]}", [f"--{name}" for name in types])
        return f"there is no option --{unknown[1]}{hint}"
    return _explain("", message, types, examples)


def _missing(actions: Sequence[Action]) -> str:
    """Return that arguments are not given, as they are written, and what they choose from."""
    names, choices = [], []
    for action in actions:
        option = f"--{action.dest}" if action.option_strings else None
        names.append(option or str(action.metavar or action.dest).upper())
        if action.choices:
            choices.append(f"; {names[-1]} takes {_alternatives(map(str, action.choices))}")
    *first, last = names
    subject = f"{', '.join(first)} and {last} are" if first else f"{last} is"
    return f"{subject} not given{''.join(choices)}"


def _explain(
    outer: str, message: str, types: Mapping[str, Any], examples: Mapping[str, str]
) -> str:
    found = KEY.match(message.strip())
    if found is None:
        return " ".join(f"{outer.rstrip('.')}: {message}".split()) if outer else _joined(message)
    key, text = outer + found[1], found[2]
    path, reason = construction_reason(text)
    if path is not None:
        if KEY.match(reason):
            return _explain(f"{key}.", reason, types, examples)
        refused = re.fullmatch(r"Option '([^']+)' is not accepted", reason)
        if refused:
            return f"{key}.{refused[1]}: {path} has no such argument"
        return f"{key}: {reason}" if path in reason else f"{key}: {path}: {reason}"
    value = next((found[1] for pattern in VALUE if (found := pattern.search(text))), None)
    reasons = [reason for reason in _reasons(text) if not reason.startswith(OTHER_TYPE)]
    if value is None or ("Given value type" not in text and reasons):
        return f"{key}: {_joined(reasons[-1] if reasons else text)}"
    accepted = _describe(types[key]) if types.get(key) else _accepted(text)
    if key in examples:
        accepted = [f"{accepted[0]} (such as {examples[key]})", *accepted[1:]]
    state = f"is {_joined(value)[:100]}, which is not accepted"
    if value == "None":
        state = "is not given"
    return f"{key} {state}; give {_alternatives(accepted)}"


def construction_reason(message: str) -> tuple[str | None, str]:
    """Find out from a message which class cannot be built, and why.

    Args:
        message: Message of jsonargparse about the value of an option, which may be a class.

    Returns:
        Import path of the class and the reason; None and the empty text if there is no class.
    """
    reasons = [reason for reason in _reasons(message) if not reason.startswith(OTHER_TYPE)]
    for reason in reasons:
        if found := CLASS_PATH.match(reason):
            inner, text = construction_reason(found[2])
            if inner is not None and not KEY.match(found[2]):
                return inner, text
            return found[1], found[2].strip() if KEY.match(found[2]) else _joined(found[2])
    given = re.search(r"Given value: Namespace\(class_path='([^']+)'", message)
    if given and reasons:
        return given[1], _joined(reasons[0])
    return None, ""


def _reasons(message: str) -> list[str]:
    """Return the reason of each type of a union, or the message itself."""
    found = re.search(r"^ *Errors:\n(.*?)\n *Given value type:", message, re.DOTALL | re.MULTILINE)
    if found is None:
        message = message.partition("Subclass types expect one of:")[0].strip()
        if not message.startswith("- "):
            return [message]
        # The first line has lost its indentation; deeper lines belong to the reason above them.
        indents = re.findall(r"\n( *)- ", message)
        parts = re.split(rf"\n{min(indents, key=len, default='')}- ", message.removeprefix("- "))
        return [part.strip() for part in parts if part.strip()]
    indent = re.match(r" *", found[1])
    assert indent is not None
    parts = re.split(rf"(?:^|\n){indent[0]}- ", found[1])
    return [part.replace(f"\n{indent[0]}  ", "\n").strip() for part in parts if part.strip()]


def _describe(kind: Any) -> list[str]:
    """Return what a type accepts, in words."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        texts = [text for argument in arguments for text in _describe(argument)]
        return sorted(dict.fromkeys(texts), key=lambda text: text == "null")
    if origin is Literal:
        return [str(value) for value in arguments]
    if origin is tuple and Ellipsis not in arguments:
        return [f"[{', '.join(_alternatives(_describe(argument)) for argument in arguments)}]"]
    if origin is not None:
        return [WORDS.get(origin.__name__, "a list")]
    return [_word(kind.__name__)] if isinstance(kind, type) else ["another value"]


def _accepted(text: str) -> list[str]:
    """Return what an option accepts, in words, from a message about its value."""
    accepted: list[str] = []
    for reason in _reasons(text):
        literal = re.match(r"Expected a typing\.Literal\[(.*?)\]", reason)
        kind = KIND.match(reason)
        if literal:
            accepted += [part.strip(" '") for part in literal[1].split(",")]
        elif kind:
            accepted.append(_word(kind[1].rpartition(".")[2]))
    return list(dict.fromkeys(accepted)) or ["another value"]


def _word(name: str) -> str:
    return WORDS.get(name, f"the import path of a {name}")


def _alternatives(texts: Iterable[str]) -> str:
    *first, last = texts
    return f"{', '.join(first)} or {last}" if first else last


def _joined(text: str) -> str:
    return " ".join(text.split())
