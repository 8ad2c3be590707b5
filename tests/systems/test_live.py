"""The live viewer: what it reads from a run's folder, and its page in a browser."""

from __future__ import annotations

import contextlib
import io
import json
import math
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from tqdm import tqdm

import launch
from systems.runs import recorder
from systems.runs.live import beside, reading
from systems.runs.live.address import Address
from systems.runs.live.page import Page
from systems.runs.stopping import Stop, forget
from systems.scene.gaussians import ply
from systems.settings.reader import ConfigError
from tests.systems.scenes import SMALL, TOYBOX

ROOT = Path(__file__).parent.parent.parent
FEW = (*SMALL, "trainer.max_steps=12", "checkpoint.every_n_train_steps=4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run; look at it, do not change it."""
    out = tmp_path_factory.mktemp("live")
    words = [*FEW, f"exp_root_dir={out}", "dispatch.threads=1", "checkpoint.keep=5"]
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        assert launch.main(["--config", TOYBOX, "--train", *words]) == 0
    (folder,) = out.glob("*/*@*")
    return folder


def test_curves_are_those_of_the_metrics(finished: Path) -> None:
    report = json.loads((finished / "report.json").read_text())
    drawn = reading.curves(finished)
    assert drawn["stride"].tolist() == report["strides"]
    assert drawn["step"].tolist() == np.cumsum(report["strides"]).tolist()
    assert drawn["window"].max() == 8
    text = reading.status(finished, drawn, 12)
    assert f"**Step 12 of 12**, {report['iterations']} iterations" in text
    assert "Finished." in text


def test_a_terminal_is_told_stride_and_quality(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = io.StringIO()

    def bar(**options: Any) -> Any:
        return tqdm(**{**options, "disable": False, "file": said, "mininterval": 0})

    monkeypatch.setattr(recorder, "tqdm", bar)
    words = [*FEW, f"exp_root_dir={tmp_path}", "trainer.val_check_interval=4"]
    assert launch.main(["--config", TOYBOX, "--train", *words]) == 0
    pattern = r"stride \d/8, [\d.]+x fewer iterations, PSNR ([\d.]+) dB"
    told = re.findall(pattern, said.getvalue())
    psnr = json.loads((finished / "report.json").read_text())["quality"]["psnr"]
    assert float(told[-1]) == pytest.approx(psnr, abs=1.5)  # fewer views


def test_frames_are_those_of_the_checkpoint(finished: Path) -> None:
    steps = list(reading.checkpoints(finished))
    assert steps[-1] == 12
    assert len(steps) > 1
    renders = reading.Renders(finished)
    first, last = renders.frames(steps[0]), renders.frames(12)
    assert len(last) == reading.FRAMES
    assert last[0].shape == (16, 16, 3)
    assert not np.array_equal(first[0], last[0])
    again = reading.Renders(finished).frames(12)
    assert all(map(np.array_equal, last, again))
    with pytest.raises(ValueError, match="has been removed"):
        renders.frames(5)
    for step in (steps[0], 12):
        mesh: Any = trimesh.load(io.BytesIO(renders.mesh(step)), "glb", force="mesh")
        assert len(mesh.faces) > 100


def test_covariances_are_those_of_the_axes(tmp_path: Path) -> None:
    half = 0.5**0.5
    state = {
        "means": torch.tensor([[1.0, 2.0, 3.0]]),
        "sh0": torch.zeros(1, 1, 3),
        "opacities": torch.zeros(1),
        "scales": torch.tensor([[3.0, 2.0, 1.0]]).log(),
        "quats": torch.tensor([[half, 0.0, 0.0, half]]),  # x to y, y to -x
    }
    ply.save(tmp_path / "splats.ply", state)
    found = reading.splats(tmp_path / "splats.ply")
    np.testing.assert_allclose(
        found["covariances"][0], np.diag([4.0, 9.0, 1.0]), atol=1e-5
    )
    np.testing.assert_allclose(found["rgbs"], 0.5)
    np.testing.assert_allclose(found["opacities"], 0.5)
    np.testing.assert_allclose(found["centers"], [[1, 2, 3]])


def test_a_run_in_progress_and_half_written_files(
    finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copy(finished / "config.yaml", folder)
    assert reading.open_folder(str(folder)) == folder
    assert reading.checkpoints(folder) == {}
    assert "No iteration" in reading.status(folder, reading.curves(folder), 12)
    whole = (finished / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole)
    text = reading.status(folder, reading.curves(folder), 12)
    assert "the results are being written" in text
    (folder / "metrics.jsonl").write_text(whole[: len(whole) // 2])
    drawn = reading.curves(folder)
    assert 0 < len(drawn["step"]) < len(reading.curves(finished)["step"])
    text = reading.status(folder, drawn, 12)
    assert f"python launch.py --train resume={folder}" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "There is no run at `nowhere`. Name a run folder"),
        (["."], "`.` has no `config.yaml`: it is no run folder"),
        ([".", "port=x"], "`port=x` is no port: write `port=8081`"),
        ([".", "speed=3"], "`speed=3` is no setting of `--view`"),
        ([".", "--config", "a.yaml"], "leave out `--config a.yaml`"),
    ],
)
def test_refusals_are_one_sentence(
    words: list[str],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "viser", type(sys)("viser"))
    assert launch.main(["--view", *words]) == 2
    assert said in capsys.readouterr().err


def test_without_viser_it_names_the_extra(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "viser", None)
    with pytest.raises(ConfigError, match=r'pip install -e "\.\[viewer\]"'):
        Page([finished], Address())


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"Port {port} of 127.0.0.1 is taken"):
            Address(port=port).check()


def test_a_pause_waits_until_it_is_over_or_a_stop_is_asked_for(tmp_path: Path) -> None:
    stop, pause = tmp_path / "stop", tmp_path / "pause"
    listener = Stop([stop])
    for ending in (pause.unlink, stop.touch):
        pause.touch()
        threading.Timer(0.5, ending).start()
        begin = time.monotonic()
        listener.wait()
        assert time.monotonic() - begin > 0.4
    assert listener.asked()
    pause.touch()
    Stop([stop], patience=0.3).wait()  # other ranks wait no longer
    assert not pause.exists()
    stop.touch()
    pause.touch()
    forget(tmp_path)  # an earlier run's
    with Stop([stop]).listening() as now:
        assert not now.asked()
        assert not pause.exists()
    stop.touch()
    with Stop([stop]).listening() as now:  # asked for while ranks started
        assert now.asked()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def test_a_viewer_that_cannot_be_served_does_not_end_the_run(
    finished: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        with beside.page(finished, other.getsockname()[1]):
            pass
    assert "note: No live viewer. Port" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    with beside.page(finished, free_port()):
        pass
    assert "note: No live viewer. it needs viser" in capsys.readouterr().err


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("viser", reason='`pip install -e ".[viewer]"`')
    folder = tmp_path_factory.mktemp("shown") / finished.name
    shutil.copytree(finished, folder)
    shown = Page([folder, finished], Address(port=free_port()))
    yield shown
    shown.close()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_run_serves_its_own_page_while_it_lasts(tmp_path: Path) -> None:
    pytest.importorskip("viser", reason='`pip install -e ".[viewer]"`')
    port = free_port()
    words = [*FEW, f"exp_root_dir={tmp_path}", "viewer=true", f"viewer_port={port}"]
    command = [sys.executable, "launch.py", "--config", TOYBOX, "--train", *words]
    run = subprocess.Popen([*command, "trainer.max_steps=4000"], cwd=ROOT)
    try:
        address, content = f"http://127.0.0.1:{port}", b""
        for _ in range(600):
            with contextlib.suppress(OSError), urllib.request.urlopen(address) as seen:
                content = seen.read()
                break
            assert run.poll() is None
            time.sleep(0.1)
        assert b"<html" in content
        run.send_signal(signal.SIGTERM)
        assert run.wait(60) == 128 + signal.SIGTERM
    finally:
        run.kill()
    with pytest.raises(OSError, match="refused"):
        urllib.request.urlopen(address)


def test_cameras_of_the_page_make_a_film(page: Any) -> None:
    around = SimpleNamespace(look_at=(0, 0, 0), up_direction=(0, 0, 1), fov=0.9)
    for x, y in ((2.4, 0.0), (0.0, 2.4)):
        page.film.add(SimpleNamespace(**vars(around), position=(x, y, 0.5)))
    content = json.loads(page.film.path.read_text())
    assert [camera["position"][0] for camera in content["cameras"]] == [2.4, 0.0]
    assert content["cameras"][0]["fov"] == pytest.approx(math.degrees(0.9), abs=0.01)
    content["frames"] = 3
    page.film.path.write_text(json.dumps(content))
    page.film.render()
    assert page.film.path.with_suffix(".mp4").stat().st_size > 500
    page.film.clear()


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_shows_the_runs_side_by_side(page: Any, chromium: Any) -> None:
    view = chromium.new_page(viewport={"width": 1200, "height": 900})
    asked: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.goto(f"http://127.0.0.1:{page.server.get_port()}")
    view.get_by_text("Step 12 of 12").first.wait_for(timeout=60_000)
    view.get_by_role("button", name="Stop and save").first.wait_for()
    view.get_by_text("Step 12 | Step 12").wait_for(timeout=60_000)
    assert view.locator("img").first.is_visible()
    assert view.locator("canvas").count() >= 3  # the scene and two plots
    home = (f"http://127.0.0.1:{page.server.get_port()}", "data:", "blob:")
    assert [url for url in asked if not url.startswith(home)] == []
    view.close()
    # The run goes on: a page opened now follows it.
    (page.folder / "report.json").unlink()
    lines = (page.folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if '"iteration"' in line][:2]
    (page.folder / "metrics.jsonl").write_text("".join(kept))
    page.refresh()
    view = chromium.new_page()
    view.goto(f"http://127.0.0.1:{page.server.get_port()}")
    view.get_by_text("Resume, once it has ended").wait_for(timeout=60_000)
    view.get_by_role("button", name="Pause").first.click()
    view.get_by_text("The run waits after this iteration").wait_for()
    assert (page.folder / "pause").exists()
    view.get_by_role("button", name="Continue").first.click()
    view.get_by_text("The run goes on").wait_for()
    assert not (page.folder / "pause").exists()
    view.get_by_role("button", name="Stop and save").first.click()
    view.get_by_text("The run stops after this iteration").wait_for()
    assert (page.folder / "stop").exists()
    view.close()
