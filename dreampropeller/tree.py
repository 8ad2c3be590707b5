r"""States and nests of tensors: copies, distances, wire format.

A *state* $y$ is a flat mapping from names to tensors. A *carry* is any nest of `dict`,
`list` and `tuple` whose leaves are tensors or JSON scalars. Two distances between
states are used, over the $n$ floating entries (Eq. 6 of `docs/method.md`) or over all
$N$ entries of whatever type (Eq. 7):

$$\mathrm{mean\_square}(a, b) = \tfrac1n \sum_j (a_j - b_j)^2, \qquad
  \mathrm{share\_differing}(a, b) = \tfrac1N\, \#\{j : \mathrm{bits}(a_j) \ne
  \mathrm{bits}(b_j)\}.$$
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import Field, fields, is_dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

State: TypeAlias = dict[str, Tensor]
"""What a drift reads and an update writes: parameters and buffers by name."""
Aux: TypeAlias = dict[str, float]
"""Scalars to log; reported for accepted steps only."""
Nest: TypeAlias = Any
"""`dict`, `list`, `tuple` of tensors and JSON scalars (a recursive type)."""

# Public in all but name: `torch.nn.utils.clip_grad_norm_` is built on them.
_foreach_norm = torch._foreach_norm  # pyright: ignore[reportPrivateImportUsage]
_foreach_sub = torch._foreach_sub  # pyright: ignore[reportPrivateImportUsage]

_SCALARS = (bool, int, float, str, type(None))
_INTEGER_OF_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
# Below a typical last-level cache: the difference of two chunks is then summed before
# it leaves the cache, which halves the time of a distance on CPU.
_CHUNK = 1 << 18


def tensors(nest: Nest) -> Iterator[Tensor]:
    """Yield every tensor of a nest, in order; aliases repeat."""
    if isinstance(nest, Tensor):
        yield nest
    elif isinstance(nest, dict):
        for child in nest.values():
            yield from tensors(child)
    elif isinstance(nest, (list, tuple)):
        for child in nest:
            yield from tensors(child)


def copy_nest(nest: Nest) -> Nest:
    """Copy a nest: same containers, own tensors, aliased tensors aliased again.

    Raises:
        TypeError: A leaf or container that a checkpoint could not restore.
    """
    return _copy(nest, "carry", {})


def _copy(nest: Nest, path: str, memo: dict[int, Tensor]) -> Nest:
    if isinstance(nest, Tensor):
        if id(nest) not in memo:
            memo[id(nest)] = nest.detach().clone()
        return memo[id(nest)]
    if isinstance(nest, _SCALARS):
        return nest
    if type(nest) is dict:
        return {
            key: _copy(child, f"{path}[{key!r}]", memo) for key, child in nest.items()
        }
    if type(nest) in (list, tuple):
        return type(nest)(
            _copy(child, f"{path}[{i}]", memo) for i, child in enumerate(nest)
        )
    raise TypeError(
        f"`{path}` is a `{type(nest).__name__}`. A nest holds `dict`, `list`, `tuple`, "
        "tensors, numbers, strings, booleans and None: write one of these instead."
    )


def encode(
    nest: Any, keep: Callable[[Field[Any]], bool] | None = None
) -> tuple[Any, list[Tensor]]:
    """Split a nest into JSON and its distinct tensors; `decode` is the inverse.

    Args:
        nest: The nest to split.
        keep: Selects the fields of dataclasses to write; None: there are no
            dataclasses.

    Returns:
        A value that `json.dumps` accepts, with tensors as indices, and the tensors.
        Tensors with the same memory and layout are merged.
    """
    found: list[Tensor] = []
    index: dict[Any, int] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            key = _memory(node)
            if key not in index:
                index[key] = len(found)
                found.append(node)
            return {"tensor": index[key]}
        if isinstance(node, float):
            return {"float": node.hex()}  # exact, and JSON has no infinity
        if isinstance(node, _SCALARS):
            return node
        if type(node) is dict:  # as pairs: JSON would turn integer keys into strings
            return {"dict": [[key, visit(child)] for key, child in node.items()]}
        if type(node) in (list, tuple):
            return {type(node).__name__: [visit(child) for child in node]}
        if keep is not None and is_dataclass(node) and not isinstance(node, type):
            kept = {f.name: getattr(node, f.name) for f in fields(node) if keep(f)}
            return {"record": [record_name(type(node)), visit(kept)]}
        raise TypeError(
            f"A `{type(node).__name__}` cannot be stored. A nest holds `dict`, `list`, "
            "`tuple`, tensors, numbers, strings, booleans and None."
        )

    return visit(nest), found


def _memory(tensor: Tensor) -> Any:
    """A key that is equal for tensors with the same memory and layout."""
    if tensor.numel() == 0:
        return id(tensor)
    shown = tensor.dtype, tensor.shape, tensor.stride()
    return tensor.device, tensor.data_ptr(), *shown


def record_name(kind: type) -> str:
    """The name of a dataclass in the output of `encode`."""
    return f"{kind.__module__}.{kind.__qualname__}"


def decode(
    value: Any, found: Sequence[Tensor], records: Mapping[str, type] | None = None
) -> Any:
    """Rebuild a nest from `encode`; fields that were not kept take their defaults.

    Args:
        value: The JSON.
        found: The tensors.
        records: Dataclasses by `record_name`.

    Raises:
        KeyError: The class of a record is not among `records`.
    """
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return found[content]
    if kind == "float":
        return float.fromhex(content)
    if kind == "dict":
        return {key: decode(child, found, records) for key, child in content}
    if kind == "record":
        name, kept = content
        return (records or {})[name](**decode(kept, found, records))
    children = [decode(child, found, records) for child in content]
    return tuple(children) if kind == "tuple" else children


def device_of(nest: Nest) -> torch.device:
    """The device of a nest's first tensor; the CPU if there is none."""
    return next((tensor.device for tensor in tensors(nest)), torch.device("cpu"))


