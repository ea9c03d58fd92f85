"""Deterministic values for the tensors of a network, the same in every code base.

The golden numbers were computed with the code of the authors (DeepLabv3+: of mmsegmentation), whose
tensors were filled with :func:`fill` under their original names. A test fills its network under the
same names and must reproduce the numbers.
"""

import zlib

import torch

from segformer_pl.models.timm_models import SkipInitialization

LIKE_UNIFORM = ("relative_position_bias_table", "pos_embed", "cls_token", "query_embed")


def uniform(key, shape):
    """Return values in -0.5 to 0.5 in float64 that depend on the key and the shape alone."""
    shape = torch.Size(shape)
    n = torch.arange(10007)  # from there on, the values repeat
    values = (7 * n**2 + 31 * n + zlib.crc32(key.encode()) % 10007) % 10007
    values = values.double().div(10007).sub(0.5)
    return values.repeat(-(-shape.numel() // 10007))[: shape.numel()].reshape(shape)


def fill(key, shape):
    """Return the values of a parameter or buffer of this original name."""
    values = uniform(key, shape)
    if key.endswith("running_var"):
        return 1 + 0.5 * values
    if key.endswith("running_mean"):
        return 0.2 * values
    if key.endswith("gamma"):
        return 0.5 + values
    if key.rpartition(".")[2] in LIKE_UNIFORM or "query_embed" in key:
        return values
    if len(shape) >= 2:
        return values * (12 * shape[0] / values.numel()) ** 0.5
    if key.endswith("weight"):
        return 1 + 0.4 * values
    return 0.2 * values


def filled(build, original_key):
    """Return a network in float64 and evaluation mode with filled parameters and buffers.

    Args:
        build: Function that builds the network.
        original_key: Function that returns the original name of a tensor of the network.
    """
    with SkipInitialization():
        network = build().double().eval()
    state = {
        key: fill(original_key(key), tensor.shape)
        for key, tensor in network.state_dict().items()
        if tensor.is_floating_point()
    }
    missing, _ = network.load_state_dict(state, strict=False)
    assert all(key.endswith("num_batches_tracked") for key in missing)
    return network


def images(height, width):
    """Return the image of the golden numbers, (1, 3, height, width)."""
    return 4 * uniform("input", (1, 3, height, width))


def labels(height, width, num_classes):
    """Return the label map of the golden numbers, (1, height, width), 255 in the first 8 rows."""
    rows, columns = torch.arange(height)[:, None], torch.arange(width)
    target = (5 * (rows // 16) + 3 * (columns // 16)) % num_classes
    target[:8] = 255
    return target[None]


def probes(tensor):
    """Return the entries of flat index k (n // 5) + 3 k, k = 0 to 4, of a tensor of n entries."""
    flat = tensor.flatten()
    return [float(flat[k * (flat.numel() // 5) + 3 * k]) for k in range(5)]
