"""Speed-up and quality of the accelerated run, and of rivals of the same budget.

`python -m benchmarks.speedup` runs the default config over 6 prompts and 2 seeds:

- the sequential run;
- the config's own threshold, `ema` (median and mean) and a fixed one at
  windows 4, 8 and 16 (the config's at 32 too);
- sequential runs of 1/k of the steps, with the same views or k times as many, each
  at the best of five learning rates.

It writes a table and a plot. An interrupted benchmark resumes from its log; `--logged`
shows what has been run. Wall-clock is measured by `benchmarks.wallclock`.
"""

from __future__ import annotations

import argparse
import hashlib
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import runs
from systems.settings.config import load

CONFIG = "configs/dreamfusion-toybox.yaml"
OBJECTS = ("sphere", "mushroom", "mug", "house", "rocket", "fish")
SEEDS = (0, 1)
WINDOWS = (4, 8, 16)
WIDE = 32
"""The widest window, for the default threshold only."""
DEFAULT = "default (drift, 0.2, secant)"
RIVAL = 8
"""The factors k of the rivals."""
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
FIXED = 1e-4
EMA = ("solver.threshold.name=ema", "solver.threshold.value=1e-5")
PLAIN_PICARD = ("solver.predictor=momentum", "solver.acceleration.name=none")
THRESHOLDS = {
    DEFAULT: (),
    "ema, median": (*PLAIN_PICARD, *EMA, "solver.threshold.adaptivity=median"),
    "ema, mean": (*PLAIN_PICARD, *EMA, "solver.threshold.adaptivity=mean"),
    f"fixed, {FIXED:g}": (
        *PLAIN_PICARD,
        "solver.threshold.name=fixed",
        f"solver.threshold.value={FIXED}",
    ),
}
SEQUENTIAL = "sequential"
Entry = dict[str, Any]


def jobs(arguments: argparse.Namespace) -> list[Entry]:
    """Every requested run, and the folder of its images."""
    return [
        {**job, "pictures": str(arguments.to / "pictures")}
        for job in _all_jobs(
            arguments.config, arguments.objects, arguments.seeds, arguments.set
        )
        if job["window"] in (None, *arguments.windows)
        and (not arguments.rows or job["row"] in (SEQUENTIAL, *arguments.rows))
    ]


def _all_jobs(
    config: str, objects: Sequence[str], seeds: Sequence[int], settings: list[str]
) -> list[Entry]:
    """Every run of the table, with its row."""
    wanted = load(config, ["system.prompt_processor.prompt=a red mug", *settings])
    steps, views = wanted.trainer.max_steps, wanted.data["batch_size"]
    rate = wanted.system["optimizer"]["args"]["lr"]
    few = math.ceil(steps / RIVAL)
    rows: list[tuple[str, int | None, float, tuple[str, ...]]] = [
        (SEQUENTIAL, None, rate, ("solver.name=sequential",))
    ]
    rows += [
        (name, window, rate, (*chosen, f"solver.window.size={window}"))
        for name, chosen in THRESHOLDS.items()
        for window in (*WINDOWS, *[WIDE] * (name == DEFAULT))
    ]
    for name, more in (
        (f"{few} steps", ()),
        (f"{few} steps of {RIVAL}x the views", (f"data.batch_size={views * RIVAL}",)),
    ):
        rows += [
            (
                name,
                None,
                rate * factor,
                (
                    "solver.name=sequential",
                    f"trainer.max_steps={few}",
                    f"system.optimizer.args.lr={rate * factor}",
                    *more,
                ),
            )
            for factor in RATES
        ]
    return [
        runs.job(
            config,
            runs.prompt_of(name),
            f"seed={seed}",
            *settings,
            *chosen,
            row=row,
            window=window,
            rate=value,
            seed=seed,
        )
        for seed in seeds  # an interrupted run completes the first seeds
        for row, window, value, chosen in rows
        for name in objects
    ]


def solve(job: runs.Job) -> Entry:
    """Solve a job, and save its images for comparison with other runs."""
    entry, found = runs.solved(job)
    file = images_of(job)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save(found.images, file)
    del entry["pictures"]  # a place on this machine, which no log needs
    return entry


def images_of(entry: runs.Job) -> Path:
    """The file of a run's images, in the folder that it names."""
    name = hashlib.sha256(repr(entry["settings"]).encode()).hexdigest()[:16]
    return Path(entry["pictures"]) / f"{name}.pt"


def deviation(entry: Entry, sequential: dict[tuple[str, int], Entry]) -> float:
    """PSNR of a run's images against its sequential run's; infinite if equal.

    NaN if the images are missing, because a log can be kept without them.
    """
    files = [images_of(e) for e in (entry, sequential[entry["prompt"], entry["seed"]])]
    if not all(file.exists() for file in files):
        return math.nan
    a, b = (torch.load(file, weights_only=True) for file in files)
    error = float((a - b).square().mean())
    return -10 * math.log10(error) if error else math.inf


def best_rates(entries: list[Entry]) -> list[Entry]:
    """The entries of a rival at the learning rate with the best mean PSNR."""
    by_rate: dict[float, list[Entry]] = defaultdict(list)
    for entry in entries:
        by_rate[entry["rate"]].append(entry)
    return max(by_rate.values(), key=lambda found: runs.mean(found, "psnr"))


