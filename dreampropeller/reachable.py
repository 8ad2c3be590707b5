"""What a function refers to besides its arguments: closure, globals, bound object.

A loss that advances an iterator, draws from a generator of its own or keeps an average
is no function of step and state. What it refers to is recorded before a check, so that
the culprit can be named, and put back afterwards where that is possible.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import types
from collections.abc import Callable, Iterator, Set
from typing import Any

from torch import Tensor, nn

from dreampropeller.attributes import Attributes, Note
from dreampropeller.counters import global_names, is_library

_DEPTH = 4
_LARGE = 1000
"""Entries from which a container is data, and not memory."""


class Reachable:
    """A record of what a function refers to.

    Args:
        function: The function.
        module: A module whose values and attributes are recorded elsewhere.
    """

    def __init__(self, function: Callable[..., Any], module: nn.Module) -> None:
        self._seen: set[int] = {id(one) for one in module.modules()}
        self._state = [*module.parameters(), *module.buffers()]
        self._seen |= {id(one) for one in self._state}
        self._places: list[tuple[str, _Place, Note]] = []
        self._tensors: list[tuple[str, Tensor, int]] = []
        self._iterators: list[str] = []
        self._objects: dict[str, object] = {}
        self._members: set[tuple[int, str]] = set()
        self._walk(function, 0)
        self._attributes = self._attributes_now()

    def changed(self) -> list[str]:
        """Names of what differs from the record."""
        found = [n for n, place, note in self._places if not note.holds(place.get())]
        found += [
            n for n, tensor, version in self._tensors if tensor._version != version
        ]
        return [*found, *self._attributes.changed()]

    def suspects(self) -> list[str]:
        """Names of iterators, whose place cannot be read."""
        return list(self._iterators)

    def restore(self) -> None:
        """Put back what can be put back: generators, numbers, containers."""
        for _, place, note in self._places:
            if not note.holds(place.get()):
                place.set(note.restored())
        self._attributes.restore()

    @contextlib.contextmanager
    def as_recorded(self) -> Iterator[None]:
        """What was recorded, inside the block; what stands there now after it."""
        now = [
            (place, Note(place.get(), frozenset()))
            for _, place, note in self._places
            if not note.holds(place.get())
        ]
        attributes = self._attributes_now() if self._attributes.touched() else None
        self.restore()
        try:
            yield
        finally:
            for place, note in now:
                place.set(note.restored())
            if attributes is not None:
                attributes.restore()

    def _attributes_now(self) -> Attributes:
        """A record of the objects' attributes."""
        # Tensors are not copied: a captured data set may be large.
        state = [*self._state, *(tensor for _, tensor, _ in self._tensors)]
        return Attributes(self._objects, follow=_is_users, state=state)

    def _walk(self, function: Any, depth: int) -> None:
        if depth > _DEPTH or id(function) in self._seen:
            return
        self._seen.add(id(function))
        if isinstance(function, functools.partial):
            for number, value in enumerate(
                [*function.args, *function.keywords.values()]
            ):
                self._visit(f"argument {number}", _Fixed(value), depth)
            self._walk(function.func, depth + 1)
            return
        bound = getattr(function, "__self__", None)
        if bound is not None and not isinstance(bound, types.ModuleType):
            self._visit("self", _Fixed(bound), depth)
        function = getattr(function, "__func__", function)
        if not isinstance(function, types.FunctionType):
            if not isinstance(function, (type, types.BuiltinFunctionType)):
                self._visit(type(function).__name__, _Fixed(function), depth)
            return
        cells = zip(
            function.__code__.co_freevars, function.__closure__ or (), strict=True
        )
        names = {*global_names(function.__code__)}
        for name, cell in cells:
            self._visit(name, _Cell(cell), depth, names)
        for name in sorted(names & function.__globals__.keys()):
            self._visit(name, _Key(function.__globals__, name), depth, names)
        for number, value in enumerate(function.__defaults__ or ()):
            self._visit(f"default {number}", _Fixed(value), depth)

    def _visit(
        self, name: str, place: _Place, depth: int, names: Set[str] = frozenset()
    ) -> None:
        try:
            value = place.get()
        except ValueError:  # an empty cell
            return
        if isinstance(value, (type, types.ModuleType)):
            self._visit_members(name, value, depth, names)
            return
        if id(value) in self._seen:
            return
        if isinstance(value, (types.FunctionType, types.MethodType, functools.partial)):
            if getattr(value, "__module__", "").split(".")[0] != "torch":
                self._walk(value, depth + 1)
            return
        if isinstance(value, nn.Module):
            self._record_module(name, value)
            return
        if hasattr(value, "__next__"):
            self._iterators.append(name)
            return
        for inner in value.values() if type(value) is dict else ():
            if hasattr(inner, "__next__"):
                self._iterators.append(name)
        if isinstance(value, Tensor):
            self._tensors.append((name, value, value._version))
            return
        if _size(value) <= _LARGE:
            self._places.append((name, place, Note(value, frozenset())))
        if hasattr(value, "__dict__"):
            self._objects[name] = value
            self._tensors += [
                (f"{name}.{inner}", tensor, tensor._version)
                for inner, tensor in vars(value).items()
                if isinstance(tensor, Tensor) and id(tensor) not in self._seen
            ]

    def _visit_members(
        self, path: str, owner: type | types.ModuleType, depth: int, names: Set[str]
    ) -> None:
        """What the code names of a user's module, and the values of a class."""
        is_class = isinstance(owner, type)
        if depth > _DEPTH or is_library(
            owner.__module__ if is_class else owner.__name__
        ):
            return
        for name in sorted(names & vars(owner).keys()):
            if is_class and hasattr(vars(owner)[name], "__get__"):
                continue  # a method or a property
            if (id(owner), name) not in self._members:
                self._members.add((id(owner), name))
                place = _Member(owner, name)
                self._visit(f"{path}.{name}", place, depth + 1, names)

    def _record_module(self, name: str, module: nn.Module) -> None:
        self._seen.add(id(module))
        self._objects[name] = module
        for inner, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if id(tensor) not in self._seen and not tensor.is_inference():
                self._tensors.append((f"{name}.{inner}", tensor, tensor._version))


