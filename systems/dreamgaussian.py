r"""DreamGaussian: growing splats under score distillation.

$$\ell(t, \theta) = \lambda_{sds}\,\ell_{sds} + \lambda_{sparsity}
  \operatorname{mean} \sqrt{o^2 + 0.01} + \lambda_{opaque} H(o)$$

with opacity o and binary entropy H (J. Tang et al., 2023, arXiv 2309.16653: score
distillation alone). It starts from a ball of splats, or refines those of a file
(`system.geometry.initial`).
"""

from __future__ import annotations

import bisect
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from systems.base import System
from systems.guidance.priors import check, load
from systems.guidance.prompts import PromptConfig
from systems.guidance.sds import GuidanceConfig, ScoreDistillation
from systems.optimizer import OptimizerConfig
from systems.scene.cameras import Views
from systems.scene.gaussians import ply
from systems.scene.gaussians.density import Density
from systems.scene.gaussians.growth import GrowthConfig
from systems.scene.gaussians.scene import (
    SplatRendering,
    SplatScene,
    SplatSceneConfig,
)
from systems.scene.gaussians.splats import Gaussians, of_state
from systems.scene.gaussians.trajectory import GrowingGaussians
from systems.scene.isosurface import extract_mesh
from systems.settings.checks import at_least, one_of
from systems.settings.config import Config
from systems.settings.reader import ConfigError, read
from systems.settings.schedules import Schedule, check_schedule, value_at

GUIDANCES = ("diffusers-guidance", "stable-diffusion-guidance", "deep-floyd-guidance")
PROMPT_PROCESSORS = (
    "diffusers-prompt-processor",
    "stable-diffusion-prompt-processor",
    "deep-floyd-prompt-processor",
)
MEANS = "geometry.means"


@dataclass(frozen=True)
class SplatLossConfig:
    """Weights (`system.loss`), numbers or schedules.

    Args:
        lambda_sds: Of score distillation.
        lambda_sparsity: Against opacity.
        lambda_opaque: Against half-transparency.
    """

    lambda_sds: Schedule = 1.0
    lambda_sparsity: Schedule = 0.0
    lambda_opaque: Schedule = 0.0

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            check_schedule(name, value)


