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
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dreampropeller.acceleration.base import Acceleration
from dreampropeller.carries import Carries
from dreampropeller.component import Component
from dreampropeller.dispatch.base import Dispatcher
from dreampropeller.drift_threshold import DriftThreshold
from dreampropeller.error_growth import Growth
from dreampropeller.predictor import Predictor, as_predictor
from dreampropeller.rollout import Evaluation, Rollout, damped
from dreampropeller.solution import Iteration, SolverState
from dreampropeller.solver import NonFinite, Solver, check_non_finite, raise_or_skip
from dreampropeller.threshold import Threshold
from dreampropeller.timer import Timer
from dreampropeller.trajectory import Parents, Trajectory, next_jump
from dreampropeller.tree import Nest, State, all_finite, copy_nest, mean_square
from dreampropeller.tree import share_differing as exact_error
from dreampropeller.window import Window

_TELLING = 8  # iterations from which strides of one say something


@dataclass(frozen=True)
class PicardSolver(Solver):
    """Solve a window of steps at once, and slide it by the steps that converged.

    `FixedThreshold(0)`, or a window of 1 at any threshold, equals `Sequential` bit for
    bit on CPU; at threshold 0 the first k steps are exact after k iterations
    (`test_picard.py`).

    Args:
        window: Number of steps to evaluate and to accept.
        threshold: Error up to which a step counts as converged; default:
            `DriftThreshold`, which needs no tuning to the problem's scale.
        predictor: Initial guess of a new slot: "repeat_last", "momentum", "auto", or a
            `Predictor`.
        norm: Distance of a new state from its guess, a scalar tensor; default: the mean
            square over the floating entries (Eq. 6). A threshold of zero ignores it and
            compares every entry.
        non_finite: Rule for a non-finite drift at the anchor: "raise", or "skip" to
            leave the state unchanged and continue (the step counts). At a guess it
            only cuts the window, because a bad guess is not an error.
        acceleration: An `Acceleration`, which learns from past iterations. `Secant`
            corrects drifts to the states they are used at; `Anderson` corrects the
            guesses that did not pass, for smooth deterministic drifts. None: the
            published iteration.
        growth: Whether to measure if errors of guesses grow or are forgotten
            (`Stats.growth`), where the threshold measures guesses itself and so keeps
            their drifts anyway. It costs no evaluation, and one more state per slot
            that is evaluated again; at threshold 0 nothing is measured.
    """

    window: Window[Any]
    threshold: Threshold[Any] = field(default_factory=DriftThreshold)
    predictor: str | Predictor[Any] = "repeat_last"
    norm: Callable[[State, State], Tensor] = mean_square
    non_finite: NonFinite = "raise"
    acceleration: Acceleration[Any] | None = None
    growth: bool = True

    def __post_init__(self) -> None:
        for name, value, kind, example in (
            ("window", self.window, Window, "SlidingWindow(8)"),
            ("threshold", self.threshold, Threshold, "DriftThreshold(0.2)"),
            ("acceleration", self.acceleration, Acceleration | None, "Secant()"),
        ):
            if not isinstance(value, kind):
                raise TypeError(
                    f"`{name}` is {value!r}: write `PicardSolver({name}={example})`."
                )
        moves = self.acceleration is not None and self.acceleration.moves_guesses
        if moves and self.threshold.measures_guesses:
            threshold, acceleration = map(type, (self.threshold, self.acceleration))
            raise ValueError(
                f"`{threshold.__name__}` measures a drift again at the rolled-out "
                f"state, in whose place `{acceleration.__name__}` puts another: write "
                "`acceleration=Secant()`, or `threshold=FixedThreshold(1e-6)`, or "
                "leave the acceleration out."
            )
        if not self.window.reads_errors and not self.threshold.exact:
            window, threshold = (
                type(one).__name__ for one in (self.window, self.threshold)
            )
            raise ValueError(
                f"`{window}` accepts whole blocks without reading errors, and "
                f"`{threshold}` would cut them: write `threshold=FixedThreshold(0)`."
            )
        as_predictor(self.predictor)
        check_non_finite(self.non_finite)

    @property
    def components(self) -> dict[str, Component[Any]]:
        """The components that keep a memory, by their names in `SolverState`."""
        return {
            "threshold": self.threshold,
            "window": self.window,
            "predictor": as_predictor(self.predictor),
            "acceleration": self.acceleration or Acceleration(),
            "growth": Growth() if self._measures_growth else Component(),
        }

    @property
    def _measures_growth(self) -> bool:
        return (
            self.growth
            and self.threshold.measures_guesses
            and self.window.reads_errors
            and not self.threshold.exact
        )

    def init(self, y: State, carry: Any) -> SolverState[Any]:
        """The anchor at step 0, without guesses."""
        memories = {name: one.init() for name, one in self.components.items()}
        return replace(super().init(y, carry), **memories)

    def adopt(self, state: SolverState[Any]) -> SolverState[Any]:
        """Initialise memories that are missing or were left by another component."""
        fresh = {name: one.init() for name, one in self.components.items()}
        other = {
            name: memory
            for name, memory in fresh.items()
            if type(getattr(state, name)) is not type(memory)
        }
        return replace(state, **other)

    def jumped(
        self, state: SolverState[Any], parents: Parents | None
    ) -> SolverState[Any]:
        """Drop the guesses, and map the rows of the memories where possible."""
        memories = {
            name: one.jumped(getattr(state, name), state.y, parents)
            for name, one in self.components.items()
        }
        return replace(super().jumped(state, parents), **memories)

    def note(self, strides: Sequence[int]) -> str:
        """Whether windows gained nothing, and what to write instead."""
        window = self.window
        wide = window.reads_errors and window.length(window.init(), 0, 2) > 1
        if not wide or len(strides) < _TELLING or sum(strides) > 1.25 * len(strides):
            return ""
        return f"{len(strides)} iterations took {sum(strides)} steps: " + (
            "at threshold 0 guesses must agree bitwise, and hardly any did. Write "
            "`threshold=DriftThreshold(0.2)` to accept steps that agree closely."
            if self.threshold.exact
            else "drifts change too much from step to step. Lower the learning rate, "
            'try `predictor="auto", acceleration=Secant()`, or take `Sequential()`.'
        )

    def iterate(
        self,
        trajectory: Trajectory[Any],
        dispatcher: Dispatcher,
        state: SolverState[Any],
    ) -> tuple[SolverState[Any], Iteration]:
        """Evaluate, roll out, accept, predict."""
        timer = dispatcher.timer
        state = self._guess_anew(trajectory, state)
        evaluation = self._evaluate(trajectory, dispatcher, state)
        state = self._learn("before", state, evaluation, timer)
        bound = self.threshold.bound(state.threshold)

        roll_out = partial(self._roll_out, trajectory, timer, state, evaluation, bound)
        rollout, carries = roll_out()

        stride = self._accept(dispatcher, state, rollout, bound)
        if stride > rollout.undamped:  # rank 0 accepts what was damped here
            del rollout, carries
            rollout, carries = roll_out(accepted=stride)
        rollout = replace(rollout, stride=stride)
        carry = carries.at(trajectory, rollout)
        state = self._learn("after", state, rollout, timer)

        with timer.phase("predict"):
            state = self._predict(trajectory, dispatcher, state, rollout, carries.last)
        rate = state.growth.rate if state.growth is not None else None
        stats = state.stats.after(rollout.length, stride, rate)
        y = rollout.states[stride]
        after = replace(state, step=state.step + stride, y=y, carry=carry, stats=stats)
        return after, Iteration(
            begin=state.step,
            window=rollout.length,
            stride=stride,
            errors=tuple(rollout.errors),
            threshold=bound,
            aux=tuple(rollout.aux[:stride]),
            seconds=timer.lap(),
            diagnostics=self._diagnostics(after),
        )

    def _guess_anew(
        self, trajectory: Trajectory[Any], state: SolverState[Any]
    ) -> SolverState[Any]:
        """Guesses where there are none: after a jump, from what the predictor kept."""
        predictor = as_predictor(self.predictor)
        if state.guesses or not predictor.knows(state.predictor):
            return state
        remaining = next_jump(trajectory, state.step) - state.step
        guesses, memory = predictor.extend(
            trajectory,
            state.step,
            state.y,
            state.carry,
            state.predictor,
            self.window.length(state.window, state.step, remaining),
        )
        return replace(state, guesses=guesses, predictor=memory)

    def _evaluate(
        self,
        trajectory: Trajectory[Any],
        dispatcher: Dispatcher,
        state: SolverState[Any],
    ) -> Evaluation:
        """Act 1: the drifts of a window of guesses, up to the first non-finite one."""
        remaining = next_jump(trajectory, state.step) - state.step
        length = self.window.length(state.window, state.step, remaining)
        guesses = _fill([state.y, *state.guesses], length + 1)
        steps = range(state.step, state.step + length)
        found = dispatcher.evaluate(steps, guesses[:-1])
        length = len(found)  # an elastic dispatcher may leave out the tail
        steps, guesses = steps[:length], guesses[: length + 1]
        drifts = [drift for drift, _ in found]
        with dispatcher.timer.phase("finite"):
            finite = all_finite(drifts)
        if not finite[0]:
            raise_or_skip(self.non_finite, state.step, drifts[0])
            drifts[0] = {}
        usable = next((i for i in range(1, length) if not finite[i]), length)
        return Evaluation(
            steps=steps[:usable],
            guesses=guesses[: usable + 1],
            drifts=drifts[:usable],
            aux=[aux for _, aux in found[:usable]],
            length=length,
            remaining=remaining,
            skips=not finite[0],
        )

    def _learn(
        self, verb: str, state: SolverState[Any], seen: Evaluation, timer: Timer
    ) -> SolverState[Any]:
        """Update every component's memory, `before` or `after` the rollout."""
        memories: dict[str, Any] = {}
        for name, component in self.components.items():
            with timer.phase(name):
                memories[name] = getattr(component, verb)(getattr(state, name), seen)
        return replace(state, **memories)

    def _roll_out(
        self,
        trajectory: Trajectory[Any],
        timer: Timer,
        state: SolverState[Any],
        seen: Evaluation,
        bound: float,
        accepted: int = 1,
    ) -> tuple[Rollout, Carries]:
        """Act 2: roll out from the anchor, the accepted slots undamped, and compare."""
        most = self.threshold.most(state.threshold, len(seen.steps), seen.remaining)
        with timer.phase("rollout"):
            y, carry = state.y, copy_nest(state.carry)
        states, used, corrected = [y], [], []
        distances: list[float] = []
        errors: list[float] = []
        carries = Carries(start=state.carry)
        for slot, (step, drift) in enumerate(zip(seen.steps, seen.drifts, strict=True)):
            if self.acceleration is not None:
                with timer.phase("acceleration"):
                    if self.acceleration.needs_carries:
                        carries.all.append(copy_nest(carry))
                    # An exact guess needs no correction; adding zero makes 0 of −0.
                    if drift and any(distances[-1:]):
                        drift = self.acceleration.correct(
                            state.acceleration, drift, y, seen.guesses[slot]
                        )
            corrected.append(drift)
            # Without correction a stiff problem needs what the drifts far ahead say.
            doubted = self.acceleration is not None and slot >= accepted
            if doubted and not errors[-1] <= bound:
                with timer.phase("threshold"):
                    weight = self.threshold.weight(state.threshold, errors[-1])
                    drift = damped(drift, y, weight)
            used.append(drift)
            with timer.phase("update"), torch.no_grad():
                if seen.updates(slot):
                    y, carry = trajectory.update(step, y, carry, drift)
            states.append(y)
            with timer.phase("norm"):
                guess = seen.guesses[slot + 1]
                distance = self._distance(y, guess, trajectory, step + 1)
                error = self.threshold.error(state.threshold, step + 1, distance)
            distances.append(distance)
            errors.append(error)
            stops = not error <= bound or slot + 1 == most
            if stops and slot + 1 < len(seen.steps):
                with timer.phase("rollout"):
                    carries.keep(slot + 1, carry)
        carries.last = carry
        rollout = seen.rolled_out(
            states, used, errors, distances, carries.all, corrected=corrected
        )
        return rollout, carries

    def _accept(
        self,
        dispatcher: Dispatcher,
        state: SolverState[Any],
        rollout: Rollout,
        bound: float,
    ) -> int:
        """Act 3: the stride, decided by rank 0."""
        passed = [error <= bound for error in rollout.errors]
        proposed = self.window.stride(state.window, passed)
        length, remaining = len(rollout.steps), rollout.remaining
        most = self.threshold.most(state.threshold, length, remaining)
        proposed = min(proposed, most, rollout.undamped)
        passing = replace(rollout, stride=proposed)
        with dispatcher.timer.phase("threshold"):
            limit = self.threshold.limit(state.threshold, passing)
        return dispatcher.agree([min(proposed, limit)])[0]

    def _predict(
        self,
        trajectory: Trajectory[Any],
        dispatcher: Dispatcher,
        state: SolverState[Any],
        rollout: Rollout,
        last: Nest,
    ) -> SolverState[Any]:
        """Act 4: guesses of the next window, and the memories after them."""
        predictor = as_predictor(self.predictor)
        acceleration = self.acceleration or Acceleration()
        proposal = acceleration.propose(state.acceleration, trajectory, rollout)
        # Devices of different models may decide differently, so rank 0 decides.
        trusted, choice = dispatcher.agree(
            [proposal.trusted, predictor.choice(state.predictor)]
        )
        ahead = proposal.guesses(trusted)
        remaining = rollout.remaining - rollout.stride
        begin = state.step + rollout.stride
        wanted = self.window.length(state.window, begin, remaining) if remaining else 0
        guessed, memory = predictor.extend(
            trajectory,
            state.step + len(rollout.steps),
            ahead[-1] if ahead else rollout.states[-1],
            last,
            predictor.settle(state.predictor, choice),
            max(0, wanted - len(ahead)),
        )
        return replace(
            state,
            guesses=[*ahead, *guessed],
            predictor=memory,
            acceleration=proposal.memory,
        )

    def _diagnostics(self, state: SolverState[Any]) -> dict[str, float]:
        """The estimates of the components, by name."""
        return {
            key: value
            for name, component in self.components.items()
            for key, value in component.diagnostics(getattr(state, name)).items()
        }

    def _distance(
        self, new: State, old: State, trajectory: Trajectory[Any], step: int
    ) -> float:
        if self.threshold.exact:
            return float(exact_error(new, old))
        scale = trajectory.error_scale(step)
        distance = float(self.norm(new, old))
        return distance / scale if scale else float("inf")


def _fill(guesses: Sequence[State], count: int) -> list[State]:
    """The first `count` guesses; what is missing repeats the last one."""
    filled = list(guesses[:count])
    return filled + [filled[-1]] * (count - len(filled))
