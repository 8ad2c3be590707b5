"""The loops of `docs/gallery.md`: one run of each system, as an animated image.

    python -m benchmarks.gallery [--only NAME]

A run that is finished is not made again. The last stage's turntable becomes
`docs/gallery/NAME.webp`.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
from PIL import Image

import launch
from benchmarks import images
from systems.runs import folders

LOOPS = {
    "dreamfusion": ("dreamfusion-toybox", "a red mushroom"),
    "dreamgaussian": ("dreamgaussian-toybox", "a yellow house"),
    "textmesh": ("textmesh-toybox", "a red mushroom"),
    "magic3d": ("magic3d-toybox", "a blue mug"),
    "zero123": ("zero123-toybox", "a blue chair"),
}
"""Config and prompt of each loop; that of an image says what it shows."""
SIZE, FRAMES = 128, 30


def main() -> None:
    """Make the missing runs, and write the loops."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=list(LOOPS))
    parser.add_argument("--runs", type=Path, default=Path("outputs/gallery"))
    parser.add_argument("--to", type=Path, default=Path("docs/gallery"))
    arguments = parser.parse_args()
    for name in [arguments.only] if arguments.only else LOOPS:
        write(make(arguments.runs / name, *LOOPS[name]), arguments.to / f"{name}.webp")


def make(root: Path, config: str, prompt: str) -> Path:
    """The turntable of a run, which is made or resumed if it is missing."""
    found = list(root.glob("*/*@*"))
    subject = f"system.prompt_processor.prompt={prompt}"
    if config.startswith("zero123"):
        image = root / f"{prompt.replace(' ', '-')}.png"
        images.draw(prompt, image, lit=False)
        subject = f"data.image={image}"
    words = [f"exp_root_dir={root}", subject]
    head = ["--config", f"configs/{config}.yaml"]
    if found:
        head, words = [], [f"resume={found[0]}"]
    if not found or not folders.report(found[0]):
        assert launch.main([*head, "--train", *words]) == 0
        found = list(root.glob("*/*@*"))
    turntables = [*found[0].glob("turntable.mp4"), *found[0].glob("*/turntable.mp4")]
    return max(turntables, key=lambda path: path.stat().st_mtime)


def write(turntable: Path, to: Path) -> None:
    """A turntable as an animated image that repeats."""
    import imageio.v3 as imageio

    frames = imageio.imread(turntable, plugin="FFMPEG")
    chosen = np.linspace(0, len(frames), FRAMES, endpoint=False).astype(int)
    loop = [Image.fromarray(frames[i]).resize((SIZE, SIZE)) for i in chosen]
    to.parent.mkdir(parents=True, exist_ok=True)
    loop[0].save(
        to, save_all=True, append_images=loop[1:], duration=66, loop=0, quality=70
    )
    print(f"{to}: {to.stat().st_size / 1024:.0f} kB")


if __name__ == "__main__":
    main()
