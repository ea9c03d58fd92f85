"""``fit``, ``validate`` and ``test``, on LightningCLI.

What a data set determines (number of classes, names, palette, ignored label) is linked from its
catalogue entry, so an experiment file states it once, as ``data.dataset``.
"""

import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import Namespace, capture_parser
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from segformer_pl.analysis.run import resumed_config_name
from segformer_pl.analysis.style import printable
from segformer_pl.callbacks import (
    AtomicCheckpointIO,
    EvaluationRecord,
    LastCheckpoint,
    RunHistory,
    RunReport,
    StopOnSignal,
)
from segformer_pl.callbacks.history import RunConfig, keep_history
from segformer_pl.callbacks.progress import StepProgressBar
from segformer_pl.checkpoints.run_checkpoint import read_checkpoint
from segformer_pl.cli.resumption import check_settings
from segformer_pl.commands import COMMANDS
from segformer_pl.commands.named_checkpoint import NAMED, named_checkpoint
from segformer_pl.commands.parser import PROG, RunArgumentParser
from segformer_pl.commands.run_folder import (
    DEFAULT_LOGGER,
    find_continuation,
    place_below_root,
    refuse_used_folder,
)
from segformer_pl.data import LabelSpec, StreamingSegmentationData
from segformer_pl.data.catalog import find_dataset
from segformer_pl.doctor import examine_settings
from segformer_pl.errors import UserError
from segformer_pl.lightning_workarounds import SettingsWinCLI
from segformer_pl.task import SegmentationTask


def _labels(dataset: str) -> LabelSpec:
    return find_dataset(dataset).labels


def _num_classes(dataset: str, network: Any) -> int:
    """The data set's; one that was given for the network must not be ignored in silence."""
    num_classes = _labels(dataset).num_classes
    given = network.init_args.get("num_classes") if network and "init_args" in network else None
    if given not in (None, num_classes):
        raise UserError(
            f"model.network.num_classes is {given}, but data set {dataset!r} has {num_classes} "
            "classes; leave it out, it follows from data.dataset"
        )
    return num_classes


