"""A node of a cluster, as :mod:`segformer_pl.analysis.scaling` takes it; without torch."""

import math
from dataclasses import dataclass
from typing import Literal

from segformer_pl.errors import UserError

Algorithm = Literal["ring", "tree", "fastest"]


@dataclass(frozen=True)
class Node:
    """A node of a cluster and the links of its devices. The default is NVIDIA's DGX H100.

    Attributes:
        devices: Number of devices of a node.
        link_gb_per_s: Bandwidth of one device's links within the node, in GB/s and each direction.
            Default: 18 links of 20.6 GB/s, the bandwidth that NCCL expects of Hopper's NVLink
            (``SM90_NVLINK_BW`` in its src/graph/topo.h); nominal are 450.
        network_gb_per_s: Bandwidth of all network adapters of a node together, in GB/s and each
            direction. Default: 8 adapters of 400 Gb/s (DGX BasePOD reference architecture), of
            which NCCL's developers expect 46 to 48 GB/s each (NVIDIA/nccl-tests#290).
        link_latency_us: Latency of one step within a node in microseconds. Default: that of NCCL's
            rings on NVLink with its protocol LL128 (``hwLat`` in src/graph/tuning.cc).
        network_latency_us: Latency of one step between nodes in microseconds. Default: as above,
            for a network.

    Raises:
        UserError: A number of devices or a bandwidth is not above 0, or a latency is negative.
    """

    devices: int = 8
    link_gb_per_s: float = 18 * 20.6
    network_gb_per_s: float = 8 * 47.0
    link_latency_us: float = 1.9
    network_latency_us: float = 4.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            is_latency = name.endswith("_us")
            if not (value >= 0 if is_latency else value > 0):  # NaN compares as false
                limit = "of at least 0" if is_latency else "above 0"
                raise UserError(f"node.{name} is {value:g}; give a number {limit}")

    def num_nodes(self, num_devices: int) -> int:
        """Return the number of nodes that hold this number of devices."""
        return math.ceil(num_devices / self.devices)

    def bandwidth(self, num_devices: int) -> float:
        """Return the bandwidth of the slowest link between the devices in bytes/s."""
        slowest = self.link_gb_per_s
        if self.num_nodes(num_devices) > 1:
            slowest = min(slowest, self.network_gb_per_s)
        return 1e9 * slowest

    def ring_latency(self, num_devices: int, laps: int) -> float:
        """Return the latencies of a ring in seconds.

        Args:
            num_devices: Number of devices in the ring.
            laps: Number of times that data passes N - 1 links, 2 for an all-reduce and 1 for an
                all-gather or a broadcast. In each, data that meets every network link is last.
        """
        num_steps, num_nodes = num_devices - 1, self.num_nodes(num_devices)
        between = min(num_nodes, num_steps) if num_nodes > 1 else 0
        within = num_steps - between
        return 1e-6 * laps * (within * self.link_latency_us + between * self.network_latency_us)
