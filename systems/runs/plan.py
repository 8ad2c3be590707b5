"""`--plan`: what a run costs, from one measured evaluation, before it is made.

With τ seconds per evaluation, T steps and W workers, the sequential run takes T τ, and
an iteration over a window of w steps ⌈w / W⌉ τ. Windows end at jumps and at the last
step, which gives the fewest iterations that a run can take; how many it takes depends
on how long its guesses hold.
"""

from __future__ import annotations

import math
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import dreampropeller as dp
from dreampropeller.trajectory import next_jump
from dreampropeller.tree import tensors
from systems import build
from systems.settings.config import Config

REPEATED = 3
"""Evaluations that are timed, after a first one that is not."""


def run(config: Config) -> int:
    """Measure an evaluation, and print the plan; returns the exit code.

    Args:
        config: Config of the run; with `resume`, its problem from the start.

    Raises:
        ConfigError: A setting cannot be used, or the problem is no 3D system.
    """
    system = build(config)
    alone = config.dispatch.count == 1
    threads = config.dispatch.threads or (torch.get_num_threads() if alone else 1)
    torch.set_num_threads(threads)  # as a worker's
    print(f"Loading {system.title} ({config.system_type}) …", flush=True)
    trajectory = system.trajectory()
    y, _ = trajectory.init()
    first, seconds = _time(trajectory, y, system.device)
    numbers = sum(tensor.numel() for tensor in tensors(y))
    held = sum(tensor.nbytes for tensor in tensors(y))
    print(
        f"A step: {_span(seconds)} (median of {REPEATED}; the first took "
        f"{_span(first)}; {threads} thread(s)), up to {_peak(system.device)}.\n"
        f"State: {numbers:,} numbers, {held / 2**20:.3g} MB without the optimizer's."
    )
    steps, workers = trajectory.num_steps, config.dispatch.count
    print(f"Sequential: {steps} evaluations, {_span(steps * seconds)}.")
    solver = system.solver()
    if isinstance(solver, dp.PicardSolver):
        print("\n".join(_accelerated(trajectory, solver, workers, seconds)))
    return 0


def windows(trajectory: dp.Trajectory[Any], size: int) -> list[int]:
    """The windows of a run whose guesses all hold: as few as possible."""
    found, step = [], 0
    while step < trajectory.num_steps:
        end = min(step + size, next_jump(trajectory, step))
        found.append(end - step)
        step = end
    return found


def _accelerated(
    trajectory: dp.Trajectory[Any],
    solver: dp.PicardSolver,
    workers: int,
    seconds: float,
) -> Iterator[str]:
    """What the window promises at best, for some numbers of workers."""
    size: int = getattr(solver.window, "size", None) or solver.window.largest  # pyright: ignore[reportAttributeAccessIssue]
    found = windows(trajectory, size)
    steps = trajectory.num_steps
    cut = "" if len(found) == math.ceil(steps / size) else ", as jumps cut windows"
    yield (
        f"Window {size}: at least {len(found)} iterations, at most "
        f"{steps / len(found):.2f}x fewer than steps{cut}."
    )
    for count in sorted({workers, size}):
        rounds = sum(math.ceil(length / count) for length in found)
        who = "1 worker" if count == 1 else f"{count} workers"
        sent = "" if count == 1 else ", plus what they send each other"
        yield f"  on {who}: {_span(rounds * seconds)} at best{sent}."
    if workers == 1:
        yield (
            "  On one worker the sequential run is faster (`solver.name=sequential`), "
            "unless a batched window pays there (`dispatch.batch=auto` measures)."
        )
    yield "Measure it: `--compare` in place of `--plan` makes both runs."


def _time(
    trajectory: dp.Trajectory[Any], y: dp.State, device: torch.device
) -> tuple[float, float]:
    """Seconds of the first evaluation, and the median of the next."""
    drift = trajectory.make_drift(device)
    y = {name: tensor.to(device) for name, tensor in y.items()}
    spent = []
    for _ in range(1 + REPEATED):
        begin = time.perf_counter()
        drift(0, y)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        spent.append(time.perf_counter() - begin)
    return spent[0], statistics.median(spent[1:])


def _peak(device: torch.device) -> str:
    """Peak memory so far."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB on the GPU"
    unit = 1 if sys.platform == "darwin" else 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{most / 2**30:.1f} GB per process"


def _span(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
