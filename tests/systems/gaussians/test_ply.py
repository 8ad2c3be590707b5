"""Files of splats: the layout of 3DGS, read in any order, refused in a sentence."""

from __future__ import annotations

import base64
import re
from pathlib import Path

import gsplat
import pytest
import torch

from dreampropeller.tree import State
from systems.scene.gaussians import ply, splats, viewer
from systems.scene.gaussians.splats import GaussianConfig, Gaussians
from tests.helpers import tree_equal


def some(degree: int, count: int = 7) -> State:
    generator = torch.Generator().manual_seed(degree)
    shapes = {"means": (3,), "scales": (3,), "quats": (4,), "opacities": ()}
    shapes |= {"sh0": (1, 3), "shN": ((degree + 1) ** 2 - 1, 3)}
    return {
        name: torch.randn(count, *shape, generator=generator)
        for name, shape in shapes.items()
        if 0 not in shape
    }


@pytest.mark.parametrize("degree", [0, 1, 2, 3])
def test_a_file_gives_back_the_splats(degree: int, tmp_path: Path) -> None:
    ply.save(tmp_path / "a.ply", some(degree))
    assert ply.describe(tmp_path / "a.ply") == (7, degree)
    assert tree_equal(
        dict(sorted(ply.load(tmp_path / "a.ply").items())),
        dict(sorted(some(degree).items())),
    )
    assert [path.name for path in tmp_path.iterdir()] == ["a.ply"]


@pytest.mark.parametrize("degree", [0, 3])
def test_a_file_is_byte_for_byte_what_gsplat_writes(
    degree: int, tmp_path: Path
) -> None:
    written = some(degree)
    ours, theirs = tmp_path / "ours.ply", tmp_path / "theirs.ply"
    ply.save(ours, written, normals=False)
    arguments = {"shN": torch.zeros(7, 0, 3), **written}
    gsplat.export_splats(**arguments, format="ply", save_to=str(theirs))
    assert ours.read_bytes() == theirs.read_bytes()
    # With the normals that 3DGS itself writes there is one more field, in its place.
    ply.save(ours, written)
    assert b"property float z\nproperty float nx\nprop" in ours.read_bytes()[:200]


def as_text(written: State, names: list[str]) -> str:
    table = {"x": written["means"][:, 0], "y": written["means"][:, 1]}
    table |= {"z": written["means"][:, 2], "opacity": written["opacities"]}
    table |= {f"f_dc_{i}": written["sh0"][:, 0, i] for i in range(3)}
    table |= {f"scale_{i}": written["scales"][:, i] for i in range(3)}
    table |= {f"rot_{i}": written["quats"][:, i] for i in range(4)}
    table |= {"extra": torch.zeros(7)}
    lines = [" ".join(repr(float(table[n][row])) for n in names) for row in range(7)]
    fields = "\n".join(f"property float {name}" for name in names)
    head = f"ply\nformat ascii 1.0\nelement vertex 7\n{fields}\nend_header\n"
    return head + "\n".join(lines) + "\n"


NAMES = [f"rot_{i}" for i in (3, 0, 1, 2)]
NAMES += ["opacity", "extra", "z", "y", "x", "scale_2", "scale_0", "scale_1"]
NAMES += ["f_dc_2", "f_dc_1", "f_dc_0"]


def test_fields_are_found_by_name_in_text_too(tmp_path: Path) -> None:
    path = tmp_path / "a.ply"
    path.write_text(as_text(some(0), NAMES))
    assert all(torch.equal(ply.load(path)[n], v) for n, v in some(0).items())


def test_a_lower_degree_is_filled_up_and_a_higher_one_is_refused(
    tmp_path: Path,
) -> None:
    path = tmp_path / "a.ply"
    ply.save(path, some(1))
    made = Gaussians(GaussianConfig(initial=str(path), sh_degree=2))
    assert made.harmonics.shape == (7, 9, 3)
    assert torch.equal(made.harmonics[:, 1:4], some(1)["shN"])
    assert not made.harmonics[:, 4:].any()
    assert Gaussians(GaussianConfig(initial=str(path))).harmonics.shape == (7, 4, 3)
    with pytest.raises(ValueError, match=r"write `system\.geometry\.sh_degree=1`"):
        Gaussians(GaussianConfig(initial=str(path), sh_degree=0))


def spoilt(path: Path, how: str) -> None:
    written = some(1)
    if how == "nan":
        written["scales"][3, 1] = torch.nan
    if how == "rotation":
        written["quats"][2] = 0
    ply.save(path, written)
    data = path.read_bytes()
    changes = {
        "no ply": (b"ply\n", b"glb\n"),
        "no end": (b"end_header", b"End_header"),
        "format": (b"binary_little_endian", b"binary_middle_endian"),
        "field": (b"opacity", b"opacify"),
        "harmonics": (b"property float f_rest_8\n", b"property float rest_8888\n"),
        "list": (b"property float nx", b"property list nx"),
        "empty": (b"vertex 7", b"vertex 0"),
        "many": (b"vertex 7", b"vertex 999999999999"),
        "mesh": (b"element vertex", b"element chunk"),
    }
    path.write_bytes(data.replace(*changes.get(how, (b"", b""))))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("no ply", "is no ply file: it has to begin with `ply`"),
        ("no end", "header that ends in `end_header`"),
        ("format", "has the format `binary_middle_endian`: it has to be one of"),
        ("field", "holds no splats: it has no `opacity`. Each vertex needs"),
        ("harmonics", "has 8 fields `f_rest_…`: harmonics of degree 0 to 3 have"),
        ("list", "has a field `property list nx`, which splats do not have"),
        ("empty", "holds no splats: its header says 0"),
        ("many", "speaks of a number of splats with 12 digits: at most"),
        ("mesh", "does not begin with its vertices"),
        ("nan", "not finite: `scales` of splat 3 and 0 others. Remove"),
        ("rotation", "1 splats whose rotation is zero: write `rot_0` 1"),
    ],
)
def test_bad_files_are_refused_in_a_sentence(
    how: str, message: str, tmp_path: Path
) -> None:
    spoilt(tmp_path / "a.ply", how)
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        ply.load(tmp_path / "a.ply")


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"There is no file .*initial=splats\.ply"):
        ply.load(tmp_path / "none.ply")


def test_more_splats_than_memory_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.ply"
    ply.save(path, some(0))
    with pytest.raises(ValueError, match=r"holds 7 splats and `system\.geo"):
        Gaussians(GaussianConfig(initial=str(path), max_splats=6))
    monkeypatch.setattr(splats.os, "sysconf", lambda name: 10 if "PAGES" in name else 9)
    with pytest.raises(ValueError, match=r"at most 0 fit\. Thin the file out"):
        Gaussians(GaussianConfig(initial=str(path)))
    with pytest.raises(ValueError, match=r"a smaller `system\.geometry\.num_splats`"):
        Gaussians(GaussianConfig(num_splats=50))


def test_the_page_holds_the_most_opaque_splats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(viewer, "MOST", 4)
    written = some(1)
    viewer.write(tmp_path / "a.html", written, "a <red> mug")
    page = (tmp_path / "a.html").read_text()
    assert "a &lt;red&gt; mug: 4 splats" in page
    (data,) = re.findall(r'atob\("([A-Za-z0-9+/=]+)"\)', page)
    rows = torch.frombuffer(bytearray(base64.b64decode(data)), dtype=torch.float32)
    best = written["opacities"].topk(4).indices
    assert torch.equal(rows.view(4, 8)[:, :3], written["means"][best])
    assert torch.equal(rows.view(4, 8)[:, 6], written["opacities"][best].sigmoid())
