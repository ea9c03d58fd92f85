"""Settings of the test-time protocol."""

from dataclasses import FrozenInstanceError, fields

import pytest
from jsonargparse import ArgumentParser

from segformer_pl.inference import Inference


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (
            {"resize_to": 32, "pad_to": 32},
            "resize_to 32 and pad_to 32 are both set, and they exclude",
        ),
        ({"stride": (8, 8)}, "window is not; give the window"),
        ({"window_weights": "hann"}, "window is not; give the window"),
        ({"window": (8, 8), "stride": (9, 8)}, "leaves gaps between windows"),
        ({"scales": ()}, "scales is empty"),
    ],
)
def test_contradictory_settings_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        Inference(**arguments)


def test_the_default_stride_is_two_thirds_of_the_window():
    assert Inference(window=(30, 2)).stride == (20, 1)
    assert Inference(window=(30, 2), stride=(5, 2)).stride == (5, 2)


def test_a_protocol_is_immutable():
    with pytest.raises(FrozenInstanceError):
        Inference().flip = True
    assert Inference(flip=True) == Inference(flip=True) != Inference()


class Holder:
    """A class with a protocol as argument, like the task."""

    def __init__(self, inference: Inference | None = None):
        self.inference = inference


@pytest.mark.parametrize(
    "arguments",
    [
        ["--model.inference.window=[32,48]", "--model.inference.flip=true"],
        [
            "--model.inference=Inference",
            "--model.inference.window=[32,48]",
            "--model.inference.flip=true",
        ],
        [
            "--model.inference={class_path: segformer_pl.inference.Inference, "
            "init_args: {window: [32, 48], flip: true}}"
        ],
    ],
)
def test_it_is_parsed_from_its_arguments_and_from_a_class_path(arguments):
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Holder, "model")
    config = parser.parse_args(arguments)
    assert config.model.inference.class_path.endswith("Inference")
    assert set(config.model.inference.init_args.as_dict()) == {f.name for f in fields(Inference)}
    built = parser.instantiate_classes(config).model.inference
    assert built == Inference(window=(32, 48), flip=True, scales=[1.0])
    assert parser.parse_args([]).model.inference is None
