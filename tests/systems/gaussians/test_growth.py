"""Growth: rows as gsplat's strategy makes them, relocation by its own equation."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from gsplat.strategy import ops
from torch import Tensor

from dreampropeller.tree import State
from systems.scene.gaussians import growth, relocation
from systems.scene.gaussians.growth import GrowthConfig, Rows
from tests.helpers import tree_equal
from tests.systems.gaussians.test_ply import some

CONFIG = GrowthConfig(
    interval=5,
    reset_interval=15,
    gradient_threshold=0.5,
    percent_dense=0.25,
    extent=4.0,
    min_opacity=0.2,
    max_scale=2.0,
)


def statistics(count: int) -> State:
    generator = torch.Generator().manual_seed(2)
    seen = growth.nothing_seen(count, torch.zeros(1))
    seen["gradient"] = 4 * torch.rand(count, generator=generator)
    seen["count"] = torch.randint(0, 5, (count,), generator=generator).float()
    seen["size"] = torch.rand(count, generator=generator)
    return seen


def by_gsplat(
    splats: State, moments: State, seen: State
) -> tuple[State, State, Tensor]:
    """Clone, split and prune by gsplat's own functions on CPU."""
    params: Any = torch.nn.ParameterDict(
        {name: torch.nn.Parameter(value.clone()) for name, value in splats.items()}
    )
    optimizers: Any = {}
    for name, parameter in params.items():
        optimizers[name] = torch.optim.Adam([parameter])
        optimizers[name].state[parameter] = {"exp_avg": moments[name].clone()}
    high = seen["gradient"] / seen["count"].clamp(min=1) >= CONFIG.gradient_threshold
    small = splats["scales"].exp().amax(-1) <= CONFIG.percent_dense * CONFIG.extent
    # gsplat keeps what belongs to rows in a mapping of its own, too.
    state: Any = {"origin": torch.arange(len(high))}
    ops.duplicate(params, optimizers, state, high & small)
    more = torch.zeros(len(state["origin"]) - len(high), dtype=torch.bool)
    torch.manual_seed(11)
    ops.split(params, optimizers, state, torch.cat([high & ~small, more]))
    gone = params["opacities"].sigmoid() < CONFIG.min_opacity
    gone |= params["scales"].exp().amax(-1) > CONFIG.max_scale * CONFIG.extent
    ops.remove(params, optimizers, state, gone)
    found = {
        name: optimizers[name].state[parameter]["exp_avg"]
        for name, parameter in params.items()
    }
    return {n: p.detach() for n, p in params.items()}, found, state["origin"]


def test_split_clone_and_prune_are_gsplats() -> None:
    splats, moments, seen = some(1, 60), some(1, 60), statistics(60)
    torch.manual_seed(11)
    grown, rows = growth.densify(splats, seen, CONFIG, 1000, torch.default_generator)
    wanted, kept, origin = by_gsplat(splats, moments, seen)
    assert len(rows.parents) > 60  # it grew
    assert len(set(range(60)) - set(rows.parents.tolist())) > 3  # some are gone
    counts = torch.bincount(rows.parents[rows.born])
    assert (counts == 1).any()  # clones
    assert (counts == 2).any()  # halves
    assert torch.equal(rows.parents, origin)
    for name in splats:
        torch.testing.assert_close(grown[name], wanted[name], atol=1e-6, rtol=1e-6)
        assert torch.equal(rows.take(moments[name]), kept[name])


def test_growth_stops_at_the_limit_and_takes_the_steepest() -> None:
    splats, seen = some(0, 60), statistics(60)
    free = GrowthConfig(**{**vars(CONFIG), "min_opacity": 1e-9, "max_scale": 1e9})
    grown, rows = growth.densify(splats, seen, free, 64, torch.Generator())
    assert len(grown["means"]) == 64
    mean = seen["gradient"] / seen["count"].clamp(min=1)
    best = set(mean.topk(4).indices.tolist())
    assert set(rows.parents[rows.born].tolist()) == best
    full, rows = growth.densify(splats, seen, free, 60, torch.Generator())
    assert len(full["means"]) == 60
    assert not rows.born.any()


def test_the_most_opaque_splat_stays() -> None:
    splats = some(0, 5)
    splats["opacities"] = torch.tensor([-9.0, -8.0, -7.0, -9.0, -9.0])
    seen = growth.nothing_seen(5, splats["means"])
    grown, rows = growth.densify(splats, seen, CONFIG, 100, torch.Generator())
    assert rows.parents.tolist() == [2]
    assert torch.equal(grown["means"], splats["means"][2:3])


