r"""Score distillation composed of views, images, guidance and regularisers.

$$\ell(t, \theta) = \lambda_{sds}\, \ell_{guidance}(x_\theta) + \sum_r \lambda_r R_r,$$

with images $x_\theta$ rendered at the views of step t. A system defines each part once;
the loss and the drift are composed from them here, also those of several steps, whose
views guidance then sees at once.
"""

from __future__ import annotations

import abc
import copy
import math
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
from systems.settings.reader import ConfigError
from systems.settings.schedules import value_at, values_of

_NORMS = ("grad_norm",)
"""What guidances log that is a norm over all views."""
_SAME = ("max_timestep", "splats")
"""What is logged that is the same for all views."""
_NO_MEANS = (*_NORMS, *_SAME)


def join(logged: Sequence[dp.Aux]) -> dp.Aux:
    """What shards logged, as that of the whole step: means, norms, what is the same."""
    found: dp.Aux = {}
    for aux in logged:
        for name, value in aux.items():
            if name in _NORMS:
                found[name] = math.hypot(found.get(name, 0.0), value)
            elif name in _SAME:
                found[name] = value
            else:
                found[name] = found.get(name, 0.0) + value
    return found


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

    shard = dp.Shard()
    """The slice of a step's views that this system has; see `part`."""

    def part(self, shard: dp.Shard) -> Distillation:
        """This system with a shard of each step's views and their random numbers."""
        one = copy.copy(self)
        one.shard = shard
        one.random = dp.ShardRandom(self.config.seed, shard, self.num_views)
        return one

    @property
    def whole_random(self) -> dp.StepRandom:
        """The random numbers of a step, whatever the shard."""
        return dp.StepRandom(self.config.seed)

    def num_views(self, step: int) -> int:
        """The number of views of a training step, all shards together."""
        return self.cameras.shape(step)[0]

    def views(self, step: int) -> Views:
        """All views of a training step; a pure function of the step."""
        return self.cameras.views(step, self.random)

    def look(self, step: int, module: nn.Module) -> Any:
        """The views of a step and their images, all that a step needs by itself.

        None if the shard has no views.
        """
        weight, views = self.weights(step), self.views(step)
        if self.shard.count > 1:
            views = views.chosen(self.shard.of(len(views.cameras)))
            if not len(views.cameras):
                return None
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

    def contribution(self, look: Any, guidance: Guidance) -> dp.Contribution | None:
        """A shard's part of the loss of a step; None if it has no views.

        Means over its views count by its share of them; terms with counts that vary are
        quotients of sums over all shards. Beside it stand the rendering and the number
        of views of the whole step, which growth needs.
        """
        if look is None:
            return None
        shown = Shown(look.images, look.views.cameras, look.step)
        ((sds, logged),) = guidance.several([shown], self.random)
        weight, seen = self.weights(look.step), look.seen
        share = len(look.views.cameras) / self.num_views(look.step)
        terms: dict[str, Tensor] = {}
        ratios: dict[str, dp.Ratio] = {}
        for name, term in self.regularisers.items():
            if term.counts_vary:
                amount, count = term.amounts(seen).sum(), term.counts(seen).sum()
                ratios[f"loss_{name}"] = dp.Ratio(weight[name], amount, count)
            else:
                terms[name] = share * term(seen)
        total = weight["sds"] * (share * sds)
        for name, value in terms.items():
            if weight[name]:
                total = total + weight[name] * value
        log = {
            "loss": total,
            "loss_sds": share * sds,
            **{f"loss_{name}": value for name, value in terms.items()},
            **{n: v if n in _NO_MEANS else share * v for n, v in logged.items()},
            "opacity": share * seen.opacity.mean(),
        }
        return dp.Contribution(total, log, ratios, (seen, self.num_views(look.step)))

    def check_views(self, count: int) -> None:
        """See `Problem.check_views`."""
        sizes = self.cameras.batch_size
        most = max(sizes) if isinstance(sizes, list) else sizes
        if count > most:
            raise ConfigError(
                f"`dispatch.views` is {count}, and a step has {most} view(s) "
                f"(`data.batch_size`): write at most {most}, or more views per step."
            )
        beside = "3d_normal_smooth"
        if beside in self.regularisers and any(
            values_of(vars(self.settings.loss)[f"lambda_{beside}"])
        ):
            raise ConfigError(
                f"`system.loss.lambda_{beside}` draws shifts for all samples of a step "
                "at once, so that its views cannot be split: write "
                f"`dispatch.views=1`, or `system.loss.lambda_{beside}=0`."
            )
        if not self.is_reproducible:
            raise ConfigError(
                "`system.guidance.lora` is `local`, a network that each worker trains "
                "by itself, so that views cannot be split: write `dispatch.views=1`, "
                "or `system.guidance.lora=shared`."
            )

    def loss(self, guidance: Guidance) -> Callable[[int, nn.Module], Any]:
        """The loss of a step, a function of step and module.

        A window of it is one call of the guidance, unless the guidance is trained too:
        then it reads the state itself.
        """
        loss = dp.BatchedLoss(self.look, lambda looks: self.losses(looks, guidance))
        batches = self.module is self.scene and self.is_reproducible
        whole = loss if batches else (lambda step, module: loss(step, module))
        return dp.ShardedLoss(whole, self.split(guidance), join)

    def split(self, guidance: Guidance) -> Callable[[int, int], dp.BatchedLoss]:
        """The losses of shards; see `dreampropeller.ShardedLoss`."""

        def shard(index: int, count: int) -> dp.BatchedLoss:
            part = self.part(dp.Shard(index, count))

            def together(looks: Sequence[Any]) -> list[dp.Contribution | None]:
                return [part.contribution(look, guidance) for look in looks]

            return dp.BatchedLoss(part.look, together)

        return shard

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
