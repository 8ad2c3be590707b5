"""Camera paths: keys are met, frames lie between them, and files are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import imageio_ffmpeg
import numpy as np
import pytest
import torch

import launch
from systems.runs.paths import interpolate, read_path
from systems.scene.cameras import RandomCameras
from systems.settings.reader import ConfigError
from tests.systems.scenes import SMALL, TOYBOX

DEFAULT = RandomCameras(eval_height=16, eval_width=24, eval_fovy_deg=40.0)
KEYS = [
    {"position": [2.0, 0.0, 1.0]},
    {"position": [0.0, 0.0, 3.0], "up": [1, 0, 0], "fov": 60, "time": 2},
    {"position": [-1.0, 2.0, -0.5], "look_at": [0.1, 0.2, 0.3], "time": 3},
]


def written(folder: Path, content: Any) -> Path:
    path = folder / "path.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_keys_are_met_by_position_direction_and_field_of_view(tmp_path: Path) -> None:
    found = read_path(written(tmp_path, {"frames": 7, "cameras": KEYS}), DEFAULT)
    assert (found.views.height, found.views.width, found.fps) == (16, 24, 30)
    position, right, up, forward = found.views.cameras.axes()
    for frame, key in ((0, KEYS[0]), (4, KEYS[1]), (6, KEYS[2])):
        place = torch.tensor(key["position"])
        target = torch.tensor(key.get("look_at", [0.0, 0.0, 0.0]))
        torch.testing.assert_close(position[frame], place, atol=1e-5, rtol=0)
        towards = torch.nn.functional.normalize(target - place, dim=0)
        torch.testing.assert_close(forward[frame], towards, atol=1e-5, rtol=0)
        wanted = torch.tensor(key.get("up", [0.0, 0.0, 1.0])).float()
        # Up in the image is the part of `up` across the direction of view.
        across = wanted - (wanted @ towards) * towards
        cosine = up[frame] @ torch.nn.functional.normalize(across, dim=0)
        assert float(cosine) == pytest.approx(1, abs=1e-4)
        assert abs(float(right[frame] @ wanted)) < 1e-4
    assert found.views.cameras.fov[[0, 4, 6]].tolist() == [40, 60, 40]


def test_a_spline_through_points_of_a_line_is_the_line() -> None:
    values = np.array([[0.0], [1.0], [3.0]])
    rows = interpolate(values, np.array([0.0, 1.0, 3.0]), 7, closed=False)
    assert rows[:, 0] == pytest.approx(np.linspace(0, 3, 7))


def test_a_closed_path_goes_round_evenly_and_ends_before_its_start() -> None:
    angle = np.arange(8) / 8 * 2 * np.pi
    circle = np.stack([np.cos(angle), np.sin(angle)], -1)
    rows = interpolate(circle, np.arange(8.0), 40, closed=True)
    assert np.linalg.norm(rows, axis=1) == pytest.approx(1, abs=0.02)
    steps = np.linalg.norm(np.roll(rows, -1, 0) - rows, axis=1)
    assert steps.max() / steps.min() < 1.2
    assert rows[0] == pytest.approx([1, 0])


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        (" " * (2**24 + 1), "more than 16 MiB"),
        ({"cameras": [{"position": [1, 2, 10**400]}]}, r"numbers up to 1e.06"),
        ({"cameras": KEYS, "frames": 10**12}, "write a number from 1 to 100000"),
        ({"cameras": KEYS, "fps": 10**400}, "`fps` is 10000"),
        ([], "must hold"),
        ({"cameras": []}, r"has no cameras: write"),
        ({"camera": KEYS}, "There is no `camera` in .*Known here: width"),
        ({"cameras": [{"look_at": [0, 0, 0]}]}, "camera 0 has no `position`"),
        ({"cameras": [{"position": [1, 2]}]}, r"`position` of camera 0 .*\[x, y, z\]"),
        ({"cameras": [{"position": [1, 2, "a"]}]}, r"write `\[x, y, z\]`"),
        ({"cameras": [{"position": [0, 0, 2]}]}, "along its `up` direction"),
        ({"cameras": [{"position": [0, 0, 0]}]}, "at its own position"),
        ({"cameras": [*KEYS, KEYS[0]]}, "write rising numbers"),
        ({"cameras": KEYS, "fps": "fast"}, "`fps` is 'fast': write a number"),
        ({"cameras": KEYS, "frames": 0}, "`frames` is 0: write a number from 1"),
        ({"cameras": KEYS, "width": 15}, "videos need even ones"),
        ({"cameras": KEYS, "closed": 1}, "`closed` is 1: write true or false"),
        ({"cameras": [{**KEYS[0], "fov": 200}]}, "`fov` is 200: write a number from 1"),
    ],
)
def test_what_is_no_path_is_refused(content: Any, told: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=told):
        read_path(written(tmp_path, content), DEFAULT)


def test_the_front_door_films_a_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [*SMALL, f"exp_root_dir={tmp_path / 'out'}", "trainer.max_steps=1"]
    assert launch.main(["--config", TOYBOX, "--train", *words]) == 0
    (run,) = (tmp_path / "out" / "dreamfusion-toybox").iterdir()
    path = written(tmp_path, {"frames": 3, "width": 32, "cameras": KEYS[:2]})
    assert launch.main(["--render", f"resume={run}", f"cameras={path}"]) == 0
    count, seconds = imageio_ffmpeg.count_frames_and_secs(str(run / "path.mp4"))
    assert count == 3
    assert seconds == pytest.approx(0.1, abs=0.02)
    for words, told in (
        ([f"resume={run}"], "cameras=path.json"),
        ([f"resume={run}", "cameras=nowhere.json"], "nowhere.json` cannot be read"),
    ):
        assert launch.main(["--render", *words]) == 2
        assert told in capsys.readouterr().err