def take_rows(value: Tensor, parents: Tensor) -> Tensor:
    """The rows of a tensor after a jump; new rows are zero.

    Args:
        value: The tensor before the jump, shape ``(old rows, ...)``.
        parents: Old row of each row, −1 for a new row, shape ``(rows,)``.

    Returns:
        A tensor of its own, shape ``(rows, ...)``.
    """
    parents = parents.to(value.device)
    taken = value[parents.clamp(min=0)]
    taken[parents < 0] = 0
    return taken


def is_continuous(value: Tensor) -> bool:
    """Whether entries can move by little: floating or complex numbers."""
    return value.is_floating_point() or value.is_complex()


def widened(value: Tensor) -> Tensor:
    """Half precision as single, as squares overflow; a complex entry as two reals."""
    if value.is_complex():
        return torch.view_as_real(value)
    return value.float() if value.dtype.itemsize < 4 else value


def mean_square(new: State, old: State) -> Float[Tensor, " "]:
    """Mean square difference over the floating entries of two states (Eq. 6).

    A complex entry counts as two.

    Args:
        new: A state.
        old: A state with the same names and shapes.

    Returns:
        A float64 scalar on the states' device, not synchronised with the host.
    """
    squares: list[Tensor] = []
    count = 0
    on_gpu: tuple[list[Tensor], list[Tensor]] = ([], [])
    for name, a in new.items():
        if not is_continuous(a) or a.numel() == 0:
            continue
        b = old[name]
        count += a.numel() * (2 if a.is_complex() else 1)
        if a is b:  # predicted by repetition: the distance is an exact zero
            continue
        a, b = widened(a), widened(b)
        if a.device.type != "cpu":
            on_gpu[0].append(a)
            on_gpu[1].append(b)
            continue
        a, b = a.reshape(-1), b.reshape(-1)
        if a.numel() <= _CHUNK:
            squares.append(torch.linalg.vector_norm(a - b).double().square())
            continue
        scratch = torch.empty(_CHUNK, dtype=a.dtype)
        for start in range(0, a.numel(), _CHUNK):
            part = a[start : start + _CHUNK]
            difference = scratch[: part.numel()]
            torch.sub(part, b[start : start + _CHUNK], out=difference)
            squares.append(torch.linalg.vector_norm(difference).double().square())
    if on_gpu[0]:  # a handful of kernels, however many tensors there are
        norms = _foreach_norm(_foreach_sub(*on_gpu))
        squares += [torch.stack([norm.double() for norm in norms]).square().sum()]
    if not squares:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(squares).sum() / count


