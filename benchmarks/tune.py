"""Steps and learning rate of the sequential run that speed-ups are counted from.

`python -m benchmarks.tune` solves a few prompts sequentially for every pair of step
count and learning rate, and writes a table. The tuned step count is the smallest whose
mean PSNR, at the best learning rate, is within 0.5 dB of the best of all cells. It is
the baseline of accelerated runs (`benchmarks/results/main_job.md`). An interrupted
benchmark resumes from its log.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from typing import Any

from benchmarks import runs

STEPS = (25, 50, 100, 200, 400)
RATES = (0.01, 0.02, 0.04, 0.08, 0.16)
OBJECTS = ("mushroom", "mug", "house", "rocket")
WITHIN = 0.5
"""Tolerated distance from the best PSNR, in decibels."""


def table(entries: list[dict[str, Any]]) -> tuple[str, int, float]:
    """A Markdown table of mean PSNR and IoU; the tuned steps and learning rate."""
    cells: dict[tuple[int, float], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        cells[entry["steps"], entry["rate"]].append(entry)

    def mean(cell: tuple[int, float], name: str) -> float:
        return runs.mean(cells[cell], name)

    steps = sorted({cell[0] for cell in cells})
    rates = sorted({cell[1] for cell in cells})
    plateau = max(mean(cell, "psnr") for cell in cells)
    best = {n: max((mean((n, r), "psnr"), r) for r in rates) for n in steps}
    tuned = next(n for n in steps if best[n][0] >= plateau - WITHIN)
    lines = [
        "| steps | " + " | ".join(f"lr {rate:g}" for rate in rates) + " |",
        "|---|" + "---|" * len(rates),
    ]
    for n in steps:
        row = []
        for rate in rates:
            text = f"{mean((n, rate), 'psnr'):.1f} / {mean((n, rate), 'iou'):.2f}"
            chosen = n == tuned and rate == best[n][1]
            row.append(f"**{text}**" if chosen else text)
        lines.append(f"| {n} | " + " | ".join(row) + " |")
    return "\n".join(lines), tuned, best[tuned][1]


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/dreamfusion-toybox.yaml")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--objects", nargs="+", default=list(OBJECTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of 1 thread")
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    runs.add_places(parser, "tuning")
    return parser


def jobs(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Every run, the longest first."""
    return [
        runs.job(
            arguments.config,
            runs.prompt_of(name),
            "solver.name=sequential",
            f"trainer.max_steps={steps}",
            f"system.optimizer.args.lr={rate}",
            f"seed={seed}",
            *arguments.set,
            steps=steps,
            rate=rate,
        )
        for steps in sorted(arguments.steps, reverse=True)
        for rate in arguments.rates
        for name in arguments.objects
        for seed in arguments.seeds
    ]


def main() -> None:
    """Command line."""
    arguments = make_parser().parse_args()
    log = arguments.to / "runs.jsonl"
    entries = runs.run_all(jobs(arguments), log, arguments.workers)
    text, steps, rate = table(entries)
    edge = runs.EDGE * runs.at_edge(rate, arguments.rates)
    summary = (
        f"{text}\n\nMean PSNR in dB / IoU of {', '.join(arguments.objects)}; "
        f"{len(arguments.seeds)} seed(s), sequential. Tuned: {steps} steps at learning "
        f"rate {rate:g}{edge}. {runs.cost(entries)}\n"
    )
    (runs.tables_of(arguments) / "table.md").write_text(summary, encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    main()
