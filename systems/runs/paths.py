r"""`--render`: a video of a run's object along a free camera path.

A path is a JSON file:

    {"width": 512, "height": 512, "fps": 30, "frames": 120, "closed": true,
     "cameras": [{"position": [2.4, 0, 0.8], "look_at": [0, 0, 0], "up": [0, 0, 1],
                  "fov": 50, "time": 0}, …]}

Only `cameras`, and in it `position`, must be given; the numbers above are the defaults
of the others (size and field of view: those of the turntable). The frame of the scene
has z up and its front towards +x. Cameras are keys, at rising `time` (default:
0, 1, 2, …). Between two keys position and point looked at follow a Catmull-Rom spline,

$$p(s) = h_{00} p_0 + h_{10} m_0 + h_{01} p_1 + h_{11} m_1,$$

with the cubic Hermite basis h in s from 0 to 1 and slopes m from the neighbouring keys;
the field of view and the upward direction are interpolated likewise. One camera is one
frame; a `closed` path returns to its first key.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm import tqdm

from systems import build
from systems.images import check_ffmpeg, save_video
from systems.runs import folders
from systems.scene.cameras import Cameras, RandomCameras, Views
from systems.settings.reader import ConfigError

OPTION = "cameras="
"""Prefix of the word of the command line that names the path."""
_KNOWN = ("width", "height", "fps", "frames", "closed", "cameras")
_KEYS = ("position", "look_at", "up", "fov", "time")
_LIMIT = 8192
_MOST_FRAMES = 100_000
_FARTHEST = 1e6
"""Bound of a camera's coordinates."""
_LARGEST = 2**24
"""Bytes of a file that is read."""


@dataclass(frozen=True)
class CameraPath:
    """A camera path.

    Attributes:
        views: The frames.
        fps: Frames per second.
    """

    views: Views
    fps: float


def run(file: Path | None, words: Sequence[str]) -> int:
    """Render a run along a path; returns the exit code.

    Args:
        file: A config, or None: that of the run.
        words: `resume=RUN`, `cameras=PATH` and settings.

    Raises:
        ConfigError: There is no such run, or the path cannot be used.
    """
    path, overrides = split(words)
    config = folders.load_config(file, overrides)
    system = build(config)
    wanted = read_path(path, system.cameras)
    check_ffmpeg()
    state = folders.load_own_state(system)
    target = folders.folder_of(str(config.resume)) / f"{path.stem}.mp4"
    count = len(wanted.views.cameras)

    def frames() -> Iterator[Float[Tensor, "3 height width"]]:
        for index in tqdm(range(count), desc=path.stem, unit="frame", leave=False):
            yield system.render(state.y, wanted.views.one(index))[0][0]

    save_video(frames(), target, wanted.fps)
    print(f"{count} frames of {system.title} in {target}")
    return 0


def split(words: Sequence[str]) -> tuple[Path, list[str]]:
    """The path that `cameras=…` names, and the other words.

    Raises:
        ConfigError: No path is named.
    """
    named = [word.removeprefix(OPTION) for word in words if word.startswith(OPTION)]
    if len(named) != 1 or not any(word.startswith("resume=") for word in words):
        raise ConfigError(
            "Render what, and from where? Write `--render resume=RUN "
            "cameras=path.json`; docs/texture.md describes the file."
        )
    return Path(named[0]), [word for word in words if not word.startswith(OPTION)]


def read_path(path: Path, default: RandomCameras) -> CameraPath:
    """Read a camera path.

    Args:
        path: A JSON file.
        default: Size and field of view where the file has none.

    Raises:
        ConfigError: The file cannot be used; the message says what to write.
    """
    try:
        if path.stat().st_size > _LARGEST:
            raise ConfigError(
                f"`{path}` has more than {_LARGEST >> 20} MiB: write fewer cameras."
            )
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"`{path}` cannot be read: {reason}.") from error
    except ConfigError:
        raise
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"`{path}` is not JSON: {error}.") from error
    if not isinstance(content, dict):
        raise ConfigError(f'`{path}` must hold `{{"cameras": […]}}`.')
    _refuse_unknown(content, _KNOWN, str(path))
    given = content.get("cameras")
    if not isinstance(given, list) or not given:
        raise ConfigError(
            f"`{path}` has no cameras: write "
            '`"cameras": [{"position": [2.4, 0, 0.8]}, …]`.'
        )
    keys = [_key(camera, i, default) for i, camera in enumerate(given)]
    times = [key[-1] for key in keys]
    if any(b <= a for a, b in itertools.pairwise(times)):
        raise ConfigError(f"`time` in `{path}` is {times}: write rising numbers.")
    frames = _number(content, "frames", 120 if len(keys) > 1 else 1, 1, _MOST_FRAMES)
    closed = content.get("closed", False)
    if not isinstance(closed, bool):
        raise ConfigError(f"`closed` is {closed!r}: write true or false.")
    size = [
        int(_number(content, name, getattr(default, f"eval_{name}"), 2, _LIMIT))
        for name in ("height", "width")
    ]
    if any(side % 2 for side in size):
        raise ConfigError(f"`height` and `width` are {size}: videos need even ones.")
    values = np.array([key[:-1] for key in keys])
    cameras = _cameras(interpolate(values, np.array(times), int(frames), closed))
    views = Views(cameras, cameras.axes()[0], *size)
    return CameraPath(views, _number(content, "fps", 30, 1, 240))


