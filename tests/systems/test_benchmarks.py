"""The commands behind the published figures run."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import io
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dreampropeller as dp
import launch
from benchmarks import (
    batched,
    cost,
    gpu,
    main_job,
    pareto,
    runs,
    sampling,
    sensitivity,
    side_by_side,
    speedup,
    tune,
    wallclock,
)
from systems import build, quality
from systems.settings.config import load
from tests.systems.scenes import SMALL, TOYBOX, small


def command(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m benchmarks.NAME` in this process, which has loaded everything."""
    module = importlib.import_module(f"benchmarks.{name}")
    out, errors, code = io.StringIO(), io.StringIO(), 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [str(module.__file__), *arguments])
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(errors):
            try:
                code = module.main() or 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(bool(end.code))
                errors.write(end.code if isinstance(end.code, str) else "")
    return subprocess.CompletedProcess(
        [name, *arguments], code, out.getvalue(), errors.getvalue()
    )


def test_gpu_figures_are_refused_without_a_gpu(tmp_path: Path) -> None:
    done = command("gpu", "--to", str(tmp_path))
    assert done.returncode == 2
    assert "no CUDA device" in done.stderr
    assert not list(tmp_path.iterdir())


def test_batched_drifts_are_measured_beside_single_ones() -> None:
    rows = batched.measure(small().trajectory(), [1, 2], repeats=1)
    assert [row["size"] for row in rows] == [1, 2]
    assert all(row["cpu_seconds"] > 0 for row in rows)
    assert max(row["deviation"] for row in rows) < 1e-4
    assert len(batched.table(rows).splitlines()) == 4


def test_a_mesh_is_measured_from_its_file(tmp_path: Path) -> None:
    system = build(
        load(TOYBOX, [*SMALL, "system.prompt_processor.prompt=a red sphere"])
    )
    truth = quality.truth_of(system)
    assert truth is not None
    y = system.trajectory().init()[0]
    side = torch.linspace(-1.1, 1.1, 8)
    radius = torch.cartesian_prod(side, side, side).norm(dim=-1).reshape(8, 8, 8)
    # Raw density 10 · 10 · (0.65 − r) before softplus: ln 2 at the true radius.
    y["geometry.grid"][0, 0] = 10 * (0.65 - radius) - (1 - radius / 0.8)
    found, strip = main_job.mesh_of(system, y, truth, tmp_path)
    assert found["bodies"] == 1
    assert found["iou_3d"] > 0.7  # the grid is coarse
    diagonal = 3**0.5 * 1.3  # of the box around a ball of radius 0.65
    assert found["chamfer_share"] == pytest.approx(
        found["chamfer"] / diagonal, rel=0.05
    )
    assert len(strip) == main_job.SIDES + 1
    y["geometry.grid"][0, 0] = -100.0
    assert main_job.mesh_of(system, y, truth, tmp_path)[0]["iou_3d"] == 0


def test_the_main_job_is_measured_once(tmp_path: Path) -> None:
    sizes = [s for s in SMALL if "prompt" not in s]
    words = ("main_job", "--objects", "sphere", "--workers", "1", "--to", str(tmp_path))
    for _ in range(2):  # the second reads the log
        done = command(*words, "--set", *sizes)
        assert done.returncode == 0, done.stderr
    lines = (tmp_path / "runs.jsonl").read_text().split("\n")
    (entry,) = [json.loads(line) for line in lines if line]
    table = (tmp_path / "table.md").read_text()
    assert (
        f"| a red sphere | {entry['psnr']:.1f} | {entry['union_psnr']:.1f} |" in table
    )
    assert {"volumes.png", "meshes.png"} <= {file.name for file in tmp_path.iterdir()}
    assert len(set(main_job.held_out())) == 16


