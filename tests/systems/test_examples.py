"""Every example runs, made small."""

from __future__ import annotations

import base64
import json
import os
import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
EXAMPLES = ROOT / "examples"
RIVALS = ("--steps", "8", "--window", "4", "--seeds", "0", "--rates", "1")


def test_a_wrapped_loop_keeps_its_loss() -> None:
    from examples.wrap_a_loop import main

    found = main(num_steps=120)
    assert found["window"] == pytest.approx(found["sequential"], rel=0.05)


def test_a_lightning_module_keeps_its_accuracy() -> None:
    pytest.importorskip("lightning")
    from examples.lightning_module import main

    found = main(num_steps=80, window=4)
    assert found["window"] == pytest.approx(found["sequential"], abs=0.1)


def test_a_pipeline_and_its_parallel_sample_agree(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    import numpy as np

    from examples.diffusers_sampling import main

    words = ["--steps", "4", "--window", "2", "--tolerance", "0"]
    found = main(["a blue mug", *words, "--out", str(tmp_path)])
    assert np.array_equal(np.asarray(found["own"]), np.asarray(found["ours"]))
    assert (tmp_path / "diffusers_sampling.png").is_file()


def test_threestudio_says_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    from examples.threestudio_system import main

    monkeypatch.delenv("THREESTUDIO_ROOT", raising=False)
    assert main([]) == 0
    assert "Skipped: threestudio is not here" in capsys.readouterr().out
    monkeypatch.setenv("THREESTUDIO_ROOT", str(tmp_path))
    assert main([]) == 0
    assert "holds no folder `threestudio`" in capsys.readouterr().out


@pytest.mark.long
def test_threestudio_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    from examples.threestudio_system import main, why_not

    reason = why_not(os.environ.get("THREESTUDIO_ROOT"))
    if reason:
        pytest.skip(reason)
    monkeypatch.chdir(ROOT)
    assert main(["a pineapple", "trainer.max_steps=3"]) == 0


@pytest.mark.parametrize("name", ["digits", "characters"])
def test_rivals_are_compared_beyond_3d(name: str) -> None:
    pytest.importorskip("sklearn")
    text = runpy.run_module(f"examples.{name}")["run"](RIVALS)
    rows = [
        [cell.strip() for cell in line.split("|")[1:-1]] for line in text.split("\n")
    ][2:]
    by_name = {row[0]: row[1:] for row in rows}
    assert len(by_name) == 6
    assert by_name["sequential"][:3] == ["8", "1.0×", "8"]
    iterations, speedup, gradients, *_ = by_name[
        "4× batch, 1/4 of the steps, learning rate ×1"
    ]
    assert (iterations, speedup, gradients) == ("2", "4.0×", "8")
    assert int(by_name["window, defaults"][0]) <= 8
    for row in by_name.values():
        assert re.fullmatch(r"[\d.]+ to [\d.]+", row[-1])


def test_the_notebook_is_that_of_its_cells_and_executed() -> None:
    pytest.importorskip("nbformat")
    from examples.make_notebook import NOTEBOOK, build

    written = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    steps = re.search(r"max_steps=(\d+)", NOTEBOOK.read_text(encoding="utf-8"))
    assert steps is not None
    cells = build(int(steps[1])).cells
    assert ["".join(cell["source"]) for cell in written["cells"]] == [
        cell.source for cell in cells
    ]
    outputs = [o for cell in written["cells"] for o in cell.get("outputs", [])]
    assert not [o for o in outputs if o["output_type"] == "error"]
    images = [
        o["data"]["image/png"] for o in outputs if "image/png" in o.get("data", {})
    ]
    assert len(images) == 2
    assert all(base64.b64decode(image).startswith(b"\x89PNG") for image in images)
    for place in (ROOT, Path.home()):  # no path of the machine that made it
        assert f"{place}/" not in NOTEBOOK.read_text(encoding="utf-8")


@pytest.mark.long
def test_the_notebook_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("nbclient")
    from examples.make_notebook import build, execute

    done = execute(build(8), ROOT)
    text = json.dumps(done)
    assert "8 steps in" in text
    assert "mesh.glb" in text
