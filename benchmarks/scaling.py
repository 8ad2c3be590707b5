"""Seconds predicted for 8 × A100, 8 × H100 and 8 nodes × 8, from stated inputs.

`python -m benchmarks.scaling > benchmarks/scaling.md` runs the cost model of `--plan`
(`dreampropeller.cost_model`) on drift times that others have published and strides
that we have recorded. Nothing is measured here: every figure is a prediction.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from dreampropeller.cost_model import Costs, Plan, best, predicted, sequential

FIXED = 0.2
"""Assumed share of a drift's seconds that does not shrink with its number of views."""
ROLLOUT = 2e-3
"""Assumed seconds of update, comparison and prediction per step on a GPU."""
LATENCY = 2e-4
"""Assumed seconds per meeting of the ranks."""
H100 = 2.0
"""Assumed speed of an H100 in units of an A100's."""


@dataclass(frozen=True)
class Job:
    """A published run, on one A100.

    Args:
        name: Its name.
        seconds: Published seconds.
        steps: Its steps.
        views: Views per step.
        num_bytes: Assumed size of a drift.
        note: Where steps and views are from.
    """

    name: str
    seconds: float
    steps: int
    views: int
    num_bytes: int
    note: str


JOBS = (
    Job("DreamGaussian", 11 * 60, 500, 16, 6 * 10**6, "as in its published config"),
    Job(
        "ProlificDreamer",
        (9 * 60 + 28) * 60,
        70_000,
        8,
        50 * 10**6,
        "its three stages, of which the last has 1 view, are taken as one",
    ),
)
PUBLISHED = {"DreamGaussian": 2 * 60, "ProlificDreamer": (2 * 60 + 13) * 60}
"""Seconds of the same with DreamPropeller, in the same figure."""
RECORDS: Mapping[str, tuple[str, Mapping[int, float]]] = {
    "small steps": ("pareto_small", {1: 1, 8: 7.4, 16: 15.2, 32: 29.9, 64: 50.8}),
    "threestudio's rates": ("pareto_threestudio", {1: 1, 8: 7.4, 32: 21.1, 64: 19.4}),
    "tuned voxels": ("speedup.md", {1: 1, 8: 6.9, 32: 9.0}),
    "tuned hash grid": ("pareto_hash", {1: 1, 8: 5.9, 32: 5.5}),
}
"""Steps per iteration by window at the default's settings, and the log."""
PUBLISHED_STRIDE = 5.2
"""Assumed steps per iteration of the published rule at window 7."""


@dataclass(frozen=True)
class Machine:
    """Devices and what connects them.

    Args:
        name: Its name.
        devices: Number of devices.
        speed: Speed of a device in units of an A100's.
        bandwidth: Assumed bytes per second that a device receives.
    """

    name: str
    devices: int
    speed: float
    bandwidth: float


MACHINES = (
    Machine("8 × A100", 8, 1.0, 1e11),
    Machine("8 × H100", 8, H100, 1e11),
    Machine("8 nodes × 8 H100", 64, H100, 2.5e10),
)


def costs(job: Job, machine: Machine, strides: Mapping[int, float]) -> Costs:
    """The inputs of the cost model."""
    whole = job.seconds / job.steps / machine.speed
    each = (1 - FIXED) * whole / job.views
    counts = {math.ceil(job.views / 2**k) for k in range(job.views.bit_length())}
    return Costs(
        {n: FIXED * whole + each * n for n in sorted(counts)},
        ROLLOUT / machine.speed,
        dict(strides),
        [job.steps],
        job.num_bytes,
        LATENCY,
        machine.bandwidth,
    )


def check(job: Job) -> Plan:
    """The published form on 8 A100, of which one evaluates nothing."""
    strides = {7: PUBLISHED_STRIDE}
    return predicted(costs(job, MACHINES[0], strides), 7, 1, 7)


def lines() -> Iterator[str]:
    """The page."""
    yield "# Predicted seconds on more devices\n"
    yield (
        "**Predictions, not measurements**, by `python -m benchmarks.scaling`, with "
        "the cost model of `--plan` ([docs/views.md](../docs/views.md)). No run on "
        "several GPUs was made.\n"
    )
    yield "## Assumptions\n"
    for job in JOBS:
        each = job.seconds / job.steps
        yield (
            f"- **{job.name}** on one A100: {_time(job.seconds)} for {job.steps} steps "
            f"of {job.views} views ({job.note}), so {each:.2f} s per drift (L. Zhou et "
            "al., 2023, arXiv 2311.17082, Figure 1); a drift of "
            f"{job.num_bytes // 10**6} MB (ours)."
        )
    yield (
        f"- {FIXED:.0%} of a drift does not shrink with its views (ours; `--plan` "
        "measures it)."
    )
    yield f"- An H100 is {H100:g} times as fast as an A100 (ours)."
    yield (
        f"- {ROLLOUT * 1e3:g} ms for the solver per step of a window on an A100, "
        f"{LATENCY * 1e3:g} ms per meeting of the ranks, 100 GB/s within a machine and "
        "25 GB/s between machines (ours)."
    )
    for name, (log, strides) in RECORDS.items():
        shown = ", ".join(f"{n:g} at {w}" for w, n in strides.items() if w > 1)
        yield (
            f"- Steps accepted per iteration, **{name}**: {shown} "
            f"(`benchmarks/results/{log}`: the toybox on a CPU, not these jobs)."
        )
    yield "\n## The published run, as a check\n"
    yield (
        "Seven devices evaluate a window of 7, "
        f"{PUBLISHED_STRIDE:g} steps are accepted (assumed: 4.9 to 5.5 in trials of "
        "ours whose logs were not kept):\n"
    )
    yield "| | predicted | published | published speed-up |\n|---|---|---|---|"
    for job in JOBS:
        published = PUBLISHED[job.name]
        yield (
            f"| {job.name} | {_time(check(job).seconds)} | {_time(published)} | "
            f"{job.seconds / published:.1f}× (in whole minutes; the paper's largest is "
            "4.7×) |"
        )
    yield "\n## Predicted\n"
    yield (
        "Steps × views, the window and the time of the fastest division, for each "
        "record of strides:\n"
    )
    names = [machine.name for machine in MACHINES]
    yield f"| job | strides as in | {' | '.join(names)} |\n|---|---|---|---|---|"
    for job in JOBS:
        for name, (_, strides) in RECORDS.items():
            cells = [_cell(costs(job, one, strides), one.devices) for one in MACHINES]
            yield f"| {job.name} | {name} | {' | '.join(cells)} |"
    yield (
        "\nSpeed-ups are against the sequential run on one device of the same kind. "
        "Where strides stop growing, devices go to views."
    )


def _cell(inputs: Costs, devices: int) -> str:
    """The best division in a few words."""
    one = best(inputs, devices)
    gain = sequential(inputs).seconds / one.seconds
    window = "sequential" if one.window == 1 else f"window {one.window}"
    return f"{_time(one.seconds)}, {gain:.1f}× ({one.steps} × {one.views}, {window})"


def _time(seconds: float) -> str:
    """Seconds as one reads them."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:.1f} min"
    return f"{seconds / 3600:.1f} h"


if __name__ == "__main__":
    print("\n".join(lines()))