def test_growth_pairs_each_size_with_its_window() -> None:
    arguments = argparse.Namespace(
        config=TOYBOX, object="mushroom", window=8, set=["seed=3"]
    )
    wanted = cost.jobs(arguments)
    cells = [(job["size"], job["views"]) for job in wanted[::2]]
    assert cells == [(32, 1), (32, 4), (64, 4), (32, 16), (128, 4)]
    figures = {"iterations": 10, "evaluations": 10, "psnr": 20.0, "iou": 0.5}
    entries = [
        {
            **job,
            **figures,
            "seconds": 2.0 * job["views"],
            "iterations": 10 - 8 * (i % 2),
        }
        for i, job in enumerate(wanted)
    ]
    first, second, *_ = cost.table(entries).splitlines()[2:]
    assert first.startswith("| 32² | 1 | 0.200 | 1.0× | 2 | 5.0× | 1.00× |")
    assert "| 4.0× |" in second


def in_this_process(
    words: Sequence[str], **options: Any
) -> subprocess.CompletedProcess[str]:
    """`python launch.py …`, which has loaded everything here."""
    del options
    errors = io.StringIO()
    with contextlib.redirect_stderr(errors):
        code = launch.main(list(words[2:]))
    return subprocess.CompletedProcess(words, code, "", errors.getvalue())


@pytest.mark.long
def test_the_gpu_command_fills_its_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    processes = SimpleNamespace(run=in_this_process, PIPE=None)
    monkeypatch.setattr(gpu, "subprocess", processes)
    missing = tmp_path / "missing.yaml"
    done = command(
        "gpu",
        *("--cpu", "--configs", TOYBOX, str(missing), "--steps", "6"),
        *("--windows", "3"),
        *("--runs", str(tmp_path / "runs"), "--to", str(tmp_path)),
        *("--set", *(s for s in SMALL if "prompt" not in s and "max_steps" not in s)),
    )
    assert done.returncode == 0, done.stderr
    filled = json.loads((tmp_path / "gpu-cpu.json").read_text())
    plain, fast, window, *refused = filled["runs"]
    assert plain["iterations"] == 6 > fast["iterations"]
    assert window["run"] == "batched window of 3"
    assert 2 <= window["iterations"] < 6
    assert plain["quality"]["psnr"] > 0
    assert filled["environment"]["gpu"] is None
    assert all("missing.yaml" in entry["not_run"] for entry in refused)
    assert "not run" in done.stdout


@pytest.mark.long
def test_the_figure_of_the_readme_is_drawn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    small = [s for s in SMALL if "prompt" not in s and "max_steps" not in s]
    settings = ("--set", *small, "trainer.max_steps=4")
    monkeypatch.setattr(sys, "argv", ["", "--to", str(tmp_path), *settings])
    side_by_side.main()
    found = json.loads((tmp_path / "runs.json").read_text())
    plain, fast = found["sequential"], found["accelerated"]
    assert plain["iterations"] == plain["evaluations"] == 4 > fast["iterations"]
    assert list(plain["psnr"]) == ["1", "2", "3", "4"]
    assert fast["psnr"]["1"] == plain["psnr"]["1"]  # the first step is exact
    assert (tmp_path / "figure.png").stat().st_size > 10_000


def test_tuning_picks_the_fewest_steps_near_the_plateau() -> None:
    found = {(25, 0.1): 20.0, (50, 0.1): 22.6, (50, 0.2): 21.0, (100, 0.1): 23.0}
    entries = [
        {"steps": steps, "rate": rate, "psnr": psnr, "iou": 0.5}
        for (steps, rate), psnr in found.items()
    ]
    entries += [
        {"steps": steps, "rate": 0.2, "psnr": 10.0, "iou": 0.1} for steps in (25, 100)
    ]
    text, steps, rate = tune.table(entries)
    assert (steps, rate) == (50, 0.1)
    assert "**22.6 / 0.50**" in text


RESULTS = Path("benchmarks/results")


COMMANDS = sorted(path.parent for path in RESULTS.glob("*/commands.txt"))


