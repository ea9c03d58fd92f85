import pickle

import pytest
from torch.utils.data import DataLoader, Dataset

from segformer_pl.errors import UserError, counted, find_user_error

MESSAGE = "sample 'x: y': the label is 8x8 but the image is 8x12; store them at one size"


class Narrower(UserError):
    """A subclass, as the package has several."""


class Broken(Dataset):
    def __init__(self, error):
        self.error = error

    def __len__(self):
        return 1

    def __getitem__(self, index):
        try:
            raise KeyError("first")
        except KeyError as error:
            raise self.error(MESSAGE) from error


@pytest.mark.slow
@pytest.mark.parametrize("error", [UserError, Narrower])
@pytest.mark.parametrize("num_workers", [0, 1])
def test_the_message_of_a_worker_is_kept(error, num_workers):
    batches = iter(DataLoader(Broken(error), num_workers=num_workers))
    with pytest.raises(error) as raised:
        next(batches)
    if num_workers:
        batches._shutdown_workers()  # garbage collection may take 5 s for it
    assert str(raised.value) == MESSAGE


def test_user_errors_can_be_pickled():
    copy = pickle.loads(pickle.dumps(Narrower(MESSAGE)))
    assert (type(copy), str(copy)) == (Narrower, MESSAGE)


def test_find_user_error_follows_explicit_causes_only():
    error = Narrower(MESSAGE)
    middle, outer = ValueError("wrapped"), TypeError("wrapped again")
    middle.__cause__, outer.__cause__ = error, middle
    assert find_user_error(error) is find_user_error(outer) is error
    bug = KeyError("while a user error was handled")
    bug.__context__ = error
    assert find_user_error(bug) is find_user_error(None) is None


def test_a_number_agrees_with_its_noun():
    numbers = (0, 1, 1600)
    assert [counted(number, "step") for number in numbers] == ["0 steps", "1 step", "1600 steps"]
