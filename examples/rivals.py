"""A training loop solved in parallel, beside what else eight devices could do with it.

One device per step of the window: an iteration takes about the time of one gradient, so
iterations stand for wall-clock. Data parallelism spends the same devices on a batch of
eight times the size, and one step is one iteration.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

import dreampropeller as dp


@dataclass(frozen=True)
class Task:
    """A model to train.

    Args:
        make: Builds the model; called after `torch.manual_seed`.
        loss: The body of the loop, called with ``(model, batch_size)``; it draws the
            batch from the global generator, which the solver keys by (seed, step).
        measure: The held-out figure of a trained model.
        batch_size: Samples of a step.
        lr: Learning rate of Adam, the best of a few for the sequential run.
        figure: Name of the held-out figure, with its unit.
        better: `max` if a larger figure is better, else `min`.
    """

    make: Callable[[], nn.Module]
    loss: Callable[[nn.Module, int], torch.Tensor]
    measure: Callable[[nn.Module], float]
    batch_size: int
    lr: float
    figure: str
    better: Callable[[Sequence[float]], float]


@dataclass(frozen=True)
class Run:
    """One trained model.

    Args:
        figure: Held-out figure.
        iterations: Rounds of parallel gradients.
        gradients: Gradients of one batch of `Task.batch_size` that were evaluated.
    """

    figure: float
    iterations: int
    gradients: int


def train(
    task: Task,
    solver: dp.Solver,
    num_steps: int,
    seed: int,
    factor: int = 1,
    lr: float | None = None,
) -> Run:
    """Train from a seed; a batch is `factor` times that of the task."""
    torch.manual_seed(seed)
    model = task.make()
    rate = task.lr if lr is None else lr
    trajectory = dp.OptimizationTrajectory.from_module(
        model,
        lambda step, model: task.loss(model, factor * task.batch_size),
        lambda params: torch.optim.Adam(params.values(), lr=rate),
        num_steps=num_steps,
        seed=seed,
    )
    solution = dp.solve(trajectory, solver)
    model.load_state_dict(solution.value)
    stats = solution.stats
    return Run(
        task.measure(model), stats.num_iterations, factor * stats.num_evaluations
    )


def rows(
    task: Task,
    num_steps: int,
    window: int,
    seeds: Sequence[int],
    rates: Sequence[float],
) -> dict[str, list[Run]]:
    """Every rival's runs, one per seed, by the rival's name.

    Args:
        task: What to train.
        num_steps: Steps of the sequential run.
        window: Window, and number of devices.
        seeds: Seeds of model and batches.
        rates: Multiples of the task's learning rate; data parallelism has the best of
            them, chosen by the held-out figure, which favours it.
    """
    sliding = dp.SlidingWindow(window)
    solvers = {
        "sequential": dp.Sequential(),
        "window, defaults": dp.PicardSolver(sliding, predictor="auto"),
        "window, `DriftThreshold(0.4)`": dp.PicardSolver(
            sliding, dp.DriftThreshold(0.4), predictor="auto"
        ),
        "window, `EMAThreshold` (published)": dp.PicardSolver(
            sliding, dp.EMAThreshold(5e-6, 0.9, "median")
        ),
    }
    found = {
        name: [train(task, solver, num_steps, seed) for seed in seeds]
        for name, solver in solvers.items()
    }
    equal = statistics.mean(run.iterations for run in found["window, defaults"])
    for name, steps in (
        (f"{window}× batch, 1/{window} of the steps", num_steps // window),
        (f"{window}× batch, as many iterations as the defaults", round(equal)),
    ):
        tried = [
            [
                train(
                    task, dp.Sequential(), max(1, steps), seed, window, rate * task.lr
                )
                for seed in seeds
            ]
            for rate in rates
        ]
        means = [statistics.mean(run.figure for run in runs) for runs in tried]
        best = means.index(task.better(means))
        found[f"{name}, learning rate ×{rates[best]:g}"] = tried[best]
    return found


def table(task: Task, found: dict[str, list[Run]]) -> str:
    """The rivals as Markdown: means over the seeds, and the spread of the figure."""
    lines = [
        f"| | iterations | speed-up | gradients | {task.figure} | lowest to highest |",
        "|---|---|---|---|---|---|",
    ]
    start = statistics.mean(run.iterations for run in next(iter(found.values())))
    for name, runs in found.items():
        iterations = statistics.mean(run.iterations for run in runs)
        gradients = statistics.mean(run.gradients for run in runs)
        figures = [run.figure for run in runs]
        lines.append(
            f"| {name} | {iterations:.0f} | {start / iterations:.1f}× | "
            f"{gradients:.0f} | {statistics.mean(figures):.2f} | "
            f"{min(figures):.2f} to {max(figures):.2f} |"
        )
    return "\n".join(lines)


def main(task: Task, argv: Sequence[str] | None, num_steps: int) -> str:
    """Read the options, train every rival, and print the table, which is returned."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=num_steps)
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--rates", type=float, nargs="+", default=[1, 2, 4, 8])
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    found = rows(task, options.steps, options.window, options.seeds, options.rates)
    text = table(task, found)
    print(text)
    return text
