"""The command line: ``python -m segformer_pl fit|validate|test`` on LightningCLI, and
the project's own commands (commands/).

What a data set determines (number of classes, names, palette, ignored label) is linked from its
catalogue entry, so an experiment file states it once, as ``data.dataset``.
"""

import errno
import json
import re
import sys
import traceback
import warnings
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import capture_parser
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from segformer_pl.analysis.run import resumed_config_name
from segformer_pl.analysis.style import printable
from segformer_pl.atomic import WriteError
from segformer_pl.callbacks import (
    AtomicCheckpointIO,
    EvaluationRecord,
    Interrupted,
    LastCheckpoint,
    RunHistory,
    RunReport,
    StopOnSignal,
)
from segformer_pl.callbacks.history import RunConfig, keep_history
from segformer_pl.callbacks.progress import StepProgressBar
from segformer_pl.checkpoints.facts import check_facts
from segformer_pl.checkpoints.networks import function_arguments
from segformer_pl.checkpoints.run_checkpoint import read_checkpoint
from segformer_pl.commands import COMMANDS
from segformer_pl.commands.named_checkpoint import NAMED, named_checkpoint
from segformer_pl.commands.parser import PROG, SegformerArgumentParser
from segformer_pl.commands.recipe import recipe
from segformer_pl.commands.run_folder import (
    DEFAULT_LOGGER,
    find_continuation,
    place_below_root,
    refuse_used_folder,
)
from segformer_pl.data import DataError, LabelSpec, StreamingSegmentationData
from segformer_pl.data.catalog import find_dataset
from segformer_pl.data.label_mapping import check_labels
from segformer_pl.doctor import examine, examine_settings
from segformer_pl.task import SegmentationTask


def _labels(dataset: str) -> LabelSpec:
    return find_dataset(dataset).labels


def _num_classes(dataset: str, network: Any) -> int:
    """The data set's; one that was given for the network must not be ignored in silence."""
    num_classes = _labels(dataset).num_classes
    given = network.init_args.get("num_classes") if network and "init_args" in network else None
    if given not in (None, num_classes):
        raise DataError(
            f"model.network.num_classes is {given}, but data set {dataset!r} has {num_classes} "
            "classes; leave it out, it follows from data.dataset"
        )
    return num_classes


