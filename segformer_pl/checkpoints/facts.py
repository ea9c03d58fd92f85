"""Compare the facts that a source states about its classes and images with those of a run.

Tensors whose shapes fit load without an error, even if class 3 of the source is not class 3 of the
data set, or if the images are normalised in another way. Most sources state both: a run's
checkpoint and a native file in the task's hyperparameters, transformers in ``id2label`` and
``preprocessor_config.json``, mmsegmentation in ``meta``.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from segformer_pl.errors import UserError

MatchClasses = Literal["exact", "by_name", "by_index"]

SHOWN_CLASSES = 12  # most classes that a message lists
NORMALIZATION_TOLERANCE = 1e-4  # 58.395 / 255 in some code bases is 0.229 in others

INFERENCE = "segformer_pl.inference.Inference"  # class path of a test-time protocol

_PLACEHOLDER = re.compile(r"LABEL_\d+")  # names that transformers gives to unnamed classes


def checked_facts(name: str, stated: Any) -> dict[str, Any]:
    """Return a task's hyperparameters after checking the form of those that are used.

    Args:
        name: Name of the source, for messages.
        stated: Hyperparameters as the source states them.

    Raises:
        UserError: A hyperparameter has the wrong form.
    """
    if not isinstance(stated, Mapping):
        raise UserError(
            f"{name} describes its task by a {type(stated).__name__}; it has to be a dict"
        )
    facts = dict(stated)
    for key, (is_right, form) in {
        "network": (_is_network, "a dict with class_path and init_args"),
        "class_names": (_is_list_of(str), "a list of strings"),
        "image_mean": (_is_list_of(int, float), "a list of numbers"),
        "image_std": (_is_list_of(int, float), "a list of numbers"),
        "ignore_index": (_is_integer, "an integer"),
        "palette": (_is_list_of(list, tuple), "a list of colours"),
    }.items():
        if facts.get(key) is None:
            facts.pop(key, None)
        elif not is_right(facts[key]):
            raise UserError(f"{name} states {key} as {_brief(facts[key])}; it has to be {form}")
    return facts


def checked_constants(name: str, content: Mapping[str, Any]) -> dict[str, float]:
    """Return the constants that weights depend on, as a checkpoint or a native file states them.

    Args:
        name: Name of the source, for messages.
        content: Entries beside the weights: ``weight_constants`` by name, or ``norm_eps``, the two
            LayerNorm epsilons of MiT in files of earlier versions.

    Returns:
        Value by name (:meth:`segformer_pl.models.segmenter.Network.weight_constants`); empty if
        the source states none.

    Raises:
        UserError: A constant is not a finite number, or ``norm_eps`` is not two numbers between 0
            and 1.
    """
    stated = content.get("weight_constants")
    if stated is not None:
        if not isinstance(stated, Mapping) or not all(map(_is_constant, stated.items())):
            raise UserError(
                f"{name} states weight_constants as {_brief(stated)}; it has to be a dict of "
                "numbers"
            )
        return {key: float(value) for key, value in stated.items()}
    eps = content.get("norm_eps")
    if eps is None:
        return {}
    is_pair = _is_list_of(int, float)(eps) and len(eps) == 2
    if not is_pair or not all(0 < value < 1 for value in eps):
        raise UserError(
            f"{name} states norm_eps as {_brief(eps)}; it has to be two numbers between 0 and 1"
        )
    return {"norm_eps": eps[0], "conv_norm_eps": eps[1]}


def _is_constant(item: tuple[Any, Any]) -> bool:
    key, value = item
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return isinstance(key, str) and is_number and math.isfinite(value)


def _is_network(value: Any) -> bool:
    return (
        isinstance(value, Mapping)
        and isinstance(value.get("class_path"), str)
        and isinstance(value.get("init_args", {}), Mapping)
        and all(isinstance(key, str) for key in value.get("init_args", {}))
    )


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_list_of(*kinds: type) -> Any:
    return lambda value: (
        isinstance(value, list | tuple)
        and len(value) > 0
        and all(isinstance(item, kinds) and not isinstance(item, bool) for item in value)
    )


def _brief(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def names_from_id2label(id2label: Any, name: str) -> list[str] | None:
    """Return the class names in the order of their ids, None for placeholders (LABEL_0, ...).

    Args:
        id2label: Class name by id, as transformers' ``config.json`` states it.
        name: Name of the source, for messages.

    Raises:
        UserError: The ids are not 0, 1, 2, ...
    """
    try:
        by_id = {int(index): str(label) for index, label in id2label.items()}
    except (AttributeError, ValueError, TypeError) as error:
        raise UserError(
            f"{name}: id2label is {_brief(id2label)}; it has to name the classes 0, 1, 2, ..."
        ) from error
    ids = sorted(by_id)
    if ids != list(range(len(id2label))):
        raise UserError(
            f"{name}: id2label has the ids {_numbers_in_short(ids)}, not 0 to "
            f"{len(id2label) - 1}; correct config.json"
        )
    names = [by_id[index] for index in ids]
    return None if are_placeholders(names) else names


def are_placeholders(names: Sequence[str]) -> bool:
    """Return whether class names are those that are written for unnamed classes (LABEL_0, ...)."""
    return all(map(_PLACEHOLDER.fullmatch, names))


def _numbers_in_short(numbers: list[int]) -> str:
    shown = ", ".join(map(str, numbers[:SHOWN_CLASSES]))
    return shown if len(numbers) <= SHOWN_CLASSES else f"{shown}, ..."


def normalization_from_preprocessor(preprocessor: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return ``image_mean`` and ``image_std`` for images in 0 to 1, from transformers' settings.

    Args:
        preprocessor: Content of ``preprocessor_config.json``.
        name: Name of the source, for messages.

    Raises:
        UserError: A value has the wrong form.
    """
    stated = checked_facts(
        name, {key: preprocessor.get(key) for key in ("image_mean", "image_std")}
    )
    mean, std = stated.get("image_mean"), stated.get("image_std")
    if preprocessor.get("do_normalize", True) is False:
        channels = len(mean or std or (0, 0, 0))
        mean, std = [0.0] * channels, [1.0] * channels
    if mean is None or std is None:
        return stated
    factor = preprocessor.get("rescale_factor", 1 / 255)
    if preprocessor.get("do_rescale", True) is False:
        factor = 1.0
    if not isinstance(factor, int | float) or not factor > 0:
        raise UserError(f"{name} states rescale_factor as {_brief(factor)}; correct it")
    # The processor computes (image * factor - mean) / std with an image in 0 to 255. For an image
    # in 0 to 1 that is (image - mean / scale) / (std / scale) with scale = 255 * factor.
    scale = 1.0 if math.isclose(factor * 255, 1) else factor * 255
    return {
        "image_mean": [value / scale for value in mean],
        "image_std": [value / scale for value in std],
    }


