import pickle

import pytest
from torch.utils.data import DataLoader, Dataset

from segformer_pl.errors import UserError, find_user_error

SENTENCE = "sample 'x: y': the label is 8x8 but the image is 8x12; store them at one size"


class Narrower(UserError):
    """As UnreadableRows is one."""


class Broken(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise KeyError("first")
        except KeyError as error:
            raise self.error(SENTENCE) from error


@pytest.mark.parametrize("error", [UserError, Narrower])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_sentence_arrives_from_a_worker(error, num_workers):
    with pytest.raises(error) as raised:
        next(iter(DataLoader(Broken(error), num_workers=num_workers)))
    assert str(raised.value) == SENTENCE


def test_it_survives_pickling():
    copy = pickle.loads(pickle.dumps(Narrower(SENTENCE)))
    assert (type(copy), str(copy)) == (Narrower, SENTENCE)


def test_the_user_error_behind_another_exception():
    error = Narrower(SENTENCE)
    middle, outer = ValueError("wrapped"), TypeError("wrapped again")
    middle.__cause__, outer.__cause__ = error, middle
    assert find_user_error(error) is find_user_error(outer) is error
    fault = KeyError("while a user error was handled")
    fault.__context__ = error
    assert find_user_error(fault) is find_user_error(None) is None
