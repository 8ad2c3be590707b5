"""`--plan`: what a run costs on 1 to 64 devices, from a short measurement here.

One drift is timed, whole and in shards of its views, and the first iterations of the
solver give its own cost and its strides. Two processes of this machine measure what
communication takes. The predictions follow from these (`dreampropeller.cost_model`):
they hold for devices like this one that are connected like those processes, and as long
as strides stay what they are at the start.
"""

from __future__ import annotations

import functools
import math
import resource
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

import dreampropeller as dp
from dreampropeller import measurement
from dreampropeller.calibration import with_window
from dreampropeller.cost_model import Costs, Plan, best, sequential
from dreampropeller.tree import tensors
from systems import build
from systems.settings.config import Config
from systems.settings.reader import ConfigError

DEVICES = (1, 2, 4, 8, 16, 32, 64)
"""Numbers of devices that are predicted."""
ITERATIONS = 6
"""Iterations that are made, a first one included, which is not counted."""
BUDGET = 60.0
"""Seconds that they may take; there are fewer, of a smaller window, if they would."""


@dataclass(frozen=True)
class Measured:
    """What was measured, and what follows from it.

    Attributes:
        costs: Inputs of the predictions.
        first: Seconds of the very first evaluation.
        render: Seconds of rendering a step's images; None: not known.
        reason: Why views cannot be split; empty if they can.
    """

    costs: Costs
    first: float
    render: float | None
    reason: str


