"""`launch.py --sample`, from config to files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import dreampropeller as dp
import launch
from dreampropeller.adapters.diffusers import sample, solver_for
from systems import build
from systems.sampling import ACCEPTED, EMPTY, TRIED, Strip
from systems.settings.config import load
from systems.settings.reader import ConfigError
from systems.threestudio.config import split
from systems.toybox import pipeline as toybox
from tests.rank_pool import RankPool

CONFIG = "configs/sample-toybox.yaml"
PROMPT = "system.prompt_processor.prompt=a red mushroom"
SDE = ("solver.name=piadm-sde", "system.sampler.scheduler=ddpm")
GUESS = "solver.predictor.name=clean_image"
FIRST = "solver.predictor.sequential_steps=2"
ODE, LAW = "solver.name=piadm-ode", "solver.name=speculative"


def draw(to: Path, *overrides: str, prompt: str = "a blue mug") -> int:
    return launch.main(
        [
            *("--config", CONFIG, "--sample", f"exp_root_dir={to}"),
            *(f"system.prompt_processor.prompt={prompt}", "dispatch.threads=1"),
            *("system.sampler.num_inference_steps=4", "solver.window.size=3"),
            *overrides,
        ]
    )


def made(to: Path) -> tuple[Path, dict[str, Any]]:
    (folder,) = (to / "sample-toybox").glob("*@*")
    return folder, json.loads((folder / "report.json").read_text())


def pixels(file: Path) -> torch.Tensor:
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).long()


@pytest.mark.parametrize("acceleration", ["none", "anderson"])
def test_a_prompt_becomes_a_picture_a_strip_and_figures(
    tmp_path: Path, acceleration: str
) -> None:
    settings = f"solver.acceleration.name={acceleration}"
    assert draw(tmp_path, "solver.threshold.value=0", settings) == 0
    folder, report = made(tmp_path)
    assert report["steps"] == sum(report["strides"]) == 4
    assert report["iterations"] == len(report["strides"]) <= 4
    assert report["evaluations"] >= 4
    assert report["solver"]["acceleration"]["name"] == acceleration
    own = toybox.draw(toybox.load(), ["a blue mug"], 0, num_inference_steps=4, eta=0.0)
    shown = pixels(folder / "sample.png")[::8, ::8].movedim(-1, 0)
    assert torch.equal(shown, (own[0] * 255).round().long())
    width = pixels(folder / "strip.png").shape[1]
    assert width == 5 * 34  # four steps and the sample
    assert (folder / "config.yaml").exists()


@pytest.mark.parametrize(
    "name",
    ["piadm-ode", "speculative", pytest.param("piadm-sde", marks=pytest.mark.long)],
)
def test_the_solvers_of_samplers_draw(tmp_path: Path, name: str) -> None:
    """Two blocks of two steps at full depth are the sequential sample."""
    scheduler = "ddim" if name == "piadm-ode" else "ddpm"
    settings = [f"system.sampler.scheduler={scheduler}", "solver.window.size=2"]
    own = [f"solver.name={name}", *settings]
    if name == "speculative":
        assert draw(tmp_path, *own) == 0
        assert sum(made(tmp_path)[1]["strides"]) == 4
        return
    assert draw(tmp_path / "blocks", *own, "solver.depth=2") == 0
    assert draw(tmp_path / "exact", *settings, "solver.threshold.value=0") == 0
    (blocks, report), (exact, _) = made(tmp_path / "blocks"), made(tmp_path / "exact")
    assert torch.equal(*(pixels(at / "sample.png") for at in (blocks, exact)))
    assert report["strides"] == [0, 2, 0, 2]
    assert report["notes"] == []  # it is exact
    assert draw(tmp_path / "rough", *own, "solver.depth=1") == 0
    (said,) = made(tmp_path / "rough")[1]["notes"]
    assert "nothing measured the error" in said
    assert "compare with `solver.name=sequential` of the same seed" in said


@pytest.mark.long
def test_a_sliding_window_is_closer_than_blocks_at_fewer_evaluations() -> None:
    """DDIM-20: blocks of ten steps, iterated four times; they take fewer rounds."""
    prior = toybox.load()
    prior.set_progress_bar_config(disable=True)

    def drawn(solver: dp.Solver) -> tuple[torch.Tensor, dp.Stats]:
        found: list[Any] = []
        images = sample(
            prior,
            "a blue mug",
            num_inference_steps=20,
            solver=solver,
            generator=torch.Generator().manual_seed(0),
            on_solution=found.append,
            check=False,
            output_type="pt",
        ).images
        return images, found[0].stats

    exact, _ = drawn(dp.Sequential())
    block, given = drawn(dp.PicardSolver(dp.BlockWindow(10, 4), dp.FixedThreshold(0)))
    slid, taken = drawn(solver_for(10, 0.03))
    assert taken.num_evaluations < given.num_evaluations == 80
    assert taken.num_iterations > given.num_iterations == 8
    assert (slid - exact).square().mean() < (block - exact).square().mean()


def test_a_warm_start_begins_with_single_steps(tmp_path: Path) -> None:
    zero = "solver.threshold.value=0"
    warm = ["system.sampler.scheduler=ddpm", GUESS, FIRST, zero]
    assert draw(tmp_path, *warm) == 0
    folder, report = made(tmp_path)
    assert report["strides"][:2] == [1, 1]
    assert report["evaluations"] > 2 + 1  # a window follows
    assert report["solver"]["predictor"] == {
        "name": "clean_image",
        "sequential_steps": 2,
    }
    assert draw(tmp_path / "plain", *warm[:1], zero, "solver.name=sequential") == 0
    other, _ = made(tmp_path / "plain")
    assert torch.equal(*(pixels(at / "sample.png") for at in (folder, other)))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (ODE, "which samples images: write `picard`"),
        (GUESS, "which guesses noisy images: write `auto`"),
    ],
)
def test_other_tasks_do_not_take_what_samples(setting: str, message: str) -> None:
    path = Path("configs/dreamfusion-toybox.yaml")
    with pytest.raises(ConfigError, match=message):
        build(load(path, [PROMPT, setting])).solver()
    with pytest.raises(ConfigError, match=message):
        split(path, ["backend=threestudio", setting])


def test_two_ranks_draw_the_same(tmp_path: Path, two_ranks: RankPool) -> None:
    alone, shared = tmp_path / "1", tmp_path / "2"
    assert draw(alone) == 0
    assert two_ranks(draw, shared) == [0, 0]
    sheets = []
    for number, to in enumerate((alone, shared), start=1):
        folder, report = made(to)
        assert report["workers"] == number
        sheets.append(pixels(folder / "sample.png"))
    assert torch.equal(*sheets)


def test_batched_asks_its_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert draw(tmp_path, "system.sampler.batched=true") == 0
    record = tmp_path / "sample-toybox" / "calibration.json"
    found = dp.Calibration.load(record)
    assert found.window == 3
    said = capsys.readouterr().out
    assert ("Batched: " if found.gain > 1 else "The sequential run: ") in said


def test_the_strip_shows_what_was_asked_and_accepted() -> None:
    strip = Strip()

    def state(step: int, *values: float) -> dp.SolverState[Any]:
        y, *guesses = [{"x": torch.full((1, 3, 2, 2), v)} for v in values]
        return dp.SolverState(step=step, y=y, carry=None, guesses=guesses)

    def iteration(begin: int, window: int, stride: int) -> dp.Iteration:
        return dp.Iteration(begin, window, stride, (), None, (), {})

    strip(state(1, 0.1, 0.2, 0.3), iteration(0, 3, 1))
    strip(state(3, 0.5, 0.6), iteration(1, 3, 2))
    strip(state(4, 1.0), iteration(3, 1, 1))
    cells, columns = strip.image(4)
    assert columns == 5
    borders = [tuple(round(v, 3) for v in cell[:, 0, 0].tolist()) for cell in cells]
    assert borders == [
        *(EMPTY, ACCEPTED, ACCEPTED, TRIED, EMPTY),
        *(EMPTY, EMPTY, EMPTY, ACCEPTED, ACCEPTED),
    ]
    inside = [float(cells[i, 0, 1, 1]) * 2 - 1 for i in (1, 2, 3, 8, 9)]
    assert inside == pytest.approx([0.1, 0.2, 0.3, 0.5, 1.0], abs=1e-6)


@pytest.mark.parametrize(
    "window", ["auto", "{name: adaptive, smallest: 2, largest: 4}"]
)
@pytest.mark.parametrize("name", ["piadm-ode", "speculative"])
def test_blocks_have_a_fixed_size(name: str, window: str) -> None:
    with pytest.raises(ConfigError, match=r"write `window\.name=sliding"):
        load(CONFIG, [f"solver.name={name}", f"solver.window={window}"])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["solver.window.size=0"], "`size` is 0: write a whole number, at least 1"),
        (["system.sampler.num_inference_steps=0"], "is 0: write 1 or more"),
        (["system.sampler.scheduler=euler"], "write ddim or ddpm or dpm++"),
        (["system.sampler.shape=round"], "There is no setting `system.sampler.shape`"),
        (["system.prompt_processor.prompt=a red dragon"], "does not know `dragon`"),
        (["system_type=dreamfusion-system"], "`--sample` does not run"),
        (["resume=outputs"], "There is nothing to resume at `outputs`"),
        (
            ["dispatch.num_workers=2", "system.sampler.batched=true"],
            "choose one",
        ),
        (
            ["system.sampler.scheduler=dpm++", "system.sampler.form=published"],
            "is a multistep method",
        ),
        # Settings that the solver would ignore.
        ([ODE, "system.sampler.eta=1"], "an ODE has no noise: write `system.sampler"),
        ([LAW], "draws its steps: write `system.sampler.eta=1`"),
        ([ODE, "system.sampler.form=published"], "whose drift is an increment"),
        ([LAW, "system.sampler.form=published"], "whose drift is an increment"),
        ([LAW, SDE[1], "system.sampler.batched=true"], "write `solver.name=picard`"),
        (["solver.name=sequential", "system.sampler.batched=true"], "has no effect"),
        ([*SDE, "solver.non_finite=skip"], "`non_finite` has no effect on `piadm-sde`"),
        ([ODE, "solver.threshold.value=0"], "`threshold` has no effect on `piadm-ode`"),
        ([ODE, "solver.acceleration.name=anderson"], "`acceleration` has no effect on"),
        ([LAW, "solver.depth=4"], "`depth` has no effect on `speculative`"),
        (["solver.depth=4"], "`depth` has no effect on `picard`: leave it out, or"),
        ([GUESS, "system.sampler.form=published"], "is an increment: leave one of"),
        ([GUESS, FIRST, "system.sampler.batched=true"], "begins without one"),
    ],
)
def test_a_mistake_is_a_sentence(
    overrides: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert draw(tmp_path, *overrides) == 2
    assert message in capsys.readouterr().err
