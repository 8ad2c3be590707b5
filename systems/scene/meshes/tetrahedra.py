r"""Marching tetrahedra: the zero set of values on a grid of tetrahedra, as triangles.

An edge from a to b whose ends have values of different signs meets the surface at

$$x = x_a + \frac{f_a}{f_a - f_b}\,(x_b - x_a),$$

differentiable in values and positions (A. Doi and A. Koide, 1991; T. Shen et al., 2021,
DMTet, arXiv 2111.04276, Eq. 2). A tetrahedron with one vertex on its own side gives one
triangle, with two on either side two. Cubes are cut into six tetrahedra around their
diagonal (H. Freudenthal, 1942; H. W. Kuhn, 1960), so that neighbours share their faces.
"""

from __future__ import annotations

import functools
import itertools
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

EDGES = tuple(itertools.combinations(range(4), 2))
"""Ends of the edges of a tetrahedron."""


@dataclass(frozen=True)
class TetrahedralGrid:
    """Tetrahedra over the cube [−1, 1]³, all turned the same way.

    Attributes:
        vertices: Positions, x slowest, shape ``(vertices, 3)``.
        tetrahedra: Vertex indices, shape ``(tetrahedra, 4)``.
    """

    vertices: Float[Tensor, "vertices 3"]
    tetrahedra: Int[Tensor, "tetrahedra 4"]

    @classmethod
    def of(cls, cells: int) -> TetrahedralGrid:
        """The grid with a number of cubes per side."""
        side = cells + 1
        ticks = torch.linspace(-1, 1, side)
        vertices = torch.cartesian_prod(ticks, ticks, ticks)
        strides = (side * side, side, 1)
        steps = torch.arange(cells)
        corner = torch.cartesian_prod(*(steps * stride for stride in strides)).sum(-1)
        parts = []
        for order in itertools.permutations(range(3)):
            path = [0, *itertools.accumulate(strides[axis] for axis in order)]
            if _parity(order):
                path[1], path[2] = path[2], path[1]
            parts.append(corner[:, None] + torch.tensor(path))
        return cls(vertices, torch.cat(parts))

    def to(self, device: torch.device) -> TetrahedralGrid:
        """The grid on a device."""
        return TetrahedralGrid(self.vertices.to(device), self.tetrahedra.to(device))


def march(
    values: Float[Tensor, " vertices"],
    positions: Float[Tensor, "vertices 3"],
    tetrahedra: Int[Tensor, "tetrahedra 4"],
) -> tuple[Float[Tensor, "points 3"], Int[Tensor, "faces 3"]]:
    """The surface where values are zero; faces look to where they are positive.

    Args:
        values: Negative inside, such as signed distances.
        positions: Positions of the vertices.
        tetrahedra: Vertex indices, turned as those of `TetrahedralGrid`.

    Returns:
        Points on the surface and faces; both empty if there is none.
    """
    inside = values.detach() < 0
    codes = (inside[tetrahedra] * torch.tensor([1, 2, 4, 8], device=values.device)).sum(
        -1
    )
    crossed = ((codes > 0) & (codes < 15)).nonzero()[:, 0]
    tetrahedra, codes = tetrahedra[crossed], codes[crossed]
    ends = torch.tensor(EDGES, device=values.device)
    edges = tetrahedra[:, ends].sort(-1).values
    keys = edges[..., 0] * len(values) + edges[..., 1]
    splits = inside[edges[..., 0]] != inside[edges[..., 1]]
    met, index = keys[splits].unique(return_inverse=True)
    numbers = torch.full_like(keys, -1)
    numbers[splits] = index
    a, b = met // len(values), met % len(values)
    share = values[a] / (values[a] - values[b])
    points = positions[a] + share[:, None] * (positions[b] - positions[a])
    table = _triangles().to(values.device)[codes]
    faces = numbers.gather(1, table.flatten(1).clamp(min=0)).view(-1, 3)
    return points, faces[(table[..., 0] >= 0).flatten()]


@functools.cache
def _triangles() -> Int[Tensor, "codes=16 triangles=2 corners=3"]:
    """Edges at the corners of the triangles of each code; −1 where there is none.

    Bit i of a code says whether vertex i is inside. Triangles are turned outwards in
    the reference tetrahedron, and so in all that are turned as it is.
    """
    corners = torch.cat([torch.zeros(1, 3), torch.eye(3)]).double()
    middles = torch.stack([(corners[a] + corners[b]) / 2 for a, b in EDGES])
    table = torch.full((16, 2, 3), -1)
    for code in range(1, 15):
        inner = [i for i in range(4) if code >> i & 1]
        outer = [i for i in range(4) if not code >> i & 1]
        around = [EDGES.index((min(i, j), max(i, j))) for i in inner for j in outer]
        if len(around) == 3:
            found = [around]
        else:  # edges i–k, i–l, j–k, j–l form a ring i–k, i–l, j–l, j–k
            found = [
                [around[0], around[1], around[3]],
                [around[0], around[3], around[2]],
            ]
        outwards = corners[outer].mean(0) - corners[inner].mean(0)
        for row, (a, b, c) in enumerate(found):
            first, second = middles[b] - middles[a], middles[c] - middles[a]
            turned = torch.linalg.cross(first, second) @ outwards > 0
            table[code, row] = torch.tensor([a, b, c] if turned else [a, c, b])
    return table


def _parity(order: tuple[int, ...]) -> bool:
    """Whether a permutation is odd."""
    pairs = itertools.combinations(order, 2)
    return sum(first > second for first, second in pairs) % 2 == 1
