"""A module is evaluated in its own tensors: its loop's result, and no trace of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

import dreampropeller as dp
from dreampropeller.lending import lent
from dreampropeller.tree import copy_nest
from tests.helpers import tree_equal

STEPS = 6
EXACT = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0))
Loss = Callable[[int, Any], Any]
Factory = Callable[[dict[str, Any]], Any]


def body() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 8), nn.Tanh()
    )


class Net(nn.Module):
    """A body, and a head; what lies between them is up to the case."""

    def __init__(self, run: Callable[[nn.Sequential, Tensor], Tensor]) -> None:
        super().__init__()
        self.body, self.head, self.run = body(), nn.Linear(8, 1), run
        self.first: Any = self.body[0]
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.count: Tensor

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        return self.head(self.run(self.body, x))


def error(step: int, module: nn.Module) -> Tensor:
    return (module(torch.randn(8, 4)) - 1).square().mean()


def adam(params: dict[str, Any]) -> torch.optim.Optimizer:
    return torch.optim.Adam(params.values(), lr=0.05)


def hand_written(module: nn.Module, loss: Loss, factory: Factory) -> dict[str, Any]:
    """The loop that people write, on the module itself."""
    named = {n: p for n, p in module.named_parameters() if p.requires_grad}
    optimizer, random = factory(named), dp.StepRandom(0)
    for step in range(STEPS):
        optimizer.zero_grad()
        with random.scope(step):
            loss(step, module).backward()
        optimizer.step()
    return {n: t.detach() for n, t in {**named, **dict(module.named_buffers())}.items()}


def check(make: Callable[[], Any], loss: Loss = error, factory: Factory = adam) -> None:
    wanted = hand_written(make(), loss, factory)
    for solver in (dp.Sequential(), EXACT):
        module = make()
        before = copy_nest(dict(module.state_dict()))
        trajectory = dp.OptimizationTrajectory.from_module(module, loss, factory, STEPS)
        assert tree_equal(dp.solve(trajectory, solver).value, wanted)
        assert tree_equal(dict(module.state_dict()), before)
        assert all(p.grad is None for p in module.parameters())


def saved_on_cpu(layers: nn.Sequential, x: Tensor) -> Tensor:
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        return layers(x)


CHECKPOINTED: dict[str, Callable[[nn.Sequential, Tensor], Tensor]] = {
    "none": lambda layers, x: layers(x),
    "recomputed": lambda layers, x: checkpoint(layers, x, use_reentrant=False),
    "reentrant": lambda layers, x: checkpoint(
        layers, x.requires_grad_(True), use_reentrant=True
    ),
    "segments": lambda layers, x: checkpoint_sequential(
        layers, 3, x, use_reentrant=False
    ),
    "nested": lambda layers, x: checkpoint(
        lambda x: checkpoint(layers, x, use_reentrant=False), x, use_reentrant=False
    ),
    "saved elsewhere": saved_on_cpu,
}


@pytest.mark.parametrize("kind", CHECKPOINTED)
def test_activations_computed_again_see_the_same_weights(kind: str) -> None:
    check(lambda: Net(CHECKPOINTED[kind]))


def freeze_row(gradient: Tensor) -> Tensor:
    return gradient * torch.tensor([[0.0], *[[1.0]] * 7])


def clip_in_place(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.clamp_(-0.01, 0.01)


def hook_gradient(net: Net) -> None:
    net.first.weight.register_hook(freeze_row)


def hook_accumulated(net: Net) -> None:
    net.first.weight.register_post_accumulate_grad_hook(clip_in_place)


def hook_module(net: Net) -> None:
    net.head.register_full_backward_hook(lambda module, into, out: (into[0] * 0.5,))


def hook_forward(net: Net) -> None:
    weight: Tensor = net.first.weight  # captured before

    def hook(module: nn.Module, x: Any, y: Tensor) -> Tensor:
        return y + weight.square().mean()

    net.head.register_forward_hook(hook)


def hook_node(net: Net) -> None:
    """As `DistributedDataParallel` does it: at the node that accumulates."""
    weight = net.head.weight
    node: Any = weight.expand_as(weight).grad_fn
    accumulate = node.next_functions[0][0]
    accumulate.register_prehook(lambda gradients: (gradients[0] * 0.3,))
    net.run = _Kept(net.run, accumulate)


class _Kept:
    """Keeps the node alive, as it belongs to nobody else."""

    def __init__(self, run: Any, node: Any) -> None:
        self.run, self.node = run, node

    def __call__(self, layers: nn.Sequential, x: Tensor) -> Tensor:
        return self.run(layers, x)


HOOKS = [hook_gradient, hook_accumulated, hook_module, hook_forward, hook_node]


@pytest.mark.parametrize("hook", HOOKS)
def test_hooks_fire_as_in_the_loop(hook: Callable[[Net], None]) -> None:
    def make() -> Net:
        net = Net(CHECKPOINTED["none"])
        hook(net)
        return net

    check(make)


class Alias(nn.Module):
    """Keeps references to its parameters, as objects and as memory."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = body()
        first: Any = self.layers[0]
        self.listed = list(self.layers.parameters())
        self.memory = first.weight.detach()
        self.rows = first.weight.data[:2]

    def forward(self, x: Tensor) -> Tensor:
        penalty = self.memory.square().sum() + sum(
            p.square().sum() for p in self.listed
        )
        return self.layers(x) + 0.01 * penalty + x[:, :1] * self.rows.sum()


