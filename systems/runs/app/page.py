"""The page: what is asked for on the left, what is made on the right."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from systems.runs import folders
from systems.runs.app import jobs
from systems.runs.app.jobs import SPEEDS, SYSTEMS, Job

INTERVAL = 1.0
"""Seconds between two looks at a run in progress."""
GALLERY = 24
"""Past runs that are shown."""
EXAMPLES = ("a red mushroom", "a green tree", "a blue mug", "a yellow chair")


def make_page(gradio: Any, root: Path) -> tuple[Any, dict[str, Any]]:
    """The page, and the arguments of its `launch` that decide how it looks.

    Args:
        gradio: The module.
        root: Folder of all results.
    """
    theme = gradio.themes.Default(font=["sans-serif"], font_mono=["monospace"])
    runs = _Runs(root)

    def choose(event: Any) -> tuple[Any, ...]:
        return runs.choose(event.index)

    choose.__annotations__["event"] = gradio.SelectData  # gradio looks for it

    with gradio.Blocks(title="DreamPropeller", analytics_enabled=False) as page:
        gradio.Markdown(
            "# DreamPropeller\nA prompt or an image becomes an object, by score "
            "distillation whose future steps are evaluated at once. The embedded prior "
            "knows simple objects: `python -m systems.toybox list`."
        )
        with gradio.Row():
            with gradio.Column(scale=1):
                prompt = gradio.Textbox(label="Prompt", value=EXAMPLES[0])
                gradio.Examples([[text] for text in EXAMPLES], prompt)
                with gradio.Accordion("From an image instead", open=False):
                    image = gradio.Image(
                        label="Image",
                        type="filepath",
                        image_mode=None,
                        format="png",
                        sources=["upload", "clipboard"],
                    )
                    elevation = gradio.Slider(
                        *(-30, 80), value=5, step=1, label="Seen from above (degrees)"
                    )
                system = gradio.Dropdown(list(SYSTEMS), label="System")
                speed = gradio.Radio(list(SPEEDS), label="Speed", value="the default")
                steps = gradio.Number(0, label="Steps (0: the config's)", precision=0)
                with gradio.Row():
                    make = gradio.Button("Make it", variant="primary")
                    stop = gradio.Button("Stop and save")
            with gradio.Column(scale=2):
                status = gradio.Markdown("Nothing has been made yet.")
                preview = gradio.Image(label="Preview", interactive=False)
                model = gradio.Model3D(label="Mesh")
                files = gradio.File(label="Files", file_count="multiple")
        gallery = gradio.Gallery(
            label="Runs",
            columns=4,
            height=360,
            object_fit="contain",
            preview=False,
            value=runs.gallery,
        )
        outputs = [status, preview, model, files]
        chosen = [system, speed, steps]
        begun = make.click(runs.make, [prompt, image, elevation, *chosen], outputs)
        begun.then(runs.gallery, None, gallery)
        stop.click(runs.stop, None, status)
        gallery.select(choose, None, outputs)
    return page, {"theme": theme, "footer_links": []}


class _Runs:
    """The runs of a folder, and the one in progress.

    Args:
        root: Folder of all results.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._job: Job | None = None
        self._listed: list[Path] = []

    def make(
        self,
        prompt: str,
        image: str | None,
        elevation: float,
        system: str,
        speed: str,
        steps: float | None,
    ) -> Iterator[tuple[Any, ...]]:
        """Start a run, and show it until it ends."""
        if self._job is not None and self._job.process.poll() is None:
            yield "**Another run is in progress.** Stop it first.", None, None, None
            return
        prompt = (prompt or "").strip()
        wrong = _wrong(prompt, image, system)
        if wrong:
            yield wrong, None, None, None
            return
        subject = (
            jobs.by_image(self._root, Path(image), elevation)
            if image
            else jobs.by_prompt(prompt)
        )
        chosen = int(steps) if steps else None
        job = self._job = Job.start(self._root, subject, system, speed, chosen)
        begin = time.monotonic()
        try:
            while job.process.poll() is None:
                yield self._show(job, f"{time.monotonic() - begin:.0f} s")
                time.sleep(INTERVAL)
            yield self._show(job, f"ended after {time.monotonic() - begin:.0f} s")
        finally:  # also when the browser is closed
            with suppress(OSError):
                job.log.unlink()

    def stop(self) -> str:
        """Ask the run in progress to stop."""
        if self._job is None or self._job.process.poll() is not None:
            return "No run is in progress."
        self._job.stop()
        return "The run stops after this iteration, saves and exports."

    def gallery(self) -> list[tuple[str, str]]:
        """Previews and titles of past runs."""
        self._listed = list(jobs.past(self._root))[:GALLERY]
        return [
            (str(jobs.shown(folder, "preview.png")), _title(folder))
            for folder in self._listed
        ]

    def choose(self, number: int) -> tuple[Any, ...]:
        """Show a run of the gallery."""
        return self._files(self._listed[number])

    def _show(self, job: Job, when: str) -> tuple[Any, ...]:
        folder = job.folder
        if folder is None or job.process.poll() not in (None, 0, 130):
            return f"{when}\n```\n{job.said()}\n```", None, None, None
        found = self._files(folder)
        return f"{found[0]}, {when}", *found[1:]

    def _files(self, folder: Path) -> tuple[Any, ...]:
        return (
            f"**{_title(folder)}**: {jobs.describe(folder)}",
            jobs.shown(folder, "preview.png"),
            jobs.shown(folder, "mesh.glb"),
            jobs.downloads(folder) or None,
        )


def _wrong(prompt: str, image: str | None, system: str) -> str:
    """What is missing, or does not fit together; empty if nothing."""
    starts = system in jobs.FROM_IMAGE
    if starts and not image:
        return f"**`{system}` needs an image**: choose one below the prompt."
    if image and not starts:
        return (
            f"**`{system}` starts from a prompt**: take the image away, or choose a "
            "system `from an image`."
        )
    if not starts and not prompt:
        return "**Say what to make**, such as `a red mushroom`."
    return ""


def _title(folder: Path) -> str:
    title = folders.report(jobs.current(folder)).get("title", "")
    return f"{title or folder.name} ({folder.parent.name})"
