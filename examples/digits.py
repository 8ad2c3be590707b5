"""Beyond 3D: a small CNN on scikit-learn's digits, a window of eight steps at a time.

    python -m examples.digits

trains it sequentially, with a window, with the published rule, and with data
parallelism, and prints who is how fast and how good on digits held out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

from examples.rivals import Task, main

_images, _labels = load_digits(return_X_y=True)
_order = torch.randperm(len(_labels), generator=torch.Generator().manual_seed(0))
_x = torch.tensor(_images, dtype=torch.float32).view(-1, 1, 8, 8)[_order] / 16
_y = torch.tensor(_labels)[_order]
HELD_OUT = 597
TRAIN_X, TRAIN_Y = _x[HELD_OUT:], _y[HELD_OUT:]
TEST_X, TEST_Y = _x[:HELD_OUT], _y[:HELD_OUT]


def make() -> nn.Module:
    """Two convolutions and a linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 4 * 4, 10),
    )


def loss(model: nn.Module, batch_size: int) -> torch.Tensor:
    """Cross entropy of a random batch."""
    rows = torch.randint(len(TRAIN_Y), (batch_size,))
    return cross_entropy(model(TRAIN_X[rows]), TRAIN_Y[rows])


@torch.no_grad()
def accuracy(model: nn.Module) -> float:
    """Share of the held-out digits that are read right, in percent."""
    right = model(TEST_X).argmax(1) == TEST_Y
    return 100 * float(right.float().mean())


TASK = Task(
    make,
    loss,
    accuracy,
    batch_size=32,
    lr=2e-3,
    figure="held-out accuracy, %",
    better=max,
)


def run(argv: Sequence[str] | None = None) -> str:
    """Print the table and return it."""
    return main(TASK, argv, num_steps=400)


if __name__ == "__main__":
    run()