def norm(state: State) -> float:
    """The root of the sum of squares of the floating entries."""
    zero = {
        name: value.new_zeros(()).expand(value.shape) for name, value in state.items()
    }
    count = sum(widened(v).numel() for v in state.values() if is_continuous(v))
    return float(mean_square(state, zero) * count) ** 0.5


def norms(state: State) -> dict[str, float]:
    """The root of the sum of squares of each floating tensor, synchronised once."""
    names: list[str] = []
    pieces: list[Tensor] = []
    for name, value in state.items():
        if not is_continuous(value):
            continue
        value = widened(value).reshape(-1)
        # A sum of too many single-precision squares loses digits.
        parts = value.split(_CHUNK)
        names += [name] * len(parts)
        pieces += parts
    if not pieces:
        return {}
    found = torch.stack([part.double() for part in _foreach_norm(pieces)])
    sums = dict.fromkeys(names, 0.0)
    for name, square in zip(names, found.square().tolist(), strict=True):
        sums[name] += square
    return {name: math.sqrt(total) for name, total in sums.items()}


def like(gradient: Tensor, leaf: Tensor) -> Tensor:
    """A gradient with the strides of its leaf, as `backward` lays out `.grad`.

    Norms are summed in the order of the memory, which rounds them.
    """
    if gradient.layout != torch.strided or gradient.stride() == leaf.stride():
        return gradient
    return torch.empty_like(leaf, dtype=gradient.dtype).copy_(gradient)


def moving(y: State, drift: State) -> State:
    """The entries of a drift that move the state: no statistics, no buffers' values."""
    return {
        name: value
        for name, value in drift.items()
        if is_continuous(value)
        and f"{name}/changed" not in drift
        and name in y
        and y[name].shape == value.shape
    }


def share_differing(new: State, old: State) -> Float[Tensor, " "]:
    """Share of all entries whose bits differ: zero exactly for equal states (Eq. 7)."""
    counts = [differs(new[name], old[name]).sum() for name in new if new[name].numel()]
    total = sum(tensor.numel() for tensor in new.values())
    if not counts:
        return torch.zeros((), dtype=torch.float64)
    return torch.stack(counts).sum().double() / total


def differs(new: Tensor, old: Tensor) -> Bool[Tensor, " *shape"]:
    """Where the bits of two tensors differ: −0 is not 0, a NaN equals its copy."""
    if new.is_complex():
        return differs(torch.view_as_real(new), torch.view_as_real(old)).any(-1)
    if new.is_floating_point():
        integer = _INTEGER_OF_SIZE[new.dtype.itemsize]
        return new.view(integer) != old.view(integer)
    return new != old


def all_finite(states: Sequence[State]) -> list[bool]:
    """Whether each state is free of NaN and infinity; one host synchronisation."""
    sums = [
        [
            tensor.detach().sum(dtype=_wide(tensor.dtype)).to(torch.complex128)
            for tensor in state.values()
            if tensor.is_floating_point() or tensor.is_complex()
        ]
        for state in states
    ]
    flat = [value for row in sums for value in row]
    if not flat:
        return [True] * len(states)
    device = max((value.device for value in flat), key=lambda d: d.type != "cpu")
    finite = iter(torch.isfinite(torch.stack([v.to(device) for v in flat])).tolist())
    passed = [all([next(finite) for _ in row]) for row in sums]
    # A sum is fast and a single NaN spoils it, but finite numbers can overflow it.
    return [ok or _entries_finite(y) for ok, y in zip(passed, states, strict=True)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype.itemsize < 4 else dtype


def _entries_finite(state: State) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in state.values())