def protocol_from_preprocessor(preprocessor: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the test-time protocol that transformers' settings state: the size of the images.

    Returns:
        Class path and arguments, as a run's checkpoint states them; None if images keep their
        size, or if the settings state it in a form that is not known.
    """
    size = preprocessor.get("size")
    if not preprocessor.get("do_resize", True) or size is None:
        return None
    if _is_integer(size):  # of transformers before 4.26: a square
        size = {"height": size, "width": size}
    if not isinstance(size, Mapping) or not all(map(_is_integer, size.values())):
        return None
    forms = {
        ("height", "width"): "image_size",
        ("longest_edge", "shortest_edge"): "base_size",
    }
    for keys, argument in forms.items():
        if size.keys() == set(keys):
            sides = [size[key] for key in keys]
            return {"class_path": INFERENCE, "init_args": {argument: sides}}
    return None


def match_names(theirs: Sequence[str], ours: Sequence[str]) -> list[int | None]:
    """Return the index in ``theirs`` of each class of ``ours``, None for those that are not there.

    Case, spaces, underscores and hyphens are ignored (``traffic light`` equals ``Traffic_Light``),
    unless two classes of one list differ in nothing else.
    """
    theirs, ours = _comparable(theirs, ours)
    index = {name: number for number, name in enumerate(theirs)}
    return [index.get(name) for name in ours]


def _comparable(theirs: Sequence[str], ours: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return both lists in the form in which names are compared, see :func:`match_names`."""
    simple = [[" ".join(re.split(r"[\s_-]+", n.strip().casefold())) for n in ns]
              for ns in (theirs, ours)]  # fmt: skip
    if any(len(set(s)) < len(set(ns)) for s, ns in zip(simple, (theirs, ours))):
        return list(theirs), list(ours)
    return simple[0], simple[1]


def class_difference(theirs: Sequence[str], ours: Sequence[str]) -> str | None:
    """Describe which classes differ, index by index, as part of a sentence; None if none do."""
    if len(theirs) != len(ours):
        return (
            f"it has {len(theirs)} classes ({_names_in_short(theirs)}), the data set {len(ours)} "
            f"({_names_in_short(ours)})"
        )
    simple = _comparable(theirs, ours)
    pairs = [
        f"{index}: {theirs[index]!r} there, {ours[index]!r} here"
        for index, (their, our) in enumerate(zip(*simple))
        if their != our
    ]
    if not pairs:
        return None
    rest = len(pairs) - SHOWN_CLASSES
    shown = "; ".join(pairs[:SHOWN_CLASSES]) + (f"; and {rest} more" if rest > 0 else "")
    order = " (the same names in another order)" if sorted(simple[0]) == sorted(simple[1]) else ""
    return f"of its {len(theirs)} classes {len(pairs)} differ from the data set's{order}: {shown}"


def _names_in_short(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:SHOWN_CLASSES]))
    return shown if len(names) <= SHOWN_CLASSES else f"{shown}, ..."


