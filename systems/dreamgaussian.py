r"""DreamGaussian: growing splats optimised by score distillation.

$$\ell(t, \theta) = \lambda_{sds}\,\ell_{sds} + \lambda_{sparsity}
  \operatorname{mean} \sqrt{o^2 + 0.01} + \lambda_{opaque} H(o)$$

with opacity o and binary entropy H (J. Tang et al., 2023, arXiv 2309.16653: score
distillation alone). It starts from a ball of splats, or refines the splats of a file
(`system.geometry.initial`).
"""

from __future__ import annotations

import bisect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from systems.distillation import Distillation, join
from systems.guidance.priors import check
from systems.guidance.prompts import PROMPT_PROCESSORS, PromptConfig
from systems.guidance.table import GUIDANCES
from systems.optimizer import OptimizerConfig
from systems.scene.cameras import RandomCameras, Views
from systems.scene.gaussians import ply, viewer
from systems.scene.gaussians.density import Density
from systems.scene.gaussians.growth import GrowthConfig
from systems.scene.gaussians.scene import (
    SplatRendering,
    SplatScene,
    SplatSceneConfig,
)
from systems.scene.gaussians.splats import of_state
from systems.scene.gaussians.trajectory import GrowingGaussians
from systems.scene.isosurface import extract_mesh
from systems.scene.meshes.finishing import simplified
from systems.scene.regularisers import REGULARISERS
from systems.settings.checks import at_least
from systems.settings.config import Config
from systems.settings.reader import part, read
from systems.settings.schedules import Schedule, check_schedule

SPLATS = "geometry."
"""Prefix of the splats' tensors in a state."""


@dataclass(frozen=True)
class SplatLossConfig:
    """Weights of the loss (`system.loss`), numbers or schedules.

    Args:
        lambda_sds: Weight of score distillation.
        lambda_sparsity: Weight of the penalty on opacity.
        lambda_opaque: Weight of the penalty on half-transparent pixels.
    """

    lambda_sds: Schedule = 1.0
    lambda_sparsity: Schedule = 0.0
    lambda_opaque: Schedule = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_schedule(name, value)


@dataclass(frozen=True)
class DecayConfig:
    """Exponential decay of the means' learning rate (`system.position_decay`).

    Args:
        factor: Final learning rate relative to the initial one; 1: no decay.
        steps: Number of steps of the decay; the learning rate is constant afterwards.
    """

    factor: float = 1.0
    steps: int = 300

    def __post_init__(self) -> None:
        if not 0 < self.factor <= 1:
            raise ValueError(
                f"`factor` is {self.factor}: write a number above 0, at most 1."
            )
        at_least("steps", self.steps, 1)

    def at(self, step: int) -> float:
        """The factor at a step; the first step counts as 1, as published."""
        return self.factor ** min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True, kw_only=True)
class DreamGaussianConfig(SplatSceneConfig):
    """`system`: the scene, guidance, loss, optimizer and growth.

    Args:
        prompt_processor: Prompt and view-dependent prompting.
        guidance: Settings of the guidance.
        optimizer: The optimizer, with a learning rate for each part. The parts are
            `geometry.means`, `geometry.scales`, `geometry.quats`,
            `geometry.opacities`, `geometry.sh0` and `geometry.shN`.
        densify: Growth and pruning of the splats.
        position_decay: Decay of the means' learning rate.
        resolutions: Later side lengths of the training images in pixels, after
            `data.height`.
        resolution_milestones: First step of each of `resolutions`.
        prompt_processor_type: Any of threestudio's prompt processors.
        guidance_type: Guidance; a key of `systems.guidance.table.GUIDANCES`.
        loss: Weights of the loss terms.
    """

    prompt_processor: PromptConfig = field(metadata=part(PROMPT_PROCESSORS))
    guidance: Any = field(metadata=part(GUIDANCES))
    optimizer: OptimizerConfig
    densify: GrowthConfig = field(default_factory=GrowthConfig)
    position_decay: DecayConfig = field(default_factory=DecayConfig)
    resolutions: Any = ()
    resolution_milestones: Any = ()
    prompt_processor_type: str = "diffusers-prompt-processor"
    guidance_type: str = "diffusers-guidance"
    loss: SplatLossConfig = field(default_factory=SplatLossConfig)

    def __post_init__(self) -> None:
        sides, steps = list(self.resolutions), list(self.resolution_milestones)
        if len(sides) != len(steps) or steps != sorted(steps):
            raise ValueError(
                f"`resolutions` is {sides} and `resolution_milestones` {steps}: write "
                "as many rising steps as there are sides, such as `[256, 512]` and "
                "`[150, 300]`."
            )
        for side in sides:
            at_least("resolutions", side, 1)
        named = self.prompt_processor.pretrained_model_name_or_path
        used = self.guidance.pretrained_model_name_or_path
        if named not in (None, used):
            raise ValueError(
                f"`prompt_processor` names the model `{named}` and `guidance` "
                f"`{used}`: the guidance's own text encoder is used. Leave the first "
                "out, or write the same."
            )