def _refuse_unknown(section: dict[str, Any], known: Sequence[str], where: str) -> None:
    for name in section:
        if name not in known:
            raise ConfigError(
                f"There is no `{name}` in {where}. Known here: {', '.join(known)}."
            )


def _number(
    section: dict[str, Any],
    name: str,
    default: float,
    least: float = -1e9,
    most: float = 1e9,
) -> float:
    value = section.get(name, default)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ConfigError(f"`{name}` is {value!r}: write a number.")
    if not least <= value <= most:
        raise ConfigError(
            f"`{name}` is {str(value)[:40]}: write a number from {least:g} to {most:g}."
        )
    return value


def _key(camera: Any, index: int, default: RandomCameras) -> list[float]:
    """Position, point looked at, up, field of view and time of a key."""
    where = f"camera {index}"
    if not isinstance(camera, dict) or "position" not in camera:
        raise ConfigError(f"{where} has no `position`: write `[x, y, z]`.")
    _refuse_unknown(camera, _KEYS, where)
    vectors = {"look_at": [0.0, 0.0, 0.0], "up": [0.0, 0.0, 1.0], **camera}
    numbers: list[float] = []
    for name in ("position", "look_at", "up"):
        vector = vectors[name]
        whole = isinstance(vector, list) and len(vector) == 3
        if not whole or not all(
            isinstance(x, int | float)
            and not isinstance(x, bool)
            and abs(x) <= _FARTHEST
            for x in vector
        ):
            raise ConfigError(
                f"`{name}` of {where} is {str(vector)[:60]}: write `[x, y, z]`, "
                f"numbers up to {_FARTHEST:g}."
            )
        numbers += map(float, vector)
    position, target, up = np.array(numbers).reshape(3, 3)
    if np.linalg.norm(np.cross(target - position, up)) < 1e-9:
        raise ConfigError(
            f"{where} looks along its `up` direction, or at its own position: write "
            "another `up`, such as [1, 0, 0] for a view from above."
        )
    fov = _number(camera, "fov", default.eval_fovy_deg, 1, 170)
    return [*numbers, fov, _number(camera, "time", index)]


def interpolate(
    values: np.ndarray, times: np.ndarray, frames: int, closed: bool
) -> np.ndarray:
    """Rows of a Catmull-Rom spline through keys, evenly spaced in time.

    Args:
        values: Values of the keys, shape ``(keys, channels)``.
        times: Rising times of the keys, shape ``(keys,)``.
        frames: Number of rows.
        closed: Whether the path returns to its first key.
    """
    if len(values) == 1:
        return values.repeat(frames, 0)
    if closed:
        period = times[-1] - times[0] + (times[-1] - times[0]) / (len(times) - 1)
        values = np.concatenate([values[-1:], values, values[:2]])
        more = [times[-1] - period, *times, times[0] + period, times[1] + period]
        at = times[0] + period * np.arange(frames) / frames
        times = np.array(more)
    else:
        at = np.linspace(times[0], times[-1], frames)
    slopes = np.gradient(values, times, axis=0)
    index = np.searchsorted(times, at, "right").clip(1, len(times) - 1)
    begin, length = times[index - 1], times[index] - times[index - 1]
    s = ((at - begin) / length)[:, None]
    h = [2 * s**3 - 3 * s**2 + 1, s**3 - 2 * s**2 + s, 3 * s**2 - 2 * s**3, s**3 - s**2]
    return (
        h[0] * values[index - 1]
        + h[1] * slopes[index - 1] * length[:, None]
        + h[2] * values[index]
        + h[3] * slopes[index] * length[:, None]
    )


def _cameras(rows: np.ndarray) -> Cameras:
    """Cameras of rows of position, point looked at, up and field of view.

    `Cameras` are given by angles: the position alone fixes them, and the point looked
    at and the upward direction are offsets.
    """
    values = torch.from_numpy(rows).float()
    position, centre, up, fov = values.split([3, 3, 3, 1], -1)
    distance = position.norm(dim=-1).clamp(min=1e-6)
    plain = Cameras(
        azimuth=torch.atan2(position[:, 1], position[:, 0]).rad2deg(),
        elevation=(position[:, 2] / distance).clamp(-1, 1).asin().rad2deg(),
        distance=distance,
        fov=fov[:, 0].clamp(1, 170),
    )
    upright = plain.axes()[2]
    return Cameras(
        plain.azimuth,
        plain.elevation,
        plain.distance,
        plain.fov,
        centre=centre,
        tilt=torch.nn.functional.normalize(up, dim=-1) - upright,
    )
