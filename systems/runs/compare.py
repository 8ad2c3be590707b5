"""Comparison of the sequential run and the accelerated run.

`launch.py --compare` makes both from the same seed and config, one after the other,
with the same threads per worker. A sequential run of another seed shows the variation
between seeds. `--compare RUN RUN` compares finished runs. Both write `report.html` and
`report.json`.
"""

from __future__ import annotations

import math
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dreampropeller as dp
from dreampropeller import identity
from systems import build, quality
from systems.runs import folders
from systems.runs.report import figures, page
from systems.runs.report.runs import Run, open_run, quality_over_time, system_of
from systems.runs.run import execute
from systems.settings.config import Config, load
from systems.settings.dispatch import is_rank
from systems.settings.reader import ConfigError, to_section

POINTS = 10
"""Checkpoints of a run at which quality is measured."""
RATES = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Learning rates of a rival, relative to the run's: fewer steps want larger ones."""


def run(path: Path | None, words: Sequence[str]) -> int:
    """Run `--compare`: of two finished runs, or of the runs of a config.

    Args:
        path: A config, or None.
        words: The words after `--compare`: runs, `rivals`, settings.

    Raises:
        ConfigError: There are neither two runs nor a config.
    """
    overrides = [word for word in words if "=" in word or word.startswith("-")]
    named = [word for word in words if word not in overrides]
    if len(named) == 2 and not overrides and path is None:
        return compare_folders(*named)
    if path is None or named not in ([], ["rivals"]):
        raise ConfigError(
            "Compare what? Write `--config FILE --compare KEY=VALUE …`, `--config FILE "
            "--compare rivals KEY=VALUE …`, or `--compare RUN RUN` with two finished "
            "run folders."
        )
    return compare(path, overrides, rivals=bool(named))


def compare(path: Path, overrides: Sequence[str], rivals: bool = False) -> int:
    """Make the runs of a config and compare them; returns the exit code.

    Args:
        path: The config.
        overrides: Settings of both runs.
        rivals: Make the rivals too: sequential runs with as few steps as the
            accelerated run has iterations.

    Raises:
        ConfigError: There is nothing to compare.
    """
    config = load(path, overrides)
    _check(config)
    system = build(config)
    if rivals and quality.truth_of(system) is None and config.quality.clip is None:
        raise ConfigError(
            "Rivals are ranked by quality, which cannot be measured: the toybox has no "
            "ground truth for this prompt. Name a CLIP model, `quality.clip="
            "openai/clip-vit-base-patch32`, or leave `rivals` out."
        )
    del system
    folder = folders.open_folder(replace(config, tag=f"{config.tag}-compare"))
    made = {}
    for name, settings in _runs(config).items():
        print(f"--- {name}")
        wanted = load(path, [*overrides, *settings])
        made[name] = folder / name.replace(" ", "-")
        made[name].mkdir()
        folders.write_setup(made[name], wanted)
        try:
            code = execute(wanted, folder=made[name])
        except ValueError:
            folders.discard(folder)
            raise
        if code:
            print(f"Stopped: `{name}` did not finish, so there is no report.")
            return code
    runs = {name: open_run(place) for name, place in made.items()}
    found = _rivals(path, overrides, runs["accelerated"]) if rivals else []
    return _report(folder, runs, found)


def compare_folders(first: str, second: str) -> int:
    """Compare two finished runs; the base is the sequential one, else the first.

    The page is written into a folder beside the second run.

    Raises:
        ConfigError: One of them is not finished, or they solve different problems.
    """
    runs = [open_run(first), open_run(second)]
    if runs[0].config.solver.name != "sequential":
        runs.sort(key=lambda run: run.config.solver.name != "sequential")
    base, other = runs
    if base.report["title"] != other.report["title"]:
        raise ConfigError(
            f"These runs made different things, “{base.report['title']}” and "
            f"“{other.report['title']}”: name two runs of one prompt."
        )
    system_of(base).check_state(other.state(system_of(other)), other.folder)
    folder = folders.open_folder(
        replace(other.config, tag=f"{other.config.tag}-compare")
    )
    return _report(folder, {"sequential": base, "accelerated": other}, [])


def _check(config: Config) -> None:
    if is_rank():
        raise ConfigError(
            "`--compare` starts its processes itself: run it without torchrun, with "
            "`dispatch.num_workers=2`."
        )
    if config.solver.name == "sequential":
        raise ConfigError(
            "There is nothing to compare: `solver.name` is `sequential` already. Leave "
            "it out, `--compare` makes the sequential run too."
        )
    if config.resume is not None:
        raise ConfigError(
            "`--compare` makes runs from the start. To compare finished ones, write "
            "`--compare RUN RUN`."
        )


