"""What a step sets and leaves is refused where a later step reads it."""

from __future__ import annotations

import math
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreampropeller as dp
from dreampropeller.verification import NotReproducible
from tests.helpers import tree_equal
from tests.test_counters import EXACT, STEPS, Loss, error, hand_written, made, net

AT = 5
"""The step that sets something."""
PHASE = {"weight": 1.0}
SETTINGS: Any = types.ModuleType("my_settings")


class Best(nn.Module):
    """Keeps what people keep in plain attributes."""

    def __init__(self) -> None:
        super().__init__()
        self.net, self.drop = net(), nn.Dropout(0.4)
        self.best, self.weight, self.level = math.inf, 1.0, 0
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.net(self.drop(x))


def best_so_far() -> Loss:
    best = math.inf

    def loss(step: int, module: nn.Module) -> Tensor:
        nonlocal best
        found = error(step, module)
        best = min(best, found.item())
        return found * (2 if step > 2 and best < found.item() else 1)

    return loss


def nested_setting() -> Loss:
    config = types.SimpleNamespace(train=types.SimpleNamespace(weight=1.0))

    def loss(step: int, module: nn.Module) -> Tensor:
        if step == AT:
            config.train.weight = 3.0
        return error(step, module) * config.train.weight

    return loss


def global_setting() -> Loss:
    PHASE["weight"] = 1.0

    def loss(step: int, module: nn.Module) -> Tensor:
        if step == AT:
            PHASE["weight"] = 3.0
        return error(step, module) * PHASE["weight"]

    return loss


def setting_of_a_module() -> Loss:
    SETTINGS.weight = 1.0

    def loss(step: int, module: nn.Module) -> Tensor:
        if step == AT:
            SETTINGS.weight = 3.0
        return error(step, module) * SETTINGS.weight

    return loss


class Phase:
    weight = 1.0


def setting_of_a_class() -> Loss:
    Phase.weight = 1.0

    def loss(step: int, module: nn.Module) -> Tensor:
        if step == AT:
            Phase.weight = 3.0
        return error(step, module) * Phase.weight

    return loss


def weights_to_stay_near() -> Loss:
    anchor: list[Tensor] = []

    def loss(step: int, module: nn.Module) -> Tensor:
        if step == AT and not anchor:
            anchor.extend(p.detach().clone() for p in module.parameters())
        pairs = zip(module.parameters(), anchor, strict=False)
        away = [(p - a).square().sum() for p, a in pairs]
        return error(step, module) + 0.1 * sum(away)

    return loss


def order_of_an_epoch() -> Loss:
    orders: dict[int, Tensor] = {}

    def loss(step: int, module: Any) -> Tensor:
        order = orders.setdefault(step // 4, torch.randperm(8))
        x = torch.arange(32.0).view(8, 4) / 32
        return (module(x[order[:2]]) - 1).square().mean()

    return loss


def best_of_module(step: int, module: Any) -> Tensor:
    found = error(step, module)
    module.best = min(module.best, found.item())
    return found * (2 if step > 2 and module.best < found.item() else 1)


def weight_of_module(step: int, module: Any) -> Tensor:
    if step == AT:
        module.weight = 3.0
    return error(step, module) * module.weight


def dropout_of_module(step: int, module: Any) -> Tensor:
    if step == AT:
        module.drop.p = 0.0
    return error(step, module)


@pytest.mark.parametrize("solver", [dp.Sequential(), EXACT])
@pytest.mark.parametrize(
    ("make", "name"),
    [
        (best_so_far, "best"),
        (nested_setting, r"config\.train\.weight"),
        (global_setting, "PHASE"),
        (setting_of_a_module, r"SETTINGS\.weight"),
        (setting_of_a_class, r"Phase\.weight"),
        (weights_to_stay_near, "anchor"),
        (order_of_an_epoch, "orders"),
        (lambda: best_of_module, "best"),
        (lambda: weight_of_module, "weight"),
        (lambda: dropout_of_module, r"drop\.p"),
    ],
)
def test_what_stays_and_is_read_is_refused(make: Any, name: str, solver: Any) -> None:
    loss = make()
    module = Best() if make.__name__ == "<lambda>" else net()
    with pytest.raises(NotReproducible, match=rf"earlier ones have left in `{name}`"):
        dp.solve(made(loss, module, num_steps=STEPS + 3), solver)


def logged() -> Loss:
    """Everything that is kept and not read, or read as the step alone decides it."""
    best, seen, tables = math.inf, {"last": 0.0}, {}

    def loss(step: int, module: Any) -> Tensor:
        nonlocal best
        if step % 4 not in tables:  # the same whoever computes it
            tables[step % 4] = torch.arange(4.0) * (step % 4)
        module.level = max(module.level, step // 3)
        found = error(step, module) * (1 + module.level) + tables[step % 4].sum() * 0
        best, seen["last"] = min(best, found.item()), found.item()
        module.last, module.best = found, best
        return found

    return loss


def test_what_stays_and_is_not_read_is_the_loops() -> None:
    wanted = hand_written(logged(), Best())
    for solver in (dp.Sequential(), EXACT):
        found = dp.solve(made(logged(), Best()), solver)
        assert tree_equal(found.value, wanted)


def test_what_is_not_read_costs_little() -> None:
    """Of a thousand steps that log some ten are evaluated again."""
    calls = [0]
    last: dict[str, float] = {}

    def loss(step: int, module: nn.Module) -> Tensor:
        found = module.weight.square().sum() * (1 + step)  # pyright: ignore
        last["loss"] = found.item()
        return found

    def count(gradient: Tensor) -> None:
        calls[0] += 1

    module = nn.Linear(2, 1)
    module.weight.register_hook(count)
    one = made(loss, module, num_steps=1000, optimizer=slow)
    dp.solve(one, dp.Sequential(), check=False)
    alone, calls[0] = calls[0], 0
    dp.solve(one, dp.Sequential())
    assert alone == 1000
    assert calls[0] - alone < 30


def slow(params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params.values(), lr=1e-9)
