"""Measures what the cost model needs (`dreampropeller.cost_model`)."""

from __future__ import annotations

import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from dreampropeller.cost_model import MEETINGS
from dreampropeller.dispatch.base import InlineDispatcher
from dreampropeller.dispatch.distributed import DistributedDispatcher
from dreampropeller.dispatch.process_group import local_device
from dreampropeller.picard import PicardSolver
from dreampropeller.solution import Iteration
from dreampropeller.solver import solve
from dreampropeller.threshold import FixedThreshold
from dreampropeller.trajectory import Drift, Trajectory, next_jump
from dreampropeller.tree import State, device_of
from dreampropeller.window import SlidingWindow

REPEATED = 3
"""Evaluations that are timed, after a first one that is not."""
_LEAST_SENT = 1 << 23
"""Bytes whose transfer takes longer than the scatter of a meeting."""
_ALONE = ("drift", "communication")
"""The phases of an iteration that are not the solver's own."""


@dataclass(frozen=True)
class Observed:
    """What iterations of a solve took.

    Attributes:
        strides: Mean accepted steps per iteration, by window up to the solver's.
        rollout: Seconds of the solver itself per step of a window.
        communication: Seconds of communication per iteration.
    """

    strides: dict[int, float] = field(default_factory=dict)
    rollout: float = 0.0
    communication: float = 0.0


def segments(trajectory: Trajectory[Any]) -> list[int]:
    """The numbers of steps between two jumps, or before the end."""
    ends = [0]
    while ends[-1] < trajectory.num_steps:
        ends.append(next_jump(trajectory, ends[-1]))
    return [end - begin for begin, end in itertools.pairwise(ends)]


def seconds_of(drift: Drift, step: int, y: State) -> tuple[float, float]:
    """Seconds of a first evaluation, and the median of the next."""
    spent = []
    for _ in range(1 + REPEATED):
        begin = time.perf_counter()
        drift(step, y)
        if device_of(y).type == "cuda":
            torch.cuda.synchronize(device_of(y))
        spent.append(time.perf_counter() - begin)
    return spent[0], statistics.median(spent[1:])


def drift_by_views(
    trajectory: Trajectory[Any], y: State, num_views: int, whole: float
) -> dict[int, float]:
    """Seconds of the drift of a step, and of its largest shard for 2, 4, 8, … shards.

    Args:
        trajectory: The trajectory.
        y: The state at step 0, on the device to measure.
        num_views: Number of views of a step; 1: they cannot be split.
        whole: Seconds of the whole step.
    """
    found, count = {num_views: whole}, 2
    while count <= num_views:
        views = -(-num_views // count)
        if views not in found:
            drift = trajectory.make_shard(device_of(y), 0, count)
            found[views] = seconds_of(drift, 0, y)[1]
        count *= 2
    return found


def observed(iterations: Sequence[Iteration]) -> Observed:
    """What the iterations of a run say about strides and costs.

    The stride at a smaller window is that of a larger one, cut there: the first guesses
    are the same. The first iteration is left out, as its guesses are, unless it is the
    only one.

    Args:
        iterations: The first iterations of a run, as `on_iteration` receives them.
    """
    used = list(iterations)[1:] or list(iterations)
    most = max(one.window for one in used)
    sizes = {1, most} | {2**k for k in range(1, most.bit_length()) if 2**k < most}
    whole = [one for one in used if one.window == most]  # not cut at a jump
    own = [
        sum(s for name, s in one.seconds.items() if name not in _ALONE) / one.window
        for one in used
    ]
    return Observed(
        {
            size: statistics.fmean(min(one.stride, size) for one in whole)
            for size in sorted(sizes)
        },
        statistics.median(own),
        statistics.median(one.seconds.get("communication", 0.0) for one in used),
    )


def observe(
    trajectory: Trajectory[Any],
    solver: PicardSolver,
    count: int,
    dispatcher: Callable[[Any], Any] = InlineDispatcher,
) -> Observed:
    """Make the first iterations of a run, and say what they took.

    Args:
        trajectory: The trajectory.
        solver: The solver, with the largest window of interest.
        count: Number of iterations, a first one included.
        dispatcher: As for `solve`.
    """
    seen: list[Iteration] = []

    def note(_: Any, iteration: Iteration) -> None:
        seen.append(iteration)

    solve(
        trajectory,
        solver,
        dispatcher,
        max_iterations=count,
        throw=False,
        check=False,
        on_iteration=note,
    )
    return observed(seen)


class _Sending(Trajectory[None]):
    """Drifts of a number of bytes, which nobody has to wait for."""

    num_steps = 16

    def __init__(self, num_bytes: int, device: torch.device) -> None:
        self._sent = torch.zeros(num_bytes, dtype=torch.uint8, device=device)

    def init(self) -> tuple[State, None]:
        return {"x": torch.zeros(1, device=self._sent.device)}, None

    def make_drift(self, device: torch.device) -> Drift:
        return lambda step, y: ({"sent": self._sent}, {})

    def update(
        self, step: int, y: State, carry: None, drift: State
    ) -> tuple[State, None]:
        return dict(y), carry


def communication(num_bytes: int) -> tuple[float, float]:
    """Latency of a meeting and bytes per second; called on each rank of a group.

    Args:
        num_bytes: Size of a drift.
    """
    device = local_device()
    solver = PicardSolver(SlidingWindow(2), FixedThreshold(1.0))
    spread = functools.partial(DistributedDispatcher, timeout=600.0)
    size = max(num_bytes, _LEAST_SENT)
    seconds = [
        observe(_Sending(count, device), solver, 8, spread).communication
        for count in (1, size)
    ]
    latency = seconds[0] / MEETINGS
    return latency, size / max(seconds[1] - seconds[0], 1e-9)


def bytes_of(drift: Iterable[torch.Tensor]) -> int:
    """The size of a drift."""
    return sum(tensor.nbytes for tensor in drift)
