r"""How good a mesh is: bodies, and volume and surface against the ground truth.

With the solid M that a mesh encloses and the ground truth $M^* = \{d < 0\}$ of signed
distance d,

$$\mathrm{IoU}_{3D} = |M \cap M^*| / |M \cup M^*|,$$

counted over the points of a grid. With N points drawn evenly from each surface,

$$\mathrm{CD} = \frac{1}{2N} \sum_{x \in S} \min_{y \in S^*} \|x - y\|
  + \frac{1}{2N} \sum_{y \in S^*} \min_{x \in S} \|x - y\|$$

is the Chamfer distance (H. Fan et al., 2017, arXiv 1612.00603, Eq. 1, here of
unsquared distances), in units of the scene: objects fit the ball of radius 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from systems.scene.zbuffer import covered
from systems.toybox.render import RADIUS
from systems.toybox.truth import Truth

GRID = 96
"""Points a side of the grid that volumes are counted on."""
SAMPLES = 50_000
"""Points drawn from each surface: 0.005 apart on average, the floor of the distance."""


@dataclass(frozen=True)
class MeshQuality:
    """Figures of a mesh.

    Attributes:
        bodies: Connected pieces.
        faces: Triangles.
        watertight: Whether every edge has two faces.
        volume: What it encloses, in units of the scene.
        level: The density at the surface; None: unknown.
        iou_3d: With the ground truth, from 0 to 1; None: there is none.
        chamfer: From the ground truth's surface; None: there is none.
    """

    bodies: int
    faces: int
    watertight: bool
    volume: float
    level: float | None = None
    iou_3d: float | None = None
    chamfer: float | None = None

    def figures(self) -> dict[str, Any]:
        """The numbers, rounded; what is unknown is left out."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in vars(self).items()
            if value is not None
        }


def measure_mesh(mesh: Any, wanted: Truth | None = None) -> MeshQuality:
    """Measure a mesh (z up) by itself and against the ground truth.

    Args:
        mesh: A `trimesh.Trimesh`.
        wanted: The ground truth, if there is one.
    """
    level = mesh.metadata.get("level")
    return MeshQuality(
        bodies=int(mesh.body_count),
        faces=len(mesh.faces),
        watertight=bool(mesh.is_watertight),
        volume=float(mesh.volume),
        level=None if level is None else float(level),
        iou_3d=None if wanted is None else volume_iou(mesh, wanted),
        chamfer=None if wanted is None else chamfer(mesh, wanted),
    )


def volume_iou(mesh: Any, wanted: Truth, resolution: int = GRID) -> float:
    """Intersection over union of the solids."""
    points = _grid(resolution)
    inside = enclosed(mesh, points)
    grid = np.stack(np.meshgrid(points, points, points, indexing="ij"), -1)
    should = (wanted.sdf(torch.from_numpy(grid).float()) < 0).numpy()
    return float((inside & should).sum() / max(1, (inside | should).sum()))


def enclosed(mesh: Any, points: np.ndarray) -> np.ndarray:
    """Which points of a grid a closed mesh encloses.

    Those with a positive winding number along z: the faces above that look up, less
    those that look down.

    Args:
        mesh: Faces outwards.
        points: Evenly spaced coordinates along each axis, shape ``(side,)``.

    Returns:
        Shape ``(side, side, side)``, axes x, y, z.
    """
    side, spacing = len(points), points[1] - points[0]
    corners = np.asarray(mesh.vertices)[np.asarray(mesh.faces)]
    flat = (corners[..., :2] - points[0]) / spacing + 0.5  # points at pixel centres
    edge, other = flat[:, 1] - flat[:, 0], flat[:, 2] - flat[:, 0]
    sign = np.sign(edge[:, 0] * other[:, 1] - edge[:, 1] * other[:, 0])
    winding = np.zeros((side, side, side + 1))
    for face, y, x, bary in covered(flat, side, side):
        z = (corners[face, :, 2] * bary).sum(-1)
        # A crossing counts for every grid point below it.
        below = np.ceil((z - points[0]) / spacing).clip(0, side).astype(np.int64)
        np.add.at(winding, (x, y, below), sign[face])
    return winding[..., ::-1].cumsum(-1)[..., ::-1][..., 1:] > 0.5


def chamfer(mesh: Any, wanted: Truth, samples: int = SAMPLES) -> float:
    """Mean distance between the two surfaces, both ways; the same each time."""
    import trimesh
    from scipy.spatial import KDTree

    right = wanted.mesh()
    other = trimesh.Trimesh(right.vertices.numpy(), right.faces.numpy(), process=False)
    a, b = (
        np.asarray(trimesh.sample.sample_surface(surface, samples, seed=0)[0])
        for surface in (mesh, other)
    )
    there, back = KDTree(b).query(a)[0], KDTree(a).query(b)[0]
    return float((there.mean() + back.mean()) / 2)


def _grid(resolution: int) -> np.ndarray:
    """Off the mesh's own grid, whose points lie on edges of faces."""
    cells = (np.arange(resolution) + 0.5) / resolution * 2 - 1
    return cells * RADIUS * 1.0007 + 1.7e-4