def run(config: Config) -> int:
    """Measure, and print the plan; returns the exit code.

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
    found = measure(system, trajectory)
    y, _ = trajectory.init()
    numbers = sum(tensor.numel() for tensor in tensors(y))
    held = sum(tensor.nbytes for tensor in tensors(y))
    print(
        f"State: {numbers:,} numbers, {held / 2**20:.3g} MB without the optimizer's; "
        f"up to {_peak(system.device)}; {threads} thread(s)."
    )
    at_hand = max(config.dispatch.count, torch.cuda.device_count())
    print("\n".join([*_inputs(found), *_table(found.costs), *advice(found, at_hand)]))
    return 0


def measure(system: Any, trajectory: dp.Trajectory[Any]) -> Measured:
    """Measure drift, views, rendering, strides and communication of a system."""
    y, carry = trajectory.init()
    y = {name: tensor.to(system.device) for name, tensor in y.items()}
    del carry
    drift = trajectory.make_drift(system.device)
    first, whole = measurement.seconds_of(drift, 0, y)
    num_bytes = measurement.bytes_of(drift(0, y)[0].values())
    views, reason = _num_views(system)
    by_views = measurement.drift_by_views(trajectory, y, views, whole)
    solver, seen = system.solver(), measurement.Observed({1: 1.0})
    if isinstance(solver, dp.PicardSolver):
        window, count = _affordable(solver, whole)
        print(f"Measuring {count} iterations of window {window} …", flush=True)
        wide = with_window(solver, window)
        seen = measurement.observe(trajectory, wide, count)
    print("Measuring communication between two processes …", flush=True)
    try:
        latency, bandwidth = communication(num_bytes)
    except dp.WorkerError:
        latency, bandwidth = 0.0, math.inf
    costs = Costs(
        by_views,
        seen.rollout,
        seen.strides,
        measurement.segments(trajectory),
        num_bytes,
        latency,
        bandwidth,
    )
    return Measured(costs, first, _render(system), reason)


def communication(num_bytes: int) -> tuple[float, float]:
    """Latency and bandwidth between two processes of this machine."""
    job = functools.partial(dp.launch_workers, measurement.communication)
    return job(num_bytes, num_workers=2)[0]


def _num_views(system: Any) -> tuple[int, str]:
    """The number of views of a step that can be split, or 1 and the reason."""
    from systems.distillation import Distillation  # which loads diffusers

    if not isinstance(system, Distillation):
        return 1, "its steps have no views to split"
    views = system.num_views(0)
    try:
        system.check_views(min(2, views))
    except ConfigError as error:
        return 1, str(error)
    return views, "" if views > 1 else "a step has one view (`data.batch_size`)"


def _affordable(solver: dp.PicardSolver, seconds: float) -> tuple[int, int]:
    """The largest window to measure, and the number of iterations."""
    own: int = getattr(solver.window, "size", None) or solver.window.largest  # pyright: ignore[reportAttributeAccessIssue]
    window = max(2 * own, 16)
    while window > max(own, 2) and window * ITERATIONS * seconds > BUDGET:
        window //= 2
    return window, max(2, min(ITERATIONS, int(BUDGET / (window * seconds))))


def _render(system: Any) -> float | None:
    """Seconds in which the images of a step are rendered, without their gradient."""
    from systems.distillation import Distillation  # which loads diffusers

    if not isinstance(system, Distillation):
        return None
    module = system.module

    def rendered(step: int, y: dp.State) -> tuple[dp.State, dp.Aux]:
        with system.random.scope(step), torch.enable_grad():
            system.look(step, module)
        return y, {}

    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    where = {"x": torch.zeros(1, device=system.device)}
    seconds = measurement.seconds_of(rendered, 0, where)[1]
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(before[name])
    return seconds


def _inputs(found: Measured) -> Iterator[str]:
    """The measured inputs."""
    costs = found.costs
    views = costs.num_views
    yield ""
    yield "Measured on this device:"
    whole = costs.drift[views]
    share = ""
    if found.render is not None:
        share = f"; rendering its images takes {_span(found.render)} of it"
    yield (
        f"- a step of {views} view(s): {_span(whole)} (median of "
        f"{measurement.REPEATED}; the first took {_span(found.first)}){share}"
    )
    for part, seconds in sorted(costs.drift.items(), reverse=True)[1:]:
        yield f"- {part} of its views: {_span(seconds)}"
    if found.reason:
        yield f"- views are not split: {found.reason}"
    yield f"- the solver itself, per step of a window: {_span(costs.rollout)}"
    for window, stride in costs.strides.items():
        yield f"- window {window}: {stride:.2f} steps accepted per iteration"
    if math.isinf(costs.bandwidth):
        yield "- communication: not measured, as two processes could not meet; left out"
        return
    yield (
        f"- communication: {_span(costs.latency)} per meeting, "
        f"{costs.bandwidth / 1e6:.3g} MB/s, a drift of {costs.num_bytes / 1e6:.3g} MB"
    )


def _table(costs: Costs) -> Iterator[str]:
    """The fastest division of each number of devices."""
    plain = sequential(costs)
    yield ""
    yield "Predicted (nothing below was run):"
    yield f"{'devices':>7}  {'steps × views':>13}  {'window':>6}  {'time':>8}  speed-up"
    for count in DEVICES:
        one = best(costs, count)
        shape = f"{one.steps} × {one.views}"
        window = "–" if one.window == 1 else str(one.window)
        speed = plain.seconds / one.seconds
        yield (
            f"{count:>7}  {shape:>13}  {window:>6}  {_span(one.seconds):>8}  "
            f"{speed:.2f}×"
        )
    yield (
        f"The sequential run on one device takes {_span(plain.seconds)} "
        f"({costs.num_steps} evaluations)."
    )


def advice(found: Measured, devices: int) -> Iterator[str]:
    """What is best for the devices at hand, and what to write."""
    one = best(found.costs, devices)
    who = "1 device" if devices == 1 else f"{devices} devices"
    speed = sequential(found.costs).seconds / one.seconds
    yield ""
    yield (
        f"Best for {who}, as predicted ({speed:.2f}×): write "
        f"`{' '.join(settings(one))}`."
    )
    if one.devices == 1:
        yield (
            "A window in one batched call is not predicted: `dispatch.batch=auto` "
            "measures it."
        )
    yield "Measure it: `--compare` instead of `--plan` makes both runs."


def settings(one: Plan) -> list[str]:
    """The settings of a plan."""
    found = [f"dispatch.num_workers={one.devices}", f"dispatch.views={one.views}"]
    if one.window == 1:
        return ["solver.name=sequential", *found]
    return [*found, "solver.window.name=sliding", f"solver.window.size={one.window}"]


def _peak(device: torch.device) -> str:
    """Peak memory so far."""
    if device.type == "cuda":
        return f"{torch.cuda.max_memory_allocated(device) / 2**30:.1f} GB on the GPU"
    unit = 1 if sys.platform == "darwin" else 2**10
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{most / 2**30:.1f} GB per process"


def _span(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 1e-2:
        return f"{seconds * 1e3:.2g} ms"
    if seconds < 10:
        return f"{seconds:.2g} s"
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
