"""The model of data-parallel training, against DDP itself, a simulated ring and closed forms."""

import math
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from segformer_pl import models
from segformer_pl.analysis.scaling import (
    Exchange,
    Node,
    Training,
    all_reduce_seconds,
    ddp_buckets,
    exposed_seconds,
    local_batch,
    predict_steps,
    ring_seconds,
    synchronous_seconds,
    tree_seconds,
)
from segformer_pl.analysis.scaling_report import assumptions, table
from segformer_pl.analysis.step_time import StepTimes, at_batch, time_steps
from segformer_pl.errors import UserError
from segformer_pl.losses import CrossEntropy

INFINITE = Node(8, math.inf, math.inf, 0.0, 0.0)
COUNTS = [1, 2, 4, 8, 16, 64, 1024]


# All-reduce


def simulate_ring(num_bytes, num_devices, node):
    """Send the chunks of a ring all-reduce one by one, and return when the last has arrived.

    In every step, each device sends a chunk to the next as soon as it has received the chunk of the
    step before and its own link has finished sending.
    """
    seconds = num_bytes / num_devices / node.bandwidth(num_devices)
    arrived, free = [0.0] * num_devices, [0.0] * num_devices
    for _ in range(2 * (num_devices - 1)):
        now = [0.0] * num_devices
        for device in range(num_devices):
            following = (device + 1) % num_devices
            is_within = device // node.devices == following // node.devices
            latency = node.link_latency_us if is_within else node.network_latency_us
            free[device] = max(arrived[device], free[device]) + seconds
            now[following] = free[device] + 1e-6 * latency
        arrived = now
    return max(arrived)


@pytest.mark.parametrize("num_devices", [1, 2, 3, 4, 8, 12, 32])
def test_a_ring_takes_as_long_as_its_messages(num_devices):
    node = Node(4, 100.0, 25.0, 3.0, 20.0)
    assert ring_seconds(1e8, num_devices, node) == pytest.approx(
        simulate_ring(1e8, num_devices, node), rel=1e-12
    )


@pytest.mark.parametrize("num_devices", [2, 8, 512])
def test_the_bus_bandwidth_of_nccl_tests_is_that_of_the_slowest_link(num_devices):
    """nccl-tests/doc/PERFORMANCE.md: B = S / t * 2 (n - 1) / n."""
    node, size = Node(8, 100.0, 25.0, 0.0, 0.0), 3e7
    seconds = ring_seconds(size, num_devices, node)
    slowest = 100e9 if num_devices <= 8 else 25e9
    bus_bandwidth = size / seconds * 2 * (num_devices - 1) / num_devices
    assert bus_bandwidth == pytest.approx(slowest)


def test_a_tree_is_faster_with_many_nodes_and_a_ring_with_large_tensors():
    node = Node()
    assert tree_seconds(1e6, 1024, node) < ring_seconds(1e6, 1024, node) / 10
    assert ring_seconds(1e9, 16, node) < tree_seconds(1e9, 16, node)
    for size, number in ((1e6, 1024), (1e9, 16)):
        times = {name: all_reduce_seconds(size, number, node, name) for name in ("ring", "tree")}
        assert all_reduce_seconds(size, number, node, "fastest") == min(times.values())
    doubled = tree_seconds(0, 2048, node) - tree_seconds(0, 1024, node)
    assert doubled == pytest.approx(2e-6 * node.network_latency_us)
    assert tree_seconds(1e6, 1, node) == ring_seconds(1e6, 1, node) == 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"devices": 0}, "node.devices is 0"),
        ({"link_gb_per_s": 0.0}, "above 0"),
        ({"network_gb_per_s": math.nan}, "nan"),
        ({"network_latency_us": -1.0}, "of at least 0"),
    ],
)
def test_impossible_nodes_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        Node(**changes)


# Overlap


def test_exposed_time_of_two_buckets_by_hand():
    # 0 is reduced from 1 to 2. 1 is ready at 3 and reduced until 5, 1.5 after the backward pass.
    assert exposed_seconds([1, 3], [1, 2], 3.5) == pytest.approx(1.5)
    # 1 is ready at 1.5 but waits until 4 for the links.
    assert exposed_seconds([1, 1.5], [3, 2], 3.5) == pytest.approx(2.5)
    assert exposed_seconds([1, 2], [0.5, 0.5], 3.5) == 0


