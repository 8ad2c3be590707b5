"""Quality against iterations, over thresholds, predictors and windows.

`python -m benchmarks.pareto` solves a prompt with every threshold, predictor and
window in two regimes, beside the sequential run, the exact solve and the rivals (1/k
of the steps, k times the views, each at the best of five learning rates). A regime is
`name:steps:learning rate`: *tuned* is the result of `benchmarks.tune`, *threestudio*
takes more and smaller steps, at the learning rate of threestudio's DreamFusion config.
It writes a table and a plot. An interrupted benchmark resumes from its log; `--count`
only prints the number of runs and steps, `--logged` shows what has been run. The
commands behind a published log are in `commands.txt` beside it.
"""

from __future__ import annotations

import argparse
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import runs
from systems.settings.config import load

CONFIG = "configs/dreamfusion-toybox-hashgrid.yaml"
REGIMES = ("tuned:400:0.08", "threestudio:1000:0.01")
WINDOWS = (4, 8, 16, 32)
PREDICTORS = ("repeat_last", "momentum", "auto")
THRESHOLDS = (
    "ema:median",
    "ema:mean",
    "fixed:1e-4",
    "relative:1",
    "drift:0.2",
    "drift:0.2+secant",
)
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
SEQUENTIAL = "sequential"
EXACT = "exact"
STYLES = {"repeat_last": "o:", "momentum": "s--", "auto": "^-"}
Entry = dict[str, Any]


def threshold(spec: str) -> list[str]:
    """The settings of a threshold: `kind:value`, `kind:value+secant`, or `exact`."""
    alone, _, acceleration = spec.partition("+")
    chosen = f"solver.acceleration.name={acceleration or 'none'}"
    return [*_threshold(alone), chosen]


def _threshold(spec: str) -> list[str]:
    kind, _, value = spec.partition(":")
    name = "solver.threshold.name="
    if kind == "ema":
        return [f"{name}ema", f"solver.threshold.adaptivity={value}"]
    if kind == "drift":
        value, _, warmup = value.partition(":")
        cautious = [f"solver.threshold.warmup={warmup}"] if warmup else []
        return [f"{name}drift", f"solver.threshold.value={value}", *cautious]
    if kind in ("fixed", "relative"):
        relative = f"solver.threshold.relative={str(kind == 'relative').lower()}"
        return [f"{name}fixed", f"solver.threshold.value={value}", relative]
    if spec == EXACT:
        return [f"{name}fixed", "solver.threshold.value=0"]
    raise SystemExit(
        f"`{spec}` is no threshold: write `ema:median`, `ema:mean`, `fixed:VALUE`, "
        "`relative:VALUE`, `drift:VALUE`, `drift:VALUE:WARMUP`, any of these followed "
        "by `+secant`, or `exact`."
    )


def jobs(arguments: argparse.Namespace) -> list[Entry]:
    """Every run, with its row."""
    rows: list[tuple[str, str, str, int, int, float, list[str]]] = []
    for regime in arguments.regimes:
        name, steps, rate = regime.split(":")
        steps, rate = int(steps), float(rate)
        rows.append((name, SEQUENTIAL, "", 1, steps, rate, ["solver.name=sequential"]))
        for window in arguments.windows:
            size = f"solver.window.size={window}"
            for spec in arguments.thresholds:
                for guess in arguments.predictors:
                    chosen = [size, f"solver.predictor={guess}", *threshold(spec)]
                    rows.append((name, spec, guess, window, steps, rate, chosen))
            if window in arguments.exact:
                chosen = [size, *threshold(EXACT)]
                rows.append((name, EXACT, "momentum", window, steps, rate, chosen))
        for k in arguments.rivals:
            few = math.ceil(steps / k)
            views = k * load_views(arguments)
            for factor in RATES:
                sequential = ["solver.name=sequential"]
                rows.append(
                    (name, f"T/{k} steps", "", k, few, rate * factor, sequential)
                )
                many = [*sequential, f"data.batch_size={views}"]
                label = f"T/{k} steps, {k}x views"
                rows.append((name, label, "", k, few, rate * factor, many))
    return [
        runs.job(
            arguments.config,
            runs.prompt_of(shape),
            *arguments.set,
            f"seed={seed}",
            f"trainer.max_steps={steps}",
            f"system.optimizer.args.lr={rate:g}",
            *chosen,
            regime=name,
            row=row,
            predictor=predictor,
            window=window,
            steps=steps,
            rate=rate,
            shape=shape,
            seed=seed,
        )
        for name, row, predictor, window, steps, rate, chosen in rows
        for shape in arguments.objects
        for seed in arguments.seeds
    ]


