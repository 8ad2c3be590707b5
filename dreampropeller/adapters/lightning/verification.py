r"""Verification on the live module that a solve will be its own training run.

Besides what every trajectory verifies (`dreampropeller.verification`), the steps of the
module's own loop are made: a step right after another, with the attributes that it
left, must agree with the step evaluated anew, and the optimizer's own steps with the
update. Where results differ, the batch entries and random streams that do are named.
"""

from __future__ import annotations

import hashlib
import random
import sys
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dreampropeller.count_check import Lists, refuse_growing
from dreampropeller.counters import Counters
from dreampropeller.precision import Precision
from dreampropeller.rng import set_streams
from dreampropeller.tree import Nest, State, copy_nest, tensors
from dreampropeller.verification import (
    Checked,
    EvaluationFailed,
    Probe,
    distance,
    names,
    probe,
    require_equal,
    same,
    second_update,
)
from dreampropeller.verification import NotReproducible as NotReproducible

if TYPE_CHECKING:
    from dreampropeller.adapters.lightning.trajectory import LightningTrajectory
    from dreampropeller.trajectory import Drift


def check(
    trajectory: LightningTrajectory, step: int, y: State, carry: Nest, drift: Drift
) -> Probe | None:
    """Compare steps with the module's own loop; see `Trajectory.check`.

    Raises:
        NotReproducible: Results differ. The message names the gradients, buffers,
            attributes, batch entries and random streams that do.
    """
    trajectory.host.begin(step, carry)
    try:
        found = probe(trajectory, step, y, carry, drift)
    except EvaluationFailed:
        return None
    except NotReproducible:
        _explain(trajectory, step, y)
        raise
    host = trajectory.host
    with host.optimizers.observed(host.module, host.settings.ignore):
        second_update(trajectory, found)
    with host.kept(y):
        _compare_steps(trajectory, found)
        _refuse_counters(trajectory, found)
    _compare_updates(trajectory, found, carry)
    trajectory.host.attributes.restore()
    return found


def verify(trajectory: LightningTrajectory) -> Checked | None:
    """Check a trajectory from its start, as `solve` does.

    Raises:
        NotReproducible: See `check`.
    """
    y, carry = trajectory.init()
    drift = trajectory.make_drift(torch.device("cpu"))
    found = check(trajectory, 0, y, carry, drift)
    return None if found is None else found.checked(whole=True)


def _explain(trajectory: LightningTrajectory, step: int, y: State) -> None:
    """Evaluate again, and name what differs besides the drift."""
    last = trajectory.num_steps - 1
    first = _probe(trajectory, step, y)
    _probe(trajectory, last, y)
    again = _probe(trajectory, step, y)
    _compare(first, again, f"Step {step} was evaluated before and after step {last}")


def _compare_steps(trajectory: LightningTrajectory, found: Probe) -> None:
    """A step after another must not depend on what that one left."""
    first, last = found.steps[0], trajectory.num_steps - 1
    y = found.states[0]
    _explain(trajectory, first, y)
    for step, state in ((found.steps[-1], found.states[-1]), (last, y)):
        if step in (0, first):
            continue
        fresh = _probe(trajectory, step, state)
        _probe(trajectory, step - 1, y)
        left = trajectory.host.attributes.changed()
        following = _probe(trajectory, step, state, restore=False)
        shown = names(left) or "none"
        _compare(
            fresh,
            following,
            f"Step {step} was evaluated afresh and right after step {step - 1}",
            f"Attributes that the step before had changed: {shown}. One of them "
            "remembers something of earlier steps: make it a buffer, or compute it "
            "from `global_step`.",
        )


def _refuse_counters(trajectory: LightningTrajectory, found: Probe) -> None:
    """Refuse numbers that grow with each evaluation, though not used yet."""
    host, state = trajectory.host, found.states[-1]
    if not host.counts:
        return

    def counters() -> Counters:
        return Counters(host.roots, host.module, ignore=host.settings.ignore)

    lists: Lists = {}
    for step in dict.fromkeys((found.steps[-1], trajectory.num_steps - 1)):

        def again(step: int = step) -> State:
            drift, _ = trajectory.probe(step, state, dict, restore=False)
            return copy_nest(drift)

        try:
            trajectory.probe(step, state, dict)
            _, lists = refuse_growing(
                step, counters, again, found.noise, lists, host.optimizers.ignored
            )
        except NotReproducible:
            raise
        except Exception:  # of the last step: the run will meet it, or not
            return


