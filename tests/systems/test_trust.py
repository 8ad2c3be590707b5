"""Files of strangers: read by libraries, bounded in size, and never executed."""

from __future__ import annotations

import ast
import json
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import trimesh
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

import dreampropeller as dp
from dreampropeller import checkpoint
from systems.images import LARGEST_IMAGE, open_image
from systems.scene.gaussians import ply
from systems.scene.mesh_files import load_glb, save_mesh
from systems.settings.reader import ConfigError
from systems.settings.yaml_files import open_yaml
from tests.helpers import tree_equal
from tests.systems.mutation import mutated

ROOT = Path(__file__).parent.parent.parent
SOURCES = [
    path
    for folder in ("dreampropeller", "systems", "benchmarks")
    for path in ROOT.glob(f"{folder}/**/*.py")
]


def calls(path: Path) -> Iterator[tuple[str, dict[str, str]]]:
    """Every call in a file: the dotted name, and its keywords as source."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            words = {k.arg or "**": ast.unparse(k.value) for k in node.keywords}
            yield ast.unparse(node.func), words


def test_nothing_unpickles_or_executes_what_a_file_holds() -> None:
    """`torch.save` for threestudio's own checkpoints only writes."""
    for path in SOURCES:
        for name, words in calls(path):
            assert name not in ("eval", "exec", "pickle.load", "pickle.loads"), path
            assert not name.startswith(("dill.", "cloudpickle.", "marshal.")), path
            if name == "torch.load":
                assert words.get("weights_only") == "True", path
            if name.endswith("np.load"):
                assert "allow_pickle" not in words, path
            assert name not in ("yaml.load", "yaml.unsafe_load"), path
            assert "trust_remote_code" not in words, path
            assert words.get("shell", "False") == "False", path


# --- files that promise more than they hold ------------------------------------------


def glb(tree: dict[str, Any], promised: int | None = None, size: int = 0) -> bytes:
    """A binary glTF whose header may lie about its own length and the file's."""
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    length = size or 20 + len(text)
    head = struct.pack("<4sII", b"glTF", 2, length)
    return head + struct.pack("<I4s", promised or len(text), b"JSON") + text


