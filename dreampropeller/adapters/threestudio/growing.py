r"""Gaussians that grow: threestudio-3dgs as a trajectory with jumps.

Such a system steps its one optimizer itself, inside of `training_step`, and at
intervals of its config it prunes, splits and clones: parameters and optimizer memory
are replaced by others with other rows. Between these steps

$$\mathrm{drift}(t, \theta) = (\nabla_\theta \ell,\ \text{statistics of the view}),
\qquad \mathrm{update} = \text{Adam, statistics} \mathrel{+}= .$$

A step k that changes the structure is a jump: `jump(k)` runs the system's own whole
step, after which `drift(k)` is empty and `update(k)` the identity. The Adam update of
such a step is lost upstream (its gradients belong to replaced parameters), and so here.
Rows are matched by their values (`parents_of`), for the solver's memories.

Statistics (sums of screen-space gradients, counts, largest radii) are kept in the
carry, and each accepted step adds its own exactly once.

Reference: threestudio-3dgs at 8c2ab7b, https://github.com/DSaurus/threestudio-3dgs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreampropeller.adapters.lightning import optimizers as configured
from dreampropeller.adapters.lightning import trainer
from dreampropeller.adapters.threestudio.rows import parents_of
from dreampropeller.adapters.threestudio.system import CameraHost, check_system
from dreampropeller.buffers import updated_buffers
from dreampropeller.trajectory import Parents
from dreampropeller.tree import Aux, Nest, State, copy_nest

_SUMS = ("xyz_gradient_accum", "denom")
_MAXIMA = ("max_radii2D",)
_LR = "optimizer/lr"


def grows(system: Any) -> bool:
    """Whether a system is one whose Gaussians grow by the rules of threestudio-3dgs."""
    geometry = getattr(system, "geometry", None)
    return not getattr(system, "automatic_optimization", True) and all(
        hasattr(geometry, name) for name in (*_SUMS, *_MAXIMA, "optimizer", "prune")
    )


class GrowingHost(CameraHost):
    """A system with one optimizer step per training step, and growth as jumps.

    With several views in a batch the statistics are summed in another order than
    upstream's, so they agree to rounding; with one view bit for bit.
    """

    skip = (*CameraHost.skip, "optimizer", "optimize_list")

    def refuse(self, module: Any) -> None:
        """Refuse systems that do not grow, or that depend on earlier steps."""
        if not grows(module):
            raise ValueError(
                f"`{type(module).__name__}` is no system of growing Gaussians; use "
                "`SystemHost`."
            )
        check_system(module)
        automatic = module.automatic_optimization
        module.automatic_optimization = True  # excluded from the general check
        try:
            super().refuse(module)
        finally:
            module.automatic_optimization = automatic

    def configure(self) -> list[torch.optim.Optimizer]:
        """Take over the optimizer that the system steps itself."""
        found, _ = configured.read(self.module.configure_optimizers())
        if len(found) != 1 or found[0] is not self.module.geometry.optimizer:
            raise ValueError(
                f"`{type(self.module).__name__}` steps {len(found)} optimizers by "
                "hand; only systems with the one optimizer of their Gaussians can be "
                "evaluated ahead of time. Run it with threestudio itself."
            )
        if self.precision.scales:
            raise ValueError(
                "`trainer.precision: 16-mixed` scales the loss, and this system takes "
                "its gradients itself, unscaled. Write `trainer.precision=32-true` or "
                "`bf16-mixed`."
            )
        self._read_parameters()
        private = [configured.view(found[0])]
        private[0].state = type(found[0].state)(dict, found[0].state)
        schedules = [configured.Schedule()]
        self._schedules = schedules
        self.optimizers = configured.lend(self.parameters, private, schedules)
        self.shim.optimizers = found
        self._proxy = _Optimizer()
        self.module.optimizers = lambda *_, **__: self._proxy
        self.module.manual_backward = lambda loss, *a, **k: loss.backward(*a, **k)
        return found

    def _read_parameters(self) -> None:
        self.parameters = configured.names(
            self.module, [self.module.geometry.optimizer]
        )

    def initial(self) -> tuple[State, Nest]:
        """Parameters, buffers and moments, and empty statistics."""
        y, carry = super().initial()
        return y, {**carry, "statistics": self._zeros(y["geometry._xyz"])}

    def next_jump(self, step: int) -> int:
        """The next step at which the config prunes or densifies."""
        return next(
            (
                one
                for one in range(step + 1, self.settings.num_steps)
                if self.jumps(one)
            ),
            self.settings.num_steps,
        )

    def jumps(self, step: int) -> bool:
        """Whether the config prunes or densifies at a step."""
        cfg = self.module.geometry.cfg
        rules = (
            (cfg.prune_from_iter, cfg.prune_until_iter, cfg.prune_interval),
            (cfg.densify_from_iter, cfg.densify_until_iter, cfg.densification_interval),
        )
        return any(a < step < b and step % every == 0 for a, b, every in rules)

    def jump(
        self, step: int, y: State, carry: Nest
    ) -> tuple[State, Nest, Parents | None]:
        """Run the system's whole step, including changes of the structure."""
        optimizer = self.module.geometry.optimizer
        self.enter(step, y)
        self._set_statistics(copy_nest(carry["statistics"]))
        memory = copy_nest(carry["optimizers"][0])
        optimizer.state.clear()
        for name, state in memory["state"].items():
            optimizer.state[self.parameters[name]] = state
        for group, values in zip(optimizer.param_groups, memory["groups"], strict=True):
            group.update(values)
        self._proxy.real = optimizer
        with self.random.scope(step):
            try:
                self._step(step)
            finally:
                self._proxy.real = None
        self._read_parameters()
        self.born.check(y)
        after = self.state()
        groups = [
            {key: value for key, value in group.items() if key in values}
            for group, values in zip(
                optimizer.param_groups, memory["groups"], strict=True
            )
        ]
        state = {
            name: optimizer.state[parameter]
            for name, parameter in self.parameters.items()
            if parameter in optimizer.state
        }
        carry = {
            **carry,
            "optimizers": [copy_nest({"state": state, "groups": groups})],
            "statistics": {n: t.clone() for n, t in self._statistics().items()},
        }
        optimizer.state.clear()
        old, new = len(y["geometry._xyz"]), len(after["geometry._xyz"])
        names = [
            name
            for name in self.parameters
            if y[name].shape[:1] == (old,) and after[name].shape[:1] == (new,)
        ]
        rows = parents_of(y, after, names)
        return after, carry, dict.fromkeys(names, rows)

    def update(
        self, step: int, y: State, carry: Nest, drift: State
    ) -> tuple[State, Nest]:
        """Adam at the learning rates of the step, statistics, buffers."""
        if self.jumps(step):
            return y, carry
        statistics = dict(carry["statistics"])
        if _LR in drift:
            groups = carry["optimizers"][0]["groups"]
            for group, lr in zip(groups, drift[_LR].tolist(), strict=True):
                group["lr"] = lr
            for name in _SUMS:
                statistics[name] = statistics[name] + drift[f"statistics/{name}"]
            for name in _MAXIMA:
                statistics[name] = torch.maximum(
                    statistics[name], drift[f"statistics/{name}"]
                )
        gradients = {n: drift[n] for n in self.parameters if n in drift}
        params, carry = self.optimizers.step(y, carry, gradients)
        carry = {**carry, "statistics": statistics}
        return {**y, **params, **updated_buffers(y, drift)}, carry

    def load(self, y: State) -> None:
        """Write a state into the module, whatever its number of rows."""
        for name, parameter in self.parameters.items():
            if parameter.shape != y[name].shape:
                parameter.grad = None
                parameter.data = y[name].clone()
        super().load(y)
        self._set_statistics(self._zeros(y["geometry._xyz"]))

    def run(self, step: int, y: State) -> tuple[State, Aux]:
        """Gradients and statistics of one step on the module in its current state."""
        if self.jumps(step):
            return {}, {}
        before = dict(self.parameters)
        aux = self._step(step)
        self._read_parameters()
        if any(before[name] is not p for name, p in self.parameters.items()):
            raise ValueError(
                f"Step {step} changed the number of Gaussians, though the config's "
                "intervals do not name it: more than `geometry.max_num` = "
                f"{self.module.geometry.cfg.max_num}. Raise `max_num`, or raise "
                "`densify_grad_threshold` so that fewer are made."
            )
        groups = self.module.geometry.optimizer.param_groups
        drift = self._proxy.gradients(self.parameters)
        rates = [group["lr"] for group in groups]  # set by the forward, from the step
        drift[_LR] = torch.tensor(rates, dtype=torch.float64, device=self.device)
        statistics = self._statistics()
        drift |= {f"statistics/{name}": t.clone() for name, t in statistics.items()}
        drift |= self.buffer_drift(y)
        return drift, aux

    def _step(self, step: int) -> Aux:
        """The system's own step, on the optimizer that stands in for its own."""
        module, proxy = self.module, self._proxy
        proxy.start(self.shim, self.module.geometry.optimizer)
        self._logged = {}
        batch = trainer.transfer(
            self.batch(step), module, self.shim.datamodule, self.device
        )
        with torch.enable_grad():
            trainer.call(module.on_train_batch_start, batch, step)
            with self.precision.autocast():
                output = trainer.call(module.training_step, batch, step)
        if proxy.num_steps != 1:
            raise ValueError(
                f"`{type(module).__name__}.training_step` stepped its optimizer "
                f"{proxy.num_steps} times at step {step}; only one step of one "
                "optimizer can be evaluated ahead of time."
            )
        loss = output["loss"] if isinstance(output, dict) else output
        outputs = trainer.detached(output, loss)
        module.on_train_batch_end(outputs, batch, step)
        return trainer.numbers({**self._logged, "loss": loss})

    def _statistics(self) -> State:
        return {n: getattr(self.module.geometry, n) for n in (*_SUMS, *_MAXIMA)}

    def _set_statistics(self, values: State) -> None:
        vars(self.module.geometry).update(values)

    def _zeros(self, xyz: Tensor) -> State:
        now = self._statistics()
        return {n: t.new_zeros(len(xyz), *t.shape[1:]) for n, t in now.items()}


class _Optimizer:
    """The result of `self.optimizers()`: records the gradients, or makes the step."""

    real: Any = None

    def start(self, shim: trainer.Shim, optimizer: Any) -> None:
        self._shim, self._optimizer = shim, optimizer
        self.param_groups = optimizer.param_groups
        self.num_steps = 0
        self._noted: dict[int, Tensor] = {}
        optimizer.zero_grad(set_to_none=True)

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            raise ValueError("A closure cannot be evaluated ahead of time.")
        self.num_steps += 1
        self._shim.global_step += 1  # upstream counts optimizer steps
        if self.real is not None:
            self.real.step()
            return
        owned = [p for g in self._optimizer.param_groups for p in g["params"]]
        self._noted = {id(p): p.grad.detach() for p in owned if p.grad is not None}

    def zero_grad(self, set_to_none: bool = True) -> None:
        del set_to_none
        self._optimizer.zero_grad(set_to_none=True)

    def gradients(self, parameters: dict[str, Any]) -> State:
        return {
            name: self._noted[id(parameter)]
            for name, parameter in parameters.items()
            if id(parameter) in self._noted
        }
