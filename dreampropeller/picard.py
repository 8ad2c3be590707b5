r"""One generalised Picard iteration over a window of guessed states.

With the anchor $(y_t, c_t)$ exact and guesses $\hat y_{t+1}, \dots, \hat y_{t+w}$, an
iteration evaluates $g_i = \mathrm{drift}(t + i, \hat y_{t+i})$ for all slots at once
and rolls the recurrence out with them (Eqs. 2 and 3 of `docs/method.md`):

$$y_{i+1}, c_{i+1} = \mathrm{update}(t + i, y_i, c_i, g_i), \qquad
  e_i = \mathrm{norm}(y_{i+1}, \hat y_{t+i+1}) / \mathrm{error\_scale}(t + i + 1).$$

Steps are accepted up to and including the first error over the threshold (Eq. 4); the
remaining new states are the next guesses.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from dreampropeller.acceleration.anderson import Anderson
from dreampropeller.acceleration.secant import Secant
from dreampropeller.dispatch.base import Dispatcher
from dreampropeller.drift_threshold import DriftThreshold
from dreampropeller.predictor import Predictor, as_predictor
from dreampropeller.solution import Iteration, Stats
from dreampropeller.solver import (
    NonFinite,
    Solver,
    SolverState,
    check_non_finite,
    raise_or_skip,
)
from dreampropeller.threshold import Observation, Threshold
from dreampropeller.trajectory import Parents, Trajectory, next_jump
from dreampropeller.tree import Nest, State, all_finite, copy_nest, mean_square
from dreampropeller.tree import share_differing as exact_error
from dreampropeller.window import Window


@dataclass(frozen=True)
class PicardSolver(Solver):
    """Solve a window of steps at once, and slide on by the steps that converged.

    `FixedThreshold(0)`, or a window of 1 at any threshold, equals `Sequential` bit for
    bit on CPU; at threshold 0 the first k steps are exact after k iterations
    (`test_picard.py`).

    Args:
        window: How many steps to try and to accept.
        threshold: What error counts as converged; default: `DriftThreshold`, which
            needs no tuning to the problem's scale.
        predictor: How a new slot is guessed: "repeat_last", "momentum", "auto", or a
            `Predictor`.
        norm: Distance of a new state from its guess, a scalar tensor; default: the mean
            square over the floating entries (Eq. 6). A threshold of zero ignores it and
            compares every entry.
        non_finite: What to do with a drift that is not finite at the anchor: "raise",
            or "skip" to leave the state as it is and go on (the step counts). At a
            guess it only cuts the window: a bad guess is no error.
        acceleration: Learn from past iterations: `Secant` corrects drifts to the states
            they are used at; `Anderson` corrects the guesses that did not pass, for
            smooth deterministic drifts; None: the published iteration.
    """

    window: Window
    threshold: Threshold = field(default_factory=DriftThreshold)
    predictor: str | Predictor = "repeat_last"
    norm: Callable[[State, State], Tensor] = mean_square
    non_finite: NonFinite = "raise"
    acceleration: Secant | Anderson | None = None

    def __post_init__(self) -> None:
        for name, value, kind, example in (
            ("window", self.window, Window, "SlidingWindow(8)"),
            ("threshold", self.threshold, Threshold, "DriftThreshold(0.2)"),
        ):
            if not isinstance(value, kind):
                raise TypeError(
                    f"`{name}` is {value!r}: write `PicardSolver({name}={example})`."
                )
        if not isinstance(self.acceleration, Secant | Anderson | None):
            raise TypeError(
                f"`acceleration` is {self.acceleration!r}: write "
                "`PicardSolver(acceleration=Secant())`, `Anderson()`, or None for none."
            )
        learns = isinstance(self.threshold, DriftThreshold) and not self.threshold.exact
        if self._anderson is not None and learns:
            raise ValueError(
                "`DriftThreshold` measures a drift again at the rolled-out state, in "
                "whose place `Anderson` puts another: write `acceleration=Secant()`, "
                "or `threshold=FixedThreshold(1e-6)` (`solver.threshold.name=fixed "
                "solver.threshold.value=1e-6`), or leave the acceleration out."
            )
        as_predictor(self.predictor)
        check_non_finite(self.non_finite)

    @property
    def _secant(self) -> Secant | None:
        return self.acceleration if isinstance(self.acceleration, Secant) else None

    @property
    def _anderson(self) -> Anderson | None:
        return self.acceleration if isinstance(self.acceleration, Anderson) else None

    def init(self, y: State, carry: Any) -> SolverState[Any]:
        """The anchor at step 0, without guesses."""
        return replace(
            super().init(y, carry),
            threshold=self.threshold.init(),
            window=self.window.init(),
            predictor=as_predictor(self.predictor).init(),
            acceleration=self.acceleration and self.acceleration.init(),
        )

    def adopt(self, state: SolverState[Any]) -> SolverState[Any]:
        """Start the memories that another kind of solver did not keep, or kept else."""
        fresh = self.init(state.y, state.carry)
        missing = {
            name: getattr(fresh, name)
            for name in ("threshold", "window", "predictor", "acceleration")
            if not _same_kind(getattr(state, name), getattr(fresh, name))
        }
        return replace(state, **missing)

    def jumped(
        self, state: SolverState[Any], parents: Parents | None
    ) -> SolverState[Any]:
        """Drop the guesses; the predictor's memory follows the rows."""
        predictor = as_predictor(self.predictor)
        memory = predictor.remap(state.predictor, state.y, parents)
        return replace(
            super().jumped(state, parents),
            predictor=memory,
            threshold=self.threshold.jumped(state.threshold),
            acceleration=self.acceleration and self.acceleration.init(),
        )

    def iterate(
        self,
        trajectory: Trajectory[Any],
        dispatcher: Dispatcher,
        state: SolverState[Any],
    ) -> tuple[SolverState[Any], Iteration]:
        """Evaluate, roll out, accept, predict."""
        timer = dispatcher.timer
        limit = next_jump(trajectory, state.step)
        length = self.window.length(state.window, limit - state.step)
        guesses = _fill([state.y, *state.guesses], length + 1)
        steps = range(state.step, state.step + length)

        evaluated = dispatcher.evaluate(steps, guesses[:-1])
        drifts: list[State | None] = [drift for drift, _ in evaluated]
        with timer.phase("finite"):
            usable = self._usable(state.step, drifts)
        finite = [drift or {} for drift in drifts[:usable]]
        with timer.phase("threshold"):
            learnt = self.threshold.learn(
                state.threshold, steps[:usable], guesses[:usable], finite
            )
        most = self.threshold.limit(learnt, usable, limit - state.step)
        history, slopes = state.acceleration, {}
        if self._secant is not None:
            with timer.phase("accelerate"):
                history = self._secant.learn(
                    history, steps[:usable], guesses[:usable], finite
                )
                slopes = self._secant.slopes(history)
        with timer.phase("rollout"), torch.no_grad():
            rollout = self._roll_out(
                trajectory, state, guesses, drifts[:usable], slopes, learnt, most, timer
            )

        bound = self.threshold.bound(learnt)
        proposed = self.window.stride([error <= bound for error in rollout.errors])
        predictor = as_predictor(self.predictor)
        with timer.phase("predict"):
            memory = predictor.judge(state.predictor, state.step, rollout.states)
        stride, choice = dispatcher.agree(
            [min(proposed, most), predictor.choice(memory)]
        )
        window = self.window.adapt(state.window, length, stride)
        carry, end_carry = rollout.carry_at(trajectory, state, stride)
        ahead = rollout.states[stride + 1 :]
        if self._anderson is not None:
            with timer.phase("accelerate"):
                ahead, history = self._accelerated(
                    self._anderson,
                    trajectory,
                    dispatcher,
                    state,
                    guesses,
                    rollout,
                    stride,
                )
        accepted = [drift for drift in rollout.drifts[:stride] if drift is not None]
        with timer.phase("predict"):
            memory = predictor.settle(predictor.observe(memory, accepted), choice)
            step = state.step + stride
            wanted = self.window.length(window, limit - step) if step < limit else 0
            guessed, memory = predictor.extend(
                trajectory,
                state.step + usable,
                ahead[-1] if ahead else rollout.states[-1],
                end_carry,
                memory,
                max(0, wanted - len(ahead)),
            )
            ahead = [*ahead, *guessed]
        observation = Observation(
            steps=steps[:usable],
            guesses=guesses[: usable + 1],
            states=rollout.states,
            drifts=[drift or {} for drift in rollout.drifts],
            errors=rollout.errors,
            distances=rollout.distances,
            stride=stride,
        )
        with timer.phase("threshold"):
            adapted = self.threshold.adapt(learnt, observation)
        if self._secant is not None:
            history = self._secant.hold(history, replace(observation, drifts=finite))
        after = SolverState(
            step=step,
            y=rollout.states[stride],
            carry=carry,
            guesses=ahead,
            threshold=adapted,
            window=window,
            predictor=memory,
            acceleration=history,
            stats=Stats(
                state.stats.num_evaluations + length, [*state.stats.strides, stride]
            ),
        )
        return after, Iteration(
            begin=state.step,
            window=length,
            stride=stride,
            errors=tuple(rollout.errors),
            threshold=bound,
            aux=tuple(aux for _, aux in evaluated[:stride]),
            seconds=timer.lap(),
            diagnostics={
                **self.threshold.diagnostics(learnt),
                **predictor.diagnostics(memory),
            },
        )

    def _usable(self, step: int, drifts: list[State | None]) -> int:
        """Slots before the first bad guess; a skipped anchor's drift becomes None."""
        finite = all_finite([drift or {} for drift in drifts])
        if not finite[0]:
            raise_or_skip(self.non_finite, step, drifts[0] or {})
            drifts[0] = None
        return 1 + next(
            (i for i, ok in enumerate(finite[1:]) if not ok), len(drifts) - 1
        )

    def _roll_out(
        self,
        trajectory: Trajectory[Any],
        state: SolverState[Any],
        guesses: Sequence[State],
        drifts: Sequence[State | None],
        slopes: State,
        learnt: Nest,
        most: int,
        timer: Any,
    ) -> _Rollout:
        bound = self.threshold.bound(learnt)
        y, carry = state.y, copy_nest(state.carry)
        rollout = _Rollout(states=[y], drifts=[], carry=carry)
        for slot, drift in enumerate(drifts):
            step = state.step + slot
            if self._anderson is not None and self._anderson.order is not None:
                rollout.carries.append(copy_nest(carry))
            # An exact guess needs no correction; adding zero would turn −0 into 0.
            if drift and self._secant is not None and any(rollout.distances[-1:]):
                drift = self._secant.correct(slopes, drift, y, guesses[slot])
            rollout.drifts.append(drift)
            if drift is not None:
                with timer.phase("update"):
                    y, carry = trajectory.update(step, y, carry, drift)
            with timer.phase("norm"):
                distance = self._distance(y, guesses[slot + 1], trajectory, step + 1)
                error = self.threshold.error(learnt, step + 1, distance)
            rollout.states.append(y)
            rollout.distances.append(distance)
            rollout.errors.append(error)
            ends = not error <= bound or slot + 1 == most
            if rollout.kept is None and ends and slot + 1 < len(drifts):
                # The likely stride: the rollout past it must not touch this carry.
                rollout.kept = slot + 1, copy_nest(carry)
        rollout.carry = carry
        return rollout

    def _accelerated(
        self,
        anderson: Anderson,
        trajectory: Trajectory[Any],
        dispatcher: Dispatcher,
        state: SolverState[Any],
        guesses: Sequence[State],
        rollout: _Rollout,
        stride: int,
    ) -> tuple[list[State], Nest]:
        """The next guesses after a stride, and the history after this iteration."""
        ahead = rollout.states[stride + 1 :]
        if not ahead:
            return ahead, anderson.init()
        states = anderson.proposals(
            trajectory,
            state.step,
            guesses,
            rollout.drifts,
            rollout.carries,
            rollout.states,
        )
        corrected = anderson.correct(
            state.acceleration,
            state.step + stride,
            guesses[stride : len(states)],
            states[stride:],
        )
        # Devices of different makes may trust different corrections.
        (trusted,) = dispatcher.agree([corrected.trusted])
        plain = states[stride + 1 + trusted :]
        return [*corrected.guesses[:trusted], *plain], corrected.history

    def _distance(
        self, new: State, old: State, trajectory: Trajectory[Any], step: int
    ) -> float:
        if self.threshold.exact:
            return float(exact_error(new, old))
        scale = trajectory.error_scale(step)
        distance = float(self.norm(new, old))
        return distance / scale if scale else float("inf")


