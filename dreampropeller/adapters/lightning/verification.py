r"""Verification on the live module that a drift is a function of (step, state).

There are two checks. Step a evaluated before and after step b must agree bitwise: all
changes are restored, and every random stream is keyed. Step b right after step a, with
the attributes that a left, must agree with step b evaluated anew: nothing is restored
that the module is meant to keep.
"""

from __future__ import annotations

import hashlib
import random
import sys
from typing import Any

import torch
from torch import Tensor

from dreampropeller.adapters.lightning.trajectory import LightningTrajectory
from dreampropeller.tree import State, differs, tensors


class NotReproducible(ValueError):
    """A drift depends on more than its step and state; the message says on what."""


def verify(trajectory: LightningTrajectory) -> None:
    """Evaluate steps in different orders and compare bitwise.

    Args:
        trajectory: A trajectory that has not been started.

    Raises:
        NotReproducible: Two evaluations of the same step and state differ. The message
            names the gradients, buffers, batch entries and random streams that do.
    """
    y, _ = trajectory.init()
    last = trajectory.num_steps - 1
    first = _probe(trajectory, 0, y)
    fresh = _probe(trajectory, last, y)
    again = _probe(trajectory, 0, y)
    _compare(first, again, f"Step 0 was evaluated before and after step {last}", "")
    for step in dict.fromkeys((min(1, last), last)):
        if step == 0:
            continue
        fresh = _probe(trajectory, step, y)
        _probe(trajectory, step - 1, y)
        left = trajectory.host.attributes.changed()
        following = _probe(trajectory, step, y, restore=False)
        _compare(
            fresh,
            following,
            f"Step {step} was evaluated afresh and right after step {step - 1}",
            " Attributes that the step before had changed: "
            + _listed([f"`{name}`" for name in left])
            + ". One of them remembers something of earlier steps: make it a buffer, "
            "or compute it from `global_step`. If it holds numbers that were drawn at "
            "an earlier step, list these steps in `resolution_milestones` of the data "
            "set (threestudio), or draw them when the module is built.",
        )


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


def _compare(one: dict[str, Any], two: dict[str, Any], what: str, why: str) -> None:
    different = [
        name
        for name in {**one, **two}
        if name not in one or name not in two or not _same(one[name], two[name])
    ]
    if different:
        raise NotReproducible(
            f"{what}, at the same state, and the results differ in: "
            f"{_listed(different)}.{why} "
            "Picard iterations would silently go astray, so the run is refused."
        )


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return (", ".join(names[:most]) or "none") + more


def _same(one: Any, two: Any) -> bool:
    if not isinstance(one, Tensor):
        return one == two
    if one.shape != two.shape or one.dtype != two.dtype:
        return False
    return not bool(differs(one, two).any())
