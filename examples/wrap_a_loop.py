"""Wrap a training loop of your own, and compare it with the loop as it was.

python -m examples.wrap_a_loop
"""

from __future__ import annotations

import torch
from torch import nn

import dreampropeller as dp


def make_model() -> nn.Module:
    """A small network, the same in both runs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 1))


def make_optimizer(params: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
    """The loop's optimizer, as a factory."""
    return torch.optim.Adam(params.values(), lr=1e-3)


def loss(step: int, model: nn.Module) -> torch.Tensor:
    """The body of the loop up to the loss; random numbers are keyed by the step."""
    x = torch.rand(256, 2)
    target = torch.sin(3 * x[:, 0]) * x[:, 1]
    return (model(x)[:, 0] - target).square().mean()


def main(num_steps: int = 1000, window: int = 8) -> dict[str, float]:
    """Solve the loop with and without a window; returns both losses."""
    found: dict[str, float] = {}
    for name, solver in {
        "sequential": dp.Sequential(),
        "window": dp.PicardSolver(dp.SlidingWindow(window), predictor="momentum"),
    }.items():
        model = make_model()
        trajectory = dp.OptimizationTrajectory.from_module(
            model, loss, make_optimizer, num_steps
        )
        solution = dp.solve(trajectory, solver)
        model.load_state_dict(solution.value)
        torch.manual_seed(1)
        found[name] = float(loss(0, model).detach())
        stats = solution.stats
        print(
            f"{name}: {num_steps} steps in {stats.num_iterations} iterations, "
            f"{stats.num_evaluations} gradients, loss {found[name]:.5f}"
        )
    return found


if __name__ == "__main__":
    main()
