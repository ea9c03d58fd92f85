"""A training of seconds, with dropout and drop path, that records what it has trained on."""

import json
import time
from pathlib import Path

import lightning.pytorch as pl
import yaml

from segformer_pl.models import MixTransformer, SegFormer

NUM_STEPS = 12


def tiny(num_classes: int) -> SegFormer:
    """Build a minimal SegFormer."""
    encoder = MixTransformer((8, 8, 8, 8), (1, 1, 1, 1), num_heads=(1, 1, 1, 1), mlp_ratio=1)
    return SegFormer(encoder, num_classes, 8, (0, 1, 2, 3), 0.1)


class Record(pl.Callback):
    """Appends ids, seeds and loss of each step to a file per rank, and can hold a step up.

    Args:
        folder: Folder of the files.
        hold: Step after which the training waits while ``hold`` exists in the folder.
    """

    def __init__(self, folder: str, hold: int | None = None) -> None:
        self.folder, self.hold = Path(folder), hold

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        step = trainer.global_step
        line = {"step": step, "id": batch["id"], "seed": batch["seed"], "loss": outputs["loss"]}
        line["loss"] = float(line["loss"])
        with (self.folder / f"rank{trainer.global_rank}.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")
        while step == self.hold and (self.folder / "hold").exists():
            time.sleep(0.02)


def write_config(folder: Path, data: Path, hold: int | None = None) -> Path:
    """Write the YAML file of a training whose record and run folder are in a folder."""
    folder.mkdir()
    config = {
        "trainer": {
            "accelerator": "cpu",
            "max_steps": NUM_STEPS,
            "val_check_interval": NUM_STEPS // 2,
            "num_sanity_val_steps": 0,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder), "name": "runs"},
            },
            "callbacks": [
                {
                    "class_path": "tiny_training.Record",
                    "init_args": {"folder": str(folder), "hold": hold},
                }
            ],
        },
        "model": {"network": {"class_path": "tiny_training.tiny"}, "warmup_steps": 0, "lr": 1e-3},
        "data": {
            "path": str(data),
            "batch_size": 2,
            "eval_batch_size": 4,
            "crop_size": [32, 32],
            "num_workers": 2,
        },
        "last_checkpoint": {"every_n_train_steps": 4},
    }
    file = folder / "config.yaml"
    file.write_text(yaml.safe_dump(config))
    return file


def read_records(folder: Path, num_ranks: int) -> list[list[dict]]:
    """Return the records of each rank in the order in which they were written."""
    files = (folder / f"rank{rank}.jsonl" for rank in range(num_ranks))
    return [[json.loads(line) for line in file.open()] for file in files]
