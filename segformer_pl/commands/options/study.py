"""Options of ``ablate`` and ``arena``."""

from pathlib import Path
from typing import Any, Literal

from jsonargparse import Namespace
from jsonargparse.typing import PositiveInt

from segformer_pl.commands.options.parser import PROG, SegformerArgumentParser
from segformer_pl.errors import UserError

OUTPUT = Path("runs/ablations")


def study_parser(name: str, description: str) -> SegformerArgumentParser:
    """Return the parser of a command that runs a study.

    Args:
        name: Name of the command.
        description: What it does, for its help.
    """
    parser = SegformerArgumentParser(
        prog=f"{PROG} {name}",
        description=f"{description} The state of a study is in its run folders alone. The "
        "same command continues an interrupted study: finished runs are skipped and interrupted "
        "ones resume from their last checkpoint. Several invocations can work on one study.",
    )
    parser.add_argument(
        "study", help="study file, such as experiments/ablations/reduction_ratio.yaml"
    )
    parser.add_argument("--budget", default="small", help="name of a budget of the study")
    parser.add_argument(
        "--dry_run",
        action="store_true",
        help="train nothing; print what the variants cost, what is left to do, and the smallest "
        "difference that the planned seeds and images can resolve",
    )
    parser.add_argument(
        "--launcher",
        type=Literal["local", "slurm"],
        default="local",
        help="run on this machine, or as an array of Slurm jobs",
    )
    parser.add_argument(
        "--max_parallel",
        type=PositiveInt | None,
        default=None,
        help="runs at a time; default: one per GPU, or one on a machine without; on Slurm, as many "
        "as it allows. Local runs divide the cores among them",
    )
    parser.add_argument(
        "--slurm",
        type=dict[str, Any],
        default={},
        help="options of the Slurm jobs, such as '{partition: gpu, timeout_min: 240, "
        "gpus_per_node: 1, cpus_per_task: 8}': those of submitit, and those of sbatch with "
        "underscores; nodes and tasks follow from trainer.num_nodes and trainer.devices. Ctrl-C "
        "cancels the jobs; a closed connection does not",
    )
    parser.add_argument(
        "--retry_failed",
        action="store_true",
        help="start runs again that have failed; otherwise they are only listed",
    )
    parser.add_argument(
        "--report", action="store_true", help="train nothing; write the report of finished runs"
    )
    parser.add_argument(
        "--block_size",
        type=PositiveInt,
        default=1,
        help="number of consecutive images that resemble each other, as in a video; see `compare`",
    )
    parser.add_argument(
        "--wandb_sweep",
        type=str | None,
        default=None,
        metavar="FILE",
        help="train nothing; write the study as a W&B sweep into a new file",
    )
    parser.add_argument("--output", default=str(OUTPUT), help="folder of all studies")
    parser.add_argument(
        "--data.path", type=str | None, default=None, help="data.path of all variants"
    )
    return parser


def parse_study(parser: SegformerArgumentParser, arguments: list[str]) -> Namespace:
    """Parse the arguments of a command that runs a study.

    Returns:
        Its options, and ``arguments``, with which the same command goes on.

    Raises:
        UserError: Two options exclude each other.
    """
    options = parser.parse_args(arguments)
    chosen = [name for name in ("dry_run", "report", "wandb_sweep") if options[name]]
    if len(chosen) > 1:
        raise UserError(f"--{chosen[0]} and --{chosen[1]} exclude each other; give one of them")
    if options.slurm and options.launcher != "slurm":
        raise UserError("slurm: these are options for --launcher slurm, which is not given")
    options["arguments"] = arguments
    return options