def png(width: int, height: int) -> bytes:
    """A tiny file that is decoded to `width` × `height` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = zlib.crc32(kind + content)
        return (
            struct.pack(">I", len(content)) + kind + content + struct.pack(">I", check)
        )

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(1 << 16))
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", body)


def header(size: int) -> bytes:
    """The first bytes of a safetensors file whose header has a size."""
    return struct.pack("<Q", size) + b"{}"


BILLION = {"accessors": [{"count": 10**9, "componentType": 5125, "type": "SCALAR"}]}
PLY = (
    "ply\nformat {} 1.0\nelement vertex {}\n"
    + "".join(
        f"property float {name}\n" for group in ply._FIELDS.values() for name in group
    )
    + "end_header\n"
)


@pytest.mark.parametrize(
    ("read", "content", "message"),
    [
        (load_glb, glb(BILLION), "1,000,000,000 vertices and corners.*Decimate"),
        (load_glb, glb({}, promised=2**32 - 1), "larger than a mesh may be"),
        (load_glb, glb({}, size=2**32 - 1), "larger than a mesh may be"),
        (load_glb, b"PK\3\4" + bytes(40), "is no binary glTF"),
        (load_glb, glb({"accessors": [{"count": -1}]}), "speaks of"),
        (open_image, png(10_000, 10_000), "10000 × 10000 pixels.*Scale it down"),
        (open_image, png(200_000, 200_000), "could be decompression bomb"),
        (open_image, b"GIF89a" + bytes(20), "write it again as PNG"),
        (ply.load, PLY.format("binary_little_endian", 10**8).encode(), "cut short"),
        (ply.load, PLY.format("ascii", 10**8).encode() + b"1 2 3\n", "cut short"),
        (ply.load, PLY.format("ascii", "9" * 5000).encode(), "5000 digits"),
        (checkpoint.load, header(10 * 2**30), "cannot be read"),
        (checkpoint.load, header(2**63), "cannot be read"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_promises_too_much_is_refused_at_once(
    read: Callable[[Path], Any], content: bytes, message: str, tmp_path: Path
) -> None:
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(content)
    begin = time.monotonic()
    with pytest.raises((ValueError, dp.CheckpointError), match=message):
        read(path)
    assert time.monotonic() - begin < 5


def test_a_large_image_below_the_bound_is_read(tmp_path: Path) -> None:
    side = 1200
    assert side * side < LARGEST_IMAGE
    Image.new("RGB", (side, side), (10, 20, 30)).save(tmp_path / "a.png")
    assert open_image(tmp_path / "a.png").size == (side, side)


def test_a_mesh_opens_no_file_beside_it(tmp_path: Path) -> None:
    """A reference to another file, which trimesh would read if it had a path."""
    secret = tmp_path / "secret.bin"
    secret.write_bytes(np.zeros((3, 3), "<f4").tobytes())
    tree = {
        "asset": {"version": "2.0"},
        "scene": 0,
        "scenes": [{"nodes": [0]}],
        "nodes": [{"mesh": 0}],
        "meshes": [{"primitives": [{"attributes": {"POSITION": 0}}]}],
        "buffers": [{"uri": "secret.bin", "byteLength": 36}],
        "bufferViews": [{"buffer": 0, "byteLength": 36}],
        "accessors": [
            {"bufferView": 0, "componentType": 5126, "count": 3, "type": "VEC3"}
        ],
    }
    path = tmp_path / "mesh.glb"
    path.write_bytes(glb(tree))
    with pytest.raises(ValueError, match="no mesh that was exported here"):
        load_glb(path)


# --- YAML is data ---------------------------------------------------------------------

BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 10)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("x: !!python/object/apply:os.system ['touch pwned']\n", "no YAML"),
        ("x: !!python/name:os.system\n", "no YAML"),
        (BOMB, "expands to .* values through its aliases"),
        ("a: " + "[" * 5000 + "]" * 5000, "too deeply|no YAML"),
        ("a: " + "x" * 2**20, "a config has at most"),
    ],
)
def test_a_config_is_data(
    text: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ConfigError, match=message):
        open_yaml(tmp_path / "a.yaml")
    assert not (tmp_path / "pwned").exists()


# --- mutated files --------------------------------------------------------------------


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("originals")
    mesh = trimesh.creation.box()
    look: Any = mesh.visual
    look.vertex_colors = np.tile([200, 100, 50, 255], (len(mesh.vertices), 1))
    save_mesh(mesh, folder)
    Image.new("RGB", (8, 6), (10, 20, 30)).save(folder / "image.png")
    generator = torch.Generator().manual_seed(0)
    shapes = {"means": (4, 3), "sh0": (4, 1, 3), "scales": (4, 3), "quats": (4, 4)}
    splats = {n: torch.randn(s, generator=generator) for n, s in shapes.items()}
    ply.save(folder / "splats.ply", {**splats, "opacities": torch.zeros(4)})
    state = dp.SolverState(3, {"x": torch.randn(5, generator=generator)}, [1, "a"])
    path = checkpoint.save(folder, state)
    (folder / "config.yaml").write_text("a: [1, 2]\nb: {c: &x 3, d: *x}\n")
    names = {
        "glb": "mesh.glb",
        "png": "image.png",
        "ply": "splats.ply",
        "checkpoint": path.name,
        "yaml": "config.yaml",
    }
    return {kind: (folder / name).read_bytes() for kind, name in names.items()}


READERS: dict[str, tuple[Callable[[Path], Any], type[Exception]]] = {
    "glb": (load_glb, ValueError),
    "png": (open_image, ValueError),
    "ply": (ply.load, ValueError),
    "checkpoint": (checkpoint.load, dp.CheckpointError),
    "yaml": (open_yaml, ConfigError),
}


def test_numbers_beyond_any_scene_are_clipped_or_refused(tmp_path: Path) -> None:
    """Found by the mutations below: one byte makes a colour of 10³⁸."""
    (path, _) = save_mesh(trimesh.creation.box(), tmp_path)
    content = path.read_bytes()
    whole: Any = load_glb(path)
    for name, offset in (("colour", 336), ("vertex", 144)):
        at = len(content) - 432 + offset
        path.write_bytes(content[:at] + struct.pack("<f", 1e38) + content[at + 4 :])
        if name == "colour":
            found: Any = load_glb(path)
            assert found.visual.vertex_colors[0, 0] == 255
            assert (
                found.visual.vertex_colors[1:] == whole.visual.vertex_colors[1:]
            ).all()
        else:
            with pytest.raises(ValueError, match="beyond any scene"):
                load_glb(path)


@pytest.mark.parametrize("kind", READERS)
@settings(
    max_examples=60,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_a_mutated_file_is_read_or_refused_in_one_sentence(
    kind: str, data: st.DataObject, originals: dict[str, bytes], tmp_path: Path
) -> None:
    """Bytes replaced, inserted and cut: the documented error, and no other."""
    path = tmp_path / "step-00000001.safetensors"
    path.write_bytes(mutated(originals[kind], data))
    read, error = READERS[kind]
    try:
        found = read(path)
    except error:
        return
    if kind == "checkpoint":  # it has checksums: read means unchanged
        original = path.with_name("step-00000002.safetensors")
        original.write_bytes(originals[kind])
        assert tree_equal(vars(found), vars(checkpoint.load(original)))
