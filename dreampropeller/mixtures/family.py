r"""Conjugate families of mixture components.

A family has a likelihood $f(x \mid \theta)$ and its conjugate prior $H$. Points enter
through sums, the *statistics* of a set, in float64; densities are float32.
`log_marginal` is $\ln f(X) = \ln \int \prod_{x \in X} f(x \mid \theta)\, dH(\theta)$.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

Statistics: TypeAlias = dict[str, Tensor]
"""Sums over sets of points, float64, one row per set; `n` is the number of points."""
Params: TypeAlias = dict[str, Tensor]
"""Components' parameters as the density needs them, float64, one row per component."""
Block: TypeAlias = dict[str, Any]
"""Rows of the data as the family wants them, on one device."""


def add(a: Statistics, b: Statistics) -> Statistics:
    """The statistics of a disjoint union, set by set."""
    return {name: a[name] + b[name] for name in a}


def take(statistics: Statistics, index: Sequence[int] | Tensor) -> Statistics:
    """The statistics of some of the sets; an index may repeat."""
    rows = torch.as_tensor(index, dtype=torch.long)
    return {name: value[rows] for name, value in statistics.items()}


def join(parts: Sequence[Statistics]) -> Statistics:
    """Several collections of sets as one."""
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]}


def total(parts: Sequence[Statistics]) -> Statistics:
    """Partial sums added in the order given, which fixes every bit of the result."""
    result = parts[0]
    for part in parts[1:]:
        result = add(result, part)
    return result


def segments(key: Tensor, num: int) -> tuple[Tensor, list[int]]:
    """Rows sorted by key, and where each key's rows begin; negative keys left out.

    Returns:
        The order ``(rows,)`` and ``num + 1`` boundaries in it.
    """
    order = torch.argsort(key, stable=True)
    counts = torch.bincount(key[key >= 0], minlength=num)
    order = order[len(key) - int(counts.sum()) :]
    ends = [0, *torch.cumsum(counts, 0).tolist()]
    return order, ends


class Family(abc.ABC):
    """A likelihood with its conjugate prior, resolved for a data set."""

    name: str
    dim: int

    @abc.abstractmethod
    def block(self, x: Any, device: torch.device | str = "cpu") -> Block:
        """Prepare rows of the data for `statistics` and the densities."""

    @abc.abstractmethod
    def rows(self, block: Block, index: Tensor) -> Block:
        """Some rows of a block, as a block."""

    @abc.abstractmethod
    def statistics(self, block: Block, key: Tensor, num: int) -> Statistics:
        """The statistics of the sets ``key == 0 .. num - 1``, without negative keys."""

    @abc.abstractmethod
    def log_marginal(self, statistics: Statistics) -> Tensor:
        r"""$\ln f(X)$ of each set, shape ``(sets,)``."""

    def resample(self, statistics: Statistics, rng: np.random.Generator) -> None:
        """Draw the random parameters of the prior, given the clusters' statistics."""
        del statistics, rng  # nothing is, by default

    def state(self) -> dict[str, Any]:
        """What `resample` has drawn."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take over what is drawn here too; what is fixed here stays."""
        del state

    @abc.abstractmethod
    def draw(self, statistics: Statistics, rng: np.random.Generator) -> Params:
        r"""$\theta$ of each set from its posterior."""

    @abc.abstractmethod
    def predictive(self, statistics: Statistics) -> Params:
        """Parameters of the posterior predictive of one more point of each set."""

    @abc.abstractmethod
    def log_likelihood(self, block: Block, params: Params) -> Tensor:
        """Log densities, shape ``(components, rows)``, float32."""

    @abc.abstractmethod
    def halves(
        self, statistics: Statistics, rng: np.random.Generator, principal: Tensor
    ) -> tuple[Params, Params]:
        """Two components that cut each set into halves, from its sums alone.

        Args:
            statistics: The sets, ``(sets,)`` rows.
            rng: Source of the cut's direction.
            principal: Cut across the direction of largest variance instead of a random
                one, where the family knows it; shape ``(sets,)``, boolean.
        """

    @abc.abstractmethod
    def seeds(self, anchors: Statistics, pooled: Statistics) -> Params:
        """Two components centred on two points, as wide as the set around them.

        Args:
            anchors: The statistics of the two points, each a set of one.
            pooled: The statistics of the set that holds both, one row.
        """

    @abc.abstractmethod
    def simulate(self, params: Params, labels: Tensor, rng: np.random.Generator) -> Any:
        """Draw a point from each label's component, shape ``(points, dim)``."""

    @property
    @abc.abstractmethod
    def settings(self) -> dict[str, Any]:
        """Tensors and numbers that determine the prior."""

    def restore(self, settings: dict[str, Any]) -> None:
        """Take over what another machine may have rounded otherwise."""
        del settings  # nothing is computed from the data, by default
