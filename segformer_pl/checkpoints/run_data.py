"""Open the data that a run was trained on, as its checkpoint describes it."""

from typing import Any

from segformer_pl.checkpoints.facts import class_difference
from segformer_pl.checkpoints.run_checkpoint import RunCheckpoint
from segformer_pl.data import StreamingSegmentationData
from segformer_pl.errors import UserError, brief


def load_data(checkpoint: RunCheckpoint, **changes: Any) -> StreamingSegmentationData:
    """Open the data that a run was trained on.

    Args:
        checkpoint: The run's checkpoint.
        changes: Arguments of :class:`~segformer_pl.data.StreamingSegmentationData` to use instead
            of the run's. None keeps the run's value.

    Raises:
        UserError: The data cannot be opened, its classes differ from those that the run was trained
            on, or the meaning of its labels has changed since.
    """
    content = checkpoint.content
    given = {key: value for key, value in changes.items() if value is not None}
    settings = content["datamodule_hyper_parameters"] | given
    settings.pop("_instantiator", None)
    try:
        data = StreamingSegmentationData(**settings)
    except (TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint.name} describes data that cannot be opened here ({brief(error)}); "
            "give a checkpoint of this version's `fit`"
        ) from error
    if "dataset" not in given:
        trained = content["hyper_parameters"].get("class_names", data.entry.labels.names)
        if difference := class_difference(trained, data.entry.labels.names):
            raise UserError(
                f"{checkpoint.name} was trained on other classes than data set "
                f"{settings['dataset']!r} has now: {difference}; restore its description"
            )
        data.check_labels(content.get(type(data).__name__, {}))
    return data
