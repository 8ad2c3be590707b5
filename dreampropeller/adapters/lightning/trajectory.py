r"""Any `LightningModule` with automatic optimisation, as a trajectory.

One step of `Trainer.fit` is (Eq. 18 of `docs/method.md`)

$$\mathrm{drift}(t, \theta) = \nabla_\theta\, \mathtt{training\_step}(b_t, t), \qquad
  \mathrm{update} = \text{optimizer step, scheduler step},$$

with the batch $b_t$ and all random numbers keyed by the step t. The module is lent to a
`Host`, which evaluates it in place. Lightning itself is not imported: the module brings
it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch

from dreampropeller.adapters.lightning import verification
from dreampropeller.adapters.lightning.host import Host, Keyed, Settings
from dreampropeller.adapters.lightning.leftovers import Leftovers
from dreampropeller.host import names_of, steady
from dreampropeller.identity import Fingerprint, plain, shape_of
from dreampropeller.trajectory import Drift, Parents, Trajectory
from dreampropeller.tree import Aux, Nest, State, copy_nest
from dreampropeller.verification import Checked, Repeats, names


class LightningTrajectory(Trajectory[Nest]):
    """A LightningModule's training run (Eq. 18); buffers by Eq. 19.

    `Sequential` equals the module's own `Trainer.fit` bit for bit on CPU, given the
    same random numbers at each step (`tests/adapters/test_lightning.py`).

    Hooks run in Lightning's order: `on_train_batch_start`, `training_step`,
    `on_before_zero_grad`, `on_before_backward`, `on_after_backward`,
    `on_before_optimizer_step`, `on_train_batch_end`. All of them run inside of the
    drift, the last one therefore before the optimizer's step and with `global_step`
    already t + 1. Callbacks and loggers do not run: what the module logs is the drift's
    `Aux`.

    Args:
        module: The module to train; it is used in place, and left in training mode.
        data: A `DataLoader` with a map-style data set, a `LightningDataModule` with
            such a loader, or a function from the step to the batch.
        num_steps: The number of steps.
        seed: All four global random streams (Python, numpy, torch on CPU and on GPU)
            are keyed by (seed, step) during a step, the batch included.
        precision: "32-true", "bf16-mixed" or "16-mixed", as for the `Trainer`.
        gradient_clip_val: As for the `Trainer`.
        gradient_clip_algorithm: "norm" or "value", as for the `Trainer`.
        device: Device of the module; default: this rank's GPU, or the CPU.
        random: Keying of the random streams, instead of `StepRandom(seed)`.
        host: Host that evaluates the module; default: a `Host`, for automatic
            optimisation.
        ignore: Names of counters, averages and logs that nothing reads, as for
            `OptimizationTrajectory.from_module`.
        about: Likewise.

    Raises:
        TypeError: `module` is not a LightningModule, or an optimizer's memory cannot be
            restored from a checkpoint.
        ValueError: The module's training cannot be evaluated ahead of time: manual
            optimisation, a closure, a metric-driven scheduler, a hook that belongs to
            the trainer's loop, an iterable data set. The message says what to do.
    """

    verifies: bool = True
    """Whether `check` does anything."""
    verified: Checked | None = None
    """The result of a check that was made before the solve."""

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
        host: Host | None = None,
        ignore: Collection[str] = (),
        about: Mapping[str, Any] | None = None,
    ) -> None:
        settings = Settings(
            num_steps=num_steps,
            seed=seed,
            precision=precision,
            gradient_clip_val=gradient_clip_val,
            gradient_clip_algorithm=gradient_clip_algorithm,
            device=device,
            random=random,
            ignore=names_of(ignore),
        )
        self.num_steps = num_steps
        self.host = Host() if host is None else host
        self.host.open(module, data, settings)
        self.module = module
        self._initial, self._initial_carry = self.host.initial()
        self._fingerprint = {
            "module": type(module).__qualname__,
            "state": {name: shape_of(value) for name, value in self._initial.items()},
            "carry": plain(self._initial_carry),
            "seed": seed,
            "precision": str(precision),
            "clip": [gradient_clip_val, gradient_clip_algorithm],
            "about": plain(about or {}),
        }

    def fingerprint(self) -> Fingerprint:
        """The module's class, names and shapes, its fresh optimizers, the seed."""
        return {**super().fingerprint(), **self._fingerprint}

    def init(self) -> tuple[State, Nest]:
        """The module's parameters and buffers, and its fresh optimizers' memory."""
        y = {name: tensor.clone() for name, tensor in self._initial.items()}
        return y, copy_nest(self._initial_carry)

    def make_drift(self, device: torch.device) -> Drift:
        """The gradient of `training_step`, and the changes of the buffers."""
        del device  # the module and its states live on the host's device from the start
        self._repeats = None
        return self._drift

    _repeats: Repeats | None = None
    """Repeats an evaluation now and then, once a check has passed."""

    def _drift(self, step: int, y: State) -> tuple[State, Aux]:
        if self._repeats is None:
            return self.host.evaluate(step, y)
        return self._repeats.evaluate(self.host.evaluate, step, y)

    def update(
        self, step: int, y: State, carry: Nest, drift: State
    ) -> tuple[State, Nest]:
        """Step the optimizer and the due schedulers; write the buffers."""
        return self.host.update(step, y, carry, drift)

    def check(self, step: int, y: State, carry: Nest, drift: Drift) -> Checked | None:
        """Also compare with the module's own loop."""
        if not self.verifies or (self.verified is not None and step == 0):
            return self.verified
        found = verification.check(self, step, y, carry, drift)
        if found is None:
            return None
        last = self.num_steps - 1
        leftovers = Leftovers(self.host, self._as_left, last, found.noise)
        self._repeats = Repeats(found.noise, self._cause, leftovers.evaluate)
        return found.checked(whole=True)

    def _as_left(self, step: int, y: State) -> State:
        """A drift, with the attributes as the evaluation before has left them."""
        with self.host.kept(y):
            return copy_nest(self.probe(step, y, dict, restore=False)[0])

    def _cause(self) -> str:
        changed = self.host.attributes.changed()
        if not changed:
            return ""
        return f"An evaluation changed {names(changed)} of the module."

    def next_jump(self, step: int) -> int:
        """The next step that changes the module's structure."""
        return self.host.next_jump(step)

    def jump(
        self, step: int, y: State, carry: Nest
    ) -> tuple[State, Nest, Parents | None]:
        """Change the module's structure."""
        return self.host.jump(step, y, carry)

    def settle(self, step: int, y: State) -> None:
        """Write a state into the module, to inspect or save it.

        Args:
            step: The step of the state; it becomes the module's `global_step`.
            y: The state.
        """
        self.host.enter(step, y)

    def probe(
        self, step: int, y: State, look: Callable[[], Any], restore: bool = True
    ) -> tuple[State, Any]:
        """Evaluate a drift, and inspect it before its random streams are restored.

        Args:
            step: The step.
            y: The state.
            look: Called at the end of the evaluation.
            restore: Restore attributes first, as every evaluation of a run does.

        Returns:
            The drift, and the result of `look`.
        """
        self.host.enter(step, y, restore)
        with steady(self.module), self.host.random.scope(step):
            drift, _ = self.host.run(step, y)
            return drift, look()
