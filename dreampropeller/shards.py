r"""Shards of a step: some of its views, whose contributions add up to its drift.

A drift that is a sum over the $N$ views of a step is split over $V$ shards,

$$\mathrm{drift}(t, y) = \sum_{s=0}^{V-1} g_s(t, y),$$

added up in the order of the shards, so that the result does not depend on where they
were evaluated. It is that of the whole step up to the rounding of a sum in another
order. A step's random numbers are drawn for all its views, of which a shard takes its
own: they do not depend on the number of shards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreampropeller.rng import Draws, StepRandom
from dreampropeller.tree import Aux, State


@dataclass(frozen=True)
class Shard:
    """One of several slices of a step's views.

    Args:
        index: Index of the slice, from 0 to `count` − 1.
        count: The number of slices.
    """

    index: int = 0
    count: int = 1

    def of(self, views: int) -> slice:
        """The indices of its views.

        Slices differ by at most one view, the first ones are the longer; with fewer
        views than shards the last shards have none.

        Args:
            views: The number of views of the step.
        """
        each, more = divmod(views, self.count)
        begin = self.index * each + min(self.index, more)
        return slice(begin, begin + each + (self.index < more))


@dataclass(frozen=True)
class ShardRandom(StepRandom):
    """A shard's part of a step's random numbers; those of no view are as ever.

    Args:
        shard: The shard.
        views: The number of views of a step.
    """

    shard: Shard
    views: Callable[[int], int]

    def draws(
        self, step: int, stream: str | None, device: torch.device | str = "cpu"
    ) -> Draws:
        """See `StepRandom.draws`: drawn for all views, those of the shard returned."""
        whole = super().draws(step, stream, device)
        total = self.views(step)
        return Draws(whole.generator, whole.device, total, self.shard.of(total))


def added_up(parts: Sequence[tuple[State, Aux]]) -> tuple[State, Aux]:
    """The sum of shards' contributions, in their order; entries may be missing.

    What a single shard reports is taken as it is. Of booleans (whether a gradient
    overflowed) it is true that is true of any.

    Args:
        parts: Drift and scalars of each shard, of which none is changed.
    """
    total: State = {}
    for drift, _ in parts:
        for name, value in drift.items():
            total[name] = _plus(total[name], value) if name in total else value
    scalars: Aux = {}
    for _, aux in parts:
        for name, scalar in aux.items():
            scalars[name] = scalars.get(name, 0.0) + scalar
    return total, scalars


def _plus(one: Tensor, two: Tensor) -> Tensor:
    return one | two if one.dtype == torch.bool else one + two
