"""The live viewer: what it reads from a run's folder, and its page in a browser."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import launch
from systems.runs import live
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
    drawn = live.curves(finished)
    assert drawn["stride"].tolist() == report["strides"]
    assert drawn["step"].tolist() == np.cumsum(report["strides"]).tolist()
    assert drawn["window"].max() == 8
    text = live.status(finished, drawn, 12)
    assert f"**Step 12 of 12**, {report['iterations']} iterations" in text
    assert "Finished." in text


def test_frames_are_those_of_the_checkpoint(finished: Path) -> None:
    steps = list(live.checkpoints(finished))
    assert steps[-1] == 12
    assert len(steps) > 1
    renders = live.Renders(finished)
    first, last = renders.frames(steps[0]), renders.frames(12)
    assert len(last) == live.FRAMES
    assert last[0].shape == (16, 16, 3)
    assert not np.array_equal(first[0], last[0])
    again = live.Renders(finished).frames(12)
    assert all(map(np.array_equal, last, again))
    with pytest.raises(ValueError, match="has been removed"):
        renders.frames(5)


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
    found = live.splats(tmp_path / "splats.ply")
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
    assert live.open_folder(str(folder)) == folder
    assert live.checkpoints(folder) == {}
    assert "No iteration" in live.status(folder, live.curves(folder), 12)
    whole = (finished / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(whole)
    text = live.status(folder, live.curves(folder), 12)
    assert "the results are being written" in text
    (folder / "metrics.jsonl").write_text(whole[: len(whole) // 2])
    drawn = live.curves(folder)
    assert 0 < len(drawn["step"]) < len(live.curves(finished)["step"])
    text = live.status(folder, drawn, 12)
    assert f"python launch.py --train resume={folder}" in text


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["nowhere"], "There is no run at `nowhere`. Name a run folder"),
        (["."], "`.` has no `config.yaml`: it is no run folder"),
        ([".", "port=x"], "`port=x` is no port: write `port=8081`"),
        ([".", "speed=3"], "`speed=3` is no setting of `--view`"),
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
        live.Page(finished, live.Address())


def test_a_port_that_is_taken_is_named() -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=rf"Port {port} of 127.0.0.1 is taken"):
            live.Address(port=port).check()


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    pytest.importorskip("viser", reason='`pip install -e ".[viewer]"`')
    folder = tmp_path_factory.mktemp("shown") / finished.name
    shutil.copytree(finished, folder)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shown = live.Page(folder, live.Address(port=port))
    yield shown
    shown.close()


@pytest.mark.browser
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_page_shows_the_run(page: Any, chromium: Any) -> None:
    view = chromium.new_page(viewport={"width": 1200, "height": 900})
    asked: list[str] = []
    view.on("request", lambda request: asked.append(request.url))
    view.goto(f"http://127.0.0.1:{page.server.get_port()}")
    view.get_by_text("Step 12 of 12").wait_for(timeout=60_000)
    view.get_by_text("Stop and save").wait_for()
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
    view.get_by_role("button", name="Stop and save").click()
    view.get_by_text("The run stops after this iteration").wait_for()
    assert (page.folder / "stop").exists()
    view.close()
