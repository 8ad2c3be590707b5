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
import re
import types
import weakref
from collections.abc import Iterable, Mapping, MutableMapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dreampropeller import generators
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

    Containers and objects keep their identity, also where one stands at two places:
    `begin` a pass over all of them, then read or write them in the same order.

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
        self._classes: dict[str, type] = {}
        self.begin()

    def begin(self) -> None:
        """Begin a pass."""
        self._numbers: dict[int, int] = {}  # of what was read, by identity
        self._targets: list[Any] = []  # what was written, by number
        self._used: set[int] = set()

    def read(self, value: Any, path: str) -> Nest:
        """The memory of a value.

        Args:
            value: The value.
            path: Its name, for an error.

        Raises:
            TypeError: It holds something that could not be put back.
        """
        if isinstance(value, Tensor):
            name = self._names.get(id(value))
            if name is not None:
                return {KIND: "parameter", "name": name}
            return value.data if isinstance(value, nn.Parameter) else value
        if isinstance(value, enum.Enum) or id(value) in self._known:
            return {KIND: "constant"}
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, _SCALARS):
            return value
        if generators.is_generator(value):
            state = Belongings({}).read(generators.state_of(value), path)
            return {KIND: "generator", "state": state}
        if isinstance(value, (tuple, frozenset)):
            return self._read_items(value, path)
        if isinstance(value, _CONSTANT):
            return {KIND: "constant"}
        if id(value) in self._numbers:
            return {KIND: "alias", "of": self._numbers[id(value)]}
        self._numbers[id(value)] = len(self._numbers)
        if isinstance(value, Mapping):
            return self._read_mapping(value, path)
        if isinstance(value, (list, set, collections.deque)):
            return self._read_items(value, path)
        if isinstance(value, np.ndarray) and value.dtype != object:
            return {KIND: "array", "value": torch.from_numpy(value.copy())}
        if not hasattr(value, "__dict__") or isinstance(value, io.IOBase):
            raise TypeError(
                f"`{path}` is a `{type(value).__name__}`, which can be neither copied "
                "nor put back, and steps are evaluated more than once. Keep tensors, "
                "numbers, strings, lists, tuples, dicts or a generator there instead."
            )
        attributes = {n: self.read(v, f"{path}.{n}") for n, v in vars(value).items()}
        name = f"{type(value).__module__}.{type(value).__qualname__}"
        self._classes[name] = type(value)
        return {KIND: "object", "class": name, "attributes": attributes}

    def read_attributes(self, owner: object, path: str, skip: Iterable[str]) -> Nest:
        """The memory in the attributes of an object, by their names."""
        kept = {n: v for n, v in vars(owner).items() if n not in skip}
        found = {n: self.read(value, f"{path}.{n}") for n, value in kept.items()}
        return {n: nest for n, nest in found.items() if not _is_constant(nest)}

    def write_attributes(self, owner: object, nest: Nest, skip: Iterable[str]) -> None:
        """Write memory back into the attributes; those born later are removed."""
        table = vars(owner)
        reader = Belongings(self._parameters, self._owners)
        for name in [n for n in table if n not in nest and n not in skip]:
            if not _is_constant(reader.read(table[name], name)):
                del table[name]
        for name, value in nest.items():
            table[name] = self.write(value, table.get(name))

    def _read_items(self, value: Any, path: str) -> Nest:
        if isinstance(value, (set, frozenset)):
            items = [self.read(one, f"{path}{{…}}") for one in value]
            return {KIND: "set", "items": sorted(items, key=repr)}
        items = [self.read(one, f"{path}[{i}]") for i, one in enumerate(value)]
        if type(value) in (list, tuple) and all(map(_is_raw, items)):
            return type(value)(items)
        return {KIND: "sequence", "items": items}

    def _read_mapping(self, value: Mapping[Any, Any], path: str) -> Nest:
        keys = [self._key(key, path) for key in value]
        items = [
            self.read(child, f"{path}[{key!r}]")
            for key, child in zip(keys, value.values(), strict=True)
        ]
        raw = type(value) is dict and KIND not in value and all(map(_is_raw, items))
        if raw and all(isinstance(key, (str, int)) for key in keys):
            return dict(zip(keys, items, strict=True))
        return {KIND: "dict", "keys": keys, "items": items}

    def _key(self, key: Any, path: str) -> Any:
        if id(key) in self._names:
            return {KIND: "parameter", "name": self._names[id(key)]}
        if isinstance(key, int) and key in self._names:  # `id(parameter)`
            return {KIND: "identity", "name": self._names[key]}
        if isinstance(key, _SCALARS):
            return key
        if isinstance(key, tuple):
            return tuple(self._key(one, path) for one in key)
        raise TypeError(
            f"`{path}` has a key that is a `{type(key).__name__}`: use strings, "
            "numbers or parameters."
        )

    def write(self, nest: Nest, live: Any) -> Any:
        """Put memory back.

        Args:
            nest: The memory; its tensors are used, not copied.
            live: What stands at its place now.
        """
        if isinstance(nest, Tensor):
            if isinstance(live, nn.Parameter) and id(live) not in self._names:
                live.data = nest  # an object of its own, which keeps its type
                return live
            return nest
        if isinstance(nest, dict):
            return self._write_dict(nest, live)
        if isinstance(nest, list):
            return self._write_items(nest, live, list)
        if isinstance(nest, tuple):
            return self._write_tuple(nest, live)
        return nest

    def _write_dict(self, nest: dict[Any, Any], live: Any) -> Any:
        kind = nest.get(KIND)
        if kind is None:
            return self._write_mapping(list(nest), list(nest.values()), live)
        if kind == "constant":
            return live
        if kind == "alias":
            return self._targets[nest["of"]]
        if kind in ("parameter", "identity"):
            parameter = self._parameters[nest["name"]]
            return parameter if kind == "parameter" else id(parameter)
        if kind == "generator":
            generators.set_state(live, Belongings({}).write(nest["state"], None))
            return live
        if kind == "array":
            return self._write_array(nest["value"].numpy(), live)
        if kind == "object":
            return self._write_object(nest["class"], nest["attributes"], live)
        if kind == "dict":
            return self._write_mapping(nest["keys"], nest["items"], live)
        if isinstance(live, (tuple, frozenset)):
            return self._write_tuple(nest["items"], live)
        made = set if kind == "set" else list
        return self._write_items(nest["items"], live, made)

    def _target(self, live: Any, kinds: Any, make: Any) -> Any:
        """The object to write into: the live one, unless it was taken before."""
        fits = isinstance(live, kinds) and id(live) not in self._used
        target = live if fits else make()
        self._used.add(id(target))
        self._targets.append(target)
        return target

    def _write_mapping(self, keys: list[Any], nests: list[Nest], live: Any) -> Any:
        old = dict(live) if isinstance(live, Mapping) else {}
        target = self._target(live, MutableMapping, dict)
        found = [self._restored_key(key) for key in keys]
        items = [
            self.write(nest, old.get(key))
            for key, nest in zip(found, nests, strict=True)
        ]
        target.clear()
        for key, item in zip(found, items, strict=True):
            target[key] = item  # `Counter.update` would count
        return target

    def _write_items(self, nests: list[Nest], live: Any, made: type) -> Any:
        kinds = set if made is set else (list, collections.deque)
        old = [] if made is set or not isinstance(live, Iterable) else list(live)
        target = self._target(live, kinds, made)
        if made is set:
            items = [self._restored_key(nest) for nest in nests]
        else:
            old += [None] * (len(nests) - len(old))
            items = [self.write(one, o) for one, o in zip(nests, old, strict=False)]
        target.clear()
        target.update(items) if made is set else target.extend(items)
        return target

    def _write_tuple(self, nests: Iterable[Nest], live: Any) -> Any:
        nests = [*nests]
        if isinstance(live, frozenset):
            return type(live)(self._restored_key(nest) for nest in nests)
        old = [*live] if isinstance(live, tuple) else []
        old += [None] * (len(nests) - len(old))
        items = [self.write(one, o) for one, o in zip(nests, old, strict=False)]
        if not isinstance(live, tuple):
            return tuple(items)
        return type(live)(*items) if hasattr(live, "_fields") else type(live)(items)

    def _write_array(self, value: Any, live: Any) -> Any:
        target = self._target(live, np.ndarray, value.copy)
        if target.shape != value.shape or target.dtype != value.dtype:
            self._targets[-1] = target = value.copy()
        target[...] = value
        return target

    def _write_object(self, kind: str, attributes: dict[str, Nest], live: Any) -> Any:
        known = self._classes.get(kind)
        if known is None:
            raise TypeError(
                f"A `{kind}` was made during the run that is resumed, and its class is "
                "not known yet: make it when the optimizer or scheduler is made."
            )
        old = dict(vars(live)) if isinstance(live, known) else {}
        target = self._target(live, known, lambda: object.__new__(known))
        table = vars(target)
        for name in [name for name in table if name not in attributes]:
            del table[name]
        for name, nest in attributes.items():
            table[name] = self.write(nest, old.get(name))
        return target

    def _restored_key(self, key: Any) -> Any:
        if isinstance(key, tuple):
            return tuple(self._restored_key(one) for one in key)
        return self.write(key, None) if isinstance(key, dict) else key


def _is_raw(nest: Nest) -> bool:
    """Whether a nest stands for itself."""
    return not isinstance(nest, dict) or KIND not in nest


def _is_constant(nest: Nest) -> bool:
    return isinstance(nest, dict) and nest.get(KIND) in ("constant", "parameter")
