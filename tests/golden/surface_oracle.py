"""Losses of threestudio's own surfaces: TextMesh's on one view, and those of a mesh.

    PYTHONPATH=<stand-ins>:<threestudio>:. python tests/golden/surface_oracle.py

writes `surface.safetensors` beside this file. Needs an environment in which threestudio
(28d9d80, December 2024) imports on a CPU. The field, the rays and their samples are
formulas, so that the file holds losses and gradients only. What runs is threestudio's:
its renderer of signed distances, its mesh, and the training steps that sum the losses.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

FILE = Path(__file__).parent / "surface.safetensors"
SIDE, SAMPLES, NEAR, FAR, RADIUS, STEP = 8, 24, 1.6, 3.0, 1.2, 3
VARIANCE = 0.25
SCALES = {"bump": 0.4, "size": 0.6, "slope": 1.3}
"""What is learned: parameters of the field."""
RENDERERS: dict[str, dict[str, Any]] = {
    "neus": {},
    "neus annealed": {"cos_anneal_end_steps": 10},
    "volsdf": {"use_volsdf": True},
}
LOSSES = ("orient", "sparsity", "opaque", "eikonal")
MESH_LOSSES = ("normal_consistency", "laplacian_smoothness")


def parameters() -> dict[str, Tensor]:
    """The field's parameters."""
    return {n: torch.tensor(v, requires_grad=True) for n, v in SCALES.items()}


def distance(points: Tensor, scale: dict[str, Tensor]) -> Tensor:
    """A bumpy ball, shape ``(points,)``; its gradient is not of norm 1."""
    waves = (points * points.new_tensor([5.0, 7.0, 6.0])).sin().prod(-1)
    ball = points.norm(dim=-1) - scale["size"]
    return scale["slope"] * ball + 0.3 * scale["bump"] * waves


def slope(points: Tensor, scale: dict[str, Tensor]) -> Tensor:
    """The gradient of `distance`, shape ``(points, 3)``."""
    points = points.detach().requires_grad_(True)
    total = distance(points, scale).sum()
    return torch.autograd.grad(total, points, create_graph=True)[0]


def colours(points: Tensor) -> Tensor:
    """Features of the field, shape ``(points, 3)``."""
    return (3 * points).cos()


def rays() -> tuple[Tensor, Tensor]:
    """Origins and unit directions of one view, shape ``(SIDE², 3)``."""
    eye = torch.tensor([2.0, 0.9, 0.8])
    ticks = (torch.arange(SIDE) + 0.5) / SIDE * 2 - 1
    y, x = torch.meshgrid(-ticks, ticks, indexing="ij")
    forward = -eye / eye.norm()
    right = torch.linalg.cross(forward, torch.tensor([0.0, 0.0, 1.0]))
    right = right / right.norm()
    up = torch.linalg.cross(right, forward)
    spread = 0.45
    toward = forward + spread * (x[..., None] * right + y[..., None] * up)
    toward = torch.nn.functional.normalize(toward, dim=-1).reshape(-1, 3)
    return eye.expand_as(toward), toward


def samples() -> tuple[Tensor, Tensor, Tensor]:
    """Numbers of the rays, begins and ends of the samples, shape ``(samples,)``."""
    ends = torch.linspace(NEAR, FAR, SAMPLES + 1)
    number = torch.arange(SIDE * SIDE).repeat_interleave(SAMPLES)
    return number, ends[:-1].repeat(SIDE * SIDE), ends[1:].repeat(SIDE * SIDE)


def mesh() -> tuple[Tensor, Tensor]:
    """A bumpy torus: vertices and faces."""
    n, m = 14, 9
    i, j = torch.meshgrid(torch.arange(n), torch.arange(m), indexing="ij")
    u, v = 2 * torch.pi * i / n, 2 * torch.pi * j / m
    thick = 0.25 + 0.05 * (3 * u + 2 * v).sin()
    ring = 0.6 + thick * v.cos()
    points = torch.stack([ring * u.cos(), ring * u.sin(), thick * v.sin()], -1)

    def at(di: int, dj: int) -> Tensor:
        return ((i + di) % n * m + (j + dj) % m).flatten()

    faces = [[at(0, 0), at(1, 0), at(1, 1)], [at(0, 0), at(1, 1), at(0, 1)]]
    whole = torch.cat([torch.stack(face, -1) for face in faces])
    return points.reshape(-1, 3), whole


