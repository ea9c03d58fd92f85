import pytest

from segformer_pl.data.catalog import DATASETS, find_dataset
from segformer_pl.data.labels import DataError


def test_entries_are_found_by_their_own_name():
    assert {name: find_dataset(name).name for name in DATASETS} == {n: n for n in DATASETS}


def test_an_unknown_name_gets_a_suggestion_and_the_list():
    with pytest.raises(DataError, match=r"no data set 'camvd'.*did you mean 'camvid'.*shapes"):
        find_dataset("camvd")


def test_camvid_has_eleven_classes_and_an_unlabelled_value():
    labels = find_dataset("camvid").labels
    assert labels.num_classes == 11
    assert labels.ignored == {11}
    assert labels.names[3] == "road"
