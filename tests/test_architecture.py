"""The wings stay apart: what each room may import, read from the source."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "dreampropeller"
LIBRARIES = {
    "torch",
    "numpy",
    "omegaconf",
    "jaxtyping",
    "safetensors",
    "tqdm",
    "rich",
}
# From the bottom up: a room imports rooms before it.
ROOMS = [
    "tree",
    "rng",
    "timer",
    "arguments",
    "guard",
    "trajectory",
    "anderson",
    "optimizers",
    "precision",
    "optimization",
    "predictor",
    "window",
    "threshold",
    "drift_threshold",
    "secant",
    "solution",
    "dispatch.base",
    "dispatch.batched",
    "dispatch.devices",
    "dispatch.wire",
    "dispatch.distributed",
    "dispatch.launcher",
    "solver",
    "picard",
    "calibration",
    "checkpoint",
]
# The second wing: a file imports the core and files before it; the core never imports
# it. Heavy packages are imported inside functions, if at all.
ADAPTERS = [
    "adapters.attributes",
    "adapters.loop",
    "adapters.optimization",
    "adapters.refusals",
    "adapters.lightning",
    "adapters.verification",
    "adapters.lift3d",
    "adapters.growing",
    "adapters.threestudio",
    "adapters.sampling",
    "adapters.diffusers",
]
# The workspace, likewise; `toybox` knows its cameras and nothing else of it.
WORKSPACE = [
    "settings.checks",
    "settings.schedules",
    "settings.reader",
    "settings.config",
    "settings",
    "scene.cameras",
    "extras",
    "images",
    "toybox",
    "scene.networks",
    "scene.isosurface",
    "scene.fields.base",
    "scene.fields.voxel_grid",
    "scene.fields.hash_grid",
    "scene.fields",
    "scene.materials",
    "scene.backgrounds",
    "scene.renderers.occupancy",
    "scene.renderers.volume",
    "scene.gaussians.harmonics",
    "scene.gaussians.shapes",
    "scene.renderers.splats",
    "scene.gaussians.ply",
    "scene.gaussians.splats",
    "scene.gaussians.growth",
    "scene.gaussians.relocation",
    "scene.gaussians.density",
    "scene.gaussians.scene",
    "scene.gaussians.trajectory",
    "scene.gaussians",
    "scene.renderers",
    "scene.scene",
    "scene",
    "guidance.prompts",
    "guidance.priors",
    "guidance.sds",
    "guidance",
    "optimizer",
    "base",
    "dreamfusion",
    "dreamgaussian",
    "quality.clip",
    "quality.truth",
    "quality",
    "runs.folders",
    "runs.stopping",
    "runs.recorder",
    "runs.results",
    "runs.workers",
    "runs.report.runs",
    "runs.report.figures",
    "runs.report.curves",
    "runs.report.page",
    "runs.report",
    "runs.compare",
    "sampling",
    "threestudio.config",
    "threestudio.checkout",
    "threestudio.recorder",
    "threestudio.training",
    "threestudio",
    "runs",
]


def room(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def imports(path: Path) -> Iterator[str]:
    """Modules imported when the file is run; what only a type checker sees is out."""
    todo: list[ast.AST] = [ast.parse(path.read_text())]
    while todo:
        node = todo.pop()
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            module = node.module or ""
            inner = [f"{module}.{alias.name}" for alias in node.names]
            files = [
                ROOT.joinpath(*name.split(".")).with_suffix(".py") for name in inner
            ]
            yield from (
                name if file.exists() else module
                for name, file in zip(inner, files, strict=True)
            )
        todo.extend(ast.iter_child_nodes(node))


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.name != "__init__.py")
CORE = [path for path in FILES if not room(path).startswith("adapters.")]
ADAPTED = [path for path in FILES if path not in CORE]


def test_every_room_of_the_package_has_its_place() -> None:
    assert sorted(ROOMS) == sorted(room(path) for path in CORE)
    assert sorted(ADAPTERS) == sorted(room(path) for path in ADAPTED)


@pytest.mark.parametrize("path", ADAPTED, ids=room)
def test_adapters_import_the_core_and_listed_libraries(path: Path) -> None:
    below = [*ROOMS, *ADAPTERS[: ADAPTERS.index(room(path))]]
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "dreampropeller":
            inside = name.removeprefix("dreampropeller").removeprefix(".")
            assert inside in [*below, "dispatch", ""], name
        else:
            assert top in LIBRARIES or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", CORE, ids=room)
def test_core_room_imports_only_lower_rooms_and_listed_libraries(path: Path) -> None:
    below = ROOMS[: ROOMS.index(room(path))]
    for name in imports(path):
        top = name.partition(".")[0]
        if top == "dreampropeller":
            assert name.removeprefix("dreampropeller.") in [*below, "dispatch"], name
        else:
            assert top in LIBRARIES or top in sys.stdlib_module_names, name


@pytest.mark.parametrize("path", FILES, ids=room)
def test_room_is_small(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 400


def workspace_room(path: Path) -> str:
    name = ".".join(path.relative_to(ROOT / "systems").with_suffix("").parts)
    name = name.removesuffix(".__init__")
    return "toybox" if name.startswith("toybox") else name


SYSTEMS = sorted(
    path
    for path in (ROOT / "systems").rglob("*.py")
    if path != ROOT / "systems" / "__init__.py"
)


@pytest.mark.parametrize("path", SYSTEMS, ids=lambda p: str(p.relative_to(ROOT)))
def test_workspace_room_imports_only_lower_rooms(path: Path) -> None:
    own = workspace_room(path)
    below = [*WORKSPACE[: WORKSPACE.index(own)], *(["toybox"] * (own == "toybox"))]
    for name in imports(path):
        top, _, rest = name.partition(".")
        assert top not in ("launch", "tests", "benchmarks"), name
        if top == "systems" and rest:
            lower = "toybox" if rest.startswith("toybox") else rest
            assert lower in below, name


def test_heavy_libraries_are_not_loaded_by_the_core() -> None:
    import subprocess

    code = (
        "import sys, dreampropeller, dreampropeller.adapters.diffusers; "
        "print([n for n in ('diffusers', 'transformers', 'lightning', 'ray', 'systems')"
        " if n in sys.modules])"
    )
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True).strip() == "[]"
