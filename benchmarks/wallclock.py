"""Wall-clock of one worker and of several, compared with the sequential run.

`python -m benchmarks.wallclock` runs `launch.py` for each variant in turn, and repeats
the whole round several times, so that a slow period of the machine affects all of them.
It writes medians, and the median of the ratios within a round. Run it on an idle
machine. A GPU is used if there is one, and shared if there are more workers than GPUs;
hide it with `CUDA_VISIBLE_DEVICES=` to measure the CPU.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from systems.runs.folders import write_json

CONFIG = "configs/dreamfusion-toybox.yaml"
WINDOWS = (2, 4, 8)
WORKERS = (1, 2)
THREADS = (1, 2)
VIEWS = (1,)
Round = dict[str, dict[str, Any]]
SEQUENTIAL = "sequential, 1 thread"


def ways(
    windows: Sequence[int] = WINDOWS,
    workers: Sequence[int] = WORKERS,
    threads: Sequence[int] = THREADS,
    views: Sequence[int] = VIEWS,
) -> dict[str, list[str]]:
    """The variants and their settings; no worker without a step of the window.

    The views of a step can be split, too: `views` are numbers of columns.
    """
    found = {
        f"sequential, {_count(count, 'thread')}": [
            "solver.name=sequential",
            "dispatch.num_workers=1",
            f"dispatch.threads={count}",
        ]
        for count in threads
    }
    for window, count, columns in itertools.product(windows, workers, views):
        rows, left = divmod(count, columns)
        if left == 0 and rows <= window:
            name = f"window {window}, {_count(count, 'worker')} of 1 thread"
            if columns > 1:
                name += f", views in {columns}"
            found[name] = [
                f"solver.window.size={window}",
                f"dispatch.num_workers={count}",
                f"dispatch.views={columns}",
                "dispatch.threads=1",
            ]
    return found


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'s' * (number > 1)}"


def run(config: str, settings: list[str], threads: int, to: Path) -> dict[str, Any]:
    """The report of one run, on at most `threads` threads per process."""
    before = set(to.rglob("report.json"))
    subprocess.run(
        [
            *(sys.executable, "launch.py", "--config", config, "--train"),
            *(f"exp_root_dir={to}", "data.n_test_views=2", *settings),
            *("trainer.val_check_interval=100000",),
            "checkpoint.every_n_train_steps=100000",
        ],
        check=True,
        capture_output=True,
        env={**os.environ, "OMP_NUM_THREADS": str(threads)},
    )
    (made,) = set(to.rglob("report.json")) - before
    return json.loads(made.read_text())


def table(rounds: list[Round]) -> str:
    """Medians as Markdown."""
    lines = [
        "| | seconds | against the sequential run on 1 thread | against 1 worker | "
        "iterations | gradients | PSNR, dB |",
        "|---" * 7 + "|",
    ]

    def ratio(name: str, base: str) -> str:
        if name == base or any(base not in entry for entry in rounds):
            return "–"
        ratios = [
            entry[base]["solving_seconds"] / entry[name]["solving_seconds"]
            for entry in rounds
        ]
        return f"{statistics.median(ratios):.2f}×"

    for name, report in rounds[0].items():
        seconds = statistics.median(entry[name]["solving_seconds"] for entry in rounds)
        alone = re.sub(r"\d+ workers", "1 worker", name).partition(", views")[0]
        quality = report["quality"]
        psnr = f"{quality['psnr']:.2f}" if isinstance(quality, dict) else "–"
        lines.append(
            f"| {name} | {seconds:.1f} | {ratio(name, SEQUENTIAL)} | "
            f"{ratio(name, alone)} | "
            f"{report['iterations']} | {report['evaluations']} | {psnr} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--prompt", default="a red mug")
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS))
    parser.add_argument("--workers", type=int, nargs="+", default=list(WORKERS))
    parser.add_argument(
        "--threads",
        type=int,
        nargs="+",
        default=list(THREADS),
        help="of sequential runs",
    )
    parser.add_argument(
        "--views", type=int, nargs="+", default=list(VIEWS), help="`dispatch.views`"
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--to", type=Path, default=Path("outputs/wallclock"))
    arguments = parser.parse_args()
    settings = [f"system.prompt_processor.prompt={arguments.prompt}", *arguments.set]
    chosen = ways(
        arguments.windows, arguments.workers, arguments.threads, arguments.views
    )
    rounds: list[Round] = []
    text = ""
    with tqdm(total=arguments.rounds * len(chosen), unit="run") as bar:
        for _ in range(arguments.rounds):
            entry = {}
            for name, more in chosen.items():
                entry[name] = run(
                    arguments.config,
                    [*settings, *more],
                    max(arguments.threads),
                    arguments.to / "runs",
                )
                bar.update()
            rounds.append(entry)
            text = _write(rounds, arguments)
    print(text)


def _write(rounds: list[Round], arguments: argparse.Namespace) -> str:
    """Write the table and its rounds, after each round."""
    machine = next(iter(rounds[0].values()))["environment"]
    where = f"{machine['processor']}, {machine['cores']} cores"
    if machine["gpu"]:
        where = f"{machine['gpu']}, {where}"
    text = (
        f"{table(rounds)}\n\n“{arguments.prompt}”, medians of {len(rounds)} rounds; "
        f"{where}, torch {machine['packages']['torch']}, commit {machine['commit']}.\n"
    )
    arguments.to.mkdir(parents=True, exist_ok=True)
    (arguments.to / "table.md").write_text(text, encoding="utf-8")
    kept = ("solving_seconds", "seconds_by_phase", "iterations", "evaluations")
    logged = [
        {
            name: {key: report[key] for key in (*kept, "quality")}
            for name, report in entry.items()
        }
        for entry in rounds
    ]
    command = ["python", "-m", "benchmarks.wallclock", *sys.argv[1:]]
    content = {"command": command, "environment": machine, "rounds": logged}
    write_json(arguments.to / "rounds.json", content)
    return text


if __name__ == "__main__":
    main()