def captured() -> nn.Module:
    net: Any = body()
    first = net[0]
    net.forward = lambda x: nn.Sequential.forward(net, x) + first.weight.mean()
    return net


class Tied(nn.Module):
    """One parameter under two names, and two parameters in one memory."""

    def __init__(self, memory: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 4)
        weight = self.one.weight
        self.two.weight = nn.Parameter(weight.data) if memory else weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


class Functional(nn.Module):
    """A module that calls its own part by `torch.func`."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.part = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        named: dict[str, Tensor] = dict(self.part.named_parameters())

        def one(x: Tensor) -> Tensor:
            return torch.func.functional_call(self.part, named, (x,)).sum()

        slope = torch.func.vmap(torch.func.grad(one))(x)
        return torch.func.vmap(one)(x)[:, None] + slope.square().sum(1, keepdim=True)


def compiled(backend: str) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch._dynamo.reset()
        net = Net(CHECKPOINTED["none"])
        net.body.compile(backend=backend)
        return net

    return make


def whole_compiled() -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    made: Any = torch.compile(nn.Linear(4, 2), backend="aot_eager")
    return made


def recurrent() -> nn.Module:
    torch.manual_seed(0)
    net = nn.LSTM(4, 3, batch_first=True)
    net.forward = lambda x: nn.LSTM.forward(net, x[None])[0]  # pyright: ignore[reportAttributeAccessIssue]
    return net


def normed(wrap: Callable[[nn.Module], nn.Module]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(wrap(nn.Linear(4, 3)), nn.BatchNorm1d(3))

    return make


MODULES: dict[str, Callable[[], nn.Module]] = {
    "aliases": Alias,
    "captured": captured,
    "tied": lambda: Tied(memory=False),
    "one memory": lambda: Tied(memory=True),
    "torch.func": Functional,
    "compiled part": compiled("eager"),
    "compiled gradients": compiled("aot_eager"),
    "compiled": whole_compiled,
    "recurrent": recurrent,
    "weight norm": normed(parametrizations.weight_norm),
    "spectral norm": normed(parametrizations.spectral_norm),
    "orthogonal": normed(parametrizations.orthogonal),
    "channels last": lambda: nn.Sequential(
        nn.Unflatten(1, (1, 2, 2)), nn.Conv2d(1, 3, 2)
    ).to(memory_format=torch.channels_last),  # pyright: ignore[reportCallIssue]
}


@pytest.mark.parametrize("kind", MODULES)
def test_every_kind_of_module_equals_its_loop(kind: str) -> None:
    def make() -> nn.Module:
        torch.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return MODULES[kind]()

    check(make)


def by_identity(params: dict[str, Any]) -> torch.optim.Optimizer:
    """Groups by a set of identities and by a mark, as training scripts make them."""
    plain = {id(p) for p in params.values() if getattr(p, "_no_weight_decay", False)}
    groups = [
        {"params": [p for p in params.values() if id(p) in plain], "weight_decay": 0.0},
        {"params": [p for p in params.values() if id(p) not in plain]},
    ]
    assert all(group["params"] for group in groups)
    return torch.optim.AdamW(groups, lr=0.05, weight_decay=0.5)


class Marked(torch.optim.SGD):
    """Reads the marks at each step."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                if not getattr(parameter, "_no_weight_decay", False):
                    parameter.mul_(0.9)
        super().step(closure)


