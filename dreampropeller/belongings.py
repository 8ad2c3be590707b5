"""The memory of an object that does not declare it, as a nest, and back.

Optimizers and schedulers keep counters in attributes, moments under keys of their own,
other optimizers inside of them. Everything in `vars()` that a nest can hold is read,
whatever its place, and written back in place. What never changes by itself (functions,
classes, types) stays where it is, as do parameters, which are named. Other objects
cannot be put back, so they are refused by name.
"""

from __future__ import annotations

import collections
import enum
import functools
import io
import logging
import pathlib
import random
import re
import types
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreampropeller.tree import Nest

KIND = "python"
"""Key of a dict that stands for something a nest cannot hold as it is."""
_SCALARS = (bool, int, float, str, type(None))
_CONSTANT = (
    types.FunctionType,
    types.BuiltinFunctionType,
    types.MethodType,
    types.ModuleType,
    type,
    functools.partial,
    weakref.ReferenceType,
    torch.dtype,
    torch.device,
    torch.layout,
    torch.memory_format,
    torch.finfo,
    torch.iinfo,
    np.dtype,
    enum.Enum,
    complex,
    range,
    slice,
    bytes,
    re.Pattern,
    pathlib.PurePath,
    logging.Logger,
    property,
    type(Ellipsis),
    torch.utils.hooks.RemovableHandle,
)
"""What stays as it is: it holds no memory, or none that an optimizer writes into."""


