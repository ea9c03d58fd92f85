"""Settings by dotted key, and the settings in which configurations differ."""

import pytest

from segformer_pl.analysis.configuration import (
    TrainingData,
    changes,
    differences,
    leaves,
    settings_digest,
    training_configuration,
)


def callback(name, **arguments):
    return {"class_path": f"mine.{name}", "init_args": arguments}


def test_callbacks_are_keyed_by_class_name():
    config = {"trainer": {"callbacks": [callback("Keep", k=1), callback("Keep", k=2), "no class"]}}
    assert dict(leaves(config)) == {
        "trainer.callbacks.Keep": "mine.Keep",
        "trainer.callbacks.Keep.k": 1,
        "trainer.callbacks.Keep.2": "mine.Keep",
        "trainer.callbacks.Keep.2.k": 2,
    }


def test_changes_list_a_new_callback_and_no_paths():
    old = {"ckpt_path": None, "trainer": {"default_root_dir": "a", "logger": {"name": "a"}}}
    new = {
        "ckpt_path": "last.ckpt",
        "trainer": {
            "default_root_dir": "b",
            "logger": {"name": "b"},
            "callbacks": [callback("EMA", decay=0.9)],
        },
        "model": {"lr": 0.1},
    }
    assert changes(old, new) == {
        "model.lr": (None, 0.1),
        "trainer.callbacks.EMA": (None, "mine.EMA"),
    }


@pytest.mark.parametrize("inside", ["init_args", "init_args.encoder.init_args"])
def test_runs_of_earlier_versions_equal_runs_that_merge_no_queries(inside):
    """The setting came later, so that its default changes no digest of a stored study."""

    def digest(arguments):
        parent = network = {}
        for name in inside.split("."):
            parent = parent.setdefault(name, {})
        parent |= {"sr_ratios": [8, 4, 2, 1]} | arguments
        parts = {0: {"seed_everything": 1, "model": {"network": network}, "data": {"path": "x"}}}
        return settings_digest(training_configuration(parts, None))

    assert digest({"merged_queries": [0, 0, 0, 0]}) == digest({})
    assert digest({"merged_queries": [0.5, 0, 0, 0]}) != digest({})


def test_evaluation_protocol_of_another_run_replaces_that_of_the_training():
    part = {"seed_everything": 3, "model": {"lr": 0.1, "inference": None}, "data": {"path": "x"}}
    data = TrainingData("shapes", 16, "contents")
    own = training_configuration({0: part}, data)
    other = training_configuration({0: part}, data, {"inference": "slide"})
    assert differences([own, other]) == {"model.inference": [None, "slide"]}
    assert (other.seed, other.data, other.data_path) == (3, data, "x")
    assert part["model"]["inference"] is None
    assert training_configuration({0: part | {"verbose": True}}, data) is None
