r"""The only loop: iterate a solver until the anchor reaches the last step."""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeVar

import torch

from dreampropeller import allocator, identity
from dreampropeller.dispatch.base import Dispatcher, InlineDispatcher
from dreampropeller.solution import (
    Iteration,
    NotConverged,
    Result,
    Solution,
    SolverState,
    Stats,
)
from dreampropeller.trajectory import Parents, Trajectory, next_jump
from dreampropeller.tree import State, all_finite, copy_nest

C = TypeVar("C")

NonFinite = Literal["raise", "skip"]


Listener = Callable[[SolverState[Any], Iteration], Any]
"""Called after each iteration; only `True` stops the solve."""


class NonFiniteDrift(ArithmeticError):
    """The drift at the anchor, an exact state, holds NaN or infinity."""


class Solver(abc.ABC):
    """How the anchor moves on."""

    def init(self, y: State, carry: Any) -> SolverState[Any]:
        """The solver's state at step 0."""
        return SolverState(step=0, y=y, carry=carry)

    @abc.abstractmethod
    def iterate(
        self,
        trajectory: Trajectory[Any],
        dispatcher: Dispatcher,
        state: SolverState[Any],
    ) -> tuple[SolverState[Any], Iteration]:
        """Move the anchor on, and not past the next jump.

        Raises:
            NonFiniteDrift: The drift at the anchor is not finite.
        """

    def adopt(self, state: SolverState[Any]) -> SolverState[Any]:
        """A state to continue from, perhaps left by a different solver."""
        return state

    def jumped(
        self, state: SolverState[Any], parents: Parents | None
    ) -> SolverState[Any]:
        """Adapt the solver's memory to a jump; guesses of the old structure go."""
        del parents
        return replace(state, guesses=[])


@dataclass(frozen=True)
class Sequential(Solver):
    """One step after the other: the baseline and the oracle.

    Args:
        non_finite: What to do with a drift that is not finite: "raise", or "skip" to
            leave the state as it is and go on (the step counts).
    """

    non_finite: NonFinite = "raise"

    def __post_init__(self) -> None:
        check_non_finite(self.non_finite)

    def iterate(
        self,
        trajectory: Trajectory[Any],
        dispatcher: Dispatcher,
        state: SolverState[Any],
    ) -> tuple[SolverState[Any], Iteration]:
        """Evaluate the drift of one step and apply it."""
        ((drift, aux),) = dispatcher.evaluate([state.step], [state.y])
        y, carry = state.y, state.carry
        if all_finite([drift])[0]:
            with dispatcher.timer.phase("update"), torch.no_grad():
                y, carry = trajectory.update(state.step, y, carry, drift)
        else:
            raise_or_skip(self.non_finite, state.step, drift)
        stats = Stats(state.stats.num_evaluations + 1, [*state.stats.strides, 1])
        after = SolverState(step=state.step + 1, y=y, carry=carry, stats=stats)
        seconds = dispatcher.timer.lap()
        return after, Iteration(state.step, 1, 1, (), None, (aux,), seconds)


def check_non_finite(non_finite: str) -> None:
    """Refuse anything but the two rules for drifts that are not finite."""
    if non_finite not in ("raise", "skip"):
        raise ValueError(
            f"`non_finite` is {non_finite!r}: write `raise` (end the solve) or `skip` "
            "(leave the step out and go on)."
        )


def raise_or_skip(non_finite: NonFinite, step: int, drift: State) -> None:
    """Raise for a non-finite drift at the anchor, unless the rule is to skip it."""
    if non_finite == "raise":
        names = [n for n, value in drift.items() if not all_finite([{n: value}])[0]]
        raise NonFiniteDrift(f"Step {step}: not finite in {', '.join(names)}.")


