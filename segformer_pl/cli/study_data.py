"""The data of a study: they are there, and they are those of its earlier runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from segformer_pl.ablation.study import Study
from segformer_pl.analysis.configuration import TrainingData
from segformer_pl.analysis.run import Run
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.errors import UserError


def check_data_is_there(study: Study) -> None:
    """Check that the training and validation images of a study can be opened on this machine.

    Raises:
        UserError: They cannot be opened, which would end every run.
    """
    data = _data(study)
    data.open("train")
    data.open("validation")


def check_same_data(study: Study, folder: Path) -> None:
    """Check that a study has the training data of the runs that it already has.

    Data are compared by their contents, so they can be moved. Data under the path of an earlier
    run that cannot be reached from this machine are taken to be the same.

    Args:
        study: The study.
        folder: Its folder, such as ``runs/ablations/reduction_ratio``.

    Raises:
        UserError: A run was trained on other data, or data under another path cannot be opened.
    """
    path = _path(study)
    data: TrainingData | None = None
    for run, stored in _trained_runs(study, folder):
        stored_path = (run.configs[0].get("data") or {}).get("path")
        is_same_path = stored_path == path
        if is_same_path and not (isinstance(path, str) and Path(path).exists()):
            continue
        if data is None:
            try:
                data = _training_data(study)
            except UserError as error:
                raise UserError(
                    f"{error} (the data of the study are compared with those of its run "
                    f"'{run.folder}', whose data.path is {stored_path!r})"
                ) from error
        if data != stored:
            raise UserError(
                f"data.path {path!r} has {data}, but the run '{run.folder}' of this study was "
                f"trained on {stored} (its data.path is {stored_path!r}), and variants are "
                "compared on the same data; give the data of that run, or another --output"
            )


def _trained_runs(study: Study, folder: Path) -> Iterator[tuple[Run, TrainingData]]:
    """Yield the runs of the present settings, of any seed, that have begun to train."""
    for variant in study.variants:
        for path in sorted(folder.glob(f"*.{study.budget}.{variant.digest}")):
            run = Run(path)
            if run.training_data is not None:
                yield run, run.training_data


def _training_data(study: Study) -> TrainingData:
    data = _data(study)
    source = data.open("train")
    contents = source.fingerprint.rpartition("-")[2]  # see Run.training_data
    return TrainingData(data.entry.name, sum(source.group_rows), contents)


def _data(study: Study) -> StreamingSegmentationData:
    return StreamingSegmentationData(dataset=_config(study)["dataset"], path=_path(study))


def _path(study: Study) -> Any:
    return _config(study)["path"]


def _config(study: Study) -> dict[str, Any]:
    return study.variants[0].config["data"]  # all variants have the same data
