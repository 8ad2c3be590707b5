"""The comparison page: one self-contained HTML file that opens offline."""

from __future__ import annotations

import base64
import html
from collections.abc import Mapping, Sequence
from pathlib import Path
from string import Template
from typing import Any

from systems.files import written
from systems.runs.report import curves
from systems.runs.report.runs import Run

TEMPLATE = Path(__file__).with_name("page.html")


def write(
    path: Path,
    comparison: Mapping[str, Any],
    runs: Mapping[str, Run],
    points: Mapping[str, Sequence[dict[str, float]]],
) -> None:
    """Write the page.

    Args:
        path: File to write.
        comparison: The content of `report.json`.
        runs: Runs by name, the sequential one first.
        points: Quality over time by the same names; empty without ground truth.
    """
    described = comparison["runs"]
    fast = runs["accelerated"]
    window = max(entry["window"] for entry in fast.iterations)
    drawings = {
        "Steps each iteration accepted": curves.strides(fast),
        "Errors and threshold": curves.errors(fast),
        "What threshold and predictor measured": curves.beliefs(fast),
        "Where the seconds went": curves.phases(described),
    }
    if any(points.values()):
        drawings = {"Quality against wall-clock": curves.over_time(points), **drawings}
    machine = comparison["environment"]
    device = machine["gpu"] or machine["processor"]
    prompt = html.escape(comparison["title"])
    text = Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=f"{prompt}: does it pay?",
        prompt=prompt,
        subtitle=html.escape(
            f"{described['sequential']['steps']} steps, window {window}, "
            f"{described['accelerated']['workers']} worker(s) of "
            f"{described['accelerated']['threads']} thread(s), {device}"
        ),
        verdict="\n".join(
            f"<p>{html.escape(sentence)}</p>" for sentence in comparison["verdict"]
        ),
        numbers=_numbers(comparison),
        videos="\n".join(
            _video(run.folder / "turntable.mp4", name) for name, run in runs.items()
        ),
        truth=_truth(runs),
        table=_table(comparison),
        rivals=_rivals(comparison["rivals"]),
        curves="\n".join(
            f"<figure>{drawing}<figcaption>{title}</figcaption></figure>"
            for title, drawing in drawings.items()
            if drawing is not None
        ),
        setup=html.escape(_setup(comparison)),
    )
    with written(path) as part:
        part.write_text(text, encoding="utf-8")


def _numbers(comparison: Mapping[str, Any]) -> str:
    gain = comparison["speed_up"]
    cells = [
        ("hot", f"{gain['iterations']:.1f}×", "fewer iterations"),
        ("hot", f"{gain['wall_clock']:.2f}×", "speed by the clock"),
        ("", f"{gain['evaluations']:.2f}×", "gradients evaluated"),
        ("", f"{gain['device_seconds']:.2f}×", "device time"),
    ]
    change = comparison["quality_change"]
    if change is not None:
        unit = "dB PSNR" if change["name"] == "psnr" else "CLIP score"
        cells.append(("", f"{change['value']:+.2f}", f"{unit} against sequential"))
    return "\n".join(
        f'<div class="{kind}"><b>{value}</b>{label}</div>'
        for kind, value, label in cells
    )


def _video(path: Path, name: str) -> str:
    if not path.exists():
        return f"<figure><figcaption>{name}: no turntable</figcaption></figure>"
    return (
        "<figure><video autoplay loop muted playsinline "
        f'src="{_inline(path, "video/mp4")}"></video>'
        f"<figcaption>{name}</figcaption></figure>"
    )


def _truth(runs: Mapping[str, Run]) -> str:
    found = {name: run.folder / "truth.png" for name, run in runs.items()}
    shown = "\n".join(
        f'<figure><img alt="{name}, above the ground truth" '
        f'src="{_inline(path, "image/png")}">'
        f"<figcaption>{name}: sixteen views, above the same views of the ground truth"
        "</figcaption></figure>"
        for name, path in found.items()
        if path.exists()
    )
    if not shown:
        return ""
    return f'<h2>Beside the ground truth</h2>\n<div class="stack">{shown}</div>'


def _inline(path: Path, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(path.read_bytes()).decode()}"


