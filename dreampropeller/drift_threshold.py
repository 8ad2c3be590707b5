r"""A threshold on the relative error of the drift instead of the state.

A step may be accepted while the drift at its guess is close to the drift at its final
state, relative to the drift itself (Eq. 9 of `docs/method.md`). The estimate of that
error costs almost nothing: a slot that was not accepted is evaluated again at a new
guess, with the same step and random numbers, and the two drifts give a secant.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from statistics import median

import torch

from dreampropeller.checks import is_number, is_whole
from dreampropeller.component import FULL, Memory
from dreampropeller.rollout import Evaluation, Rollout
from dreampropeller.secants import (
    Measurement,
    believed,
    relative_error,
    upper_quartile,
)
from dreampropeller.threshold import Threshold
from dreampropeller.trajectory import Parents
from dreampropeller.tree import State, is_continuous, moving, norms, widened

RUNAWAY = 2
"""Norm of a drift, in units of recent anchors', beyond which it is no unit of errors.

Guesses that run away have huge drifts, which would make all errors look small.
"""
ANCHORS = 4
"""Number of those anchors, of which the largest counts: a single drift is noisy."""
ROUNDING = 64
"""Units in the last place below which a relative change of a drift is ignored."""
NARROW = 16
"""Longest window in which all drifts count in full: damping gains nothing there."""


@dataclass(frozen=True)
class DriftMemory(Memory):
    """Memory of a `DriftThreshold`.

    Attributes:
        held: Drifts of the steps that will be evaluated again, each with the distance
            from its guess to the next guess.
        moved: Displacement over the previous window, by tensor.
        own: Secants κ of the steps that were evaluated twice, by step.
        secants: Secants of the last iterations that measured any.
        age: Number of iterations since the last measurement.
        measured: Median error measured in this iteration; None if there was none.
        step: The anchor's step.
        anchors: Norms of the drifts of the last anchors where secants were measured,
            by tensor.
        fresh: Whether the structure has changed since the last iteration.
        first: Whether this iteration is the first that measured any secant.
        wide: Whether this iteration's window is wide enough to be damped.
    """

    held: dict[int, tuple[State, float]] = field(default_factory=dict, metadata=FULL)
    moved: dict[str, float] = field(default_factory=dict)
    own: dict[int, float] = field(default_factory=dict)
    secants: list[list[float]] = field(default_factory=list)
    age: int = 0
    measured: float | None = None
    step: int = 0
    anchors: list[dict[str, float]] = field(default_factory=list)
    fresh: bool = False
    first: bool = False
    wide: bool = False


@dataclass(frozen=True)
class DriftThreshold(Threshold[DriftMemory]):
    r"""Accept a guess while the relative error of its drift is at most δ (Eq. 9).

    With $g, g'$ the drifts of one step at two guesses that are $d$ apart (the root of
    the solver's norm) and $\lVert\cdot\rVert$ the root of the sum of squares,

    $$r_p = \frac{\lVert g'_p - g_p \rVert}
        {\max(\lVert g'_p \rVert,\, \mathrm{median}_i \lVert g_{i,p} \rVert)}, \qquad
      \kappa = \frac{1}{d} \Bigl(\sum_p a_p r_p^2\Bigr)^{1/2},
      \qquad \text{accept while}\quad \kappa\, d_i \le \delta ,$$

    over the tensors $p$ of the state, with $a_p$ the share of tensor $p$ in the squared
    displacement over the previous window: with an optimizer that scales gradients
    (Adam) the displacement follows the learning rate, not the gradient magnitude. For a
    single tensor $\kappa d$ is the Euclidean relative error, and it is close to it for
    plain gradient descent.

    $\kappa$ is the step's own if it was evaluated twice. Otherwise it is the upper
    quartile of the secants in the last `memory` iterations that measured any, each of
    these iterations with the weight of four secants at most. Timestep, noise and camera
    make the secants of different steps differ by a factor of two to three, those of one
    step by 1.3 to 1.5 (one standard deviation, measured, see `docs/results.md`), and
    they change along a run. Secants of guesses that ran away are raised to what others
    say (`secants.believed`). While there is no secant, one step is accepted; in the
    first iteration with secants half a window, but at least `hold_every` steps, because
    they were measured far from the states to come. When everything passes, the last
    slot is held back at intervals to measure one (`hold_every`), but never in a window
    of one step, which is `Sequential`; after a jump, slots are held back where that is
    free. With `Secant` the drifts are the corrected ones, so the remaining error
    counts.

    Errors of successive steps in one direction add up, while the noise in which each
    of them is small cancels. With `sums`, δ therefore bounds their sum along the
    accepted steps, too, relative to the sum of the drifts (Eq. 9b): with gradient
    descent, relative to the displacement. For drifts that point the same way it follows
    from the bound on each; where most of a drift is noise it is stricter.

    A drift that is still off by as much as itself after `Secant` corrected it says
    nothing of the way ahead, and wide windows overshoot with it. In windows of more
    than 16 steps the drift of a guess that did not pass is therefore used with the
    weight $1 / (1 + (\tilde e / h)^2)$, where $\tilde e$ is its estimated error and $h$
    is `half_weight` (Eq. 9c). Accepted steps have no such drift. Without an
    acceleration all drifts count in full.

    Limitations:

    - The bound does not see how much of a window's path was overshot (`Secant` does),
      nor what later steps make of an error (`PicardSolver` measures whether it grows).
    - Secants are measured over larger distances than those they are applied to, so a
      drift with jumps (an occupancy grid's refresh, a clipped gradient) is rated by its
      average slope. A drift that jumps over a tiny distance gives a secant that is much
      too large, for `memory` iterations. A sudden change between two measurements goes
      unnoticed.
    - A noisy drift weakens the bound: its norm, the unit here, is then larger than the
      relevant part, and it falls when views are added. The unit is at least the
      window's median (but at most twice the recent anchors' largest), so the error of
      a step with a small drift may exceed δ of its own.
    - A tensor with hardly any gradient that moves nevertheless (Adam) counts by its
      displacement, so the split of parameters into tensors matters.
    - The drifts of the slots that were not accepted are held, at most one state per
      slot.

    Args:
        value: Largest relative error δ of a drift, at least 0. 0 compares states
            bit by bit, as `FixedThreshold(0)` does.
        hold_every: Number of slots of which one is held back for a secant, at least 1:
            with window $w$, one slot in $\max(2, \lceil \mathtt{hold\_every} / w
            \rceil)$ iterations.
        memory: Number of iterations whose secants are kept.
        warmup: Number of steps at the start of a run that use δ / 4. While the shape is
            still forming, an error can lead to another shape (measured on
            hash grids, see `docs/results.md`). 0: the same δ from the start.
        sums: Whether δ also bounds the sum of errors along the accepted steps.
        half_weight: Error at which the drift of a guess that did not pass counts half
            in the guesses behind it, in windows of more than 16 steps with `Secant`
            (Eq. 9c), above 0; None: all count in full.
    """

    value: float = 0.2
    hold_every: int = 16
    memory: int = 4
    warmup: int = 0
    sums: bool = True
    half_weight: float | None = 0.5

    def __post_init__(self) -> None:
        if not (is_number(self.value) and 0 <= self.value < math.inf):
            raise ValueError(
                f"`value` is {self.value!r}: write the share of itself that "
                "a drift may be off by, such as 0.2 (0 reproduces the sequential run)."
            )
        half = self.half_weight
        if half is not None and not (is_number(half) and 0 < half < math.inf):
            raise ValueError(
                f"`half_weight` is {half!r}: write a number above 0, as 0.5, or None "
                "(`null`), and all drifts count in full."
            )
        for name, number, least in (
            ("hold_every", self.hold_every, 1),
            ("memory", self.memory, 1),
            ("warmup", self.warmup, 0),
        ):
            if not is_whole(number) or number < least:
                raise ValueError(
                    f"`{name}` is {number!r}: write a whole number, {least} or more."
                )

    @property
    def exact(self) -> bool:
        """Whether the tolerance is zero."""
        return self.value == 0

    @property
    def measures_guesses(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether secants are measured; a tolerance of zero needs none."""
        return not self.exact

    def init(self) -> DriftMemory:
        """The memory before any secant."""
        return DriftMemory()

    def before(self, memory: DriftMemory, evaluation: Evaluation) -> DriftMemory:
        """Measure the secants of the slots that were evaluated before."""
        first = evaluation.steps[0]
        own = {step: k for step, k in memory.own.items() if step >= first}
        wide = len(evaluation.steps) > NARROW
        memory = replace(memory, own=own, step=first, measured=None, wide=wide)
        if self.exact or not memory.held:
            return replace(memory, age=memory.age + 1, first=False)
        guesses, drifts = evaluation.guesses[:-1], evaluation.drifts
        parts = [_moving(y, drift) for y, drift in zip(guesses, drifts, strict=True)]
        sizes = [norms(part) for part in parts]
        # An anchor that is skipped has no drift.
        anchors = (
            [*memory.anchors, *sizes[:1]][-ANCHORS:] if sizes[0] else memory.anchors
        )
        measured = list(self._measurements(memory, evaluation, parts, sizes, anchors))
        known = bool(memory.secants)
        found: list[Measurement] = []
        for one, noise in measured:
            if not 0 < one.error < noise or not (known or found):
                found.append(one)
        new = believed(found, upper_quartile(memory.secants))
        secants = [*memory.secants, *([list(new.values())] if new else [])]
        return replace(
            memory,
            held={},
            own={**own, **new},
            secants=secants[-self.memory :],
            age=0 if measured else memory.age + 1,
            first=bool(new) and not known,
            measured=median(one.error for one, _ in measured) if measured else None,
            anchors=anchors,
        )

    def _measurements(
        self,
        memory: DriftMemory,
        evaluation: Evaluation,
        parts: Sequence[State],
        sizes: Sequence[dict[str, float]],
        anchors: Sequence[dict[str, float]],
    ) -> Iterator[tuple[Measurement, float]]:
        """Steps evaluated twice, and the rounding of their errors."""
        middle = {
            name: median(size[name] for size in sizes if name in size)
            for name in set().union(*sizes)
        }
        most = {
            name: RUNAWAY * max(size.get(name, 0.0) for size in anchors)
            for name in middle
        }
        for step, part, size in zip(evaluation.steps, parts, sizes, strict=True):
            if step not in memory.held:
                continue
            before, distance = memory.held[step]
            if not 0 < distance < math.inf or before.keys() != part.keys():
                continue
            change = norms({name: value - before[name] for name, value in part.items()})
            unit = {
                name: min(max(size[name], middle[name]), most[name] or math.inf)
                for name in part
            }
            error = self._relative(change, unit, memory.moved)
            if math.isfinite(error):
                yield Measurement(step, error, distance), _rounding(part)

    def _relative(
        self, change: dict[str, float], unit: dict[str, float], moved: dict[str, float]
    ) -> float:
        return relative_error(change, unit, moved)

    def bound(self, memory: DriftMemory) -> float:
        """The tolerance: δ, or δ / 4 during the warm-up."""
        return self.value / 4 if memory.step < self.warmup else self.value

    def error(self, memory: DriftMemory, step: int, distance: float) -> float:
        """The estimated relative error of the drift at a guess."""
        if self.exact:
            return distance
        if distance < 0:
            return math.nan
        known = memory.own
        secant = known[step] if step in known else upper_quartile(memory.secants)
        return secant * math.sqrt(distance)

    def weight(self, memory: DriftMemory, error: float) -> float:
        r"""The weight $1 / (1 + (\tilde e / h)^2)$ in wide windows.

        1 while errors are not known.
        """
        half = self.half_weight if memory.wide and not self.exact else None
        if half is None or not math.isfinite(error):
            return 1.0
        ratio = error / half
        return 1 / (1 + ratio * ratio)

    def most(self, memory: DriftMemory, length: int, remaining: int) -> int:
        """One step while there is no secant; one slot fewer when a secant is due.

        In the first iteration with secants half of a wide window is held back; in the
        first after a jump up to half, as far as this costs no iteration before the
        next jump.
        """
        if self.exact:
            return length
        if not memory.secants:
            return 1
        if memory.first and length < remaining:
            return min(length, max(self.hold_every, math.ceil(length / 2)))
        if memory.fresh and length < remaining:
            needed = remaining - (math.ceil(remaining / length) - 1) * length
            return max(needed, math.ceil(length / 2))
        # At a jump or the end no slot is left to be evaluated again.
        every = max(2, math.ceil(self.hold_every / length))
        due = memory.age >= every - 1 and length < remaining
        return max(1, length - 1) if due else length

    def limit(self, memory: DriftMemory, rollout: Rollout) -> int:
        """The longest stretch whose errors add up to at most δ (Eq. 9b)."""
        if not self.sums or self.exact or rollout.stride < 2:
            return rollout.stride
        slots = range(rollout.stride)
        drifts = [_moving(rollout.states[i], rollout.used[i]) for i in slots]
        errors = [0.0, *rollout.errors[: rollout.stride - 1]]  # the anchor is exact
        bound = self.bound(memory)

        def passes(sums: tuple[dict[str, float], State]) -> bool:
            error, total = sums
            relative = relative_error(error, norms(total), memory.moved)
            return relative <= bound or not any(error.values())

        *_, whole = _running_sums(errors, drifts)
        if passes(whole):
            return rollout.stride
        passed = [passes(sums) for sums in _running_sums(errors, drifts)]
        return max((slot + 1 for slot in slots if passed[slot]), default=1)

    def after(self, memory: DriftMemory, rollout: Rollout) -> DriftMemory:
        """Keep the drifts of the slots that will be evaluated again."""
        if self.exact:
            return memory
        held = {
            # Its next guess is the new state, at this distance from the old one.
            rollout.steps[slot]: (
                _moving(rollout.guesses[slot], rollout.corrected[slot]),
                math.sqrt(rollout.distances[slot - 1]),
            )
            for slot in rollout.repeated
            if rollout.distances[slot - 1] >= 0
        }
        first, last = rollout.states[0], rollout.states[-1]
        path = {n: last[n] - first[n] for n in moving(first, rollout.used[-1])}
        return replace(memory, held=held, moved=norms(path), fresh=False)

    def jumped(
        self, memory: DriftMemory, y: State, parents: Parents | None
    ) -> DriftMemory:
        """Keep the secants if the old rows are known, and measure new ones soon."""
        del y
        if parents is None:
            return self.init()
        return replace(memory, held={}, own={}, measured=None, anchors=[], fresh=True)

    def diagnostics(self, memory: DriftMemory) -> dict[str, float]:
        """The secant of a step without its own, and the last measured error."""
        if self.exact or not memory.secants:
            return {}
        found = {"secant": upper_quartile(memory.secants)}
        if memory.measured is not None:
            found["measured_drift_error"] = memory.measured
        return found


def _running_sums(
    errors: Sequence[float], drifts: Sequence[State]
) -> Iterator[tuple[dict[str, float], State]]:
    """After each drift, by tensor: the sum of absolute errors, and that of drifts."""
    error: dict[str, float] = {}
    total: State = {}
    for relative, drift in zip(errors, drifts, strict=True):
        for name, size in norms(drift).items():
            value = widened(drift[name])
            error[name] = error.get(name, 0.0) + relative * size
            total[name] = total[name] + value if name in total else value
        yield error, total


def _moving(y: State, drift: State) -> State:
    """The entries that measure a drift: those that move the state, if any does."""
    continuous = {n: v for n, v in drift.items() if is_continuous(v)}
    return moving(y, drift) or continuous


def _rounding(drift: State) -> float:
    return ROUNDING * max(
        (torch.finfo(value.dtype).eps for value in drift.values()), default=0.0
    )
