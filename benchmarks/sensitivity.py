"""Sensitivity of quality and speed to the drift threshold, over several systems.

`python -m benchmarks.sensitivity` solves a prompt at several thresholds δ over learning
rates, numbers of views, optimizers and fields, beside the sequential run of each. It
writes a table and a plot. An interrupted benchmark resumes from its log; `--logged`
shows what has been run.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import runs

VOXELS = "configs/dreamfusion-toybox.yaml"
HASH = "configs/dreamfusion-toybox-hashgrid.yaml"
DELTAS = (0.1, 0.2, 0.4, 0.8)
SGD = (
    "system.optimizer.name=SGD",
    "system.optimizer.args.betas=null",
    "system.optimizer.args.eps=null",
    "system.optimizer.args.momentum=0.9",
)
SEQUENTIAL = "sequential"
Entry = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """A system to test: a config, a learning rate, settings."""

    config: str
    rate: float
    settings: tuple[str, ...] = ()


CASES = {
    "default": Case(VOXELS, 0.04),
    "lr / 4": Case(VOXELS, 0.01),
    "lr x 4": Case(VOXELS, 0.16),
    "1 view": Case(VOXELS, 0.04, ("data.batch_size=1",)),
    "16 views": Case(VOXELS, 0.04, ("data.batch_size=16",)),
    "SGD": Case(VOXELS, 0.1, SGD),
    "hash grid": Case(HASH, 0.08),
}


def jobs(arguments: argparse.Namespace) -> list[Entry]:
    """Every run: the sequential run of a case, then its thresholds."""
    sequential: list[tuple[float | None, list[str]]] = [
        (None, ["solver.name=sequential"])
    ]
    ours = [
        (
            delta,
            [
                f"solver.window.size={arguments.window}",
                f"solver.threshold.value={delta:g}",
            ],
        )
        for delta in arguments.deltas
    ]
    return [
        runs.job(
            CASES[name].config,
            runs.prompt_of(shape),
            *CASES[name].settings,
            f"system.optimizer.args.lr={CASES[name].rate:g}",
            *chosen,
            *arguments.set,
            case=name,
            row=SEQUENTIAL if delta is None else "drift",
            delta=delta,
            shape=shape,
        )
        for name in arguments.cases
        for delta, chosen in (*sequential, *ours)
        for shape in arguments.objects
    ]


def points(entries: Sequence[Entry]) -> list[Entry]:
    """A point for each case and threshold: means over the objects."""
    cells: dict[tuple[str, float | None], list[Entry]] = defaultdict(list)
    for entry in entries:
        cells[entry["case"], entry["delta"]].append(entry)
    found = []
    for (case, delta), cell in cells.items():
        sequential = cells[case, None]
        found.append(
            {
                "case": case,
                "delta": delta,
                "iterations": runs.mean(cell, "iterations"),
                "factor": runs.mean(sequential, "iterations")
                / runs.mean(cell, "iterations"),
                "psnr": runs.mean(cell, "psnr"),
                "gain": runs.mean(cell, "psnr") - runs.mean(sequential, "psnr"),
            }
        )
    return found


def table(found: Sequence[Entry]) -> str:
    """Markdown: a row for each case, a column for each threshold."""
    deltas = sorted({p["delta"] for p in found if p["delta"] is not None})
    heads = "".join(f" δ = {delta:g} |" for delta in deltas)
    lines = [f"| | sequential |{heads}", "|" + "---|" * (len(deltas) + 2)]
    for case in dict.fromkeys(point["case"] for point in found):
        own = {p["delta"]: p for p in found if p["case"] == case}
        cells = [f"{own[None]['psnr']:.2f} dB, {own[None]['iterations']:.0f} steps"]
        cells += [
            f"{own[delta]['gain']:+.2f} dB, {own[delta]['factor']:.1f}x"
            if delta in own
            else "not run"
            for delta in deltas
        ]
        lines.append(f"| {case} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(found: Sequence[Entry], path: Path) -> None:
    """Quality and speed against the threshold, a line for each case."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4), layout="constrained")
    quality, speed = figure.subplots(1, 2)
    deltas = sorted({p["delta"] for p in found if p["delta"] is not None})
    for axes, name in ((quality, "gain"), (speed, "factor")):
        for case in dict.fromkeys(point["case"] for point in found):
            own = [p for p in found if p["case"] == case and p["delta"] is not None]
            where = [p["delta"] for p in own]
            axes.plot(where, [p[name] for p in own], "o-", ms=4, label=case)
        axes.set(xscale="log", xlabel="drift threshold δ")
        axes.set_xticks(deltas, [f"{delta:g}" for delta in deltas])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    quality.set(ylabel="PSNR against the sequential run, dB")
    quality.axhline(0, color="black", linewidth=0.5)
    quality.set_yscale("symlog", linthresh=0.3)
    speed.set(ylabel="times fewer iterations")
    speed.legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=130)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--objects", nargs="+", default=["mushroom"])
    parser.add_argument("--deltas", type=float, nargs="+", default=list(DELTAS))
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2, help="processes of 1 thread")
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument(
        "--logged", action="store_true", help="table and plot of what has been run"
    )
    runs.add_places(parser, "sensitivity")
    return parser


def main() -> None:
    """Command line."""
    arguments = make_parser().parse_args()
    wanted, log = jobs(arguments), arguments.to / "runs.jsonl"
    if arguments.logged:
        entries = runs.logged(
            wanted, log, lambda entry: (entry["case"], entry["shape"]), SEQUENTIAL
        )
    else:
        entries = runs.run_all(wanted, log, arguments.workers)
    found = points(entries)
    folder = runs.tables_of(arguments)
    plot(found, folder / "sensitivity.png")
    text = (
        f"{table(found)}\n\nMeans over {', '.join(arguments.objects)}, window "
        f"{arguments.window}, seed 0. {runs.cost(entries)}\n"
    )
    (folder / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
