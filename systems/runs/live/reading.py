"""What the page shows, read from the folder of a run."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreampropeller import checkpoint
from systems import build
from systems.extras import command
from systems.runs import folders, history
from systems.scene.gaussians import ply
from systems.scene.mesh_files import to_glb
from systems.settings.config import load
from systems.settings.reader import ConfigError

FRAMES = 8
"""Rendered frames of a checkpoint, all around."""
_CONSTANT = 0.28209479177387814  # the harmonic of degree 0
_CHECKPOINT = re.compile(r"step-(\d+)\.safetensors")


def open_folder(run: str) -> Path:
    """The folder of a run, finished or in progress.

    Raises:
        ConfigError: There is no such folder, or no run has been set up in it.
    """
    path = Path(run.removeprefix("resume="))
    if not path.exists():
        raise ConfigError(
            f"There is no run at `{path}`. Name a run folder: "
            "`outputs/<name>/<tag>@<time>`."
        )
    folder = folders.folder_of(str(path))
    if not (folder / folders.CONFIG).is_file():
        raise ConfigError(
            f"`{folder}` has no `{folders.CONFIG}`: it is no run folder, or its run "
            "has not begun. Name a folder `outputs/<name>/<tag>@<time>`."
        )
    return folder


def checkpoints(folder: Path) -> dict[int, Path]:
    """The kept checkpoints by their step, the earliest first."""
    found = (folder / folders.CHECKPOINTS).glob("step-*.safetensors")
    named = [(_CHECKPOINT.fullmatch(path.name), path) for path in found]
    return dict(sorted((int(name[1]), path) for name, path in named if name))


def curves(folder: Path) -> dict[str, np.ndarray]:
    """Stride, window and threshold of each iteration, over the steps reached.

    A threshold that is not recorded (the sequential run) is NaN.
    """
    entries = history.iterations(history.lines(folder))
    columns = {
        "step": [entry["begin"] + entry["stride"] for entry in entries],
        "stride": [entry["stride"] for entry in entries],
        "window": [entry["window"] for entry in entries],
        "threshold": [entry.get("threshold") for entry in entries],
    }
    return {key: np.array(column, dtype=float) for key, column in columns.items()}


def status(folder: Path, drawn: dict[str, np.ndarray], num_steps: int) -> str:
    """Step, iterations and quality so far, as Markdown."""
    steps, count = drawn["step"], len(drawn["step"])
    if not count:
        return "No iteration has been recorded yet."
    reached = int(steps[-1])
    lines = [
        f"**Step {reached} of {num_steps}**, {count} iterations, "
        f"{reached / count:.2f}× fewer than steps"
    ]
    report = folders.report(folder)
    if isinstance(report.get("quality"), dict) and "psnr" in report["quality"]:
        lines.append(f"PSNR {report['quality']['psnr']:.1f} dB")
    if report.get("steps") == num_steps:
        lines.append("Finished.")
    elif reached == num_steps:
        lines.append("All steps are made; the results are being written.")
    else:
        place = shlex.quote(str(folder))
        lines.append(f"Resume, once it has ended: `{command('train')} resume={place}`")
    return "\n\n".join(lines)


def splats(path: Path) -> dict[str, np.ndarray]:
    """Centres, covariances, colours and opacities of a 3DGS file, as viser takes them.

    A covariance is $R S S^T R^T$ with the rotation $R$ of the quaternion and the
    lengths $S$; the colour is that of the constant harmonic.
    """
    state = ply.load(path)
    w, x, y, z = torch.nn.functional.normalize(state["quats"], dim=-1).unbind(-1)
    rotation = torch.stack(
        [
            *(1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)),
            *(2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)),
            *(2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)),
        ],
        -1,
    ).view(-1, 3, 3)
    axes = rotation * state["scales"].exp()[:, None, :]
    colours = (0.5 + _CONSTANT * state["sh0"].reshape(-1, 3)).clamp(0, 1)
    return {
        "centers": state["means"].numpy().copy(),
        "covariances": (axes @ axes.mT).numpy(),
        "rgbs": colours.numpy(),
        "opacities": state["opacities"].sigmoid().reshape(-1, 1).numpy(),
    }


@dataclass
class Renders:
    """Frames of checkpoints; the system is built at the first.

    Args:
        folder: Folder of the run.
    """

    folder: Path
    _system: Any = None
    _frames: dict[tuple[int, int], list[np.ndarray]] = field(default_factory=dict)

    def frames(self, step: int) -> list[np.ndarray]:
        """Frames all around of the checkpoint of a step, of 8-bit colours.

        Raises:
            CheckpointError: It cannot be read.
            ValueError: It has been removed, or the run makes no 3D object.
        """
        path = self._path(step)
        key = (step, path.stat().st_mtime_ns)  # a resumed run may write it again
        if key not in self._frames:
            system, y = self._opened(path)
            self._frames[key] = [
                (255 * frame.clamp(0, 1)).byte().permute(1, 2, 0).cpu().numpy()
                for frame in system.turntable(y, FRAMES)
            ]
        return self._frames[key]

    def mesh(self, step: int) -> bytes:
        """The surface of the checkpoint of a step, as a glb.

        Raises:
            CheckpointError: It cannot be read.
            ValueError: It has been removed, there is no surface yet, or the run makes
                no 3D object.
        """
        system, y = self._opened(self._path(step))
        return to_glb(system.mesh(y))

    def _path(self, step: int) -> Path:
        path = checkpoints(self.folder).get(step)
        if path is None:
            raise ValueError("its checkpoint has been removed.")
        return path

    def _opened(self, path: Path) -> tuple[Any, Any]:
        """The system, and the state of a checkpoint."""
        if self._system is None:
            config = load(self.folder / folders.CONFIG)
            self._system = build(replace(config, resume=str(self.folder)))
        y = checkpoint.load(path).y
        self._system.check_state(y, path)
        return self._system, y
