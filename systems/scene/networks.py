"""Activations and small networks shared by fields and backgrounds."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping

import torch
from jaxtyping import Float
from torch import Tensor, nn

ACTIVATIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "none": lambda x: x,
    "sigmoid": torch.sigmoid,
    "softplus": torch.nn.functional.softplus,
    "exp": torch.exp,
    "scale_-11_01": lambda x: x * 0.5 + 0.5,
}
"""The last one reads −1…1 as 0…1 without squashing (threestudio's name)."""


class MLP(nn.Sequential):
    """A perceptron with ReLU between layers and without biases (as in threestudio).

    Args:
        inputs: Number of input channels.
        outputs: Number of output channels.
        neurons: Width of the hidden layers.
        hidden_layers: Number of hidden layers.
    """

    def __init__(
        self, inputs: int, outputs: int, neurons: int, hidden_layers: int
    ) -> None:
        widths = [inputs, *[neurons] * hidden_layers]
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Linear(before, after, bias=False), nn.ReLU()]
        super().__init__(*layers, nn.Linear(widths[-1], outputs, bias=False))


def spherical_harmonics(
    directions: Float[Tensor, "*batch 3"],
) -> Float[Tensor, "*batch 9"]:
    """Real spherical harmonics of degrees 0, 1 and 2 at unit directions."""
    x, y, z = directions.unbind(-1)
    return torch.stack(
        [
            torch.full_like(x, 0.28209479),
            0.48860251 * y,
            0.48860251 * z,
            0.48860251 * x,
            1.09254843 * x * y,
            1.09254843 * y * z,
            0.31539157 * (3 * z * z - 1),
            1.09254843 * x * z,
            0.54627422 * (x * x - y * y),
        ],
        -1,
    )
