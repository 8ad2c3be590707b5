r"""Growing splats as a trajectory: drift, carry and jumps.

$$\mathrm{drift}(t, \theta) = (\nabla_\theta \ell,\ \text{statistics of each splat}),
\qquad \mathrm{update} = \text{optimizer, statistics} \mathrel{+}= .$$

Statistics are in the carry, so each accepted step counts once, however often it was
evaluated. Growth is a jump: one map moves the rows of parameters, moments and
statistics, and is passed to the solver.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

import dreampropeller as dp
from dreampropeller.trajectory import Parents
from dreampropeller.tree import Aux, Nest, State
from systems.scene.gaussians import growth, relocation
from systems.scene.gaussians.growth import GrowthConfig, Rows
from systems.scene.gaussians.scene import SplatRendering
from systems.scene.gaussians.splats import of_state

SEEN = "seen/"
"""Prefix of a drift's statistics."""


class GrowingGaussians(dp.OptimizationTrajectory):
    """Splats under an optimizer, growing by the rules of a config.

    Args:
        loss: ``(step, y)`` returns a loss, which is a mean over views, scalars to log,
            and the rendering; or a `BatchedLoss` of such; or a `ShardedLoss` of one of
            them, whose contributions have `seen`: the rendering, and the number of
            views of the whole step.
        params: The initial parameters, those of the splats with a prefix.
        optimizer: Factory of the optimizer, called with the parameters by name.
        num_steps: The number of steps.
        config: Settings of the growth.
        max_splats: Largest number of splats.
        prefix: Prefix of the splats' names.
        decay: Factor of the means' learning rate at a step; default: 1.
        precision: "32-true" or "bf16-mixed".
        seed: Seed of the run and of the growth.

    Raises:
        ValueError: The precision scales the loss.
    """

    def __init__(
        self,
        loss: Callable[[int, State], tuple[Tensor, Mapping[str, Any], SplatRendering]],
        params: Mapping[str, Tensor],
        optimizer: Callable[[Mapping[str, Tensor]], torch.optim.Optimizer],
        num_steps: int,
        *,
        config: GrowthConfig,
        max_splats: int = 1_000_000,
        prefix: str = "geometry.",
        decay: Callable[[int], float] | None = None,
        precision: str | int = "32-true",
        seed: int = 0,
        about: Mapping[str, Any] | None = None,
    ) -> None:
        if str(precision) in ("16-mixed", "16"):
            raise ValueError(
                f"`precision` is {precision!r}: growth compares gradients, which a "
                "loss scale would change. Write `trainer.precision=32-true` or "
                "`bf16-mixed`."
            )
        self.config = config
        self._max_splats = max_splats
        self._prefix = prefix
        self._keyed = dp.StepRandom(seed)
        self._watched: dict[int, tuple[SplatRendering, Tensor, int]] = {}

        def watched(found: list[Any]) -> list[tuple[Tensor, Mapping[str, Any]]]:
            self._watched.clear()  # what a failed evaluation left
            return [
                (one[0], self._watch(slot, *one[1:])) for slot, one in enumerate(found)
            ]

        def made(named: dict[str, nn.Parameter]) -> torch.optim.Optimizer:
            one = optimizer(named)
            owned = named[prefix + "means"]
            self._means = next(
                index
                for index, group in enumerate(one.param_groups)
                if any(parameter is owned for parameter in group["params"])
            )
            return one

        def scheduler(one: torch.optim.Optimizer) -> LRScheduler:
            rates: list[Callable[[int], float]] = [_constant] * len(one.param_groups)
            rates[self._means] = decay or _constant
            return torch.optim.lr_scheduler.LambdaLR(one, rates)

        def watching(whole: Any) -> Any:
            if isinstance(whole, dp.BatchedLoss):
                return whole.then(watched)
            return lambda step, y: watched([whole(step, y)])[0]

        if isinstance(loss, dp.ShardedLoss):
            own: Any = dp.ShardedLoss(
                watching(loss.whole), self._watching_part(loss.shard), loss.join
            )
        else:
            own = watching(loss)
        super().__init__(
            own,
            params,
            made,
            num_steps,
            scheduler=None if decay is None else scheduler,
            precision=precision,
            seed=seed,
            about=about,
        )

    _means: int
    """The optimizer's group that holds the means."""

    def init(self) -> tuple[State, Nest]:
        """Parameters and moments, and empty statistics."""
        y, carry = super().init()
        means = y[self._prefix + "means"]
        return y, {**carry, "seen": growth.nothing_seen(len(means), means)}

    def _watch(
        self,
        slot: int,
        aux: Mapping[str, Any],
        rendered: SplatRendering,
        total: int | None = None,
    ) -> Mapping[str, Any]:
        """Keep the gradient of the means in pixels, which growth needs."""
        total = total or len(rendered.means)
        if self.config.strategy == "densify" and rendered.means.requires_grad:
            rendered.means.register_hook(
                lambda gradient: self._watched.update(
                    {slot: (rendered, gradient, total)}
                )
            )
        return {**aux, "splats": float(rendered.means.shape[1])}

    def _watching_part(self, shard: Callable[..., Any]) -> Callable[..., Any]:
        """The losses of shards whose renderings are watched."""

        def watching(index: int, count: int) -> Any:
            part = shard(index, count)

            def loss(step: int, y: State) -> dp.Contribution | None:
                self._watched.clear()
                found = part(step, y)
                if found is None:
                    return None
                return replace(found, aux=self._watch(0, found.aux, *found.seen))

            return loss

        return watching

    def make_shard(self, device: torch.device, index: int, count: int) -> dp.Drift:
        """See `Trajectory.make_shard`; with the statistics of the shard's views."""
        drift = super().make_shard(device, index, count)
        if count == 1:
            return drift
        return lambda step, y: self._with_statistics([drift(step, y)])[0]

    def join_shards(self, parts: Sequence[tuple[State, Aux]]) -> tuple[State, Aux]:
        """Gradients and statistics added up, and the largest of the sizes."""
        size = SEEN + "size"
        sizes = [drift[size] for drift, _ in parts if size in drift]
        others = [
            ({n: v for n, v in drift.items() if n != size}, aux) for drift, aux in parts
        ]
        drift, aux = super().join_shards(others)
        if sizes:
            drift[size] = torch.stack(sizes).amax(0)
        return drift, aux

    def _drift(self, step: int, y: State) -> tuple[State, Aux]:
        return self._with_statistics([super()._drift(step, y)])[0]

    def _batch(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        return self._with_statistics(super()._batch(steps, ys))

    def _with_statistics(
        self, found: list[tuple[State, Aux]]
    ) -> list[tuple[State, Aux]]:
        """Drifts with what was watched in their backward pass."""
        for slot, (rendered, gradient, total) in self._watched.items():
            statistics = growth.seen(gradient, rendered.radii, *rendered.size, total)
            found[slot][0].update({SEEN + n: v for n, v in statistics.items()})
        self._watched.clear()  # the rendering holds the loss's graph
        return found

    def update(
        self, step: int, y: State, carry: Nest, drift: State
    ) -> tuple[State, Nest]:
        """Step the optimizer, add statistics, and add noise if growth relocates."""
        counted = carry["seen"]
        if SEEN + "count" in drift:  # a predictor's drift has no statistics
            counted = growth.counted(
                counted, {name: drift[SEEN + name] for name in counted}
            )
        rate = self._rate(carry)
        y, carry = super().update(step, y, carry, drift)
        if self.config.strategy == "relocate":
            splats = of_state(y, self._prefix)
            generator = self._keyed.generator(step, "explore")
            moved = relocation.explored(splats, rate * self.config.noise, generator)
            y = {**y, self._prefix + "means": moved}
        return y, {**carry, "seen": counted}

    def next_jump(self, step: int) -> int:
        """The next step before which splats grow or their opacities are reset."""
        return next(
            (
                one
                for one in range(step + 1, min(self.num_steps, self.config.end + 1))
                if self.config.grows(one) or self.config.resets(one)
            ),
            self.num_steps,
        )

    def jump(
        self, step: int, y: State, carry: Nest
    ) -> tuple[State, Nest, Parents | None]:
        """Grow, then reset; moments of born and of reset rows are zero."""
        splats = of_state(y, self._prefix)
        count = len(splats["means"])
        rows = torch.arange(count, device=splats["means"].device)
        moved = Rows(rows, torch.zeros_like(rows, dtype=torch.bool))
        if self.config.grows(step):
            splats, moved = self._grow(step, splats, carry["seen"])
            seen = growth.nothing_seen(len(moved.parents), splats["means"])
            carry = {**carry, "seen": seen}
        parents = {self._prefix + name: moved.parents for name in splats}
        if self.config.resets(step):
            splats = growth.reset_opacities(splats, self.config)
            parents[self._prefix + "opacities"] = torch.full_like(moved.parents, -1)
        carry = self._moved(carry, parents, moved, count)
        y = {**y, **{self._prefix + name: value for name, value in splats.items()}}
        return y, carry, parents

    def _grow(self, step: int, splats: State, seen: State) -> tuple[State, Rows]:
        generator = self._keyed.generator(step, "growth")
        if self.config.strategy == "relocate":
            return relocation.relocate(splats, self.config, self._max_splats, generator)
        return growth.densify(splats, seen, self.config, self._max_splats, generator)

    def _moved(self, carry: Nest, parents: Parents, moved: Rows, count: int) -> Nest:
        """The carry, with the rows of the optimizer's memory moved like the splats."""
        optimizers = []
        for memory in carry["optimizers"]:
            state = dict(memory["state"])
            for name in parents.keys() & state.keys():
                born = moved.born | (parents[name] < 0)
                follow = Rows(moved.parents, born)
                state[name] = {
                    key: follow.take(value)
                    if isinstance(value, Tensor) and value.shape[:1] == (count,)
                    else value
                    for key, value in state[name].items()
                }
            optimizers.append({**memory, "state": state})
        return {**carry, "optimizers": optimizers}

    def _rate(self, carry: Nest) -> float:
        """The learning rate of the means at this step."""
        return float(carry["optimizers"][0]["groups"][self._means]["lr"])


def _constant(step: int) -> float:
    del step
    return 1.0
