"""`OptimizationTrajectory` under `Sequential` equals the loop it stands for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler

import dreampropeller as dp
from dreampropeller import (
    FixedThreshold,
    OptimizationTrajectory,
    PicardSolver,
    Sequential,
    SlidingWindow,
    State,
    solve,
)
from dreampropeller.tree import copy_nest, mean_square
from tests.helpers import network_loss, network_start, quadratic_loss, tree_equal

STEPS = 10
OPTIMIZERS: dict[str, Callable[[Any], Any]] = {
    "SGD": lambda p: torch.optim.SGD(p.values(), lr=0.1, weight_decay=0.01),
    "SGD-momentum": lambda p: torch.optim.SGD(p.values(), lr=0.1, momentum=0.9),
    "Adam-foreach": lambda p: torch.optim.Adam(p.values(), lr=0.05, foreach=True),
    "Adam-fused": lambda p: torch.optim.Adam(p.values(), lr=0.05, fused=True),
    "Adam-amsgrad": lambda p: torch.optim.Adam(p.values(), lr=0.05, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p.values(), lr=0.05),
    "NAdam": lambda p: torch.optim.NAdam(p.values(), lr=0.05),
    "RAdam": lambda p: torch.optim.RAdam(p.values(), lr=0.05),
    "Adamax": lambda p: torch.optim.Adamax(p.values(), lr=0.05),
    "Adagrad": lambda p: torch.optim.Adagrad(p.values(), lr=0.05),
    "Adadelta": lambda p: torch.optim.Adadelta(p.values(), lr=0.5),
    "RMSprop": lambda p: torch.optim.RMSprop(p.values(), lr=0.01, momentum=0.5),
    "Rprop": lambda p: torch.optim.Rprop(p.values(), lr=0.01),
    "ASGD": lambda p: torch.optim.ASGD(p.values(), lr=0.05),
    "Adafactor": lambda p: torch.optim.Adafactor(p.values(), lr=0.05),
    "two": lambda p: [
        torch.optim.Adam([p["w"], p["b"]], lr=0.05),
        torch.optim.SGD([p["v"], p["unused"]], lr=0.1, momentum=0.9),
    ],
    "tensor-lr": lambda p: torch.optim.Adam(p.values(), lr=torch.tensor(0.05)),
}
SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "step": lambda o: lr_scheduler.StepLR(o, 4, 0.5),
    "multistep": lambda o: lr_scheduler.MultiStepLR(o, [3, 9], 0.5),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, STEPS),
    "restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 5),
    "onecycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=STEPS + 1),
    "cyclic": lambda o: lr_scheduler.CyclicLR(
        o, 0.01, 0.1, step_size_up=3, cycle_momentum=False
    ),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, STEPS),
    "sequential": lambda o: lr_scheduler.SequentialLR(
        o,
        [lr_scheduler.LinearLR(o, 0.1, total_iters=4), lr_scheduler.ConstantLR(o, 0.5)],
        [4],
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ConstantLR(o, 0.5, 3), lr_scheduler.ExponentialLR(o, 0.9)]
    ),
}


def plain_loop(
    factory: Callable[[Any], Any],
    scheduler: Callable[[Any], Any] | None = None,
    clip: Callable[[Any], Any] | None = None,
) -> State:
    params = {name: p.requires_grad_(True) for name, p in network_start().items()}
    optimizers = factory(params)
    optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
    schedulers = [scheduler(o) for o in optimizers] if scheduler else []
    for step in range(STEPS):
        for parameter in params.values():
            parameter.grad = None
        network_loss(step, params).backward()
        if clip:
            clip([p for p in params.values() if p.grad is not None])
        for one in optimizers:
            one.step()
        for one in schedulers:
            one.step()
    return {name: parameter.detach() for name, parameter in params.items()}


def check(expected: State, trajectory: OptimizationTrajectory) -> None:
    exact = PicardSolver(SlidingWindow(5), FixedThreshold(0), "momentum")
    for solver in (Sequential(), exact):
        assert tree_equal(solve(trajectory, solver).value, expected)


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:.*lr_scheduler.*:UserWarning")
def test_every_optimizer_equals_its_loop(name: str) -> None:
    factory = OPTIMIZERS[name]
    trajectory = OptimizationTrajectory(network_loss, network_start(), factory, STEPS)
    check(plain_loop(factory), trajectory)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_equals_its_loop(name: str) -> None:
    factory, scheduler = OPTIMIZERS["SGD-momentum"], SCHEDULERS[name]
    trajectory = OptimizationTrajectory(
        network_loss, network_start(), factory, STEPS, scheduler=scheduler
    )
    check(plain_loop(factory, scheduler), trajectory)


def test_several_optimizers_have_their_own_schedulers() -> None:
    def plain(optimizer: Any) -> Any:
        made = SCHEDULERS["step"](optimizer)
        if isinstance(optimizer, torch.optim.SGD):
            made.step = lambda: None  # this one has none
        return made

    trajectory = OptimizationTrajectory(
        network_loss,
        network_start(),
        OPTIMIZERS["two"],
        STEPS,
        scheduler=[SCHEDULERS["step"], None],
    )
    check(plain_loop(OPTIMIZERS["two"], plain), trajectory)


@pytest.mark.parametrize("kind", ["norm", "value", "both"])
def test_gradient_clipping_equals_its_loop(kind: str) -> None:
    options: dict[str, Any] = {
        "norm": {"clip_grad_norm": 0.3},
        "value": {"clip_grad_value": 0.1},
        "both": {"clip_grad_norm": 0.3, "clip_grad_value": 0.1},
    }[kind]

    def clip(params: list[Tensor]) -> None:
        if "clip_grad_norm" in options:
            nn.utils.clip_grad_norm_(params, 0.3)
        if "clip_grad_value" in options:
            nn.utils.clip_grad_value_(params, 0.1)

    trajectory = OptimizationTrajectory(
        network_loss, network_start(), OPTIMIZERS["AdamW"], STEPS, **options
    )
    check(plain_loop(OPTIMIZERS["AdamW"], clip=clip), trajectory)


def test_update_leaves_state_and_drift_as_they_are() -> None:
    for name, factory in OPTIMIZERS.items():
        trajectory = OptimizationTrajectory(
            network_loss, network_start(), factory, STEPS, clip_grad_norm=0.1
        )
        y, carry = trajectory.init()
        drift = trajectory.make_drift(torch.device("cpu"))(0, y)[0]
        before = copy_nest([y, drift])
        after, carry = trajectory.update(0, y, carry, drift)
        trajectory.update(1, after, carry, drift)
        assert tree_equal([y, drift], before), name


class GradientEater(torch.optim.SGD):
    """Scales its gradients in place, as some optimizers do."""

    def step(self, closure: Any = None) -> Any:
        for parameter in self.param_groups[0]["params"]:
            if parameter.grad is not None:
                parameter.grad.mul_(0.5)
        return super().step(closure)


def test_optimizer_that_writes_its_gradients_gets_copies() -> None:
    def factory(params: Any) -> GradientEater:
        return GradientEater(params.values(), lr=0.1)

    trajectory = OptimizationTrajectory(network_loss, network_start(), factory, STEPS)
    check(plain_loop(factory), trajectory)


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.3), nn.Linear(8, 1)
        )
        self.frozen = nn.Linear(1, 1).requires_grad_(False)
        self.register_buffer("largest", torch.zeros(()))
        self.largest: Tensor

    def loss(self, x: Tensor) -> tuple[Tensor, dict[str, Any]]:
        y = self.frozen(self.layers(x))
        self.largest = torch.maximum(self.largest, y.detach().max())  # rebinds
        loss = (y - x.sum(1, keepdim=True)).square().mean()
        return loss, {"loss": loss}


def test_module_with_dropout_and_running_statistics_equals_its_loop() -> None:
    from dreampropeller import StepRandom

    def body(step: int, network: nn.Module) -> Any:
        assert isinstance(network, Network)
        return network.loss(torch.randn(16, 3))

    module = Network()
    trajectory = OptimizationTrajectory.from_module(
        module, body, lambda p: torch.optim.Adam(p.values(), lr=0.01), 12, seed=5
    )
    untouched = copy_nest(dict(module.state_dict()))
    solver = PicardSolver(SlidingWindow(4), FixedThreshold(0))
    values = [solve(trajectory, s).value for s in (Sequential(), solver)]
    assert tree_equal(dict(module.state_dict()), untouched)

    plain = Network()
    optimizer = torch.optim.Adam(
        [p for p in plain.parameters() if p.requires_grad], lr=0.01
    )
    for step in range(12):
        optimizer.zero_grad()
        with StepRandom(5).scope(step):
            body(step, plain)[0].backward()
        optimizer.step()
    module.load_state_dict(values[1], strict=False)
    assert tree_equal(dict(module.state_dict()), dict(plain.state_dict()))
    assert tree_equal(values[0], values[1])
    assert int(values[0]["layers.1.num_batches_tracked"]) == 12


def _quadratic(factory: Callable[[Any], Any], **options: Any) -> OptimizationTrajectory:
    start = {"x": torch.zeros(6, dtype=torch.float64)}
    return OptimizationTrajectory(quadratic_loss, start, factory, 3, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: _quadratic(lambda p: torch.optim.LBFGS(p.values())), "closure"),
        (
            lambda: _quadratic(
                OPTIMIZERS["SGD"], scheduler=lr_scheduler.ReduceLROnPlateau
            ),
            "driven by a metric",
        ),
        (
            lambda: _quadratic(OPTIMIZERS["SGD"], scheduler=[None, None]),
            "2 factories for 1 optimizers",
        ),
        (
            lambda: _quadratic(
                lambda p: torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
            ),
            "not in `params`",
        ),
        (
            lambda: _quadratic(OPTIMIZERS["SGD"], buffers={"x": torch.zeros(1)}),
            "both `params` and `buffers`",
        ),
        (
            lambda: OptimizationTrajectory(
                quadratic_loss, {"x": torch.zeros(6)}, OPTIMIZERS["SGD"], 0
            ),
            "`num_steps` is 0",
        ),
        (
            lambda: _quadratic(OPTIMIZERS["SGD"]).make_shard(torch.device("cpu"), 0, 2),
            "cannot split a step into 2 shards",
        ),
        (
            lambda: OptimizationTrajectory.from_module(
                nn.ReLU(), lambda step, module: 0, OPTIMIZERS["SGD"], 3
            ),
            "No parameter",
        ),
    ],
)
def test_unsound_settings_are_refused(make: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (lambda step, y: y["x"], "not a scalar"),
        (lambda step, y: 3.0, "not a scalar"),
        (
            lambda step, y: (y.update(grid=torch.zeros(3)), y["x"].sum())[1],
            "changed buffer `grid`",
        ),
        (
            lambda step, y: nn.functional.embedding(
                torch.tensor([1]), y["x"], sparse=True
            ).sum(),
            "sparse",
        ),
    ],
)
def test_unsound_losses_are_refused(loss: Any, message: str) -> None:
    trajectory = OptimizationTrajectory(
        loss,
        {"x": torch.ones(6, 1, dtype=torch.float64)},
        OPTIMIZERS["SGD"],
        3,
        buffers={"grid": torch.zeros(2)},
    )
    with pytest.raises(ValueError, match=message):
        solve(trajectory, Sequential())


def test_a_parameter_that_a_step_writes_into_is_refused() -> None:
    def loss(step: int, net: Any) -> Tensor:
        with torch.no_grad():
            net[0].weight.clamp_(-0.1, 0.1)
        return loss_of(net, batches(step)[0])

    net = small_net()
    trajectory = OptimizationTrajectory.from_module(net, loss, OPTIMIZERS["SGD"], 3)
    with pytest.raises(ValueError, match=r"changed parameter `0\.weight` itself"):
        solve(trajectory, Sequential())


def test_a_frozen_parameter_that_a_step_writes_into_is_refused() -> None:
    net = small_net()
    with torch.inference_mode():  # has no counter of writes, and is left alone
        made = nn.Parameter(torch.zeros(()), requires_grad=False)
    net.register_parameter("apart", made)
    net.register_parameter("mean", nn.Parameter(torch.zeros(()), requires_grad=False))

    def loss(step: int, net: Any) -> Tensor:
        with torch.no_grad():
            net.mean.lerp_(net[0].weight.mean(), 0.1)
        return loss_of(net, batches(step)[0]) + net.mean

    trajectory = OptimizationTrajectory.from_module(net, loss, OPTIMIZERS["SGD"], 3)
    with pytest.raises(ValueError, match="`mean`, a parameter that no optimizer holds"):
        solve(trajectory, Sequential())


def batches(step: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.rand(8, 2, generator=generator) for _ in range(2)]


def decay_groups(named: dict[str, Any]) -> list[dict[str, Any]]:
    """The usual rule: matrices decay, vectors do not."""
    return [
        {"params": [p for p in named.values() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in named.values() if p.ndim < 2], "weight_decay": 0.0},
    ]


class AveragingAdamW(torch.optim.AdamW):
    """Keeps a moving average of the weights in its own state, hence in the carry."""

    def step(self, closure: Any = None) -> Any:
        result = super().step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("average", parameter.detach().clone())
                state["average"].lerp_(parameter.detach(), 0.1)
        return result


def small_net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, 1))


def loss_of(net: nn.Module, batch: Tensor) -> Tensor:
    return (net(batch)[:, 0] - torch.sin(3 * batch[:, 0])).square().mean()


@pytest.mark.parametrize("half", [False, True])
def test_accumulation_decay_groups_averages_and_autocast_equal_their_loop(
    half: bool,
) -> None:
    """What a training loop adds around its step, written where it belongs here."""
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=half)
    net = small_net()
    optimizer = AveragingAdamW(decay_groups(dict(net.named_parameters())), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        for batch in batches(step):  # one backward pass for each
            with autocast:
                part = loss_of(net, batch) / 2
            part.backward()
        optimizer.step()

    def loss(step: int, net: nn.Module) -> Tensor:
        total = torch.zeros(())
        for batch in batches(step):
            with autocast:  # anew: its copies of the weights serve one backward pass
                total = total + loss_of(net, batch) / 2
        return total

    trajectory = OptimizationTrajectory.from_module(
        small_net(),
        loss,
        lambda named: AveragingAdamW(decay_groups(named), lr=0.05),
        STEPS,
    )
    check({n: p.detach() for n, p in net.named_parameters()}, trajectory)
    exact = PicardSolver(SlidingWindow(5), FixedThreshold(0), "momentum")
    averages = solve(trajectory, exact).carry["optimizers"][0]["state"]
    for name, parameter in net.named_parameters():
        expected = optimizer.state[parameter]["average"]
        assert tree_equal(averages[name]["average"], expected), name
        assert not torch.equal(expected, parameter)


def test_bfloat16_equals_its_loop() -> None:
    net = small_net()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.05)
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_of(net, batches(step)[0])
        loss.backward()
        optimizer.step()
    trajectory = OptimizationTrajectory.from_module(
        small_net(),
        lambda step, net: loss_of(net, batches(step)[0]),
        lambda named: torch.optim.Adam(named.values(), lr=0.05),
        STEPS,
        precision="bf16-mixed",
    )
    check({n: p.detach() for n, p in net.named_parameters()}, trajectory)


@pytest.mark.filterwarnings("ignore:Detected call of `lr_sch")  # the loop's overflow
def test_a_loss_scale_equals_its_loop() -> None:
    """Against a loop with `GradScaler`, which backs off before the first step taken."""
    net, scaler = small_net(), torch.amp.GradScaler("cpu")
    optimizer = AveragingAdamW(net.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 4)
    taken = []
    for step in range(STEPS):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            loss = loud(net, batches(step)[0])
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        before = scaler.get_scale()
        scaler.step(optimizer)
        scaler.update()
        schedule.step()
        taken.append(scaler.get_scale() >= before)
    assert not taken[0]
    assert taken[-1]

    trajectory = OptimizationTrajectory.from_module(
        small_net(),
        lambda step, net: loud(net, batches(step)[0]),
        lambda named: AveragingAdamW(named.values(), lr=0.05),
        STEPS,
        scheduler=lambda one: torch.optim.lr_scheduler.StepLR(one, 4),
        clip_grad_norm=1.0,
        precision="16-mixed",
    )
    assert set(trajectory.init()[0]) > {"precision/scale"}
    exponent = torch.tensor(scaler.get_scale()).log2().long()
    counted = torch.stack(
        [exponent, torch.tensor(scaler.state_dict()["_growth_tracker"])]
    )
    expected = {n: p.detach() for n, p in net.named_parameters()}
    check({**expected, "precision/scale": counted}, trajectory)
    with pytest.raises(ValueError, match="16-mixed"):
        OptimizationTrajectory(
            lambda step, y: y["x"],
            {"x": torch.ones(1)},
            OPTIMIZERS["SGD"],
            3,
            precision="half",
        )
    with pytest.raises(ValueError, match="with 2 optimizers: a loss scale"):
        OptimizationTrajectory(
            network_loss,
            network_start(),
            OPTIMIZERS["two"],
            3,
            precision="16-mixed",
        )
    y, _ = trajectory.init()
    del y["precision/scale"]
    with pytest.raises(ValueError, match="another precision"):
        trajectory.make_drift(torch.device("cpu"))(0, y)


def loud(net: nn.Module, batch: Tensor) -> Tensor:
    """A loss whose gradients half precision only holds after some back-off."""
    return loss_of(net, batch) * 40


class Spectral(nn.Module):
    """A complex filter beside a real scale."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.w = nn.Parameter(torch.randn(4, 4, dtype=torch.cdouble) * 0.3)
        self.scale = nn.Parameter(torch.ones(4).double())

    def forward(self, x: Tensor) -> Tensor:
        return torch.fft.ifft(torch.fft.fft(x) @ self.w).real * self.scale


