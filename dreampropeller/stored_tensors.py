"""The tensors of a checkpoint file, and what its header says of them."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreampropeller.strides import flattened, restored

_STORED = {torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool}
_STORED |= {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}
"""Types that every version of safetensors stores; others are written as bytes."""


def store(leaves: Sequence[Tensor]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Arrays as safetensors stores them, and their part of the header."""
    # Safetensors refuses tensors that share memory, and strides it cannot describe.
    flat = [flattened(leaf.detach().cpu()) for leaf in leaves]
    arrays = {str(index): array for index, (array, _) in enumerate(flat)}
    types = {
        key: _form(array) for key, array in arrays.items() if array.dtype not in _STORED
    }
    for key in types:
        arrays[key] = arrays[key].reshape(-1).view(torch.uint8)
    return arrays, {
        "devices": [leaf.device.type for leaf in leaves],
        "orders": [order for _, order in flat],
        "checksums": {key: _checksum(array) for key, array in arrays.items()},
        "forms": {key: _form(array) for key, array in arrays.items()},
        "types": types,
    }


def restore(header: dict[str, Any], arrays: dict[str, Tensor]) -> None:
    """Check arrays that were read, and give them their types and strides again.

    Raises:
        ValueError: They differ from what was written.
        KeyError: The header is incomplete.
    """
    forms = {key: _form(array) for key, array in arrays.items()}
    if header.get("forms", forms) != forms:
        raise ValueError("tensors of other shapes or types than were written")
    if header["checksums"] != {key: _checksum(array) for key, array in arrays.items()}:
        raise ValueError("a checksum differs")
    if {str(index) for index in range(len(header["devices"]))} != arrays.keys():
        raise ValueError("tensors are missing")
    if not all(isinstance(kind, str) for kind in header["devices"]):
        raise ValueError("devices without names")
    for key, (dtype, shape) in header.get("types", {}).items():
        if not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(f"unknown type `{dtype}`")
        arrays[key] = arrays[key].view(getattr(torch, dtype)).reshape(shape)
    orders = header.get("orders", [])  # older files have none
    if len(orders) not in (0, len(arrays)):
        raise ValueError("orders are missing")
    for index, order in enumerate(orders):
        arrays[str(index)] = restored(arrays[str(index)], order)


def _form(array: Tensor) -> list[Any]:
    return [str(array.dtype).removeprefix("torch."), list(array.shape)]


def _checksum(array: Tensor) -> int:
    return zlib.crc32(array.view(-1).view(torch.uint8).numpy().data)