class _Place(abc.ABC):
    """Where a value stands."""

    @abc.abstractmethod
    def get(self) -> Any: ...

    def set(self, value: Any) -> None:
        del value


class _Fixed(_Place):
    def __init__(self, value: Any) -> None:
        self._value = value

    def get(self) -> Any:
        return self._value


class _Cell(_Place):
    def __init__(self, cell: types.CellType) -> None:
        self._cell = cell

    def get(self) -> Any:
        return self._cell.cell_contents

    def set(self, value: Any) -> None:
        self._cell.cell_contents = value


class _Key(_Place):
    def __init__(self, table: dict[str, Any], key: str) -> None:
        self._table, self._key = table, key

    def get(self) -> Any:
        return self._table[self._key]

    def set(self, value: Any) -> None:
        self._table[self._key] = value


class _Member(_Place):
    def __init__(self, owner: type | types.ModuleType, name: str) -> None:
        self._owner, self._name = owner, name

    def get(self) -> Any:
        return vars(self._owner)[self._name]

    def set(self, value: Any) -> None:
        setattr(self._owner, self._name, value)


def _is_users(value: object) -> bool:
    """Whether an object is of a class of the user's own."""
    return not isinstance(value, type) and (
        isinstance(value, types.SimpleNamespace)
        or not is_library(type(value).__module__)
    )


def _size(value: object) -> int:
    """The number of entries of a container, those of inner ones included."""
    if isinstance(value, dict):
        value = list(value.values())
    if not isinstance(value, (list, tuple, set)) or len(value) > _LARGE:
        return len(value) if isinstance(value, (list, tuple, set)) else 1
    return sum(map(_size, value))