@pytest.mark.parametrize("folder", COMMANDS, ids=lambda path: path.name)
def test_published_logs_are_what_their_commands_give(folder: Path) -> None:
    """Run by run: none is missing, and none comes from elsewhere."""
    found: set[str] = set()
    for line in (folder / "commands.txt").read_text(encoding="utf-8").splitlines():
        python, option, name, *options = shlex.split(line)
        assert (python, option) == ("python", "-m")
        module = importlib.import_module(name)
        wanted = module.jobs(module.make_parser().parse_args(options))
        found |= {runs._key(job) for job in wanted}
    assert found == set(runs._read(folder / "runs.jsonl"))


def test_published_logs_name_no_place_on_a_machine() -> None:
    for log in RESULTS.glob("*/runs.jsonl"):
        assert '": "/' not in log.read_text(encoding="utf-8"), log


def test_published_tables_are_written_over_only_by_name(tmp_path: Path) -> None:
    """`--logged` shows fewer rows of a published log, and leaves its table alone."""
    folder = RESULTS / "pareto_rates"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    (line, *_) = (folder / "commands.txt").read_text().splitlines()
    name, *options = shlex.split(line)[2:]
    options += ["--logged", "--to", str(folder.resolve())]
    done = subprocess.run(
        [sys.executable, "-m", name, *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(Path.cwd()), *sys.path])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    text = (tmp_path / "outputs" / "pareto_rates" / "table.md").read_text()
    assert "Cost: 6 runs" in text
    assert "on a machine that the log does not name, one thread each" in text
    parser = argparse.ArgumentParser()
    runs.add_places(parser, "x")
    for options, place in (
        (["--to", str(tmp_path)], tmp_path),
        (["--to", str(folder), "--tables", str(tmp_path / "t")], tmp_path / "t"),
    ):
        assert runs.tables_of(parser.parse_args(options)) == place


def test_a_log_says_where_its_rows_were_made(tmp_path: Path) -> None:
    jobs = [runs.job(TOYBOX, "a red mug", f"trainer.max_steps={n}") for n in (3, 4)]
    log = tmp_path / "log.jsonl"
    log.write_text(json.dumps({**jobs[0], "seconds": 3600}))  # before rows said so
    entries = runs.run_all(jobs, log, 1, how=_hour)
    assert "machine" not in entries[0]
    assert entries[1]["machine"] == runs.machine()
    assert f"torch {torch.__version__}" in runs.machine()
    assert runs.cost(entries) == (
        "Cost: 2 runs, 2.00 core-hours on a machine that the log does not name and "
        f"{runs.machine()}, one thread each."
    )


def _hour(job: runs.Job) -> dict[str, Any]:
    return {**job, "seconds": 3600}


def test_the_best_rate_at_the_edge_is_marked() -> None:
    assert runs.at_edge(0.1, [0.1, 0.2, 0.4])
    assert runs.at_edge(0.4, [0.1, 0.2, 0.4])
    assert not runs.at_edge(0.2, [0.1, 0.2, 0.4])
    assert not runs.at_edge(0.1, [0.1])
    labels = {"regime": "r", "predictor": "", "shape": "mug", "seed": 0, "iou": 0.5}
    entries = [
        {**labels, "row": row, "window": 8, "rate": rate, "psnr": psnr}
        | {"iterations": 5, "evaluations": 5}
        for row, rate, psnr in (
            (pareto.SEQUENTIAL, 0.1, 25.0),
            ("T/8 steps", 0.1, 20.0),
            ("T/8 steps", 0.2, 22.0),
            ("T/8 steps", 0.4, 21.0),
            ("T/32 steps", 0.2, 18.0),
            ("T/32 steps", 0.4, 19.0),
        )
    ]
    text = pareto.table(pareto.points(entries))
    assert "| T/8 steps |  | 8 | 0.2 | 1 |" in text
    assert "| T/32 steps |  | 8 | 0.4 (the edge of those tried) | 1 |" in text


