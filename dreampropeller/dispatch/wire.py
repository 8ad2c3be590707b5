"""Evaluated drifts as flat bytes, for sending between ranks.

*Entries* are sent: the tensors of a drift and the scalars it logged. A rank's buffer
holds its slots' entries one after another, each padded to the alignment.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import UInt8
from torch import Tensor

from dreampropeller.strides import order_of, restored
from dreampropeller.tree import Aux, State

ALIGNMENT = 64
"""Bytes; as torch aligns its own tensors, since CPU kernels may round by alignment."""


@dataclass(frozen=True)
class Entry:
    """A tensor to send: part of a drift, or a logged scalar.

    Attributes:
        name: Its name in the drift, or that of the scalar.
        is_aux: Whether it is a scalar.
        dtype: Name of its type.
        shape: Its shape.
        order: Its dimensions, the outermost in memory first.
    """

    name: str
    is_aux: bool
    dtype: str
    shape: tuple[int, ...]
    order: tuple[int, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """The type that the bytes are viewed as."""
        return getattr(torch, self.dtype)

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensor itself."""
        return self.torch_dtype.itemsize * torch.Size(self.shape).numel()

    @property
    def stride(self) -> int:
        """Bytes to the next entry."""
        return -(-self.num_bytes // ALIGNMENT) * ALIGNMENT


def entries(drift: State, aux: Aux) -> dict[Entry, Tensor]:
    """The entries of an evaluated drift and their values."""
    found: dict[Entry, Tensor] = {}
    for name, value in drift.items():
        dtype = str(value.dtype).removeprefix("torch.")
        entry = Entry(name, False, dtype, tuple(value.shape), order_of(value))
        found[entry] = value.detach()
    for name, scalar in aux.items():
        value = torch.tensor(scalar, dtype=torch.float64)
        found[Entry(name, True, "float64", (), ())] = value
    return found


def size(rows: Sequence[Sequence[Entry]]) -> int:
    """Bytes of a buffer that holds these slots."""
    return sum(entry.stride for row in rows for entry in row)


def pack(
    rows: Sequence[Sequence[Entry]],
    slots: Sequence[dict[Entry, Tensor]],
    buffer: UInt8[Tensor, " bytes"],
) -> None:
    """Write slots into a buffer, each slot's entries in the order of its row."""
    position = 0
    for row, slot in zip(rows, slots, strict=False):  # rows past the slots are empty
        for entry in row:
            part = buffer[position : position + entry.num_bytes]
            part.copy_(as_bytes(slot[entry].permute(entry.order).contiguous()))
            position += entry.stride


def unpack(
    rows: Sequence[Sequence[Entry]], buffer: UInt8[Tensor, " bytes"]
) -> list[tuple[State, Aux]]:
    """The drifts in a buffer; they share its memory."""
    found: list[tuple[State, Aux]] = []
    position = 0
    for row in rows:
        drift: State = {}
        aux: Aux = {}
        for entry in row:
            part = buffer[position : position + entry.num_bytes]
            value = part.view(entry.torch_dtype)
            value = value.view([entry.shape[axis] for axis in entry.order])
            value = restored(value, entry.order)
            if entry.is_aux:
                aux[entry.name] = float(value)
            else:
                drift[entry.name] = value
            position += entry.stride
        found.append((drift, aux))
    return found


def as_bytes(tensor: Tensor) -> UInt8[Tensor, " bytes"]:
    """The memory of a contiguous tensor as bytes, shared with it."""
    return tensor.view(-1).view(torch.uint8)


def fingerprint(y: State) -> int:
    """A checksum of a state: equal for equal states, almost surely different else."""
    total = 0
    for name in sorted(y):
        content = as_bytes(y[name].detach().contiguous())
        whole = content.numel() // 8 * 8
        words = int(content[:whole].view(torch.int64).sum())
        total = (31 * total + words + int(content[whole:].sum())) % 2**62
    return total