def rows(comparison: Mapping[str, Any]) -> list[list[str]]:
    """The table of figures, header row first."""
    names = list(comparison["runs"])
    runs = [comparison["runs"][name] for name in names]
    table = [["", *names]]

    def add(title: str, values: Sequence[Any], form: str = "{}") -> None:
        cells = ["–" if value is None else form.format(value) for value in values]
        table.append([title, *cells])

    for title, name, form in (
        ("workers", "workers", "{}"),
        ("steps", "steps", "{}"),
        ("iterations", "iterations", "{}"),
        ("gradients evaluated", "evaluations", "{}"),
        ("wall-clock, s", "seconds", "{:.1f}"),
        ("device time, s", "device_seconds", "{:.1f}"),
    ):
        add(title, [run[name] for run in runs], form)
    for title, name, form in (
        ("PSNR, dB", "psnr", "{:.2f}"),
        ("… within the silhouettes", "union_psnr", "{:.2f}"),
        ("SSIM", "ssim", "{:.3f}"),
        ("IoU", "iou", "{:.3f}"),
        ("right colour", "right_colour", "{:.0%}"),
        ("CLIP score", "clip_score", "{:.2f}"),
        ("R-precision", "r_precision", "{:.0%}"),
    ):
        values = [
            run["quality"].get(name) if isinstance(run["quality"], dict) else None
            for run in runs
        ]
        if any(value is not None for value in values):
            add(title, values, form)
    for title, name, form in (
        ("3D IoU of the mesh", "iou_3d", "{:.3f}"),
        ("Chamfer distance", "chamfer", "{:.4f}"),
        ("normal error", "normal_error", "{:.1f}°"),
        ("bodies", "bodies", "{}"),
    ):
        values = [
            run["mesh"].get(name) if isinstance(run["mesh"], dict) else None
            for run in runs
        ]
        if any(value is not None for value in values):
            add(title, values, form)
    apart = comparison["deviation"]
    add(
        "images against sequential, dB",
        [
            None
            if name not in apart
            else "equal"
            if apart[name]["psnr"] is None
            else f"{apart[name]['psnr']:.1f}"
            for name in names
        ],
    )
    add(
        "state against sequential",
        [
            None
            if name not in apart
            else "equal, bit for bit"
            if apart[name]["bitwise"]
            else "of another size"
            if apart[name]["relative"] is None
            else f"{apart[name]['relative']:.2%}"
            for name in names
        ],
    )
    return table


def _table(comparison: Mapping[str, Any]) -> str:
    head, *body = rows(comparison)
    lines = ["<tr>" + "".join(f"<th>{html.escape(c)}</th>" for c in head) + "</tr>"]
    lines += [
        "<tr>" + "".join(f"<td>{html.escape(c)}</td>" for c in row) + "</tr>"
        for row in body
    ]
    return "\n".join(lines)


def _rivals(rivals: Sequence[Mapping[str, Any]]) -> str:
    if not rivals:
        return ""
    lines = [
        "<tr><th>rival</th><th>steps</th><th>views a step</th><th>learning rate</th>"
        "<th>gradients of a view</th><th>quality</th></tr>"
    ]
    for rival in rivals:
        found = rival["quality"]
        shown = (
            f"{found['psnr']:.2f} dB" if "psnr" in found else f"{found['clip_score']}"
        )
        cells = (
            html.escape(rival["name"]),
            f"{rival['steps']}",
            f"{rival['views']}",
            f"{rival['rate']:g}{', the edge of those tried' * rival['edge']}",
            f"{rival['steps'] * rival['views']}",
            shown,
        )
        lines.append("<tr>" + "".join(f"<td>{c}</td>" for c in cells) + "</tr>")
    table = "\n".join(lines)
    return (
        "<h2>The rivals at the same budget</h2>\n"
        f'<div class="wide"><table id="rivals">{table}</table></div>\n'
        '<p class="soft">Sequential runs with as many steps as the accelerated run '
        "took iterations, each at the best of five learning rates.</p>"
    )


def _setup(comparison: Mapping[str, Any]) -> str:
    machine = comparison["environment"]
    packages = ", ".join(f"{k} {v}" for k, v in machine["packages"].items())
    lines = [
        f"command: {comparison['command']}",
        *(f"{name}: {run['folder']}" for name, run in comparison["runs"].items()),
        *comparison["differences"],
        f"commit {machine['commit']}, Python {machine['python']}, {packages}",
        f"{machine['processor']}, {machine['cores']} cores, GPU: {machine['gpu']}",
    ]
    return "\n".join(lines)