@pytest.fixture
def exchange():
    """Three buckets of two parameters each, broadcasts and two BatchNorms."""
    return Exchange(((5, 4), (3, 2), (1, 0)), (10**6,) * 6, (4096, 16), (64, 256))


def times(batch, backward=0.03):
    ready = tuple(backward * (6 - index) / 6 for index in range(6))
    return StepTimes(batch, 0.01, backward, 0.005, ready, (5, 4, 3, 2, 1, 0))


@pytest.mark.parametrize("algorithm", ["ring", "tree", "fastest"])
def test_infinitely_fast_links_cost_nothing(exchange, algorithm):
    rows = predict_steps([times(2)], exchange, Training(64, 4, algorithm), INFINITE, COUNTS)
    for row in rows:
        assert row.exposed == row.all_reduce == row.synchronous == 0
        assert row.step == row.compute


def test_everything_is_exposed_if_the_backward_pass_takes_no_time(exchange):
    rows = predict_steps([times(2, backward=0.0)], exchange, Training(64), Node(), COUNTS)
    for row in rows:
        assert row.exposed == pytest.approx(row.all_reduce)
        assert row.step == pytest.approx(row.compute + row.all_reduce + row.synchronous)
    assert rows[-1].exposed > 0


def test_steps_get_shorter_with_bandwidth(exchange):
    slow = [Node(8, speed, speed / 4) for speed in (0.1, 1.0, 10.0, 100.0, 1000.0)]
    for number in COUNTS[1:]:
        steps = [predict_steps([times(2)], exchange, Training(64), n, [number])[0] for n in slow]
        exposed = [row.exposed for row in steps]
        assert exposed == sorted(exposed, reverse=True)
        assert exposed[0] > exposed[-1]
        assert all(row.exposed <= row.all_reduce for row in steps)


def test_half_the_bytes_take_half_the_time(exchange):
    node = Node(8, 1.0, 1.0, 0.0, 0.0)
    rows = [predict_steps([times(2)], exchange, Training(64, n), node, [16])[0] for n in (4, 2)]
    assert rows[0].all_reduce == pytest.approx(2 * rows[1].all_reduce)
    assert rows[0].sent_bytes == 2 * 15 / 16 * 24e6 == 2 * rows[1].sent_bytes


# DDP itself


@pytest.fixture
def gloo(tmp_path):
    """A group of this process alone. DDP buckets, broadcasts and reduces as in a larger one."""
    dist.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    yield
    dist.destroy_process_group()


class Stack(nn.Module):
    """33 MB of layers, the last registered first, and a BatchNorm."""

    def __init__(self):
        super().__init__()
        self.last = nn.Linear(1024, 1024)
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(7))
        self.norm = nn.BatchNorm1d(1024)

    def forward(self, images):
        for layer in self.layers:
            images = layer(images).relu()
        return self.last(self.norm(images)).square().mean()


class SegFormerLoss(nn.Module):
    def __init__(self):
        super().__init__()
        self.network = models.segformer_b0(num_classes=150)

    def forward(self, images):
        target = torch.zeros(len(images), *images.shape[2:], dtype=torch.int64)
        return self.network.training_loss(images, target, CrossEntropy(), 255)


def measure(module, images, repetitions=1):
    optimizer = torch.optim.SGD(module.parameters(), 1e-6)
    parameters = dict(module.named_parameters())
    return time_steps(lambda: module(images), parameters, optimizer, 2, "cpu", repetitions)


def ddp_in_its_third_step(module, images, bucket_cap_mb):
    """Return DDP's own log after two steps, and the sizes of the collectives of the third."""
    parallel = DistributedDataParallel(
        module, **({} if bucket_cap_mb is None else {"bucket_cap_mb": bucket_cap_mb})
    )
    for _ in range(2):
        parallel(images).backward()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as profiled:
        parallel(images).backward()
    sizes = {"gloo:broadcast": [], "gloo:all_reduce": []}
    for event in profiled.events():
        if event.name in sizes:
            sizes[event.name].append(event.input_shapes[0][0])
    return parallel._get_ddp_logging_data(), sizes