class DreamGaussian(Distillation):
    """Text to 3D by score distillation of growing splats."""

    section_types: ClassVar[Mapping[str, type]] = {
        "data": RandomCameras,
        "system": DreamGaussianConfig,
    }

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.settings = read(self.section_types["system"], config.system, "system")
        self.check_model()
        with self.random.scope(0, "scene"):
            self._scene = SplatScene(self.settings, self.device).to(self.device)
        self.settings.optimizer.check(self._scene)
        # Splats have no normals to orient.
        self.regularisers = {n: REGULARISERS[n] for n in ("sparsity", "opaque")}

    def check_model(self) -> None:
        """Refuse a model or a prompt that guidance could not use."""
        check(self.settings.guidance.pretrained_model_name_or_path, [self.title])

    @property
    def title(self) -> str:
        """The prompt."""
        return self.settings.prompt_processor.prompt

    @property
    def scene(self) -> SplatScene:
        """The splats, the background and the renderer."""
        return self._scene

    def rows_vary(self, name: str) -> bool:
        """See `System.rows_vary`: splats are rows."""
        return name.startswith(SPLATS)

    def views(self, step: int) -> Views:
        """See `Distillation.views`; the resolution rises at the milestones."""
        views = super().views(step)
        passed = bisect.bisect_right(list(self.settings.resolution_milestones), step)
        if not passed:
            return views
        side = self.settings.resolutions[passed - 1]
        return replace(views, height=side, width=side * views.width // views.height)

    def rendering(
        self, module: nn.Module, views: Views, step: int, with_normals: bool
    ) -> SplatRendering:
        """See `Distillation.rendering`."""
        del with_normals
        return module(views, step, self.random)

    def trajectory(self) -> GrowingGaussians:
        """The optimizer on the loss, with growth; loads the pretrained model."""
        guidance, decay = self.load_guidance(), self.settings.position_decay

        def losses(looks: list[Any]) -> list[tuple[Tensor, Any, SplatRendering]]:
            found = self.losses(looks, guidance)
            return [(*one, look.seen) for one, look in zip(found, looks, strict=True)]

        whole = dp.BatchedLoss(self.look, losses).on_states(self.scene)
        split = self.split(guidance)
        return GrowingGaussians(
            dp.ShardedLoss(whole, lambda *of: split(*of).on_states(self.scene), join),
            {n: p for n, p in self.scene.named_parameters() if p.requires_grad},
            self.optimizer,
            self.num_steps,
            config=self.settings.densify,
            max_splats=self.scene.geometry.config.max_splats,
            decay=decay.at if decay.factor < 1 else None,
            precision=self.config.trainer.precision,
            seed=self.config.seed,
            about=self.about(),
        )

    @torch.no_grad()
    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Float[Tensor, "views 3 height width"], Float[Tensor, "views 1 h w"]]:
        """Images and opacity of a state as in evaluation; see `System.render`."""
        seen = torch.func.functional_call(self.scene, y, (views, None, self.random))
        return seen.shown(grey)

    @torch.no_grad()
    def mesh(self, y: dp.State) -> Any:
        """The surface of the splats' density, coloured by the splats around it."""
        settings = self.scene.geometry.config
        threshold = settings.isosurface_threshold
        density = Density({n: v.cpu() for n, v in of_state(y).items()})
        low, high = density.box
        radius = float(torch.maximum(-low, high).amax().clamp(1e-3, 1e3))
        surface = extract_mesh(
            lambda points: density(points)[0],
            lambda points: density(points)[1],
            radius,
            settings.isosurface_resolution,
            self.silhouettes(y) if isinstance(threshold, str) else threshold,
        )
        return simplified(surface, settings.max_faces)

    def exports(self, folder: Path, y: dp.State) -> dict[str, Callable[[], Any]]:
        """The splats as a 3DGS ply file and as a web page; see `System.exports`."""
        splats = of_state(y)

        def files() -> list[str]:
            ply.save(folder / "splats.ply", splats)
            viewer.write(folder / "splats.html", splats, self.title)
            return ["splats.ply", "splats.html"]

        return {"splats": files, "num_splats": lambda: len(splats["means"])}
