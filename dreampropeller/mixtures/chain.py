r"""The Markov chain over partitions: what both methods share, and the exact one.

A sweep draws weights and parameters given the labels, then all labels at once, and then
proposes splits and merges. The joint law of labels and weights has no empty cluster, so
`ExactChain` draws labels in batches and leaves a batch as it was if it would empty a
cluster: Metropolis–Hastings with ratio 1 inside the support and 0 outside.
"""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreampropeller.mixtures import split_merge
from dreampropeller.mixtures.blocks import Blocks
from dreampropeller.mixtures.family import Statistics, total
from dreampropeller.mixtures.passes import label_pass, statistics_pass
from dreampropeller.mixtures.priors import PartitionPrior
from dreampropeller.mixtures.random import generator

BATCHES = 16
"""Batches of the guarded label step."""


@dataclass
class History:
    """One entry per sweep."""

    num_clusters: list[int] = field(default_factory=list)
    log_joint: list[float] = field(default_factory=list)
    concentration: list[float] = field(default_factory=list)


class Chain(abc.ABC):
    """Labels, their statistics and the prior's weights, moved on by `sweep`.

    Args:
        blocks: The points.
        prior: The prior of partitions.
        group: The group of each point, shape ``(points,)``; zeros without groups.
        seed: The seed of the chain.
        labels: Where to start, shape ``(points,)``; every label below the largest one
            has a point.
    """

    def __init__(
        self,
        blocks: Blocks,
        prior: PartitionPrior,
        group: Tensor,
        seed: int,
        labels: Tensor,
    ) -> None:
        self.blocks, self.prior, self.group, self.seed = blocks, prior, group, seed
        self.family = blocks.family
        self.labels = labels.long()
        self.num_clusters = int(labels.max()) + 1
        self.sweeps = 0
        self.history = History()
        prior.begin(self.num_clusters)

    def rng(self, stream: str) -> np.random.Generator:
        """The generator of a stream at this sweep."""
        return generator(self.seed, self.sweeps, stream)

    def count(self, key: Tensor, num: int) -> np.ndarray:
        """Points of each group in each set, shape ``(groups, num)``."""
        cells = torch.bincount(self.group * num + key, minlength=self.groups * num)
        return cells.view(self.groups, num).numpy()

    @property
    def groups(self) -> int:
        """The number of groups."""
        return self.prior.num_groups

    def counts(self) -> np.ndarray:
        """Points of each group in each cluster, ``(groups, clusters)``."""
        return self.count(self.labels, self.num_clusters)

    @abc.abstractmethod
    def statistics(self) -> Statistics:
        """The statistics of the clusters."""

    @abc.abstractmethod
    def sweep(self, *, moves: bool = True) -> None:
        """One sweep; without `moves` the number of clusters stays."""

    def map(self, work: Any, points: dict[str, Tensor], **shared: Any) -> list[Any]:
        """A pass over the points, with the key of its noise."""
        points = {"group": self.group, **points}
        shared = {"seed": self.seed, "sweep": self.sweeps, **shared}
        return self.blocks.map(work, points, shared)

    def gather(self, key: Tensor, num: int) -> Statistics:
        """The statistics of the sets that `key` names, added in block order."""
        return total(self.map(statistics_pass, {"key": key}, num=num))

    def log_joint(self) -> float:
        r"""$\ln p(z, x)$, for groups $\ln p(z, \beta, x)$."""
        data = self.family.log_marginal(self.statistics()).sum()
        return self.prior.log_probability(self.counts()) + float(data)

    def record(self) -> None:
        """Close a sweep."""
        self.sweeps += 1
        self.history.num_clusters.append(self.num_clusters)
        self.history.log_joint.append(self.log_joint())
        self.history.concentration.append(self.prior.mass)

    def state(self) -> dict[str, Any]:
        """Everything that the next sweep depends on."""
        return {
            "labels": self.labels,
            "sweeps": self.sweeps,
            "prior": self.prior.state(),
            "family": self.family.settings,
            "history": dict(vars(self.history)),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state; the chain goes on bit for bit."""
        self.labels = state["labels"]
        self.num_clusters = int(self.labels.max()) + 1
        self.sweeps = state["sweeps"]
        self.prior.load(state["prior"])
        vars(self.family).update(vars(type(self.family)(**state["family"])))
        self.history = History(**{k: list(v) for k, v in state["history"].items()})


class ExactChain(Chain):
    """Leaves the posterior of the partition invariant.

    Args:
        blocks: The points.
        prior: The prior of partitions.
        group: The group of each point.
        seed: The seed of the chain.
        labels: Where to start.
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
        self.sums = self.gather(self.labels, self.num_clusters)

    def statistics(self) -> Statistics:
        """The statistics of the clusters."""
        return self.sums

    def freeze(self) -> None:
        """Fix the number of proposals at the present number of clusters."""
        if self.proposals is None:
            self.proposals = self.num_clusters

    def sweep(self, *, moves: bool = True) -> None:
        """Weights, parameters, labels, then splits and merges."""
        rng = self.rng("hyperparameters")
        self.prior.resample(self.counts(), rng)
        self.family.resample(self.sums, rng)
        self._assign()
        if moves:
            count = self.num_clusters if self.proposals is None else self.proposals
            for p in range(count):
                split_merge.propose(self, p)
                if self.groups > 1:
                    split_merge.propose_in_group(self, p)
        self.record()

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
        self.sums = self.gather(self.labels, self.num_clusters)

    def state(self) -> dict[str, Any]:
        """The chain's state and the frozen number of proposals."""
        return {**super().state(), "sums": self.sums, "proposals": self.proposals}

    def load(self, state: dict[str, Any]) -> None:
        """Continue from a state."""
        super().load(state)
        self.sums, self.proposals = state["sums"], state["proposals"]


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
    accepted = torch.zeros(BATCHES, dtype=torch.bool)
    for b in range(BATCHES):
        after = counts + change[b]
        if bool((after > 0).all()):
            counts, accepted[b] = after, True
    return torch.where(accepted[batch], new, old)
