"""Numbers and tensors that evaluations change, wherever something refers to them.

A solve evaluates steps more often than the loop does, and in another order. A count, an
average or a list of past losses therefore has other values than in the loop, and
sooner or later may decide something. Everything that a loss, a module or an optimizer
refers to is walked before and after an evaluation is repeated: attributes, containers,
closures, global names, class attributes, attributes of functions. What differs then
depends on the number of evaluations.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import sys
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torch.utils.data import DataLoader, Dataset

from dreampropeller.tree import differs

_DEPTH = 8
_LARGE = 1000
"""Entries from which a container is data, and not memory."""
_MANY = 20000
"""Objects after which the walk ends."""
_SAMPLE = 4096
"""Entries of a tensor that are kept; of a larger one as many, evenly spaced."""
_CODE = (type, types.FunctionType, types.MethodType, functools.partial)
_NUMBERS = (bool, int, float, complex, np.generic)
_QUIET = frozenset(("torch", "numpy", "random", "threading", "dreampropeller"))
_QUIET |= {"logging", "tqdm", "rich", "torchmetrics", "wandb", "mlflow"}
_QUIET |= {"tensorboard", "tensorboardX", "comet_ml", "neptune", "clearml", "aim"}
_QUIET |= {"swanlab"}
"""Packages whose objects only observe, or are handled elsewhere."""
_AGAIN = "\0"
"""Between a path and a number, where several values have the same path."""
_TABLES = frozenset(name for name in vars(nn.Module()) if "hooks" not in name)
"""Attributes of every module that are compared elsewhere."""


class Counters:
    """A record of the numbers and small tensors that objects refer to.

    Args:
        roots: Objects by name at which the walk begins.
        host: A module whose parameters and buffers are recorded elsewhere.
        carried: Whether the attributes of the roots are recorded elsewhere, with all
            that they hold: only what functions and classes refer to is then recorded.
        ignore: Paths that are ignored, with all that lies below.

    Attributes:
        optimizers: Optimizers met, by path.
        schedulers: Schedulers met, by path.
        others: Further objects met, by path.
    """

    def __init__(
        self,
        roots: Mapping[str, object],
        host: nn.Module | None = None,
        carried: bool = False,
        ignore: Collection[str] = (),
    ) -> None:
        self._again = roots, host, carried, frozenset(ignore)
        self._ignore, self._carried = self._again[3], carried
        self._hosts = set() if host is None else {id(one) for one in host.modules()}
        state = [] if host is None else [*host.parameters(), *host.buffers()]
        self._state = {id(one) for one in state}
        self._memory = {t.untyped_storage().data_ptr() for t in state if t.numel()}
        self._values: dict[str, Any] = {}
        self._lists: dict[str, Any] = {}
        self._seen: dict[int, object] = {}  # alive, so that identities stay unique
        self._ignored: set[str] = set()
        self.optimizers: dict[str, Optimizer] = {}
        self.schedulers: dict[str, LRScheduler] = {}
        self.others: dict[str, object] = {}
        self._later: list[tuple[str, Any]] = []
        self._records = not carried
        for path, root in roots.items():
            self._visit(path, root, 0)
        self._records = True
        for path, function in self._later:  # what they share is carried
            self._visit(path, function, 0)

    def again(self) -> Counters:
        """A record of the same objects as they are now."""
        return Counters(*self._again)

    def unknown(self) -> list[str]:
        """Paths that were to be ignored and that the walk did not meet."""
        return sorted(self._ignore - self._ignored)

    @property
    def met(self) -> set[str]:
        """Paths that were to be ignored and that the walk met."""
        return self._ignored

    def changed(self, now: Counters) -> list[str]:
        """Paths of the numbers and tensors that differ in a later record."""
        found = [
            path.partition(_AGAIN)[0]
            for path, value in now._values.items()
            if path in self._values and not _same(self._values[path], value)
        ]
        return list(dict.fromkeys(found))

    def grown(self, now: Counters) -> dict[str, tuple[Any, int]]:
        """Lists that have grown in a later record, with their former lengths."""
        return {
            path.replace(_AGAIN, " "): (now._seen[one], before)
            for path, (one, length) in now._lists.items()
            for was, before in [self._lists.get(path, (one, length))]
            if was == one and before < length
        }

    def _visit(self, path: str, value: Any, depth: int) -> None:
        # A weak proxy of what is gone, or attributes that are computed.
        with contextlib.suppress(ReferenceError, KeyError):
            self._look(path, value, depth)

    def _look(self, path: str, value: Any, depth: int) -> None:
        if path in self._ignore or path.rpartition(".")[2] in self._ignore:
            self._ignored |= {path, path.rpartition(".")[2]} & self._ignore
            return
        if isinstance(value, _NUMBERS):
            if self._records:
                self._note(path, value)
            return
        if isinstance(value, Tensor):
            if self._records and id(value) not in self._state:
                self._note_tensor(path, value)
            return
        if id(value) in self._seen or depth > _DEPTH or len(self._seen) > _MANY:
            return
        if not self._records and isinstance(value, _CODE):
            self._later.append((path, value))
            return
        self._seen[id(value)] = value
        for name, child in self._children(path, value):
            deeper = not isinstance(child, nn.Module)  # networks are deep
            self._visit(name, child, depth + deeper)

    def _note(self, path: str, value: Any) -> None:
        """Record a value."""
        self._values[_unused(path, self._values)] = value

    def _note_tensor(self, path: str, value: Tensor) -> None:
        if value.is_inference() or value.layout is not torch.strided:
            return
        if value.numel() and value.untyped_storage().data_ptr() in self._memory:
            return
        large = value._version if value.numel() >= 2 * _SAMPLE else 0
        self._note(path, (value.shape, value.dtype, large, _sample(value.detach())))

    def _children(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        """Names and values inside of a value."""
        if isinstance(value, (dict, list, tuple, set, collections.deque)):
            yield from self._items(path, value)
        elif isinstance(value, np.ndarray):
            if value.dtype.kind in "biufc" and value.size <= _SAMPLE and self._records:
                self._note(path, value.copy())
        elif isinstance(value, functools.partial):
            inner = [value.func, *value.args, *value.keywords.values()]
            yield from ((path, one) for one in inner)
        elif isinstance(value, types.MethodType):
            yield from ((path, value.__self__), (path, value.__func__))
        elif isinstance(value, types.FunctionType):
            if not is_library(value.__module__):
                yield from _referred(value)
        elif isinstance(value, type):
            if not is_library(value.__module__):
                yield from _attributes(path, value)
        elif isinstance(value, itertools.count):
            if self._records:
                self._note(path, repr(value))
        elif self._enters(path, value):
            yield from _attributes(path, value, id(value) in self._hosts)
            yield from ((_join(path, o.__name__), o) for o in type(value).__mro__)

    def _items(self, path: str, value: Any) -> Iterator[tuple[str, Any]]:
        if isinstance(value, (dict, set)) and self._records:
            self._note(path, len(value))
        if len(value) > _LARGE and isinstance(value, (dict, tuple, set)):
            return
        if isinstance(value, (list, collections.deque)):
            self._lists[_unused(path, self._lists)] = id(value), len(value)
            if len(value) > _LARGE:
                return
        if isinstance(value, dict):
            for number, (key, child) in enumerate([*value.items()]):
                if isinstance(key, str) and key.isidentifier():
                    yield _join(path, key), child
                else:  # a parameter's `repr` prints all of it
                    shown = repr(key) if isinstance(key, (str, int)) else f"#{number}"
                    yield f"{path}[{shown}]", child
        elif not isinstance(value, set):
            yield from ((f"{path}[{i}]", child) for i, child in enumerate([*value]))

    def _enters(self, path: str, value: Any) -> bool:
        """Whether the attributes of an object and its class are looked at."""
        slots = hasattr(value, "__slots__") and not is_library(type(value).__module__)
        known = slots or hasattr(value, "__dict__")
        if not known or isinstance(value, types.ModuleType):
            return False
        if isinstance(value, Optimizer):
            self.optimizers[path] = value
            return self._carried
        if isinstance(value, LRScheduler):
            self.schedulers[path] = value
            return self._carried
        self.others[path] = value
        package = type(value).__module__.split(".")[0]
        known = isinstance(value, (nn.Module, Dataset, DataLoader))
        return package not in _QUIET or (known and package != "torchmetrics")


@functools.cache
def is_library(name: str | None) -> bool:
    """Whether a module's name is that of an installed package."""
    root = (name or "builtins").split(".")[0]
    if root in sys.stdlib_module_names or root in _QUIET:
        return True
    file = getattr(sys.modules.get(root), "__file__", None) or ""
    return "site-packages" in file or "dist-packages" in file


