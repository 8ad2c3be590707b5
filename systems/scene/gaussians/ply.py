r"""Splats as ply files, in the layout of 3DGS that every viewer reads.

A vertex holds `x y z`, normals (unused), `f_dc_0…2` (the constant harmonic of the
channels), `f_rest_0…` (the others, channel by channel), `opacity` (a logit),
`scale_0…2` (logarithms) and `rot_0…3` (a quaternion w, x, y, z), all of them float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from dreampropeller.tree import State
from systems.files import written
from systems.scene.gaussians.harmonics import MAX_DEGREE, num_coefficients

_TYPES = {
    "char": "i1",
    "int8": "i1",
    "uchar": "u1",
    "uint8": "u1",
    "short": "i2",
    "int16": "i2",
    "ushort": "u2",
    "uint16": "u2",
    "int": "i4",
    "int32": "i4",
    "uint": "u4",
    "uint32": "u4",
    "float": "f4",
    "float32": "f4",
    "double": "f8",
    "float64": "f8",
}
_ORDERS = {"binary_little_endian": "<", "binary_big_endian": ">", "ascii": "="}
_FIELDS = {
    "means": ("x", "y", "z"),
    "sh0": ("f_dc_0", "f_dc_1", "f_dc_2"),
    "opacities": ("opacity",),
    "scales": ("scale_0", "scale_1", "scale_2"),
    "quats": ("rot_0", "rot_1", "rot_2", "rot_3"),
}
_LONGEST_HEADER = 1 << 16


@dataclass(frozen=True)
class _Header:
    order: str
    count: int
    row: np.dtype
    size: int  # bytes of the header

    @property
    def degree(self) -> int:
        rest = sum(name.startswith("f_rest_") for name in self.row.names or ())
        return round((rest / 3 + 1) ** 0.5) - 1


def save(path: Path, splats: State, normals: bool = True) -> None:
    """Write splats.

    Args:
        path: File name ending in ``.ply``.
        splats: The parameters by name.
        normals: Write the normals (zeros) that 3DGS's own files have; gsplat leaves
            them out.
    """
    columns: dict[str, Tensor] = {}
    for name, tensor in (("means", splats["means"]), ("sh0", splats["sh0"][:, 0])):
        columns |= dict(zip(_FIELDS[name], tensor.unbind(-1), strict=True))
        if name == "means" and normals:
            columns |= dict.fromkeys(("nx", "ny", "nz"), tensor.new_zeros(len(tensor)))
    if "shN" in splats:
        rest = splats["shN"].mT.flatten(1).unbind(-1)
        columns |= {f"f_rest_{i}": column for i, column in enumerate(rest)}
    columns["opacity"] = splats["opacities"]
    for name in ("scales", "quats"):
        columns |= dict(zip(_FIELDS[name], splats[name].unbind(-1), strict=True))
    rows = torch.stack(list(columns.values()), -1).detach().float().cpu().numpy()
    header = "\n".join(
        [
            "ply",
            "format binary_little_endian 1.0",
            f"element vertex {len(rows)}",
            *(f"property float {name}" for name in columns),
            "end_header\n",
        ]
    )
    with written(path) as part:
        part.write_bytes(header.encode() + rows.astype("<f4").tobytes())


def describe(path: Path) -> tuple[int, int]:
    """Number of splats in a file, and the degree of their harmonics.

    Raises:
        ValueError: The file holds no splats; the message says what is missing.
    """
    header = _read_header(path)
    return header.count, header.degree


def load(path: Path) -> State:
    """Read splats of any degree, with fields in any order; other fields are ignored.

    Raises:
        ValueError: The file cannot be used; the message says why.
    """
    header = _read_header(path)
    if header.order == "=":
        table = _read_text(path, header)
    else:
        with open(path, "rb") as file:
            file.seek(header.size)
            data = file.read(header.count * header.row.itemsize)
        table = np.frombuffer(data, header.row)

    def columns(names: tuple[str, ...]) -> Tensor:
        rows = np.stack([np.asarray(table[name], np.float32) for name in names], -1)
        return torch.from_numpy(rows)

    splats = {name: columns(fields) for name, fields in _FIELDS.items()}
    splats["opacities"] = splats["opacities"][:, 0]
    splats["sh0"] = splats["sh0"][:, None]
    more = num_coefficients(header.degree) - 1
    if more:
        rest = columns(tuple(f"f_rest_{i}" for i in range(3 * more)))
        splats["shN"] = rest.unflatten(-1, (3, more)).mT.contiguous()
    for name, value in splats.items():
        bad = ~torch.isfinite(value).flatten(1 if value.ndim > 1 else 0)
        rows = bad.any(-1) if bad.ndim > 1 else bad
        if rows.any():
            raise ValueError(
                f"`{path}` holds numbers that are not finite: `{name}` of splat "
                f"{int(rows.nonzero()[0])} and {int(rows.sum()) - 1} others. Remove "
                "these splats, for example in a splat editor."
            )
    empty = splats["quats"].square().sum(-1) == 0
    if empty.any():
        raise ValueError(
            f"`{path}` holds {int(empty.sum())} splats whose rotation is zero: write "
            "`rot_0` 1 for a splat that is not rotated."
        )
    return splats


def _read_header(path: Path) -> _Header:
    """The header, checked against what is needed and against the file's size."""
    if not path.is_file():
        raise ValueError(
            f"There is no file `{path}`: name a ply of splats, "
            "`system.geometry.initial=splats.ply`."
        )
    with open(path, "rb") as file:
        start = file.read(_LONGEST_HEADER)
    end = start.find(b"end_header")
    if not start.startswith(b"ply") or end < 0:
        raise ValueError(
            f"`{path}` is no ply file: it has to begin with `ply` and a header that "
            "ends in `end_header`. Export the splats as ply (3DGS layout)."
        )
    after = start.find(b"\n", end)
    lines = start[:end].decode("ascii", "replace").splitlines()
    words = [line.split() for line in lines if line.split()]
    order = next((w[1] for w in words if w[0] == "format" and len(w) > 1), "none")
    if order not in _ORDERS:
        raise ValueError(
            f"`{path}` has the format `{order}`: it has to be one of "
            f"{', '.join(_ORDERS)}."
        )
    count, fields = _vertices(path, words, _ORDERS[order])
    row = np.dtype(fields)
    size = (after if after >= 0 else end + 10) + 1
    here = path.stat().st_size - size
    if order != "ascii" and here < count * row.itemsize:
        raise ValueError(
            f"`{path}` is cut short: its header speaks of {count:,} splats of "
            f"{row.itemsize} bytes, and {max(here, 0):,} bytes follow. Export it again."
        )
    return _Header(_ORDERS[order], count, row, size)


