r"""Seconds of a run, predicted from measured parts, for each division of its devices.

$N$ devices are $S$ steps × $V$ views. With a window of $w$ steps an iteration takes

$$s(S, V, w) = \lceil w / S \rceil\, \tau(V) + w\, u + c(S, V, w),$$

where $\tau(V)$ are the seconds of a drift whose views are in $V$ shards, $u$ those that
the solver needs per step of the window (update, comparison, prediction) and $c$ those
of communication: $m$ meetings of latency $\lambda$, and what a rank receives,

$$c = m \lambda + \bigl[(V - 1)\, k + w - k\bigr] D / \beta, \qquad
  k = \lceil w / S \rceil,$$

of drifts with $D$ bytes at $\beta$ bytes per second. A segment of $L$ steps between two
jumps takes $\lceil L / \bar n(w) \rceil$ iterations, with the mean stride $\bar n(w)$.
The sequential run takes $T\, (\tau(1) + u)$ seconds.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

MEETINGS = 5
"""Per iteration: the evaluation, the stride, the prediction, the state, the stop."""
MEETINGS_OF_VIEWS = 1
"""Further ones if views are split."""


@dataclass(frozen=True)
class Costs:
    r"""The parts of a run's time.

    Args:
        drift: $\tau$: seconds of the drift by its number of views, as a shard has
            them; of the whole step's, at least.
        rollout: $u$, seconds per step of a window.
        strides: $\bar n$: mean accepted steps per iteration, by window.
        segments: Numbers of steps between two jumps, or before the end.
        num_bytes: $D$.
        latency: $\lambda$, seconds.
        bandwidth: $\beta$, bytes per second.
    """

    drift: Mapping[int, float]
    rollout: float
    strides: Mapping[int, float]
    segments: Sequence[int]
    num_bytes: int = 0
    latency: float = 0.0
    bandwidth: float = math.inf

    def __post_init__(self) -> None:
        for name in ("drift", "strides", "segments"):
            if not getattr(self, name):
                raise ValueError(f"`{name}` is empty: measure at least one.")

    @property
    def num_views(self) -> int:
        """The number of views of a step."""
        return max(self.drift)

    @property
    def num_steps(self) -> int:
        """$T$."""
        return sum(self.segments)

    def seconds_of_drift(self, shards: int) -> float:
        r"""$\tau$: seconds of the largest of several shards.

        Between two measured numbers of views it is interpolated; below the smallest it
        is that of the smallest, as fixed costs remain.
        """
        views = math.ceil(self.num_views / shards)
        known = sorted(self.drift)
        place = bisect.bisect_left(known, views)
        if known[place] == views or place == 0:
            return self.drift[known[place]]
        low, high = known[place - 1], known[place]
        share = (views - low) / (high - low)
        return self.drift[low] + share * (self.drift[high] - self.drift[low])


@dataclass(frozen=True)
class Plan:
    """A division of devices, and what it is predicted to take.

    Attributes:
        steps: Steps evaluated at the same time, $S$.
        views: Shards of a step's views, $V$.
        window: $w$; 1 is the sequential run.
        seconds: Predicted seconds of the run.
        iterations: Predicted number of iterations.
    """

    steps: int
    views: int
    window: int
    seconds: float
    iterations: int

    @property
    def devices(self) -> int:
        """The devices in use."""
        return self.steps * self.views


def sequential(costs: Costs, views: int = 1) -> Plan:
    """The sequential run, perhaps with its views on several devices."""
    one = _iteration(costs, 1, views, 1)
    return Plan(1, views, 1, costs.num_steps * one, costs.num_steps)


def predicted(costs: Costs, steps: int, views: int, window: int) -> Plan:
    """The prediction for one division.

    Args:
        costs: Measured costs; `window` is one of their `strides`.
        steps: $S$.
        views: $V$.
        window: $w$.
    """
    stride = costs.strides[window]
    iterations = sum(math.ceil(length / stride - 1e-9) for length in costs.segments)
    seconds = iterations * _iteration(costs, steps, views, window)
    return Plan(steps, views, window, seconds, iterations)


def plans(costs: Costs, devices: int) -> Iterator[Plan]:
    """All predictions for at most so many devices, sequential runs among them.

    Only windows whose strides are known, with a step for every row.
    """
    for views in range(1, min(devices, costs.num_views) + 1):
        yield sequential(costs, views)
        for window in costs.strides:
            for steps in range(1, min(devices // views, window) + 1):
                if window > 1:
                    yield predicted(costs, steps, views, window)


def best(costs: Costs, devices: int) -> Plan:
    """The fastest division; of equally fast ones that with the fewest devices."""
    return min(plans(costs, devices), key=lambda one: (one.seconds, one.devices))


def received(steps: int, views: int, window: int) -> int:
    """The number of drifts that a rank of the first row receives per iteration."""
    slots = math.ceil(window / steps)
    return (views - 1) * slots + window - slots


def _iteration(costs: Costs, steps: int, views: int, window: int) -> float:
    """Seconds of an iteration."""
    slots = math.ceil(window / steps)
    seconds = slots * costs.seconds_of_drift(views) + window * costs.rollout
    if steps * views == 1:
        return seconds
    num_bytes = received(steps, views, window) * costs.num_bytes
    meetings = MEETINGS + MEETINGS_OF_VIEWS * (views > 1)
    return seconds + meetings * costs.latency + num_bytes / costs.bandwidth