def summarise(entries: list[Entry]) -> list[Entry]:
    """A line per row of the table; losses refer to the same sequential runs."""
    sequential = {
        (e["prompt"], e["seed"]): e for e in entries if e["row"] == SEQUENTIAL
    }
    groups: dict[tuple[str, int | None], list[Entry]] = defaultdict(list)
    for entry in entries:
        groups[entry["row"], entry["window"]].append(entry)
    lines = []
    for (row, window), found in groups.items():
        chosen = best_rates(found)
        apart = [deviation(e, sequential) for e in chosen]
        beside = [sequential[e["prompt"], e["seed"]] for e in chosen]
        lines.append(
            {
                "row": row,
                "window": window,
                "rate": chosen[0]["rate"],
                "edge": runs.at_edge(chosen[0]["rate"], [e["rate"] for e in found]),
                "runs": len(chosen),
                **{
                    name: runs.mean(chosen, name)
                    for name in ("iterations", "evaluations", "psnr", "iou")
                },
                "loss": runs.mean(beside, "psnr") - runs.mean(chosen, "psnr"),
                "apart": math.inf if row == SEQUENTIAL else sum(apart) / len(apart),
            }
        )
    return lines


def other_seed(entries: list[Entry]) -> str:
    """Deviation between the sequential runs of the first two seeds."""
    sequential = {
        (e["prompt"], e["seed"]): e for e in entries if e["row"] == SEQUENTIAL
    }
    first, *others = sorted({seed for _, seed in sequential})
    if not others:
        return "Plain loops of another seed: not run."
    apart = [
        deviation({**entry, "seed": others[0]}, sequential)
        for (_, seed), entry in sequential.items()
        if seed == first
    ]
    if any(map(math.isnan, apart)):
        return "How far sequential runs of two seeds are apart: pictures not kept."
    return f"Plain loops of two seeds: {sum(apart) / len(apart):.1f} dB apart."


def table(lines: list[Entry]) -> str:
    """The lines as Markdown."""
    steps = next(line["iterations"] for line in lines if line["row"] == SEQUENTIAL)
    text = [
        "| | window | runs | iterations | fewer | gradients | PSNR, dB | against "
        "sequential, dB | IoU | pictures against sequential, dB |",
        "|---" * 10 + "|",
    ]
    text += [
        f"| {line['row']} (lr {line['rate']:g}{runs.EDGE * line['edge']}) | "
        f"{line['window'] or '–'} | "
        f"{line['runs']} | {line['iterations']:.1f} | "
        f"{steps / line['iterations']:.1f}× | {line['evaluations']:.0f} | "
        f"{line['psnr']:.2f} | {-line['loss']:+.2f} | {line['iou']:.3f} | "
        f"{format(line['apart'], '.1f') if math.isfinite(line['apart']) else '–'} |"
        for line in lines
    ]
    return "\n".join(text)


def plot(lines: list[Entry], path: Path) -> None:
    """Quality against iterations; points are labelled with the window size."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import NullFormatter, ScalarFormatter

    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for row in {line["row"]: None for line in lines}:
        own = [line for line in lines if line["row"] == row]
        axes.plot(
            [line["iterations"] for line in own],
            [line["psnr"] for line in own],
            "o-" if len(own) > 1 else "s",
            label=row,
        )
        for line in own:
            if line["window"]:
                place = (line["iterations"], line["psnr"])
                axes.annotate(
                    str(line["window"]),
                    place,
                    xytext=(2, 5),
                    textcoords="offset points",
                    fontsize=7,
                )
    axes.set(xlabel="iterations", ylabel="mean PSNR, dB", xscale="log")
    axes.set_xticks([10, 20, 50, 100, 200])
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, loc="lower right")
    figure.savefig(path, dpi=130)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--objects", nargs="+", default=list(OBJECTS))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(SEEDS))
    parser.add_argument("--rows", nargs="+", help="of the table: `ema, mean`…")
    parser.add_argument("--windows", type=int, nargs="+", default=[*WINDOWS, WIDE])
    parser.add_argument("--workers", type=int, default=2, help="processes of 1 thread")
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument(
        "--logged", action="store_true", help="table and plot of what has been run"
    )
    runs.add_places(parser, "speedup")
    return parser


def main() -> None:
    """Command line."""
    arguments = make_parser().parse_args()
    wanted = jobs(arguments)
    log = arguments.to / "runs.jsonl"
    if arguments.logged:
        entries = runs.logged(
            wanted, log, lambda entry: (entry["prompt"], entry["seed"]), SEQUENTIAL
        )
    else:
        entries = runs.run_all(wanted, log, arguments.workers, solve)
    lines = summarise(entries)
    text = (
        f"{table(lines)}\n\nMeans over the runs of {', '.join(arguments.objects)} "
        f"and seeds {', '.join(map(str, arguments.seeds))}; rivals at the best "
        f"of five learning rates. {other_seed(entries)} {runs.cost(entries)}\n"
    )
    folder = runs.tables_of(arguments)
    (folder / "table.md").write_text(text, encoding="utf-8")
    plot(lines, folder / "speedup.png")
    print(text)


if __name__ == "__main__":
    main()
