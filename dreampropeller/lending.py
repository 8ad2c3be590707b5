"""Lending tensors other values for a while, without a copy where that is safe."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Bytes to which torch aligns CPU memory; at another alignment, kernels may round
differently, so the values must be moved into the memory that the tensor has."""
_ALONE = 2
"""References to a storage that one tensor and a Python object hold."""


@contextlib.contextmanager
def lent(
    tensors: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    private: bool = False,
) -> Iterator[frozenset[str]]:
    """Give tensors other values inside the block, and their own back after it.

    A tensor that shares its memory with nothing else is given the memory of its value,
    which the block may therefore change. Others (views, weights of a recurrent network
    on a GPU, tensors that were captured as `.detach()` or `.data`) are written into, so
    that whatever shares their memory sees the same values.

    Args:
        tensors: The tensors by name.
        values: Their values inside the block, by the same names.
        private: Whether nobody else can know of the tensors' memory.

    Yields:
        The names of the tensors that are written into.
    """
    own = {name: tensor.data for name, tensor in tensors.items()}
    exchanged = {
        name
        for name, tensor in tensors.items()
        if private or _exchanges(tensor, values[name])
    }
    saved = {n: data.clone() for n, data in own.items() if n not in exchanged}
    try:
        for name in exchanged:
            tensors[name].data = values[name].detach()
        for name in saved:
            own[name].copy_(values[name])
        yield frozenset(saved)
    finally:
        for name, tensor in tensors.items():
            tensor.data = own[name]
        for name, value in saved.items():
            own[name].copy_(value)


def overlapping(
    ones: Mapping[str, Tensor], twos: Mapping[str, Tensor]
) -> tuple[str, str] | None:
    """The names of two tensors that share entries, one of each; None: there are none.

    Neighbours in one memory do not share entries.
    """
    strided = [
        {name: t for name, t in tensors.items() if t.layout is torch.strided}
        for tensors in (ones, twos)
    ]
    memory = [
        {name: t.untyped_storage().data_ptr() for name, t in tensors.items()}
        for tensors in strided
    ]
    if not set(memory[0].values()) & set(memory[1].values()) - {0}:
        return None
    for one, two in itertools.product(*strided):
        if memory[0][one] == memory[1][two] and _meet(strided[0][one], strided[1][two]):
            return one, two
    return None


def _meet(one: Tensor, two: Tensor) -> bool:
    """Whether two tensors of one memory have an entry in common."""
    ranges = [_range(one), _range(two)]
    if max(begin for begin, _ in ranges) >= min(end for _, end in ranges):
        return False
    return bool(torch.isin(_places(one), _places(two)).any())


def _range(tensor: Tensor) -> tuple[int, int]:
    """The first byte of a tensor's memory, and the one after the last."""
    extent = sum(
        (n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True)
    )
    begin = tensor.data_ptr()
    return begin, begin + (extent + 1) * tensor.element_size()


def _places(tensor: Tensor) -> Tensor:
    """The addresses of a tensor's entries."""
    found = torch.tensor(tensor.data_ptr())
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        steps = torch.arange(size) * stride * tensor.element_size()
        found = found[..., None] + steps
    return found.flatten()


def _exchanges(tensor: Tensor, value: Tensor) -> bool:
    """Whether a tensor may be given the memory of a value."""
    if tensor.shape != value.shape:  # a jump has changed the rows
        return True
    return (
        tensor.device == value.device
        and tensor.stride() == value.stride()
        and _is_aligned(tensor) == _is_aligned(value)
        and not _is_shared(tensor)
    )


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.device.type != "cpu" or tensor.data_ptr() % _ALIGNMENT == 0


def _is_shared(tensor: Tensor) -> bool:
    """Whether something besides the tensor refers to its memory."""
    count = getattr(torch._C, "_storage_Use_Count", None)
    if count is None:
        return True
    # One reference more than alone: the alias that puts the memory back.
    return count(tensor.untyped_storage()._cdata) > _ALONE + 1
