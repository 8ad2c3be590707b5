"""What the ranks of the distributed tests run; importable by spawned processes."""

from __future__ import annotations

import functools
import os
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from dreampropeller import (
    AdaptiveWindow,
    Anderson,
    DistributedDispatcher,
    DriftThreshold,
    FixedThreshold,
    OptimizationTrajectory,
    PicardSolver,
    Secant,
    Sequential,
    SlidingWindow,
    State,
    Trajectory,
    WorkerError,
    solve,
)
from dreampropeller.dispatch.process_group import local_device
from dreampropeller.trajectory import Drift
from tests.helpers import TOYS, OrnsteinUhlenbeck, make_growing

WINDOWS = (16,)
STEPS = 12
ADAPTIVE = PicardSolver(AdaptiveWindow(2, 6, 2), DriftThreshold(0.2), "auto")
ACCELERATED = {
    "anderson": PicardSolver(
        SlidingWindow(7), FixedThreshold(1e-6), acceleration=Anderson(order=3)
    ),
    "secant": PicardSolver(
        SlidingWindow(7), DriftThreshold(0.1), "auto", acceleration=Secant()
    ),
}


def quick(trajectory: Trajectory[Any]) -> DistributedDispatcher:
    return DistributedDispatcher(trajectory, timeout=20.0, fingerprint_every=5)


def solve_all() -> dict[str, Any]:
    """Every toy and window at threshold 0, and one loose run; value, carry, strides."""
    torch.distributed.init_process_group("gloo")
    found: dict[str, Any] = {}
    for name, toy in TOYS.items():
        for window in WINDOWS:
            solver = PicardSolver(SlidingWindow(window), FixedThreshold(0), "momentum")
            solution = solve(toy.make(), solver, quick)
            found[f"{name}/{window}"] = (solution.value, solution.carry)
        solver = PicardSolver(SlidingWindow(7), FixedThreshold(1e-5), "momentum")
        logged: list[Any] = []
        solution = solve(
            toy.make(),
            solver,
            quick,
            on_iteration=lambda _, it, log=logged: log.append(it.aux),
        )
        found[f"{name}/loose"] = (solution.value, solution.stats.strides, logged)
        solution = solve(toy.make(), ADAPTIVE, quick)
        found[f"{name}/adaptive"] = (solution.value, solution.stats, solution.carry)
        for how, solver in ACCELERATED.items():
            solution = solve(toy.make(), solver, quick)
            found[f"{name}/{how}"] = (solution.value, solution.stats, solution.carry)
    solution = solve(OrnsteinUhlenbeck(), Sequential(), quick)
    found["sequential"] = solution.value
    found["stopped"] = stop_on_rank_zero()
    torch.distributed.destroy_process_group()
    return found