def test_runs_are_made_once(tmp_path: Path) -> None:
    jobs = [
        runs.job(TOYBOX, "a red mug", f"trainer.max_steps={n}", n=n) for n in (3, 4)
    ]
    log = tmp_path / "log.jsonl"
    first = runs.run_all(jobs[:1], log, 1, how=_stamp)
    with open(log, "a") as file:
        file.write('\n{"config": "killed in the mid')
    second = runs.run_all(jobs[::-1], log, 1, how=_stamp)
    assert second[1] == first[0]
    assert [entry["n"] for entry in second] == [4, 3]
    assert runs.run_all(jobs, log, 0, how=_stamp) == second[::-1]


def _stamp(job: runs.Job) -> dict[str, Any]:
    return {**job, "stamp": time.time_ns()}


def test_rivals_are_ranked_at_their_best_rate(tmp_path: Path) -> None:
    lines = []
    for row, window, rate, psnr, iterations in (
        (speedup.SEQUENTIAL, None, 0.1, 22.0, 40),
        ("drift", 8, 0.1, 21.9, 8),
        ("5 steps", None, 0.1, 15.0, 5),
        ("5 steps", None, 0.4, 20.0, 5),
    ):
        made = [
            {
                **{"row": row, "window": window, "rate": rate, "seed": seed},
                **{"prompt": "a red mug", "pictures": str(tmp_path), "iou": 0.8},
                **{"psnr": psnr, "iterations": iterations, "evaluations": 40},
                "settings": [row, str(rate), str(seed)],
            }
            for seed in speedup.SEEDS
        ]
        for line in made:
            picture = torch.full((2, 3, 4, 4), psnr / 100)
            torch.save(picture, speedup.images_of(line))
        lines += made
    found = {line["row"]: line for line in speedup.summarise(lines)}
    assert found["5 steps"]["rate"] == 0.4
    assert found["drift"]["loss"] == pytest.approx(0.1)
    assert found["drift"]["apart"] == pytest.approx(60, abs=0.1)
    text = speedup.table(list(found.values()))
    assert (
        "| drift (lr 0.1) | 8 | 2 | 8.0 | 5.0× | 40 | 21.90 | -0.10 | 0.800 |" in text
    )
    for file in tmp_path.glob("*.pt"):
        file.unlink()  # as in a log that was kept without its pictures
    bare = speedup.table(speedup.summarise(lines))
    assert (
        "| drift (lr 0.1) | 8 | 2 | 8.0 | 5.0× | 40 | 21.90 | -0.10 | 0.800 | – |"
        in bare
    )
    assert speedup.other_seed(lines).endswith("pictures not kept.")
    # A row that has the second seed alone is held against that seed's sequential run.
    lines[1]["psnr"] = 24.0
    half = speedup.summarise([e for e in lines if e["row"] != "drift" or e["seed"]])
    line = next(line for line in half if line["row"] == "drift")
    assert (line["runs"], line["loss"]) == (1, pytest.approx(2.1))
    speedup.plot(list(found.values()), tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_wallclock_compares_within_a_round() -> None:
    def round_of(plain: float, alone: float, two: float) -> dict[str, Any]:
        names = (wallclock.SEQUENTIAL, *list(wallclock.ways([4]))[2:])
        report = {"iterations": 9, "evaluations": 40, "quality": {"psnr": 20.0}}
        return {
            name: {**report, "solving_seconds": seconds}
            for name, seconds in zip(names, (plain, alone, two), strict=True)
        }

    # The machine was three times slower in the second round.
    text = wallclock.table([round_of(4, 5, 2.5), round_of(12, 15, 7.5)])
    assert "| window 4, 2 workers of 1 thread | 5.0 | 1.60× | 2.00× | 9 | 40 |" in text
    # A worker without a step of the window would have nothing to do.
    named = wallclock.ways([2, 8], [1, 2, 8], [1])
    assert "window 8, 8 workers of 1 thread" in named
    assert "window 2, 8 workers of 1 thread" not in named
    split = wallclock.ways([1], [2], [1], [1, 2])
    assert list(split)[1:] == ["window 1, 2 workers of 1 thread, views in 2"]


@pytest.mark.long
def test_the_frontier_is_computed_drawn_and_resumed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pareto, "RATES", (1.0, 2.0))  # fewer than in earnest
    small = [s for s in SMALL if "prompt" not in s and "max_steps" not in s]
    arguments = (
        *("--config", TOYBOX, "--objects", "mug", "--regimes", "small:24:0.005"),
        *(
            "--thresholds",
            "drift:0.12:4+secant",
            "relative:1e6",
            "--predictors",
            "auto",
        ),
        *("--windows", "4", "--exact", "4", "--rivals", "8", "--workers", "1"),
        *("--to", str(tmp_path), "--set", *small),
    )
    done = command("pareto", *arguments)
    assert done.returncode == 0, done.stderr
    log = (tmp_path / "runs.jsonl").read_text()
    rows = [json.loads(line) for line in log.splitlines() if line]
    by_row = {row["row"]: row for row in rows}
    plain, exact = by_row["sequential"], by_row["exact"]
    assert (plain["iterations"], plain["evaluations"]) == (24, 24)
    assert exact["psnr"] == plain["psnr"]  # bit for bit
    # The first step alone, then whole windows; for the drift a slot is held back.
    assert by_row["relative:1e6"]["iterations"] == 7
    assert 7 <= by_row["drift:0.12:4+secant"]["iterations"] <= exact["iterations"]
    assert sum(row["row"].startswith("T/8") for row in rows) == 4
    text = (tmp_path / "table.md").read_text()
    assert text.count("\n| small |") == 6  # rivals at their best only
    assert (tmp_path / "pareto.png").stat().st_size > 10_000
    again = command("pareto", *arguments)
    assert again.returncode == 0
    assert (tmp_path / "runs.jsonl").read_text() == log
    more = (*arguments, "--windows", "4", "8", "--logged")  # 8 was never run
    assert command("pareto", *more).returncode == 0
    assert (tmp_path / "runs.jsonl").read_text() == log
    assert (tmp_path / "table.md").read_text() == text
    count = command("pareto", *arguments, "--count")
    assert count.stdout.startswith("8 runs of 108 steps")
    wrong = command("pareto", *arguments, "--thresholds", "drifty")
    assert "`drifty` is no threshold: write `ema:median`" in wrong.stderr


