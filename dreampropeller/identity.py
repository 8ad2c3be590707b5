"""Identity of the run and of the problem that a solver state belongs to.

A run has a random name. A problem has a *fingerprint*: the values that must agree for a
state to be resumed, as a mapping of JSON values. Solver, dispatcher and a larger number
of steps may differ, because they do not change the trajectory itself.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from typing import Any, TypeAlias

import torch

Fingerprint: TypeAlias = dict[str, Any]


class AnotherProblem(ValueError):
    """The state to resume from belongs to another problem."""


def new_run() -> str:
    """A name for a new run."""
    return uuid.uuid4().hex


def check(found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Refuse to resume from a state of another problem.

    Args:
        found: Fingerprint of the state; empty if unknown.
        wanted: Fingerprint of the trajectory.

    Raises:
        AnotherProblem: Names the differences.
    """
    differ = differences(found, wanted) if found else ""
    if differ:
        raise AnotherProblem(
            f"This state belongs to another problem: {differ}. Continue it with "
            "the trajectory it came from, or start from step 0 without `state`. To "
            "continue on purpose, write `state=dataclasses.replace(state, problem={})`."
        )


def differences(before: Any, now: Any, most: int = 6) -> str:
    """Differences of two nests, such as "`lr` was 0.1 and is 0.2"; empty if equal."""
    old, new = flat(before), flat(now)
    differ = [
        f"`{name}` was {old.get(name, 'absent')!r} and is {new.get(name, 'absent')!r}"
        for name in sorted(old.keys() | new.keys())
        if old.get(name) != new.get(name)
    ]
    more = [f"{len(differ) - most} more"] if len(differ) > most else []
    return "; ".join([*differ[:most], *more])


def flat(value: Any, where: str = "") -> dict[str, Any]:
    """The leaves of a nest of mappings and sequences by dotted name."""
    if isinstance(value, Mapping):
        children = [(str(name), child) for name, child in value.items()]
    elif isinstance(value, (list, tuple)):
        children = [(str(index), child) for index, child in enumerate(value)]
    else:
        return {where: value}
    leaves: dict[str, Any] = {}
    for name, child in children:
        leaves |= flat(child, f"{where}.{name}" if where else name)
    return leaves


def plain(value: Any) -> Any:
    """A value as JSON; tensors and other objects by their description."""
    if isinstance(value, Mapping):
        return {str(name): plain(child) for name, child in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(child) for child in value]
    if isinstance(value, torch.Tensor):
        return plain(value.tolist()) if value.numel() == 1 else shape_of(value)
    if value is None or isinstance(value, bool | int | float | str):
        return value
    return type(value).__qualname__


def shape_of(tensor: torch.Tensor) -> str:
    """Type and shape of a tensor, such as ``float32 (3, 4)``."""
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"