class Failing(OrnsteinUhlenbeck):
    """Fails in the way asked for, at step 11."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.exact = TOYS["sde"].loop()[11]["x"]

    def init(self) -> tuple[State, list[int]]:
        y, carry = super().init()
        if self.how == "different-start":
            y["x"] += int(os.environ["RANK"])
        return y, carry

    def make_drift(self, device: torch.device) -> Drift:
        healthy = super().make_drift(device)

        def drift(step: int, y: State) -> tuple[State, dict[str, float]]:
            if step == 11:
                if self.how == "drift":
                    raise ZeroDivisionError("no such image")
                if self.how == "guess" and not torch.equal(y["x"], self.exact):
                    raise IndexError("out of range")
                if self.how == "exit":
                    os._exit(7)
                if self.how == "hang":
                    time.sleep(60)
            return healthy(step, y)

        return drift

    def update(
        self, step: int, y: State, carry: list[int], drift: State
    ) -> tuple[State, list[int]]:
        if self.how == "update" and step == 11 and os.environ["RANK"] == "1":
            raise KeyError("gone")
        return super().update(step, y, carry, drift)


def solve_failing(how: str) -> State:
    warnings.simplefilter("ignore")
    dispatcher = functools.partial(
        DistributedDispatcher, timeout=2.0 if how == "hang" else 30.0
    )
    if how == "different-window":
        size = 4 + int(os.environ["RANK"])
        solver = PicardSolver(SlidingWindow(size), FixedThreshold(0))
    else:
        solver = PicardSolver(SlidingWindow(8), FixedThreshold(0))
    return solve(Failing(how), solver, dispatcher).value


def hear_failures(kinds: list[str]) -> list[str]:
    """The error each kind of failure raises on this rank, or the result."""
    torch.distributed.init_process_group("gloo")
    heard = []
    for how in kinds:
        try:
            heard.append(str(solve_failing(how)["x"].tolist()))
        except (WorkerError, KeyError) as error:  # noqa: PERF203, one a kind
            heard.append(f"{type(error).__name__}: {error}")
    torch.distributed.destroy_process_group()
    return heard


def stop_on_rank_zero() -> int:
    def stop(state: Any, _: Any) -> bool:
        assert torch.get_num_threads() == 1
        return os.environ["RANK"] == "0" and state.step >= 9

    solver = PicardSolver(SlidingWindow(4), FixedThreshold(0))
    return solve(OrnsteinUhlenbeck(), solver, quick, on_iteration=stop).state.step


def solve_twice() -> list[State]:
    """Two solves of one process, each with a process group of its own."""
    solver = PicardSolver(SlidingWindow(4), FixedThreshold(0))
    return [solve(OrnsteinUhlenbeck(), solver, quick).value for _ in "ab"]


def share_an_image() -> State:
    """Rank 0's, in channels-last memory, and a row; the others have zeros."""
    rows, image = torch.zeros(4), torch.zeros(2, 3, 4, 5)
    if os.environ["RANK"] == "0":
        rows, image = torch.arange(4.0), torch.arange(120.0).view(2, 3, 4, 5)
        image = image.to(memory_format=torch.channels_last)
    with quick(OrnsteinUhlenbeck()) as dispatcher:
        y = {"x": image, "rows": rows.expand(4, 4)}
        return dispatcher.share(y, None)[0]


def wait_for_the_end(folder: str) -> None:
    with open(os.path.join(folder, os.environ["RANK"]), "w") as file:
        file.write(str(os.getpid()))
    time.sleep(120)


def network() -> torch.nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return torch.nn.Sequential(
            torch.nn.Linear(2, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1)
        )


def network_loss(step: int, net: torch.nn.Module) -> torch.Tensor:
    generator = torch.Generator().manual_seed(step)
    batch = torch.rand(8, 2, generator=generator).cuda()
    loss = (net(batch)[:, 0] - torch.sin(3 * batch[:, 0])).square().mean()
    return 40 * loss  # half precision holds its gradients after some back-off


def network_trajectory(precision: str) -> OptimizationTrajectory:
    return OptimizationTrajectory.from_module(
        network().cuda(),
        network_loss,
        lambda named: torch.optim.Adam(named.values(), lr=0.05),
        STEPS,
        precision=precision,
    )


def solve_on_gpu(name: str) -> State:
    """A toy at threshold 0, on this rank's GPU; the dispatcher opens the group."""
    torch.cuda.set_device(local_device())
    toy = make_growing("cuda") if name == "growing" else network_trajectory("32-true")
    solver = PicardSolver(SlidingWindow(5), FixedThreshold(0), "momentum")
    value = solve(toy, solver, quick).value
    return {key: tensor.cpu() for key, tensor in value.items()}


def semaphores_of_a_progress_bar() -> set[str]:
    """Named semaphores that a progress bar adds to those of this process."""
    before = _semaphores()
    tqdm(total=1, disable=True).close()
    return _semaphores() - before


def _semaphores() -> set[str]:
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[5] for line in lines if "/dev/shm/sem." in line}
