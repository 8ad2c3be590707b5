"""The growth of cost: one prompt with larger images and with more views per step.

`python -m benchmarks.cost` solves a prompt sequentially and at a window, at 32², 64²
and 128² pixels and with 1, 4 and 16 views, and writes a table: seconds per drift, how
many times fewer iterations the window takes, and the quality of both. An interrupted
benchmark resumes from its log.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

from benchmarks import runs

CONFIG = "configs/dreamfusion-toybox.yaml"
SIZES, VIEWS = (32, 64, 128), (1, 4, 16)
SEQUENTIAL = "sequential"
Entry = dict[str, Any]


def jobs(arguments: argparse.Namespace) -> list[Entry]:
    """Every run, the cheapest first: sizes with the usual views, views at 32²."""
    cells = dict.fromkeys([*((s, 4) for s in SIZES), *((SIZES[0], v) for v in VIEWS)])
    solvers = {
        SEQUENTIAL: "solver.name=sequential",
        f"window {arguments.window}": f"solver.window.size={arguments.window}",
    }
    return [
        runs.job(
            arguments.config,
            runs.prompt_of(arguments.object),
            f"data.width={size}",
            f"data.height={size}",
            f"data.batch_size={views}",
            solver,
            *arguments.set,
            row=row,
            size=size,
            views=views,
        )
        for size, views in sorted(cells, key=lambda cell: cell[0] ** 2 * cell[1])
        for row, solver in solvers.items()
    ]


def table(entries: Sequence[Entry]) -> str:
    """A line per size and number of views; the first one is the unit of seconds."""
    pairs = list(zip(entries[::2], entries[1::2], strict=True))
    unit = pairs[0][0]["seconds"] / pairs[0][0]["evaluations"]
    lines = [
        "| images | views | seconds per drift | … of the first | iterations | fewer | "
        "gradients | sequential | window |",
        "|---" * 9 + "|",
    ]
    for plain, fast in pairs:
        seconds = plain["seconds"] / plain["evaluations"]
        gain = plain["iterations"] / fast["iterations"]
        qualities = (f"{e['psnr']:.2f} dB, {e['iou']:.2f}" for e in (plain, fast))
        lines.append(
            f"| {plain['size']}² | {plain['views']} | {seconds:.3f} | "
            f"{seconds / unit:.1f}× | {fast['iterations']} | {gain:.1f}× | "
            f"{fast['evaluations'] / plain['evaluations']:.2f}× | "
            f"{' | '.join(qualities)} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--object", default="mushroom")
    parser.add_argument("--window", type=int, default=8)
    parser.add_argument("--workers", type=int, default=1, help="processes of 1 thread")
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    runs.add_places(parser, "cost")
    arguments = parser.parse_args()
    log = arguments.to / "runs.jsonl"
    entries = runs.run_all(jobs(arguments), log, arguments.workers)
    text = (
        f"{table(entries)}\n\n{entries[0]['prompt']}, seed 0. {runs.cost(entries)} "
        "Seconds of runs beside others compare only roughly.\n"
    )
    (runs.tables_of(arguments) / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