@dataclass(frozen=True)
class DecayConfig:
    """Decay of the means' learning rate (`system.position_decay`), exponential.

    Args:
        factor: What is left of it at the end; 1: it stays.
        steps: When the end is reached; later it stays there.
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
        """The factor of a step; the first step is one step old, as published."""
        return self.factor ** min(1.0, (step + 1) / self.steps)


@dataclass(frozen=True, kw_only=True)
class DreamGaussianConfig(SplatSceneConfig):
    """`system`: the scene's parts, who optimises them, and how they grow.

    Args:
        prompt_processor: What is wanted.
        guidance: The diffusion model.
        optimizer: Its steps; parts are `geometry.means`, `geometry.scales`,
            `geometry.quats`, `geometry.opacities`, `geometry.sh0` and `geometry.shN`.
        densify: Growth.
        position_decay: Of the means' learning rate.
        resolutions: Sides of the training images that follow `data.height`.
        resolution_milestones: The steps from which they hold.
        prompt_processor_type: Any of threestudio's names.
        guidance_type: Any of threestudio's names.
        loss: Weights.
    """

    prompt_processor: PromptConfig
    guidance: GuidanceConfig
    optimizer: OptimizerConfig
    densify: GrowthConfig = field(default_factory=GrowthConfig)
    position_decay: DecayConfig = field(default_factory=DecayConfig)
    resolutions: Any = ()
    resolution_milestones: Any = ()
    prompt_processor_type: str = "diffusers-prompt-processor"
    guidance_type: str = "diffusers-guidance"
    loss: SplatLossConfig = field(default_factory=SplatLossConfig)

    def __post_init__(self) -> None:
        one_of("guidance_type", self.guidance_type, GUIDANCES)
        one_of("prompt_processor_type", self.prompt_processor_type, PROMPT_PROCESSORS)
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
        if named not in (None, self.guidance.pretrained_model_name_or_path):
            raise ValueError(
                f"`prompt_processor` names the model `{named}` and `guidance` "
                f"`{self.guidance.pretrained_model_name_or_path}`: the guidance's own "
                "text encoder is used. Leave the first out, or write the same."
            )


class DreamGaussian(System):
    """Text to 3D by score distillation of growing splats."""

    def __init__(self, config: Config, device: torch.device | None = None) -> None:
        super().__init__(config, device)
        self.settings = read(DreamGaussianConfig, config.system, "system")
        check(
            self.settings.guidance.pretrained_model_name_or_path,
            [self.settings.prompt_processor.prompt],
        )
        with self.random.scope(0, "scene"):
            self._scene = SplatScene(self.settings, self.device).to(self.device)
        self.settings.optimizer.check(self._scene)

    @property
    def prompt(self) -> str:
        """What is wanted."""
        return self.settings.prompt_processor.prompt

    @property
    def scene(self) -> SplatScene:
        """The splats, what is behind them, and the renderer."""
        return self._scene

    @property
    def geometry(self) -> Gaussians:
        """The splats a run starts from."""
        return self._scene.geometry

    def trajectory(self) -> GrowingGaussians:
        """Adam (or another) on the loss above, with growth; loads the model."""
        settings = self.settings
        prior, words = load(
            settings.guidance.pretrained_model_name_or_path,
            settings.prompt_processor.texts(),
            settings.prompt_processor.negative_prompt,
            self.device,
            settings.guidance.half_precision_weights,
        )
        guidance = ScoreDistillation(
            settings.guidance, prior, words, settings.prompt_processor
        )

        def loss(
            step: int, y: dp.State
        ) -> tuple[Tensor, Mapping[str, Any], SplatRendering]:
            return self.loss(step, y, guidance)

        return self.grown(loss)

    def grown(self, loss: Any) -> GrowingGaussians:
        """The trajectory of another loss: `(step, y)` to loss, numbers, rendering."""
        settings = self.settings
        params = {n: p for n, p in self.scene.named_parameters() if p.requires_grad}
        held: list[Tensor] = []  # the means of the optimizer made last

        def optimizer(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
            held[:] = [named[MEANS]]
            return settings.optimizer.build(named)

        def scheduler(made: torch.optim.Optimizer) -> Any:
            rates = [
                settings.position_decay.at
                if any(p is held[0] for p in group["params"])
                else _constant
                for group in made.param_groups
            ]
            return torch.optim.lr_scheduler.LambdaLR(made, rates)

        return GrowingGaussians(
            loss,
            params,
            optimizer,
            self.config.trainer.max_steps,
            config=settings.densify,
            max_splats=self.geometry.config.max_splats,
            scheduler=scheduler if settings.position_decay.factor < 1 else None,
            precision=self.config.trainer.precision,
            seed=self.config.seed,
        )

    def views(self, step: int) -> Views:
        """What a step looks at."""
        views = self.cameras.views(step, self.random)
        milestones = list(self.settings.resolution_milestones)
        passed = bisect.bisect_right(milestones, step)
        if not passed:
            return views
        side = self.settings.resolutions[passed - 1]
        return replace(views, height=side, width=side * views.width // views.height)

    def see(self, y: dp.State, views: Views, step: int | None) -> SplatRendering:
        """Render a state of any number of splats."""
        return torch.func.functional_call(self.scene, y, (views, step, self.random))

    def loss(
        self, step: int, y: dp.State, guidance: ScoreDistillation
    ) -> tuple[Tensor, dict[str, Any], SplatRendering]:
        """The loss of a step, numbers to log, and what was rendered."""
        weight = {
            name: value_at(value, step)
            for name, value in vars(self.settings.loss).items()
        }
        views = self.views(step)
        seen = self.see(y, views, step)
        images = seen.rgb.permute(0, 3, 1, 2)
        sds, log = guidance(images, views.cameras, step, self.random)
        total = weight["lambda_sds"] * sds
        opacity = seen.opacity.clamp(1e-3, 1 - 1e-3)
        with torch.autocast(opacity.device.type, enabled=False):  # CUDA's refuses it
            opaque = nn.functional.binary_cross_entropy(opacity, opacity)
        terms = {
            "sparsity": (seen.opacity.square() + 0.01).sqrt().mean(),
            "opaque": opaque,
        }
        for name, value in terms.items():
            if weight[f"lambda_{name}"]:
                total = total + weight[f"lambda_{name}"] * value
        numbers = {
            "loss": total,
            "loss_sds": sds,
            **{f"loss_{name}": value for name, value in terms.items()},
            **log,
            "opacity": seen.opacity.mean(),
        }
        return total, numbers, seen

    @torch.no_grad()
    def render(
        self, y: dp.State, views: Views, grey: float | None = None
    ) -> tuple[Float[Tensor, "views 3 height width"], Float[Tensor, "views 1 h w"]]:
        """Final-look images and opacity of a state; see `System.render`."""
        seen = self.see(y, views, None)
        rgb = seen.rgb
        if grey is not None:
            rgb = seen.foreground + (1 - seen.opacity) * grey
        rgb, opacity = (part.permute(0, 3, 1, 2).cpu() for part in (rgb, seen.opacity))
        return rgb.clamp(0, 1), opacity

    @torch.no_grad()
    def mesh(self, y: dp.State) -> Any:
        """The surface of the splats' density, coloured by the splats around it."""
        settings = self.geometry.config
        density = Density({n: v.cpu() for n, v in of_state(y).items()})
        low, high = density.box
        radius = float(torch.maximum(-low, high).amax().clamp(1e-3, 1e3))
        surface = extract_mesh(
            lambda points: density(points)[0],
            lambda points: density(points)[1],
            radius,
            settings.isosurface_resolution,
            settings.isosurface_threshold,
        )
        return simplified(surface, settings.max_faces)

    def export(self, y: dp.State, folder: Path) -> list[Path]:
        """Write the splats as ``splats.ply``, in the layout of 3DGS."""
        path = folder / "splats.ply"
        ply.save(path, of_state(y))
        return [path]

    def check_state(self, y: dp.State, where: str | Path) -> None:
        """Refuse a state of another system; the number of splats may be another.

        Raises:
            ConfigError: Names the first difference.
        """
        own = dict(self.scene.named_parameters())
        rows = {len(y[name]) for name in y if name.startswith("geometry.")}
        for name in [*y, *own]:
            grows = name.startswith("geometry.")
            shapes = [
                tuple(one[name].shape[grows:]) if name in one else "nothing"
                for one in (y, own)
            ]
            if shapes[0] != shapes[1] and not (
                name not in y and not own[name].requires_grad
            ):
                raise ConfigError(
                    f"The checkpoint `{where}` does not fit this config: its `{name}` "
                    f"has rows of shape {shapes[0]}, the config makes {shapes[1]}. Use "
                    "the `config.yaml` of the run it came from."
                )
        if len(rows) > 1:
            raise ConfigError(
                f"The checkpoint `{where}` does not fit: its splats have "
                f"{' and '.join(map(str, sorted(rows)))} rows."
            )


def _constant(step: int) -> float:
    del step
    return 1.0


def simplified(mesh: Any, max_faces: int) -> Any:
    """A mesh of fewer faces (quadric edge collapse), its colours those nearest by."""
    if not max_faces or len(mesh.faces) <= max_faces:
        return mesh
    import trimesh
    from scipy.spatial import KDTree

    fewer = mesh.simplify_quadric_decimation(face_count=max_faces)
    _, nearest = KDTree(mesh.vertices).query(fewer.vertices)
    return trimesh.Trimesh(
        fewer.vertices,
        fewer.faces,
        vertex_colors=mesh.visual.vertex_colors[nearest],
        process=False,
    )