class SegformerCLI(SettingsWinCLI):
    """LightningCLI with the links from data set to task and the callbacks that are always on."""

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        self.arguments = sys.argv[1:] if args is None else args
        self.history = RunHistory()
        self.continued_run: Path | None = None  # the folder of the run that goes on
        self.checkpoint_step = 0
        super().__init__(
            SegmentationTask,
            StreamingSegmentationData,
            parser_class=RunArgumentParser,
            parser_kwargs={
                "prog": PROG,
                "description": "Train, score and use segmentation networks. Other commands, each "
                f"with its own --help: {', '.join(COMMANDS)}, doctor, recipe.",
            },
            # The task has its own optimiser; --optimizer would replace its parameter groups.
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=RunConfig,
            trainer_defaults={
                # A stream has no epochs: training is counted in steps, and so is validation.
                "max_epochs": -1,
                "check_val_every_n_epoch": None,
                "logger": DEFAULT_LOGGER,
                "use_distributed_sampler": False,  # the data has a sampler for each rank
                # The report is made from what the others leave.
                "callbacks": [self.history, EvaluationRecord(), RunReport()],
            },
            args=args,
            run=run,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        # Masks are made by the project's own predict, for any picture.
        commands = LightningCLI.subcommands()
        return {name: skip for name, skip in commands.items() if name != "predict"}

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        links = {
            "model.class_names": lambda name: list(_labels(name).names),
            "model.palette": lambda name: [list(color) for color in _labels(name).colors],
            "model.ignore_index": lambda name: _labels(name).ignore_index,
        }
        for target, compute in links.items():
            parser.link_arguments("data.dataset", target, compute_fn=compute)
        parser.link_arguments(
            ("data.dataset", "model.network"),
            "model.network.init_args.num_classes",
            compute_fn=_num_classes,
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        # Not as a Lightning class, which every trainer would be given; see instantiate_trainer.
        parser.add_class_arguments(LastCheckpoint, "last_checkpoint", fail_untyped=False)

    def plain_config(self, **options: Any) -> dict[str, Any]:
        """All arguments as plain data, linked ones included."""
        dumped = self.parser.dump(self.config, skip_link_targets=False, format="yaml", **options)
        config = yaml.safe_load(dumped)
        return config.get(self.subcommand, config)

    def model_settings(self) -> dict[str, Any]:
        """The task's arguments as plain data, linked ones included."""
        return self.plain_config()["model"]

    def before_instantiate_classes(self) -> None:
        config = self.config.get(self.subcommand, self.config)
        if self.subcommand is not None:
            self._read_checkpoint(config)
        if config["trainer"]["use_distributed_sampler"]:
            # Every configuration that an earlier version saved says so.
            config["trainer"]["use_distributed_sampler"] = False
            rank_zero_info(
                "trainer.use_distributed_sampler true is taken as false: the data gives each rank "
                "its own samples"
            )
        _refuse_epochs(config["trainer"])
        if config["trainer"]["overfit_batches"]:
            raise UserError(
                f"trainer.overfit_batches is {config['trainer']['overfit_batches']}, but training "
                "reads a stream, of which no batches are picked; leave it out, and give with "
                "--data.path a data set of as few images"
            )
        place_below_root(config["trainer"])
        self._find_run_folder(config.get("ckpt_path"))

    def _read_checkpoint(self, config: Namespace) -> None:
        """Find the checkpoint of ``ckpt_path`` and compare it with the settings.

        This is before anything is built, and so before anything is written into a run's folder.
        """
        ckpt_path, command = config.get("ckpt_path"), self.subcommand
        if ckpt_path is None:
            if command in ("validate", "test") and not config.model.weights:
                rank_zero_warn(
                    f"{command} without ckpt_path or model.weights scores an untrained network"
                )
            return
        if not ckpt_path:
            raise UserError("ckpt_path is empty; give the file of a checkpoint, or last")
        if ckpt_path in NAMED:
            # The trainer looks for them in this run's own, empty folder, and goes on without one.
            place_below_root(config["trainer"])
            settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[command]
            ckpt_path = str(named_checkpoint(ckpt_path, config, settings, command == "fit"))
            rank_zero_info(f"ckpt_path: {config.ckpt_path} is {ckpt_path}")
            config.ckpt_path = ckpt_path
        checkpoint = read_checkpoint(ckpt_path, "ckpt_path")
        self.checkpoint_step = checkpoint.get("global_step", 0)
        settings = self.plain_config()
        check_settings(checkpoint, ckpt_path, settings["model"], settings["data"], command == "fit")

    def _find_run_folder(self, ckpt_path: str | None) -> None:
        """A run that goes on does so in its own folder; no other run is kept in a used one."""
        command = self.subcommand
        logger = self.plain_config(skip_none=False)["trainer"]["logger"]
        if command == "fit" and ckpt_path and Path(ckpt_path).is_file():
            self.continued_run, sentence = find_continuation(
                ckpt_path, self.checkpoint_step, logger
            )
            rank_zero_info(sentence)
        if command is not None and self.continued_run is None:
            refuse_used_folder(logger)
        if self.continued_run is not None:
            # The configuration that the run began with stays.
            self.save_config_kwargs["config_filename"] = resumed_config_name(self.checkpoint_step)

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        built = self.config_init.get(self.subcommand, self.config_init)
        given = built["trainer"]
        callbacks = given["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if given["enable_progress_bar"] is not False and not has_bar:
            callbacks = [*callbacks, StepProgressBar()]
        if given["enable_checkpointing"] is not False:
            callbacks = [*callbacks, built["last_checkpoint"]]
        logger = keep_history(given["logger"], self.continued_run)
        trainer = super().instantiate_trainer(logger=logger, callbacks=callbacks, **kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # not one of the user's
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.stop_on_signal = StopOnSignal([*PROG.split(), *self.arguments])
        self.stop_on_signal.attach(trainer)
        return trainer

    def before_fit(self) -> None:
        # Without max_steps the task refuses to train; a trial run is not meant to be a good one.
        if self.trainer.max_steps < 1 or self.config["fit"]["trainer"]["fast_dev_run"]:
            return
        found = examine_settings(self.model, self.datamodule, self.trainer)
        self.history.findings = [finding.message for finding in found.findings]
        for sentence in self.history.findings:
            rank_zero_info(f"warning: {sentence}")

    def after_fit(self) -> None:
        trainer = self.trainer
        if self.stop_on_signal.begun or trainer.global_step >= trainer.max_steps:
            return
        reason = "another setting of the trainer ends it there; look at max_epochs and limits"
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            left = callback.time_remaining() if isinstance(callback, Timer) else None
            if left is not None and left <= 0:
                spent = timedelta(seconds=round(callback.time_elapsed()))
                reason = (
                    "trainer.max_time counts the time of all parts of a run, which is "
                    f"{spent} by now; give a longer --trainer.max_time to go on"
                )
        raise UserError(
            f"no step was made, training is at step {trainer.global_step} of {trainer.max_steps}: "
            f"{reason}"
        )

    def validate(self, verbose: bool = True, **arguments: Any) -> None:
        """Lightning's command, with a table in which names of classes are no markup."""
        self._print_metrics(self.trainer.validate(verbose=False, **arguments), verbose)

    def test(self, verbose: bool = True, **arguments: Any) -> None:
        """As :meth:`validate`."""
        self._print_metrics(self.trainer.test(verbose=False, **arguments), verbose)

    def _print_metrics(self, results: Sequence[Mapping[str, float]], verbose: bool) -> None:
        if verbose and self.trainer.is_global_zero:
            rows = [
                (printable(name, 60), value)
                for part in results
                for name, value in part.items()
                if name != "step"  # of the loggers' row, not a metric
            ]
            width = max((len(name) for name, _ in rows), default=0)
            sys.stdout.writelines(f"{name:<{width}}  {value:.6g}\n" for name, value in rows)

    def after_instantiate_classes(self) -> None:
        # With the texts of its parts a checkpoint can be loaded without this command line.
        settings = self.model_settings()
        self.model.save_hyperparameters(
            {part: settings[part] for part in ("network", "loss", "inference") if part in settings}
        )


def _refuse_epochs(trainer: Any) -> None:
    """Refuse settings that count epochs, which a stream does not have."""
    if isinstance(trainer["limit_train_batches"], int):  # its batches are then called an epoch
        return
    unset = {
        "max_epochs": (None, -1),
        "min_epochs": (None,),
        "check_val_every_n_epoch": (None,),
        "reload_dataloaders_every_n_epochs": (0,),
    }
    for name, values in unset.items():
        if trainer[name] not in values:
            raise UserError(
                f"trainer.{name} is {trainer[name]}, but training reads a stream, which has no "
                "epochs; give --trainer.max_steps, and --trainer.val_check_interval in batches"
            )


def resolve(files: list[str]) -> dict[str, Any]:
    """The settings of a ``fit`` with these files as its ``--config``, complete, as plain data.

    Nothing is built.
    """
    parser = capture_parser(SegformerCLI)
    config = parser.parse_args(["fit", *(f"--config={file}" for file in files)])
    dumped = parser.dump(config, format="yaml", skip_none=False, skip_validation=True)
    return yaml.safe_load(dumped)["fit"]
