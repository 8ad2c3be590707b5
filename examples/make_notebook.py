"""Writes `prompt_to_glb.ipynb` and executes it.

    python -m examples.make_notebook [--steps 200] [--to examples/prompt_to_glb.ipynb]

The cells are kept here, as text that can be reviewed; the notebook holds their results.
"""

from __future__ import annotations

import argparse
import importlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "examples" / "prompt_to_glb.ipynb"

CELLS = (
    """# From a prompt to a mesh

The embedded prior makes an object on a bare CPU; nothing is downloaded. Run it in a
clone, with `pip install -e ".[systems]"`.""",
    """import os
from pathlib import Path

import torch

if not Path("configs").exists():  # started in examples/
    os.chdir("..")

import dreampropeller as dp
from systems import make_system

torch.set_num_threads(1)
system = make_system(
    "configs/dreamfusion-toybox.yaml",
    "system.prompt_processor.prompt=a red mushroom",
    "trainer.max_steps=STEPS",
    "data.n_test_views=8",
)""",
    """## Solve

The config's solver evaluates a window of eight steps per iteration. On one process the
gradients still follow one another, so this shows how few iterations there are, not how
fast they can be.""",
    """strides = []
solution = dp.solve(
    system.trajectory(),
    system.solver(),
    on_iteration=lambda state, iteration: strides.append(iteration.stride) and False,
)
stats = solution.stats
print(
    sum(strides),
    "steps in",
    stats.num_iterations,
    "iterations,",
    stats.num_evaluations,
    "gradients",
)""",
    """import matplotlib.pyplot as plt

figure, axes = plt.subplots(figsize=(6, 2.2))
axes.bar(range(1, len(strides) + 1), strides, color="#4878a8")
axes.set(xlabel="iteration", ylabel="steps accepted", ylim=(0, 8.5))
axes.spines[["top", "right"]].set_visible(False)
plt.show()""",
    """## Look at it""",
    """frames = list(system.turntable(solution.value, 4))
figure, rows = plt.subplots(1, 4, figsize=(8, 2.2))
for axes, frame in zip(rows, frames, strict=False):
    axes.imshow(frame.clamp(0, 1).permute(1, 2, 0))
    axes.axis("off")
plt.show()""",
    """## Export

The density whose silhouettes fit the rendered opacity becomes a mesh with a colour per
vertex. `mesh.glb` opens in Blender, in a game engine, or in a browser.""",
    """from systems.scene.mesh_files import save_mesh

mesh = system.mesh(solution.value)
paths = save_mesh(mesh, Path("outputs/notebook"))
print(len(mesh.faces), "faces:", ", ".join(path.name for path in paths))""",
)
"""Markdown and code; code is what holds no heading."""


def build(steps: int) -> Any:
    """The notebook, not yet executed."""
    new: Any = importlib.import_module("nbformat").v4
    cells = [
        new.new_markdown_cell(text, id=f"cell-{index}")
        if text.startswith("#")
        else new.new_code_cell(text.replace("STEPS", str(steps)), id=f"cell-{index}")
        for index, text in enumerate(CELLS)
    ]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    return new.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def execute(notebook: Any, folder: Path) -> Any:
    """Run every cell, in a folder; returns the notebook with its results."""
    path = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, path))
    client = importlib.import_module("nbclient").NotebookClient(
        notebook, timeout=1800, resources={"metadata": {"path": str(folder)}}
    )
    return client.execute()


def main(argv: Sequence[str] | None = None) -> None:
    """Build, execute, write."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--to", type=Path, default=NOTEBOOK)
    options = parser.parse_args(argv)
    done = execute(build(options.steps), ROOT)
    for cell in done.cells:
        cell.metadata.pop("execution", None)  # times differ in every run
        if cell.cell_type == "code":  # progress bars of loading
            cell.outputs = [o for o in cell.outputs if o.get("name") != "stderr"]
    done.metadata.pop("language_info", None)
    importlib.import_module("nbformat").write(done, options.to)


if __name__ == "__main__":
    main()
