"""``fit``, ``validate`` and ``test``, on LightningCLI.

The number of classes, their names, the palette and the ignored label are linked from the catalogue
entry of the data set, so an experiment file gives only ``data.dataset``.
"""

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any, ClassVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, Namespace, capture_parser
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from segformer_pl.analysis.run import Run, resumed_config_name
from segformer_pl.analysis.style import printable
from segformer_pl.callbacks import (
    AtomicCheckpointIO,
    EvaluationRecord,
    LastCheckpoint,
    RunHistory,
    RunProvenance,
    RunReport,
    StopOnSignal,
)
from segformer_pl.callbacks.distributed import attach_to_ranks, use_possible_batch_norm
from segformer_pl.callbacks.history import RunConfig, keep_history
from segformer_pl.callbacks.last_checkpoint import best_checkpoint
from segformer_pl.callbacks.progress import StepProgressBar
from segformer_pl.callbacks.wandb_run import continue_wandb, log_in_to_wandb
from segformer_pl.checkpoints.run_checkpoint import read_checkpoint, read_previous
from segformer_pl.cli.exits import explain
from segformer_pl.cli.foreign_errors import one_line
from segformer_pl.cli.launching import launch_arguments
from segformer_pl.cli.named_checkpoint import NAMED, named_checkpoint, own_checkpoint
from segformer_pl.cli.resumption import check_settings
from segformer_pl.cli.run_folder import (
    DEFAULT_LOGGER,
    find_continuation,
    named_folder,
    place_run,
    refuse_used_folder,
)
from segformer_pl.cli.run_parser import (
    DESCRIPTIONS,
    RunArgumentParser,
    accept_short_names,
    leave_elements_unchecked,
    try_int_before_float,
)
from segformer_pl.cli.trainer_settings import check_accelerator, check_trainer
from segformer_pl.commands.options.parser import PROG, one_sentence, with_underscores
from segformer_pl.data import LabelSpec, StreamingSegmentationData
from segformer_pl.data.catalog import find_dataset
from segformer_pl.doctor import examine_settings
from segformer_pl.errors import UserError
from segformer_pl.lightning_workarounds import (
    SettingsWinCLI,
    ignore_checkpoints_of_other_jobs,
    silence_noise,
)
from segformer_pl.models.segmenter import Segmenter
from segformer_pl.task import SegmentationTask
from segformer_pl.yaml_file import Loader


def _labels(dataset: str) -> LabelSpec:
    return find_dataset(dataset).labels


def _num_classes(dataset: str, network: Any) -> int:
    """Return the data set's number of classes; refuse another one that the network was given."""
    num_classes = _labels(dataset).num_classes
    given = network.init_args.get("num_classes") if network and "init_args" in network else None
    if given not in (None, num_classes):
        raise UserError(
            f"model.network.num_classes is {given}, but data set {dataset!r} has {num_classes} "
            "classes; leave num_classes out, as it follows from data.dataset"
        )
    return num_classes


def check_bands(network: Segmenter, data: StreamingSegmentationData) -> None:
    """Check that images are read with as many bands as a network takes.

    Raises:
        UserError: They are not.
    """
    channels, num_bands = network.in_channels, data.num_bands
    if channels == num_bands:
        return
    if num_bands == 3:
        read, remedy = "as RGB, 3", "leave in_channels out"
        if channels == 4:
            remedy += ", or give --data.num_bands 4 for images that store four bands"
    else:
        read = f"with {num_bands} bands (data.num_bands)"
        remedy = (
            f"give --model.network.in_channels {num_bands}, or leave data.num_bands out for RGB"
        )
    raise UserError(
        f"model.network takes images of {channels} channels, but those of the data set are read "
        f"{read}; {remedy}"
    )


def default_name(config: Namespace) -> str:
    """Return the name of a run that was given none: that of its data set and of its network."""
    network = config.model.network.class_path.rpartition(".")[2]
    return re.sub(r"[^\w.-]+", "_", f"{find_dataset(config.data.dataset).name}_{network}")


