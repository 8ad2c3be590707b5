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


def flattened(tensor: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """A contiguous tensor with the dimensions in the order of the memory, and that.

    What shares memory within itself (`expand`, `unfold`) is written out first.
    """
    tensor = tensor.clone()
    order = order_of(tensor)
    return tensor.permute(order).contiguous(), order


def restored(tensor: Tensor, order: Sequence[int]) -> Tensor:
    """What `flattened` was given, in the same memory.

    Raises:
        ValueError: `order` is no order of this tensor's dimensions.
    """
    if sorted(order) != list(range(tensor.dim())):
        raise ValueError(f"no order of {tensor.dim()} dimensions: {order}")
    return tensor.permute([order.index(axis) for axis in range(tensor.dim())])
