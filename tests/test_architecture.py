"""The layers stay apart: what each may import, read from the source."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LIBRARIES = {"torch", "numpy", "omegaconf", "jaxtyping", "safetensors", "tqdm", "rich"}
"""What the package may import at the top of a file; heavier ones inside functions."""
SCIENCE = {"scipy", "sklearn", "joblib", "threadpoolctl"}
"""What the extra `mixtures` brings."""

LAYERS = {
    "states": "dreampropeller/{tree,rng,shards,timer,checks,buffers,guard,identity,"
    "allocator,strides}.py",
    "problem": "dreampropeller/{trajectory,optim*,*_loss,loss_gradient,leaves,"
    "precision,host,attributes,lending,verification,module_check,reachable,counters,"
    "count_check,clipping,generators,belongings,leftovers,differential}.py",
    "control": "dreampropeller/{component,rollout,carries,window,predictor,"
    "secants,*threshold}.py dreampropeller/acceleration/*",
    "dispatch": "dreampropeller/dispatch/*",
    "solver": "dreampropeller/*.py",
    "adapters": "dreampropeller/{adapters,mixtures}/*",
    "settings": "systems/settings/* systems/{extras,images,files}.py",
    "scene": "systems/{scene,references}/* systems/optimizer.py",
    "guidance": "systems/{toybox,guidance}/*",
    "systems": "systems/*.py systems/quality/*",
    "runs": "systems/{runs,threestudio}/* systems/sampling.py",
    "front": "launch.py",
}
"""From the bottom up. A file belongs where its name fits best (the longest pattern) and
imports its own layer and those before it."""


def expand(patterns: str) -> Iterator[str]:
    """Write out braces."""
    for pattern in patterns.split():
        head, brace, rest = pattern.partition("{")
        inner, _, tail = rest.partition("}")
        yield from (head + one + tail for one in inner.split(",")) if brace else [head]


def layer(path: Path) -> int:
    """The number of a file's layer, from the bottom."""
    name = str(path.relative_to(ROOT))
    fits = [
        (len(pattern), number)
        for number, patterns in enumerate(LAYERS.values())
        for pattern in expand(patterns)
        if fnmatch(name, pattern)
    ]
    assert fits, f"`{name}` belongs to no layer"
    return max(fits)[1]


def module(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(
        ".__init__"
    )


FILES = sorted(
    path
    for pattern in ("dreampropeller/**/*.py", "systems/**/*.py", "launch.py")
    for path in ROOT.glob(pattern)
    # The list of public names is above all that it names.
    if path != ROOT / "dreampropeller" / "__init__.py"
)
MODULES = {module(path): path for path in FILES}
PACKAGE = [path for path in FILES if "dreampropeller" in path.parts[len(ROOT.parts) :]]


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
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in MODULES else node.module or ""
        todo.extend(ast.iter_child_nodes(node))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_a_file_imports_its_own_layer_and_lower_ones(path: Path) -> None:
    names = list(LAYERS)
    for name in imports(path):
        assert name.partition(".")[0] not in ("launch", "tests", "benchmarks"), name
        if name in MODULES:
            above = layer(MODULES[name]) > layer(path)
            assert not above, f"`{names[layer(path)]}` imports `{name}`"


def test_no_import_goes_round_in_a_circle() -> None:
    graph = {name: {n for n in imports(path)} for name, path in MODULES.items()}
    for name, inside in graph.items():  # a package's own list of names is above it
        inside -= {package for package in inside if name.startswith(f"{package}.")}
    list(TopologicalSorter(graph).static_order())  # raises and names the circle


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_the_package_imports_itself_and_listed_libraries(path: Path) -> None:
    for name in imports(path):
        top = name.partition(".")[0]
        allowed = top in LIBRARIES or top in sys.stdlib_module_names
        allowed |= top in SCIENCE and "mixtures" in path.parts
        assert allowed or name in MODULES, name


@pytest.mark.parametrize("path", PACKAGE, ids=name_of)
def test_files_and_functions_of_the_package_are_short(path: Path) -> None:
    source = path.read_text()
    assert len(source.splitlines()) <= 400
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef):
            body = node.body[ast.get_docstring(node) is not None :]
            last = body[-1].end_lineno or 0 if body else 0
            length = last - body[0].lineno + 1 if body else 0
            most = 40 if node.name == "iterate" else 45
            assert length <= most, f"`{node.name}` has {length} lines"


@pytest.mark.parametrize(
    ("modules", "heavy"),
    [
        (
            "dreampropeller, dreampropeller.adapters.diffusers",
            "diffusers transformers lightning ray systems torch._dynamo",
        ),
        # `launch.py --help` and every refusal wait for what it loads.
        ("launch", "diffusers transformers matplotlib trimesh torch._dynamo"),
    ],
)
def test_heavy_libraries_are_not_loaded_at_once(modules: str, heavy: str) -> None:
    names = heavy.split()
    code = f"import sys, {modules}; print([n for n in {names} if n in sys.modules])"
    run = [sys.executable, "-c", code]
    assert subprocess.check_output(run, text=True).strip() == "[]"
