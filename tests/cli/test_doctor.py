"""The command ``doctor``."""

import json

import pytest
import yaml

from segformer_pl.cli import main
from segformer_pl.data import shapes


@pytest.mark.slow
def test_the_command(tmp_path, capsys):
    folder = tmp_path / "shapes"
    shapes.generate(folder, {"train": 60, "validation": 60})
    arguments = [f"--data.path={folder}", "--trainer.max_steps=4000", "--trainer.accelerator=cpu"]
    arguments += ["--trainer.val_check_interval=100", "--json"]
    with pytest.raises(SystemExit) as exit:
        main(["doctor", *arguments])
    report = json.loads(capsys.readouterr().out)
    assert exit.value.code == 0
    assert {finding["check"] for finding in report["findings"]} <= {"splits"}  # a smaller copy
    assert report["facts"]["train"]["images"] == 60

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": {"path": str(folder)}, "trainer": {"max_steps": 3}}))
    with pytest.raises(SystemExit) as exit:
        main(["doctor", str(config), "--trainer.accelerator=cpu"])
    assert exit.value.code == 1
    assert "error: [recipe] the learning rate warms up for 1500" in capsys.readouterr().out
