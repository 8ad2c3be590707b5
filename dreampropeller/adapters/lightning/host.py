r"""A live module that is evaluated in place, one state at a time.

The module stays one live object: a state is written into its own tensors before an
evaluation, and the changes of the buffers are read back (Eq. 19 of `docs/method.md`).
Nothing is cloned or pickled. Its plain attributes are restored before each evaluation,
so steps may come in any order.

Each kind of module has its host, which overrides `refuse`, `find_batches`, `follows`,
`configure`, `run`, `update`, `next_jump` and `jump`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import nn

from dreampropeller.adapters.lightning import optimizers as configured
from dreampropeller.adapters.lightning import refusals, trainer
from dreampropeller.adapters.lightning.born import Born
from dreampropeller.adapters.lightning.groups import Groups
from dreampropeller.attributes import Attributes
from dreampropeller.buffers import buffer_drift, updated_buffers
from dreampropeller.dispatch.process_group import local_device
from dreampropeller.guard import Guard
from dreampropeller.host import refuse_views, steady
from dreampropeller.lending import lent
from dreampropeller.optimizers import dense
from dreampropeller.precision import Precision
from dreampropeller.rng import StepRandom, set_streams, streams
from dreampropeller.trajectory import Parents
from dreampropeller.tree import Aux, Nest, State, copy_nest


@runtime_checkable
class Keyed(Protocol):
    """Makes the global random streams a function of the step; see `StepRandom`."""

    def scope(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Key the streams inside the block and restore them after it."""
        ...


@dataclass(frozen=True)
class Settings:
    """Training settings of a module; arguments as for `LightningTrajectory`."""

    num_steps: int
    seed: int = 0
    precision: str | int = "32-true"
    gradient_clip_val: float | None = None
    gradient_clip_algorithm: str = "norm"
    device: torch.device | str | None = None
    random: Keyed | None = None
    ignore: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_steps < 1:
            raise ValueError(f"`num_steps` is {self.num_steps}: write at least 1.")
        if self.gradient_clip_algorithm not in ("norm", "value"):
            raise ValueError(
                f"`gradient_clip_algorithm` is {self.gradient_clip_algorithm!r}: write "
                "`norm` or `value`."
            )


