"""A system of an unmodified threestudio checkout, solved with a window of steps.

    THREESTUDIO_ROOT=<checkout> python -m examples.threestudio_system "a pineapple"

Runs in threestudio's own environment, on a GPU. Without a checkout it says what is
missing and ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path


def why_not(root: str | None) -> str:
    """Why the example cannot run here; empty if it can."""
    if root is None:
        return (
            "threestudio is not here: write `THREESTUDIO_ROOT=<checkout>`, a clone of "
            "https://github.com/threestudio-project/threestudio that trains by itself."
        )
    if not (Path(root) / "threestudio").is_dir():
        return f"`THREESTUDIO_ROOT` is `{root}`, which holds no folder `threestudio`."
    return ""


def main(argv: Sequence[str] | None = None) -> int:
    """Train the checkout's `dreamfusion-sd.yaml`; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    prompt, *settings = words or ["a pineapple"]
    root = os.environ.get("THREESTUDIO_ROOT")
    reason = why_not(root)
    if root is None or reason:
        print(f"Skipped: {reason}")
        return 0
    os.chdir(root)  # threestudio reads `load/` and `custom/` from here
    sys.path.insert(0, root)

    import threestudio  # pyright: ignore[reportMissingImports]
    from threestudio.utils.config import (  # pyright: ignore[reportMissingImports]
        load_config,
    )

    from dreampropeller.adapters.threestudio import accelerate

    config = load_config(
        "configs/dreamfusion-sd.yaml",
        cli_args=[f"system.prompt_processor.prompt={prompt}", *settings],
    )
    data = threestudio.find(config.data_type)(config.data)
    system = threestudio.find(config.system_type)(config.system)
    solution = accelerate(
        system, data, num_steps=config.trainer.max_steps, window=8, config=config
    )
    stats = solution.stats
    print(f"{solution.state.step} steps in {stats.num_iterations} iterations")
    return 0


if __name__ == "__main__":  # threestudio embeds prompts in a process of its own
    sys.exit(main())
