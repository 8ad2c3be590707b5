"""A LightningModule with its DataLoader, unchanged, solved with a window of steps.

python -m examples.lightning_module
"""

from __future__ import annotations

import lightning
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import dreampropeller as dp
from dreampropeller.adapters.lightning import LightningTrajectory


class Spirals(lightning.LightningModule):
    """Tells two spirals apart; nothing in it knows of a window."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(
            nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 1)
        )

    def training_step(
        self, batch: list[torch.Tensor], batch_index: int
    ) -> torch.Tensor:
        """Binary cross entropy of a batch."""
        x, side = batch
        loss = nn.functional.binary_cross_entropy_with_logits(self.net(x)[:, 0], side)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Adam."""
        return torch.optim.Adam(self.parameters(), lr=3e-3)


def spirals(count: int, seed: int) -> TensorDataset:
    """Points on two spirals, and which one each is on."""
    random = torch.Generator().manual_seed(seed)
    side = (torch.arange(count) % 2).float()
    turn = 3 * torch.rand(count, generator=random).sqrt()
    angle = 2 * turn + torch.pi * side
    x = turn[:, None] * torch.stack([angle.cos(), angle.sin()], 1) / 3
    return TensorDataset(x + 0.02 * torch.randn(x.shape, generator=random), side)


def main(num_steps: int = 600, window: int = 8) -> dict[str, float]:
    """Train with and without a window; returns both accuracies on new points."""
    loader = DataLoader(spirals(1024, 0), batch_size=64)
    x, side = spirals(1024, 1).tensors
    found: dict[str, float] = {}
    for name, solver in {
        "sequential": dp.Sequential(),
        "window": dp.PicardSolver(dp.SlidingWindow(window), predictor="auto"),
    }.items():
        torch.manual_seed(0)
        module = Spirals()
        trajectory = LightningTrajectory(module, loader, num_steps=num_steps)
        solution = dp.solve(trajectory, solver)
        trajectory.settle(num_steps, solution.value)  # write it into the module
        with torch.no_grad():
            right = (module.net(x)[:, 0] > 0) == side.bool()
        found[name] = float(right.float().mean())
        print(
            f"{name}: {num_steps} steps in {solution.stats.num_iterations} iterations, "
            f"{100 * found[name]:.1f} % right"
        )
    return found


if __name__ == "__main__":
    main()
