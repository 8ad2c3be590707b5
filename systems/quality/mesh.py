r"""Quality of a mesh: bodies, and volume and surface against the ground truth.

With the solid M that a mesh encloses and the ground truth $M^* = \{d < 0\}$ of signed
distance d,

$$\mathrm{IoU}_{3D} = |M \cap M^*| / |M \cup M^*|,$$

counted over the points of a grid. With N points drawn uniformly from each surface,

$$\mathrm{CD} = \frac{1}{2N} \sum_{x \in S} \min_{y \in S^*} \|x - y\|
  + \frac{1}{2N} \sum_{y \in S^*} \min_{x \in S} \|x - y\|$$

is the Chamfer distance (H. Fan et al., 2017, arXiv 1612.00603, Eq. 1, here of
unsquared distances), in units of the scene: objects fit the ball of radius 1. The
normal error is the angle between the normals of these nearest pairs, in the same mean.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from systems.scene.meshes.cleaning import weld
from systems.scene.zbuffer import covered
from systems.toybox.render import RADIUS
from systems.toybox.truth import Truth

GRID = 96
"""Points per side of the grid that volumes are counted on."""
SAMPLES = 30_000
"""Points drawn from each surface; the distance of equal surfaces is then 0.005 to 0.007
and not zero, because the points differ, and their normal error 2 to 5 degrees."""


@dataclass(frozen=True)
class MeshQuality:
    """Figures of a mesh.

    Attributes:
        bodies: Number of connected components.
        faces: Number of triangles.
        watertight: Whether every edge has two faces.
        volume: Enclosed volume, in units of the scene.
        level: Density at the surface; None: unknown.
        iou_3d: IoU with the ground truth, from 0 to 1; None: no ground truth.
        chamfer: Chamfer distance from the ground truth; None: no ground truth.
        normal_error: Angle between its normals and those of the ground truth, in
            degrees; None: no ground truth.
    """

    bodies: int
    faces: int
    watertight: bool
    volume: float
    level: float | None = None
    iou_3d: float | None = None
    chamfer: float | None = None
    normal_error: float | None = None

    def figures(self) -> dict[str, Any]:
        """The figures, rounded; unknown ones are left out."""
        return {
            name: round(value, 4) if isinstance(value, float) else value
            for name, value in vars(self).items()
            if value is not None
        }


def measure_mesh(mesh: Any, wanted: Truth | None = None) -> MeshQuality:
    """Measure a mesh (z up), also against the ground truth.

    Args:
        mesh: A `trimesh.Trimesh`.
        wanted: The ground truth, if there is one.
    """
    level = mesh.metadata.get("level")
    mesh = _welded(mesh)
    errors = (None, None) if wanted is None else surface_errors(mesh, wanted)
    return MeshQuality(
        bodies=int(mesh.body_count),
        faces=len(mesh.faces),
        watertight=bool(mesh.is_watertight),
        volume=float(mesh.volume),
        level=None if level is None else float(level),
        iou_3d=None if wanted is None else volume_iou(mesh, wanted),
        chamfer=errors[0],
        normal_error=errors[1],
    )


def _welded(mesh: Any) -> Any:
    """A mesh without the seams of its texture."""
    if mesh.visual.kind != "texture":
        return mesh
    import trimesh

    faces = weld(np.asarray(mesh.vertices))[np.asarray(mesh.faces)]
    used, faces = np.unique(faces, return_inverse=True)
    return trimesh.Trimesh(mesh.vertices[used], faces.reshape(-1, 3), process=False)


def volume_iou(mesh: Any, wanted: Truth, resolution: int = GRID) -> float:
    """Intersection over union of the solids."""
    points = _grid(resolution)
    inside = enclosed(mesh, points)
    grid = np.stack(np.meshgrid(points, points, points, indexing="ij"), -1)
    should = (wanted.sdf(torch.from_numpy(grid).float()) < 0).numpy()
    return float((inside & should).sum() / max(1, (inside | should).sum()))


def enclosed(mesh: Any, points: np.ndarray) -> np.ndarray:
    """The points of a grid that a closed mesh encloses.

    These have a positive winding number along z: the number of faces above that face
    up, minus those that face down.

    Args:
        mesh: Mesh whose faces are oriented outwards.
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


def surface_errors(
    mesh: Any, wanted: Truth, samples: int | None = None
) -> tuple[float, float]:
    """Chamfer distance of the two surfaces and their normal error; deterministic.

    Args:
        mesh: The surface.
        wanted: The ground truth.
        samples: Points on each surface; default: `SAMPLES`.
    """
    import trimesh
    from scipy.spatial import KDTree

    samples = samples or SAMPLES
    right = wanted.mesh()
    other = trimesh.Trimesh(right.vertices.numpy(), right.faces.numpy(), process=False)
    points, normals = [], []
    for surface in (mesh, other):
        drawn: Any = trimesh.sample.sample_surface(surface, samples, seed=0)
        points.append(np.asarray(drawn[0]))
        normals.append(np.asarray(surface.face_normals)[drawn[1]])
    distances, angles = [], []
    for one, two in ((0, 1), (1, 0)):
        distance, nearest = KDTree(points[two]).query(points[one])
        cosine = (normals[one] * normals[two][nearest]).sum(-1)
        distances.append(distance.mean())
        angles.append(np.degrees(np.arccos(cosine.clip(-1, 1))).mean())
    return float(np.mean(distances)), float(np.mean(angles))


def _grid(resolution: int) -> np.ndarray:
    """Grid coordinates, off the mesh's own grid, whose points lie on edges of faces."""
    cells = (np.arange(resolution) + 0.5) / resolution * 2 - 1
    return cells * RADIUS * 1.0007 + 1.7e-4
