r"""Any `LightningModule` with automatic optimisation, as a trajectory.

One step of `Trainer.fit` is (Eq. 10 of `docs/method.md`)

$$\mathrm{drift}(t, \theta) = \nabla_\theta\, \mathtt{training\_step}(b_t, t), \qquad
  \mathrm{update} = \text{optimizer step, scheduler step},$$

with the batch $b_t$ and all random numbers keyed by the step t. The module stays one
live object: a state is written into its own tensors before an evaluation, and what the
evaluation did to the buffers is read back (Eq. 11). Nothing is cloned or pickled. Its
plain attributes are put back before each evaluation, so steps may come in any order.

Lightning itself is not imported: the module brings it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dreampropeller.adapters.lightning import optimizers as configured
from dreampropeller.adapters.lightning import refusals, trainer
from dreampropeller.adapters.lightning.attributes import Attributes
from dreampropeller.buffers import buffer_drift, updated_buffers
from dreampropeller.dispatch.process_group import local_device
from dreampropeller.guard import Guard
from dreampropeller.precision import Precision
from dreampropeller.rng import StepRandom
from dreampropeller.trajectory import Drift, Trajectory
from dreampropeller.tree import Aux, Nest, State, copy_nest


@runtime_checkable
class Keyed(Protocol):
    """Makes the global random streams a function of the step; see `StepRandom`."""

    def scope(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Key the streams inside the block and restore them after it."""
        ...


