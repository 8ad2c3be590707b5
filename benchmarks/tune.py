"""How many steps, at which learning rate: the sequential run that speed-ups start from.

`python -m benchmarks.tune` solves a few prompts sequentially for every pair of step
count and learning rate, and writes a table. The tuned step count is the least whose
mean PSNR, at the best learning rate, is within 0.5 dB of the best found anywhere: what
an accelerated run has to be compared with (`docs/main_job.md`). Interrupted, it goes on
where it was.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dreampropeller as dp
from systems import make_system, quality
from systems.folders import environment
from systems.toybox.captions import SCORED, caption

STEPS = (25, 50, 100, 200, 400)
RATES = (0.01, 0.02, 0.04, 0.08, 0.16)
OBJECTS = ("mushroom", "mug", "house", "rocket")
WITHIN = 0.5
"""Decibels from the plateau."""


def prompt_of(name: str) -> str:
    """The scored prompt of an object."""
    (colour,) = [colour for colour, other in SCORED if other == name]
    return caption(colour, name, None, normal=False)


def solve(job: dict[str, Any]) -> dict[str, Any]:
    """Run one prompt sequentially and measure it."""
    torch.set_num_threads(1)
    system = make_system(
        job["config"],
        f"system.prompt_processor.prompt={job['prompt']}",
        f"trainer.max_steps={job['steps']}",
        f"system.optimizer.args.lr={job['rate']}",
        f"seed={job['seed']}",
        *job["settings"],
    )
    wanted = quality.truth_of(system)
    assert wanted is not None
    start = time.perf_counter()
    solution = dp.solve(system.trajectory(), dp.Sequential())
    seconds = round(time.perf_counter() - start, 2)
    found = quality.against_truth(system, solution.value, wanted)
    return {**job, **found.figures(), "seconds": seconds}


def run_all(
    jobs: list[dict[str, Any]], log: Path, workers: int
) -> list[dict[str, Any]]:
    """Run the jobs that the log does not have; returns all results."""
    keys = list(jobs[0])
    done = (
        [json.loads(line) for line in log.read_text().splitlines()]
        if log.exists()
        else []
    )
    known = {json.dumps([entry[key] for key in keys]) for entry in done}
    todo = [j for j in jobs if json.dumps([j[key] for key in keys]) not in known]
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    context = multiprocessing.get_context("spawn")
    total = sum(job["steps"] for job in todo)
    with (
        context.Pool(workers) as pool,
        open(log, "a", encoding="utf-8") as file,
        tqdm(total=total, unit="step", desc="tuning") as bar,
    ):
        for entry in pool.imap_unordered(solve, todo):
            file.write(json.dumps(entry) + "\n")
            file.flush()
            done.append(entry)
            bar.update(entry["steps"])
    wanted = {json.dumps([j[key] for key in keys]) for j in jobs}
    return [e for e in done if json.dumps([e[key] for key in keys]) in wanted]


def table(entries: list[dict[str, Any]]) -> tuple[str, int, float]:
    """A Markdown table of mean PSNR and IoU; the tuned steps and learning rate."""
    cells: dict[tuple[int, float], list[dict[str, Any]]] = defaultdict(list)
    for entry in entries:
        cells[entry["steps"], entry["rate"]].append(entry)

    def mean(cell: tuple[int, float], name: str) -> float:
        return sum(entry[name] for entry in cells[cell]) / len(cells[cell])

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


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="configs/dreamfusion-toybox.yaml")
    parser.add_argument("--steps", type=int, nargs="+", default=list(STEPS))
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--objects", nargs="+", default=list(OBJECTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--workers", type=int, default=2, help="processes of 1 thread")
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--to", type=Path, default=Path("outputs/tuning"))
    arguments = parser.parse_args()
    jobs = [
        {
            "config": arguments.config,
            "prompt": prompt_of(name),
            "steps": steps,
            "rate": rate,
            "seed": seed,
            "settings": arguments.set,
        }
        for steps in sorted(arguments.steps, reverse=True)
        for rate in arguments.rates
        for name in arguments.objects
        for seed in arguments.seeds
    ]
    entries = run_all(jobs, arguments.to / "runs.jsonl", arguments.workers)
    text, steps, rate = table(entries)
    hours = sum(entry["seconds"] for entry in entries) / 3600
    summary = (
        f"{text}\n\nMean PSNR in dB / IoU of {', '.join(arguments.objects)}; "
        f"{len(arguments.seeds)} seed(s), sequential. Tuned: {steps} steps at learning "
        f"rate {rate:g}. Cost: {len(entries)} runs, {hours:.2f} process-hours on "
        f"{environment()['processor']}, one thread each.\n"
    )
    (arguments.to / "table.md").write_text(summary, encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    main()
