"""The toybox on the command line.

`python -m systems.toybox list` shows what prompts may name; `sample PROMPT` draws
images with a prior, `render PROMPT` draws the ground truth. `views`, `train`,
`classifier` and `evaluate` make and measure the second prior; `export` writes the
averaged weights of a training state.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch

from systems.images import open_image, save_sheet
from systems.scene.cameras import Cameras
from systems.toybox import FOLDER, SECOND_WEIGHTS, WEIGHTS
from systems.toybox.captions import FIRST_COLOURS, FIRST_OBJECTS, HELD_OUT, VIEWS
from systems.toybox.finishes import FINISHES
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.reader import parse, read
from systems.toybox.truth import truth, view_cameras

PRIORS = {"toybox": WEIGHTS, "toybox2": SECOND_WEIGHTS}
"""Names of the embedded priors; other names are pipeline folders."""


def show_list(arguments: argparse.Namespace) -> None:
    """Print what prompts may name."""
    del arguments
    for title, words in (("objects", OBJECTS), ("colours", COLOURS)):
        print(f"{title}:")
        for number, word in enumerate(words):
            print(f"  {number:2d}  {word}")
    print(f"finishes: {', '.join(FINISHES)}")
    print(f"views: {', '.join(VIEWS)}")
    print("prompts: a {colour} {object}, {view} view")
    print("         a {colour} {object} with {second colour} stripes, or spots")
    print("         normal map of a {colour} {object}, {view} view")
    print(
        f"the first prior, `toybox`, knows the first {len(FIRST_OBJECTS)} objects in "
        f"the first {len(FIRST_COLOURS)} colours, plain"
    )
    pairs = ", ".join(f"{colour} {name}" for colour, name in HELD_OUT)
    print(f"never trained together: {pairs}")


def sample(arguments: argparse.Namespace) -> None:
    """Draw images with a prior."""
    from diffusers.utils import logging

    from systems.toybox.pipeline import draw, load

    logging.disable_progress_bar()
    read(arguments.prompt)  # refuse before a model is loaded
    _at_least("--count", arguments.count, 1)
    _at_least("--steps", arguments.steps, 1)
    camera = _camera(arguments) if arguments.azimuth is not None else None
    images = draw(
        load(_folder(arguments.weights)),
        [arguments.prompt] * arguments.count,
        arguments.seed,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
        camera=camera,
        **_reference(arguments),
    )
    save_sheet(images, arguments.output, arguments.columns, arguments.scale)
    print(f"Wrote {arguments.count} samples to {arguments.output}.")


def render(arguments: argparse.Namespace) -> None:
    """Draw the ground truth."""
    parse(arguments.prompt)
    _at_least("--count", arguments.count, 1)
    _at_least("--size", arguments.size, 1)
    images = truth(arguments.prompt).render(_camera(arguments), arguments.size)
    background = torch.full((3,), arguments.background)
    draw = images.normal_over if read(arguments.prompt).normal else images.over
    save_sheet(draw(background), arguments.output, arguments.columns, arguments.scale)
    print(f"Wrote {arguments.count} renders to {arguments.output}.")


def views(arguments: argparse.Namespace) -> None:
    """Render the training views missing from the folder."""
    from systems.toybox.views import render_shards

    _at_least("--shards", arguments.shards, 1)
    render_shards(arguments.folder / "views", arguments.shards)
    print(f"{arguments.folder / 'views'} holds {arguments.shards} shards.")


def train(arguments: argparse.Namespace) -> None:
    """Train the second prior and export it."""
    from systems.toybox.train import Budget, Run, seconds_until, train_on
    from systems.toybox.views import open_shards

    seconds_until(arguments.until)
    _at_least("--batch", arguments.batch, 1)
    _at_least("--shards", arguments.shards, 1)
    if not arguments.device.startswith("cuda") and not arguments.render:
        open_shards(arguments.folder / "views")
    run = Run(
        None if arguments.source == "none" else _folder(arguments.source),
        arguments.seed,
        arguments.device,
        tuple(arguments.widths),
    )
    budget = Budget(arguments.minutes, arguments.until, arguments.steps)
    render = arguments.render or run.device.type == "cuda"
    shards = arguments.shards if render else None
    try:
        written = train_on(run, arguments.folder, budget, arguments.batch, shards)
    except KeyboardInterrupt:
        print(
            f"Stopped at step {run.step}, {run.images} images. The same command "
            "resumes; `python -m systems.toybox export` writes the weights.",
            file=sys.stderr,
        )
        raise
    print(f"{written}: {run.step} steps, {run.images} images.")


def export(arguments: argparse.Namespace) -> None:
    """Write the averaged weights of the last checkpoint."""
    from systems.toybox.train import Run

    state = arguments.folder / "state.pt"
    if not state.exists():
        raise ValueError(
            f"There is no `{state}`: train with `python -m systems.toybox train`."
        )
    run = Run(None, widths=tuple(arguments.widths))
    run.restore(state)
    run.export(arguments.to)
    print(f"{arguments.to}: {run.step} steps, {run.images} images.")


def classifier(arguments: argparse.Namespace) -> None:
    """Train the second classifier."""
    from systems.toybox.classifier import accuracy, load, save
    from systems.toybox.classifier import train as fit
    from systems.toybox.views import ViewSet, build_shard, open_shards

    begun = None if arguments.source is None else load(arguments.source)
    views = open_shards(arguments.folder / "views")
    model = fit(views, arguments.steps, arguments.seed, begun)
    save(model, arguments.to, {})
    layers, cameras = build_shard(0, seed=2)
    score = accuracy(load(arguments.to), ViewSet((layers,), cameras), seed=2)
    report: dict[str, object] = {"steps": arguments.steps, "renders": len(layers)}
    save(model, arguments.to, {**report, "accuracy": score})
    print({**report, "accuracy": score})


def evaluate(arguments: argparse.Namespace) -> None:
    """Measure a prior with its classifier."""
    from systems.toybox.evaluate import evaluate as run

    _at_least("--count", arguments.count, 1)
    weights = _folder(arguments.weights)
    file = arguments.classifier or weights / "classifier" / "model.safetensors"
    print(run(weights, file, arguments.to, arguments.count, arguments.seed))


def _folder(name: str) -> Path:
    """A pipeline folder, by its path or by the name of an embedded prior."""
    folder = PRIORS.get(name, Path(name))
    if not (folder / "model_index.json").exists():
        raise ValueError(
            f"`{name}` names no pipeline: there is no `{folder / 'model_index.json'}`. "
            "Write `toybox`, or the folder that `python -m systems.toybox train` wrote."
        )
    return folder


def _camera(arguments: argparse.Namespace) -> Cameras:
    """One camera per image, evenly spaced all around from the requested one."""
    middle = view_cameras(read(arguments.prompt).view)
    turn = torch.arange(arguments.count) / arguments.count * 360
    one = torch.ones(arguments.count)
    azimuth = middle.azimuth if arguments.azimuth is None else arguments.azimuth
    elevation = middle.elevation if arguments.elevation is None else arguments.elevation
    return Cameras(
        azimuth=azimuth * one + turn,
        elevation=elevation * one,
        distance=arguments.distance * one,
        fov=arguments.fov * one,
    )


def _reference(arguments: argparse.Namespace) -> dict[str, Any]:
    """The reference image of `sample`, seen from azimuth 0 at the same elevation."""
    if arguments.image is None:
        return {}
    if arguments.azimuth is None:
        raise ValueError(
            "`--image` shows the object from azimuth 0: write `--azimuth` too, the "
            "degrees by which the camera moves around it."
        )
    camera = _camera(arguments)
    front = Cameras(0 * camera.azimuth, camera.elevation, camera.distance, camera.fov)
    return {"image": open_image(arguments.image), "image_camera": front}


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"`{option} {value}` is too small: write {least} or more.")


COMMANDS = {
    "list": (show_list, "objects, colours, finishes and views"),
    "sample": (sample, "draw a prompt with a prior"),
    "render": (render, "draw the ground truth of a prompt"),
    "views": (views, "render the training views"),
    "train": (train, "train the second prior"),
    "export": (export, "write the averaged weights of the last checkpoint"),
    "classifier": (classifier, "train the second classifier"),
    "evaluate": (evaluate, "measure a prior with its classifier"),
}


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m systems.toybox", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    parts = {n: commands.add_parser(n, help=h) for n, (_, h) in COMMANDS.items()}
    for name, output in (("sample", "samples.png"), ("render", "renders.png")):
        add = parts[name].add_argument
        add("prompt", help='such as "a red mug with white stripes, front view"')
        add("--output", type=Path, default=Path("outputs") / output)
        add("--count", type=int, default=4, help="images")
        add("--columns", type=int, default=4, help="in a row")
        add("--scale", type=int, default=4, help="enlargement")
        add("--azimuth", type=float, help="degrees; 0 is the front")
        add("--elevation", type=float, help="degrees")
        add("--distance", type=float, default=2.4)
        add("--fov", type=float, default=50.0, help="degrees")
    add = parts["sample"].add_argument
    add("--steps", type=int, default=25, help="DDIM steps")
    add("--guidance-scale", type=float, default=3.0)
    add("--seed", type=int, default=0)
    add("--weights", default="toybox", help="toybox, toybox2 or a pipeline folder")
    add("--image", type=Path, help="reference image, seen from azimuth 0 (toybox2)")
    add = parts["render"].add_argument
    add("--size", type=int, default=64, help="pixels per side")
    add("--background", type=float, default=0.75, help="grey, 0 to 1")
    for name in ("views", "train", "export", "classifier"):
        parts[name].add_argument(
            "--folder", type=Path, default=FOLDER, help=f"default: {FOLDER}"
        )
    for name in ("views", "train"):
        parts[name].add_argument(
            "--shards", type=int, default=24, help="of 2002 views to render"
        )
    for name in ("train", "export"):
        parts[name].add_argument(
            "--widths", type=int, nargs=3, default=[32, 64, 128], help="of the U-Net"
        )
    add = parts["train"].add_argument
    add("--minutes", type=float, default=120.0, help="of this part")
    add("--until", help="HH:MM at which this part ends at the latest")
    add("--steps", type=int, help="of this part at most")
    add("--batch", type=int, default=32)
    add("--device", default="cpu", help="cuda renders the views on the device too")
    add("--render", action="store_true", help="render the views in memory first")
    add("--from", dest="source", default="toybox", help="a prior, a folder, or none")
    add("--seed", type=int, default=0)
    parts["export"].add_argument("--to", type=Path, default=SECOND_WEIGHTS)
    add = parts["classifier"].add_argument
    add("--steps", type=int, default=9000)
    add("--from", dest="source", type=Path, help="a classifier to go on with")
    add("--seed", type=int, default=1, help="another one to go on with")
    add("--to", type=Path, default=FOLDER / "classifier" / "model.safetensors")
    add = parts["evaluate"].add_argument
    add("--weights", default="toybox", help="toybox, toybox2 or a pipeline folder")
    add("--classifier", type=Path, help="default: the one in the pipeline folder")
    add("--to", type=Path, default=Path("outputs") / "toybox-evaluation")
    add("--count", type=int, default=200, help="prompts of the first prior's list")
    add("--seed", type=int, default=0)
    for name in ("train", "classifier", "evaluate", "views"):
        parts[name].add_argument("--threads", type=int, default=1)
    return parser


def main() -> int:
    """Run a command; user errors give one sentence and exit status 2."""
    arguments = make_parser().parse_args()
    try:
        if hasattr(arguments, "columns"):
            _at_least("--columns", arguments.columns, 1)
            _at_least("--scale", arguments.scale, 1)
        if hasattr(arguments, "threads"):
            _at_least("--threads", arguments.threads, 1)
            torch.set_num_threads(arguments.threads)
        COMMANDS[arguments.command][0](arguments)
    except KeyboardInterrupt:
        print("Stopped.", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
