"""Whether a run goes on in the folder of its checkpoint."""

import pytest
import torch
import yaml

from segformer_pl.commands.run_folder import DEFAULT_LOGGER, find_continuation


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_an_older_checkpoint_does_not_go_on_in_the_folder_of_its_run(tmp_path, is_elsewhere):
    """The rows of the steps after it were deleted: the last one was elsewhere, or unreadable."""
    run_dir, elsewhere = tmp_path / "runs" / "unnamed" / "version_0", tmp_path / "elsewhere"
    for folder in (run_dir / "checkpoints", elsewhere):
        folder.mkdir(parents=True)
    dirpath = str(elsewhere) if is_elsewhere else None
    config = {"trainer": {"logger": DEFAULT_LOGGER}, "last_checkpoint": {"dirpath": dirpath}}
    (run_dir / "config.yaml").write_text(yaml.safe_dump(config))
    best = run_dir / "checkpoints" / "best.ckpt"
    torch.save({"global_step": 2}, best)
    last = (elsewhere if is_elsewhere else best.parent) / "last.ckpt"
    assert find_continuation(str(best), 2, DEFAULT_LOGGER).run_dir == run_dir
    torch.save({"global_step": 9}, last)
    answer = find_continuation(str(best), 2, DEFAULT_LOGGER)
    assert answer.run_dir is None
    assert "its run has gone on to step 9" in answer.sentence
    last.write_bytes(last.read_bytes()[:99])
    answer = find_continuation(str(best), 2, DEFAULT_LOGGER)
    assert answer.run_dir is None
    assert f"{last} cannot be read" in answer.sentence


def test_a_run_whose_configuration_cannot_be_read_is_not_gone_on_with(tmp_path):
    """Where it was kept is not known, and neither is where its last checkpoint lies."""
    last = tmp_path / "runs" / "unnamed" / "version_0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    torch.save({"global_step": 2}, last)
    (last.parent.parent / "config.yaml").write_text("a: [")
    answer = find_continuation(str(last), 2, DEFAULT_LOGGER)
    assert answer.run_dir is None
    assert "config.yaml' cannot be read as YAML" in answer.sentence
    assert "a folder and a history of its own" in answer.sentence
