"""The comparison: its figures are right, and the page opens in a real browser."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import launch
from systems.runs import compare
from systems.runs.report import figures
from systems.runs.report.runs import open_run, quality_over_time, system_of
from tests.systems.scenes import SMALL, TOYBOX, small

ROOT = Path(__file__).parent.parent.parent
RATES = (1.0, 2.0)
"""Fewer than in earnest."""
FEW = (*SMALL, "trainer.max_steps=12", "trainer.val_check_interval=50")


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A comparison with rivals."""
    out = tmp_path_factory.mktemp("compare")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setattr(compare, "RATES", RATES)
        code = launch.main(
            [
                *("--config", TOYBOX, "--compare", "rivals", *FEW),
                *(f"exp_root_dir={out}", "dispatch.threads=1"),
            ]
        )
    assert code == 0
    (found,) = out.glob("*/*-compare@*/report.html")
    return found


@pytest.fixture(scope="module")
def comparison(page: Path) -> dict[str, Any]:
    return json.loads(page.with_name("report.json").read_text())


def test_runs_differ_in_the_solver_alone(page: Path) -> None:
    folder = page.parent
    runs = {name: open_run(folder / name) for name in ("sequential", "accelerated")}
    plain, fast = (runs[name].config for name in ("sequential", "accelerated"))
    assert plain.solver.name == "sequential"
    assert replace(plain, solver=fast.solver) == fast
    assert open_run(folder / "other-seed").config.seed == plain.seed + 1


def test_figures_agree_with_the_runs(page: Path, comparison: dict[str, Any]) -> None:
    runs = comparison["runs"]
    assert runs["sequential"]["iterations"] == 12 > runs["accelerated"]["iterations"]
    gain = comparison["speed_up"]
    assert gain["iterations"] == 12 / runs["accelerated"]["iterations"]
    seconds = [
        sum(e["seconds"].values())
        for e in open_run(page.parent / "sequential").iterations
    ]
    assert sum(seconds) <= runs["sequential"]["seconds"] + 0.01
    # The accelerated run is nearer to the sequential one than another seed's is.
    apart = comparison["deviation"]
    assert 0 < apart["accelerated"]["relative"] < apart["other seed"]["relative"]
    assert apart["accelerated"]["psnr"] > apart["other seed"]["psnr"]
    found = [runs[name]["quality"]["psnr"] for name in ("sequential", "accelerated")]
    assert comparison["quality_change"]["value"] == round(found[1] - found[0], 3)


def test_rivals_have_the_same_budget(comparison: dict[str, Any]) -> None:
    few, wide = comparison["rivals"]
    iterations = comparison["runs"]["accelerated"]["iterations"]
    assert few["steps"] == wide["steps"] == iterations
    assert few["views"] == 1 < wide["views"] == round(12 / iterations)
    assert all(rival["quality"]["psnr"] > 0 for rival in (few, wide))
    rate = small().config.system["optimizer"]["args"]["lr"]
    for rival in (few, wide):
        least, most = RATES[0] * rate, RATES[-1] * rate
        assert rival["edge"] == (rival["rate"] in (least, most))


def test_quality_over_time_ends_with_the_report(page: Path) -> None:
    run = open_run(page.parent / "accelerated")
    points = quality_over_time(run, system_of(run))
    assert len(points) >= 2
    assert points[-1]["psnr"] == pytest.approx(run.report["quality"]["psnr"], abs=1e-3)
    assert points[-1]["seconds"] == pytest.approx(run.seconds, abs=0.01)


def test_deviation_is_relative_to_the_way_that_was_covered() -> None:
    system = small()
    start, _ = system.trajectory().init()
    moved = {k: v + 1 if v.is_floating_point() else v.clone() for k, v in start.items()}
    found = figures.deviation(system, start, moved)
    assert found["relative"] == pytest.approx(1)
    assert found["bitwise"] == 0
    assert figures.deviation(system, moved, moved)["psnr"] is None


def test_a_state_that_grew_has_images_but_no_distance() -> None:
    system = small()
    start, _ = system.trajectory().init()
    name = next(n for n, v in start.items() if v.is_floating_point())
    grown = {**start, name: torch.cat([start[name], start[name]])}
    whole = system.render
    system.render = lambda y, views, grey=None: whole(start, views, grey)
    found = figures.deviation(system, grown, start)
    assert found == {"psnr": None, "relative": None, "bitwise": 0}


def test_differences_are_those_of_settings_by_name() -> None:
    one = small("solver.name=sequential", "data.batch_size=2")
    other = small("solver.threshold.name=ema", "data.batch_size=3")
    said = compare._differences(one.config, other.config)
    assert said == ["they differ in `data.batch_size`: 2 and 3"]