@dataclass
class _Rollout:
    """States, errors and carries rolled out from an anchor."""

    states: list[State]
    drifts: list[State | None]  # as they were used
    carry: Nest
    distances: list[float] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    kept: tuple[int, Nest] | None = None
    carries: list[Nest] = field(default_factory=list)

    def carry_at(
        self, trajectory: Trajectory[Any], state: SolverState[Any], stride: int
    ) -> tuple[Nest, Nest]:
        """The carry at the stride, and the one at the end of the rollout."""
        if stride == len(self.drifts):
            return self.carry, self.carry
        if self.kept is not None and self.kept[0] == stride:
            return self.kept[1], self.carry
        # A stride other than the first failure's (decided by rank 0, or by another kind
        # of window): repeat the rollout, which is deterministic, as far as the stride.
        carry = copy_nest(state.carry)
        with torch.no_grad():
            for slot, drift in enumerate(self.drifts[:stride]):
                if drift is not None:
                    _, carry = trajectory.update(
                        state.step + slot, self.states[slot], carry, drift
                    )
        return carry, self.carry


def _fill(guesses: Sequence[State], count: int) -> list[State]:
    """The first `count` guesses; what is missing repeats the last one."""
    filled = list(guesses[:count])
    return filled + [filled[-1]] * (count - len(filled))


def _same_kind(kept: Nest, fresh: Nest) -> bool:
    """Whether a memory was left by the same kind of component."""
    if isinstance(fresh, dict):
        return isinstance(kept, dict) and kept.keys() == fresh.keys()
    return type(kept) is type(fresh)
