"""Runs for the tables: solve a job once, and measure it.

A job is a config with settings. Its entry in the log holds the job, the quality of the
result, its cost and its time; an interrupted benchmark resumes from the log.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
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
ROOT = Path(__file__).parent.parent
TRACKED = (ROOT / "benchmarks", ROOT / "docs")
"""Folders of published files, overwritten only if they are named explicitly."""
EDGE = " (the edge of those tried)"
"""Mark of a rival whose best learning rate is at the edge of those tried."""


def add_places(parser: argparse.ArgumentParser, name: str) -> None:
    """Add the options for the log, and for the folder of tables and plots."""
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
    """The folder of table and plot; a published one only if it is named explicitly."""
    if arguments.tables is not None:
        folder = arguments.tables
    else:
        place = arguments.to.resolve()
        published = any(place.is_relative_to(folder) for folder in TRACKED)
        folder = Path("outputs") / arguments.to.name if published else arguments.to
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def at_edge(rate: float, rates: Sequence[float]) -> bool:
    """Whether the best learning rate is the smallest or the largest of several."""
    return len(set(rates)) > 1 and rate in (min(rates), max(rates))


def machine() -> str:
    """Description of this machine."""
    found = environment()
    return f"{found['gpu'] or found['processor']}, torch {found['packages']['torch']}"


def machines(entries: Sequence[Job]) -> str:
    """Machines of the runs, from their log."""
    names = [e.get("machine", "a machine that the log does not name") for e in entries]
    return " and ".join(dict.fromkeys(names)) or "no machine yet"


def cost(entries: Sequence[Job]) -> str:
    """Cost and machines of the runs of a table, from their log."""
    return (
        f"Cost: {len(entries)} runs, {hours(entries):.2f} core-hours on "
        f"{machines(entries)}, one thread each."
    )


def prompt_of(name: str) -> str:
    """The scored prompt of an object."""
    (colour,) = [colour for colour, other in SCORED if other == name]
    return caption(colour, name, None, normal=False)


def job(config: str, prompt: str, *settings: str, **labels: Any) -> dict[str, Any]:
    """A job: a run to make.

    Args:
        config: Path of a YAML file.
        prompt: Prompt of the run.
        *settings: Overrides, such as ``"trainer.max_steps=50"``.
        **labels: Labels of the run for the table.
    """
    return {
        "config": config,
        "prompt": prompt,
        "settings": [f"system.prompt_processor.prompt={prompt}", *settings],
        **labels,
    }


def solve(wanted: Job) -> dict[str, Any]:
    """Solve a job in this process and measure the result."""
    entry, _ = solved(wanted)
    return entry


def solved(wanted: Job) -> tuple[dict[str, Any], quality.Quality]:
    """The same, with the images."""
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
    """Run the jobs missing from the log, in processes of one thread.

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
    with (
        _solved_by(workers, how, todo) as entries,
        open(log, "a", encoding="utf-8") as file,
        tqdm(total=sum(map(_steps, todo)), unit="step", desc=log.parent.name) as bar,
    ):
        for entry in entries:
            entry = {**entry, "machine": where}
            file.write("\n" + json.dumps(entry))  # keeps apart from an incomplete line
            file.flush()
            bar.update(_steps(entry))
    known = _read(log)
    return [{**known[_key(entry)], **entry} for entry in jobs]


def logged(
    jobs: Sequence[Job], log: Path, problem: Callable[[Job], Any], sequential: str
) -> list[dict[str, Any]]:
    """The log's entries of the jobs, in their order; runs nothing.

    Args:
        jobs: The jobs.
        log: The log.
        problem: The labels that a run shares with its sequential run.
        sequential: Row of the sequential runs; entries without one are left out.
    """
    known = _read(log)
    entries = [{**known[_key(e)], **e} for e in jobs if _key(e) in known]
    solved = {problem(entry) for entry in entries if entry["row"] == sequential}
    if not solved:
        raise SystemExit(f"`{log}` has no sequential run: leave out `--logged`.")
    return [entry for entry in entries if problem(entry) in solved]


def hours(entries: Sequence[Mapping[str, Any]]) -> float:
    """Computing time of entries, in core-hours."""
    return sum(entry["seconds"] for entry in entries) / 3600


def mean(entries: Sequence[Mapping[str, Any]], name: str) -> float:
    """The mean of a figure."""
    return sum(entry[name] for entry in entries) / len(entries)


def _steps(wanted: Job) -> int:
    return load(wanted["config"], wanted["settings"]).trainer.max_steps


@contextmanager
def _solved_by(
    workers: int, how: Callable[[Job], dict[str, Any]], todo: Sequence[Job]
) -> Iterator[Iterator[dict[str, Any]]]:
    """Entries as they are made, by processes of one thread; one is this process."""
    if workers == 1:
        torch.set_num_threads(1)
        yield map(how, todo)
        return
    context = multiprocessing.get_context("spawn")
    with context.Pool(workers, torch.set_num_threads, (1,)) as pool:
        yield pool.imap_unordered(how, todo)


def _key(wanted: Job) -> str:
    return json.dumps([wanted["config"], wanted["settings"]])


def _read(log: Path) -> dict[str, dict[str, Any]]:
    if not log.exists():
        return {}
    known = {}
    text = log.read_text()
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except ValueError:  # also of an empty line
            continue  # the run was killed while writing; the job is repeated
        known[_key(entry)] = entry
    return known