@pytest.mark.parametrize(
    ("rival", "said"),
    [(21.0, "A rival wins"), (20.1, "A rival draws"), (18.0, "2.0 dB worse")],
)
def test_verdict_says_where_a_rival_wins(rival: float, said: str) -> None:
    def run(psnr: float) -> dict[str, Any]:
        return {"quality": {"psnr": psnr}, "workers": 1}

    gain = {"iterations": 6.0, "wall_clock": 0.5, "device_seconds": 2.0}
    rivals = [
        {"name": "4 steps", "rate": 0.1, "edge": False, **run(rival)},
        {"name": "4 steps", "rate": 0.2, "edge": True, **run(rival)},
    ]
    told = figures.verdict(run(20.5), run(20.0), gain, rivals)
    assert "2.00x slower" in told[0]
    assert "does not pay" in told[0]
    assert "0.5 dB worse than the sequential" in told[1]
    assert said in told[2]
    assert "(learning rate 0.1)" in told[2]
    assert "(learning rate 0.2, the edge of those tried)" in told[3]
    unknown = figures.verdict(
        {"quality": "not measured"}, {"quality": "not measured", "workers": 2}, gain, []
    )
    assert "no claim" in unknown[1]


def test_two_finished_runs(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any order; beside the second."""
    monkeypatch.chdir(ROOT)
    runs = [str(page.parent / name) for name in ("accelerated", "sequential")]
    assert launch.main(["--compare", *runs]) == 0
    reports = sorted(page.parent.parent.glob("*-compare@*/report.json"))
    found = json.loads(reports[-1].read_text())
    assert set(found["runs"]) == {"sequential", "accelerated"}
    assert found["runs"]["sequential"]["solver"] == "sequential"
    shutil.rmtree(reports[-1].parent)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--compare"], "Compare what?"),
        (["--compare", "one"], "Compare what?"),
        (["--compare", "nowhere", "neither"], "nothing to resume"),
        (["--config", TOYBOX, "--compare", "rival"], "Compare what?"),
        (
            ["--config", TOYBOX, "--compare", FEW[0], "solver.name=sequential"],
            "already",
        ),
        (["--config", TOYBOX, "--compare", FEW[0], "resume=x"], "from the start"),
        (["--config", TOYBOX, "--compare", FEW[0], "solver.widow=1"], "window"),
    ],
)
def test_refusals(
    arguments: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    assert launch.main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error
    assert "Traceback" not in error


def test_an_unfinished_run_is_refused(page: Path, tmp_path: Path) -> None:
    torn = tmp_path / "torn"
    shutil.copytree(page.parent / "sequential", torn)
    (torn / "report.json").unlink()
    capture = launch.main(["--compare", str(torn), str(page.parent / "accelerated")])
    assert capture == 2


def test_page_asks_for_nothing_from_outside(page: Path) -> None:
    text = page.read_text()
    links = re.findall(r'(?:src|href)="([^"]{0,40})', text)
    assert links
    assert all(link.startswith(("data:", "#")) for link in links)
    assert not re.search(r"\$[a-z]+\b(?!{)", text)  # every placeholder is filled


def until(view: Any, condition: str) -> None:
    """Wait; the page's own policy forbids what playwright would inject for it."""
    for _ in range(100):
        if view.evaluate(condition):
            return
        view.wait_for_timeout(100)
    raise AssertionError(f"never true: {condition}")


@pytest.mark.browser
@pytest.mark.parametrize(("width", "height"), [(1200, 900), (375, 812)])
def test_page_in_a_browser(page: Path, chromium: Any, width: int, height: int) -> None:
    view = chromium.new_page(viewport={"width": width, "height": height})
    asked: list[str] = []
    said: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.on("console", lambda message: said.append(message.text))
    view.on("pageerror", lambda error: said.append(str(error)))
    view.goto(page.resolve().as_uri())
    until(view, "[...document.querySelectorAll('video')].every(v => v.readyState >= 2)")
    outside = [url for url in asked if not url.startswith(("data:", "file:"))]
    assert outside == []
    assert [url for url in asked if url.startswith("file:")] == [view.url]
    assert said == []
    images = view.evaluate(
        "[...document.querySelectorAll('img')].map(i => i.complete && i.naturalWidth)"
    )
    assert len(images) == 3
    assert all(images)
    curves = view.evaluate(
        "[...document.querySelectorAll('#curves svg')].map(s => "
        "[s.getBoundingClientRect().width, s.querySelectorAll('path').length])"
    )
    assert len(curves) == 5
    assert all(wide > 200 and paths > 5 for wide, paths in curves)
    # Readable on a phone: nothing sticks out, text is not tiny.
    inner, outer = view.evaluate("[document.documentElement.scrollWidth, innerWidth]")
    assert inner <= outer
    ends = view.evaluate(
        "[...document.querySelectorAll('td')].map(c => c.getBoundingClientRect().right)"
    )
    assert len(ends) > 20
    assert max(ends) <= outer  # no column is hidden
    button = view.get_by_role("button")
    button.scroll_into_view_if_needed()
    paused = "document.querySelector('video').paused"
    view.evaluate("document.querySelectorAll('video').forEach(v => v.pause())")
    for now, word in ((f"!{paused}", "Pause"), (paused, "Play")):
        button.click()
        until(view, now)
        until(view, f"document.querySelector('button').innerText == '{word}'")
    view.close()
