"""All optimizers of PyPI's `pytorch-optimizer` (4.1.0): their loop, or refused.

Marked `long`, not in the default run: ``pytest -s -m long`` prints which pass and which
are refused, and why.
"""

from __future__ import annotations

import inspect
import warnings
from typing import Any

import pytest
import torch
from torch import nn

import dreampropeller as dp
from tests.helpers import tree_equal

STEPS = 12
ARGUMENTS = {"bsam": {"num_data": 8}, "ranger21": {"num_iterations": STEPS}}
"""What some cannot do without."""
SPLIT = ("adago", "adamuon", "distributedmuon", "muon", "muonclip", "normuon")
"""Those that want to be told which parameters are matrices."""
EXACT = dp.PicardSolver(dp.SlidingWindow(4), dp.FixedThreshold(0), "momentum")


def module() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 2))


def error(step: int, net: nn.Module) -> torch.Tensor:
    x = torch.randn(8, 4)
    return (net(x) - x[:, :2].sin()).square().mean()


def hand_written(factory: Any) -> dict[str, Any]:
    net, keyed = module(), dp.StepRandom(0)
    named = dict(net.named_parameters())
    optimizer = factory(named)
    for step in range(STEPS):
        optimizer.zero_grad()
        with keyed.scope(step):
            error(step, net).backward()
            optimizer.step()
    return {name: parameter.detach() for name, parameter in named.items()}


def outcome(factory: Any) -> str:
    """`passes`, why it is refused, why its own loop fails, or `SILENT`."""
    try:
        wanted = hand_written(factory)
    except Exception as error_of_loop:
        return f"its own loop fails: {type(error_of_loop).__name__}: {error_of_loop}"
    trajectory = None
    for solver in (dp.Sequential(), EXACT, dp.Sequential()):
        try:
            trajectory = trajectory or dp.OptimizationTrajectory.from_module(
                module(), error, factory, STEPS
            )
            found = dp.solve(trajectory, solver)
        except (ValueError, TypeError) as refusal:
            return f"refused: {type(refusal).__name__}: {refusal}"
        if not tree_equal(found.value, wanted):
            return "SILENT"
    return "passes"


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_passes_or_is_refused() -> None:
    library: Any = pytest.importorskip("pytorch_optimizer")
    found: dict[str, str] = {}
    for name in library.get_supported_optimizers():
        kind = library.load_optimizer(name)
        arguments = list(inspect.signature(kind.step).parameters.values())[1:]
        if any(
            one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD
            for one in arguments
        ):
            continue  # needs a closure

        def factory(params: Any, name: str = name, kind: Any = kind) -> Any:
            given: list[Any] = list(params.values())
            if name in SPLIT:
                given = [
                    {"params": [p for p in given if p.ndim == 2], "use_muon": True},
                    {"params": [p for p in given if p.ndim < 2], "use_muon": False},
                ]
            if name == "spectralsphere":
                given = [p for p in given if p.ndim == 2]
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return kind(given, **ARGUMENTS.get(name, {}))

        found[name] = outcome(factory)
        print(f"{name}: {found[name][:200]}", flush=True)
    silent = [name for name, result in found.items() if result == "SILENT"]
    assert not silent
    passing = sum(result == "passes" for result in found.values())
    print(f"{passing} of {len(found)} pass")
    assert passing > len(found) / 2
