"""Geometry, material, background, renderer and guidance."""

from __future__ import annotations

import random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.adapters.standin import register
from tests.adapters.standin.base import BaseModule, C, Updateable


class ProgressiveBands(nn.Module, Updateable):
    """Sines of rising frequency; the mask is a plain attribute and only ever grows."""

    def __init__(self, levels: int, start: int, start_step: int, every: int) -> None:
        super().__init__()
        self.levels, self.start, self.start_step = levels, start, start_step
        self.every, self.current_level = every, start
        self.table = nn.Parameter(torch.randn(levels, 3, 4) * 0.5)
        self.mask = torch.zeros(levels * 4)

    def forward(self, x: Tensor) -> Tensor:
        waves = [torch.sin(x @ self.table[i] * 2**i) for i in range(self.levels)]
        return torch.cat(waves, -1) * self.mask

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        grown = max(step - self.start_step, 0) // self.every
        self.current_level = min(self.start + grown, self.levels)
        self.mask[: self.current_level * 4] = 1.0


@register("volume")
class Volume(BaseModule):
    def configure(self, **parts: Any) -> None:
        self.encoding = ProgressiveBands(4, 1, self.cfg.start_step, 6)
        self.network = nn.Sequential(nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 4))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        out = self.network(self.encoding(x))
        density = F.softplus(out[..., :1] + 2 - 4 * x.norm(dim=-1, keepdim=True))
        return density, out[..., 1:]


@register("material")
class Material(BaseModule):
    def configure(self, **parts: Any) -> None:
        self.ambient_only = False

    def forward(self, features: Tensor, x: Tensor, light: Tensor) -> Tensor:
        albedo = torch.sigmoid(features)
        shade = F.cosine_similarity(light - x, x, dim=-1)[..., None].clamp(min=0)
        if self.ambient_only or random.random() > 0.75:
            return albedo
        return shade.expand_as(albedo) if random.random() < 0.3 else albedo * shade

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        self.ambient_only = step < self.cfg.ambient_only_steps


@register("background")
class Background(BaseModule):
    def configure(self, **parts: Any) -> None:
        self.network = nn.Linear(3, 3)

    def forward(self, directions: Tensor) -> Tensor:
        color = torch.sigmoid(self.network(directions))
        if self.training and random.random() < 0.3:
            color = color * 0 + torch.rand(len(directions), 1, 1, 3)
        return color


