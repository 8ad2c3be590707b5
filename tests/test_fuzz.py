"""Random loops, by hand and solved: module, optimizer, scheduler, window and solver.

Thirty draws by default. All 500 of the last measurement: ``FUZZ=500 pytest -q
tests/test_fuzz.py``.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler as schedules
from torch.utils.checkpoint import checkpoint

import dreampropeller as dp
from dreampropeller.tree import all_finite
from tests.helpers import tree_equal
from tests.test_optimizers import OPTIMIZERS as REMEMBERING
from tests.test_optimizers import SCHEDULERS as HOLDING

DRAWS = int(os.environ.get("FUZZ", "30"))


class Block(nn.Module):
    """A residual block in one of several ways, with what people add to it."""

    def __init__(self, pick: random.Random) -> None:
        super().__init__()
        width = 6
        norms: list[Callable[[], nn.Module]] = [
            nn.Identity,
            lambda: nn.BatchNorm1d(width),
            lambda: nn.LayerNorm(width),
        ]
        self.layer: nn.Module = nn.Linear(width, width)
        if pick.random() < 0.2:
            self.layer = nn.utils.parametrizations.weight_norm(self.layer)
        elif pick.random() < 0.2:
            self.layer = nn.utils.parametrizations.spectral_norm(self.layer)
        self.norm = pick.choice(norms)()
        self.drop = nn.Dropout(pick.choice([0.0, 0.3]))
        self.saves = pick.random() < 0.4
        self.listed = list(self.layer.parameters()) if pick.random() < 0.3 else []
        self.memory = [p.detach() for p in self.layer.parameters()]
        if pick.random() < 0.7:
            self.memory = []
        self.register_buffer("seen", torch.zeros(()))
        self.seen: Tensor

    def body(self, x: Tensor) -> Tensor:
        y = torch.tanh(self.norm(self.layer(x)))
        extra = [p.square().sum() for p in [*self.listed, *self.memory]]
        return self.drop(y) + 0.01 * sum(extra)

    def forward(self, x: Tensor) -> Tensor:
        y = (
            checkpoint(self.body, x, use_reentrant=False)
            if self.saves
            else self.body(x)
        )
        self.seen = torch.maximum(self.seen, y.detach().abs().max())
        return x + y


def make_module(seed: int) -> nn.Module:
    pick = random.Random(f"module {seed}")
    torch.manual_seed(seed)
    blocks = [Block(pick) for _ in range(pick.choice([1, 2]))]
    net = nn.Sequential(nn.Linear(3, 6), *blocks, nn.Linear(6, 1))
    last: Any = net[-1]
    first: Any = net[0]
    if len(blocks) == 2 and pick.random() < 0.3:
        blocks[1].layer = blocks[0].layer  # tied
    if pick.random() < 0.3:
        last.weight.register_hook(lambda gradient: gradient.clamp(-0.05, 0.05))
    if pick.random() < 0.3:
        first.bias.register_post_accumulate_grad_hook(_halve)
    if pick.random() < 0.3:
        last.bias._no_weight_decay = True
    if pick.random() < 0.2:
        first.weight.requires_grad_(False)
    if pick.random() < 0.05:  # slow
        torch._dynamo.reset()
        net[1].compile(backend="eager")
    return net


def _halve(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.5)


def make_loss(seed: int) -> Callable[[int, Any], Tensor]:
    pick = random.Random(f"loss {seed}")
    kind = pick.choice(["plain", "plain", "accumulated", "sometimes", "penalised"])

    def error(module: nn.Module) -> Tensor:
        x = torch.rand(8, 3)
        return (module(x)[:, 0] - torch.sin(3 * x[:, 0])).square().mean()

    def loss(step: int, module: Any) -> Tensor:
        if kind == "accumulated":
            (error(module) / 2).backward()
            return error(module) / 2
        if kind == "sometimes" and step % 3 == 2:
            return module[-1].weight.square().sum()
        if kind == "penalised":
            x = torch.rand(4, 3, requires_grad=True)
            (slope,) = torch.autograd.grad(module(x).sum(), x, create_graph=True)
            return error(module) + slope.square().mean()
        return error(module)

    return loss


def decayed(params: dict[str, Any]) -> torch.optim.Optimizer:
    plain = {id(p) for p in params.values() if p.ndim < 2}
    plain |= {id(p) for p in params.values() if hasattr(p, "_no_weight_decay")}
    groups = [
        {"params": [p for p in params.values() if id(p) in plain], "weight_decay": 0},
        {"params": [p for p in params.values() if id(p) not in plain]},
    ]
    return torch.optim.AdamW([g for g in groups if g["params"]], lr=0.03)


OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "sgd": lambda p: torch.optim.SGD(p.values(), lr=0.05, momentum=0.9, nesterov=True),
    "adam": lambda p: torch.optim.Adam(p.values(), lr=0.03, amsgrad=True),
    "decayed": decayed,
    "tensor": lambda p: torch.optim.NAdam(p.values(), lr=torch.tensor(0.03)),
    "rms": lambda p: torch.optim.RMSprop(p.values(), lr=0.01, momentum=0.5),
    "adafactor": lambda p: torch.optim.Adafactor(p.values(), lr=0.05),
    # One that rebinds `.data` cuts a reference to the memory, and is refused with one.
    **{name: one for name, one in REMEMBERING.items() if name != "Rebinds"},
}
SCHEDULERS: dict[str, Callable[[Any], Any] | None] = {
    "none": None,
    "none at all": None,
    "step": lambda o: schedules.StepLR(o, 2, 0.5),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 6),
    "cycle": lambda o: schedules.CyclicLR(o, 0.01, 0.1, 3, cycle_momentum=False),
    "warm": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1, total_iters=3), schedules.ConstantLR(o)], [3]
    ),
    **HOLDING,
}
ACCELERATIONS = [None, None, dp.Secant(), dp.Anderson()]


def hand_written(seed: int, steps: int, factory: Any, scheduler: Any, clip: Any) -> Any:
    module, loss, keyed = make_module(seed), make_loss(seed), dp.StepRandom(seed)
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer = factory(named)
    schedule = scheduler(optimizer) if scheduler else None
    for step in range(steps):
        optimizer.zero_grad()
        with keyed.scope(step):
            loss(step, module).backward()
            if clip is not None:
                nn.utils.clip_grad_norm_(named.values(), clip)
            optimizer.step()
            if schedule is not None:
                schedule.step()
    return {n: t.detach() for n, t in {**named, **dict(module.named_buffers())}.items()}


@pytest.mark.parametrize("seed", range(DRAWS))
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.step.*:UserWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor:UserWarning")
def test_a_random_loop_is_solved_as_it_is(seed: int) -> None:
    pick = random.Random(seed)
    name, schedule = pick.choice([*OPTIMIZERS]), pick.choice([*SCHEDULERS])
    steps, clip = pick.randint(3, 9), pick.choice([None, 0.3])
    solver = dp.PicardSolver(
        dp.SlidingWindow(pick.randint(1, 6)),
        dp.FixedThreshold(0),
        pick.choice(["repeat_last", "momentum", "auto"]),
        acceleration=pick.choice(ACCELERATIONS),
    )
    factory, scheduler = OPTIMIZERS[name], SCHEDULERS[schedule]
    drawn = f"{name}, {schedule}, {solver}"
    try:
        wanted = hand_written(seed, steps, factory, scheduler, clip)
    except RuntimeError as error:  # checkpoint and dynamo do not always agree
        pytest.skip(f"the loop itself fails: {error}")
    module = make_module(seed)
    made = dp.OptimizationTrajectory.from_module(
        module,
        make_loss(seed),
        factory,
        steps,
        scheduler=scheduler,
        clip_grad_norm=clip,
        seed=seed,
    )
    if not all_finite([wanted])[0]:  # the loop itself ends in NaN
        with pytest.raises(dp.NotConverged):
            dp.solve(made, solver)
        return
    found = dp.solve(made, solver if pick.random() < 0.8 else dp.Sequential())
    assert tree_equal(found.value, wanted), drawn
    assert found.checked is not None, drawn
    assert found.checked.whole, drawn
