"""Rows of grown Gaussians are found again by what they hold."""

from __future__ import annotations

import torch

from dreampropeller.adapters.threestudio.rows import parents_of

NAMES = ["geometry._xyz", "geometry._scaling", "geometry._color"]


def test_kept_cloned_and_split_rows_are_found() -> None:
    generator = torch.Generator().manual_seed(0)
    before = {name: torch.randn(6, 3, generator=generator) for name in NAMES}
    # Row 1 is pruned, 2 cloned, 4 split in two.
    origin = torch.tensor([0, 2, 3, 5, 2, 4, 4])
    after = {name: value[origin] for name, value in before.items()}
    after["geometry._xyz"][5:] += 0.1
    after["geometry._scaling"][5:] -= 0.5
    assert torch.equal(parents_of(before, after, NAMES), origin)


def test_where_several_would_do_there_is_no_parent() -> None:
    before = {name: torch.arange(8.0).view(4, 2) for name in NAMES}
    before["geometry._color"][2] = before["geometry._color"][3]
    after = {name: value.clone() for name, value in before.items()}
    after["geometry._xyz"][1:] += 1
    assert parents_of(before, after, NAMES).tolist() == [0, 1, -1, -1]
    after["geometry._color"][1] = 77
    assert parents_of(before, after, NAMES).tolist() == [0, -1, -1, -1]
