r"""Score distillation composed of views, images, guidance and regularisers.

$$\ell(t, \theta) = \lambda_{sds}\, \ell_{guidance}(x_\theta) + \sum_r \lambda_r R_r,$$

with images $x_\theta$ rendered at the views of step t. A system defines each part once;
the loss and the drift are composed from them here, also those of several steps, whose
views guidance then sees at once.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

import dreampropeller as dp
from systems.base import System
from systems.guidance.base import Guidance, Log, Shown
from systems.guidance.prompts import PromptConfig
from systems.guidance.table import GUIDANCES
from systems.scene.cameras import Views
from systems.scene.regularisers import REGULARISERS, Regulariser
from systems.scene.renderers import Rendering
from systems.settings.schedules import value_at


@dataclass(frozen=True)
class Look:
    """The views of a step, as rendered.

    Attributes:
        step: The step on the trajectory.
        views: Its views.
        seen: Their rendering.
        images: What guidance is shown of it, shape ``(views, 3, height, width)``.
    """

    step: int
    views: Views
    seen: Rendering
    images: Float[Tensor, "views 3 height width"]


class Distillation(System):
    """A system optimised by score distillation."""

    regularisers: Mapping[str, Regulariser] = REGULARISERS
    """Terms of the loss besides guidance, by the names of their weights."""

    settings: Any
    """Its section of the config: prompts, guidance, loss weights and optimizer."""

    def load_guidance(self) -> Guidance:
        """The guidance; loads the pretrained model."""
        guidance = GUIDANCES[self.settings.guidance_type]
        return guidance.load(self.settings.guidance, self.prompts, self.device)

    @property
    def prompts(self) -> PromptConfig:
        """The prompts of the guidance."""
        return self.settings.prompt_processor

    def weights(self, step: int) -> Mapping[str, float]:
        """The weights of the loss at a step: of "sds" and of each regulariser."""
        return {
            name.removeprefix("lambda_"): value_at(value, step)
            for name, value in vars(self.settings.loss).items()
        }

    def optimizer(self, parameters: Mapping[str, Tensor]) -> torch.optim.Optimizer:
        """The optimizer of parameters by name."""
        return self.settings.optimizer.build(parameters)

    @abc.abstractmethod
    def rendering(
        self, module: nn.Module, views: Views, step: int, with_normals: bool
    ) -> Rendering:
        """The images of a training step, and the inputs of the regularisers.

        Args:
            module: The optimised module, holding the state to render.
            views: The step's views, or a subset of them.
            step: The step on the trajectory.
            with_normals: Whether a regulariser needs normals.
        """

    def images(
        self, seen: Rendering, views: Views
    ) -> Float[Tensor, "views 3 height width"]:
        """What guidance is shown of a rendering, from 0 to 1; default: its colours."""
        del views
        return seen.rgb.permute(0, 3, 1, 2)

    def views(self, step: int) -> Views:
        """The views of a training step; a pure function of the step."""
        return self.cameras.views(step, self.random)

    def look(self, step: int, module: nn.Module) -> Look:
        """The views of a step and their images, all that a step needs by itself."""
        weight, views = self.weights(step), self.views(step)
        with_normals = any(
            term.needs_normals and weight[name] > 0
            for name, term in self.regularisers.items()
        )
        seen = self.rendering(module, views, step, with_normals)
        return Look(step, views, seen, self.images(seen, views))

    def losses(
        self, looks: Sequence[Look], guidance: Guidance
    ) -> list[tuple[Tensor, dict[str, Any]]]:
        """The losses of steps, and scalars to log; guidance sees all views at once."""
        shown = [Shown(one.images, one.views.cameras, one.step) for one in looks]
        found = guidance.several(shown, self.random)
        return [self._total(look, *one) for look, one in zip(looks, found, strict=True)]

    def _total(
        self, look: Look, sds: Tensor, log: Log
    ) -> tuple[Tensor, dict[str, Any]]:
        weight, seen = self.weights(look.step), look.seen
        total = weight["sds"] * sds
        terms = {name: term(seen) for name, term in self.regularisers.items()}
        for name, value in terms.items():
            if weight[name]:
                total = total + weight[name] * value
        return total, {
            "loss": total,
            "loss_sds": sds,
            **{f"loss_{name}": value for name, value in terms.items()},
            **log,
            "opacity": seen.opacity.mean(),
        }

    def loss(self, guidance: Guidance) -> Callable[[int, nn.Module], Any]:
        """The loss of a step, a function of step and module.

        A window of it is one call of the guidance, unless the guidance is trained too:
        then it reads the state itself.
        """
        loss = dp.BatchedLoss(self.look, lambda looks: self.losses(looks, guidance))
        if self.module is self.scene and self.is_reproducible:
            return loss
        return lambda step, module: loss(step, module)

    def trajectory(self) -> dp.Trajectory[Any]:
        """The trajectory of the optimizer on the loss; loads the pretrained model."""
        guidance = self.load_guidance()
        return dp.OptimizationTrajectory.from_module(
            self.module,
            self.loss(guidance),
            self.optimizer,
            self.config.trainer.max_steps,
            precision=self.config.trainer.precision,
            seed=self.config.seed,
            about=self.about(),
        )
