"""Content of a file that is no checkpoint of a run."""

import pytest
import torch

from segformer_pl.checkpoints.run_checkpoint import read_checkpoint


@pytest.mark.parametrize(
    "content",
    [
        {},
        [1, 2],
        None,
        torch.zeros(2),
        {"w": torch.zeros(2)},
        {"state_dict": {"w": torch.zeros(2)}},
        {"state_dict": [], "pytorch-lightning_version": "2.6.6"},
        {"state_dict": {"w": 1}, "pytorch-lightning_version": "2.6.6"},
        {"state_dict": {"w": torch.tensor([torch.inf])}, "pytorch-lightning_version": "2.6.6"},
        {"state_dict": {"w": torch.ones(2).to_sparse()}, "pytorch-lightning_version": "2.6.6"},
        {"state_dict": {"running_var": -torch.ones(2)}, "pytorch-lightning_version": "2.6.6"},
        {"state_dict": {}, "pytorch-lightning_version": "newest"},
        {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "global_step": -1},
        {"state_dict": {}, "pytorch-lightning_version": "2.6.6", "hyper_parameters": []},
    ],
    ids=lambda content: str(content)[:60],
)
def test_other_content_is_refused_in_one_sentence(content, tmp_path):
    torch.save(content, tmp_path / "w.ckpt")
    with pytest.raises(ValueError, match=r"^ckpt_path: '.*w\.ckpt' (holds|has)") as error:
        read_checkpoint(tmp_path / "w.ckpt", "ckpt_path")
    assert "\n" not in str(error.value)
