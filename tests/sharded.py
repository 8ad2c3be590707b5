"""A problem whose steps have views, and what ranks do with it."""

from __future__ import annotations

import functools
import os
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import dreampropeller as dp
from dreampropeller import checkpoint
from dreampropeller.trajectory import Drift
from dreampropeller.tree import State

CPU = torch.device("cpu")
VIEWS = 5
STEPS = 8


class Scene(nn.Module):
    """Points, a parameter that only the last view sees, and a buffer that evolves."""

    def __init__(self) -> None:
        super().__init__()
        self.points = nn.Parameter(torch.linspace(-1, 1, 6).double())
        self.last = nn.Parameter(torch.ones(1).double())
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("seen", torch.zeros(6).double())


def images(module: Any, step: int, random: dp.StepRandom, views: range) -> Tensor:
    module.count += 1
    module.seen[step % 6] = 1.0 + step
    noise = random.draws(step, "noise").randn(len(views), 6).double()
    found = (module.points + noise).sin()
    last = torch.tensor([float(view == VIEWS - 1) for view in views]).double()
    return found + (last * module.last)[:, None] if any(last) else found


def hit(seen: Tensor) -> Tensor:
    return (seen > 0.2).double()


def whole_loss(step: int, module: Any) -> Any:
    seen = images(module, step, dp.StepRandom(0), range(VIEWS))
    mean = seen.square().sum() / VIEWS
    share = (hit(seen) * seen).sum() / hit(seen).sum()
    loss = mean + 0.5 * share
    return loss, {"loss": loss, "mean": mean, "share": share}


def split(index: int, count: int) -> Any:
    shard = dp.Shard(index, count)
    random = dp.ShardRandom(0, shard, lambda step: VIEWS)

    def loss(step: int, module: Any) -> dp.Contribution | None:
        mine = range(VIEWS)[shard.of(VIEWS)]
        if not mine:
            return None
        seen = images(module, step, random, mine)
        mean = seen.square().sum() / VIEWS
        ratio = dp.Ratio(0.5, (hit(seen) * seen).sum(), hit(seen).sum())
        return dp.Contribution(mean, {"loss": mean, "mean": mean}, {"share": ratio})

    return loss


def trajectory(
    precision: str = "32-true", loss: Any = None, kind: Any = dp.OptimizationTrajectory
) -> Any:
    return kind.from_module(
        Scene(),
        loss or dp.ShardedLoss(whole_loss, split),
        lambda named: torch.optim.Adam(named.values(), lr=0.05),
        STEPS,
        precision=precision,
    )


def exact(window: int) -> dp.PicardSolver:
    return dp.PicardSolver(dp.SlidingWindow(window), dp.FixedThreshold(0), "momentum")


LOOSE = dp.PicardSolver(dp.SlidingWindow(3), dp.DriftThreshold(0.3), "auto")


def spread(views: int) -> Any:
    return functools.partial(
        dp.DistributedDispatcher, timeout=20.0, fingerprint_every=1, views=views
    )


def solve_on_meshes(folder: str) -> None:
    """Every mesh of four ranks: exactly, loosely, stopped and gone on elsewhere."""
    warnings.simplefilter("ignore")
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for views in (1, 2, 4):
        for window in (1, 5):
            solution = dp.solve(trajectory(), exact(window), spread(views))
            found[f"{views}/{window}"] = (solution.value, solution.carry)
        logged: list[Any] = []
        solution = dp.solve(
            trajectory(),
            LOOSE,
            spread(views),
            on_iteration=lambda _, it, log=logged: log.append(it.aux),
        )
        found[f"{views}/loose"] = (solution.value, solution.stats.strides, logged)
    half = dp.solve(
        trajectory(), exact(3), spread(2), max_iterations=2, throw=False
    ).state
    path = Path(folder) / os.environ["RANK"] / "step-00000001.safetensors"
    path.parent.mkdir()
    checkpoint.save(path, half)
    for views in (1, 2, 4):
        state: Any = checkpoint.load(path)
        solution = dp.solve(trajectory(), exact(3), spread(views), state=state)
        found[f"resumed/{views}"] = solution.value
    found["errors"] = [error_of(how) for how in ("drift", "join", "wrong", "mesh")]
    torch.distributed.destroy_process_group()
    torch.save(found, path.parent / "found")


def error_of(how: str) -> str:
    """The error that a fault raises on this rank of four, in a mesh of 2 × 2."""
    rank = int(os.environ["RANK"])

    def loss(index: int, count: int) -> Any:
        healthy = split(index, count)

        def faulty(step: int, module: Any) -> Any:
            if how == "drift" and rank == 3 and step == 3:
                raise ZeroDivisionError("no such image")
            part = healthy(step, module)
            if how == "wrong":  # its mean is of its own views alone
                share = VIEWS / len(range(VIEWS)[dp.Shard(index, count).of(VIEWS)])
                return dp.Contribution(part.loss * share, part.aux, part.ratios)
            return part

        return faulty

    def join(logged: Any) -> dict[str, float]:
        if how == "join" and rank == 1:
            raise KeyError("loss")
        return {}

    problem = trajectory(loss=dp.ShardedLoss(whole_loss, loss, join))
    try:
        dp.solve(problem, exact(4), spread(3 if how == "mesh" else 2))
    except (dp.WorkerError, ValueError) as error:
        return f"{type(error).__name__}: {error}"
    return ""


class Killed(dp.OptimizationTrajectory):
    """One rank is killed in the middle of a shard."""

    who = -1

    def make_shard(self, device: torch.device, index: int, count: int) -> Drift:
        healthy = super().make_shard(device, index, count)

        def drift(step: int, y: State) -> Any:
            if step == 2 and int(os.environ["RANK"]) == self.who:
                print("fault", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
                time.sleep(60)  # the signal arrives
            return healthy(step, y)

        return drift


def solve_and_lose(who: int) -> int:
    problem = trajectory(kind=Killed)
    problem.who = who
    dispatcher = functools.partial(spread(2), heartbeat=1.5)
    try:
        dp.solve(problem, exact(4), dispatcher, check=False)
    except dp.WorkerError as error:
        print("heard", str(error).replace("\n", " "))
        return 2
    return 0
