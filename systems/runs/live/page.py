"""The page: a panel for each run, and what they share."""

from __future__ import annotations

import importlib
import json
import math
import shlex
import threading
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np

from dreampropeller.checkpoint import CheckpointError
from systems.extras import command
from systems.runs import folders, history, paths
from systems.runs.live.address import Address
from systems.runs.live.reading import (
    FRAMES,
    Renders,
    checkpoints,
    curves,
    splats,
    status,
)
from systems.runs.stopping import PAUSE, STOP
from systems.settings.config import load
from systems.settings.reader import ConfigError

UPRIGHT = (math.sqrt(0.5), math.sqrt(0.5), 0.0, 0.0)
"""Rotation, as a quaternion, from y up (glb) to z up (the scene)."""
APART = -2.2
"""Distance along y between the objects of two runs: away from the page's panel."""
COLOURS = {"stride": "#2a78b5", "window": "#b0b7c0", "threshold": "#d2691e"}
CAMERAS = "cameras.json"
"""The camera path that the page writes into a run's folder."""


class Page:
    """The page of one or more runs.

    Args:
        runs: Folders of the runs.
        address: Where it is served.

    Raises:
        ConfigError: viser is not installed, or the port is taken.
    """

    def __init__(self, runs: Sequence[Path], address: Address) -> None:
        try:
            viser: Any = importlib.import_module("viser")
            uplot: Any = importlib.import_module("viser.uplot")
        except ImportError as error:
            raise ConfigError(
                'The live viewer needs viser: `pip install -e ".[viewer]"`, or open '
                f"`{runs[0] / 'viewer.html'}`, which needs nothing."
            ) from error
        address.check()
        self._busy = threading.Lock()
        self.server: Any = viser.ViserServer(
            address.host, address.port, label=runs[0].name, verbose=False
        )
        gui = self.server.gui
        gui.configure_theme(control_width="large")
        tabs = gui.add_tab_group() if len(runs) > 1 else None
        self.panels: list[Panel] = []
        for number, folder in enumerate(runs):
            name = _label(folder, runs)
            with nullcontext() if tabs is None else tabs.add_tab(name):
                self.panels.append(Panel(self, folder, number, uplot))
        self._frame = gui.add_image(np.full((2, 2, 3), 255, np.uint8), visible=False)
        self._view = gui.add_slider("View", 0, FRAMES - 1, 1, 0)
        self._view.on_update(lambda _: self.show_frames())
        self.film = Film(self.server, self.panels[0])
        self.server.on_client_connect(lambda _: self.show_frames())
        self.refresh()

    @property
    def folder(self) -> Path:
        """The folder of the first run."""
        return self.panels[0].folder

    def refresh(self) -> None:
        """Show what is new in the folders."""
        for panel in self.panels:
            panel.refresh()

    def show_frames(self) -> None:
        """Show the frames that the sliders name, side by side, if anyone looks."""
        if not self.server.get_clients():
            return  # rendering takes processor time from a run
        with self._busy:
            view = int(self._view.value)
            found = [panel.frame(view) for panel in self.panels]
            shown = [frame for frame in found if frame is not None]
            if shown:
                self._frame.image = _beside(shown)
                steps = [f"Step {panel.step}" for panel in self.panels if panel.steps]
                self._frame.label = " | ".join(steps)
                self._frame.visible = True
            for panel in self.panels:
                panel.show_mesh()

    def close(self) -> None:
        """End the server."""
        self.server.stop()


