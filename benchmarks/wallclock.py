"""Wall-clock of one worker and two, beside the plain loop on one thread and two.

`python -m benchmarks.wallclock` runs `launch.py` for each way in turn, the whole round
several times, so that a slow spell of the machine hits all of them; it writes medians,
and the median of the ratios within a round. Run it on an idle machine.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from systems.folders import environment

CONFIG = "configs/dreamfusion-toybox.yaml"
WINDOWS = (2, 4, 8)
PLAIN = "plain loop, 1 thread"


def ways(windows: list[int]) -> dict[str, list[str]]:
    """What is compared, and its settings."""
    plain = ["solver.name=sequential", "dispatch.num_workers=1"]
    found = {
        PLAIN: [*plain, "dispatch.threads=1"],
        "plain loop, 2 threads": [*plain, "dispatch.threads=2"],
    }
    for window in windows:
        for count in (1, 2):
            found[f"window {window}, {count} worker{'s' * (count > 1)} of 1 thread"] = [
                f"solver.window.size={window}",
                f"dispatch.num_workers={count}",
                "dispatch.threads=1",
            ]
    return found


def run(config: str, settings: list[str], to: Path) -> dict[str, Any]:
    """The report of one run."""
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
        env={**os.environ, "OMP_NUM_THREADS": "2"},
    )
    (made,) = set(to.rglob("report.json")) - before
    return json.loads(made.read_text())


def table(rounds: list[dict[str, dict[str, Any]]]) -> str:
    """Medians as Markdown."""
    lines = [
        "| | seconds | against the plain loop on 1 thread | against 1 worker | "
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
        alone = name.replace("2 workers", "1 worker")
        quality = report["quality"]
        psnr = f"{quality['psnr']:.2f}" if isinstance(quality, dict) else "–"
        lines.append(
            f"| {name} | {seconds:.1f} | {ratio(name, PLAIN)} | {ratio(name, alone)} | "
            f"{report['iterations']} | {report['evaluations']} | {psnr} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--prompt", default="a red mug")
    parser.add_argument("--windows", type=int, nargs="+", default=list(WINDOWS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--to", type=Path, default=Path("outputs/wallclock"))
    arguments = parser.parse_args()
    settings = [f"system.prompt_processor.prompt={arguments.prompt}", *arguments.set]
    chosen = ways(arguments.windows)
    rounds: list[dict[str, dict[str, Any]]] = []
    with tqdm(total=arguments.rounds * len(chosen), unit="run") as bar:
        for _ in range(arguments.rounds):
            entry = {}
            for name, more in chosen.items():
                entry[name] = run(
                    arguments.config, [*settings, *more], arguments.to / "runs"
                )
                bar.update()
            rounds.append(entry)
    machine = environment()
    text = (
        f"{table(rounds)}\n\n“{arguments.prompt}”, medians of {arguments.rounds} "
        f"rounds; {machine['processor']}, {machine['cores']} cores, torch "
        f"{machine['packages']['torch']}, commit {machine['commit']}.\n"
    )
    (arguments.to / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
