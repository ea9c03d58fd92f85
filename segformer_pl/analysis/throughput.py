"""How fast the ranks of a training were, and which of them the others waited for."""

import statistics
from dataclasses import dataclass
from typing import Any

# Forward and backward pass together, in forward passes: the backward pass computes the gradients of
# inputs and of weights, each about as much work as the forward pass.
PASSES = 3
# Share of the time of a step that makes a rank a straggler, or data the bottleneck. Smaller ones
# occur by chance.
CLEAR = 0.1
MAX_RANKS = 16  # rows of a table


@dataclass(frozen=True)
class RankThroughput:
    """Totals of one rank over a part of a training, without validations.

    Attributes:
        rank: Global rank.
        images: Number of images.
        batches: Number of batches; several make a step if gradients are accumulated.
        seconds: Duration.
        data_seconds: Part of it in which the rank waited for its data loader.
        forward_seconds: Part of it in forward passes: the only long one without communication, so
            the speed of the rank itself shows in it.
    """

    rank: int
    images: float
    batches: float
    seconds: float
    data_seconds: float
    forward_seconds: float

    @property
    def images_per_second(self) -> float:
        return self.images / self.seconds

    @property
    def data_wait(self) -> float:
        """Share of the time in which the rank waited for data."""
        return self.data_seconds / self.seconds

    @property
    def forward_time(self) -> float:
        """Duration of the forward pass of a batch in seconds."""
        return self.forward_seconds / self.batches

    @property
    def own_share(self) -> float:
        """Share of the time that data and computation of this rank take."""
        return (self.data_seconds + PASSES * self.forward_seconds) / self.seconds


@dataclass(frozen=True)
class Throughput:
    """Throughput of a training, or of its part since the last resumption.

    Attributes:
        first_step: Number of steps done before.
        last_step: Number of steps done at its end.
        accumulate: Batches of a step.
        ranks: Totals by rank.
    """

    first_step: int
    last_step: int
    accumulate: int
    ranks: tuple[RankThroughput, ...]

    @classmethod
    def of(cls, content: Any) -> "Throughput | None":
        """Return the throughput stored as :meth:`as_dict`; None if the content is damaged."""
        try:
            ranks = tuple(RankThroughput(**totals) for totals in content["ranks"])
            first, last, accumulate = (
                int(content[key]) for key in ("first_step", "last_step", "accumulate")
            )
            is_valid = ranks and all(rank.seconds > 0 and rank.batches > 0 for rank in ranks)
            return cls(first, last, accumulate, ranks) if is_valid else None
        except (KeyError, TypeError, ValueError):
            return None

    def as_dict(self) -> dict[str, Any]:
        """Return all fields as plain data for JSON."""
        return {**vars(self), "ranks": [vars(rank) for rank in self.ranks]}

    @property
    def images_per_second(self) -> float:
        """Images per second of all ranks together."""
        return sum(rank.images for rank in self.ranks) / max(rank.seconds for rank in self.ranks)

    @property
    def step_time(self) -> float:
        """Duration of an optimiser step in seconds."""
        first = self.ranks[0]
        return self.accumulate * max(r.seconds for r in self.ranks) / first.batches

    @property
    def data_wait(self) -> float:
        """Largest share of the time in which a rank, and so all of them, waited for data."""
        return max(rank.data_wait for rank in self.ranks)

    @property
    def is_data_bound(self) -> bool:
        """Whether most ranks clearly wait for data."""
        return statistics.median_low(rank.data_wait for rank in self.ranks) > CLEAR

    def slowest(self) -> tuple[RankThroughput, ...]:
        """Return the ranks of a table: all, or those whose own work takes the longest."""
        if len(self.ranks) <= MAX_RANKS:
            return self.ranks
        return tuple(sorted(self.ranks, key=lambda rank: -rank.own_share)[:MAX_RANKS])

    def remarks(self) -> list[str]:
        """Return one sentence for each straggler, and one if data are the bottleneck.

        In DDP every step takes as long as on the slowest rank, and its own duration is the same on
        all ranks. So stragglers are told by what a rank does alone: waiting for data, and computing
        (three times its forward pass). A rank is one if that takes longer than the median of the
        other ranks by more than 10 % of a step: a run with this straggler alone would be that much
        faster without it.
        """
        sentences = []
        for rank in self.ranks:
            others = [other for other in self.ranks if other is not rank]
            if not others:
                break
            own = {
                "waits for data": (rank.data_seconds, [r.data_seconds for r in others]),
                "computes": (
                    PASSES * rank.forward_seconds,
                    [PASSES * r.forward_seconds for r in others],
                ),
            }
            for what, (seconds, of_others) in own.items():
                excess = (seconds - statistics.median(of_others)) / rank.seconds
                if excess > CLEAR:
                    sentences.append(
                        f"Rank {rank.rank} {what} longer than the median of the other ranks, by "
                        f"{100 * excess:.0f} % of the time of a step."
                    )
        if self.is_data_bound:
            median = statistics.median_low(rank.data_wait for rank in self.ranks)
            sentences.append(
                f"Training waits for data {100 * median:.0f} % of the time; give more "
                "data.num_workers if there are idle CPU cores."
            )
        return sentences


def is_shown(throughput: Throughput | None) -> bool:
    """Return whether a report shows the throughput: of several ranks, or if data limit it."""
    return throughput is not None and (len(throughput.ranks) > 1 or throughput.is_data_bound)
