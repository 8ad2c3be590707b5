r"""Settings of an optimizer's groups (the learning rate) inside of a step.

A step of Lightning's loop may read and set them by hand, through `trainer.optimizers`
or a reference of its own. The drift of step t therefore sees the live optimizer in the
state that its schedulers give it at t; what it sets becomes part of the drift, and the
update applies it before the optimizer steps. What it reads must be what the update
finds, else an earlier step has set it by hand, which a drift cannot know.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreampropeller.guard import same_setting, setting_tensor, settings
from dreampropeller.optimizers import Optimizers
from dreampropeller.tree import Nest, State, copy_nest
from dreampropeller.verification import NotReproducible

PREFIX = "optimizer/"
"""Prefix of the drift's entries: `optimizer/<group>/<key>`, and `…/read`."""
_READ = "/read"
_KEPT = 1024
"""Number of steps whose settings are remembered."""


class Groups:
    """The groups of the one optimizer of a module.

    Args:
        optimizer: The live optimizer; its groups become dicts that tell what is read.
        optimizers: The optimizer and its scheduler, lent their memory.
        due: Whether the scheduler steps after a step.
    """

    def __init__(
        self, optimizer: Optimizer, optimizers: Optimizers, due: Callable[[int], bool]
    ) -> None:
        self._optimizer, self._optimizers, self._due = optimizer, optimizers, due
        self._own = list(optimizer.param_groups)  # a module may keep a reference
        self._groups = [_Watched(group) for group in self._own]
        optimizer.param_groups[:] = self._groups
        self._known = {0: _without_tensors(copy_nest(optimizers.export()))}
        self._state: Any = None

    def move_to(self, step: int) -> None:
        """Put the live optimizer into its state at the start of a step.

        From the last settings known, the schedulers step by themselves.
        """
        start = max(known for known in self._known if known <= step)
        self._optimizers.load(copy_nest(self._known[start]))
        self._optimizer._opt_called = True  # pyright: ignore[reportAttributeAccessIssue]
        for one in range(start, step):
            if self._due(one):
                self._optimizers.step_in_place(skip=True)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Take note of what a step reads and sets; its moments are hidden."""
        try:
            self._watch()
            yield
        finally:
            self._close()

    def _watch(self) -> None:
        self._entered = [settings(group) for group in self._groups]
        for group, own in zip(self._groups, self._own, strict=True):
            now = settings(group)
            for key in settings(own).keys() - now.keys():
                del own[key]  # born in a later step
            own.update(now)
            group.watch()
        self._state = self._optimizer.state
        vars(self._optimizer)["state"] = _Hidden()

    def _close(self) -> None:
        for group in self._groups:
            group.watching = False
        if self._state is not None:
            vars(self._optimizer)["state"], self._state = self._state, None

    def leave(self) -> State:
        """What the step has set and read up to here, as entries of the drift."""
        drift: State = {}
        if len(self._optimizer.param_groups) != len(self._groups):
            raise ValueError(
                "A step added or removed a group of the optimizer. Steps are not "
                "evaluated in order, so all groups have to be there from the start: "
                "give a learning rate of 0 until one joins."
            )
        rows = zip(self._groups, self._own, self._entered, strict=True)
        for index, (group, own, before) in enumerate(rows):
            for key, value in settings(own).items():
                if key in before and not same_setting(value, before[key]):
                    group[key] = value
            for key, value in settings(group).items():
                if key not in before or not same_setting(value, before[key]):
                    drift[f"{PREFIX}{index}/{key}"] = setting_tensor(value)
            for key in group.read & before.keys():
                drift[f"{PREFIX}{index}/{key}{_READ}"] = setting_tensor(before[key])
        self._left = [settings(group) for group in self._groups]
        return drift

    def changed_since(self) -> bool:
        """Whether something was set after `leave`."""
        return any(
            not same_setting(value, left.get(key))
            for group, own, left, before in zip(
                self._groups, self._own, self._left, self._entered, strict=True
            )
            for key, value in [*settings(group).items(), *settings(own).items()]
            if key not in before or not same_setting(value, before[key])
        )

    def apply(self, step: int, carry: Nest, drift: State) -> None:
        """Write what a step has set into the carry.

        Raises:
            NotReproducible: The step has read what an earlier one had set by hand.
        """
        groups = carry["optimizers"][0]["groups"]
        found = {n: v for n, v in drift.items() if n.startswith(PREFIX)}
        for name, value in sorted(found.items(), key=lambda one: one[0][-5:] != _READ):
            index, key = name.removeprefix(PREFIX).split("/")[:2]
            group = groups[int(index)]
            if not name.endswith(_READ):
                group[key] = _like(group.get(key), value)
            elif key not in group or not same_setting(
                _like(group[key], value), group[key]
            ):
                raise NotReproducible(
                    f"Step {step} reads `{key}` of the optimizer, which an earlier "
                    "step has set by hand, so it depends on the steps before. Compute "
                    f"`{key}` from `self.global_step` alone, such as "
                    f'`group["{key}"] = start * 0.1 ** (self.global_step // 1000)`, '
                    "or use a scheduler."
                )

    def set_by_hand(self, drift: State) -> None:
        """Set on the live optimizer what a step has set."""
        for name, value in drift.items():
            if name.startswith(PREFIX) and not name.endswith(_READ):
                index, key = name.removeprefix(PREFIX).split("/")
                group = self._groups[int(index)]
                group[key] = _like(group.get(key), value)

    def remember(self, step: int, carry: Nest) -> None:
        """Remember the settings at the start of a step."""
        self._known[step] = _without_tensors(carry)
        if len(self._known) > _KEPT:
            del self._known[min(set(self._known) - {0})]


class _Watched(dict[str, Any]):
    """A group that tells which of its settings were read before they were set."""

    watching = False

    def watch(self) -> None:
        """Forget what was read and set, and begin to take note."""
        self.read: set[str] = set()
        self._set: set[str] = set()
        self.watching = True

    def __getitem__(self, key: str) -> Any:
        if self.watching and key not in self._set:
            self.read.add(key)
        return super().__getitem__(key)

    def __setitem__(self, key: str, value: Any) -> None:
        if self.watching:
            self._set.add(key)
        super().__setitem__(key, value)

    def items(self) -> Any:
        if self.watching:
            self.read |= self.keys() - self._set
        return super().items()

    def values(self) -> Any:
        if self.watching:
            self.read |= self.keys() - self._set
        return super().values()

    def get(self, key: str, default: Any = None) -> Any:
        return self[key] if key in self else default  # noqa: SIM401, it is `get`


class _Hidden(dict[Any, Any]):
    """An optimizer's state inside of a step: not known ahead of time."""

    def _refuse(self, *_: Any) -> Any:
        raise NotReproducible(
            "The step reads the optimizer's `state`, which only the optimizer may do: "
            "it is not known while steps are evaluated ahead of time. Keep what the "
            "step needs in a buffer of the module."
        )

    __getitem__ = get = items = values = keys = __iter__ = __contains__ = _refuse


def _like(old: Any, value: Tensor) -> Any:
    """A setting of the kind that it was."""
    numbers = value.tolist()
    if isinstance(old, (tuple, list)):
        kinds = [type(one) if not isinstance(one, Tensor) else float for one in old]
        return type(old)(k(n) for k, n in zip(kinds, numbers, strict=True))
    if isinstance(old, Tensor):
        return torch.full_like(old, numbers[0])
    return numbers[0] if old is None else type(old)(numbers[0])


def _without_tensors(nest: Nest) -> Nest:
    """The carry with the optimizers' moments left out, its structure kept."""

    def hollow(node: Nest) -> Nest:
        if isinstance(node, dict):
            return {key: hollow(child) for key, child in node.items()}
        if isinstance(node, (list, tuple)):
            return type(node)(map(hollow, node))
        return 0 if isinstance(node, Tensor) and node.numel() > 1 else node

    return hollow(nest)
