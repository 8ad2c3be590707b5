r"""The drift of a loss: its gradient at a state, and what it did to the buffers.

A whole step has one scalar to differentiate, a shard of it may have several
(`dreampropeller.sharded_loss`), several steps are one call (`BatchedLoss`). Each is
evaluated in the step's random scope and under autocast.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.optim import Optimizer

from dreampropeller.batched_loss import BatchedLoss
from dreampropeller.guard import GroupGuard, Guard
from dreampropeller.host import ModuleHost
from dreampropeller.leaves import Leaves
from dreampropeller.optimizers import Optimizers, dense
from dreampropeller.precision import Precision
from dreampropeller.rng import StepRandom, streams
from dreampropeller.sharded_loss import differentiated, scalars_of
from dreampropeller.tree import Aux, State

Loss: TypeAlias = Callable[[int, State], Any]
"""`(step, y) -> loss` or `(loss, aux)`; new buffer values are written into `y`."""


@dataclass(frozen=True)
class LossGradient:
    """Evaluates losses at states.

    Args:
        host: The module in whose own tensors they are evaluated; None: on leaves.
        optimizers: The optimizers of the parameters.
        precision: Autocast and loss scale.
        random: Source of the scope of a step; None: there is none.
        names: Names of all parameters and buffers.

    Attributes:
        watched: Optimizers that the loss refers to, by path; it must not set them.
    """

    host: ModuleHost | None
    optimizers: Optimizers
    precision: Precision
    random: StepRandom | None
    names: Collection[str]
    watched: dict[str, Optimizer] = field(default_factory=dict, init=False)

    def watch(self, optimizers: Mapping[str, Optimizer]) -> None:
        """Refuse from now on a loss that sets one of these optimizers."""
        self.watched.clear()
        self.watched.update(optimizers)

    def drift(
        self, step: int, y: State, loss: Loss, shard: int | None = None
    ) -> tuple[State, Aux]:
        """The drift of a loss, and scalars to log as numbers.

        Args:
            step: The step.
            y: The state.
            loss: The loss; a host's reads the module instead of the state.
            shard: Index of the shard whose loss it is; None: the whole step's. The
                first shard alone reports what is not a sum over views.
        """
        evaluate = self._evaluate if self.host is None else self._evaluate_host
        drift, aux = self._finished(y, *evaluate(step, y, loss, shard))
        if shard:
            others = [name for name in y if name not in self.optimizers.trainable]
            gone = {*others, *(f"{name}/changed" for name in others)}
            drift = {name: value for name, value in drift.items() if name not in gone}
        return drift, aux

    def _finished(
        self, y: State, gradients: State, others: State, aux: Mapping[str, Any]
    ) -> tuple[State, Aux]:
        """The drift of gradients and buffers, and scalars to log as numbers."""
        found = self.precision.unscale(gradients.values(), y)
        drift = {**found, **others}
        if not Precision.overflowed(found):
            drift |= {name: dense(name, value) for name, value in gradients.items()}
        return drift, {
            key: float(torch.as_tensor(v).detach()) for key, v in aux.items()
        }

    def draws(self, step: int) -> AbstractContextManager[None]:
        """Scope of the random numbers of a step."""
        return self.random.scope(step) if self.random else nullcontext()

    def _drawn(self) -> State:
        """The global generators where the loss ended, if an optimizer goes on there."""
        return streams() if self.random and self.optimizers.may_draw else {}

    def _evaluate(
        self, step: int, y: State, loss: Loss, shard: int | None
    ) -> tuple[State, State, Mapping[str, Any]]:
        """Gradients, changes of the buffers, and scalars to log."""
        own = self._leaves(y)
        leaves = list(own.leaves.values())

        def gradients(scalar: Tensor, again: bool) -> State:
            self.precision.refuse_parts(step, leaves)
            found = torch.autograd.grad(
                scalar, leaves, retain_graph=again, allow_unused=True
            )
            return own.gradients(found)

        with self.draws(step), torch.enable_grad():
            found, aux = self.scalars(step, y, own.view, own.leaves, loss, shard)
            result = differentiated(found, gradients)
            drawn = self._drawn()
        return result, {**own.buffers(), **drawn}, aux

    def _leaves(self, y: State) -> Leaves:
        return Leaves.of(y, self.optimizers.trainable, self.names)

    def several(
        self, steps: Sequence[int], ys: Sequence[State], loss: BatchedLoss
    ) -> list[tuple[State, Aux]]:
        """The drifts of several steps, by one call and one backward pass.

        Args:
            steps: The steps.
            ys: The state at each.
            loss: The loss, a function of states.
        """
        own = [self._leaves(y) for y in ys]
        guards = [Guard(one.leaves, self.optimizers.trainable) for one in own]
        with torch.enable_grad():
            with self.precision.autocast():
                parts = []
                for step, one in zip(steps, own, strict=True):
                    with self.draws(step):
                        parts.append(loss.each(step, one.view))
                with self.draws(steps[0]):  # leaves the global generators alone
                    results = loss.together(parts)
            for guard in guards:
                guard.check()
            scaled = [
                self._scaled(*one) for one in zip(steps, ys, results, strict=True)
            ]
            leaves = [leaf for one in own for leaf in one.leaves.values()]
            scalars = [scalar for scalar, _ in scaled]
            found = iter(torch.autograd.grad(scalars, leaves, allow_unused=True))
        return [
            self._finished(
                y, one.gradients([next(found) for _ in one.leaves]), one.buffers(), aux
            )
            for y, one, (_, aux) in zip(ys, own, scaled, strict=True)
        ]

    def _evaluate_host(
        self, step: int, y: State, loss: Loss, shard: int | None
    ) -> tuple[State, State, Mapping[str, Any]]:
        """The same in the module's own tensors, by `backward` as in its loop."""
        host = self.host
        assert host is not None, "only with a host"

        def gradients(scalar: Tensor, again: bool) -> State:
            if shard is None:
                self.backward(step, scalar)
            else:
                host.clear_gradients()
                scalar.backward(retain_graph=again)
            return host.gradients()

        with host.holding(y):
            guarded = {**host.parameters, **host.frozen}
            with self.draws(step), torch.enable_grad():
                found, aux = self.scalars(step, y, y, guarded, loss, shard)
                result = differentiated(found, gradients)
                drawn = self._drawn()
            return result, {**host.buffer_drift(y), **drawn}, aux

    def backward(self, step: int, loss: Tensor) -> None:
        """Go backward in the module, unless the loss has done so itself."""
        assert self.host is not None, "only with a host"
        self.precision.refuse_parts(step, self.host.parameters.values())
        if loss.requires_grad:
            loss.backward()
        elif not self.host.gradients():
            raise ValueError(
                f"The loss of step {step} depends on no parameter: return it with its "
                "graph, without `.item()` or `.detach()`, or go backward in it."
            )

    def scalars(
        self,
        step: int,
        y: State,
        view: State,
        guarded: Mapping[str, Tensor],
        loss: Loss,
        shard: int | None = None,
    ) -> tuple[dict[str, Tensor], Mapping[str, Any]]:
        """The scalars to differentiate, of which a whole step has one, and to log."""
        guard = Guard(guarded, self.optimizers.trainable)
        groups = GroupGuard(self.watched)
        with self.precision.autocast():
            result = loss(step, view)
        guard.check()
        groups.check(step)
        if shard is None:
            scalar, aux = self._scaled(step, y, result)
            return {"": scalar}, aux
        if any(t.requires_grad and t.grad is not None for t in guarded.values()):
            raise ValueError(
                f"The loss of shard {shard} goes backward itself: return the sum of "
                "all parts in the `Contribution`."
            )
        scalars, aux = scalars_of(result, shard)
        scaled = {n: self._scaled(step, y, one)[0] for n, one in scalars.items()}
        return scaled, aux

    def _scaled(
        self, step: int, y: State, result: Any
    ) -> tuple[Tensor, Mapping[str, Any]]:
        """What a loss returned, as the scalar to differentiate and scalars to log."""
        loss, aux = result if isinstance(result, tuple) else (result, {})
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            raise ValueError(
                f"The loss of step {step} is not a scalar tensor; return "
                "`loss.mean()`, or a tuple `(loss, aux)`."
            )
        return self.precision.scale(loss.sum(), y), aux
