"""Seconds per drift against the number of steps that one batched call evaluates.

    python -m benchmarks.batched --threads 1
    python -m benchmarks.batched --config configs/dreamgaussian-toybox.yaml

The states are the first ones of a sequential run. Sizes take turns, so that whatever
else the machine does falls on all of them; the table holds medians per drift and the
largest deviation from single steps, as a fraction of the drift's norm.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch

import dreampropeller as dp
from dreampropeller.calibration import device_name
from dreampropeller.dispatch.batched import deviation
from systems import make_system
from systems.runs.folders import environment, write_json

CONFIG = "configs/dreamfusion-toybox.yaml"
SIZES = (1, 2, 4, 8)


def states(trajectory: dp.Trajectory[Any], drift: Any, count: int) -> list[dp.State]:
    """The first states of the sequential run."""
    y, carry = trajectory.init()
    found = [y]
    for step in range(count - 1):
        with torch.no_grad():
            y, carry = trajectory.update(step, y, carry, drift(step, y)[0])
        found.append(y)
    return found


def measure(
    trajectory: dp.Trajectory[Any], sizes: list[int], repeats: int
) -> list[dict[str, Any]]:
    """Seconds per drift of each size, by the clock and of the CPU."""
    y, _ = trajectory.init()
    device = next(iter(y.values())).device
    drift: Any = trajectory.make_drift(device)
    ys = states(trajectory, drift, max(sizes))
    alone = [drift(step, y)[0] for step, y in enumerate(ys)]
    spent: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    off = dict.fromkeys(sizes, 0.0)
    for turn in range(repeats + 1):
        for size in sizes:
            begin = time.perf_counter(), time.process_time()
            found = drift.batch(list(range(size)), ys[:size])
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            end = time.perf_counter(), time.process_time()
            if turn:  # the first one warms up
                spent[size].append(((end[0] - begin[0]), (end[1] - begin[1])))
            pairs = zip(found, alone, strict=False)
            off[size] = max(deviation(one, wanted) for (one, _), wanted in pairs)
    return [
        {
            "size": size,
            "seconds": statistics.median(wall for wall, _ in spent[size]) / size,
            "cpu_seconds": statistics.median(cpu for _, cpu in spent[size]) / size,
            "deviation": off[size],
        }
        for size in sizes
    ]


def table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table; the gain is that of a window whose steps are all accepted."""
    lines = [
        "| steps per call | s per drift | CPU s per drift | gain at best | deviation |",
        "|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['size']} | {row['seconds']:.3g} | {row['cpu_seconds']:.3g} | "
        f"{rows[0]['seconds'] / row['seconds']:.2f}x | {row['deviation']:.1g} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--prompt", default="a red mushroom")
    parser.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--to", type=Path, default=Path("outputs/batched"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    prompt = f"system.prompt_processor.prompt={arguments.prompt}"
    system = make_system(arguments.config, prompt, *arguments.set)
    rows = measure(system.trajectory(), arguments.sizes, arguments.repeats)
    arguments.to.mkdir(parents=True, exist_ok=True)
    file = arguments.to / f"{Path(arguments.config).stem}.json"
    device = device_name(system.device)
    about = {"config": arguments.config, "settings": arguments.set, "device": device}
    about |= {"threads": arguments.threads, "environment": environment()}
    write_json(file, {**about, "rows": rows})
    print(f"{arguments.config} on {device}, {arguments.threads} thread(s)\n")
    print(table(rows))


if __name__ == "__main__":
    main()