def test_a_reset_lowers_opacities_only() -> None:
    splats = some(0, 30)
    after = growth.reset_opacities(splats, CONFIG)
    most = after["opacities"].sigmoid().max()
    assert math.isclose(float(most), CONFIG.reset_opacity, rel_tol=1e-5)
    low = splats["opacities"] < after["opacities"].max()
    assert torch.equal(after["opacities"][low], splats["opacities"][low])
    assert all(after[name] is splats[name] for name in splats if name != "opacities")


def test_what_is_seen_does_not_depend_on_the_size_of_the_image() -> None:
    gradient = torch.tensor([[[0.2, 0.0], [0.0, 0.1]], [[0.0, 0.4], [9.0, 9.0]]])
    radii = torch.tensor([[[2, 3], [4, 1]], [[1, 1], [0, 0]]])
    found = growth.seen(gradient, radii, 20, 40)
    # Half the width is 20, half the height 10; two views were averaged.
    assert found["gradient"].tolist() == pytest.approx([0.2 * 40 + 0.4 * 20, 0.1 * 20])
    assert found["count"].tolist() == [2, 1]
    assert found["size"].tolist() == pytest.approx([3 / 40, 4 / 40])
    twice = growth.seen(gradient / 2, 2 * radii, 40, 80)
    assert twice["gradient"].tolist() == found["gradient"].tolist()
    assert twice["size"].tolist() == found["size"].tolist()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 30])
@pytest.mark.parametrize("opacity", [0.05, 0.6, 0.98])
def test_splats_that_share_a_place_let_as_much_light_through(
    count: int, opacity: float
) -> None:
    one = torch.tensor([opacity], dtype=torch.float64)
    new, factor = relocation.shared(one, torch.tensor([count]))
    # At the centre exactly; over a line through it in the integral.
    assert math.isclose(float(1 - (1 - new) ** count), opacity, rel_tol=1e-9)
    x = torch.linspace(-12, 12, 40001, dtype=torch.float64)
    before = torch.trapezoid(opacity * (-x.square() / 2).exp(), x)
    alpha = new * (-(x / factor).square() / 2).exp()
    after = torch.trapezoid(1 - (1 - alpha) ** count, x)
    torch.testing.assert_close(after, before, rtol=1e-6, atol=0)


def test_the_dead_move_to_the_living_and_the_number_grows() -> None:
    splats = some(1, 40)
    splats["opacities"][:6] = -8.0
    config = GrowthConfig(strategy="relocate", rate=1.1, min_opacity=0.01)
    drawn = torch.Generator().manual_seed(3)
    grown, rows = relocation.relocate(splats, config, 1000, drawn)
    assert len(rows.parents) == 44
    assert (rows.parents[:6] >= 6).all()
    places = torch.cat([torch.arange(6), torch.arange(40, 44)])
    hosts = rows.parents[places]
    assert torch.equal(grown["means"][places], splats["means"][hosts])
    assert rows.born[places].all()
    assert rows.born[hosts].all()  # those who were joined are others now
    rest = torch.ones(44, dtype=torch.bool)
    rest[places] = rest[hosts] = False
    assert not rows.born[rest].any()
    assert tree_equal(
        {name: value[rest] for name, value in grown.items()},
        {name: value[rest[:40]] for name, value in splats.items()},
    )
    sharing = torch.bincount(hosts, minlength=40)[hosts] + 1
    before = splats["opacities"][hosts].sigmoid()
    after = 1 - (1 - grown["opacities"][places].sigmoid()) ** sharing
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-4)
    full, rows = relocation.relocate(splats, config, 40, drawn)
    assert len(full["means"]) == 40


def test_opaque_splats_do_not_explore() -> None:
    splats = some(0, 2)
    splats["opacities"] = torch.tensor([6.0, -6.0])
    moved = relocation.explored(splats, 1.0, torch.Generator().manual_seed(0))
    assert torch.equal(moved[0], splats["means"][0])
    assert (moved[1] != splats["means"][1]).all()


def test_rows_take_what_belongs_to_them() -> None:
    rows = Rows(torch.tensor([2, 0, 2]), torch.tensor([False, False, True]))
    taken = rows.take(torch.tensor([[1.0], [2.0], [3.0]]))
    assert taken.tolist() == [[3.0], [1.0], [0.0]]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"interval": -50}, "`interval` is -50: write 1 or more"),
        ({"strategy": "grow"}, "write densify or relocate or none"),
        ({"min_opacity": 0}, "`min_opacity` is 0: write a number between 0 and 1"),
        ({"rate": 0.5}, "`rate` is 0.5: write 1 or more"),
        ({"max_screen_size": -1}, "`max_screen_size` is -1"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        GrowthConfig(**settings)
