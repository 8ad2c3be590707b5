"""Runs for the tables: solve a job, measure it, and never solve it twice.

A job is a config with settings. Its entry in the log holds the job, the quality of the
result, its cost and its time; an interrupted benchmark resumes from the log.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

import dreampropeller as dp
from systems import build, quality
from systems.runs.folders import environment
from systems.settings.config import load
from systems.toybox.captions import SCORED, caption

Job = Mapping[str, Any]
OLD_NAME = ("solver.threshold.name=paper", "solver.threshold.name=ema")
"""What a setting is called in logs of before, and now."""
ROOT = Path(__file__).parent.parent
TRACKED = (ROOT / "benchmarks", ROOT / "docs")
"""Folders of published files: nothing is written over there unless it is named."""
EDGE = " (the edge of those tried)"
"""Beside the learning rate of a rival that might have done better at another."""


def add_places(parser: argparse.ArgumentParser, name: str) -> None:
    """The options that say where runs are logged, and where tables and plots go."""
    parser.add_argument(
        "--to",
        type=Path,
        default=Path("outputs") / name,
        help="folder of the log, which is gone on with",
    )
    parser.add_argument(
        "--tables",
        type=Path,
        help="folder of table and plot; default: the log's, unless it is published",
    )


def tables_of(arguments: argparse.Namespace) -> Path:
    """The folder of table and plot; a published one only if it is named."""
    if arguments.tables is not None:
        folder = arguments.tables
    else:
        place = arguments.to.resolve()
        published = any(place.is_relative_to(folder) for folder in TRACKED)
        folder = Path("outputs") / arguments.to.name if published else arguments.to
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def at_edge(rate: float, rates: Sequence[float]) -> bool:
    """Whether the best learning rate is the least or the largest of several."""
    return len(set(rates)) > 1 and rate in (min(rates), max(rates))


def machine() -> str:
    """Where a run is made."""
    found = environment()
    return f"{found['gpu'] or found['processor']}, torch {found['packages']['torch']}"


def machines(entries: Sequence[Job]) -> str:
    """Where runs were made, as their log says."""
    names = [e.get("machine", "a machine that the log does not name") for e in entries]
    return " and ".join(dict.fromkeys(names)) or "no machine yet"


def cost(entries: Sequence[Job]) -> str:
    """What the runs of a table cost, and where: as their log has it."""
    return (
        f"Cost: {len(entries)} runs, {hours(entries):.2f} core-hours on "
        f"{machines(entries)}, one thread each."
    )


def prompt_of(name: str) -> str:
    """The scored prompt of an object."""
    (colour,) = [colour for colour, other in SCORED if other == name]
    return caption(colour, name, None, normal=False)


def job(config: str, prompt: str, *settings: str, **labels: Any) -> dict[str, Any]:
    """A run to make.

    Args:
        config: Path of a YAML file.
        prompt: What to make.
        *settings: Such as ``"trainer.max_steps=50"``.
        **labels: What the table needs to know of it.
    """
    return {
        "config": config,
        "prompt": prompt,
        "settings": [f"system.prompt_processor.prompt={prompt}", *settings],
        **labels,
    }


def solve(wanted: Job) -> dict[str, Any]:
    """Solve a job on this process and measure the result."""
    entry, _ = solved(wanted)
    return entry


def solved(wanted: Job) -> tuple[dict[str, Any], quality.Quality]:
    """The same, with the pictures."""
    system = build(load(wanted["config"], wanted["settings"]))
    truth = quality.truth_of(system)
    assert truth is not None, "benchmarks need prompts of the toybox"
    trajectory = system.trajectory()
    start = time.perf_counter()
    solution = dp.solve(trajectory, system.solver(), throw=False)
    seconds = round(time.perf_counter() - start, 2)
    found = quality.against_truth(system, solution.value, truth)
    cost = {
        "solved_steps": sum(solution.stats.strides),
        "iterations": solution.stats.num_iterations,
        "evaluations": solution.stats.num_evaluations,
        "seconds": seconds,
    }
    return {**wanted, **found.figures(), **cost}, found


def run_all(
    jobs: Sequence[Job],
    log: Path,
    workers: int,
    how: Callable[[Job], dict[str, Any]] = solve,
) -> list[dict[str, Any]]:
    """Run the jobs that the log does not have, in processes of one thread.

    Returns:
        An entry for each job, in their order.
    """
    known = _read(log)
    todo = [entry for entry in jobs if _key(entry) not in known]
    if not todo:
        return [{**known[_key(entry)], **entry} for entry in jobs]
    log.parent.mkdir(parents=True, exist_ok=True)
    os.environ["OMP_NUM_THREADS"] = "1"
    where = machine()
    context = multiprocessing.get_context("spawn")
    with (
        context.Pool(workers, torch.set_num_threads, (1,)) as pool,
        open(log, "a", encoding="utf-8") as file,
        tqdm(total=sum(map(_steps, todo)), unit="step", desc=log.parent.name) as bar,
    ):
        for entry in pool.imap_unordered(how, todo):
            entry = {**entry, "machine": where}
            file.write("\n" + json.dumps(entry))  # a torn line before stays alone
            file.flush()
            bar.update(_steps(entry))
    known = _read(log)
    return [{**known[_key(entry)], **entry} for entry in jobs]


def logged(
    jobs: Sequence[Job], log: Path, problem: Callable[[Job], Any], plain: str
) -> list[dict[str, Any]]:
    """The entries of those jobs that the log has, in their order; runs nothing.

    Args:
        jobs: What would be run.
        log: The log.
        problem: What a run and its plain loop have in common.
        plain: The row of plain loops; entries whose problem has none are left out.
    """
    known = _read(log)
    entries = [{**known[_key(e)], **e} for e in jobs if _key(e) in known]
    solved = {problem(entry) for entry in entries if entry["row"] == plain}
    if not solved:
        raise SystemExit(f"`{log}` has no plain loop: leave out `--logged`.")
    return [entry for entry in entries if problem(entry) in solved]


def hours(entries: Sequence[Mapping[str, Any]]) -> float:
    """Computing time of entries, in core-hours."""
    return sum(entry["seconds"] for entry in entries) / 3600


def mean(entries: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of a figure."""
    return sum(entry[name] for entry in entries) / len(entries)


def _steps(wanted: Job) -> int:
    return load(wanted["config"], wanted["settings"]).trainer.max_steps


def _key(wanted: Job) -> str:
    return json.dumps([wanted["config"], wanted["settings"]])


def _read(log: Path) -> dict[str, dict[str, Any]]:
    if not log.exists():
        return {}
    known = {}
    text = log.read_text().replace(*OLD_NAME)
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # also of an empty line
            continue  # the run was killed while it wrote; the job is made again
        known[_key(entry)] = entry
    return known
