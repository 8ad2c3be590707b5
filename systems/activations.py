"""Activations by the names configs use."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "exp": torch.exp,
    "scale_-11_01": lambda x: x * 0.5 + 0.5,
}
"""The last one reads −1…1 as 0…1 without squashing (threestudio's name)."""
