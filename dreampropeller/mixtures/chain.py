"""The Markov chain over partitions: the common base of both methods."""

from __future__ import annotations

import abc
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dreampropeller.mixtures.blocks import Blocks
from dreampropeller.mixtures.family import Statistics, total
from dreampropeller.mixtures.passes import statistics_pass
from dreampropeller.mixtures.priors import PartitionPrior
from dreampropeller.mixtures.random import generator


@dataclass
class History:
    """One entry per sweep."""

    num_clusters: list[int] = field(default_factory=list)
    log_joint: list[float] = field(default_factory=list)
    concentration: list[float] = field(default_factory=list)


class Chain(abc.ABC):
    """Labels, their statistics and the prior's weights, advanced by `sweep`.

    Args:
        blocks: The points.
        prior: The prior of partitions.
        group: The group of each point, shape ``(points,)``; zeros without groups.
        seed: The seed of the chain.
        labels: Initial labels, shape ``(points,)``; every label below the largest one
            has a point.
    """

    sums: Statistics
    """Of the clusters, or of what the method divides them into."""

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
    def refresh(self) -> None:
        """Compute the statistics anew, for other points or another prior mean."""

    @abc.abstractmethod
    def sweep(self, *, moves: bool = True) -> None:
        """One sweep; without `moves` the number of clusters is fixed."""

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
            "family": self.family.state(),
            "history": dict(vars(self.history)),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Resume from a state; with the same settings the chain continues bit for bit.

        Settings are not part of a state: fixed concentrations, the prior of the
        components and the number of proposals stay as they are here.
        """
        self.labels = state["labels"]
        self.num_clusters = int(self.labels.max()) + 1
        self.sweeps = state["sweeps"]
        self.prior.load(state["prior"])
        self.family.load(state["family"])
        self.history = History(**{k: list(v) for k, v in state["history"].items()})
