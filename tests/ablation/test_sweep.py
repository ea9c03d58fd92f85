"""The W&B sweep of a study, read by the code of W&B's own agent and by the parser of ``fit``."""

import itertools

import pytest
import yaml

from segformer_pl.ablation.sweep import write_wandb_sweep
from segformer_pl.analysis.configuration import settings_digest, training_configuration
from segformer_pl.cli.training import resolve


@pytest.mark.slow
def test_the_agent_of_wandb_starts_the_runs_of_the_study(read, tmp_path):
    from wandb.sdk.launch.sweeps.utils import (
        create_sweep_command,
        create_sweep_command_args,
        load_sweep_config,
    )

    study = read()
    file, *configs = write_wandb_sweep(study, tmp_path / "sweep.yaml", tmp_path / "out")
    sweep = load_sweep_config(str(file))
    assert sweep["method"] == "grid"
    assert set(sweep) <= {
        "name", "description", "method", "metric", "program", "command", "parameters"
    }  # fmt: skip
    parameters = {name: entry["values"] for name, entry in sweep["parameters"].items()}
    digests = []
    for values in itertools.product(*parameters.values()):
        arguments = {name: {"value": value} for name, value in zip(parameters, values)}
        given = create_sweep_command_args({"args": arguments}) | {
            "env": ["env"],
            "interpreter": ["python"],
            "program": [sweep["program"]],
        }
        command = []
        for part in create_sweep_command(sweep["command"]):
            is_macro = part.startswith("${")
            command += given[part[2:-1]] if is_macro else [part]
        assert command[:5] == ["env", "python", "-m", "segformer_pl", "fit"]
        options = dict(option.removeprefix("--").split("=", 1) for option in command[5:])
        assert set(options) == {"config", "seed_everything"}
        config = resolve([options["config"]])
        digests.append((settings_digest(training_configuration({0: config}, None)), values[1]))
        csv, wandb = config["trainer"]["logger"]
        assert csv["init_args"]["version"] is None
        assert wandb["init_args"]["group"] == "tiny"
        assert wandb["init_args"]["name"] is None
    assert digests == [(variant.digest, seed) for variant in study.variants for seed in study.seeds]
    assert yaml.safe_load(configs[0].read_text())["trainer"]["max_steps"] == 4