class Occupancy(nn.Module):
    """`occs` is written in place, `binaries` is bound to a new tensor."""

    occs: Tensor
    binaries: Tensor

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.cells = cells
        self.register_buffer("occs", torch.zeros(cells**3))
        self.register_buffer("binaries", torch.ones(cells**3, dtype=torch.bool))

    def update(self, step: int, density: Any) -> None:
        if step % 16:
            return
        index = torch.arange(self.cells**3)
        if step >= 32:  # at first all cells, then a few at random
            index = torch.randint(self.cells**3, (self.cells**3 // 2,))
        corner = torch.stack(
            [
                index // self.cells**2,
                index // self.cells % self.cells,
                index % self.cells,
            ],
            -1,
        )
        x = (corner + torch.rand(len(index), 3)) / self.cells * 2 - 1
        with torch.no_grad():
            found = density(x).squeeze(-1)
        self.occs[index] = torch.maximum(self.occs[index] * 0.95, found)
        self.binaries = self.occs > self.occs.mean().clamp(max=0.5)

    def at(self, x: Tensor) -> Tensor:
        cell = ((x + 1) / 2 * self.cells).long().clamp(0, self.cells - 1)
        flat = (cell[..., 0] * self.cells + cell[..., 1]) * self.cells + cell[..., 2]
        return self.binaries[flat][..., None]


@register("volume-renderer")
class Renderer(BaseModule):
    geometry: Any
    material: Any
    background: Any
    estimator: Any

    def configure(self, **parts: Any) -> None:
        # Not registered, as upstream; reached again through these attributes.
        self.__dict__.update(parts)
        self.estimator = Occupancy(4)
        self.randomized = True

    def train(self, mode: bool = True) -> Renderer:
        self.randomized = mode
        return super().train(mode)

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        if self.training:
            self.estimator.update(step, lambda x: self.geometry(x)[0])

    def forward(self, batch: dict[str, Any]) -> dict[str, Tensor]:
        depth = torch.linspace(1.2, 2.8, 5)
        if self.randomized:
            depth = depth + 0.3 * torch.rand(*batch["rays_o"].shape[:3], 5)
        else:
            depth = depth.expand(*batch["rays_o"].shape[:3], 5)
        x = (
            batch["rays_o"][..., None, :]
            + depth[..., None] * batch["rays_d"][..., None, :]
        )
        density, features = self.geometry(x)
        alpha = 1 - torch.exp(-density * self.estimator.at(x) * 0.4)
        through = torch.cumprod(1 - alpha + 1e-6, -2)
        weights = (
            alpha
            * torch.cat([torch.ones_like(alpha[..., :1, :]), through], -2)[..., :-1, :]
        )
        color = self.material(features, x, batch["light"][:, None, None, None])
        opacity = weights.sum(-2)
        image = (weights * color).sum(-2)
        image = image + (1 - opacity) * self.background(batch["rays_d"])
        batch["opacity"] = opacity  # some systems write into their batch
        return {"comp_rgb": image, "opacity": opacity}


@register("toy-guidance")
class Guidance(Updateable):
    """No module: plain attributes that follow the step."""

    def __init__(self, cfg: Any) -> None:
        self.cfg = cfg
        self.max_step = 980

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        self.max_step = int(1000 * C(self.cfg.max_step_percent, step))

    def __call__(self, image: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        with torch.no_grad():
            t = torch.randint(20, self.max_step + 1, (len(image), 1, 1, 1)) / 1000
            target = 0.5 + 0.4 * torch.cos(
                batch["azimuth"][:, None, None, None] + torch.arange(3.0)
            )
            target = target.expand_as(image) + 0.1 * t * torch.randn_like(image)
        return {"loss_sds": (image - target).square().sum() / len(image), "t": t.mean()}


class Pipeline:
    """A frozen network no module tree sees, into which LoRA is hung."""

    def __init__(self, lora: nn.Linear) -> None:
        self.unet = nn.Linear(3, 3).requires_grad_(False)
        self.lora = lora  # the same parameters as the registered ones

    def __call__(self, x: Tensor, with_lora: bool) -> Tensor:
        return self.unet(x) + (self.lora(x) if with_lora else 0)


@register("toy-vsd-guidance")
class VSDGuidance(BaseModule):
    def configure(self, **parts: Any) -> None:
        self.lora_layers = nn.Linear(3, 3, bias=False)
        self.camera_embedding = nn.Linear(1, 3)

        class SubModules:  # local on purpose: it cannot be pickled
            def __init__(self, pipe: Pipeline) -> None:
                self.pipe = pipe

        self.submodules = SubModules(Pipeline(self.lora_layers))
        self.max_step = 980

    def update_step(self, epoch: int, step: int, on_load: bool = False) -> None:
        self.max_step = int(1000 * C(self.cfg.max_step_percent, step))

    def forward(self, image: Tensor, batch: dict[str, Any]) -> dict[str, Tensor]:
        pipe = self.submodules.pipe
        condition = self.camera_embedding(batch["azimuth"][:, None])[:, None, None]
        if random.random() < 0.1:
            condition = condition * 0
        with torch.no_grad():
            noisy = image + 0.1 * torch.randn_like(image)
            gradient = pipe(noisy, False) - pipe(noisy, True) - condition
        noise = torch.randn_like(image)
        answer = pipe(image.detach() + 0.3 * noise, True) + condition
        target = (image - gradient).detach()
        return {
            "loss_vsd": 0.5 * F.mse_loss(image, target, reduction="sum"),
            "loss_lora": F.mse_loss(answer, noise),
        }
