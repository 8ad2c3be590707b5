r"""The chain that leaves the posterior of the partition invariant.

A sweep draws weights and parameters given the labels, then all labels at once, and then
proposes splits and merges. The joint law of labels and weights has no empty cluster, so
labels are drawn in batches, and a batch stays as it was if it would empty a cluster:
Metropolis–Hastings with ratio 1 inside the support and 0 outside.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreampropeller.mixtures import split_merge
from dreampropeller.mixtures.blocks import Blocks
from dreampropeller.mixtures.chain import Chain
from dreampropeller.mixtures.family import Statistics
from dreampropeller.mixtures.passes import label_pass
from dreampropeller.mixtures.priors import PartitionPrior

BATCHES = 16
"""Batches of the guarded label step."""


class ExactChain(Chain):
    """Leaves the posterior of the partition invariant.

    Args:
        blocks: The points.
        prior: The prior of partitions.
        group: The group of each point.
        seed: The seed of the chain.
        labels: Initial labels.
        proposals: Splits or merges proposed per sweep, and moves between two clusters
            of one group. A number that follows the number of clusters would bias the
            posterior; None follows it until `freeze` is called.
        rounds: Rounds that prepare a proposal.
    """

    def __init__(
        self,
        blocks: Blocks,
        prior: PartitionPrior,
        group: Tensor,
        seed: int,
        labels: Tensor,
        proposals: int | None = None,
        rounds: int = 3,
    ) -> None:
        super().__init__(blocks, prior, group, seed, labels)
        self.proposals, self.rounds = proposals, rounds
        self.frozen: int | None = None
        self.refresh()

    def statistics(self) -> Statistics:
        """The statistics of the clusters."""
        return self.sums

    def refresh(self) -> None:
        """Compute the statistics of the clusters anew."""
        self.sums = self.gather(self.labels, self.num_clusters)

    def freeze(self) -> None:
        """Fix the number of proposals at the present number of clusters."""
        if self.frozen is None:
            self.frozen = self.num_clusters

    def sweep(self, *, moves: bool = True) -> None:
        """Weights, parameters, labels, then splits and merges."""
        rng = self.rng("hyperparameters")
        self.prior.resample(self.counts(), rng)
        self.family.resample(self.sums, rng)
        self._assign()
        if moves:
            for p in range(self._count()):
                split_merge.propose(self, p, self.rounds)
                if self.groups > 1:
                    split_merge.propose_in_group(self, p)
        self.record()

    def _count(self) -> int:
        if self.proposals is not None:
            return self.proposals
        return self.num_clusters if self.frozen is None else self.frozen

    def _assign(self) -> None:
        rng = self.rng("parameters")
        log_weights = self.prior.log_weights(self.counts(), rng)
        params = self.family.draw(self.sums, rng)
        found = self.map(
            label_pass, {}, params=params, log_weights=log_weights, batches=BATCHES
        )
        label = torch.cat([result["label"] for result in found])
        batch = torch.cat([result["batch"] for result in found])
        self.labels = guarded(self.labels, label, batch, self.num_clusters)
        self.refresh()

    def state(self) -> dict[str, Any]:
        """The chain's state and the frozen number of proposals."""
        return {**super().state(), "sums": self.sums, "frozen": self.frozen}

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state."""
        super().load(state)
        self.sums, self.frozen = state["sums"], state["frozen"]


def guarded(old: Tensor, new: Tensor, batch: Tensor, num_clusters: int) -> Tensor:
    """Take the new labels batch by batch, except where a cluster would lose all points.

    Args:
        old: Labels, shape ``(points,)``.
        new: Labels proposed.
        batch: The batch of each point, 0 to 15.
        num_clusters: The number of clusters.
    """
    size = (BATCHES, num_clusters)
    leaves = torch.bincount(batch * num_clusters + old, minlength=size[0] * size[1])
    enters = torch.bincount(batch * num_clusters + new, minlength=size[0] * size[1])
    change = (enters - leaves).view(size)
    counts = torch.bincount(old, minlength=num_clusters)
    if bool((counts + change.cumsum(0) > 0).all()):
        return new
    accepted = torch.zeros(BATCHES, dtype=torch.bool)
    for b in range(BATCHES):
        after = counts + change[b]
        if bool((after > 0).all()):
            counts, accepted[b] = after, True
    return torch.where(accepted[batch], new, old)