class _Geometry:
    """Stands for threestudio's geometry."""

    def __init__(self, scale: dict[str, Tensor]) -> None:
        self.scale = scale

    def __call__(self, points: Tensor, output_normal: bool) -> dict[str, Tensor]:
        assert output_normal
        gradient = slope(points, self.scale)
        normal = torch.nn.functional.normalize(gradient, dim=-1)
        return {
            "sdf": distance(points, self.scale)[:, None],
            "features": colours(points),
            "normal": normal,
            "shading_normal": normal,
            "sdf_grad": gradient,
        }


def _system(kind: type, seen: dict[str, Any], **config: Any) -> tuple[Any, dict]:
    """A system of threestudio that has rendered, and what it logs."""
    logged: dict[str, Tensor] = {}

    class System:
        cfg = SimpleNamespace(loss=_Loss(), **config)
        training_step = kind.training_step

        def __call__(self, _: Any) -> dict[str, Any]:
            return seen

        def prompt_processor(self) -> None: ...

        def guidance(self, *_: Any, **__: Any) -> dict[str, Tensor]:
            return {}

        def log(self, name: str, value: Any, **_: Any) -> None:
            logged[name.removeprefix("train/loss_")] = value

        def C(self, value: float) -> float:
            return value

    return System(), logged


class _Loss(dict):
    """All weights are one."""

    def __getattr__(self, name: str) -> float:
        return 1.0


def main() -> None:
    """Write the file."""
    renderers: Any = importlib.import_module(
        "threestudio.models.renderers.neus_volume_renderer"
    )
    textmesh: Any = importlib.import_module("threestudio.systems.textmesh")
    magic3d: Any = importlib.import_module("threestudio.systems.magic3d")
    prolific: Any = importlib.import_module("threestudio.systems.prolificdreamer")
    meshes: Any = importlib.import_module("threestudio.models.mesh")
    save_file: Any = importlib.import_module("safetensors.torch").save_file
    found: dict[str, Tensor] = {}
    for name, settings in RENDERERS.items():
        scale = parameters()
        renderer = renderers.NeuSVolumeRenderer(
            {"radius": RADIUS, "learned_variance_init": VARIANCE, **settings},
            geometry=_Geometry(scale),
            material=lambda features, **_: features.sigmoid(),
            background=lambda dirs: torch.zeros_like(dirs),
        )
        renderer.update_step(0, STEP)
        renderer.estimator.sampling = lambda *_, **__: samples()
        renderer.train()
        origins, directions = rays()
        shape = (1, SIDE, SIDE, 3)
        seen = renderer(
            origins.reshape(shape), directions.reshape(shape), torch.zeros(1, 3)
        )
        system, logged = _system(textmesh.TextMesh, seen)
        system.training_step({}, 0)
        learned = [*scale.values(), renderer.variance._inv_std]
        found[f"{name}/images"] = torch.cat(
            [seen["comp_rgb"][0], seen["opacity"][0]], -1
        ).detach()
        _keep(found, name, {loss: logged[loss] for loss in LOSSES}, learned)
    points, faces = mesh()
    points.requires_grad_(True)
    surface = meshes.Mesh(points, faces)
    seen = {"mesh": surface, "comp_rgb": None, "comp_normal": None}
    system, logged = _system(magic3d.Magic3D, seen, refinement=True)
    system.training_step({}, 0)
    first = logged[MESH_LOSSES[0]]
    system, logged = _system(prolific.ProlificDreamer, seen, stage="geometry")
    system.prompt_utils = None
    system.training_step({}, 0)
    assert torch.equal(first, logged[MESH_LOSSES[0]])
    _keep(found, "mesh", {loss: logged[loss] for loss in MESH_LOSSES}, [points])
    save_file(found, FILE)


def _keep(
    found: dict[str, Tensor], name: str, losses: dict[str, Tensor], of: list[Tensor]
) -> None:
    """Add losses and their gradients."""
    for loss, value in losses.items():
        gradients = torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)
        flat = [
            torch.zeros_like(p) if g is None else g
            for p, g in zip(of, gradients, strict=True)
        ]
        found[f"{name}/{loss}"] = value.detach().clone()
        found[f"{name}/{loss}/gradient"] = torch.cat([g.flatten() for g in flat])


if __name__ == "__main__":
    main()
