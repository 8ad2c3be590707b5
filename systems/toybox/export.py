"""Write the averaged weights of a training state as a pipeline folder, half precision.

`python -m systems.toybox.export --state outputs/toybox/state.pt --to FOLDER`
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from systems.toybox import WEIGHTS
from systems.toybox.model import make_scheduler, make_tokenizer
from systems.toybox.pipeline import ToyboxPipeline
from systems.toybox.train import Denoiser


def export(state_file: Path, folder: Path) -> int:
    """Write the pipeline folder.

    Args:
        state_file: What `systems.toybox.train` wrote.
        folder: Where the pipeline goes.

    Returns:
        The number of training steps behind the weights.
    """
    state = torch.load(state_file, weights_only=True)
    model = Denoiser()
    model.load_state_dict(state["average"])
    model = model.half()
    ToyboxPipeline(
        unet=model.unet,
        text_encoder=model.text_encoder,
        tokenizer=make_tokenizer(),
        scheduler=make_scheduler(),
    ).save_pretrained(folder, safe_serialization=True)
    return state["step"]


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--state", type=Path, default=Path("outputs/toybox/state.pt"))
    parser.add_argument("--to", type=Path, default=WEIGHTS)
    arguments = parser.parse_args()
    steps = export(arguments.state, arguments.to)
    size = sum(f.stat().st_size for f in arguments.to.rglob("*") if f.is_file())
    print(f"{arguments.to}: {steps} steps, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
