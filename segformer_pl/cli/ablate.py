"""``ablate STUDY``: plan, run and report an ablation study."""

import json
import sys
from pathlib import Path

from jsonargparse import Namespace

from segformer_pl.ablation.planning import costs_of_report, has_costs, study_costs
from segformer_pl.ablation.study import Study
from segformer_pl.analysis.report.study_page import COSTS_FILE, write_study_report
from segformer_pl.atomic import atomic_write_text
from segformer_pl.cli.study_command import run_study_command
from segformer_pl.errors import UserError


def run(options: Namespace) -> None:
    """Run ``ablate STUDY``: train all variants with all seeds, evaluate them, write the report.

    Args:
        options: Options as ``commands/options/ablate.py`` parses them.

    Raises:
        UserError: The study or an option is wrong.
        Interrupted: SIGTERM or Ctrl-C has ended the study.
    """
    run_study_command("ablate", _report, options)


def _report(study: Study, options: Namespace) -> bool:
    folder = Path(options.output, study.name)
    file = folder / f"report_{study.budget}" / COSTS_FILE
    digests = {variant.name: variant.digest for variant in study.variants}
    try:
        if not has_costs(file, study) and (costs := study_costs(study)):
            text = json.dumps(costs_of_report(study, costs), indent=1)
            atomic_write_text(file, f"{text}\n")
        page = write_study_report(
            folder, study.budget, digests=digests, block_size=options.block_size
        )
    except UserError as error:
        sys.stdout.write(f"no report: {error}\n")
        return False
    sys.stdout.write(f"report: {page}\n")
    return True