def test_sensitivity_counts_from_the_plain_loop_of_each_case(tmp_path: Path) -> None:
    found = {
        ("default", None): (28.0, 200),
        ("default", 0.12): (27.9, 40),
        ("default", 0.5): (26.0, 20),
        ("SGD", None): (25.0, 200),
        ("SGD", 0.12): (25.2, 50),
        ("SGD", 0.5): (25.0, 25),
        ("1 view", None): (24.0, 200),
        ("1 view", 0.12): (24.0, 50),
    }
    entries = [
        {"case": case, "delta": delta, "psnr": psnr + spread, "iterations": iterations}
        for (case, delta), (psnr, iterations) in found.items()
        for spread in (-1, 1)
    ]
    points = sensitivity.points(entries)
    lines = sensitivity.table(points).splitlines()
    assert lines[0] == "| | sequential | δ = 0.12 | δ = 0.5 |"
    assert lines[2] == (
        "| default | 28.00 dB, 200 steps | -0.10 dB, 5.0x | -2.00 dB, 10.0x |"
    )
    assert lines[3] == (
        "| SGD | 25.00 dB, 200 steps | +0.20 dB, 4.0x | +0.00 dB, 8.0x |"
    )
    assert lines[4] == "| 1 view | 24.00 dB, 200 steps | +0.00 dB, 4.0x | not run |"
    sensitivity.plot(points, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 5000


def test_sensitivity_shows_what_has_been_run(tmp_path: Path) -> None:
    arguments = ("--cases", "default", "SGD", "--deltas", "0.2", "0.4", "--logged")
    nothing = command("sensitivity", *arguments, "--to", str(tmp_path))
    assert "has no sequential run: leave out `--logged`" in nothing.stderr
    chosen = argparse.Namespace(
        cases=["default", "SGD"], objects=["mushroom"], deltas=[0.2], window=16, set=[]
    )
    figures = {"psnr": 25.0, "iterations": 50, "seconds": 1.0}
    plain, ours, _, other = sensitivity.jobs(chosen)  # SGD's sequential run is to come
    lines = [json.dumps({**job, **figures}) for job in (plain, ours, other)]
    (tmp_path / "runs.jsonl").write_text("\n".join(lines))
    done = command("sensitivity", *arguments, "--to", str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert "| default | 25.00 dB, 50 steps | +0.00 dB, 1.0x |" in done.stdout
    assert "SGD" not in done.stdout


@pytest.mark.parametrize("case", sensitivity.CASES)
def test_cases_of_sensitivity_are_configs_that_build(case: str) -> None:
    arguments = argparse.Namespace(
        cases=[case], objects=["mug"], deltas=[0.1], window=16, set=[]
    )
    plain, ours = sensitivity.jobs(arguments)
    assert load(plain["config"], plain["settings"]).solver.name == "sequential"
    solver = build(load(ours["config"], ours["settings"])).solver()
    assert isinstance(solver, dp.PicardSolver)
    assert solver.threshold == dp.DriftThreshold(0.1)


@pytest.mark.long
def test_our_published_form_takes_the_iterations_of_diffusers(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Same seed, window and tolerance; and the sequential pipeline is the reference."""
    bench = sampling.Bench()
    for sampler in ("ddim-100", "ddpm-100"):
        kind, _ = sampling.SAMPLERS[sampler]
        # A divisor of 1000: diffusers takes variances at timesteps that it does not
        # visit otherwise, and the strides then differ now and then.
        monkeypatch.setitem(sampling.SAMPLERS, sampler, (kind, 20))
        job = {"part": "published", "sampler": sampler, "prompt": sampling.PROMPT}
        job |= {"seed": 0, "window": 4, "tolerance": 0.3}
        plain = bench.run({**job, "method": "sequential"})
        assert (plain["iterations"], plain["error"]) == (20, 0)
        theirs = bench.run({**job, "method": "diffusers"})
        ours = bench.run({**job, "method": "published"})
        assert ours["iterations"] == theirs["iterations"] < 20
        assert ours["evaluations"] == theirs["evaluations"]
        assert ours["error"] == pytest.approx(theirs["error"], abs=1e-4)


def test_a_log_is_gone_on_with(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    todo = list(sampling.jobs())
    assert len({sampling.identity(job) for job in todo}) == len(todo)

    class Counted:
        def run(self, job: sampling.Job) -> sampling.Job:
            return {**job, "iterations": 1, "evaluations": 1, "seconds": 0, "error": 0}

    monkeypatch.setattr(sampling, "Bench", Counted)
    log = tmp_path / "log.jsonl"
    sampling.work(log, todo[:2], hours=1)
    sampling.work(log, todo[:3], hours=1)
    assert list(map(sampling.identity, sampling.read(log))) == [
        sampling.identity(job) for job in todo[:3]
    ]
    assert "| ddim-100 | sequential |" in sampling.table(
        sampling.read(log), "published"
    )


def test_the_grid_is_a_table_and_a_plot(tmp_path: Path) -> None:
    found = {"iterations": 9, "error": 0.25}
    entries = [{**job, **found} for job in sampling.grid()]
    one = "9 / 0.2500"
    lines = sampling.crossed(entries).splitlines()
    assert f"| ddpm-100 | 8 | 0.03 | {one} | {one} | {one} | {one} |" in lines
    assert f"| ddim-100 | 100 | 0.3 | – | {one} | – | {one} |" in lines
    sampling.plot(entries, tmp_path / "grid.png")
    assert (tmp_path / "grid.png").stat().st_size > 0
