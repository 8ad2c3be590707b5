"""Plain attributes are put back, whatever was done to them."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from dreampropeller.attributes import Attributes


class Part(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("grid", torch.zeros(2))
        self.mask = torch.zeros(3)
        self.level, self.name = 1, "coarse"
        self.table: dict[str, Any] = {"a": [1, torch.zeros(2)], "b": ()}
        self.seen = {1, 2}
        self.generator = torch.Generator().manual_seed(0)
        self.other: nn.Module | None = None


def spoil(part: Part) -> None:
    part.mask[:2] = 1
    part.level, part.name = True, "fine"  # True == 1, but is not it
    part.table["a"][0] = 7
    part.table["a"][1].add_(1)
    part.table["c"] = 3
    part.seen.add(3)
    vars(part)["born"] = 1
    part.training = False
    torch.rand(3, generator=part.generator)
    del part.other


def test_everything_is_put_back_into_the_same_objects() -> None:
    part = Part()
    vars(part)["parameters_too"] = [part.layer.weight]
    mask, inner, weight = part.mask, part.table["a"], part.layer.weight
    attributes = Attributes({"": part})
    assert attributes.changed() == []
    for _ in range(2):
        spoil(part)
        with torch.no_grad():
            weight.fill_(5)
        part.grid.fill_(5)  # pyright: ignore[reportCallIssue]
        assert attributes.changed() == [
            *("born", "generator", "level", "mask", "name"),
            *("other", "seen", "table", "training"),
        ]
        attributes.restore()
        assert attributes.changed() == []
        assert part.mask is mask
        assert part.table["a"] is inner
        assert not mask.any()
        assert not inner[1].any()
        assert (part.level, part.name, inner[0]) == (1, "coarse", 1)
        assert type(part.level) is int
        assert set(part.table) == {"a", "b"}
        assert part.seen == {1, 2}
        assert part.training
        assert not hasattr(part, "born")
        assert part.other is None
        expected = torch.rand(2, generator=torch.Generator().manual_seed(0))
        assert torch.equal(torch.rand(2, generator=part.generator), expected)
    assert (weight == 5).all(), "parameters and buffers are the state, not attributes"
    assert (part.grid == 5).all()  # pyright: ignore


def test_a_mask_that_is_rebound_comes_back() -> None:
    part = Part()
    attributes, mask = Attributes({"": part}), part.mask
    part.mask = torch.ones(3)
    attributes.restore()
    assert part.mask is mask


def test_the_walk_is_named_and_passes_frozen_networks_by() -> None:
    whole, frozen = Part(), nn.Sequential(Part()).eval().requires_grad_(False)
    whole.add_module("inner", Part())
    whole.other = frozen
    names = [name for name, _ in Attributes({"": whole}).objects()]
    assert names == ["", "layer", "inner", "inner.layer"]
