r"""Gradient descent with any torch optimizer, as a trajectory.

The state holds the parameters and the evolving buffers. The carry holds the memory of
optimizers and schedulers, and (Eq. 18 of `docs/method.md`)

$$\mathrm{drift}(t, \theta) = \nabla_\theta\, \ell(t, \theta), \qquad
  \mathrm{update} = \text{clip, optimizer step, scheduler step}.$$

Buffers follow Eq. 19: the drift reports the changes that the evaluation made, which are
new values of changed elements (integers: the increment), and the update writes them.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from dreampropeller.batched_loss import BatchedDrift, on_states
from dreampropeller.buffers import updated_buffers
from dreampropeller.clipping import Clipping
from dreampropeller.host import ModuleHost
from dreampropeller.identity import Fingerprint, plain, shape_of
from dreampropeller.leftovers import Leftovers
from dreampropeller.loss_gradient import Loss, LossGradient
from dreampropeller.module_check import ModuleLoop
from dreampropeller.optimizers import (
    OptimizerFactory,
    Optimizers,
    Params,
    SchedulerFactory,
)
from dreampropeller.precision import Precision
from dreampropeller.rng import StepRandom, set_streams
from dreampropeller.sharded_loss import ShardedLoss, joined
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import Aux, Nest, State, copy_nest
from dreampropeller.verification import (
    Checked,
    EvaluationFailed,
    Repeats,
    probe,
    second_update,
)


class OptimizationTrajectory(Trajectory[Nest]):
    """Parameters updated by `torch.optim` (Eq. 18), buffers by Eq. 19.

    Equals the loop ``loss.backward(); clip; optimizer.step(); scheduler.step()`` bit
    for bit under `Sequential` (`test_optimization.py`).

    Args:
        loss: ``(step, y)`` returns a scalar loss, or the loss and scalars to log. `y`
            holds parameters that require gradients and buffers; buffers may be changed
            in place or replaced in `y`. A `BatchedLoss` lets `BatchedDispatcher`
            evaluate a window in one call, a `ShardedLoss` lets several workers share
            a step's views.
        params: The initial parameters by name.
        optimizer: Factory of one optimizer or several, called with the parameters by
            name.
        num_steps: The number of steps.
        buffers: Evolving tensors that are not optimised (an occupancy grid).
        scheduler: Factory of a scheduler (or None), called with an optimizer. A
            sequence holds one factory (or None) per optimizer.
        clip_grad_norm: Largest norm of all gradients taken together.
        clip_grad_value: Largest absolute value of a gradient entry.
        precision: "32-true", "bf16-mixed" or "16-mixed"; the loss is evaluated under
            autocast. With "16-mixed" the loss scale is part of the state, and a step
            whose gradients overflow is skipped (it counts), as with `GradScaler`; one
            optimizer only.
        seed: The global generators are seeded with (seed, step) during a step, so that
            dropout and `torch.randn` replay; an optimizer that draws goes on where the
            loss ended. None leaves them unchanged.
        about: Further values that a resumed run must share (a prompt, a data set):
            JSON values by name, included in the fingerprint.

    Raises:
        ValueError: An optimizer needs a closure, a scheduler needs a metric, a
            parameter belongs to no state, or the precision is unknown (or not
            available with several optimizers).
        TypeError: An optimizer's memory cannot be restored from a checkpoint.
    """

    def __init__(
        self,
        loss: Loss,
        params: Mapping[str, Tensor],
        optimizer: OptimizerFactory,
        num_steps: int,
        *,
        buffers: Mapping[str, Tensor] | None = None,
        scheduler: SchedulerFactory | Sequence[SchedulerFactory | None] | None = None,
        clip_grad_norm: float | None = None,
        clip_grad_value: float | None = None,
        precision: str | int = "32-true",
        seed: int | None = 0,
        about: Mapping[str, Any] | None = None,
        _host: ModuleHost | None = None,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"`num_steps` is {num_steps}: write at least 1.")
        self.num_steps = num_steps
        self._loss = loss
        written = getattr(loss, "__wrapped__", loss)
        self._sharded = written if isinstance(written, ShardedLoss) else None
        self._batched = on_states(loss, None if _host is None else _host.module)
        self._random = None if seed is None else StepRandom(seed)
        self._clipping = Clipping(clip_grad_norm, clip_grad_value)
        self._initial = {
            name: tensor.detach().clone()
            for name, tensor in {**params, **(buffers or {})}.items()
        }
        if len(self._initial) < len(params) + len(buffers or {}):
            raise ValueError(
                "A name stands in both `params` and `buffers`; rename one of them."
            )
        self._host = _host
        parameters: Params = {n: nn.Parameter(self._initial[n]) for n in params}
        known = () if _host is None else tuple(_host.module.modules())

        def make() -> Optimizers:
            own = parameters if _host is None else _host.parameters
            return Optimizers(own, optimizer, scheduler, _host is None, known)

        self._make_optimizers, self._optimizers = make, make()
        self._initial_carry = copy_nest(self._optimizers.export())
        self._fingerprint = {
            "state": {name: shape_of(value) for name, value in self._initial.items()},
            **self._optimizers.fingerprint(),
            "clip_grad_norm": clip_grad_norm,
            "clip_grad_value": clip_grad_value,
            "precision": str(precision),
            "seed": seed,
            "about": plain(about or {}),
        }
        device = next(iter(self._initial.values())).device
        self._precision = Precision(str(precision), device)
        _check_scale(self._precision, self._optimizers.count)
        self._gradient = LossGradient(
            _host, self._optimizers, self._precision, self._random, self._initial.keys()
        )

    @classmethod
    def from_module(
        cls,
        module: nn.Module,
        loss: Callable[[int, nn.Module], Any],
        optimizer: OptimizerFactory,
        num_steps: int,
        *,
        ignore: Collection[str] = (),
        **options: Any,
    ) -> OptimizationTrajectory:
        """Wrap the body of an existing loop: ``(step, module)`` returns its loss.

        The module is evaluated in its own tensors, so hooks, activation checkpointing,
        captured and marked parameters and compiled parts work as in the loop. After a
        solve the module is as before; `module.load_state_dict(solution.value,
        strict=False)` loads the result. Parameters that do not require gradients are
        frozen and not part of the state; writing into one during a call is refused.

        Args:
            module: The module to optimise.
            loss: The body of the loop, up to the loss. A window of a `BatchedLoss`
                that `BatchedDispatcher` evaluates is not in the module's own tensors.
            optimizer: See the class; called with the module's own parameters by name.
            num_steps: See the class.
            ignore: Names of counters, averages and logs that nothing reads, as the
                check names them (`calls`, `meter`): they are left alone, and count the
                evaluations of the solve.
            **options: Further arguments of the class.
        """
        host = ModuleHost(module, ignore)

        def evaluated(step: int, y: State) -> Any:
            del y  # the module holds it
            return loss(step, module)

        vars(evaluated)["__wrapped__"] = loss
        return cls(
            evaluated,
            host.parameters,
            optimizer,
            num_steps,
            buffers=host.buffers(),
            _host=host,
            **options,
        )

    def fingerprint(self) -> Fingerprint:
        """Names and shapes, optimizers and schedulers with their settings, the seed."""
        return {**super().fingerprint(), **self._fingerprint}

    def init(self) -> tuple[State, Nest]:
        """The initial parameters and buffers, and the fresh optimizers' memory."""
        y = {name: tensor.clone() for name, tensor in self._initial.items()}
        y |= self._precision.init()
        return y, copy_nest(self._initial_carry)

    def make_drift(self, device: torch.device) -> Drift:
        """The gradient of the loss, and the changes of the buffers."""
        self._settle(device)
        self._repeats = None
        # An optimizer that draws goes on where each step's own loss ended.
        if self._batched is None or self._optimizers.may_draw:
            return self._drift
        return BatchedDrift(self._drift, self._batch)

    def make_shard(self, device: torch.device, index: int, count: int) -> Drift:
        """See `Trajectory.make_shard`; only with a `ShardedLoss`."""
        if count == 1:
            return self.make_drift(device)
        if self._sharded is None or self._optimizers.may_draw:
            raise ValueError(
                f"`{type(self).__name__}` cannot split a step into {count} shards: "
                + (
                    "its optimizer draws random numbers where the whole step's loss "
                    "ends. Use another optimizer"
                    if self._sharded is not None
                    else "its loss is not a `dreampropeller.ShardedLoss`. Make it one"
                )
                + ", or split the window instead, one step per worker (`views=1`)."
            )
        self._settle(device)
        own = self._sharded.shard(index, count)

        def loss(step: int, view: State) -> Any:
            return own(step, view if self._host is None else self._host.module)

        def once(step: int, y: State) -> tuple[State, Aux]:
            return self._gradient.drift(step, y, loss, index)

        def now_and_then_twice(step: int, y: State) -> tuple[State, Aux]:
            # Noise was measured of whole drifts, whose entries a shard's differ from.
            if self._repeats is not None and not self._repeats.is_exact:
                return once(step, y)
            return self._now_and_then_twice(once, step, y)

        return now_and_then_twice

    def join_shards(self, parts: Sequence[tuple[State, Aux]]) -> tuple[State, Aux]:
        """The sum of the shards' drifts, with quotients of sums taken."""
        return joined(parts, None if self._sharded is None else self._sharded.join)

    def _settle(self, device: torch.device) -> None:
        """Bring the module to a device."""
        if self._host is not None:
            self._host.module.to(device)
            self._host.record()

    _repeats: Repeats | None = None
    """Repeats an evaluation now and then, once a check has passed."""

    def _drift(self, step: int, y: State) -> tuple[State, Aux]:
        return self._now_and_then_twice(self._drift_once, step, y)

    def _now_and_then_twice(
        self, once: Drift, step: int, y: State
    ) -> tuple[State, Aux]:
        if self._repeats is None:
            return once(step, y)
        return self._repeats.evaluate(once, step, y)

    def _drift_once(self, step: int, y: State) -> tuple[State, Aux]:
        return self._gradient.drift(step, y, self._loss)

    def _batch(
        self, steps: Sequence[int], ys: Sequence[State]
    ) -> list[tuple[State, Aux]]:
        """The drifts of several steps, by one call and one backward pass."""
        assert self._batched is not None, "only with a `BatchedLoss`"
        return self._gradient.several(steps, ys, self._batched)

    def update(
        self, step: int, y: State, carry: Nest, drift: State
    ) -> tuple[State, Nest]:
        """Clip, step every optimizer, then every scheduler; write the buffers."""
        gradients = {n: drift[n] for n in self._optimizers.trainable if n in drift}
        gradients = self._clipping(gradients)
        skip = Precision.overflowed(drift)
        random = self._random if self._optimizers.may_draw else None
        with random.scope(step, "update") if random else nullcontext():
            set_streams(drift)
            params, carry = self._optimizers.step(y, carry, gradients, skip=skip)
        scale = self._precision.update(y, drift)
        return {**y, **params, **updated_buffers(y, drift), **scale}, carry

    def check(self, step: int, y: State, carry: Nest, drift: Drift) -> Checked | None:
        """Also compare with the loop on the module itself, if there is a module."""
        host = self._host
        if host is None:
            return super().check(step, y, carry, drift)
        loss = getattr(self._loss, "__wrapped__", self._loss)
        loop = ModuleLoop(
            host,
            loss,
            self._loop_gradients,
            self._clipping.in_place,
            self._make_optimizers,
            self.num_steps - 1,
        )
        self._gradient.watch(loop.reached)
        try:
            found = probe(self, step, y, carry, drift, loop.cause)
        except EvaluationFailed:
            loop.captured.restore()
            return None
        with self._optimizers.observed(host.module, host.ignore):
            second_update(self, found)
        loop.elsewhere = self._optimizers.ignored
        fresh = self._optimizers if step == 0 else None
        loop.compare(found, carry, self._gradient.draws, fresh)
        last = self.num_steps - 1
        leftovers = Leftovers(host, loop.captured, last, found.noise)
        self._repeats = Repeats(found.noise, loop.cause, leftovers.evaluate)
        return found.checked(whole=True)

    def _loop_gradients(self, step: int, y: State) -> State:
        """The gradients of the loop, on what the module holds."""
        assert self._host is not None, "only with a host"
        with torch.enable_grad():
            found, _ = self._gradient.scalars(step, y, y, {}, self._loss)
            self._gradient.backward(step, found[""])
        gradients = self._host.gradients()
        overflow = Precision.overflowed(self._precision.unscale(gradients.values(), y))
        return {} if overflow else gradients


def _check_scale(precision: Precision, count: int) -> None:
    """Refuse a loss scale with several optimizers."""
    if precision.scales and count > 1:
        raise ValueError(
            f'`precision` is "16-mixed" with {count} optimizers: a loss scale leaves '
            "out the one that overflowed, which is not supported. Write "
            '`precision="bf16-mixed"`, which needs no scale, or put the parameters '
            "into the groups of one optimizer."
        )
