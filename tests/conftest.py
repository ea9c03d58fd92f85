"""What the tests share: a fixed seed, one thread, networks that hide nothing, small shards."""

from io import BytesIO
from itertools import chain

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    # Threads cost more than they bring on tensors this small, most of all on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def randomize():
    """Function module -> the same module in float64 with random parameters and buffers.

    A fresh network hides faults: with biases at 0, norm weights at 1 and running statistics at
    their start, leaving one of them out changes nothing. Matrices keep the variance of what they
    multiply, so that softmax and the norms stay away from saturation.
    """

    def fill(module):
        module.double()
        with torch.no_grad():
            for name, tensor in chain(module.named_parameters(), module.named_buffers()):
                if not tensor.is_floating_point():  # num_batches_tracked
                    continue
                if name.endswith("running_var"):
                    tensor.uniform_(0.5, 2.0)
                elif tensor.dim() > 1:
                    tensor.normal_(std=tensor[0].numel() ** -0.5)
                else:
                    tensor.normal_()
        return module

    return fill


@pytest.fixture(scope="session")
def png():
    """Function array -> the cell that an ``Image`` column holds for it."""
    from PIL import Image

    def encode(array):
        buffer = BytesIO()
        Image.fromarray(array).save(buffer, format="PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    return encode


@pytest.fixture(scope="session")
def row(png):
    """Function (id, label value, (height, width)) -> a row of shards."""
    import numpy as np

    def make(name, label_value=1, size=(8, 8)):
        return {
            "image": png(np.zeros((*size, 3), np.uint8)),
            "label": png(np.full(size, label_value, np.uint8)),
            "id": name,
        }

    return make


@pytest.fixture(scope="session")
def write_shards():
    """Function that writes rows as the Parquet shards of a hub data set; returns the folder."""
    import datasets
    import pyarrow as pa
    import pyarrow.parquet as pq

    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.Image(), "id": datasets.Value("string")}
    )

    def write(folder, split, shards, row_group_size=4):
        folder.mkdir(exist_ok=True)
        for number, rows in enumerate(shards):
            pq.write_table(
                pa.Table.from_pylist(rows, schema=features.arrow_schema),
                folder / f"{split}-{number:05d}-of-{len(shards):05d}.parquet",
                row_group_size=row_group_size,
            )
        return folder

    return write