@pytest.mark.slow
@pytest.mark.parametrize("bucket_cap_mb", [None, 6])
@pytest.mark.parametrize(
    ("build", "shape"), [(Stack, (2, 1024)), (SegFormerLoss, (2, 3, 32, 32))], ids=lambda v: str(v)
)
def test_buckets_and_collectives_are_those_of_ddp(gloo, build, shape, bucket_cap_mb):
    module, images = build(), torch.randn(shape)
    parameters = list(module.parameters())
    order = measure(module, images).order
    ours = Exchange.of(module, order, bucket_cap_mb)
    log, sizes = ddp_in_its_third_step(module, images, bucket_cap_mb)
    assert log["has_rebuilt_buckets"] == 1

    def as_logged(buckets):
        return ", ".join(" ".join(map(str, bucket)) for bucket in buckets)

    theirs = log["rebuilt_per_bucket_param_indices"]
    assert as_logged(ours.buckets) == theirs
    assert len(ours.buckets) > 1
    num_values = [sum(ours.num_values[i] for i in bucket) for bucket in ours.buckets]
    assert ", ".join(str(4 * number) for number in num_values) == log["rebuilt_bucket_sizes"]
    # The two threads of gloo may start collectives in either order.
    assert sorted(num_values) == sorted(sizes["gloo:all_reduce"])
    # float32 statistics, and int64 counters of batches
    assert len(ours.broadcast_bytes) == len(sizes["gloo:broadcast"]) == 2
    broadcast = [b // n for b, n in zip(ours.broadcast_bytes, (4, 8), strict=True)]
    assert sorted(broadcast) == sorted(sizes["gloo:broadcast"])
    # Planted faults: the order of registration, its reverse, and no small first bucket.
    registered = list(range(len(parameters)))
    faults = [(registered, bucket_cap_mb), (registered[::-1], bucket_cap_mb), (order, 25)]
    for wrong_order, wrong_cap in faults:
        assert as_logged(ddp_buckets(parameters, wrong_order, wrong_cap)) != theirs


# Measurement


class Sleep(torch.autograd.Function):
    """The identity, whose backward pass takes 0.1 s."""

    @staticmethod
    def forward(ctx, images):
        return images.clone()

    @staticmethod
    def backward(ctx, gradient):
        time.sleep(0.1)
        return gradient


class Slow(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, images):
        return self.last(Sleep.apply(self.first(images))).sum()


@pytest.mark.slow
def test_gradients_are_ready_when_the_backward_pass_has_reached_them():
    measured = measure(Slow(), torch.randn(2, 4), repetitions=3)
    first, last = measured.ready[:2], measured.ready[2:]
    assert set(measured.order[:2]) == {2, 3}
    assert min(first) - max(last) > 0.05  # whatever else this machine does
    assert 0.7 * measured.backward < max(first) <= measured.backward  # the pass ends with them
    assert measured.backward > 0.1
    # An infinitely slow link exposes everything but what the pause of the pass hides.
    exchange = Exchange(((2, 3), (0, 1)), (16, 4, 16, 4), (), ())
    node = Node(8, 1e-7, 1e-7, 0.0, 0.0)  # 100 bytes/s
    (row,) = predict_steps([measured], exchange, Training(4), node, [2])
    hidden = row.all_reduce - row.exposed
    assert hidden == pytest.approx(measured.backward - max(last), rel=1e-6)


def test_parameters_without_a_gradient_are_named():
    module = Slow()
    module.unused = nn.Linear(2, 2)
    with pytest.raises(UserError, match=r"2 parameters get no gradient .* unused\.weight"):
        time_steps(
            lambda: module.last(torch.ones(1, 4)).sum() + module.first(torch.ones(1, 4)).sum(),
            dict(module.named_parameters()),
            torch.optim.SGD(module.parameters(), 0.1),
            1,
            "cpu",
            1,
        )


def affine(batch):
    return StepTimes(
        batch, 1 + batch, 2 + 3 * batch, 7.0, (1 + 2 * batch, 1 + 3 * batch), order=(0, 1)
    )


@pytest.mark.parametrize("batch", [1, 2, 3, 5, 8, 32])
def test_a_fixed_time_and_a_time_per_image_are_continued_exactly(batch):
    found, expected = at_batch([affine(n) for n in (8, 2, 4)], batch), affine(batch)
    assert found.ready == pytest.approx(expected.ready)
    assert replace(found, ready=()) == replace(expected, ready=())


def test_noise_cannot_make_steps_of_many_images_shorter_or_of_few_negative():
    falling = [replace(affine(2), backward=10.0), replace(affine(4), backward=4.0)]
    assert at_batch(falling, 16).backward == 4.0
    steep = [replace(affine(2), backward=1.0), replace(affine(4), backward=10.0)]
    assert at_batch(steep, 1).backward == 0.5  # half of the images, at best half of the time
    assert at_batch(steep, 16).backward == 40.0
    assert max(at_batch(steep, 1).ready) <= 0.5


def test_one_batch_size_gives_times_proportional_to_the_images():
    found = at_batch([affine(2)], 6)
    assert (found.forward, found.backward, found.optimizer) == (9.0, 24.0, 7.0)


# Predictions


def test_strong_scaling_becomes_weak_at_one_image_a_device(exchange):
    measured = [times(1), replace(times(16), forward=0.16)]
    rows = predict_steps(measured, exchange, Training(16), INFINITE, [1, 2, 8, 16, 32, 1024])
    assert [row.local_batch for row in rows] == [16, 8, 2, 1, 1, 1]
    assert local_batch(24, 16) == 1
    assert [row.images for row in rows] == [16, 16, 16, 16, 32, 1024]
    assert [row.num_nodes for row in rows] == [1, 1, 1, 2, 4, 128]
    for row in rows:
        assert row.images_per_second == pytest.approx(row.images / row.step)
        assert row.efficiency == pytest.approx(
            row.images_per_second * rows[0].step / 16 / row.num_devices
        )
        assert row.node_images_per_second * row.num_nodes == pytest.approx(row.images_per_second)
    assert rows[0].efficiency == 1
    # Without communication, weak scaling is perfect.
    assert rows[3].efficiency == pytest.approx(rows[-1].efficiency)


def test_synchronised_batchnorms_gather_and_reduce_their_statistics(exchange):
    node, training = Node(2, 1.0, 1.0, 0.0, 0.0), Training(16, all_reduce="ring")
    plain = synchronous_seconds(exchange, replace(training, sync_batchnorm=False), node, 4)
    assert plain == pytest.approx((4096 + 16) / 1e9)
    # Each of 4 devices sends its 2 C + 1 statistics 3 times, and 3 / 2 times its 2 C sums.
    expected = sum(3 * 4 * (2 * c + 1) + 1.5 * 4 * 2 * c for c in (64, 256)) / 1e9
    assert synchronous_seconds(exchange, training, node, 4) - plain == pytest.approx(expected)
    assert synchronous_seconds(exchange, training, node, 1) == 0


def test_assumptions_state_batches_buckets_and_links(exchange):
    measured, training = [times(1), times(4)], Training(24, 2, "ring", False)
    text = "\n".join(assumptions(measured, exchange, training, Node(), [1, 2, 8, 16, 32]))
    assert "Measured local batches: 1, 4; interpolated: 3; extrapolated: 12, 24." in text
    assert "cannot be divided among 16 devices" in text
    assert "From 32 devices on, a global batch of 24 is less than 1 image" in text
    assert "6 M values of 2 bytes. Buckets of DDP: 4, 4, 4 MB." in text
    assert "370.8 GB/s and 1.9 us a step" in text
    assert "All-reduces are rings." in text
    assert "The BatchNorms (2) are not synchronised." in text
    rows = predict_steps(measured, exchange, training, Node(), [1, 1024])
    printed = table(rows, loader_images_per_second=100.0)
    assert max(map(len, printed.splitlines())) <= 100
    assert printed.splitlines()[3].split()[-1] == "800"
