"""Measurements that need a GPU: short runs of the GPU configs.

`python -m benchmarks.gpu` runs each config several times through `launch.py`:
sequentially on one device, accelerated on all of them, and with batched windows on one
device. Seconds, iterations, quality and memory of each go to
`outputs/gpu/gpu-<device>.json`, with a table on the terminal. A config that cannot run
(its model is not available) is recorded with the reason. `python -m benchmarks.batched`
measures the batched drift by itself. The corresponding tests are `pytest -m gpu`.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from systems.runs.folders import environment, write_json

CONFIGS = {
    "configs/dreamfusion-toybox.yaml": "a red mushroom",
    "configs/dreamfusion-toybox-hashgrid.yaml": "a red mushroom",
    "configs/dreamfusion-sd.yaml": "a zoomed out DSLR photo of a ripe strawberry",
    "configs/dreamfusion-if.yaml": "a zoomed out DSLR photo of a ripe strawberry",
}
STEPS = 60
WINDOWS = (2, 4, 8)
RESULTS = Path("outputs/gpu")


def run(config: str, prompt: str, settings: list[str], to: Path) -> dict[str, Any]:
    """One run of `launch.py`: its report, or the reason of its failure."""
    before = set(to.rglob("report.json"))
    command = [
        *(sys.executable, "launch.py", "--config", config, "--train"),
        f"system.prompt_processor.prompt={prompt}",
        f"exp_root_dir={to}",
        *settings,
    ]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    made = set(to.rglob("report.json")) - before
    if done.returncode or not made:
        errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        return {"config": config, "not_run": (errors or ["no word of why"])[-1][:500]}
    report = json.loads(made.pop().read_text())
    chosen = (
        *("steps", "iterations", "evaluations", "seconds", "seconds_by_phase"),
        *("workers", "quality", "gpu_memory"),
    )
    return {
        "config": config,
        "command": command[1:],
        **{name: report.get(name) for name in chosen},
    }


def variants(workers: int, windows: list[int]) -> dict[str, list[str]]:
    """The runs of a config by name, and their settings."""
    batched = {
        f"batched window of {size}": [
            "dispatch.batch=always",
            f"solver.window={{name: sliding, size: {size}}}",
        ]
        for size in windows
    }
    return {
        "sequential": ["solver.name=sequential"],
        f"{workers} worker(s)": [f"dispatch.num_workers={workers}"],
        **batched,
    }


def row(entry: dict[str, Any]) -> str:
    """A line of the table."""
    begin = f"| {entry['config']} | {entry['run']} |"
    if "not_run" in entry:
        return f"{begin} not run: {entry['not_run']} | | | |"
    found = entry["quality"]
    psnr = f"{found['psnr']:.1f} dB" if "psnr" in found else "not measured"
    memory = entry["gpu_memory"]
    return (
        f"{begin} {entry['iterations']} | "
        f"{entry['seconds']:.1f} | {psnr} | "
        f"{'' if memory is None else f'{memory / 2**30:.1f} GiB'} |"
    )


def main() -> int:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--configs", nargs="+", default=list(CONFIGS))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--workers", type=int, help="default: one per device")
    parser.add_argument("--windows", type=int, nargs="*", default=list(WINDOWS))
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--cpu", action="store_true", help="try the command itself")
    parser.add_argument("--runs", type=Path, default=Path("outputs/gpu"))
    parser.add_argument("--to", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if not torch.cuda.is_available() and not arguments.cpu:
        print(
            "error: no CUDA device: there is nothing to measure here. Run this on a "
            "machine with a GPU and a CUDA build of torch, or try the command itself "
            "with `--cpu` (its file says so).",
            file=sys.stderr,
        )
        return 2
    device = "cpu" if arguments.cpu else torch.cuda.get_device_name()
    workers = arguments.workers or max(1, torch.cuda.device_count())
    entries = []
    for config in arguments.configs:
        prompt = CONFIGS.get(config, "a red mushroom")
        settings = [f"trainer.max_steps={arguments.steps}", *arguments.set]
        for name, chosen in variants(workers, arguments.windows).items():
            found = run(config, prompt, [*settings, *chosen], arguments.runs)
            entries.append({"run": name, **found})
            if name == "sequential" and "not_run" in found:
                break  # nor would the others
    arguments.to.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"\W+", "-", device).strip("-").lower()
    file = arguments.to / f"gpu-{name}.json"
    write_json(file, {"environment": environment(), "runs": entries})
    print("| config | run | iterations | seconds | PSNR | memory |")
    print("|---|---|---|---|---|---|")
    print("\n".join(map(row, entries)))
    print(f"Written to {file}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
