"""The README's figure: one prompt, solved sequentially and accelerated.

`python -m benchmarks.side_by_side` solves a prompt twice from the same seed, records
PSNR against the ground truth and an image after chosen numbers of iterations, and
writes a figure and a log. An iteration of the accelerated run evaluates a whole window
of gradients, in the time of one gradient if each step of the window has its own device.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import dreampropeller as dp
from systems import build, quality
from systems.base import System
from systems.images import to_bytes
from systems.settings.config import load

CONFIG = "configs/dreamfusion-toybox.yaml"
PROMPT = "a red mushroom"
SHOWN = (5, 10, 20)
"""Numbers of iterations after which an image is shown, besides the last."""
MEASURED = (1, 2, 3, 5, 7, 10, 13, 16, 20, 25, 30, 40, 60, 80, 110, 150)
"""Numbers of iterations after which PSNR is measured, besides the last."""
SIZE = 96
VIEW = 2
RUNS = {"sequential": ["solver.name=sequential"], "accelerated": []}


@dataclass
class Record:
    """Progress of a run.

    Attributes:
        psnr: PSNR by number of iterations, dB.
        images: Images by number of iterations, shape ``(3, size, size)``.
        iterations: Number of iterations of the run.
        evaluations: Number of gradients of the run.
    """

    psnr: dict[int, float] = field(default_factory=dict)
    images: dict[int, Tensor] = field(default_factory=dict)
    iterations: int = 0
    evaluations: int = 0

    def entry(self) -> dict[str, Any]:
        """The numbers, for the log."""
        return {
            "iterations": self.iterations,
            "evaluations": self.evaluations,
            "psnr": self.psnr,
        }


def solve(config: str, settings: Sequence[str]) -> tuple[Record, Tensor]:
    """Solve a problem and record it; also returns the ground-truth image."""
    system = build(load(config, settings))
    assert isinstance(system, System)
    truth = quality.truth_of(system)
    assert truth is not None, "write a prompt of the toybox"
    record = Record()

    def look(count: int, y: dp.State) -> None:
        views = quality.fixed_views(SIZE).one(VIEW)
        found = quality.against_truth(system, y, truth)
        record.psnr[count] = round(found.psnr, 2)
        record.images[count] = system.render(y, views, grey=1.0)[0][0]

    def watch(state: dp.SolverState[Any], iteration: dp.Iteration) -> None:
        del iteration
        count = state.stats.num_iterations
        if count in MEASURED or count in SHOWN:
            look(count, state.y)

    solution = dp.solve(system.trajectory(), system.solver(), on_iteration=watch)
    record.iterations = solution.stats.num_iterations
    record.evaluations = solution.stats.num_evaluations
    look(record.iterations, solution.value)
    exact = truth.render(quality.fixed_views(SIZE).one(VIEW).cameras, SIZE)
    return record, exact.over(torch.ones(3))[0]


def draw(records: dict[str, Record], exact: Tensor, path: Path) -> None:
    """Images by iterations, a row for each run, beside PSNR over iterations."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    figure = Figure(figsize=(10, 3.3), layout="constrained")
    halves: Any = figure.subfigures(1, 2, width_ratios=(1.55, 1))
    left, right = halves
    grid = left.subplots(len(records), len(SHOWN) + 2)
    for row, (name, record) in zip(grid, records.items(), strict=True):
        shown = {f"{n} iterations": record.images.get(n) for n in SHOWN}
        shown[f"{record.iterations} (end)"] = record.images[record.iterations]
        shown["ground truth"] = exact
        for axes, (title, image) in zip(row, shown.items(), strict=True):
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
            axes.set_title(title, fontsize=9)
            if image is not None:
                axes.imshow(to_bytes(image))
        row[0].set_ylabel(name)
    panel = right.subplots()
    for name, record in records.items():
        line = sorted(record.psnr.items())
        label = f"{name}: {record.iterations} iterations"
        panel.plot(*zip(*line, strict=True), "o-", markersize=3, label=label)
    panel.set(xscale="log", xlabel="iterations", ylabel="PSNR, dB")
    panel.set_xticks([1, 2, 5, 10, 20, 50, 100, 200])
    panel.xaxis.set_major_formatter(ScalarFormatter())
    panel.minorticks_off()
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--prompt", default=PROMPT)
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--to", type=Path, default=Path("outputs/side_by_side"))
    arguments = parser.parse_args()
    prompt = f"system.prompt_processor.prompt={arguments.prompt}"
    records, exact = {}, None
    for name, settings in RUNS.items():
        chosen = [prompt, *arguments.set, *settings]
        records[name], exact = solve(arguments.config, chosen)
        print(name, json.dumps(records[name].entry()), flush=True)
    assert exact is not None
    draw(records, exact, arguments.to / "figure.png")
    log = {name: record.entry() for name, record in records.items()}
    text = json.dumps({"prompt": arguments.prompt, **log}, indent=1)
    (arguments.to / "runs.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
