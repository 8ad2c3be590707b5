"""The live viewer of a run: `launch.py --view RUN`.

A web page of viser beside the run, which it only reads: the mesh or the splats, frames
rendered from any kept checkpoint, and the curves of stride, window and threshold. The
run may be in progress; closing the page or the viewer leaves it alone. The page can
request a stop, by the file that `systems.runs.stopping` waits for.
"""

from __future__ import annotations

import errno
import importlib
import math
import re
import shlex
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dreampropeller import checkpoint
from systems import build
from systems.extras import command
from systems.runs import folders, history
from systems.scene.gaussians import ply
from systems.settings.config import load
from systems.settings.reader import ConfigError

FRAMES = 8
"""Rendered frames of a checkpoint, all around."""
PAUSE = 1.0
"""Seconds between two looks at the folder."""
UPRIGHT = (math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0)
"""Rotation, as a quaternion, from y up (glb) to z up (the scene)."""
COLOURS = {"stride": "#2a78b5", "window": "#b0b7c0", "threshold": "#d2691e"}
STOP = "stop"
_CONSTANT = 0.28209479177387814  # the harmonic of degree 0
_CHECKPOINT = re.compile(r"step-(\d+)\.safetensors")


@dataclass(frozen=True)
class Address:
    """Where the page is served.

    Args:
        host: Network interface; the default is reachable from this machine alone.
        port: TCP port.
    """

    host: str = "127.0.0.1"
    port: int = 8080

    @classmethod
    def read(cls, words: Sequence[str]) -> Address:
        """From `host=…` and `port=…`.

        Raises:
            ConfigError: There is another word, or the port is no port.
        """
        found: dict[str, Any] = {}
        for word in words:
            key, _, value = word.partition("=")
            if key not in ("host", "port") or not value:
                raise ConfigError(
                    f"`{word}` is no setting of `--view`: write `port=8081` or "
                    "`host=0.0.0.0`."
                )
            found[key] = value
        port = str(found.get("port", cls.port))
        if not port.isdecimal() or not 0 < int(port) < 2**16:
            raise ConfigError(f"`port={port}` is no port: write `port=8081`.")
        return cls(found.get("host", cls.host), int(port))

    def check(self) -> None:
        """Try to listen there.

        Raises:
            ConfigError: The port is taken, or the interface does not exist.
        """
        with socket.socket() as trial:
            trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                trial.bind((self.host, self.port))
            except OSError as error:
                reason = (
                    "is taken"
                    if error.errno == errno.EADDRINUSE
                    else f"cannot be used ({error.strerror or error})"
                )
                raise ConfigError(
                    f"Port {self.port} of {self.host} {reason}: write "
                    f"`port={self.port % 65535 + 1}`."
                ) from error


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
        "centers": state["means"].numpy(),
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
        path = checkpoints(self.folder).get(step)
        if path is None:
            raise ValueError("its checkpoint has been removed.")
        key = (step, path.stat().st_mtime_ns)  # a resumed run may write it again
        if key not in self._frames:
            if self._system is None:
                self._system = build(load(self.folder / folders.CONFIG))
            state = checkpoint.load(path)
            self._system.check_state(state.y, path)
            self._frames[key] = [
                (255 * frame.clamp(0, 1)).byte().permute(1, 2, 0).cpu().numpy()
                for frame in self._system.turntable(state.y, FRAMES)
            ]
        return self._frames[key]


