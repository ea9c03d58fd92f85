"""Whether a resumed run continues in the folder of its checkpoint."""

import pytest
import torch
import yaml

from segformer_pl.cli.run_folder import DEFAULT_LOGGER, find_continuation


@pytest.mark.parametrize("is_elsewhere", [True, False])
def test_a_checkpoint_that_is_not_the_newest_starts_a_folder_of_its_own(tmp_path, is_elsewhere):
    """Also where the newest one is in another folder or unreadable; later rows would be deleted."""
    run_dir, elsewhere = (
        tmp_path / "runs" / "shapes_SegFormer" / "version_0",
        tmp_path / "elsewhere",
    )
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
    continuation = find_continuation(str(best), 2, DEFAULT_LOGGER)
    assert continuation.run_dir is None
    assert "its run has continued to step 9" in continuation.sentence
    last.write_bytes(last.read_bytes()[:99])
    continuation = find_continuation(str(best), 2, DEFAULT_LOGGER)
    assert continuation.run_dir is None
    assert f"{last} cannot be read" in continuation.sentence


def test_a_run_with_an_unreadable_configuration_is_not_continued(tmp_path):
    """Its logger and the folder of its last checkpoint are unknown."""
    last = tmp_path / "runs" / "shapes_SegFormer" / "version_0" / "checkpoints" / "last.ckpt"
    last.parent.mkdir(parents=True)
    torch.save({"global_step": 2}, last)
    (last.parent.parent / "config.yaml").write_text("a: [")
    continuation = find_continuation(str(last), 2, DEFAULT_LOGGER)
    assert continuation.run_dir is None
    assert "config.yaml' cannot be read as YAML" in continuation.sentence
    assert "a folder and a history of its own" in continuation.sentence
