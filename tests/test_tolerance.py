"""The tolerance of the check on a GPU, as a rule on numbers; nothing runs on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import dreampropeller as dp
from dreampropeller import verification
from dreampropeller.host import ModuleHost
from dreampropeller.verification import NotReproducible, require_equal, same

UNIT = torch.full((100,), 0.1)  # of norm 1
SIDE = torch.zeros(100).index_fill_(0, torch.tensor([3]), 1.0)


@pytest.mark.parametrize(
    ("distance", "noise", "agree"),
    [
        (0.0, None, True),
        (1e-7, None, False),  # bitwise, as on a CPU
        (0.9e-5, 0.0, True),  # 1e-5 of the norm
        (1.1e-5, 0.0, False),
        (0.9e-3, 1e-4, True),  # ten times the difference of one evaluation repeated
        (1.1e-3, 1e-4, False),
        (0.9e-5, 1e-9, True),  # whichever is larger
    ],
)
def test_two_evaluations_agree_within_the_larger_of_two_bounds(
    distance: float, noise: float | None, agree: bool
) -> None:
    other = UNIT + distance * SIDE
    assert same(UNIT, other, noise) is agree
    named = {} if noise is None else {"x": noise}
    if agree:
        require_equal({"x": UNIT}, {"x": other}, "Compared", named)
    else:
        with pytest.raises(NotReproducible, match=r"Compared, .* differ in `x`"):
            require_equal({"x": UNIT}, {"x": other}, "Compared", named)


def test_nothing_but_rounding_is_tolerated() -> None:
    assert not same(UNIT, UNIT * float("nan"), 1.0)
    assert not same(UNIT, UNIT[:-1], 1.0)
    assert not same(UNIT, UNIT.double(), 1.0)
    assert not same(torch.tensor([1, 2]), torch.tensor([1, 3]), 1.0)
    for one, two in (({"x": UNIT}, {}), ({}, {"x": UNIT})):
        with pytest.raises(NotReproducible, match="`x`"):
            require_equal(one, two, "Compared", {"x": 1.0})


@pytest.fixture
def as_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """The branch of a GPU, on the CPU."""
    monkeypatch.setattr(verification, "device_of", lambda _: torch.device("cuda"))
    monkeypatch.setattr(ModuleHost, "on_gpu", property(lambda _: True))


def rounding(size: float) -> Callable[[Tensor], Tensor]:
    """Gradients that differ from call to call, as where a kernel adds atomically."""
    generator = torch.Generator().manual_seed(0)

    def hook(gradient: Tensor) -> Tensor:
        noise = torch.randn(gradient.shape, generator=generator)
        return gradient * (1 + size * noise)

    return hook


def trajectory(size: float, loss: Any = None) -> dp.OptimizationTrajectory:
    torch.manual_seed(0)
    module = torch.nn.Linear(8, 1)
    module.weight.register_hook(rounding(size))

    def plain(step: int, module: Any) -> Tensor:
        return (module(torch.randn(16, 8)) - 1).square().mean()

    # A tiny epsilon turns rounding into full steps, in the first ones of Adam.
    return dp.OptimizationTrajectory.from_module(
        module,
        loss or plain,
        lambda params: torch.optim.Adam(params.values(), lr=0.1, eps=1e-30),
        20,
    )


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("size", [0.0, 1e-7, 1e-3])
def test_a_module_whose_kernels_round_passes(size: float) -> None:
    found = dp.solve(trajectory(size), dp.Sequential(), max_iterations=1, throw=False)
    assert found.checked is not None
    assert found.checked.whole


def test_on_a_cpu_it_is_refused() -> None:
    with pytest.raises(NotReproducible, match="evaluated twice"):
        dp.solve(trajectory(1e-7), dp.Sequential())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_more_than_rounding_is_refused() -> None:
    calls: list[int] = []

    def loss(step: int, module: Any) -> Tensor:
        calls.append(step)
        # A seventh call as the second: rounding explains no trend.
        return module(torch.ones(4, 8)).mean() * (1 + 1e-3 * len(calls) ** 2)

    with pytest.raises(NotReproducible, match="differ in"):
        dp.solve(trajectory(1e-7, loss), dp.Sequential())


@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_second_state_is_the_first_moved_by_a_thousandth() -> None:
    made = trajectory(0.0)
    y, carry = made.init()
    found = verification.probe(made, 0, y, carry, made.make_drift(torch.device("cpu")))
    first, second = found.states
    for name, value in first.items():
        moved = verification.distance(second[name], value)
        norm = verification.distance(value, torch.zeros_like(value))
        assert moved == pytest.approx(1e-3 * norm, rel=1e-3)
    assert found.noise == {"weight": 0.0, "bias": 0.0}