def rows_of_classifier(
    name: str,
    theirs: Sequence[str] | None,
    num_theirs: int,
    ours: Sequence[str],
    how: MatchClasses,
) -> tuple[list[int | None], str]:
    """Return the row of a source's classifier for each class of a data set.

    Example: the source has sky, road, car; the data set car, tree, sky::

        "by_name"   [2, None, 0]   tree is not in the source
        "exact"     refused
        "by_index"  [0, 1, 2]

    Args:
        name: Name of the source, for messages.
        theirs: Class names of the source, None if it does not state them.
        num_theirs: Number of outputs of the source's classifier.
        ours: Class names of the data set.
        how: Rule of the match. ``"exact"``: both have the same names in the same order.
            ``"by_name"``: each class takes the row of the class of the same name. ``"by_index"``:
            class i takes row i, and names are not compared.

    Returns:
        Row for each class, or None for a class that the source lacks; and a line for the report.

    Raises:
        UserError: The classes do not match under this rule.
    """
    same = list(range(len(ours)))
    if how == "by_index":
        if num_theirs != len(ours):
            raise UserError(
                f"model.match_classes by_index: {name} has {num_theirs} classes and the data set "
                f"{len(ours)}; matching by index needs the same number"
            )
        return list(same), "classes taken in their order, as match_classes by_index asks for"
    if theirs is not None and len(theirs) != num_theirs:
        raise UserError(
            f"{name} names {len(theirs)} classes and its classifier has {num_theirs}, so its names "
            "cannot be compared with the data set's; correct them, or give --model.match_classes "
            "by_index if its classes are the data set's in the same order"
        )
    if how == "by_name":
        if theirs is None:
            raise UserError(
                f"model.match_classes by_name: {name} does not name its classes; if they are the "
                "data set's in the same order, leave it out"
            )
        if len(set(theirs)) < len(theirs):
            twice = next(n for i, n in enumerate(theirs) if n in theirs[:i])
            raise UserError(
                f"model.match_classes by_name: {name} has two classes named {twice!r}; correct its "
                "names, or give by_index if its classes are the data set's in the same order"
            )
        rows = match_names(theirs, ours)
        num_matched = len(ours) - rows.count(None)
        return rows, f"classes matched by name: {num_matched} of {len(ours)} are in the source"
    if theirs is None:
        return list(same), (
            "the source does not name its classes; they are taken to be the data set's, in the "
            "same order"
        )
    difference = class_difference(theirs, ours)
    if difference is None:
        return list(same), "classes: those of the data set, in the same order"
    if None not in match_names(theirs, ours):
        remedy = "give --model.match_classes by_name, which reorders the classifier"
    else:
        remedy = (
            "for training, give --model.encoder_weights to take the encoder alone, or "
            "--model.match_classes by_name to keep the classes of equal names and initialise the "
            "others; give --model.match_classes by_index if only the spelling differs"
        )
    raise UserError(f"{name} was trained on other classes: {difference}; {remedy}")


