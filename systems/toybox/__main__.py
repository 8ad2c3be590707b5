"""The toybox on the command line.

`python -m systems.toybox list` shows the vocabulary; `sample PROMPT` draws pictures
with the prior, `render PROMPT` draws the truth.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

from systems.images import save_sheet
from systems.scene.cameras import Cameras
from systems.toybox import WEIGHTS
from systems.toybox.captions import HELD_OUT, VIEWS, parse, view_in
from systems.toybox.objects import COLOURS, OBJECTS
from systems.toybox.truth import truth, view_cameras


def show_list() -> None:
    """Print the vocabulary."""
    for title, words in (("objects", OBJECTS), ("colours", COLOURS)):
        print(f"{title}:")
        for number, word in enumerate(words):
            print(f"  {number:2d}  {word}")
    print(f"views: {', '.join(VIEWS)}")
    print("prompts: a {colour} {object}, {view} view")
    print("         normal map of a {colour} {object}, {view} view")
    pairs = ", ".join(f"{colour} {name}" for colour, name in HELD_OUT)
    print(f"never trained together: {pairs}")


def sample(arguments: argparse.Namespace) -> None:
    """Draw pictures with the prior."""
    from diffusers.utils import logging

    from systems.toybox.pipeline import draw, load

    logging.disable_progress_bar()
    _at_least("--count", arguments.count, 1)
    _at_least("--steps", arguments.steps, 1)
    prior = load(arguments.weights)
    pictures = draw(
        prior,
        [arguments.prompt] * arguments.count,
        arguments.seed,
        num_inference_steps=arguments.steps,
        guidance_scale=arguments.guidance_scale,
    )
    save_sheet(pictures, arguments.output, arguments.columns, arguments.scale)
    print(f"Wrote {arguments.count} samples to {arguments.output}.")


def render(arguments: argparse.Namespace) -> None:
    """Draw the truth."""
    _at_least("--count", arguments.count, 1)
    _at_least("--size", arguments.size, 1)
    thing = truth(arguments.prompt)
    middle = view_cameras(view_in(arguments.prompt))
    turn = torch.arange(arguments.count) / arguments.count * 360
    one = torch.ones(arguments.count)
    azimuth = middle.azimuth if arguments.azimuth is None else arguments.azimuth
    elevation = middle.elevation if arguments.elevation is None else arguments.elevation
    cameras = Cameras(
        azimuth=azimuth * one + turn,
        elevation=elevation * one,
        distance=arguments.distance * one,
        fov=arguments.fov * one,
    )
    picture = thing.render(cameras, arguments.size)
    background = torch.full((3,), arguments.background)
    wants_normals = "normal" in arguments.prompt.lower().split()
    draw = picture.normal_over if wants_normals else picture.over
    save_sheet(draw(background), arguments.output, arguments.columns, arguments.scale)
    print(f"Wrote {arguments.count} renders to {arguments.output}.")


def _at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"`{option} {value}` is too small: write {least} or more.")


def make_parser() -> argparse.ArgumentParser:
    """The options of all commands."""
    parser = argparse.ArgumentParser(
        prog="python -m systems.toybox", description=__doc__
    )
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("list", help="objects, colours and views")
    one = commands.add_parser("sample", help="draw a prompt with the prior")
    two = commands.add_parser("render", help="draw the truth of a prompt")
    for command, name in ((one, "samples.png"), (two, "renders.png")):
        command.add_argument("prompt", help='such as "a red mushroom, front view"')
        command.add_argument("--output", type=Path, default=Path("outputs") / name)
        command.add_argument("--count", type=int, default=4, help="pictures")
        command.add_argument("--columns", type=int, default=4, help="in a row")
        command.add_argument("--scale", type=int, default=4, help="enlargement")
    one.add_argument("--steps", type=int, default=25, help="DDIM steps")
    one.add_argument("--guidance-scale", type=float, default=3.0)
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--weights", type=Path, default=WEIGHTS, help="pipeline folder")
    two.add_argument("--size", type=int, default=64, help="pixels a side")
    two.add_argument("--azimuth", type=float, help="degrees; 0 is the front")
    two.add_argument("--elevation", type=float, help="degrees")
    two.add_argument("--distance", type=float, default=2.4)
    two.add_argument("--fov", type=float, default=50.0, help="degrees")
    two.add_argument("--background", type=float, default=0.75, help="grey, 0 to 1")
    return parser


def main() -> int:
    """Run a command; a user's mistake is one sentence and exit status 2."""
    arguments = make_parser().parse_args()
    try:
        if arguments.command == "list":
            show_list()
        else:
            parse(arguments.prompt)  # refuse before anything heavy is loaded
            _at_least("--columns", arguments.columns, 1)
            _at_least("--scale", arguments.scale, 1)
            {"sample": sample, "render": render}[arguments.command](arguments)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
