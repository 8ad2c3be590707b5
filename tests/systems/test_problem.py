"""A system with a state of its own kind goes through the front door's one path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import launch
import systems
from dreampropeller import checkpoint
from tests.helpers import tree_equal

CONFIG = """
name: balls
exp_root_dir: {out}
system_type: balls
system: {{growth: 4}}
data: {{eval_height: 16, eval_width: 16, n_test_views: 2, height: 16, width: 16}}
trainer: {{max_steps: 10, val_check_interval: 5}}
solver: {{window: {{size: 3}}, threshold: {{name: fixed, value: 0}}}}
checkpoint: {{every_n_train_steps: 2}}
"""


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    kind = "tests.systems.balls.Balls"
    monkeypatch.setattr(systems, "PROBLEMS", {**systems.PROBLEMS, "balls": kind})
    path = tmp_path / "balls.yaml"
    path.write_text(CONFIG.format(out=tmp_path / "out"))
    return path


def test_train_stop_resume_look_and_compare(config: Path) -> None:
    out = config.parent / "out" / "balls"
    assert launch.main(["--config", str(config), "--train", "tag=whole"]) == 0
    (whole,) = out.glob("whole@*")
    end = checkpoint.load(whole / "ckpts")
    assert (end.step, len(end.y["balls"])) == (10, 2)
    report = json.loads((whole / "report.json").read_text())
    assert report["title"] == "a red sphere"
    assert report["quality"]["psnr"] > 15
    assert {p.name for p in whole.iterdir()} >= {"turntable.mp4", "mesh.glb"}

    stop = config.parent / "stop"
    stopped = ["--config", str(config), "--train", "tag=stopped"]
    # The trajectory makes the file once the run's own folder is known.
    assert launch.main([*stopped, "trainer.max_steps=4"]) == 0
    (part,) = out.glob("stopped@*")
    assert checkpoint.load(part / "ckpts").step == 4
    stop = part / "stop"
    again = ["--config", str(config), "--train", f"resume={part}"]
    assert launch.main([*again, f"system.stop={stop}"]) == 130  # as by Ctrl-C
    assert 4 < checkpoint.load(part / "ckpts").step < 10
    assert launch.main(again) == 0
    assert tree_equal(checkpoint.load(part / "ckpts").y, end.y)

    assert launch.main(["--test", f"resume={part}"]) == 0
    assert launch.main(["--export", f"resume={part}"]) == 0
    assert launch.main(["--compare", str(whole), str(part)]) == 0
    (page,) = out.glob("*-compare@*/report.html")
    assert "a red sphere" in page.read_text()
