"""What every test shares: a fixed seed, one thread, and networks that hide nothing."""

from itertools import chain

import pytest
import torch


@pytest.fixture(autouse=True)
def _repeatable():
    torch.manual_seed(0)
    # Threads cost more than they bring on tensors this small, most of all on a busy machine.
    torch.set_num_threads(1)


@pytest.fixture
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
