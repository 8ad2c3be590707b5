r"""What `configure_optimizers` returned, lent to the core's `Optimizers`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from dreampropeller.checks import is_whole
from dreampropeller.optimizers import Optimizers, Params


@dataclass(frozen=True)
class Schedule:
    """A scheduler and its interval.

    Args:
        scheduler: The scheduler, or None.
        interval: Unit of the interval: "step" or "epoch".
        frequency: Number of steps or epochs between two scheduler steps.
    """

    scheduler: Any = None
    interval: str = "epoch"
    frequency: int = 1

    def due(self, step: int, epoch_length: int | None) -> bool:
        """Whether the scheduler steps after a step; an endless epoch never ends."""
        if self.interval == "step":
            batch = step if epoch_length is None else step % epoch_length
            return (batch + 1) % self.frequency == 0
        if epoch_length is None or (step + 1) % epoch_length:
            return False
        return ((step + 1) // epoch_length) % self.frequency == 0


def read(configured: Any) -> tuple[list[Optimizer], list[Schedule]]:
    """Read every form that `configure_optimizers` may return.

    Returns:
        The optimizers, and a schedule for each.

    Raises:
        ValueError: There is no optimizer, or a scheduler belongs to none.
    """
    optimizers: list[Optimizer] = []
    schedules: list[Any] = []
    if isinstance(configured, Optimizer):
        optimizers = [configured]
    elif isinstance(configured, Mapping):
        _refuse_keys(configured, {"optimizer", "lr_scheduler"}, "an optimizer")
        optimizers = [configured["optimizer"]]
        schedules = [configured["lr_scheduler"]] if "lr_scheduler" in configured else []
    elif isinstance(configured, Sequence):
        first = configured[0] if configured else None
        if isinstance(first, Sequence):  # ([optimizer, …], [scheduler, …])
            optimizers, schedules = list(first), list(configured[1])
        else:
            for one in configured:
                found, attached = read(one)
                optimizers += found
                schedules += [one for one in attached if one.scheduler is not None]
    if not optimizers:
        raise ValueError(
            f"`configure_optimizers` returned `{configured!r}`: return an optimizer, "
            'or `{"optimizer": …, "lr_scheduler": {"scheduler": …, "interval": …}}`.'
        )
    made = [_schedule(one) for one in schedules]
    ordered: list[Schedule] = []
    for optimizer in optimizers:
        own = [one for one in made if one.scheduler.optimizer is optimizer]
        if len(own) > 1:
            raise ValueError(
                f"`{type(optimizer).__name__}` has {len(own)} schedulers; put them "
                "into one `torch.optim.lr_scheduler.ChainedScheduler`."
            )
        ordered.append(own[0] if own else Schedule())
    if sum(one.scheduler is not None for one in ordered) < len(made):
        raise ValueError(
            "A scheduler of `configure_optimizers` belongs to no optimizer that is "
            "returned with it."
        )
    return optimizers, ordered


def _schedule(one: Any) -> Schedule:
    if isinstance(one, Schedule):
        return one
    if not isinstance(one, Mapping):
        return Schedule(one)
    keys = {"scheduler", "interval", "frequency", "name", "strict"}
    _refuse_keys(one, keys, "a scheduler")
    if one.get("interval", "epoch") not in ("step", "epoch"):
        raise ValueError(
            f"`interval` of a scheduler is {one['interval']!r}: write `step` or "
            "`epoch`."
        )
    frequency = one.get("frequency", 1)
    if not is_whole(frequency) or frequency < 1:
        raise ValueError(
            f"`frequency` of a scheduler is {frequency!r}: write a whole number from 1."
        )
    return Schedule(
        one["scheduler"], one.get("interval", "epoch"), one.get("frequency", 1)
    )


def _refuse_keys(found: Mapping[str, Any], known: set[str], what: str) -> None:
    """Refuse misspelt keys, and those of a metric-driven schedule."""
    metric = sorted({"monitor", "reduce_on_plateau"} & {n for n in found if found[n]})
    if metric:
        raise ValueError(
            f"`configure_optimizers` returned {what} with `{metric[0]}`: a metric is "
            "not known ahead of time; use a scheduler that depends on the step alone."
        )
    unknown = sorted(found.keys() - known - {"monitor", "reduce_on_plateau"})
    missing = sorted({"optimizer", "scheduler"} & known - found.keys())
    if unknown or missing:
        raise ValueError(
            f"`configure_optimizers` returned {what} "
            + (f"with the key `{unknown[0]}`" if unknown else f"without `{missing[0]}`")
            + f": the keys are {', '.join(f'`{name}`' for name in sorted(known))}."
        )


def view(optimizer: Optimizer) -> Optimizer:
    """The optimizer for hooks: its groups hold the module's own parameters."""
    seen = object.__new__(type(optimizer))
    vars(seen).update(vars(optimizer))
    seen.param_groups = [
        {**group, "params": list(group["params"])} for group in optimizer.param_groups
    ]
    return seen


def names(
    module: nn.Module, optimizers: Sequence[Optimizer]
) -> dict[str, nn.Parameter]:
    """Every parameter of the optimizers by its name in the module.

    An unregistered parameter is named by its index in the optimizer.
    """
    known = {parameter: name for name, parameter in module.named_parameters()}
    found: dict[str, nn.Parameter] = {}
    for number, optimizer in enumerate(optimizers):
        owned = [p for group in optimizer.param_groups for p in group["params"]]
        for position, parameter in enumerate(owned):
            name = known.get(parameter, f"optimizer{number}.{position}")
            found[name] = parameter
    return found


def lend(
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    schedules: Sequence[Schedule],
) -> Optimizers:
    """Bind the optimizers to private copies of their parameters.

    The module's parameters then belong to the drift alone, and the optimizers, with
    schedulers that keep referring to them, to the update alone.

    Raises:
        ValueError: An optimizer needs a closure, or a scheduler a metric.
        TypeError: An optimizer's memory cannot be restored from a checkpoint.
    """
    private = {n: nn.Parameter(p.detach().clone()) for n, p in parameters.items()}

    def bind(private: Params) -> list[Optimizer]:
        own: dict[Tensor, Tensor] = {
            parameters[name]: private[name] for name in parameters
        }
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["params"] = [own[parameter] for parameter in group["params"]]
            for parameter in own.keys() & optimizer.state.keys():
                optimizer.state[own[parameter]] = optimizer.state.pop(parameter)
        return list(optimizers)

    return Optimizers(private, bind, _schedulers(optimizers, schedules))


def bind(
    parameters: Mapping[str, nn.Parameter],
    optimizers: Sequence[Optimizer],
    schedules: Sequence[Schedule],
    module: nn.Module,
) -> Optimizers:
    """Lend the optimizers the module's own parameters.

    Raises:
        ValueError: An optimizer needs a closure, or a scheduler a metric.
        TypeError: An optimizer's memory cannot be restored from a checkpoint.
    """
    return Optimizers(
        dict(parameters),
        lambda _: list(optimizers),
        _schedulers(optimizers, schedules),
        private=False,
        known=list(module.modules()),
    )


def _schedulers(
    optimizers: Sequence[Optimizer], schedules: Sequence[Schedule]
) -> list[Any]:
    """Factories of the schedulers that are there."""
    scheduler_of = {
        id(optimizer): schedule.scheduler
        for optimizer, schedule in zip(optimizers, schedules, strict=True)
    }
    return [lambda one: scheduler_of[id(one)]] * len(optimizers)