class LightningTrajectory(Trajectory[Nest]):
    """A LightningModule's training run (Eq. 10); buffers by Eq. 11.

    `Sequential` equals the module's own `Trainer.fit` bit for bit on CPU, given the
    same random numbers at each step (`tests/adapters/test_lightning.py`).

    Hooks run in Lightning's order: `on_train_batch_start`, `training_step`,
    `on_before_zero_grad`, `on_before_backward`, `on_after_backward`,
    `on_before_optimizer_step`, `on_train_batch_end`. All of them run inside of the
    drift, the last one therefore before the optimizer's step and with `global_step`
    already t + 1. Callbacks and loggers do not run: what the module logs is the drift's
    `Aux`.

    Args:
        module: What is trained; it is used from now on, and left in training mode.
        data: A `DataLoader` with a map-style data set, a `LightningDataModule` of one,
            or a function of the step that gives the batch.
        num_steps: The number of steps.
        seed: All four global random streams (Python, numpy, torch on CPU and on GPU)
            are keyed by (seed, step) during a step, the batch included.
        precision: "32-true", "bf16-mixed" or "16-mixed", as for the `Trainer`.
        gradient_clip_val: As for the `Trainer`.
        gradient_clip_algorithm: "norm" or "value", as for the `Trainer`.
        device: Where the module goes; default: this rank's GPU, or else the CPU.
        random: Keys the random streams in place of `StepRandom(seed)`.

    Raises:
        TypeError: `module` is no LightningModule, or an optimizer remembers something
            a checkpoint could not restore.
        ValueError: The module's training cannot be evaluated ahead of time: manual
            optimisation, a closure, a metric-driven scheduler, a hook that belongs to
            the trainer's loop, an iterable data set. The message names the way out.
    """

    def __init__(
        self,
        module: Any,
        data: Any,
        num_steps: int,
        *,
        seed: int = 0,
        precision: str | int = "32-true",
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str = "norm",
        device: torch.device | str | None = None,
        random: Keyed | None = None,
    ) -> None:
        if num_steps < 1:
            raise ValueError(f"`num_steps` is {num_steps}: write at least 1.")
        if gradient_clip_algorithm not in ("norm", "value"):
            raise ValueError(
                f"`gradient_clip_algorithm` is {gradient_clip_algorithm!r}: write "
                "`norm` or `value`."
            )
        self._refuse(module)
        self.num_steps = num_steps
        self.module = module
        self.device = local_device() if device is None else torch.device(device)
        self._random: Keyed = StepRandom(seed) if random is None else random
        self._clip = gradient_clip_val, gradient_clip_algorithm
        self._precision = Precision(str(precision), self.device)
        self._logged: dict[str, Any] = {}
        self._open(data, seed)
        self._initial = {**self._state(), **self._precision.init()}
        self._initial_carry = copy_nest(self._optimizers.export())
        self.attributes = Attributes(
            self._roots(), follow=self._follow, skip=self._SKIP
        )
        refusals.check_optimizers(self.attributes, self._owned)

    _SKIP = ("_trainer", "cfg", "hparams", "_hparams")

    # --- what a kind of module may do differently ---------------------------------

    def _refuse(self, module: Any) -> None:
        """Refuse what cannot be evaluated ahead of time."""
        refusals.check_module(module)

    def _open(self, data: Any, seed: int) -> None:
        """Set everything up in Lightning's order, up to the first step."""
        module = self.module
        if hasattr(data, "train_dataloader"):
            data.prepare_data()
            data.setup("fit")
        found = self._find_batches(data, seed)
        self.batch, loader, datamodule, self._epoch_length = found
        self.shim = trainer.Shim(self.num_steps, datamodule, loader)
        self.attach()
        # Shadowed on the instance: the real ones ask the trainer's loop for its state.
        module.log, module.log_dict = self._log, self._log_dict
        if datamodule is None:
            module.prepare_data()
        module.setup("fit")
        if hasattr(module, "configure_model"):
            module.configure_model()
        self.attach()  # what `configure_model` added, too
        self._configure()
        module.on_fit_start()
        module.on_train_start()
        module.zero_grad(set_to_none=True)
        module.train()

    def _find_batches(
        self, data: Any, seed: int
    ) -> tuple[Callable[[int], Any], Any, Any, int | None]:
        """Batches by step, the loader, the data module, the length of an epoch."""
        return trainer.batches(data, seed)

    def _configure(self) -> None:
        optimizers, schedules = configured.read(self.module.configure_optimizers())
        if len(optimizers) > 1:
            raise ValueError(
                f"`configure_optimizers` returned {len(optimizers)} optimizers, which "
                "Lightning accepts only with manual optimisation; put their parameters "
                "into the groups of one."
            )
        self._schedules = schedules
        self._seen_optimizers = [configured.view(one) for one in optimizers]
        self._parameters = configured.names(self.module, optimizers)
        self._optimizers = configured.lend(self._parameters, optimizers, schedules)
        self._owned = {id(one) for one in optimizers}
        self.shim.optimizers = self._seen_optimizers

    def _roots(self) -> dict[str, object]:
        """Where to look for plain attributes."""
        loader = self.shim.train_dataloader
        roots: dict[str, object] = {"": self.module}
        return roots if loader is None else {**roots, "dataset": loader.dataset}

    def _follow(self, value: object) -> bool:
        """Which objects besides modules and data sets hold attributes of a step."""
        del value
        return False

    # --- the trajectory -----------------------------------------------------------

    def init(self) -> tuple[State, Nest]:
        """The module's parameters and buffers, and its fresh optimizers' memory."""
        y = {name: tensor.clone() for name, tensor in self._initial.items()}
        return y, copy_nest(self._initial_carry)

    def make_drift(
        self, device: torch.device, shard: tuple[int, int] = (0, 1)
    ) -> Drift:
        """The gradient of `training_step`, and what it did to the buffers."""
        if shard != (0, 1):
            raise ValueError(
                f"`shard={shard}`: a training step gives no access to its views, so it "
                "cannot be split. Split the window instead: one step per worker."
            )
        del device  # the module and its states live on `self.device` from the start
        return self._drift

    def update(
        self, step: int, y: State, carry: Nest, drift: State
    ) -> tuple[State, Nest]:
        """Step the optimizer and the schedulers that are due; write the buffers."""
        gradients = {n: drift[n] for n in self._parameters if n in drift}
        due = [one.due(step, self._epoch_length) for one in self._schedules]
        skip = Precision.overflowed(drift)
        params, carry = self._optimizers.step(y, carry, gradients, due, skip)
        extra = self._precision.update(y, drift)
        return {**y, **params, **updated_buffers(y, drift), **extra}, carry

    def attach(self) -> None:
        """Take the module back, after a trainer had it for validation."""
        for one in self.module.modules():
            if hasattr(one, "_trainer"):
                one._trainer = self.shim
        self.module.to(self.device)

    def settle(self, step: int, y: State) -> None:
        """Write a state into the module, to look at it or to save it.

        Args:
            step: The step the state belongs to; the module's `global_step` then.
            y: The state.
        """
        self._enter(step, y)

    def probe(
        self, step: int, y: State, look: Callable[[], Any], restore: bool = True
    ) -> tuple[State, Any]:
        """Evaluate a drift, and look around before its random streams are restored.

        Args:
            step: The step.
            y: The state.
            look: Called at the end of the evaluation.
            restore: Put attributes back first, as every evaluation of a run does.

        Returns:
            The drift, and what `look` saw.
        """
        self._enter(step, y, restore)
        with self._random.scope(step):
            drift, _ = self._evaluate(step, y)
            return drift, look()

    def _drift(self, step: int, y: State) -> tuple[State, Aux]:
        self._enter(step, y)
        with self._random.scope(step):  # for the module's own draws alone
            return self._evaluate(step, y)

    def _evaluate(self, step: int, y: State) -> tuple[State, Aux]:
        """One step on the module as it stands."""
        module, (optimizer,) = self.module, self._seen_optimizers
        parameters = {**dict(module.named_parameters()), **self._parameters}
        guard = Guard(parameters, self._parameters)
        self._logged = {}
        batch = trainer.transfer(
            self.batch(step), module, self.shim.datamodule, self.device
        )
        index = step if self._epoch_length is None else step % self._epoch_length
        with torch.enable_grad():
            if trainer.call(module.on_train_batch_start, batch, index) == -1:
                raise ValueError(
                    f"`on_train_batch_start` ended the epoch at step {step} by "
                    "returning -1; leave the batch out of the data instead."
                )
            with self._precision.autocast():
                output = trainer.call(module.training_step, batch, index)
            loss = output["loss"] if isinstance(output, dict) else output
            module.on_before_zero_grad(optimizer)
            self._zero_grad()
            found: State = {}
            if loss is not None:  # None skips the step, as in Lightning
                scaled = self._precision.scale(loss, y)
                module.on_before_backward(scaled)
                module.backward(scaled)
                module.on_after_backward()
                own = [p.grad for p in self._parameters.values()]
                found = self._precision.unscale(own, y)
                module.on_before_optimizer_step(optimizer)
                self._clip_gradients()
        drift = {**self._gradients(Precision.overflowed(found)), **found}
        self.shim.global_step = step + 1
        outputs = trainer.detached(output, loss)
        module.on_train_batch_end(outputs, batch, index)
        guard.check()
        drift.update(self._buffer_drift(y))
        aux = dict(self._logged) if loss is None else {**self._logged, "loss": loss}
        return drift, trainer.numbers(aux)

    # --- its parts ----------------------------------------------------------------

    def _enter(self, step: int, y: State, restore: bool = True) -> None:
        """Make the module what it is at the start of a step."""
        if restore:
            self.attributes.restore()
        self.load(y)
        self.shim.global_step = step
        if self._epoch_length is not None:
            self.shim.current_epoch = step // self._epoch_length

    def load(self, y: State) -> None:
        """Write a state into the module's own tensors."""
        with torch.no_grad():
            for name, parameter in self._parameters.items():
                parameter.copy_(y[name])
            for name, owner, key in self._buffers():
                old, new = owner._buffers[key], y[name]
                if old is None or old.shape != new.shape or not old.is_contiguous():
                    owner._buffers[key] = new.clone()
                else:
                    old.copy_(new)

    def _state(self) -> State:
        tensors = {name: p.detach() for name, p in self._parameters.items()}
        tensors |= {name: owner._buffers[key] for name, owner, key in self._buffers()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def _buffers(self) -> Iterator[tuple[str, Any, str]]:
        for name, _ in self.module.named_buffers():
            path, _, key = name.rpartition(".")
            yield name, self.module.get_submodule(path), key

    def _buffer_drift(self, y: State) -> State:
        after = {name: owner._buffers[key] for name, owner, key in self._buffers()}
        born = sorted(after.keys() - y.keys())
        if born:
            raise ValueError(
                f"The step registered buffer `{born[0]}`; register it when the module "
                "is built, so that it is part of the state."
            )
        after = {name: tensor.detach() for name, tensor in after.items()}
        changed = buffer_drift({name: y[name] for name in after}, after)
        # The module goes on writing into its buffers; the drift must not follow.
        return {
            name: value.clone() if after.get(name) is value else value
            for name, value in changed.items()
        }

    def _gradients(self, overflow: bool) -> State:
        drift: State = {}
        for name, parameter in self._parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or overflow:
                continue  # absent, not zero: a zero would make AdamW decay it
            if gradient.is_sparse:
                raise ValueError(
                    f"The gradient of `{name}` is sparse; build the embedding with "
                    "`sparse=False`."
                )
            drift[name] = gradient.detach()
        self._zero_grad()
        return drift

    def _zero_grad(self) -> None:
        self.module.zero_grad(set_to_none=True)
        for parameter in self._parameters.values():  # not all need be registered
            parameter.grad = None

    def _clip_gradients(self) -> None:
        value, algorithm = self._clip
        if not value:
            return
        clip = nn.utils.clip_grad_norm_
        if algorithm == "value":
            clip = nn.utils.clip_grad_value_
        clip(list(self._parameters.values()), value)

    def _log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        del args, options
        self._logged[name] = value

    def _log_dict(self, values: Any, *args: Any, **options: Any) -> None:
        del args, options
        self._logged.update(values)