def _vertices(
    path: Path, words: list[list[str]], order: str
) -> tuple[int, list[tuple[str, str]]]:
    """The number of vertices, and their fields with types."""
    elements = [i for i, word in enumerate(words) if word[0] == "element"]
    first = words[elements[0]] if elements else ["", "", ""]
    if len(first) < 3 or first[1] != "vertex" or not first[2].isdigit():
        raise ValueError(
            f"`{path}` does not begin with its vertices (`element vertex …`), where "
            "splats have to be: compressed and mesh files cannot be used. Export the "
            "splats as an uncompressed ply (3DGS layout)."
        )
    last = elements[1] if len(elements) > 1 else len(words)
    fields: list[tuple[str, str]] = []
    for word in words[elements[0] + 1 : last]:
        if word[0] != "property":
            continue
        if len(word) != 3 or word[1] not in _TYPES:
            raise ValueError(
                f"`{path}` has a field `{' '.join(word)}`, which splats do not have: "
                "export the splats as an uncompressed ply (3DGS layout)."
            )
        fields.append((word[2], order + _TYPES[word[1]]))
    names = [name for name, _ in fields]
    needed = [name for group in _FIELDS.values() for name in group]
    missing = [name for name in needed if name not in names]
    if missing:
        raise ValueError(
            f"`{path}` holds no splats: it has no "
            f"{', '.join(f'`{name}`' for name in missing)}. Each vertex needs x y z, "
            "f_dc_0…2, opacity, scale_0…2 and rot_0…3 (3DGS layout)."
        )
    if len(set(names)) < len(names):
        raise ValueError(f"`{path}` names a field twice: export it again.")
    rest = sum(name.startswith("f_rest_") for name in names)
    degrees = {3 * num_coefficients(n) - 3: n for n in range(MAX_DEGREE + 1)}
    if rest not in degrees or any(f"f_rest_{i}" not in names for i in range(rest)):
        raise ValueError(
            f"`{path}` has {rest} fields `f_rest_…`: harmonics of degree 0 to 3 have "
            "0, 9, 24 or 45, counted from 0."
        )
    if len(first[2]) > 9:  # Python reads no number of thousands of digits
        raise ValueError(
            f"`{path}` speaks of a number of splats with {len(first[2])} digits: at "
            "most 999,999,999 are read."
        )
    if int(first[2]) == 0:
        raise ValueError(f"`{path}` holds no splats: its header says 0.")
    return int(first[2]), fields


def _read_text(path: Path, header: _Header) -> np.ndarray:
    with open(path, "rb") as file:
        file.seek(header.size)
        lines = file.read().decode("ascii", "replace").splitlines()[: header.count]
    if len(lines) < header.count:
        raise ValueError(
            f"`{path}` is cut short: its header speaks of {header.count:,} splats, and "
            f"{len(lines):,} lines follow. Export it again."
        )
    try:
        rows = np.array([line.split() for line in lines], np.float64)
        return np.rec.fromarrays(rows.T, dtype=header.row)
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"`{path}` cannot be read as numbers ({error}): export it again."
        ) from error
