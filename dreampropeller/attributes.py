r"""Restoring the plain attributes of live objects, beside parameters and buffers.

A training step changes plain attributes: a mask that only grows, a current resolution,
a cached mesh. The drift of a step must not see those of another step, in whatever order
steps are evaluated. The attributes are therefore recorded once, when everything is
built, and restored before each evaluation; schedules then set them from the step alone.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from dreampropeller import generators

_MODULE_TABLES = frozenset(
    name for name in vars(nn.Module()) if name != "training"
)  # parameters, buffers, children and hooks are handled elsewhere
_SCALARS = (bool, int, float, complex, str, bytes, type(None))


class Attributes:
    """A record of the plain attributes of objects.

    Tensors are kept by value and restored in place; numbers and containers by value;
    anything else by reference. Attributes added later are removed. Frozen networks in
    evaluation mode are not entered: a pretrained model has a thousand modules, and
    checking each in every evaluation costs more than the protection is worth.

    Args:
        roots: Objects by name at which the walk begins.
        follow: Whether the walk enters an object besides modules and data sets.
        skip: Names of attributes that are ignored, or their paths (`part.calls`).
        state: Tensors that are restored elsewhere; an attribute that shares the memory
            of one is left alone.
    """

    def __init__(
        self,
        roots: dict[str, object],
        follow: Callable[[object], bool] = lambda _: False,
        skip: Collection[str] = (),
        state: Iterable[Tensor] = (),
    ) -> None:
        self._skip = frozenset(skip)
        memory = frozenset(tensor.untyped_storage().data_ptr() for tensor in state)
        self._owners: list[_Owner] = []
        seen: set[int] = set()
        todo: list[tuple[str, object]] = list(roots.items())
        while todo:
            path, owner = todo.pop(0)  # nearest first, for the shortest name
            if id(owner) in seen or not hasattr(owner, "__dict__"):
                continue
            seen.add(id(owner))
            self._owners.append(_Owner(path, owner, self._plain(path, owner), memory))
            children: Iterable[tuple[str, object]] = self._plain(path, owner)
            if isinstance(owner, nn.Module):
                children = [*children, *owner.named_children()]
            todo += [
                (f"{path}.{name}" if path else name, child)
                for name, child in children
                if (isinstance(child, (nn.Module, Dataset)) or follow(child))
                and not _is_frozen(child)
            ]

    def touched(self) -> list[_Owner]:
        """The objects with an attribute that differs from the record."""
        return [one for one in self._owners if not one.is_untouched()]

    def restore(self, touched: Iterable[_Owner] | None = None) -> None:
        """Restore every attribute, of all objects or of those that are known."""
        for one in self.touched() if touched is None else touched:
            table = vars(one.owner)  # not `setattr`: properties and modules interfere
            for name, _ in self._plain(one.path, one.owner):
                if name not in one.notes:
                    del table[name]
            for name, note in one.notes.items():
                if _is_registered(one.owner, name):
                    continue  # a part built on first use; its record is None
                if name not in table or not note.holds(table[name]):
                    table[name] = note.restored()

    def changed(self, touched: Iterable[_Owner] | None = None) -> list[str]:
        """Names of the attributes that differ from the record."""
        names: list[str] = []
        for one in self.touched() if touched is None else touched:
            now = dict(self._plain(one.path, one.owner))
            prefix = f"{one.path}." if one.path else ""
            for name in {**one.notes, **now}:
                note = one.notes.get(name)
                if note is None or name not in now or not note.holds(now[name]):
                    names.append(prefix + name)
        return sorted(names)

    def objects(self) -> Iterator[tuple[str, object]]:
        """Every object that the walk reached, by name."""
        for one in self._owners:
            yield one.path, one.owner

    def _plain(self, path: str, owner: object) -> list[tuple[str, Any]]:
        tables = _MODULE_TABLES if isinstance(owner, nn.Module) else frozenset()
        return [
            (name, value)
            for name, value in vars(owner).items()
            if name not in tables
            and name not in self._skip
            and f"{path}.{name}" not in self._skip
        ]


class _Owner:
    """An object, and the record of its plain attributes."""

    def __init__(
        self,
        path: str,
        owner: object,
        plain: Iterable[tuple[str, Any]],
        memory: frozenset[int],
    ) -> None:
        self.path, self.owner = path, owner
        self.notes = {name: Note(value, memory) for name, value in plain}
        self._size = len(vars(owner))
        values = {name: vars(owner)[name] for name in self.notes}
        self._mutable = [n for n, value in values.items() if not _is_constant(value)]
        self._constant = [(n, v) for n, v in values.items() if n not in self._mutable]

    def is_untouched(self) -> bool:
        """Whether all is as recorded, at the cost of looking at each value."""
        table = vars(self.owner)
        if len(table) != self._size:
            return False
        for name, value in self._constant:
            if table.get(name, self) is not value:
                return False
        return all(
            name in table and self.notes[name].holds(table[name])
            for name in self._mutable
        )


class Note:
    """One recorded value: comparison and restoration."""

    def __init__(self, value: Any, memory: frozenset[int]) -> None:
        self._value = value
        self._is_value = _is_value(value) and not (
            value.layout is torch.strided
            and value.untyped_storage().data_ptr() in memory
        )
        self._items: list[Note] | None = None
        self._keys: list[Any] = []
        self._copy: Any = None
        self._version = -1
        if self._is_value:
            self._copy = value.detach().clone()
            self._version = value._version
        elif generators.is_generator(value):
            self._copy = generators.state_of(value)
        elif isinstance(value, dict):
            self._keys = list(value)
            self._items = [Note(item, memory) for item in value.values()]
        elif isinstance(value, (list, tuple, collections.deque)):
            self._items = [Note(item, memory) for item in value]
        elif type(value) is set:
            self._copy = set(value)

    def holds(self, now: Any) -> bool:
        """Whether the value that stands there now is the recorded one."""
        value = self._value
        if isinstance(value, _SCALARS):
            return type(now) is type(value) and (now == value or now != now)
        if now is not value:
            return False
        if self._is_value:
            return value._version == self._version
        if generators.is_generator(value):
            return generators.same(generators.state_of(value), self._copy)
        if type(value) is set:
            return value == self._copy
        if self._items is None:
            return True
        if isinstance(value, dict):
            # By identity: keys may be tensors or arrays, whose `==` is not a bool.
            if [id(key) for key in value] != [id(key) for key in self._keys]:
                return False
            value = list(value.values())
        return len(value) == len(self._items) and all(
            note.holds(item) for note, item in zip(self._items, value, strict=True)
        )

    def restored(self) -> Any:
        """The recorded value, in its original object."""
        value = self._value
        if self._is_value:
            if value._version != self._version:
                with torch.no_grad():
                    value.detach().copy_(self._copy)
                self._version = value._version
        elif generators.is_generator(value):
            generators.set_state(value, self._copy)
        elif isinstance(value, dict):
            items = [note.restored() for note in self._items or []]
            value.clear()
            for key, item in zip(self._keys, items, strict=True):
                value[key] = item  # `Counter.update` would count
        elif isinstance(value, (list, collections.deque)):
            items = [note.restored() for note in self._items or []]
            value.clear()
            value.extend(items)
        elif isinstance(value, tuple):
            for note in self._items or []:
                note.restored()
        elif type(value) is set:
            value.clear()
            value.update(self._copy)
        return value


def _is_registered(owner: object, name: str) -> bool:
    """Whether a name is now that of a parameter, buffer or child."""
    return isinstance(owner, nn.Module) and any(
        name in table for table in (owner._parameters, owner._buffers, owner._modules)
    )


def _is_constant(value: object) -> bool:
    """Whether a value is recorded by reference alone."""
    mutable = isinstance(value, (dict, list, tuple, set, collections.deque))
    return not (mutable or _is_value(value) or generators.is_generator(value))


def _is_value(value: Any) -> bool:
    """A parameter is part of the state wherever it is held."""
    return isinstance(value, Tensor) and not isinstance(value, nn.Parameter)


def _is_frozen(value: object) -> bool:
    if not isinstance(value, nn.Module) or value.training:
        return False
    flags = [parameter.requires_grad for parameter in value.parameters()]
    return bool(flags) and not any(flags)