def load_views(arguments: argparse.Namespace) -> int:
    """Views per step of the config."""
    prompt = f"system.prompt_processor.prompt={runs.prompt_of(arguments.objects[0])}"
    return int(load(arguments.config, [prompt, *arguments.set]).data["batch_size"])


def points(entries: Sequence[Entry]) -> list[Entry]:
    """One point per row and window: means over prompts and seeds; rivals at their best.

    `factor` is the number of steps of the sequential runs of the same regime, prompts
    and seeds over the number of iterations; `gain` is the difference of the PSNR.
    """
    sequential = {_problem(e): e for e in entries if e["row"] == SEQUENTIAL}
    cells: dict[tuple[Any, ...], list[Entry]] = defaultdict(list)
    for entry in entries:
        key = ("regime", "row", "predictor", "window", "rate")
        cells[tuple(entry[name] for name in key)].append(entry)
    best: dict[tuple[Any, ...], Entry] = {}
    rates: dict[tuple[Any, ...], list[float]] = defaultdict(list)
    for (regime, row, predictor, window, rate), cell in cells.items():
        beside = [sequential[_problem(entry)] for entry in cell]
        iterations, psnr = (runs.mean(beside, name) for name in ("iterations", "psnr"))
        point = {
            "regime": regime,
            "row": row,
            "predictor": predictor,
            "window": window,
            "rate": rate,
            "runs": len(cell),
            **{
                name: runs.mean(cell, name)
                for name in ("psnr", "iou", "iterations", "evaluations")
            },
        }
        point["factor"] = iterations / point["iterations"]
        point["gain"] = point["psnr"] - psnr
        key = (regime, row, predictor, window)
        rates[key].append(rate)
        if key not in best or point["psnr"] > best[key]["psnr"]:
            best[key] = point
    for key, point in best.items():
        point["edge"] = runs.at_edge(point["rate"], rates[key])
    return list(best.values())


def _problem(entry: runs.Job) -> tuple[str, str, int]:
    return entry["regime"], entry["shape"], entry["seed"]


def table(found: Sequence[Entry]) -> str:
    """A Markdown table."""
    lines = [
        "| regime | threshold or rival | predictor | window or k | lr | runs | "
        "iterations (factor) | evaluations | PSNR, dB | against the sequential run | "
        "IoU |",
        "|" + "---|" * 11,
    ]
    lines += [
        f"| {p['regime']} | {p['row']} | {p['predictor']} | {p['window']} | "
        f"{p['rate']:g}{runs.EDGE * p['edge']} | {p['runs']} | "
        f"{p['iterations']:.0f} ({p['factor']:.1f}x) | "
        f"{p['evaluations']:.0f} | {p['psnr']:.2f} | {p['gain']:+.2f} | "
        f"{p['iou']:.3f} |"
        for p in found
    ]
    return "\n".join(lines)


