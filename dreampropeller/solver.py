r"""The only loop: iterate a solver until the anchor reaches the last step."""

from __future__ import annotations

import abc
import contextlib
import logging
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
)
from dreampropeller.trajectory import Parents, Trajectory, next_jump
from dreampropeller.tree import State, all_finite, copy_nest
from dreampropeller.verification import Checked

C = TypeVar("C")

NonFinite = Literal["raise", "skip"]


Listener = Callable[[SolverState[Any], Iteration], Any]
"""Called after each iteration; only `True` stops the solve."""


class NonFiniteDrift(ArithmeticError):
    """The drift at the anchor, an exact state, holds NaN or infinity."""


class Solver(abc.ABC):
    """A method that advances the anchor."""

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
        """Advance the anchor, at most to the next jump.

        Raises:
            NonFiniteDrift: The drift at the anchor is not finite.
        """

    def adopt(self, state: SolverState[Any]) -> SolverState[Any]:
        """Adapt a state to resume from, perhaps of a different solver."""
        return state

    def note(self, strides: Sequence[int]) -> str:
        """A sentence on strides that gained nothing; default: none."""
        del strides
        return ""

    def jumped(
        self, state: SolverState[Any], parents: Parents | None
    ) -> SolverState[Any]:
        """Adapt the solver's memory to a jump; drop guesses of the old structure."""
        del parents
        return replace(state, guesses=[])


@dataclass(frozen=True)
class Sequential(Solver):
    """One step after another: the baseline and the reference.

    Args:
        non_finite: Rule for a drift that is not finite: "raise", or "skip" to leave the
            state unchanged and continue (the step counts).
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
        stats = state.stats.after(1, 1)
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
    check: bool = True,
) -> Solution[C]:
    """Solve a trajectory.

    Args:
        trajectory: The trajectory to solve.
        solver: The method: `PicardSolver`, or `Sequential` for one step after another.
        dispatcher: Factory of the dispatcher that evaluates drifts, called with the
            trajectory (a `Dispatcher` class, or a `functools.partial` of one). The
            dispatcher is opened and closed here.
        state: State to resume from (`Solution.state`, or a checkpoint); it is not
            changed. Default: step 0.
        max_iterations: Largest number of iterations of this call.
        throw: Raise if the last step was not reached; otherwise check
            `solution.result`.
        on_iteration: One function or several, called after each iteration with the
            solver's state and an `Iteration`. The state may be read or saved but not
            kept, because the next iteration consumes its carry. A function that
            returns `True` stops the solve; any other value is ignored. On several
            ranks the return value on rank 0 counts.
        check: Verify first, on every rank, that steps are functions of their index and
            state, and that a module's own loop is the loop that is solved; see
            `Trajectory.check`. A batched dispatcher also compares a batch with single
            steps (`Dispatcher.verify`). These evaluations are not counted.

    Returns:
        The solution.

    Raises:
        NotConverged: The last step was not reached and `throw` is set; `solution` of
            the error holds the state reached.
        AnotherProblem: `state` belongs to another problem.
        NotReproducible: The check failed; the message says what to change.
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
        checked = None
        if check and state.step < trajectory.num_steps:
            checked = _check(trajectory, workers, state)
        run, result, iterations = state.run, Result.SUCCESS, 0
        while state.step < trajectory.num_steps:
            if max_iterations is not None and iterations >= max_iterations:
                result = Result.MAX_ITERATIONS
                break
            jump = next_jump(trajectory, state.step)
            try:
                state, iteration = solver.iterate(trajectory, workers, state)
            except NonFiniteDrift as error:
                result, detail = Result.NON_FINITE, f" {error} {trajectory.advice}"
                break
            iterations += 1
            state.run, state.problem = run, problem
            if state.step == jump < trajectory.num_steps:
                state = _jump(trajectory, solver, workers, state)
            workers.confirm(state.step, state.y)
            answers = [listener(state, iteration) for listener in listeners]
            stop = any(answer is True for answer in answers)
            if workers.agree([stop])[0] and state.step < trajectory.num_steps:
                result = Result.STOPPED
                break
    note = _say(solver.note(state.stats.strides[-iterations:] if iterations else []))
    if result is Result.NON_FINITE:
        note = trajectory.advice
    solution = Solution(state.y, state.carry, result, state.stats, state, checked, note)
    if throw and result in (Result.MAX_ITERATIONS, Result.NON_FINITE):
        raise NotConverged(
            f"{result.value} Reached step {state.step} of {trajectory.num_steps}."
            f"{detail}",
            solution,
        )
    return solution


def _check(
    trajectory: Trajectory[Any], dispatcher: Dispatcher, state: SolverState[Any]
) -> Checked | None:
    """Verify the steps, and that the dispatcher evaluates them as they are."""
    drift = dispatcher.drift(state.y)
    checked = trajectory.check(state.step, state.y, state.carry, drift)
    dispatcher.verify(state.step, state.y)
    dispatcher.timer.lap()  # not part of the first iteration
    return checked


def _say(note: str) -> str:
    """Show a note to the user, too."""
    if note:
        logging.getLogger("dreampropeller").warning(note)
    return note


def _begin(
    trajectory: Trajectory[Any],
    solver: Solver,
    dispatcher: Dispatcher,
    state: SolverState[Any] | None,
) -> SolverState[Any]:
    """The state at step 0, or a copy of the state to resume from."""
    if state is None:
        state, fresh = solver.init(*trajectory.init()), True
    else:
        # At the end of a shorter trajectory, the jump there was left out.
        fresh = state.problem.get("num_steps") == state.step < trajectory.num_steps
        state = solver.adopt(replace(state, carry=copy_nest(state.carry)))
    if fresh and next_jump(trajectory, state.step - 1) == state.step:
        state = _jump(trajectory, solver, dispatcher, state)
    dispatcher.confirm(state.step, state.y)
    return state


def _check_problem(state: SolverState[Any], problem: identity.Fingerprint) -> None:
    """Refuse a state of another problem; the number of steps may have grown."""
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
