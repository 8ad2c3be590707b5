r"""Verification, before a run, that it will be the run it stands for.

From the state at which a solve begins,

- a drift is evaluated at two states and then again in reverse order, and
- an update is made twice from one carry,

with equal results: bitwise on a CPU; on a GPU within ten times the difference of one
evaluation repeated, or 1e-5 of the tensor's norm, whichever is larger. The second state
is that after one step; on a GPU it is the first one, moved by 1e-3 of each parameter's
norm, because Adam turns rounding errors of small gradients into full steps.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dreampropeller.rng import StepRandom
from dreampropeller.tree import (
    Aux,
    Nest,
    State,
    all_finite,
    copy_nest,
    device_of,
    differs,
    encode,
    is_continuous,
    moving,
    widened,
)

if TYPE_CHECKING:
    from dreampropeller.trajectory import Drift, Trajectory

TOLERANCE = 0.05
"""Largest deviation of a batched or split drift from that of the step by itself, as a
fraction of its norm. In single precision it is about 1e-5; half precision, times a
guidance scale of 100, reaches a few hundredths."""
_MOVED = 1e-3
_TOLERANCE = 1e-5
_NOISE = 10.0
_EVERY = 500


class NotReproducible(ValueError):
    """A step depends on more than its index and state; the message says on what."""


class EvaluationFailed(RuntimeError):
    """A drift raised an error, which the run itself will meet."""


@dataclass(frozen=True)
class Checked:
    """What was verified before a run.

    Attributes:
        steps: The steps that were evaluated.
        whole: Whether the module's own loop was compared, too.
        seconds: The time it took.
    """

    steps: tuple[int, ...]
    whole: bool
    seconds: float


@dataclass
class Probe:
    """Drifts at two states, and what follows from them.

    Attributes:
        steps: The two steps.
        states: The two states.
        drifts: Their drifts; one if the first is not finite.
        after: State and carry after each step.
        noise: Norm of the difference of one evaluation repeated, by entry.
    """

    steps: list[int]
    states: list[State]
    drifts: list[State] = field(default_factory=list)
    after: list[tuple[State, Nest]] = field(default_factory=list)
    noise: dict[str, float] = field(default_factory=dict)
    began: float = field(default_factory=time.perf_counter)

    def checked(self, whole: bool) -> Checked:
        """The report of a check that passed."""
        seconds = time.perf_counter() - self.began
        return Checked(tuple(self.steps), whole, seconds)


Cause = Callable[[], str]
"""Names what an evaluation has changed; a sentence, or nothing."""


def probe(
    trajectory: Trajectory[Any],
    step: int,
    y: State,
    carry: Nest,
    drift: Drift,
    cause: Cause = lambda: "",
) -> Probe:
    """Evaluate and update twice, and compare.

    Args:
        trajectory: The trajectory.
        step: The step at which the solve begins.
        y: The state at this step; it is not changed.
        carry: The carry; it is not changed.
        drift: The trajectory's drift.
        cause: Names what the evaluations have changed, for an error.

    Raises:
        NotReproducible: Two evaluations or updates differ; names the entries.
        EvaluationFailed: An evaluation raised an error.
    """
    following = step + 1 if trajectory.next_jump(step) > step + 1 else step
    following = min(following, trajectory.num_steps - 1)
    found = Probe([step], [y])
    first = _evaluate(drift, step, y)
    found.drifts.append(first)
    on_cpu = device_of(y).type == "cpu"
    if not on_cpu:
        again = _evaluate(drift, step, y)
        found.noise = {name: distance(first[name], again[name]) for name in first}
    if all_finite([first])[0]:
        after = _update_twice(trajectory, step, y, carry, first)
        second = after[0] if on_cpu else _moved(y, first)
        found.steps.append(following)
        found.states.append(second)
        found.after.append(after)
        found.drifts.append(_evaluate(drift, following, second))
    for index in reversed(range(len(found.steps))):
        one, at = found.steps[index], found.states[index]
        require_equal(
            found.drifts[index],
            _evaluate(drift, one, at),
            f"Step {one} was evaluated twice at the same state, before and after "
            "another",
            found.noise,
            cause,
        )
    return found


def second_update(trajectory: Trajectory[Any], found: Probe) -> None:
    """Add the update from the second state of a probe, where its drift is finite."""
    if len(found.drifts) == 2 and all_finite(found.drifts[1:])[0]:
        carry = copy_nest(found.after[0][1])
        step, y, drift = found.steps[1], found.states[1], found.drifts[1]
        with torch.no_grad():
            found.after.append(copy_nest(trajectory.update(step, y, carry, drift)))


def require_equal(
    one: Mapping[str, Tensor],
    two: Mapping[str, Tensor],
    what: str,
    noise: Mapping[str, float],
    cause: Cause = lambda: "",
) -> None:
    """Compare results by name; `noise` holds what rounding may do on a GPU.

    Raises:
        NotReproducible: They differ; names how, and the cause.
    """
    different = [
        name
        for name in {**one, **two}
        if name not in one
        or name not in two
        or not same(one[name], two[name], noise.get(name))
    ]
    if different:
        shown = ", ".join(f"`{name}`" for name in different[:5])
        more = f" and {len(different) - 5} more" if len(different) > 5 else ""
        raise NotReproducible(
            f"{what}, and the results differ in {shown}{more}. {cause() or _ADVICE} "
            "The solve would silently go astray, so it is refused; `check=False` "
            "leaves this check out."
        )


_ADVICE = (
    "Something besides step and state decides: an iterator that is advanced, a "
    "generator of its own, a counter or an average that a step changes. Take batches "
    "by the step's index, draw from torch's global generators (seeded for each step) "
    "or from `StepRandom`, and register what evolves as a buffer."
)


class Repeats:
    """Repeats one evaluation in 500 during a run.

    Args:
        noise: See `Probe`.
        cause: Names what evaluations have changed.
        evaluate: Evaluates a drift; default: calls it.
    """

    def __init__(
        self,
        noise: Mapping[str, float],
        cause: Cause,
        evaluate: Callable[[Drift, int, State], tuple[State, Aux]] | None = None,
    ) -> None:
        self._noise, self._cause, self._count = noise, cause, 0
        self._evaluate = evaluate or (lambda drift, step, y: drift(step, y))

    @property
    def is_exact(self) -> bool:
        """Whether evaluations are compared bitwise: no noise was measured."""
        return not any(self._noise.values())

    def evaluate(self, drift: Drift, step: int, y: State) -> tuple[State, Aux]:
        """Evaluate a drift, and now and then once more.

        Raises:
            NotReproducible: The two differ; names the entries.
        """
        found, aux = self._evaluate(drift, step, y)
        self._count += 1
        if self._count % _EVERY == 0:
            found = copy_nest(found)
            what = f"Step {step} was evaluated twice in a row at the same state"
            again, _ = drift(step, y)
            require_equal(found, again, what, self._noise, self._cause)
        return found, aux


def same(one: Tensor, two: Tensor, noise: float | None = None) -> bool:
    """Whether two tensors agree.

    Args:
        one: A tensor.
        two: Another one.
        noise: None: bitwise. On a GPU, the norm of the difference of one evaluation
            repeated: they may differ by ten times that, or by 1e-5 of the norm.
    """
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    if not bool(differs(one, two).any()):
        return True
    if noise is None or not is_continuous(one):
        return False
    zero = torch.zeros_like(one)
    return distance(one, two) <= max(_NOISE * noise, _TOLERANCE * distance(one, zero))


def distance(one: Tensor, two: Tensor) -> float:
    """The norm of a difference; zero for entries that are not continuous."""
    if not is_continuous(one) or one.shape != two.shape:
        return 0.0
    return float(torch.linalg.vector_norm((widened(one) - widened(two)).double()))


def deviation(found: State, wanted: State) -> float:
    """The norm of a difference of drifts, as a fraction; infinite if entries differ."""
    if found.keys() != wanted.keys() or any(
        found[name].shape != value.shape for name, value in wanted.items()
    ):
        return float("inf")
    off = sum(distance(found[name], value) ** 2 for name, value in wanted.items())
    size = sum(distance(0 * value, value) ** 2 for value in wanted.values())
    return (off / size) ** 0.5 if size else off**0.5


def _evaluate(drift: Drift, step: int, y: State) -> State:
    before = copy_nest(y)
    try:
        found, _ = drift(step, y)
    except NotReproducible:
        raise
    except Exception as error:
        raise EvaluationFailed from error
    refuse_written(step, y, before)
    return copy_nest(found)


def refuse_written(
    step: int, y: Mapping[str, Tensor], before: Mapping[str, Tensor]
) -> None:
    """Refuse that an evaluation has moved a state.

    Raises:
        NotReproducible: Names an entry that was written into.
    """
    written = [name for name in y if not same(y[name], before[name])]
    if written:
        raise NotReproducible(
            f"The evaluation of step {step} wrote into `{written[0]}` of the state "
            "itself, through `.data` or without gradients. Only the update may move "
            "a parameter: clamp it where it is read, or in the optimizer's `step`."
        )


def _update_twice(
    trajectory: Trajectory[Any], step: int, y: State, carry: Nest, drift: State
) -> tuple[State, Nest]:
    """The state and carry after a step, made twice from the same carry."""
    with torch.no_grad():
        after, memory = trajectory.update(step, y, copy_nest(carry), drift)
        after, memory = copy_nest(after), copy_nest(memory)
        again, other = trajectory.update(step, y, copy_nest(carry), drift)
    different = [n for n in after if n not in again or not same(after[n], again[n])]
    structures = [encode(one) for one in (memory, other)]
    if not different and structures[0][0] == structures[1][0]:
        pairs = zip(structures[0][1], structures[1][1], strict=True)
        different = [] if all(same(*pair) for pair in pairs) else ["carry"]
    elif not different:
        different = ["carry"]
    if different:
        raise NotReproducible(
            f"The update of step {step} was made twice from the same carry, and the "
            f"results differ in `{different[0]}`: the optimizer or scheduler remembers "
            "something outside of its attributes (a function's closure, a global "
            "name), or draws unseeded random numbers. Keep its memory in `self`, and "
            "draw from torch's global generators."
        )
    return after, memory


def _moved(y: State, drift: State) -> State:
    """A state nearby: each parameter moved by a share of its norm."""
    moved = dict(y)
    for name in moving(y, drift):
        value, random = y[name], StepRandom(0)
        noise = torch.randn(
            value.shape, generator=random.generator(0, f"check {name}")
        ).to(value)
        size = _MOVED * distance(value, torch.zeros_like(value))
        length = distance(noise, torch.zeros_like(noise))
        moved[name] = value + noise * (size / max(length, 1e-30))
    return moved


def names(changed: Collection[str]) -> str:
    """Some names in a sentence."""
    return ", ".join(f"`{name}`" for name in sorted(changed)[:5])


def listed(changed: Collection[str]) -> str:
    """Some names as a tuple in Python."""
    shown = ", ".join(f'"{name}"' for name in sorted(changed)[:5])
    return f"({shown},)" if len(changed) == 1 else f"({shown})"