def plot(found: Sequence[Entry], path: Path) -> None:
    """Loss of quality against the factor, a panel per regime; rivals are crosses.

    A colour for each threshold, a line style for each predictor, a point for each
    window; losses are linear up to 0.3 dB and logarithmic beyond.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import ScalarFormatter

    regimes = list(dict.fromkeys(point["regime"] for point in found))
    shown = [point for point in found if point["row"] != SEQUENTIAL]
    rows = list(dict.fromkeys(point["row"] for point in shown))
    colours = {row: f"C{number}" for number, row in enumerate(rows)}
    figure = Figure(figsize=(7 * len(regimes), 4.8), layout="constrained")
    for axes, regime in zip(
        figure.subplots(1, len(regimes), squeeze=False)[0], regimes, strict=True
    ):
        lines: dict[tuple[str, str], list[Entry]] = defaultdict(list)
        for point in shown:
            if point["regime"] == regime:
                lines[point["row"], point["predictor"]].append(point)
        for (row, guess), line in lines.items():
            axes.plot(
                [point["factor"] for point in line],
                [point["gain"] for point in line],
                STYLES.get(guess, "x"),
                color=colours[row],
                markersize=4,
                linewidth=1,
                label=f"{row} {guess}".strip(),
            )
            for point in line:
                axes.annotate(
                    str(point["window"]),
                    (point["factor"], point["gain"]),
                    xytext=(2, 3),
                    textcoords="offset points",
                    fontsize=6,
                    color=colours[row],
                )
        axes.axhline(0, color="black", linewidth=0.5)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter(ScalarFormatter())
        axes.set_yscale("symlog", linthresh=0.3)
        axes.set_yticks([-10, -3, -1, -0.3, -0.2, -0.1, 0, 0.1, 0.2, 0.3])
        axes.yaxis.set_major_formatter(ScalarFormatter())
        axes.set(
            xlabel="times fewer iterations than the sequential run",
            ylabel="PSNR against the sequential run, dB",
            title=regime,
        )
        axes.grid(alpha=0.3)
        if lines:
            axes.legend(fontsize=6, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=150)


def make_parser() -> argparse.ArgumentParser:
    """The options."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default=CONFIG)
    parser.add_argument("--objects", nargs="+", default=["tree"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--regimes", nargs="+", default=list(REGIMES))
    parser.add_argument("--thresholds", nargs="*", default=list(THRESHOLDS))
    parser.add_argument("--predictors", nargs="*", default=list(PREDICTORS))
    parser.add_argument("--windows", type=int, nargs="*", default=list(WINDOWS))
    parser.add_argument(
        "--exact", type=int, nargs="*", default=[], help="windows at threshold 0 too"
    )
    parser.add_argument("--rivals", type=int, nargs="*", default=[8, 32], help="k")
    parser.add_argument("--workers", type=int, default=2, help="processes of 1 thread")
    parser.add_argument("--set", nargs="*", default=[], help="further settings")
    parser.add_argument("--count", action="store_true", help="say the cost, and stop")
    parser.add_argument(
        "--logged", action="store_true", help="table and plot of what has been run"
    )
    runs.add_places(parser, "pareto")
    return parser


def main() -> None:
    """Command line."""
    arguments = make_parser().parse_args()
    wanted = jobs(arguments)
    if arguments.count:
        steps = sum(job["steps"] for job in wanted)
        print(f"{len(wanted)} runs of {steps} steps in all, a gradient or more a step.")
        return
    log = arguments.to / "runs.jsonl"
    if arguments.logged:
        entries = runs.logged(wanted, log, _problem, SEQUENTIAL)
    else:
        entries = runs.run_all(wanted, log, arguments.workers)
    found = points(entries)
    folder = runs.tables_of(arguments)
    plot(found, folder / "pareto.png")
    summary = (
        f"{table(found)}\n\nMeans over the runs of {', '.join(arguments.objects)} and "
        f"{len(arguments.seeds)} seed(s); `{arguments.config}` "
        f"{' '.join(arguments.set)}. {runs.cost(entries)}\n"
    )
    (folder / "table.md").write_text(summary, encoding="utf-8")
    print(summary)


if __name__ == "__main__":
    main()
