"""Gaussians that replace their own parameters inside of `training_step`."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.adapters.standin import find, register
from tests.adapters.standin.base import BaseModule, BaseSystem, C


@register("gaussians")
class Gaussians(BaseModule):
    def configure(self, **parts: Any) -> None:
        points = np.random.random((self.cfg.num, 3)) - 0.5
        self._xyz = nn.Parameter(torch.tensor(points).float())
        self._color = nn.Parameter(torch.zeros(self.cfg.num, 3))
        self._reset()
        groups = [
            {"params": [self._xyz], "lr": 0.0, "name": "xyz"},
            {"params": [self._color], "lr": 0.0, "name": "color"},
        ]
        self.optimize_list = groups
        self.optimizer = torch.optim.Adam(groups, lr=0.0, eps=1e-15)

    def _reset(self) -> None:
        self.xyz_gradient_accum = torch.zeros(len(self._xyz), 1)
        self.denom = torch.zeros(len(self._xyz), 1)
        self.max_radii2D = torch.zeros(len(self._xyz))

    def update_learning_rate(self, step: int) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = C(self.cfg.lr[group["name"]], step)
        self.color_clip = 2.0  # an attribute only a forward makes

    def _replace(self, rows: Any) -> None:
        for group in self.optimizer.param_groups:
            (old,) = group["params"]
            state = self.optimizer.state.pop(old, None)
            new = nn.Parameter(rows(old.detach(), group["name"], False))
            if state is not None:
                for key in ("exp_avg", "exp_avg_sq"):
                    state[key] = rows(state[key], group["name"], True)
                self.optimizer.state[new] = state
            group["params"][0] = new
            setattr(self, f"_{group['name']}", new)

    def prune(self) -> None:
        keep = self._color.detach().norm(dim=-1) > self.cfg.min_color
        self._replace(lambda value, name, memory: value[keep])
        for name in ("xyz_gradient_accum", "denom", "max_radii2D"):
            setattr(self, name, getattr(self, name)[keep])

    def densify(self) -> None:
        mean = (self.xyz_gradient_accum / self.denom).nan_to_num()[:, 0]
        chosen = mean >= mean.quantile(0.8)
        offset = 0.05 * torch.randn(int(chosen.sum()), 3)

        def rows(value: Tensor, name: str, memory: bool) -> Tensor:
            new = value[chosen] * (0 if memory else 1)
            if name == "xyz" and not memory:
                new = new + offset
            return torch.cat([value, new])

        self._replace(rows)
        self._reset()

    @torch.no_grad()
    def update_states(self, step: int, screen: Tensor, radii: Tensor) -> None:
        seen = radii > 0
        assert screen.grad is not None
        self.max_radii2D = torch.max(self.max_radii2D, radii)
        self.xyz_gradient_accum[seen] += screen.grad[seen].norm(dim=-1, keepdim=True)
        self.denom[seen] += 1
        cfg = self.cfg
        if (
            cfg.prune_from_iter < step < cfg.prune_until_iter
            and step % cfg.prune_interval == 0
        ):
            self.prune()
        if (
            cfg.densify_from_iter < step < cfg.densify_until_iter
            and step % cfg.densification_interval == 0
        ):
            self.densify()


@register("growing-like")
class GrowingLike(BaseSystem):
    def configure(self) -> None:
        self.automatic_optimization = False
        self.geometry = find("gaussians")(self.cfg.geometry)

    def configure_optimizers(self) -> Any:
        return [self.geometry.optimizer]

    def forward(self, batch: Any) -> dict[str, Tensor]:
        self.geometry.update_learning_rate(self.global_step)
        xyz = self.geometry._xyz
        screen = torch.zeros(len(xyz), 2, requires_grad=True)
        offset = 0.02 * torch.randn(len(xyz), 2)
        place = xyz[:, :2] + screen + offset
        camera = batch["rays_o"][:, 0, 0].mean(0)
        distance = (xyz - camera).norm(dim=-1, keepdim=True)
        weights = torch.exp(-place.square().sum(-1, keepdim=True) / distance)
        radii = (1 / distance[:, 0] - 0.45).clamp(min=0).detach()
        color = self.geometry._color.clip(
            -self.geometry.color_clip, self.geometry.color_clip
        )
        return {
            "image": (weights * torch.sigmoid(color)).mean(0),
            "screen": screen,
            "radii": radii,
        }

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        optimizer: Any = self.optimizers()
        out = self(batch)
        target = 0.3 + 0.2 * torch.cos(batch["azimuth"][0] + torch.arange(3.0))
        loss_sds = (out["image"] - target).square().sum()
        self.log("train/loss_sds", loss_sds)
        loss = 0.01 * self.geometry._xyz.norm(dim=-1).mean()
        loss_sds.backward(retain_graph=True)
        self.geometry.update_states(self.global_step, out["screen"], out["radii"])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return {"loss": loss_sds}
