"""The main job over sixteen fixed prompts, against their ground truth.

`python -m benchmarks.main_job` runs the default config for each scored prompt, prints a
table and writes a contact sheet: for each prompt eight views, and beside them the same
views of the ground truth (`docs/main_job.md`, `benchmarks/results/main_job.md`).
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from benchmarks import runs
from systems.images import save_sheet
from systems.runs.folders import environment
from systems.toybox.captions import SCORED, caption

CONFIG = "configs/dreamfusion-toybox.yaml"
SHOWN = 8


def table(entries: list[dict[str, Any]]) -> str:
    """A Markdown table with the means in its last row."""
    names = ("psnr", "ssim", "iou", "right_colour", "right_object", "iterations")
    lines = [
        "| prompt | PSNR, dB | SSIM | IoU | colour | object | iterations |",
        "|---|---|---|---|---|---|---|",
    ]
    means = {name: runs.mean(entries, name) for name in names}
    lines += [
        f"| {entry['prompt']} | {entry['psnr']:.1f} | {entry['ssim']:.2f} | "
        f"{entry['iou']:.2f} | {entry['right_colour']:.0%} | "
        f"{entry['right_object']:.0%} | {entry['iterations']:.0f} |"
        for entry in [*entries, {"prompt": "**mean**", **means}]
    ]
    return "\n".join(lines)


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--count", type=int, default=len(SCORED), help="prompts")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--to", type=Path, default=Path("outputs/main_job"))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    entries, rows = [], []
    for colour, name in SCORED[: arguments.count]:
        prompt = caption(colour, name, None, normal=False)
        job = runs.job(arguments.config, prompt, *arguments.set)
        entry, found = runs.solved(job)
        print(json.dumps(entry), flush=True)
        entries.append(entry)
        rows += [found.images[:SHOWN], found.wanted[:SHOWN]]
    arguments.to.mkdir(parents=True, exist_ok=True)
    save_sheet(torch.cat(rows), arguments.to / "sheet.png", 2 * SHOWN, scale=2)
    seconds = sum(entry["seconds"] for entry in entries)
    text = (
        f"{table(entries)}\n\n{entries[0]['solved_steps']} steps each, {seconds:.0f} s "
        f"in all on {environment()['processor']}, {arguments.threads} threads.\n"
    )
    (arguments.to / "table.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