class SegformerCLI(LightningCLI):
    """LightningCLI with the links from data set to task and the callbacks that are always on."""

    def __init__(self, args: list[str] | None = None, run: bool = True) -> None:
        self.arguments = sys.argv[1:] if args is None else args
        self.history = RunHistory()
        self.continued_run: Path | None = None  # the folder of the run that goes on
        self.checkpoint_step = 0
        super().__init__(
            SegmentationTask,
            StreamingSegmentationData,
            parser_class=SegformerArgumentParser,
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
        parser.add_lightning_class_args(LastCheckpoint, "last_checkpoint")

    def plain_config(self, **options: Any) -> dict[str, Any]:
        """All arguments as plain data, linked ones included."""
        dumped = self.parser.dump(self.config, skip_link_targets=False, format="yaml", **options)
        config = yaml.safe_load(dumped)
        return config.get(self.config.get("subcommand"), config)

    def model_settings(self) -> dict[str, Any]:
        """The task's arguments as plain data, linked ones included."""
        return self.plain_config()["model"]

    def before_instantiate_classes(self) -> None:
        config = self.config.get(self.config.get("subcommand"), self.config)
        if config["trainer"]["enable_checkpointing"] is False:
            self._parser(self.config.get("subcommand")).callback_keys.remove("last_checkpoint")
        _refuse_epochs(config["trainer"])
        if config["trainer"]["overfit_batches"]:
            raise ValueError(
                f"trainer.overfit_batches is {config['trainer']['overfit_batches']}, but training "
                "reads a stream, of which no batches are picked; leave it out, and give with "
                "--data.path a data set of as few images"
            )
        place_below_root(config["trainer"])
        self._find_run_folder(config.get("ckpt_path"))

    def _find_run_folder(self, ckpt_path: str | None) -> None:
        """A run that goes on does so in its own folder; no other run is kept in a used one."""
        command = self.config.get("subcommand")
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
        given = self._get(self.config_init, "trainer")
        callbacks = given["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if given["enable_progress_bar"] is not False and not has_bar:
            callbacks = [*callbacks, StepProgressBar()]
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
        raise ValueError(
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

    def _parse_ckpt_path(self) -> None:
        # Lightning's version lets the checkpoint's hyperparameters override the configuration
        # and the command line in silence. It offers no other hook to prevent that.
        subcommand = self.config.get("subcommand")
        ckpt_path = self.config.get(f"{subcommand}.ckpt_path")
        if ckpt_path is None:
            if subcommand in ("validate", "test") and not self.config[subcommand].model.weights:
                rank_zero_warn(
                    f"{subcommand} without ckpt_path or model.weights scores an untrained network"
                )
            return
        if not ckpt_path:
            raise ValueError("ckpt_path is empty; give the file of a checkpoint, or last")
        if ckpt_path in NAMED:
            # The trainer looks for them in this run's own, empty folder, and goes on without one.
            config = self.config[subcommand]
            place_below_root(config["trainer"])
            settings = yaml.safe_load(self.parser.dump(self.config, skip_none=False))[subcommand]
            ckpt_path = str(named_checkpoint(ckpt_path, config, settings, subcommand == "fit"))
            rank_zero_info(f"ckpt_path: {self.config[subcommand].ckpt_path} is {ckpt_path}")
            self.config[subcommand].ckpt_path = ckpt_path
        checkpoint = read_checkpoint(ckpt_path, "ckpt_path")
        self.checkpoint_step = checkpoint.get("global_step", 0)
        here = dict(_leaves(self.model_settings()))
        there = dict(_leaves(checkpoint.get("hyper_parameters", {})))
        network = "network.class_path"
        if there.get(network, here[network]) != here[network]:
            raise ValueError(
                f"ckpt_path: {ckpt_path!r} holds a {there[network]}, but model.network is a "
                f"{here[network]}; make them agree"
            )
        stated = checkpoint.get("hyper_parameters", {})
        # Before anything is built, and so before anything is written into the run's folder.
        name = f"ckpt_path: {ckpt_path!r}"
        images = (here["image_mean"], here["image_std"])
        check_facts(stated, name, here["class_names"], images)
        entry = find_dataset(self.plain_config()["data"]["dataset"])
        data = checkpoint.get(StreamingSegmentationData.__name__, {})
        if data.get("dataset") == entry.name:
            check_labels(data, entry.name, entry.labels)
        if "network" in stated:
            _check_network_arguments(ckpt_path, self.model_settings()["network"], stated["network"])
        is_fit = self.config.get("subcommand") == "fit"
        grouped = [settings.get("layer_decay", 1) < 1 for settings in (here, there)]
        if is_fit and grouped[0] != grouped[1]:
            raise ValueError(
                f"model.layer_decay is {here['layer_decay']} here and was "
                f"{there.get('layer_decay', 1)} in {ckpt_path!r}: between 1 and less, the "
                "optimiser's state does not fit; start a new run with --model.weights"
            )
        # Parts that may be left out, so that one of the two may not have the key at all.
        optional = ("network.", "loss.", "inference.")
        parts = {key for key in here.keys() | there.keys() if key.startswith(optional)}
        for key in sorted((here.keys() & there.keys()) | parts):
            if here.get(key) == there.get(key):
                continue
            if is_fit or key.startswith(("network.", "inference.")):
                now, then = (of.get(key, "not given") for of in (here, there))
                rank_zero_info(
                    f"model.{key} is {now} here and was {then} in {ckpt_path}: what is here is used"
                )


def _check_network_arguments(ckpt_path: str, here: dict[str, Any], there: dict[str, Any]) -> None:
    """Raises:
    ValueError: the network was trained with other arguments, which its shapes may not tell.
    """
    ours = function_arguments(here, "model.network")
    theirs = function_arguments(there, f"ckpt_path: {ckpt_path!r}")
    if ours is None or theirs is None:  # a network of the user's, whose arguments are only texts
        free = ("drop_path_rate", "dropout", "num_classes")
        ours, theirs = (
            {
                key.replace("init_args.", ""): value
                for key, value in _leaves(spec)
                if not key.endswith(free) and value is not None
            }
            for spec in (here, there)
        )
    for key in sorted(ours.keys() | theirs.keys()):
        now, then = (_as_list(of.get(key, "not given")) for of in (ours, theirs))
        if now != then:
            raise ValueError(
                f"ckpt_path: model.network.{key} is {now} here and was {then} in {ckpt_path!r}; "
                "make them agree, or give the weights to another network with --model.weights"
            )


def _as_list(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _is_while_restoring(error: BaseException) -> bool:
    """Whether Lightning was taking a checkpoint apart, whose parts it does not look at first."""
    return any(
        frame.filename.endswith("checkpoint_connector.py")
        and frame.name.lstrip("_").startswith(("restore", "resume"))
        for frame in traceback.extract_tb(error.__traceback__)
    )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, dict):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}{key}.")
    else:
        yield prefix.rstrip("."), list(tree) if isinstance(tree, tuple) else tree


def _refuse_epochs(trainer: Any) -> None:
    """Raise ValueError for settings that count epochs, which a stream does not have."""
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
            raise ValueError(
                f"trainer.{name} is {trainer[name]}, but training reads a stream, which has no "
                "epochs; give --trainer.max_steps, and --trainer.val_check_interval in batches"
            )


class DoctorCLI(SegformerCLI):
    """What a run would be made of, built but not run."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        super().add_arguments_to_parser(parser)
        parser.add_argument("--json", action="store_true", help="print findings and figures so")
        parser.set_defaults({"model.network": "segformer_pl.models.segformer_b0"})


def doctor(arguments: list[str]) -> None:
    """``doctor [CONFIG]``: what is wrong with a run, before its first step."""
    if arguments and not arguments[0].startswith("-"):
        arguments = ["--config", *arguments]
    with warnings.catch_warnings():
        # They are those of the command line, without the command.
        warnings.filterwarnings("ignore", "LightningCLI's args parameter")
        cli = DoctorCLI(arguments, run=False)
    examination = examine(cli.model, cli.datamodule, cli.trainer)
    in_json = cli.config["json"]
    text = json.dumps(examination.as_dict(), indent=2) if in_json else str(examination)
    sys.stdout.write(text + "\n")
    sys.exit(1 if examination.has_errors else 0)


def resolve(files: list[str]) -> dict[str, Any]:
    """The settings of a ``fit`` with these files as its ``--config``, complete, as plain data.

    Nothing is built.
    """
    parser = capture_parser(SegformerCLI)
    config = parser.parse_args(["fit", *(f"--config={file}" for file in files)])
    dumped = parser.dump(config, format="yaml", skip_none=False, skip_validation=True)
    return yaml.safe_load(dumped)["fit"]


def main(args: list[str] | None = None, run: bool = True) -> SegformerCLI | None:
    """Parse the arguments, build task, data and trainer, and run the command.

    Args:
        args: Command-line arguments; default those of the process.
        run: Whether ``args`` start with a command to run. With False they are the options of a
            run, and what was built is returned with nothing run: ``main([...], run=False).model``.
    """
    arguments = sys.argv[1:] if args is None else args
    try:
        commands = COMMANDS | {"doctor": doctor, "recipe": partial(recipe, resolve=resolve)}
        if run and arguments and arguments[0] in commands:
            commands[arguments[0]](arguments[1:])
            return None
        return SegformerCLI(args, run)
    except Interrupted as interrupted:
        sys.stderr.write(f"{interrupted.message}\n" if interrupted.message else "")
        sys.exit(interrupted.code)
    except KeyboardInterrupt:
        sys.stderr.write("Ctrl-C: stopped\n")
        sys.exit(130)
    except SystemExit as exit_:
        if isinstance(exit_.__context__, KeyboardInterrupt):  # Lightning's own exit, with status 1
            sys.exit(130)
        raise
    except OSError as error:
        # A full disk fails a second write, such as a logger's, while the first is being told.
        told: BaseException | None = error
        while told is not None and not isinstance(told, WriteError):
            told = told.__context__
        if told is None and error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS):
            raise
        sentence = told or f"cannot write {error.filename or 'a file'!r}: {error.strerror}"
        sys.exit("; ".join([f"error: {sentence}", *getattr(error, "__notes__", [])]))
    except MisconfigurationException as error:
        sys.exit(f"error: {error}")
    except (DataError, ValueError) as error:
        origin = Path(traceback.extract_tb(error.__traceback__)[-1].filename)
        # jsonargparse tries an argument that may be None as both, and lists what each try said.
        tried = re.match(
            r"Does not validate against any.+?\n *- (.+?)\n *- ", str(error), re.DOTALL
        )
        ours = origin.is_relative_to(Path(__file__).parent)
        if isinstance(error, ValueError) and not ours and not tried:
            if _is_while_restoring(error):
                sys.exit(_cannot_be_restored(error))
            raise  # not a sentence of ours
        # A loader process passes its exception on as text, with the sentence on the last line.
        sentence = tried[1] if tried else str(error).splitlines()[-1]
        sys.exit(f"error: {sentence.removeprefix(f'{_qualified(DataError)}: ')}")
    except Exception as error:
        if not _is_while_restoring(error):
            raise
        sys.exit(_cannot_be_restored(error))


def _cannot_be_restored(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    reason = f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
    return (
        f"error: ckpt_path: the checkpoint cannot be restored ({reason[:200]}); give another, "
        "or start a new run from its weights with --model.weights"
    )


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