class Panel:
    """One run: its figures, curves, checkpoints and requests, and its object.

    Args:
        page: The page.
        folder: Folder of the run.
        number: Its place among the runs.
        uplot: The module of viser's plots.
    """

    def __init__(self, page: Page, folder: Path, number: int, uplot: Any) -> None:
        self.folder = folder
        self.steps: list[int] = []
        self.num_steps = load(folder / folders.CONFIG).trainer.max_steps
        self.renders = Renders(folder)
        self._page, self._number = page, number
        self._shown: dict[str, tuple[int, int]] = {}
        self._meshed: int | None = None
        gui = page.server.gui
        self._status = gui.add_markdown("No iteration has been recorded yet.")
        self._message = gui.add_markdown("")
        self._pause = gui.add_button("Pause")
        self._pause.on_click(lambda _: self.pause())
        self._stop = gui.add_button("Stop and save")
        self._stop.on_click(lambda _: self.stop())
        groups: tuple[tuple[str, ...], ...] = (("window", "stride"), ("threshold",))
        self._plots = {names: _plot(gui, uplot, names) for names in groups}
        self._slider = gui.add_slider("Checkpoint", 0, 1, 1, 0, disabled=True)
        self._slider.on_update(lambda _: page.show_frames())

    @property
    def step(self) -> int:
        """The step of the checkpoint that is shown."""
        return self.steps[min(int(self._slider.value), len(self.steps) - 1)]

    def stop(self) -> None:
        """Ask the run to end after this iteration."""
        (self.folder / STOP).touch()
        (self.folder / PAUSE).unlink(missing_ok=True)
        self.say("The run stops after this iteration, and saves.")

    def pause(self) -> None:
        """Ask the run to wait after this iteration, or to go on."""
        file = self.folder / PAUSE
        if file.exists():
            file.unlink(missing_ok=True)
            self.say("The run goes on.")
        else:
            file.touch()
            self.say("The run waits after this iteration.")
        self._name_pause()

    def say(self, text: str) -> None:
        """Show a sentence."""
        self._message.content = text

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
        self._stop.disabled = self._pause.disabled = done
        self._name_pause()
        for name in ("mesh.glb", "splats.ply"):
            path = self.folder / name
            if self._is_new(path):
                try:
                    if name == "mesh.glb":
                        self._add_mesh(path.read_bytes())
                    else:
                        self._add_ply(path)
                except (OSError, ValueError) as error:
                    self.say(f"`{name}` cannot be read: {error}")
        self._offer(list(checkpoints(self.folder)))

    def frame(self, view: int) -> np.ndarray | None:
        """The frame of the chosen checkpoint; None: it cannot be shown."""
        if not self.steps:
            return None
        try:
            return self.renders.frames(self.step)[view]
        except (OSError, ValueError, RuntimeError) as error:
            self.say(f"Step {self.step} cannot be shown: {error}")
            return None

    def show_mesh(self) -> None:
        """Show the surface of the chosen checkpoint, unless it is the written one."""
        if not self.steps or self.step == self._meshed:
            return
        self._meshed = self.step
        path = self.folder / "mesh.glb"
        try:
            if self.step == self.num_steps and path.is_file():
                self._add_mesh(path.read_bytes())
            elif not (self.folder / "splats.ply").is_file():
                self._add_mesh(self.renders.mesh(self.step))
        except (OSError, ValueError, RuntimeError) as error:
            self.say(f"Step {self.step} has no mesh: {error}")

    def _name_pause(self) -> None:
        waiting = (self.folder / PAUSE).exists()
        self._pause.label = "Continue" if waiting else "Pause"

    def _offer(self, steps: list[int]) -> None:
        """Set the slider to the kept checkpoints; it follows the newest."""
        if not steps or steps == self.steps:
            return
        newest = self._slider.disabled or self._slider.value == self._slider.max
        self.steps = steps
        self._slider.max = max(1, len(steps) - 1)
        self._slider.disabled = len(steps) < 2
        if newest:
            self._slider.value = len(steps) - 1
            self._page.show_frames()

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

    def _add_mesh(self, glb: bytes) -> None:
        scene, place = self._page.server.scene, (0.0, APART * self._number, 0.0)
        name = f"/{self._number}/mesh"
        scene.add_glb(name, glb, wxyz=UPRIGHT, position=place)

    def _add_ply(self, path: Path) -> None:
        found = splats(path)
        found["centers"][:, 1] += APART * self._number
        name = f"/{self._number}/splats"
        self._page.server.scene.add_gaussian_splats(name, **found)


class Film:
    """Cameras of the page's view, collected for `--render`.

    Args:
        server: Server of the page.
        panel: Panel of the run that is filmed.
    """

    def __init__(self, server: Any, panel: Panel) -> None:
        self.panel = panel
        self._cameras: list[dict[str, Any]] = []
        self._server = server
        with server.gui.add_folder("Camera path", expand_by_default=False):
            self._count = server.gui.add_markdown("No camera yet.")
            add = server.gui.add_button("Add this view")
            clear = server.gui.add_button("Begin again")
            self._film = server.gui.add_button("Film it", disabled=True)
        add.on_click(lambda event: self.add(event.client.camera))
        clear.on_click(lambda _: self.clear())
        self._film.on_click(lambda _: self.render())

    @property
    def path(self) -> Path:
        """The file of the path."""
        return self.panel.folder / CAMERAS

    def add(self, camera: Any) -> None:
        """Add a camera of viser as a key of the path, and write the file."""
        self._cameras.append(
            {
                "position": _rounded(camera.position),
                "look_at": _rounded(camera.look_at),
                "up": _rounded(camera.up_direction),
                "fov": round(math.degrees(camera.fov), 3),
            }
        )
        content = {"cameras": self._cameras}
        self.path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
        self._tell()

    def clear(self) -> None:
        """Forget the cameras."""
        self._cameras.clear()
        self._tell()

    def _tell(self) -> None:
        count = len(self._cameras)
        self._film.disabled = not count
        place = shlex.quote(str(self.panel.folder))
        words = f"resume={place} cameras={shlex.quote(str(self.path))}"
        self._count.content = (
            f"{count} cameras in `{CAMERAS}`: `{command('render')} {words}`"
            if count
            else "No camera yet."
        )

    def render(self) -> None:
        """Render the film from the newest checkpoint."""
        self._film.disabled = True
        self.panel.say("Filming. This takes processor time from a run in progress.")
        words = [f"resume={self.panel.folder}", f"{paths.OPTION}{self.path}"]
        try:
            paths.run(None, words)
        except (CheckpointError, ValueError, OSError, RuntimeError) as error:
            self.panel.say(f"The film cannot be made: {error}")
        else:
            self.panel.say(f"The film is in `{self.path.with_suffix('.mp4')}`.")
        finally:
            self._film.disabled = False


def _label(folder: Path, runs: Sequence[Path]) -> str:
    """A short name of a run that no other has."""
    names = [run.name for run in runs]
    return folder.name if names.count(folder.name) == 1 else str(folder)


def _plot(gui: Any, uplot: Any, names: Sequence[str]) -> Any:
    """Curves over the steps."""
    series = [uplot.Series(label="step")]
    series += [
        uplot.Series(label=name, stroke=COLOURS[name], width=2.0) for name in names
    ]
    return gui.add_uplot(
        (np.zeros(1),) * len(series),
        tuple(series),
        aspect=2.0,
        scales={"x": uplot.Scale(time=False)},
    )


def _beside(frames: Sequence[np.ndarray]) -> np.ndarray:
    """Frames in a row, over white where one is lower."""
    height = max(len(frame) for frame in frames)
    return np.concatenate(
        [
            np.pad(
                frame,
                ((0, height - len(frame)), (0, 0), (0, 0)),
                constant_values=255,
            )
            for frame in frames
        ],
        1,
    )


def _rounded(point: Any) -> list[float]:
    return [round(float(x), 4) for x in point]