class SegformerCLI(SettingsWinCLI):
    """LightningCLI with links from the data set to the task, and with the standard callbacks.

    Args:
        args: Command-line arguments. Default: those of the process.
        run: Whether ``args`` start with a command to run.
        exit_on_error: Whether a mistake in the arguments ends the process with a message.
            Otherwise it raises :class:`jsonargparse.ArgumentError`.

    Attributes:
        parser_texts: Name, description and usage of the parser, for its help.
    """

    parser_texts: ClassVar[Mapping[str, str]] = {
        "prog": PROG,
        "description": f"Train and evaluate segmentation networks. {PROG} --help lists all "
        "commands.",
    }

    def __init__(
        self, args: list[str] | None = None, run: bool = True, exit_on_error: bool = True
    ) -> None:
        silence_noise()
        self.arguments = with_underscores(sys.argv[1:] if args is None else args)
        self.history, self.record = RunHistory(), EvaluationRecord()
        self.command = [*PROG.split(), *self.arguments]
        self.provenance = RunProvenance(self.command, explain)
        self.run_dir: Path | None = None  # that of a resumed run, or the one that --run_name names
        self.is_default_folder = False
        self.is_named = False  # by --run_name, so that the same command line resumes
        self.damaged_checkpoint: Path | None = None
        self.checkpoint_step = 0
        super().__init__(
            SegmentationTask,
            StreamingSegmentationData,
            parser_class=RunArgumentParser,
            parser_kwargs={
                **self.parser_texts,
                "exit_on_error": exit_on_error,
                **{
                    name: {"exit_on_error": exit_on_error, "description": DESCRIPTIONS[name]}
                    for name in self.subcommands()
                },
            },
            # The task builds its optimiser; --optimizer would replace its parameter groups.
            auto_configure_optimizers=False,
            seed_everything_default=0,
            save_config_callback=RunConfig,
            trainer_defaults={
                # A stream has no epochs, so training and validation are scheduled in steps.
                "max_epochs": -1,
                "check_val_every_n_epoch": None,
                "logger": DEFAULT_LOGGER,
                "use_distributed_sampler": False,  # the data module shards by rank
                # The report reads the files of the others, so it comes last.
                "callbacks": [self.history, self.record, self.provenance, RunReport()],
            },
            args=args,
            run=run,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        # The package has a predict command of its own, for image files.
        commands = {
            name: skip for name, skip in LightningCLI.subcommands().items() if name != "predict"
        }
        # The parser of one command takes a fifth of a second, so build no other than the given one.
        given = self.arguments[0] if self.arguments else None
        return {given: commands[given]} if given in commands else commands

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        try_int_before_float(parser)
        accept_short_names(parser, "model.network")
        links = {
            "model.class_names": lambda name: list(_labels(name).names),
            "model.palette": lambda name: [list(color) for color in _labels(name).colors],
            "model.ignore_index": lambda name: _labels(name).ignore_index,
        }
        leave_elements_unchecked(parser, "model.class_names", "model.palette")
        for target, compute in links.items():
            parser.link_arguments("data.dataset", target, compute_fn=compute)
        parser.link_arguments(
            ("data.dataset", "model.network"),
            "model.network.init_args.num_classes",
            compute_fn=_num_classes,
        )
        parser.link_arguments("seed_everything", "data.seed", compute_fn=int)
        parser.add_argument(
            "--run_name",
            type=str | None,
            help="name of the run folder, below that of the logger; if it holds a checkpoint from "
            "an earlier start of the same command, training continues from there",
        )
        # add_lightning_class_args would pass it to every trainer, but instantiate_trainer leaves it
        # out where checkpointing is off.
        parser.add_class_arguments(LastCheckpoint, "last_checkpoint", fail_untyped=False)

    def plain_config(self, **options: Any) -> dict[str, Any]:
        """Return all arguments as plain data, linked ones included."""
        dumped = self.parser.dump(self.config, skip_link_targets=False, format="yaml", **options)
        config = yaml.load(dumped, Loader)
        return config.get(self.subcommand, config)

    def model_settings(self) -> dict[str, Any]:
        """Return the task's arguments as plain data, linked ones included."""
        return self.plain_config()["model"]

    def before_instantiate_classes(self) -> None:
        config = self.config.get(self.subcommand, self.config)
        check_trainer(config["trainer"])
        self.is_default_folder = place_run(config["trainer"], default_name(config))
        if self.subcommand is not None:
            self._read_checkpoint(config)
        if config["trainer"]["use_distributed_sampler"]:
            # Configurations saved by earlier versions contain true.
            config["trainer"]["use_distributed_sampler"] = False
            rank_zero_info(
                "trainer.use_distributed_sampler: true is replaced by false, since the data module "
                "gives each rank its own samples"
            )
        check_accelerator(config["trainer"])
        self._find_run_folder(config)
        # Not in config.yaml, which is also given to `validate` and to further trainings.
        config["run_name"] = None

    def _read_checkpoint(self, config: Namespace) -> None:
        """Read the checkpoint of ``ckpt_path`` and compare it with the settings.

        This comes before anything is built, so a refusal leaves no run folder behind.
        """
        ckpt_path, command = config.get("ckpt_path"), self.subcommand
        option = "ckpt_path" if config["run_name"] is None else "run_name"
        if config["run_name"] is not None:
            ckpt_path = self._find_own_checkpoint(config)
        if ckpt_path is None:
            if command in ("validate", "test") and not config.model.weights:
                rank_zero_warn(
                    f"{command} without ckpt_path or model.weights evaluates an untrained network"
                )
            return
        if not ckpt_path:
            raise UserError("ckpt_path is empty; give a checkpoint file, or last")
        if ckpt_path in NAMED:
            # The trainer would search this run's own, empty folder, and train without a checkpoint.
            ckpt_path = str(
                named_checkpoint(ckpt_path, config, self._stored_settings(), command == "fit")
            )
            rank_zero_info(f"ckpt_path: {config.ckpt_path} is {ckpt_path}")
            config.ckpt_path = ckpt_path
        try:
            checkpoint = read_checkpoint(ckpt_path, option)
        except UserError as error:
            intact = read_previous(ckpt_path) if command == "fit" else None
            if intact is None:
                raise
            self.damaged_checkpoint = Path(ckpt_path).absolute()
            ckpt_path, checkpoint = str(intact[0]), intact[1]
            rank_zero_warn(f"{error}; {ckpt_path}, the checkpoint before it, is used instead")
            config.ckpt_path = ckpt_path
        self.checkpoint_step = checkpoint.get("global_step", 0)
        settings = self.plain_config()
        model, data = settings["model"], settings["data"]
        check_settings(checkpoint, ckpt_path, option, model, data, command == "fit")

    def _stored_settings(self) -> dict[str, Any]:
        """Return the settings of the command in the form that a run folder stores."""
        text = self.parser.dump(self.config, skip_none=False)
        return yaml.load(text, Loader)[self.subcommand]

    def _find_own_checkpoint(self, config: Namespace) -> str | None:
        """Return the checkpoint of the run that ``--run_name`` names, if there is one."""
        if self.subcommand != "fit":
            raise UserError(
                f"run_name is the name of a training; leave it out of {self.subcommand}"
            )
        if config.ckpt_path is not None:
            raise UserError(
                f"run_name: {config['run_name']!r} continues from its own checkpoint, but "
                f"ckpt_path is {config.ckpt_path!r}; give one of them"
            )
        settings = self._stored_settings()
        self.is_named = self.history.is_locked = True
        self.run_dir = named_folder(config["run_name"], settings["trainer"]["logger"])
        file = own_checkpoint(self.run_dir, config, settings)
        config.ckpt_path = None if file is None else str(file)
        return config.ckpt_path

    def _find_run_folder(self, config: Namespace) -> None:
        """Choose the run folder: that of the resumed run, or one that no other run has used."""
        command, ckpt_path = self.subcommand, config.get("ckpt_path")
        logger = self.plain_config(skip_none=False)["trainer"]["logger"]
        if self.run_dir is not None:
            # Without a checkpoint, an earlier start may have ended before its first one. RunHistory
            # sets aside what that has logged.
            begins = f"continues from step {self.checkpoint_step}" if ckpt_path else "begins"
            rank_zero_info(f"the run in {self.run_dir} {begins}")
        elif command == "fit" and ckpt_path and Path(ckpt_path).is_file():
            self.run_dir, sentence = find_continuation(
                ckpt_path,
                self.checkpoint_step,
                logger,
                self.damaged_checkpoint,
                self.is_default_folder,
            )
            rank_zero_info(sentence)
        if command is not None and self.run_dir is None:
            refuse_used_folder(logger)
        if self.run_dir is not None and ckpt_path:
            continue_wandb(config["trainer"]["logger"], Run(self.run_dir))
            # A new name, so that the configuration of the start is not overwritten.
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
            has_best = any(
                isinstance(callback, ModelCheckpoint) and callback.monitor is not None
                for callback in callbacks
            )
            best = [] if has_best else [best_checkpoint(built["last_checkpoint"].dirpath)]
            callbacks = [*callbacks, *best, built["last_checkpoint"]]
        logger = keep_history(given["logger"], self.run_dir)
        launch = launch_arguments(given)
        if given["enable_model_summary"] is None:  # before_fit says how large the network is
            kwargs["enable_model_summary"] = False
        if self.subcommand is not None:
            log_in_to_wandb(logger)
        try:
            trainer = super().instantiate_trainer(
                logger=logger, callbacks=callbacks, **launch, **kwargs
            )
        except (ImportError, TypeError, ValueError, MisconfigurationException) as error:
            # Its classes are built already, so this is Lightning's check of its own arguments.
            raise UserError(f"trainer: {one_line(error)}") from error
        ignore_checkpoints_of_other_jobs(trainer)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # the user gave none
            trainer.strategy.checkpoint_io = AtomicCheckpointIO()
        self.stop_on_signal = StopOnSignal(self.command, self.is_named)
        self.stop_on_signal.attach(trainer)
        attach_to_ranks(trainer)
        if given["sync_batchnorm"] and self.subcommand in ("fit", None):
            use_possible_batch_norm(trainer)
        return trainer

    def before_fit(self) -> None:
        parameters = list(self.model.network.parameters())
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        frozen = sum(p.numel() for p in parameters) - trained
        rank_zero_info(
            f"{type(self.model.network).__name__}: {trained:,} parameters are trained"
            + (f", {frozen:,} are frozen" if frozen else "")
        )
        # Without max_steps the task refuses to train, and fast_dev_run is only a smoke test.
        if self.trainer.max_steps < 1 or self.config["fit"]["trainer"]["fast_dev_run"]:
            return
        examination = examine_settings(self.model, self.datamodule, self.trainer)
        self.history.findings = [finding.message for finding in examination.findings]
        for sentence in self.history.findings:
            rank_zero_info(f"warning: {sentence}")

    def after_fit(self) -> None:
        trainer = self.trainer
        if self.stop_on_signal.begun or trainer.global_step >= trainer.max_steps:
            return
        reason = (
            "another setting of the trainer ends it there; check trainer.max_epochs and "
            "trainer.limit_*_batches"
        )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            left = callback.time_remaining() if isinstance(callback, Timer) else None
            if left is not None and left <= 0:
                spent = timedelta(seconds=round(callback.time_elapsed()))
                reason = (
                    "trainer.max_time counts the training time since the first start of the run, "
                    f"which is {spent} by now; give a longer --trainer.max_time to continue"
                )
        raise UserError(
            f"no step was made, training is at step {trainer.global_step} of {trainer.max_steps}: "
            f"{reason}"
        )

    def validate(self, verbose: bool = True, **arguments: Any) -> None:
        """Run Lightning's ``validate`` and print the metrics as plain text.

        Lightning's table renders with rich, which would interpret class names as markup.

        Args:
            verbose: Whether to print the metrics.
            arguments: Arguments of :meth:`lightning.pytorch.Trainer.validate`.
        """
        self._print_metrics(self.trainer.validate(verbose=False, **arguments), verbose)

    def test(self, verbose: bool = True, **arguments: Any) -> None:
        """Run Lightning's ``test`` and print the metrics as :meth:`validate` does."""
        self._print_metrics(self.trainer.test(verbose=False, **arguments), verbose)

    def _print_metrics(self, results: Sequence[Mapping[str, float]], verbose: bool) -> None:
        if verbose and self.trainer.is_global_zero:
            rows = [
                (printable(name, 60), f"{value:.6g}")
                for part in results
                for name, value in part.items()
                if name != "step"  # for the loggers, not a metric
            ]
            if self.record.images is not None:
                rows.append(("images", str(self.record.images)))
            width = max((len(name) for name, _ in rows), default=0)
            sys.stdout.writelines(f"{name:<{width}}  {text}\n" for name, text in rows)

    def after_instantiate_classes(self) -> None:
        check_bands(self.model.network, self.datamodule)
        # Storing how network, loss and inference are built lets a checkpoint be loaded without the
        # command line.
        settings = self.model_settings()
        self.model.save_hyperparameters(
            {part: settings[part] for part in ("network", "loss", "inference") if part in settings}
        )


def resolve(files: list[str], command: str = "fit") -> dict[str, Any]:
    """Return the complete settings of a command with YAML files as plain data; nothing is built.

    Args:
        files: Files to merge, in the order of ``--config`` options.
        command: ``fit``, ``validate`` or ``test``.

    Raises:
        UserError: A setting does not exist or has an impossible value.
    """
    return plain_settings(parse_files(files, command), command)


def parse_files(files: list[str], command: str) -> Namespace:
    """Parse YAML files as :func:`resolve` does; -> the arguments of the command line."""
    try:
        return parser(command).parse_args([command, *(f"--config={file}" for file in files)])
    except ArgumentError as error:
        raise UserError(one_sentence(parser(command), str(error), error)) from error


def plain_settings(config: Namespace, command: str) -> dict[str, Any]:
    """Return the arguments of a command as plain data."""
    dumped = parser(command).dump(config, format="yaml", skip_none=False, skip_validation=True)
    return yaml.load(dumped, Loader)[command]


@cache  # building it takes longer than parsing, and a study resolves the files of every variant
def parser(command: str) -> ArgumentParser:
    """Return the parser of one command, which raises errors instead of exiting."""
    with warnings.catch_warnings():
        # They are not the arguments of the process, but Lightning compares them with those.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        return capture_parser(SegformerCLI, [command], exit_on_error=False)
