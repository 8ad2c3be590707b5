"""Runs that the page starts, and what their folders show."""

from __future__ import annotations

import hashlib
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import systems
from systems.files import written
from systems.runs import folders, history
from systems.runs.stages import STAGES
from systems.runs.stopping import STOP

ROOT = Path(systems.__file__).parent.parent
"""The folder of `launch.py` and `configs`."""
SYSTEMS: Mapping[str, str] = {
    "DreamFusion, voxels (two minutes)": "dreamfusion-toybox",
    "DreamFusion, hash grid": "dreamfusion-toybox-hashgrid",
    "DreamGaussian, growing splats": "dreamgaussian-toybox",
    "TextMesh, a signed distance": "textmesh-toybox",
    "Magic3D, two stages": "magic3d-toybox",
    "ProlificDreamer, first stage": "prolificdreamer-toybox",
    "Zero-1-to-3, from an image": "zero123-toybox",
    "Zero-1-to-3, from an image to splats": "zero123-gaussian-toybox",
}
"""Configs by what the page calls them."""
FROM_IMAGE = frozenset(name for name in SYSTEMS if "from an image" in name)
"""The systems that start from an image instead of a prompt."""
IMAGES = "images"
"""Folder, among the results, of the images that were given."""
SPEEDS: Mapping[str, tuple[str, ...]] = {
    "the default": (),
    "faster, some risk": ("solver.threshold.value=0.4",),
    "exact: the sequential result, bit for bit": (
        "solver.threshold.name=fixed",
        "solver.threshold.value=0",
    ),
    "sequential, for comparison": ("solver.name=sequential",),
}
"""Settings by what the page calls them."""
FILES = ("mesh.glb", "mesh.obj", "splats.ply", "turntable.mp4", "viewer.html")
"""What can be downloaded."""


@dataclass
class Job:
    """A run in a process of its own.

    Attributes:
        process: The process.
        log: What it printed.
        root: Folder of all results.
        tag: The tag of the run's folder, which no other run has.
        name: Name of the config.
    """

    process: subprocess.Popen[bytes]
    log: Path
    root: Path
    name: str
    tag: str
    _found: Path | None = field(default=None, repr=False)

    @classmethod
    def start(
        cls,
        root: Path,
        subject: Sequence[str],
        system: str,
        speed: str,
        steps: int | None,
        more: Sequence[str] = (),
    ) -> Job:
        """Start a run.

        Args:
            root: Folder of all results.
            subject: Settings that say what is made; see `by_prompt` and `by_image`.
            system: A key of `SYSTEMS`.
            speed: A key of `SPEEDS`.
            steps: Number of steps; None: the config's.
            more: Further settings.
        """
        name = SYSTEMS[system]
        file, log = tempfile.mkstemp(prefix="app-", suffix=".log")
        tag = f"app-{Path(log).stem.removeprefix('app-')}"
        words = [
            *subject,
            *SPEEDS[speed],
            *(f"exp_root_dir={root}", f"tag={tag}"),
            *([] if steps is None else [f"trainer.max_steps={steps}"]),
            *more,
        ]
        config = ROOT / "configs" / f"{name}.yaml"
        launch = [sys.executable, str(ROOT / "launch.py"), "--config", str(config)]
        environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
        with os.fdopen(file, "wb") as output:
            process = subprocess.Popen(
                [*launch, "--train", *words],
                stdout=output,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # the page's Ctrl-C is not the run's
            )
        return cls(process, Path(log), root, name, tag)

    @property
    def folder(self) -> Path | None:
        """The folder of the run, once it has been made."""
        if self._found is None:
            made = list((self.root / self.name).glob(f"{self.tag}@*"))
            self._found = made[0] if made else None
        return self._found

    def stop(self) -> None:
        """Ask the run to end after this iteration, save and export."""
        folder = None if self.folder is None else current(self.folder)
        if folder is None:
            self.process.send_signal(signal.SIGINT)
        else:
            (folder / STOP).touch()

    def said(self) -> str:
        """The last lines that the run printed."""
        text = self.log.read_text(encoding="utf-8", errors="replace")
        lines = [line.split("\r")[-1].rstrip() for line in text.splitlines()]
        return "\n".join([line for line in lines if line][-6:])


def by_prompt(prompt: str) -> list[str]:
    """The settings that make what a prompt describes."""
    return [f"system.prompt_processor.prompt={_quoted(prompt)}"]


def by_image(root: Path, image: Path, elevation: float) -> list[str]:
    """The settings that make what an image shows; keeps a copy of it.

    Args:
        root: Folder of all results.
        image: The image, which may vanish.
        elevation: Elevation of its camera in degrees.
    """
    content = image.read_bytes()
    mark = hashlib.sha256(content).hexdigest()[:8]
    kept = root / IMAGES / f"{image.stem}-{mark}{image.suffix}"
    with written(kept) as part:
        part.write_bytes(content)
    where = _quoted(str(kept.resolve()))
    return [f"data.image={where}", f"data.default_elevation_deg={elevation:g}"]


def current(folder: Path) -> Path:
    """The folder of the stage in progress, or the run's own."""
    stages = [p.parent for p in folder.glob(f"*/{folders.CONFIG}")]
    return max(stages, key=lambda path: path.stat().st_mtime, default=folder)


def describe(folder: Path) -> str:
    """Step, iterations and quality of a run, in a line."""
    place = current(folder)
    entries = history.iterations(history.lines(place))
    words = [] if place == folder else [f"stage {place.name}"]
    if entries:
        reached = entries[-1]["begin"] + entries[-1]["stride"]
        words.append(f"step {reached} in {len(entries)} iterations")
    report = folders.report(place)
    quality = report.get("quality")
    if isinstance(quality, dict) and "psnr" in quality:
        words.append(f"PSNR {quality['psnr']:.1f} dB")
    return ", ".join(words) or "nothing recorded yet"


def shown(folder: Path, name: str) -> str | None:
    """A file of the run, or of its last stage that has it."""
    places = [folder, *sorted(p.parent for p in folder.glob(f"*/{folders.CONFIG}"))]
    found = [place / name for place in places if (place / name).is_file()]
    if not found:
        return None
    return str(max(found, key=lambda path: path.stat().st_mtime))


def downloads(folder: Path) -> list[str]:
    """Files of the run to download."""
    return [path for name in FILES if (path := shown(folder, name))]


def past(root: Path) -> Iterator[Path]:
    """The folders of runs with a preview, the newest first."""
    found = {
        path.parent.parent if _is_stage(path.parent) else path.parent
        for pattern in ("*/*@*/preview.png", "*/*@*/*/preview.png")
        for path in root.glob(pattern)
    }
    yield from sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _is_stage(folder: Path) -> bool:
    whole = folders.report(folder.parent)
    return STAGES in whole or "@" not in folder.name


def _quoted(prompt: str) -> str:
    """A prompt as a value of YAML, whatever it contains."""
    escaped = prompt.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{escaped}"'
