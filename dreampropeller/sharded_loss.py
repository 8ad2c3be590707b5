r"""Losses that are sums over the views of a step, and can be split between them.

A shard returns its part of the loss, $\ell = \sum_s \ell_s$: of a mean over $N$ views,
a shard with $n$ of them returns its own mean times $n / N$. A term that is divided by
something that all views count together, such as the rays that hit the object,

$$R = \sum_s A_s \Big/ \sum_s C_s,$$

is no such sum. Its shards return amounts $A_s$, whose gradients are kept apart, and
constant counts $C_s$; the quotient of the sums is taken where shards are added up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from dreampropeller.shards import added_up
from dreampropeller.tree import Aux, State

RATIO = "ratio/"
"""Prefix of a shard's entries that belong to a quotient of sums."""


@dataclass(frozen=True)
class Ratio:
    """A shard's part of a term that is a quotient of sums over views.

    Args:
        weight: Weight of the term in the loss, the same for all shards.
        amount: $A_s$, a differentiable scalar.
        count: $C_s$, a constant.
    """

    weight: float
    amount: Tensor
    count: Tensor | float


@dataclass(frozen=True)
class Contribution:
    """A shard's part of a step's loss.

    Args:
        loss: Its part of what is a sum over views, a scalar.
        aux: Scalars to log. Those of all shards are added up.
        ratios: The terms that are quotients of sums, by the name they are logged
            under. A logged "loss" is completed by them.
        seen: What a trajectory needs besides, such as the rendering.
    """

    loss: Tensor
    aux: Mapping[str, Any] = field(default_factory=dict)
    ratios: Mapping[str, Ratio] = field(default_factory=dict)
    seen: Any = None


@dataclass(frozen=True)
class ShardedLoss:
    """A loss that can be split between shards of a step's views.

    `OptimizationTrajectory.make_shard` splits it. `test_shards.py` shows one.

    Args:
        whole: The loss of a step, any that the trajectory takes.
        shard: Called with a shard's index and the number of shards; returns its loss:
            a function of the arguments of `whole` that returns a `Contribution`, or
            None where the shard has no views. It is called in the step's random scope,
            and draws numbers for all views before it takes its own.
        join: Adds up what shards logged; default: sums.
    """

    whole: Callable[[int, Any], Any]
    shard: Callable[[int, int], Callable[[int, Any], Contribution | None]]
    join: Callable[[Sequence[Aux]], Aux] | None = None

    def __call__(self, step: int, y: Any) -> Any:
        """The loss of the whole step."""
        return self.whole(step, y)


def scalars_of(part: Any, index: int) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The scalars that a shard differentiates, by name, and those that it logs.

    The sum over views has the name "".

    Args:
        part: What the shard's loss returned.
        index: The shard's index, for an error.
    """
    if part is None:
        return {}, {}
    if not isinstance(part, Contribution):
        raise TypeError(
            f"The loss of shard {index} returned a `{type(part).__name__}`: return "
            "`dreampropeller.Contribution(loss, aux)`, or None where it has no views."
        )
    # A shard whose rays hit nothing has a constant loss.
    scalars = {"": part.loss} if part.loss.requires_grad else {}
    aux = dict(part.aux)
    for name, ratio in part.ratios.items():
        if ratio.weight and ratio.amount.requires_grad:
            scalars[name] = ratio.weight * ratio.amount
        aux |= {f"{RATIO}{name}/{key}": value for key, value in vars(ratio).items()}
    return scalars, aux


def differentiated(
    scalars: Mapping[str, Tensor], gradients: Callable[[Tensor, bool], State]
) -> State:
    """The gradients of several scalars of one graph; of "" under their own names.

    Args:
        scalars: The scalars by name.
        gradients: Differentiates one; its second argument says whether the graph is
            needed once more.
    """
    found: State = {}
    for number, (name, scalar) in enumerate(scalars.items(), start=1):
        prefix = f"{RATIO}{name}/" if name else ""
        here = gradients(scalar, number < len(scalars))
        found |= {prefix + key: value for key, value in here.items()}
    return found


def joined(
    parts: Sequence[tuple[State, Aux]],
    join: Callable[[Sequence[Aux]], Aux] | None = None,
) -> tuple[State, Aux]:
    """The drift of a step from those of its shards, with quotients taken.

    Args:
        parts: Drift and scalars of each shard, in order.
        join: See `ShardedLoss`.
    """
    total, scalars = added_up(parts)
    if join is not None:
        ratios = {n: v for n, v in scalars.items() if n.startswith(RATIO)}
        own = [{n: v for n, v in aux.items() if n not in ratios} for _, aux in parts]
        scalars = {**join(own), **ratios}
    names = [
        name.removeprefix(RATIO).rpartition("/")[0]
        for name in scalars
        if name.startswith(RATIO) and name.endswith("/count")
    ]
    weights = {name: value for _, aux in parts for name, value in aux.items()}
    for name in names:
        prefix = f"{RATIO}{name}/"
        count, amount = scalars.pop(prefix + "count"), scalars.pop(prefix + "amount")
        del scalars[prefix + "weight"]  # the same on all shards, so no sum
        scalars[name] = amount / count if count else 0.0
        if "loss" in scalars:
            scalars["loss"] += weights[prefix + "weight"] * scalars[name]
        for key in [key for key in total if key.startswith(prefix)]:
            own_name, value = key.removeprefix(prefix), total.pop(key)
            value = value / count if count else torch.zeros_like(value)
            total[own_name] = total[own_name] + value if own_name in total else value
    return total, scalars
