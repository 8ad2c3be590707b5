"""The order of a tensor's dimensions in memory, kept where tensors travel as bytes.

Kernels take sums in the order of the memory, so another order rounds them otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor


def order_of(tensor: Tensor) -> tuple[int, ...]:
    """The dimensions of a tensor, the outermost in memory first."""
    dimensions = range(tensor.dim())
    if tensor.is_contiguous():
        return tuple(dimensions)
    return tuple(sorted(dimensions, key=lambda axis: -tensor.stride(axis)))


def in_memory_order(tensor: Tensor) -> Tensor:
    """The tensor with its dimensions in that order, contiguous."""
    return tensor.permute(order_of(tensor)).contiguous()


def restored(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """What `in_memory_order` was made from, in the same memory.

    Raises:
        RuntimeError: `order` is none of this tensor's dimensions.
        ValueError: It leaves one out.
    """
    return tensor.permute([order.index(axis) for axis in range(tensor.dim())])
