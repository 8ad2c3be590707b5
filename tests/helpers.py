"""The toy trajectories, each beside a plain loop written by hand."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch import Tensor

from dreampropeller import (
    Evaluation,
    OptimizationTrajectory,
    Rollout,
    StepRandom,
    Trajectory,
)
from dreampropeller.trajectory import Drift, Parents
from dreampropeller.tree import Nest, State, take_rows

RANDOM = StepRandom(3)
STEPS = 12


def tree_equal(a: Nest, b: Nest) -> bool:
    """Equal containers, types, shapes and bits."""
    if isinstance(a, Tensor):
        return (
            isinstance(b, Tensor)
            and a.dtype == b.dtype
            and a.shape == b.shape
            and torch.equal(_bits(a), _bits(b))
        )
    if type(a) is not type(b):
        return False
    if is_dataclass(a):
        return tree_equal(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(tree_equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(tree_equal, a, b))
    return a == b


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


@dataclass(frozen=True)
class Toy:
    """A trajectory and the loop it must equal; the loop returns every state."""

    make: Callable[[], Trajectory[Any]]
    loop: Callable[[], list[State]]


def noise(step: int, size: int) -> Tensor:
    return torch.randn(size, generator=RANDOM.generator(step, "noise")).double()


# A quadratic with noisy gradients, Adam.
START = 1 + 0.5 * torch.cos(1.3 * torch.arange(6, dtype=torch.float64))
CURVATURE = 0.2 * (1 + torch.arange(6, dtype=torch.float64))


def quadratic_loss(step: int, y: State) -> tuple[Tensor, dict[str, Tensor]]:
    x = y["x"]
    loss = (CURVATURE * x.square() / 2 + 0.3 * noise(step, 6) * x).sum()
    return loss, {"loss": loss}


def make_quadratic() -> OptimizationTrajectory:
    return OptimizationTrajectory(
        quadratic_loss,
        {"x": START},
        lambda params: torch.optim.Adam(params.values(), lr=0.05, betas=(0.9, 0.99)),
        num_steps=STEPS,
    )


def loop_quadratic() -> list[State]:
    x = START.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.05, betas=(0.9, 0.99))
    states = [{"x": x.detach().clone()}]
    for step in range(STEPS):
        optimizer.zero_grad()
        quadratic_loss(step, {"x": x})[0].backward()
        optimizer.step()
        states.append({"x": x.detach().clone()})
    return states


# A small network, clipped; AdamW or SGD with momentum, and a scheduler.
def network_start() -> dict[str, Tensor]:
    generator = RANDOM.generator(0, "start")
    shapes = {"w": (4, 2), "b": (4,), "v": (4,), "unused": (2,)}
    return {
        name: torch.randn(shape, generator=generator).double()
        for name, shape in shapes.items()
    }


def network_loss(step: int, y: State) -> Tensor:
    inputs = torch.rand(8, 2, generator=RANDOM.generator(step, "data")).double()
    output = torch.tanh(inputs @ y["w"].T + y["b"]) @ y["v"]
    loss = (output - torch.sin(3 * inputs[:, 0])).square().mean()
    if step % 5 == 0:  # on other steps this parameter has no gradient
        loss = loss + y["unused"].square().sum()
    return loss


def adamw(params: dict[str, Tensor]) -> torch.optim.Optimizer:
    groups = [
        {"params": [params["w"], params["v"], params["unused"]], "weight_decay": 0.1},
        {"params": [params["b"]], "weight_decay": 0.0, "lr": 0.01},
    ]
    return torch.optim.AdamW(groups, lr=0.05)


def sgd(params: dict[str, Tensor]) -> torch.optim.Optimizer:
    return torch.optim.SGD(params.values(), lr=0.2, momentum=0.9, nesterov=True)


def cosine(
    optimizer: torch.optim.Optimizer,
) -> torch.optim.lr_scheduler.LRScheduler:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS)


def make_network(optimizer: Any) -> OptimizationTrajectory:
    return OptimizationTrajectory(
        network_loss,
        network_start(),
        optimizer,
        num_steps=STEPS,
        scheduler=cosine,
        clip_grad_norm=0.5,
    )


def loop_network(factory: Any) -> list[State]:
    params = {n: p.requires_grad_(True) for n, p in network_start().items()}
    optimizer = factory(params)
    scheduler = cosine(optimizer)
    states = [{n: p.detach().clone() for n, p in params.items()}]
    for step in range(STEPS):
        optimizer.zero_grad()
        network_loss(step, params).backward()
        torch.nn.utils.clip_grad_norm_(params.values(), 0.5)
        optimizer.step()
        scheduler.step()
        states.append({n: p.detach().clone() for n, p in params.items()})
    return states


# A loss that reads a grid, which is updated from the parameters every 4 steps.
def grid_loss(step: int, y: State) -> Tensor:
    if step % 4 == 0:
        cell = step // 4 % 5
        decayed = 0.95 * y["grid"]
        decayed[cell] = torch.maximum(decayed[cell], y["x"].detach().square().sum())
        y["grid"] = decayed  # rebound, as nerfacc does
        y["occupied"] = decayed > 0.5
        y["count"] += 1  # in place
    gate = torch.where(y["occupied"], y["grid"], 0.1).sum()
    return (quadratic_loss(step, y)[0] * (0.5 + gate)).sum()


def grid_start() -> tuple[State, State]:
    grid = torch.zeros(5, dtype=torch.float64)
    count = torch.zeros((), dtype=torch.int64)
    return {"x": START.clone()}, {"grid": grid, "occupied": grid > 0, "count": count}


def make_grid() -> OptimizationTrajectory:
    params, buffers = grid_start()
    return OptimizationTrajectory(
        grid_loss,
        params,
        lambda p: torch.optim.Adam(p.values(), lr=0.03),
        num_steps=STEPS,
        buffers=buffers,
    )


def loop_grid() -> list[State]:
    params, y = grid_start()
    x = params["x"].requires_grad_(True)
    optimizer = torch.optim.Adam([x], lr=0.03)
    states = [{**params, **y}]
    states = [{name: tensor.detach().clone() for name, tensor in states[0].items()}]
    for step in range(STEPS):
        view = {"x": x, **y}
        optimizer.zero_grad()
        grid_loss(step, view).backward()
        y = {name: tensor.detach().clone() for name, tensor in view.items()}
        y.pop("x")
        optimizer.step()
        states.append({"x": x.detach().clone(), **{n: t.clone() for n, t in y.items()}})
    return states


# Points that are pulled to targets; the farthest split in two at steps 0, 5 and 9.
JUMPS = (0, 5, 9)


def points_loss(step: int, y: State) -> Tensor:
    targets = torch.rand(7, generator=RANDOM.generator(step, "targets")).double()
    targets = targets.to(y["points"].device)
    distance = (y["points"][:, None] - 3 * targets[None]).square()
    return distance.amin(0).sum() + 0.01 * distance.sum()


class GrowingPoints(OptimizationTrajectory):
    """Rows and their Adam moments are split at jumps, as Gaussians are densified."""

    def next_jump(self, step: int) -> int:
        return next((jump for jump in JUMPS if jump > step), self.num_steps)

    def jump(
        self, step: int, y: State, carry: Nest
    ) -> tuple[State, Nest, Parents | None]:
        parents = rows_to_keep(step, y["points"])
        moments = carry["optimizers"][0]["state"].get("points", {})
        for name in ("exp_avg", "exp_avg_sq"):
            if name in moments:
                moments[name] = take_rows(moments[name], parents)
        grown = split(y["points"], parents)
        return {**y, "points": grown}, carry, {"points": parents}


def rows_to_keep(step: int, points: Tensor) -> Tensor:
    farthest = int((points.detach() - 1.5).abs().argmax())
    kept = torch.arange(len(points), device=points.device)
    if step == 9:  # pruning
        kept = kept[kept != farthest]
    return torch.cat([kept, kept.new_tensor([-1])])


def split(rows: Tensor, parents: Tensor) -> Tensor:
    grown = take_rows(rows.detach(), parents)
    grown[parents < 0] = 0.5 * rows.detach().mean()
    return grown


def rolled_out(
    steps: Sequence[int],
    guesses: Sequence[State],
    drifts: Sequence[State],
    stride: int = 1,
    states: Sequence[State] = (),
    errors: Sequence[float] = (),
    length: int | None = None,
) -> Rollout:
    """An iteration as a component sees it; drifts are used as they were evaluated."""
    size = len(steps) if length is None else length
    evaluation = Evaluation(steps, guesses, drifts, length=size)
    return evaluation.rolled_out(states, drifts, errors, errors, stride=stride)


def make_growing(device: str = "cpu") -> GrowingPoints:
    start = torch.linspace(0, 3, 3, dtype=torch.float64, device=device)
    return GrowingPoints(
        points_loss,
        {"points": start},
        lambda p: torch.optim.Adam(p.values(), lr=0.05),
        num_steps=STEPS,
    )


def loop_growing() -> list[State]:
    points = torch.linspace(0, 3, 3, dtype=torch.float64)
    moments = (torch.zeros_like(points), torch.zeros_like(points), 0)
    states = []
    for step in range(STEPS):
        if step in JUMPS:
            parents = rows_to_keep(step, points)
            points = split(points, parents)
            m, v, count = moments
            moments = (take_rows(m, parents), take_rows(v, parents), count)
        states.append({"points": points.clone()})
        leaf = points.clone().requires_grad_(True)
        points_loss(step, {"points": leaf}).backward()
        optimizer = torch.optim.Adam([leaf], lr=0.05)
        m, v, count = moments
        if count:
            optimizer.state[leaf] = {
                "step": torch.tensor(float(count)),
                "exp_avg": m,
                "exp_avg_sq": v,
            }
        optimizer.step()
        after = optimizer.state[leaf]
        moments = (after["exp_avg"], after["exp_avg_sq"], count + 1)
        points = leaf.detach()
    states.append({"points": points.clone()})
    return states


# An Ornstein–Uhlenbeck equation, Euler–Maruyama; the carry counts the steps.
class OrnsteinUhlenbeck(Trajectory[list[int]]):
    num_steps = STEPS

    def init(self) -> tuple[State, list[int]]:
        return {"x": torch.ones(3, dtype=torch.float64)}, [0]

    def make_drift(self, device: torch.device) -> Drift:
        return lambda step, y: ({"x": -(y["x"] ** 3) + math.sin(step)}, {"t": step / 1})

    def update(
        self, step: int, y: State, carry: list[int], drift: State
    ) -> tuple[State, list[int]]:
        carry[0] += 1  # consumed, as the contract allows
        kick = 0.2 * math.sqrt(0.02) * noise(step, 3)
        return {"x": y["x"] + 0.02 * drift["x"] + kick}, carry


def loop_sde() -> list[State]:
    x = torch.ones(3, dtype=torch.float64)
    states = [{"x": x}]
    for step in range(STEPS):
        kick = 0.2 * math.sqrt(0.02) * noise(step, 3)
        x = x + 0.02 * (-(x**3) + math.sin(step)) + kick
        states.append({"x": x})
    return states


TOYS: dict[str, Toy] = {
    "quadratic-adam": Toy(make_quadratic, loop_quadratic),
    "network-adamw": Toy(lambda: make_network(adamw), lambda: loop_network(adamw)),
    "network-sgd": Toy(lambda: make_network(sgd), lambda: loop_network(sgd)),
    "grid": Toy(make_grid, loop_grid),
    "growing": Toy(make_growing, loop_growing),
    "sde": Toy(OrnsteinUhlenbeck, loop_sde),
}
