r"""Changes of the buffers of a state, as part of the drift (Eq. 19).

A state holds tensors that are not optimised but evolve (an occupancy grid). The drift
reports the changes that the evaluation at the guess made, and the update writes them:

$$b \leftarrow \begin{cases} b' & \text{where } b' \ne \hat b \\ b & \text{else}
  \end{cases} \quad \text{(floating, boolean)}, \qquad
  b \leftarrow b + (b' - \hat b) \quad \text{(integers)}.$$
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from dreampropeller.tree import State, differs


def buffer_drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> State:
    """Changes of the buffers in an evaluation (Eq. 19); unchanged ones are absent.

    Args:
        before: The buffers at the guess.
        after: The state after the evaluation, with the same names among others.

    Returns:
        For floating and boolean buffers `name` (the new value) and `name/changed`
        (where it differs from the guess); for integer buffers the increment.

    Raises:
        ValueError: The evaluation changed a buffer's shape or type.
    """
    for name, old in before.items():
        new = after[name]
        if new.shape != old.shape or new.dtype != old.dtype:
            raise ValueError(
                f"The evaluation changed buffer `{name}` from {tuple(old.shape)} "
                f"{old.dtype} to {tuple(new.shape)} {new.dtype}; change the structure "
                "of a state in `Trajectory.jump`."
            )
    changed = {name: differs(after[name], old) for name, old in before.items()}
    if not changed:
        return {}
    touched = torch.stack([mask.any() for mask in changed.values()]).tolist()
    drift: State = {}
    for (name, mask), was_touched in zip(changed.items(), touched, strict=True):
        if not was_touched:
            continue
        new = after[name]
        if new.is_floating_point() or new.is_complex() or new.dtype == torch.bool:
            drift[name], drift[f"{name}/changed"] = new, mask
        else:
            drift[name] = new - before[name]
    return drift


def updated_buffers(y: State, drift: State) -> State:
    """The buffers that an update writes (Eq. 19): those with a change in the drift."""
    written: State = {}
    for name, value in drift.items():
        if name not in y:
            continue
        if f"{name}/changed" in drift:
            written[name] = torch.where(drift[f"{name}/changed"], value, y[name])
        elif not value.is_floating_point() and not value.is_complex():
            written[name] = y[name] + value
    return written