def solve(
    trajectory: Trajectory[C],
    solver: Solver,
    dispatcher: Callable[[Trajectory[Any]], Dispatcher] = InlineDispatcher,
    *,
    state: SolverState[C] | None = None,
    max_iterations: int | None = None,
    throw: bool = True,
    on_iteration: Listener | Sequence[Listener] | None = None,
) -> Solution[C]:
    """Solve a trajectory.

    Args:
        trajectory: What to solve.
        solver: How: `PicardSolver`, or `Sequential` for one step after the other.
        dispatcher: Where drifts are evaluated: a factory called with the trajectory (a
            `Dispatcher` class, or a `functools.partial` of one). It is opened and
            closed here.
        state: Where to continue from (`Solution.state`, or a checkpoint); it stays as
            it is. Default: step 0.
        max_iterations: Stop after so many iterations of this call.
        throw: Raise when the last step was not reached; else look at
            `solution.result`.
        on_iteration: Called after each iteration, one function or several, with the
            solver's state, to look at or to save but not to keep (its carry is
            consumed by the next iteration), and with what happened. A function that
            returns `True` stops the solve, any other value is ignored; on several
            ranks the answer of rank 0 counts.

    Returns:
        The solution.

    Raises:
        NotConverged: The last step was not reached and `throw` is set; what was
            reached is in its `solution`.
        AnotherProblem: `state` belongs to another problem.
        WorkerError: A rank failed (distributed dispatchers only).
    """
    listeners = [on_iteration] if callable(on_iteration) else on_iteration or ()
    detail = ""
    problem = trajectory.fingerprint()
    if state is not None:
        _check_problem(state, problem)
    with contextlib.ExitStack() as stack:
        workers = stack.enter_context(dispatcher(trajectory))
        state = _begin(trajectory, solver, workers, state)
        state.run, state.problem = state.run or identity.new_run(), problem
        stack.enter_context(allocator.reused(state.y))
        run, result, iterations = state.run, Result.SUCCESS, 0
        while state.step < trajectory.num_steps:
            if max_iterations is not None and iterations >= max_iterations:
                result = Result.MAX_ITERATIONS
                break
            jump = next_jump(trajectory, state.step)
            try:
                state, iteration = solver.iterate(trajectory, workers, state)
            except NonFiniteDrift as error:
                result, detail = Result.NON_FINITE, f" {error}"
                break
            iterations += 1
            state.run, state.problem = run, problem
            if state.step == jump < trajectory.num_steps:
                state = _jump(trajectory, solver, workers, state)
            answers = [listener(state, iteration) for listener in listeners]
            stop = any(answer is True for answer in answers)
            if workers.agree([stop])[0] and state.step < trajectory.num_steps:
                result = Result.STOPPED
                break
    solution = Solution(state.y, state.carry, result, state.stats, state)
    if throw and result in (Result.MAX_ITERATIONS, Result.NON_FINITE):
        raise NotConverged(
            f"{result.value} Reached step {state.step} of {trajectory.num_steps}."
            f"{detail}",
            solution,
        )
    return solution


def _begin(
    trajectory: Trajectory[Any],
    solver: Solver,
    dispatcher: Dispatcher,
    state: SolverState[Any] | None,
) -> SolverState[Any]:
    """The state of step 0, or a copy of the one to continue from."""
    if state is not None:
        return solver.adopt(replace(state, carry=copy_nest(state.carry)))
    y, carry = trajectory.init()
    state = solver.init(y, carry)
    if next_jump(trajectory, -1) == 0:
        state = _jump(trajectory, solver, dispatcher, state)
    return state


def _check_problem(state: SolverState[Any], problem: identity.Fingerprint) -> None:
    """Refuse a state of another problem; more steps than it began with may follow."""
    found = dict(state.problem)
    if found and found.get("num_steps", 0) <= problem["num_steps"]:
        found["num_steps"] = problem["num_steps"]
    identity.check(found, problem)


def _jump(
    trajectory: Trajectory[Any],
    solver: Solver,
    dispatcher: Dispatcher,
    state: SolverState[Any],
) -> SolverState[Any]:
    """Change the structure of the anchor at its step."""
    with torch.no_grad():
        y, carry, parents = trajectory.jump(state.step, state.y, state.carry)
    # The one broadcast of states: a jump that renders is not bitwise equal across GPUs.
    y, carry = dispatcher.share(y, carry)
    return solver.jumped(replace(state, y=y, carry=carry), parents)