@contextlib.contextmanager
def lengthened(lists: Iterable[tuple[Any, int]]) -> Iterator[None]:
    """Lists with the like of what they have grown by appended, inside the block.

    A thousand times, and each number another one.

    Args:
        lists: The lists, and their lengths before they grew.
    """
    lists = [*lists]
    before = [(one, [*one]) for one, _ in lists]
    try:
        for one, length in lists:
            grown = [*one][length:]
            one.extend(_varied(item, n) for n in range(_LARGE) for item in grown)
        yield
    finally:
        for one, items in before:
            one.clear()
            one.extend(items)


def _sample(value: Tensor) -> Tensor:
    """A copy of a tensor's entries, of a large one of `_SAMPLE` of them, flat."""
    stride = max(1, value.numel() // _SAMPLE)
    if stride == 1 or value.is_contiguous():
        return value.reshape(-1)[::stride].clone()
    index = torch.arange(0, value.numel(), stride, device=value.device)
    places = []
    for size in reversed(value.shape):
        places.append(index % size)
        index = index // size
    return value[tuple(reversed(places))]


def _varied(item: Any, n: int) -> Any:
    number = isinstance(item, (float, int)) and not isinstance(item, bool)
    small = isinstance(item, Tensor) and item.is_floating_point() and item.numel() == 1
    if number or small:  # of an image a thousand references are enough
        return item * (1 + n % 7 / 4) + n % 3
    return item


def _attributes(path: str, value: Any, host: bool = False) -> Iterator[tuple[str, Any]]:
    """The attributes of an object or class; `host`: without registered tensors."""
    module = isinstance(value, nn.Module)
    for name, child in _own(value):
        if module and name in ("_parameters", "_buffers", "_modules"):
            if name == "_modules" or not host:
                yield from ((_join(path, n), one) for n, one in child.items())
        elif name == "__wrapped__" or not (
            (module and name in _TABLES) or name.startswith("__")
        ):
            if isinstance(child, (staticmethod, classmethod)):
                child = child.__func__
            elif isinstance(child, property):
                child = child.fget
            yield _join(path, name), child


def _own(value: Any) -> list[tuple[str, Any]]:
    """Attributes of an object by name, those in slots included."""
    found = dict(getattr(value, "__dict__", {}))
    if not isinstance(value, type):
        for owner in type(value).__mro__:
            slots = vars(owner).get("__slots__", ())
            for name in (slots,) if isinstance(slots, str) else slots:
                if hasattr(value, name):
                    found.setdefault(name, getattr(value, name))
    return [*found.items()]


def _referred(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """What a function refers to: closure, globals, defaults, attributes."""
    code = function.__code__
    for name, cell in zip(code.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an empty cell
            yield name, cell.cell_contents
    names = {*global_names(code)}
    for name in sorted(names & function.__globals__.keys()):
        value = function.__globals__[name]
        if not isinstance(value, types.ModuleType):
            yield name, value
        elif not is_library(value.__name__):
            inner = sorted(names & vars(value).keys())
            yield from ((f"{name}.{one}", vars(value)[one]) for one in inner)
    defaults = [
        *(function.__defaults__ or ()),
        *(function.__kwdefaults__ or {}).values(),
    ]
    yield from ((f"default {i}", value) for i, value in enumerate(defaults))
    wrapped = vars(function).items()
    yield from ((f"{function.__name__}.{n}", one) for n, one in [*wrapped])


def global_names(code: types.CodeType) -> Iterator[str]:
    """Names that a function's code looks up, those of inner functions included."""
    yield from code.co_names
    for inner in code.co_consts:
        if isinstance(inner, types.CodeType):
            yield from global_names(inner)


def _unused(path: str, known: Mapping[str, Any]) -> str:
    """A key for a path: closures of two functions may use one name."""
    keys = (f"{path}{_AGAIN}{n}" if n else path for n in itertools.count())
    return next(key for key in keys if key not in known)


def _join(path: str, name: object) -> str:
    return f"{path}.{name}" if path else str(name)


def _same(one: Any, two: Any) -> bool:
    if isinstance(one, tuple):
        if not isinstance(two, tuple) or one[:3] != two[:3]:
            return False
        return not bool(differs(one[3], two[3]).any())
    if isinstance(one, np.ndarray):
        return np.array_equal(one, two)
    return type(one) is type(two) and (one == two or one != one)
