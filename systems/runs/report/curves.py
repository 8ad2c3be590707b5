"""The curves of a comparison, as SVG drawings for the page."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from systems.runs.report.runs import Run

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"sequential": "#8a8f98", "accelerated": "#d9480f", "other seed": "#4c6ef5"}


def draw(paint: Callable[[Axes], None], name: str) -> str:
    """An SVG element of one set of axes.

    Args:
        paint: Function that draws on the axes.
        name: Prefix that keeps the drawing's identifiers unique on the page.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name, "font.size": 10}):
        figure = Figure(figsize=(5.4, 3.1), layout="constrained")
        figure.patch.set_alpha(0)
        axes = figure.add_subplot()
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25)
        paint(axes)
        file = io.StringIO()
        figure.savefig(file, format="svg", metadata={"Date": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def over_time(points: Mapping[str, Sequence[dict[str, float]]]) -> str:
    """Quality against wall-clock time."""

    def paint(axes: Axes) -> None:
        for name, curve in points.items():
            axes.plot(
                [point["seconds"] for point in curve],
                [point["psnr"] for point in curve],
                "o-",
                ms=4,
                color=COLOURS[name],
                label=name,
            )
        axes.set(xlabel="seconds of solving", ylabel="PSNR, dB")
        axes.legend(frameon=False)

    return draw(paint, "time")


def strides(run: Run) -> str:
    """Steps accepted per iteration, and the window."""

    def paint(axes: Axes) -> None:
        begin = [entry["begin"] for entry in run.iterations]
        axes.step(
            begin,
            [entry["window"] for entry in run.iterations],
            where="post",
            color=COLOURS["sequential"],
            label="window",
        )
        axes.plot(
            begin,
            [entry["stride"] for entry in run.iterations],
            "o",
            ms=3.5,
            color=COLOURS["accelerated"],
            label="accepted",
        )
        axes.set(xlabel="step", ylabel="steps an iteration")
        axes.set_ylim(bottom=0)
        axes.legend(frameon=False, loc="lower right")

    return draw(paint, "strides")


def errors(run: Run) -> str:
    """Errors of the slots in each iteration, and the threshold."""

    def paint(axes: Axes) -> None:
        # Null in the file where not finite: the slot has no error yet.
        known = [
            {**entry, "errors": np.array(entry["errors"], dtype=float)}
            for entry in run.iterations
            if any(error is not None for error in entry["errors"])
        ]
        begin = [entry["begin"] for entry in known]
        rows: list[tuple[str, Callable[[np.ndarray], float]]] = [
            ("largest", np.nanmax),
            ("middle slot", lambda values: values[len(values) // 2]),
            ("first slot", lambda values: values[0]),
        ]
        for shade, (label, pick) in zip((1.0, 0.6, 0.3), rows, strict=True):
            axes.plot(
                begin,
                [pick(entry["errors"]) for entry in known],
                color=COLOURS["accelerated"],
                alpha=shade,
                lw=1.2,
                label=f"error, {label}",
            )
        bounds = [entry["threshold"] for entry in known]
        if any(bounds):
            axes.plot(begin, bounds, "--", color="#222", lw=1.2, label="threshold")
            axes.set_yscale("log")
        told = [
            (entry["begin"], entry["measured_drift_error"])
            for entry in known
            if entry.get("measured_drift_error") is not None
        ]
        if told:
            axes.plot(
                *zip(*told, strict=True),
                "x",
                color="#222",
                ms=4,
                label="measured where not accepted, median",
            )
        axes.set(xlabel="step", ylabel="error of a slot")
        axes.legend(frameon=False, fontsize=8)

    return draw(paint, "errors")


BELIEFS = {
    "secant": "κ, relative change of a drift by distance",
    "residual_momentum": "residual of a guess: momentum",
    "residual_repeat_last": "residual of a guess: repeat_last",
}
"""What threshold and predictor measured, by its name in `metrics.jsonl`."""


def beliefs(run: Run) -> str | None:
    """Estimates of threshold and predictor; None if they measured nothing."""
    told = {
        label: [
            (entry["begin"], entry[name])
            for entry in run.iterations
            if entry.get(name)  # null: unknown; zero: no logarithm
        ]
        for name, label in BELIEFS.items()
    }
    if not any(told.values()):
        return None

    def paint(axes: Axes) -> None:
        colours = ("#222", COLOURS["accelerated"], COLOURS["other seed"])
        for (label, points), colour in zip(told.items(), colours, strict=True):
            if points:
                line = zip(*points, strict=True)
                axes.plot(*line, ".-", lw=1, ms=4, color=colour, label=label)
        axes.set_yscale("log")
        axes.set(xlabel="step", ylabel="units of the state, or their inverse")
        axes.legend(frameon=False, fontsize=8)
        share = [
            (entry["begin"], entry["momentum_share"])
            for entry in run.iterations
            if "momentum_share" in entry
        ]
        if share:
            beside = axes.twinx()
            beside.plot(*zip(*share, strict=True), ":", lw=1, color="#888")
            beside.set(ylabel="share of momentum's way (dotted)", ylim=(0, 1.02))

    return draw(paint, "beliefs")


def phases(runs: Mapping[str, dict[str, Any]]) -> str:
    """Seconds of each run by phase."""

    def paint(axes: Axes) -> None:
        names = sorted(
            {name for run in runs.values() for name in run["seconds_by_phase"]},
            key=lambda name: (
                -max(run["seconds_by_phase"].get(name, 0) for run in runs.values())
            ),
        )
        left = [0.0] * len(runs)
        for name in names:
            widths = [run["seconds_by_phase"].get(name, 0) for run in runs.values()]
            axes.barh(list(runs), widths, left=left, label=name, height=0.55)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        rest = [
            max(0.0, run["seconds"] - used)
            for run, used in zip(runs.values(), left, strict=True)
        ]
        axes.barh(list(runs), rest, left=left, label="other", height=0.55, color="#ddd")
        axes.invert_yaxis()
        axes.set(xlabel="seconds of solving, on the first worker")
        axes.legend(frameon=False, fontsize=8, ncols=4, loc="lower center")
        axes.set_ylim(len(runs) + 0.4, -0.5)

    return draw(paint, "phases")
