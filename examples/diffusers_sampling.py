"""Sample from a diffusers pipeline many steps at a time, beside its own loop.

    python -m examples.diffusers_sampling "a blue mug, side view" --out outputs

The pipeline is the embedded prior; any StableDiffusionPipeline or IFPipeline goes into
the same call.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from dreampropeller.adapters.diffusers import sample
from systems.toybox import pipeline


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Sample, compare, and write both images side by side; returns the counts."""
    parser = argparse.ArgumentParser()
    parser.add_argument("prompt", nargs="?", default="a blue mug, side view")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--window", type=int, default=16)
    parser.add_argument("--tolerance", type=float, default=0.1)
    parser.add_argument("--out", type=Path, default=Path("outputs"))
    options = parser.parse_args(argv)
    prior = pipeline.load()
    arguments: dict[str, Any] = {"num_inference_steps": options.steps}
    found: list[Any] = []
    done: Any = prior(
        options.prompt, generator=torch.Generator().manual_seed(0), **arguments
    )
    own = done.images[0]
    ours = sample(
        prior,
        options.prompt,
        window=options.window,
        tolerance=options.tolerance,
        generator=torch.Generator().manual_seed(0),
        on_solution=found.append,
        **arguments,
    ).images[0]
    sheet = Image.new("RGB", (own.width + ours.width, own.height))
    sheet.paste(own, (0, 0))
    sheet.paste(ours, (own.width, 0))
    options.out.mkdir(parents=True, exist_ok=True)
    sheet.save(options.out / "diffusers_sampling.png")
    stats = found[0].stats
    print(
        f"{options.steps} steps in {stats.num_iterations} iterations, "
        f"{stats.num_evaluations} model outputs"
    )
    return {"iterations": stats.num_iterations, "own": own, "ours": ours}


if __name__ == "__main__":
    main()