def normalization_difference(
    stated: Mapping[str, Any], mean: Sequence[float], std: Sequence[float]
) -> str | None:
    """Describe how the normalisation of a source differs from a run's; None if it does not.

    The text ends with the arguments that would agree. A value that the source does not state is not
    compared.

    Args:
        stated: Facts of the source, perhaps with ``image_mean`` and ``image_std``.
        mean: Mean of the run's images, for each channel.
        std: Standard deviation of the run's images, for each channel.
    """
    here = {"image_mean": list(mean), "image_std": list(std)}
    there = {key: list(stated[key]) for key in here if key in stated}
    if all(_are_close(values, here[key]) for key, values in there.items()):
        return None
    agreeing = " ".join(
        f"--model.{key}=[{','.join(f'{value:.6g}' for value in values)}]"
        for key, values in there.items()
    )
    described = [
        ", ".join(f"{key} {_rounded(values)}" for key, values in of.items()) for of in (there, here)
    ]
    return (
        f"images were normalised with {described[0]} there and are with {described[1]} here; give "
        f"{agreeing}"
    )


def check_facts(
    stated: Mapping[str, Any],
    name: str,
    class_names: Sequence[str],
    normalization: tuple[Sequence[float], Sequence[float]],
) -> None:
    """Check that a checkpoint has the classes and the normalisation of the run that opens it.

    Args:
        stated: Hyperparameters of the checkpoint's task.
        name: Name of the checkpoint, for messages.
        class_names: Class names of the run.
        normalization: Mean and standard deviation of the run's images.

    Raises:
        UserError: The classes or the normalisation differ.
    """
    compared = ("class_names", "image_mean", "image_std")
    facts = checked_facts(name, {key: stated[key] for key in compared if key in stated})
    theirs = facts.get("class_names", class_names)
    if (difference := class_difference(theirs, class_names)) is not None:
        if None not in match_names(theirs, class_names):
            remedy = (
                "start from its weights with --model.weights and --model.match_classes by_name, "
                "which reorders the classifier"
            )
        else:
            remedy = (
                "train from its weights with --model.encoder_weights, or with --model.weights and "
                "--model.match_classes by_name to keep the classes of equal names (by_index if "
                "only the spelling differs)"
            )
        raise UserError(
            f"{name} was trained on other classes: {difference}; take the data set that it was "
            f"trained on, or {remedy}"
        )
    if difference := normalization_difference(facts, *normalization):
        raise UserError(f"{name}: {difference}")


def _are_close(theirs: Sequence[float], ours: Sequence[float]) -> bool:
    return len(theirs) == len(ours) and all(
        math.isclose(a, b, rel_tol=0, abs_tol=NORMALIZATION_TOLERANCE) for a, b in zip(theirs, ours)
    )


def _rounded(values: Sequence[float]) -> str:
    return "[" + ", ".join(f"{value:.4g}" for value in values) + "]"