class Belongings:
    """Reads and writes the memory of objects that share parameters.

    Args:
        parameters: The parameters by name.
        owners: Objects whose memory is kept elsewhere; they are not entered.
    """

    def __init__(
        self, parameters: Mapping[str, Tensor], owners: Iterable[object] = ()
    ) -> None:
        self._parameters = dict(parameters)
        self._names = {id(one): name for name, one in parameters.items()}
        self._owners = [*owners]
        self._known = {id(one) for one in self._owners}

    def read(self, value: Any, path: str) -> Nest:
        """The memory of a value.

        Args:
            value: The value.
            path: Its name, for an error.

        Raises:
            TypeError: It holds something that could not be put back.
        """
        return self._read(value, path, frozenset())

    def read_attributes(self, owner: object, path: str, skip: Iterable[str]) -> Nest:
        """The memory in the attributes of an object, by their names."""
        kept = {n: v for n, v in vars(owner).items() if n not in skip}
        found = {n: self.read(value, f"{path}.{n}") for n, value in kept.items()}
        return {n: nest for n, nest in found.items() if not _is_constant(nest)}

    def write_attributes(self, owner: object, nest: Nest, skip: Iterable[str]) -> None:
        """Write memory back into the attributes; those born later are removed."""
        table = vars(owner)
        for name in [n for n in table if n not in nest and n not in skip]:
            if not _is_constant(self.read(table[name], name)):
                del table[name]
        for name, value in nest.items():
            table[name] = self.write(value, table.get(name))

    def _read(self, value: Any, path: str, above: frozenset[int]) -> Nest:
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            if name is not None:
                return {KIND: "parameter", "name": name}
            return value.data if isinstance(value, nn.Parameter) else value
        if isinstance(value, enum.Enum) or id(value) in self._known | above:
            return {KIND: "constant"}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, _SCALARS):
            return value
        above |= {id(value)}
        for kind, read in _GENERATORS.items():
            if isinstance(value, kind):
                return {
                    KIND: "generator",
                    "state": self._read(read(value), path, above),
                }
        if isinstance(value, Mapping):
            return self._read_mapping(value, path, above)
        if isinstance(value, (list, tuple, collections.deque)):
            items = [self._read(v, f"{path}[{i}]", above) for i, v in enumerate(value)]
            if type(value) in (list, tuple) and all(map(_is_raw, items)):
                return type(value)(items)
            return {KIND: "sequence", "items": items}
        if isinstance(value, (set, frozenset)):
            items = [self._read(one, f"{path}{{…}}", above) for one in value]
            return {KIND: "set", "items": sorted(items, key=repr)}
        if isinstance(value, np.ndarray) and value.dtype != object:
            return {KIND: "array", "value": torch.from_numpy(value.copy())}
        if isinstance(value, _CONSTANT):
            return {KIND: "constant"}
        if not hasattr(value, "__dict__") or isinstance(value, io.IOBase):
            raise TypeError(
                f"`{path}` is a `{type(value).__name__}`, which can be neither copied "
                "nor put back, and steps are evaluated more than once. Keep tensors, "
                "numbers, strings, lists, tuples, dicts or a generator there instead."
            )
        attributes = {
            n: self._read(v, f"{path}.{n}", above) for n, v in vars(value).items()
        }
        return {KIND: "object", "attributes": attributes}

    def _read_mapping(
        self, value: Mapping[Any, Any], path: str, above: frozenset[int]
    ) -> Nest:
        keys = [self._key(key, path) for key in value]
        items = [
            self._read(child, f"{path}[{key!r}]", above)
            for key, child in zip(keys, value.values(), strict=True)
        ]
        raw = type(value) is dict and KIND not in value and all(map(_is_raw, items))
        if raw and all(isinstance(key, (str, int)) for key in keys):
            return dict(zip(keys, items, strict=True))
        return {KIND: "dict", "keys": keys, "items": items}

    def _key(self, key: Any, path: str) -> Any:
        if id(key) in self._names or key in self._names:  # also by `id(parameter)`
            by = id(key) in self._names
            name = self._names[id(key) if by else key]
            return {KIND: "parameter" if by else "identity", "name": name}
        if isinstance(key, _SCALARS):
            return key
        if isinstance(key, tuple):
            return tuple(self._key(one, path) for one in key)
        raise TypeError(
            f"`{path}` has a key that is a `{type(key).__name__}`: use strings, "
            "numbers or parameters."
        )

    def write(self, nest: Nest, live: Any) -> Any:
        """Put memory back; containers and objects keep their identity.

        Args:
            nest: The memory; it is used, not copied.
            live: What stands at its place now.
        """
        if not isinstance(nest, dict) or KIND not in nest:
            return self._write_raw(nest, live)
        kind = nest[KIND]
        if kind == "constant":
            return live
        if kind == "parameter":
            return self._parameters[nest["name"]]
        if kind == "identity":
            return id(self._parameters[nest["name"]])
        if kind == "generator":
            _WRITE[_generator_kind(live)](live, self.write(nest["state"], None))
            return live
        if kind == "array":
            value = nest["value"].numpy()
            if isinstance(live, np.ndarray) and live.shape == value.shape:
                live[...] = value
                return live
            return value.copy()
        if kind == "object":
            return self._write_object(nest["attributes"], live)
        if kind == "dict":
            return self._write_dict(nest, live)
        return self._write_items(kind, nest["items"], live)

    def _write_raw(self, nest: Nest, live: Any) -> Any:
        if isinstance(live, nn.Parameter) and isinstance(nest, Tensor):
            live.data = nest  # an object of its own, which keeps its type
            return live
        if type(live) is dict and type(nest) is dict and live is not nest:
            written = {key: self.write(v, live.get(key)) for key, v in nest.items()}
            live.clear()
            live.update(written)
            return live
        if type(live) is list and type(nest) is list and live is not nest:
            return self._write_items("sequence", nest, live)
        return nest

    def _write_object(self, attributes: Nest, live: Any) -> Any:
        table = vars(live)
        for name in [name for name in table if name not in attributes]:
            del table[name]
        for name, value in attributes.items():
            table[name] = self.write(value, table.get(name))
        return live

    def _write_dict(self, nest: Nest, live: Any) -> Any:
        keys = [self._restored_key(key) for key in nest["keys"]]
        old = live if isinstance(live, Mapping) else {}
        items = [
            self.write(item, old.get(key))
            for key, item in zip(keys, nest["items"], strict=True)
        ]
        target: Any = live if hasattr(live, "clear") else {}
        target.clear()
        for key, item in zip(keys, items, strict=True):
            target[key] = item  # `Counter.update` would count
        return target

    def _restored_key(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return tuple(self._restored_key(one) for one in key)
        return self.write(key, None) if isinstance(key, dict) else key

    def _write_items(self, kind: str, items: list[Nest], live: Any) -> Any:
        if kind == "set":
            values: Any = [self._restored_key(item) for item in items]
        else:
            old = list(live) if isinstance(live, Iterable) else []
            old += [None] * (len(items) - len(old))
            values = [self.write(item, o) for item, o in zip(items, old, strict=False)]
        if isinstance(live, (tuple, frozenset)):
            named = hasattr(live, "_fields")
            return type(live)(*values) if named else type(live)(values)
        if isinstance(live, list):
            live[:] = values
        elif isinstance(live, (set, collections.deque)):
            live.clear()
            live.update(values) if isinstance(live, set) else live.extend(values)
        else:
            return values
        return live


def _is_raw(nest: Nest) -> bool:
    """Whether a nest stands for itself."""
    return not isinstance(nest, dict) or KIND not in nest


def _is_constant(nest: Nest) -> bool:
    return isinstance(nest, dict) and nest.get(KIND) in ("constant", "parameter")


def _numpy_state(one: np.random.Generator) -> Any:
    return dict(one.bit_generator.state)


def _set_numpy_state(one: np.random.Generator, state: Any) -> None:
    one.bit_generator.state = state


_GENERATORS: dict[type, Callable[[Any], Any]] = {
    torch.Generator: torch.Generator.get_state,
    random.Random: random.Random.getstate,
    np.random.Generator: _numpy_state,
    np.random.RandomState: lambda one: one.get_state(legacy=False),
}
_WRITE: dict[type, Callable[[Any, Any], None]] = {
    torch.Generator: lambda one, state: one.set_state(state),
    random.Random: random.Random.setstate,
    np.random.Generator: _set_numpy_state,
    np.random.RandomState: lambda one, state: one.set_state(state),
}


def _generator_kind(value: Any) -> type:
    return next(kind for kind in _GENERATORS if isinstance(value, kind))