@pytest.mark.parametrize(
    ("threshold", "acceleration"),
    [
        (dp.FixedThreshold(0), None),
        (dp.FixedThreshold(1e-9), None),
        (dp.DriftThreshold(0.05), dp.Secant()),
    ],
)
@pytest.mark.parametrize("predictor", ["repeat_last", "momentum", "auto"])
def test_complex_parameters_count(
    threshold: dp.Threshold[Any], acceleration: Any, predictor: str
) -> None:
    def loss(step: int, module: nn.Module) -> Tensor:
        x = torch.randn(16, 4).double()
        return (module(x) - x.roll(1, 1)).square().mean()

    trajectory = dp.OptimizationTrajectory.from_module(
        Spectral(), loss, lambda p: torch.optim.Adam(p.values(), lr=0.02), 40
    )
    solver = dp.PicardSolver(
        dp.SlidingWindow(6), threshold, predictor, acceleration=acceleration
    )
    sequential = dp.solve(trajectory, dp.Sequential()).value
    solution = dp.solve(trajectory, solver)
    distance = max(
        float((solution.value[name] - value).abs().max())
        for name, value in sequential.items()
    )
    assert distance < (1e-12 if threshold == dp.FixedThreshold(0) else 0.02)
    if threshold != dp.FixedThreshold(0):
        assert solution.stats.num_iterations < 40
    one = {"w": torch.full((3,), 1 + 1j)}
    zero = {"w": torch.zeros(3, dtype=torch.cfloat)}
    assert float(mean_square(one, zero)) == pytest.approx(1)


class Decays(torch.optim.SGD):
    """Decays every parameter, also one without a gradient."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.mul_(0.9)
        super().step(closure)


def test_parameters_that_move_without_a_gradient() -> None:
    def loss(step: int, module: Any) -> Tensor:
        return (module[step % 2](torch.randn(8, 4)) - 1).square().mean()

    def two() -> nn.ModuleList:
        torch.manual_seed(0)
        return nn.ModuleList([nn.Linear(4, 1), nn.Linear(4, 1)])

    module, random = two(), dp.StepRandom(0)
    optimizer = Decays(module.parameters(), lr=0.05)
    for step in range(12):
        optimizer.zero_grad(set_to_none=True)
        with random.scope(step):
            loss(step, module).backward()
        optimizer.step()
    wanted = dict(module.named_parameters())
    trajectory = dp.OptimizationTrajectory.from_module(
        two(), loss, lambda params: Decays(params.values(), lr=0.05), 12
    )
    exact = dp.PicardSolver(dp.SlidingWindow(5), dp.FixedThreshold(0))
    for solver in (dp.Sequential(), exact):
        value = dp.solve(trajectory, solver).value
        assert all(torch.equal(value[name], wanted[name]) for name in wanted)