FACTORIES: dict[str, Factory] = {
    "by identity": by_identity,
    "marks": lambda params: Marked(params.values(), lr=0.05),
}


@pytest.mark.parametrize("kind", FACTORIES)
def test_factories_are_given_the_parameters_themselves(kind: str) -> None:
    def make() -> nn.Module:
        net = Net(CHECKPOINTED["none"])
        net.head.bias._no_weight_decay = True  # pyright: ignore[reportAttributeAccessIssue]
        return net

    check(make, factory=FACTORIES[kind])


def test_a_factory_may_use_the_module_instead() -> None:
    nets: list[nn.Module] = []

    def make() -> nn.Module:
        nets.append(Net(CHECKPOINTED["none"]))
        return nets[-1]

    check(make, factory=lambda _: torch.optim.Adam(nets[-1].parameters(), lr=0.05))


def accumulated(step: int, module: nn.Module) -> Tensor:
    """A loss that goes backward itself for its first parts."""
    (error(step, module) / 2).backward()
    return error(step, module) / 2


def penalised(step: int, module: nn.Module) -> Tensor:
    x = torch.randn(8, 4, requires_grad=True)
    y = module(x).sum()
    (slope,) = torch.autograd.grad(y, x, create_graph=True)
    return (slope.norm(dim=1) - 1).square().mean() + y.square()


@pytest.mark.parametrize("loss", [accumulated, penalised])
def test_losses_that_go_backward_themselves(loss: Loss) -> None:
    check(lambda: Net(CHECKPOINTED["none"]), loss)


class Failing(RuntimeError):
    pass


@pytest.mark.parametrize("when", ["forward", "backward", "optimizer"])
def test_a_module_is_as_before_after_an_error(when: str) -> None:
    net = Net(CHECKPOINTED["none"])
    net.level = torch.zeros(2)
    net.train(False)
    for number, parameter in enumerate(net.parameters()):
        parameter.grad = torch.full_like(parameter, number)

    def fail(*_: Any) -> None:
        raise Failing

    def loss(step: int, module: Any) -> Tensor:
        module.level.fill_(step + 1)
        module.born = step
        found = error(step, module)
        if step == 2 and when == "forward":
            fail()
        if step == 2 and when == "backward":
            found.register_hook(fail)
        return found

    class Broken(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            super().step(closure)
            if when == "optimizer":
                fail()

    kept = {n: (t, t.data_ptr()) for n, t in net.state_dict(keep_vars=True).items()}
    values = copy_nest({n: t for n, (t, _) in kept.items()})
    trajectory = dp.OptimizationTrajectory.from_module(
        net, loss, lambda p: Broken(p.values(), lr=0.1), STEPS
    )
    with pytest.raises(Failing):
        dp.solve(trajectory, EXACT)
    now = net.state_dict(keep_vars=True)
    assert all(now[n] is t and t.data_ptr() == at for n, (t, at) in kept.items())
    assert tree_equal(dict(net.state_dict()), values)
    for number, parameter in enumerate(net.parameters()):
        assert parameter.grad is not None
        assert bool((parameter.grad == number).all())
    assert not hasattr(net, "born")
    assert torch.equal(net.level, torch.zeros(2))
    assert not net.training


def test_memory_is_exchanged_where_nothing_shares_it() -> None:
    alone, shared = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    view = shared.detach()
    values = {"alone": torch.ones(3), "shared": torch.ones(3)}
    with lent({"alone": alone, "shared": shared}, values) as written:
        assert written == {"shared"}
        assert alone.data_ptr() == values["alone"].data_ptr()
        assert torch.equal(view, torch.ones(3))
    assert torch.equal(view, torch.zeros(3))
    assert torch.equal(alone, torch.zeros(3))
    odd = nn.Parameter(torch.zeros(9)[1:])  # memory-mapped weights lie like this
    with lent({"odd": odd}, {"odd": torch.ones(8)}) as written:
        assert written == {"odd"}