class Host:
    """A `LightningModule` with automatic optimisation.

    Attributes:
        module: The module.
        device: Device of the module.
        shim: Replacement of its trainer.
        batch: Function that returns the batch of a step.
        parameters: The parameters of its optimizers, by name.
        attributes: Its plain attributes, recorded when it was opened.
        random: Keys the global random streams.
        roots: The module and its data set, by name.
        skip: Names of attributes that are ignored.
    """

    skip: tuple[str, ...] = ("_trainer", "cfg", "hparams", "_hparams")

    # --- what a kind of module may do differently ---------------------------------

    def refuse(self, module: Any) -> None:
        """Refuse what cannot be evaluated ahead of time."""
        refusals.check_module(module)

    def find_batches(self, data: Any, seed: int) -> trainer.Batches:
        """The source of the batches."""
        return trainer.batches(data, seed)

    def follows(self, value: object) -> bool:
        """Whether an object besides modules and data sets has attributes of a step."""
        del value
        return False

    def configure(self) -> list[torch.optim.Optimizer]:
        """Take over the module's optimizers; returns them as made by the module."""
        made, schedules = configured.read(self.module.configure_optimizers())
        if len(made) > 1:
            raise ValueError(
                f"`configure_optimizers` returned {len(made)} optimizers, which "
                "Lightning accepts only with manual optimisation; put their parameters "
                "into the groups of one."
            )
        self._schedules = schedules
        self.parameters = configured.names(self.module, made)
        self.optimizers = configured.bind(self.parameters, made, schedules, self.module)
        self.groups = Groups(
            made[0],
            self.optimizers,
            lambda step: schedules[0].due(step, self.epoch_length),
        )
        self.shim.offer(made[0], schedules[0].scheduler)
        return made

    def next_jump(self, step: int) -> int:
        """The next step that changes the structure; default: none."""
        del step
        return self.settings.num_steps

    def jump(
        self, step: int, y: State, carry: Nest
    ) -> tuple[State, Nest, Parents | None]:
        """Change the structure; default: nothing changes."""
        del step
        return y, carry, None

    def update(
        self, step: int, y: State, carry: Nest, drift: State
    ) -> tuple[State, Nest]:
        """Step the optimizer and the due schedulers; write the buffers."""
        gradients = {n: drift[n] for n in self.parameters if n in drift}
        due = self.due(step)
        skip = Precision.overflowed(drift)
        self.groups.apply(step, carry, drift)
        with self.drawing(step):
            set_streams(drift)
            params, carry = self.optimizers.step(y, carry, gradients, due, skip)
        self.groups.remember(step + 1, carry)
        extra = self.precision.update(y, drift)
        return {**y, **params, **updated_buffers(y, drift), **extra}, carry

    @property
    def counts(self) -> bool:
        """Whether what grows is looked for; other hosts know their modules."""
        return type(self) is Host

    @property
    def steps_itself(self) -> bool:
        """Whether the update is the optimizer's own step."""
        return type(self).update is Host.update

    def due(self, step: int) -> list[bool]:
        """Whether the scheduler of each optimizer steps after a step."""
        return [one.due(step, self.epoch_length) for one in self._schedules]

    def begin(self, step: int, carry: Nest) -> None:
        """Take note of the carry at which a solve begins."""
        if self.steps_itself:
            self.groups.remember(step, carry)

    def clear_gradients(self) -> None:
        """Remove all gradients."""
        self._zero_grad()

    def drawing(self, step: int) -> contextlib.AbstractContextManager[None]:
        """Scope of an update that may draw random numbers, as the drift left them."""
        if not self.optimizers.may_draw:
            return contextlib.nullcontext()
        if isinstance(self.random, StepRandom):
            return self.random.scope(step, "update")
        return self.random.scope(step)

    def run(self, step: int, y: State) -> tuple[State, Aux]:
        """One step on the module in its current state."""
        with self.groups.watched():
            return self._run(step, y)

    def _run(self, step: int, y: State) -> tuple[State, Aux]:
        module, (optimizer,) = self.module, self.shim.optimizers
        parameters = {**dict(module.named_parameters()), **self.parameters}
        guard = Guard(parameters, self.parameters)
        self._logged = {}
        batch = trainer.transfer(
            self.batch(step), module, self.shim.datamodule, self.device
        )
        index = step if self.epoch_length is None else step % self.epoch_length
        with torch.enable_grad():
            if trainer.call(module.on_train_batch_start, batch, index) == -1:
                raise ValueError(
                    f"`on_train_batch_start` ended the epoch at step {step} by "
                    "returning -1; leave the batch out of the data instead."
                )
            with self.precision.autocast():
                output = trainer.call(module.training_step, batch, index)
            loss = output["loss"] if isinstance(output, dict) else output
            module.on_before_zero_grad(optimizer)
            self._zero_grad()
            found: State = {}
            if loss is not None:  # None skips the step, as in Lightning
                scaled = self.precision.scale(loss, y)
                module.on_before_backward(scaled)
                module.backward(scaled)
                module.on_after_backward()
                own = [p.grad for p in self.parameters.values()]
                found = self.precision.unscale(own, y)
                module.on_before_optimizer_step(optimizer)
                self._clip_gradients()
        drift = {**self._gradients(Precision.overflowed(found)), **found}
        drift |= self.groups.leave()
        if self.optimizers.may_draw:
            drift |= streams()  # an optimizer that draws goes on from here
        self.shim.global_step = step + 1
        self._end_batch(trainer.detached(output, loss), batch, index)
        refusals.check_stop(step, self.shim.should_stop)
        guard.check()
        drift.update(self.buffer_drift(y))
        aux = dict(self._logged) if loss is None else {**self._logged, "loss": loss}
        return drift, trainer.numbers(aux)

    def _end_batch(self, outputs: Any, batch: Any, index: int) -> None:
        """The hook that Lightning calls after the optimizer's step."""
        before = [(n, b, b._version) for n, b in self.module.named_buffers()]
        self.module.on_train_batch_end(outputs, batch, index)
        now = dict(self.module.named_buffers())
        for name, buffer, version in before:
            changed = now.get(name) is not buffer or buffer._version != version
            if changed and buffer.is_floating_point():
                raise ValueError(
                    f"`on_train_batch_end` changed the buffer `{name}`. In Lightning "
                    "it sees the weights after the optimizer's step, which are not "
                    "known here. Change it in `on_train_batch_start`, which sees the "
                    "weights after the step before, or keep an average of the weights "
                    "in the optimizer's state (docs/own_loops.md)."
                )
        if self.groups.changed_since():
            raise ValueError(
                "`on_train_batch_end` changed a setting of the optimizer, which "
                "applies to the next step only. Change it in `on_train_batch_start`, "
                "from `self.global_step`."
            )

    # --- its life -----------------------------------------------------------------

    def open(self, module: Any, data: Any, settings: Settings) -> None:
        """Set up the module in Lightning's order, up to the first step."""
        self.refuse(module)
        self.module, self.settings = module, settings
        self.device = torch.device(settings.device or local_device())
        self.random: Keyed = settings.random or StepRandom(settings.seed)
        self.precision = Precision(str(settings.precision), self.device)
        self._logged: dict[str, Any] = {}
        if hasattr(data, "train_dataloader"):
            data.prepare_data()
            data.setup("fit")
        found = self.find_batches(data, settings.seed)
        self.batch, self.epoch_length = found.of_step, found.epoch_length
        self.shim = trainer.Shim(settings.num_steps, found.datamodule, found.loader)
        self.attach()
        # Shadowed on the instance: the originals use the state of the trainer's loop.
        module.log, module.log_dict = self._log, self._log_dict
        if found.datamodule is None:
            module.prepare_data()
        module.setup("fit")
        if hasattr(module, "configure_model"):
            module.configure_model()
        self.attach()  # what `configure_model` added, too
        owned = {id(one) for one in self.configure()}
        refuse_views(self.parameters, dict(module.named_buffers()))
        module.on_fit_start()
        module.on_train_start()
        module.zero_grad(set_to_none=True)
        module.train()
        roots: dict[str, object] = {"": module}
        if found.loader is not None:
            roots["dataset"] = found.loader.dataset
        self.roots, skip = roots, (*self.skip, *settings.ignore)
        self.attributes = Attributes(roots, follow=self.follows, skip=skip)
        refusals.check_optimizers(self.attributes, owned)
        self.born = Born(module)

    def initial(self) -> tuple[State, Nest]:
        """Parameters, buffers, and the memory of new optimizers, as own tensors."""
        carry = copy_nest(self.optimizers.export())
        return {**self.state(), **self.precision.init()}, carry

    def evaluate(self, step: int, y: State) -> tuple[State, Aux]:
        """The drift of a step, with the attributes recorded when opened."""
        with steady(self.module), self.kept(y):
            self.enter(step, y)
            with self.random.scope(step):  # only for the module's own draws
                return self.run(step, y)

    @contextlib.contextmanager
    def kept(self, y: State) -> Iterator[None]:
        """Give the module its own values back after the block."""
        buffers = [one for one in self._buffers() if one[0] in y]
        own = {name: owner._buffers[key] for name, owner, key in buffers}
        tensors = {n: p for n, p in self.parameters.items() if n in y} | own
        lends = lent(tensors, {name: y[name].clone() for name in tensors})
        with lends:
            try:
                yield
            finally:
                for name, owner, key in buffers:
                    owner._buffers[key] = own[name]

    def attach(self) -> None:
        """Take over the module again, after a trainer used it for validation."""
        for one in self.module.modules():
            if hasattr(one, "_trainer"):
                one._trainer = self.shim
        self.module.to(self.device)

    def enter(self, step: int, y: State, restore: bool = True) -> None:
        """Put the module into its state at the start of a step."""
        if restore:
            self.born.forget()
            self.attributes.restore()
        self.load(y)
        if self.steps_itself:
            self.groups.move_to(step)
        self.shim.global_step = step
        if self.epoch_length is not None:
            self.shim.current_epoch = step // self.epoch_length

    def load(self, y: State) -> None:
        """Write a state into the module's own tensors."""
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(y[name])
            for name, owner, key in self._buffers():
                old, new = owner._buffers[key], y[name]
                if old is None or old.shape != new.shape or not old.is_contiguous():
                    owner._buffers[key] = new.clone()
                else:
                    old.copy_(new)

    def state(self) -> State:
        """The module's parameters and buffers, as own tensors."""
        tensors = {name: p.detach() for name, p in self.parameters.items()}
        tensors |= {name: owner._buffers[key] for name, owner, key in self._buffers()}
        return {name: tensor.detach().clone() for name, tensor in tensors.items()}

    def _buffers(self) -> Iterator[tuple[str, Any, str]]:
        for name, _ in self.module.named_buffers():
            if name in self.born:
                continue
            path, _, key = name.rpartition(".")
            yield name, self.module.get_submodule(path), key

    def buffer_drift(self, y: State) -> State:
        """Changes of the module's buffers by the evaluation at a state (Eq. 19)."""
        self.born.check(y)
        after = {name: owner._buffers[key] for name, owner, key in self._buffers()}
        after = {name: tensor.detach() for name, tensor in after.items()}
        changed = buffer_drift({name: y[name] for name in after}, after)
        # The module keeps writing into its buffers; the drift must not follow.
        return {
            name: value.clone() if after.get(name) is value else value
            for name, value in changed.items()
        }

    def _gradients(self, overflow: bool) -> State:
        drift: State = {}
        for name, parameter in self.parameters.items():
            gradient, parameter.grad = parameter.grad, None
            if gradient is None or overflow:
                continue  # absent, not zero: a zero would make AdamW decay it
            drift[name] = dense(name, gradient).detach()
        self._zero_grad()
        return drift

    def _zero_grad(self) -> None:
        for parameter in [*self.module.parameters(), *self.parameters.values()]:
            parameter.grad = None  # not all are necessarily registered

    def _clip_gradients(self) -> None:
        value = self.settings.gradient_clip_val
        if not value:
            return
        clip = nn.utils.clip_grad_norm_
        if self.settings.gradient_clip_algorithm == "value":
            clip = nn.utils.clip_grad_value_
        clip(list(self.parameters.values()), value)

    def _log(self, name: str, value: Any, *args: Any, **options: Any) -> None:
        del args, options
        self._logged[name] = value

    def _log_dict(self, values: Any, *args: Any, **options: Any) -> None:
        del args, options
        self._logged.update(values)
