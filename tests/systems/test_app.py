"""The page to try the workspace: what it starts, shows and refuses."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

import launch
from systems.runs.app import jobs, page
from systems.runs.app.jobs import SPEEDS, SYSTEMS, Job
from systems.settings.config import load
from tests.systems.scenes import SMALL

ROOT = Path(__file__).parent.parent.parent
FIRST = next(iter(SYSTEMS))


@pytest.mark.parametrize("speed", SPEEDS)
@pytest.mark.parametrize("system", [s for s in SYSTEMS if "stages" not in s])
def test_what_the_page_offers_can_be_run(system: str, speed: str) -> None:
    subject = jobs.by_prompt("a red mushroom")
    if system in jobs.FROM_IMAGE:
        subject = ["data.image=a.png", "data.default_elevation_deg=20"]
    config = load(
        ROOT / "configs" / f"{SYSTEMS[system]}.yaml", [*subject, *SPEEDS[speed]]
    )
    assert config.problems == ()


@pytest.mark.parametrize("prompt", ["a mug", 'a "red" mug: [1, {b}] #2', "ß\\ =x,"])
def test_any_prompt_is_one_value(prompt: str) -> None:
    assert yaml.safe_load(jobs._quoted(prompt)) == prompt


def test_an_image_is_kept_and_named(tmp_path: Path) -> None:
    image = tmp_path / 'a "mug" #1.png'
    image.write_bytes(b"one")
    first = jobs.by_image(tmp_path, image, 20.0)
    assert jobs.by_image(tmp_path, image, 20.0) == first
    image.write_bytes(b"two")
    assert jobs.by_image(tmp_path, image, 20.0) != first
    kept = Path(yaml.safe_load(first[0].partition("=")[2]))
    assert kept.read_bytes() == b"one"
    assert first[1] == "data.default_elevation_deg=20"


@pytest.mark.parametrize(
    ("prompt", "image", "system", "said"),
    [
        ("", None, FIRST, "Say what to make"),
        ("a mug", "a.png", FIRST, "starts from a prompt"),
        ("a mug", None, "Zero-1-to-3, from an image", "needs an image"),
        ("a mug", None, FIRST, ""),
        ("", "a.png", "Zero-1-to-3, from an image", ""),
    ],
)
def test_prompt_or_image_as_the_system_needs(
    prompt: str, image: str | None, system: str, said: str
) -> None:
    found = page._wrong(prompt, image, system)
    assert said in found
    assert bool(said) == bool(found)


@pytest.mark.long
def test_a_run_is_started_described_and_stopped(tmp_path: Path) -> None:
    small = [s for s in SMALL if "max_steps" not in s]
    subject = jobs.by_prompt("a red mushroom")
    job = Job.start(tmp_path, subject, FIRST, "the default", 4000, small)
    try:
        for _ in range(1200):
            folder = job.folder
            if folder and "iterations" in jobs.describe(folder):
                break
            assert job.process.poll() is None, job.said()
            time.sleep(0.1)
        assert job.folder is not None
        assert "step" in jobs.describe(job.folder)
        job.stop()
        assert job.process.wait(200) == 128 + signal.SIGINT
    finally:
        job.process.kill()
    assert "Look into" in job.said()
    names = {Path(path).name for path in jobs.downloads(job.folder)}
    assert names == {"mesh.glb", "mesh.obj", "turntable.mp4", "viewer.html"}
    assert list(jobs.past(tmp_path)) == [job.folder]
    assert "PSNR" in jobs.describe(job.folder)


def test_the_last_stage_is_shown(tmp_path: Path) -> None:
    run = tmp_path / "magic3d-toybox" / "a@1"
    for name in ("coarse", "refine"):
        (run / name).mkdir(parents=True)
        (run / name / "config.yaml").touch()
        (run / name / "preview.png").write_text(name)
        time.sleep(0.02)
    assert jobs.current(run) == run / "refine"
    assert Path(str(jobs.shown(run, "preview.png"))).read_text() == "refine"
    assert list(jobs.past(tmp_path)) == [run]
    assert jobs.describe(run) == "stage refine"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["speed=3"], "`speed=3` is no setting of `--app`"),
        (["port=0"], "`port=0` is no port"),
        (["--config", "a.yaml"], "leave out `--config a.yaml`"),
    ],
)
def test_refusals_are_one_sentence(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert launch.main(["--app", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_gradio_it_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    assert launch.main(["--app"]) == 2
    assert 'pip install -e ".[app]"' in capsys.readouterr().err


@pytest.mark.browser
def test_the_page_makes_an_object(tmp_path: Path, chromium: Any) -> None:
    pytest.importorskip("gradio", reason='`pip install -e ".[app]"`')
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [f"port={port}", f"exp_root_dir={tmp_path}"]
    server = subprocess.Popen([sys.executable, "launch.py", "--app", *words], cwd=ROOT)
    try:
        for _ in range(600):
            with socket.socket() as trial:
                if trial.connect_ex(("127.0.0.1", port)) == 0:
                    break
            assert server.poll() is None
            time.sleep(0.1)
        view = chromium.new_page(viewport={"width": 1200, "height": 900})
        asked: list[str] = []
        view.on("request", lambda request: asked.append(request.url))
        view.goto(f"http://127.0.0.1:{port}")
        view.get_by_label("Prompt").fill(" ")
        view.get_by_role("button", name="Make it").click()
        view.get_by_text("Say what to make").wait_for(timeout=60_000)
        view.get_by_label("Prompt").fill("a red pineapple")
        view.get_by_role("button", name="Make it").click()
        view.get_by_text("does not know").first.wait_for(timeout=120_000)
        view.get_by_text("ended after").wait_for()  # until then, clicks are ignored
        view.get_by_label("Prompt").fill("a red mushroom")
        view.get_by_label("Steps").fill("3")
        view.get_by_role("button", name="Make it").click()
        view.get_by_text("PSNR").wait_for(timeout=300_000)
        view.get_by_text("turntable").wait_for()
        view.reload()
        view.locator("button[aria-label^=Thumbnail]").first.click()
        view.get_by_text("step 3 in").wait_for()
        home = (f"http://127.0.0.1:{port}", "data:", "blob:")
        assert [url for url in asked if not url.startswith(home)] == []
        view.close()
    finally:
        server.terminate()
        server.wait()