def _runs(config: Config) -> dict[str, list[str]]:
    """The runs of a comparison, and their overrides."""
    count = config.dispatch.num_workers
    threads = config.dispatch.threads or (1 if count > 1 else torch.get_num_threads())
    every = max(1, math.ceil(config.trainer.max_steps / POINTS))
    both = [
        f"dispatch.threads={threads}",
        f"checkpoint.every_n_train_steps={every}",
        f"checkpoint.keep={2 * POINTS}",
    ]
    alone = ["dispatch.num_workers=1", "dispatch.views=1"]
    plain = [*both, "solver.name=sequential", *alone]
    return {
        "sequential": plain,
        "accelerated": both,
        "other seed": [*plain, f"seed={config.seed + 1}"],
    }


def _rivals(path: Path, overrides: Sequence[str], fast: Run) -> list[dict[str, Any]]:
    """Sequential runs with as many steps as `fast` has iterations.

    Each uses its best learning rate.
    """
    few = fast.report["iterations"]
    times = max(1, round(fast.report["steps"] / few))
    views = fast.config.data["batch_size"]
    plain = [*overrides, "solver.name=sequential", f"trainer.max_steps={few}"]
    many = [times * v for v in views] if isinstance(views, list) else times * views
    plans = {
        f"{few} steps": (views, plain),
        f"{few} steps of {times}x the views": (
            many,
            [*plain, f"data.batch_size={many}"],
        ),
    }
    found = []
    with tqdm(total=len(plans) * len(RATES) * few, unit="step", desc="rivals") as bar:
        for name, (count, settings) in plans.items():
            tried = [
                _rival(load(path, settings), factor, lambda: bar.update())
                for factor in RATES
            ]
            best = max(tried, key=lambda entry: _rank(entry))
            # A learning rate beyond those tried might do better still.
            edge = best in (tried[0], tried[-1])
            plan = {"name": name, "views": count, "steps": few, "edge": edge}
            found.append({**plan, **best})
    return found


def _rank(entry: dict[str, Any]) -> float:
    score = figures.score_of(entry)
    return -math.inf if score is None or math.isnan(score[1]) else score[1]


def _rival(config: Config, factor: float, tell: Callable[[], Any]) -> dict[str, Any]:
    """One sequential run at a multiple of the config's learning rates."""
    settings = dict(config.system["optimizer"])
    parts = {"args": settings.get("args", {}), **settings.get("params", {})}
    scaled = {
        part: {k: v * factor if k == "lr" else v for k, v in group.items()}
        for part, group in parts.items()
    }
    rate = next(group["lr"] for group in scaled.values() if "lr" in group)
    settings |= {"args": scaled.pop("args"), "params": scaled}
    system = build(replace(config, system={**config.system, "optimizer": settings}))
    solution = dp.solve(
        system.trajectory(),
        system.solver(),
        throw=False,
        on_iteration=lambda *_: bool(tell()) and False,
    )
    wanted = quality.truth_of(system)
    found = (
        quality.by_clip(system, solution.value)
        if wanted is None
        else quality.against_truth(system, solution.value, wanted).figures()
    )
    return {"rate": rate, "quality": found}


def _report(folder: Path, runs: dict[str, Run], rivals: list[dict[str, Any]]) -> int:
    """Measure the remaining figures, and write page, figures and table."""
    base, fast = runs["sequential"], runs["accelerated"]
    system = system_of(base)
    ends = {name: run.state(system) for name, run in runs.items()}
    points = {
        name: quality_over_time(run, system)
        for name, run in tqdm(runs.items(), desc="quality over time", leave=False)
    }
    described = {name: figures.describe(run) for name, run in runs.items()}
    gain = figures.speed_up(base, fast)
    first, second = map(figures.score_of, list(described.values())[:2])
    comparison = {
        "title": base.report["title"],
        "command": " ".join(["python", *map(shlex.quote, sys.argv)]),
        "verdict": figures.verdict(
            described["sequential"], described["accelerated"], gain, rivals
        ),
        "speed_up": {name: round(value, 4) for name, value in gain.items()},
        "quality_change": (
            None
            if first is None or second is None
            else {"name": first[0], "value": round(second[1] - first[1], 3)}
        ),
        "deviation": {
            name: figures.deviation(system, end, ends["sequential"])
            for name, end in ends.items()
            if name != "sequential"
        },
        "runs": described,
        "rivals": rivals,
        "differences": _differences(base.config, fast.config),
        "quality_over_time": points,
        "environment": fast.report["environment"],
    }
    folders.write_json(folder / "report.json", comparison)
    page.write(folder / "report.html", comparison, runs, points)
    print(_text(page.rows(comparison)))
    print("\n".join(comparison["verdict"]))
    print(f"Open {folder / 'report.html'}")
    return 0


def _differences(a: Config, b: Config) -> list[str]:
    """Settings besides solver and dispatch in which two runs differ."""
    out = ("solver", "dispatch", "checkpoint", "resume", "tag", "exp_root_dir", "name")
    out += ("viewer", "viewer_port")
    one, other = (
        identity.flat({k: v for k, v in to_section(config).items() if k not in out})
        for config in (a, b)
    )
    return [
        f"they differ in `{key}`: {one.get(key)} and {other.get(key)}"
        for key in sorted(one.keys() | other.keys())
        if one.get(key) != other.get(key)
    ]


def _text(rows: list[list[str]]) -> str:
    """A table for the terminal."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    )