def _compare_updates(
    trajectory: LightningTrajectory, found: Probe, carry: Nest
) -> None:
    """Steps of the live optimizer, one after another, against the updates."""
    host = trajectory.host
    if not host.steps_itself:
        return
    host.optimizers.load(copy_nest(carry))
    with host.kept(found.states[0]), torch.no_grad():
        host.load(found.states[0])
        for index, (after, _) in enumerate(found.after):
            step, drift = found.steps[index], found.drifts[index]
            if index and host.device.type != "cpu":
                host.load(found.states[index])
            for name, parameter in host.parameters.items():
                gradient = drift.get(name)
                parameter.grad = None if gradient is None else gradient.clone()
            host.groups.set_by_hand(drift)
            with host.drawing(step):
                set_streams(drift)
                host.optimizers.step_in_place(
                    skip=Precision.overflowed(drift), due=host.due(step)
                )
            require_equal(
                {name: after[name] for name in host.parameters},
                {name: one.detach() for name, one in host.parameters.items()},
                f"The update of step {step} was compared with the optimizer's own "
                "step from the same gradients",
                {},
                lambda: (
                    "The optimizer or scheduler remembers something outside of its "
                    "attributes (a function's closure, a global name): keep it in "
                    "`self`."
                ),
            )
        host.clear_gradients()


def _probe(
    trajectory: LightningTrajectory, step: int, y: State, restore: bool = True
) -> dict[str, Any]:
    """The results of an evaluation by name: tensors, and a hash per random stream."""
    batches: list[Any] = []
    original = trajectory.host.batch

    def recording(step: int) -> Any:
        batches.append(original(step))
        return batches[-1]

    trajectory.host.batch = recording
    try:
        drift, streams = trajectory.probe(step, y, _streams, restore)
    finally:
        trajectory.host.batch = original
    found: dict[str, Any] = dict(streams)  # causes before their effects
    for batch in batches:
        named = batch if isinstance(batch, dict) else dict(enumerate(tensors(batch)))
        found |= {
            f"batch entry `{name}`": tensor.clone()
            for name, tensor in named.items()
            if isinstance(tensor, Tensor)
        }
    return {**found, **{f"drift of `{n}`": t.clone() for n, t in drift.items()}}


def _streams() -> dict[str, str]:
    """The state of each global random stream."""
    states: dict[str, bytes] = {
        "Python's `random`": repr(random.getstate()).encode(),
        "torch on CPU": torch.get_rng_state().numpy().tobytes(),
    }
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        states["numpy"] = repr(numpy.random.get_state()[1:3]).encode()
        states["numpy"] += numpy.random.get_state()[1].tobytes()
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["torch on GPU"] = torch.cuda.get_rng_state().numpy().tobytes()
    return {
        f"random stream of {name}": hashlib.blake2b(state).hexdigest()
        for name, state in states.items()
    }


def _compare(
    one: dict[str, Any], two: dict[str, Any], what: str, why: str = ""
) -> None:
    different = [
        name
        for name in {**one, **two}
        if name not in one or name not in two or not _same(one[name], two[name])
    ]
    if different:
        shown = ", ".join(different[:5]) + (" and more" * (len(different) > 5))
        raise NotReproducible(
            f"{what}, at the same state, and the results differ in: {shown}. {why} "
            "Picard iterations would silently go astray, so the run is refused."
        )


def _same(one: Any, two: Any) -> bool:
    if not isinstance(one, Tensor):
        return one == two
    if not isinstance(two, Tensor):
        return False
    return same(one, two, None if one.device.type == "cpu" else _noise(one))


def _noise(one: Tensor) -> float:
    """A GPU's kernels may add in another order."""
    return 1e-6 * distance(one, torch.zeros_like(one))