class Page:
    """The page of a run.

    Args:
        folder: Folder of the run.
        address: Where it is served.

    Raises:
        ConfigError: viser is not installed, or the port is taken.
    """

    def __init__(self, folder: Path, address: Address) -> None:
        try:
            viser: Any = importlib.import_module("viser")
            uplot: Any = importlib.import_module("viser.uplot")
        except ImportError as error:
            raise ConfigError(
                'The live viewer needs viser: `pip install -e ".[viewer]"`, or open '
                f"`{folder / 'viewer.html'}`, which needs nothing."
            ) from error
        address.check()
        self.folder = folder
        self.num_steps = load(folder / folders.CONFIG).trainer.max_steps
        self.renders = Renders(folder)
        self._shown: dict[str, tuple[int, int]] = {}
        self._steps: list[int] = []
        self._busy = threading.Lock()
        self.server: Any = viser.ViserServer(
            address.host, address.port, label=folder.name, verbose=False
        )
        self._add_panel(uplot)
        self.refresh()

    def _add_panel(self, uplot: Any) -> None:
        gui = self.server.gui
        gui.configure_theme(control_width="large")
        self._status = gui.add_markdown("No iteration has been recorded yet.")
        self._message = gui.add_markdown("")
        self._stop = gui.add_button("Stop and save")
        self._stop.on_click(lambda _: self.stop())
        empty = np.zeros(1)

        def plot(names: Sequence[str]) -> Any:
            series = [uplot.Series(label="step")] + [
                uplot.Series(label=name, stroke=COLOURS[name], width=2.0)
                for name in names
            ]
            return gui.add_uplot(
                (empty,) * len(series),
                tuple(series),
                aspect=2.0,
                scales={"x": uplot.Scale(time=False)},
            )

        groups: tuple[tuple[str, ...], ...] = (("window", "stride"), ("threshold",))
        self._plots = {names: plot(names) for names in groups}
        self._slider = gui.add_slider("Checkpoint", 0, 1, 1, 0, disabled=True)
        self._view = gui.add_slider("View", 0, FRAMES - 1, 1, 0, disabled=True)
        self._frame = gui.add_image(np.full((2, 2, 3), 255, np.uint8), visible=False)
        for slider in (self._slider, self._view):
            slider.on_update(lambda _: self.show_frame())

    def stop(self) -> None:
        """Request that the run ends after this iteration."""
        (self.folder / STOP).touch()
        self._message.content = "The run stops after this iteration, and saves."

    def refresh(self) -> None:
        """Show what is new in the folder."""
        new = self._is_new(self.folder / history.FILE)
        if new or self._is_new(self.folder / "report.json"):
            drawn = curves(self.folder)
            self._status.content = status(self.folder, drawn, self.num_steps)
            for names, plot in self._plots.items():
                if len(drawn["step"]):
                    plot.data = tuple(drawn[name] for name in ("step", *names))
        done = folders.report(self.folder).get("steps") == self.num_steps
        self._stop.disabled = done
        for name, add in (("mesh.glb", self._add_mesh), ("splats.ply", self._add_ply)):
            path = self.folder / name
            if self._is_new(path):
                try:
                    add(path)
                except (OSError, ValueError) as error:
                    self._message.content = f"`{name}` cannot be read: {error}"
        self._offer(list(checkpoints(self.folder)))

    def _offer(self, steps: list[int]) -> None:
        """Set the slider to the kept checkpoints; it follows the newest."""
        if not steps or steps == self._steps:
            return
        newest = self._slider.disabled or self._slider.value == self._slider.max
        self._steps = steps
        self._slider.max = max(1, len(steps) - 1)
        self._slider.disabled = len(steps) < 2
        self._view.disabled = False
        if newest:
            self._slider.value = len(steps) - 1
            self.show_frame()

    def _is_new(self, path: Path) -> bool:
        try:
            found = path.stat()
        except OSError:
            return False
        state = (found.st_mtime_ns, found.st_size)
        if self._shown.get(path.name) == state:
            return False
        self._shown[path.name] = state
        return True

    def _add_mesh(self, path: Path) -> None:
        self.server.scene.add_glb("/mesh", path.read_bytes(), wxyz=UPRIGHT)

    def _add_ply(self, path: Path) -> None:
        self.server.scene.add_gaussian_splats("/splats", **splats(path))

    def show_frame(self) -> None:
        """Show the frame that the sliders name."""
        with self._busy:
            index = min(int(self._slider.value), len(self._steps) - 1)
            step = self._steps[index]
            try:
                frames = self.renders.frames(step)
            except (OSError, ValueError, RuntimeError) as error:
                self._message.content = f"Step {step} cannot be shown: {error}"
                return
            self._frame.image = frames[int(self._view.value)]
            self._frame.label = f"Step {step}"
            self._frame.visible = True

    def close(self) -> None:
        """End the server."""
        self.server.stop()


def run(run: str, words: Sequence[str]) -> int:
    """Serve the page of a run until Ctrl-C; returns the exit code.

    Args:
        run: Folder of the run.
        words: `host=…` and `port=…`.

    Raises:
        ConfigError: There is no such run, the port is taken, or viser is missing.
    """
    address = Address.read(words)
    page = Page(open_folder(run), address)
    print(f"http://{address.host}:{address.port} shows {page.folder} (Ctrl-C ends it)")
    try:
        while True:
            time.sleep(PAUSE)
            page.refresh()
    except KeyboardInterrupt:
        print("The viewer has ended; the run has not.", file=sys.stderr)
        return 0
    finally:
        page.close()
