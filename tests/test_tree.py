from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from dreampropeller import tree
from dreampropeller.tree import copy_nest, decode, encode
from tests.helpers import tree_equal


def nest() -> Any:
    shared = torch.arange(3.0)
    return {
        "a": shared,
        1: [shared, (True, None, -0.0, "text"), {"empty": torch.zeros(0, 2)}],
        "inf": math.inf,
        "flags": torch.tensor([True, False]),
    }


def test_copy_keeps_types_values_and_aliases() -> None:
    original = nest()
    copy = copy_nest(original)
    assert tree_equal(copy, original)
    assert copy["a"] is copy[1][0]
    copy["a"].add_(1)
    assert original["a"].tolist() == [0, 1, 2]


def test_encode_is_json_and_decode_its_inverse() -> None:
    structure, found = encode(nest())
    rebuilt = decode(json.loads(json.dumps(structure)), found)
    assert tree_equal(rebuilt, nest())
    assert rebuilt["a"] is rebuilt[1][0]
    assert len(found) == 3  # the shared tensor once


@pytest.mark.parametrize("function", [copy_nest, encode])
def test_unknown_leaves_are_refused_by_name(function: Any) -> None:
    with pytest.raises(TypeError, match="`set`"):
        function({"state": [{1, 2}]})


def test_copy_names_the_place_of_an_unknown_leaf() -> None:
    with pytest.raises(TypeError, match=r"`carry\['state'\]\[0\]` is a `set`"):
        copy_nest({"state": [{1, 2}]})


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_norms_by_hand(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tree, "_CHUNK", 3)  # as if the tensors were large
    state = {
        "a": torch.tensor([[3.0, 0.0], [0.0, 4.0]], dtype=dtype),
        "b": torch.full((10,), 300.0, dtype=dtype),  # squares overflow half precision
        "none": torch.zeros(0, dtype=dtype),
        "count": torch.tensor(7),
    }
    found = tree.norms(state)
    assert found == {"a": 5, "b": pytest.approx(300 * 10**0.5), "none": 0}
    assert tree.norms({"count": torch.tensor(7)}) == {}


def test_mean_square_by_hand() -> None:
    new = {"x": torch.tensor([1.0, 2.0]), "n": torch.tensor(7), "y": torch.ones(2)}
    old = {"x": torch.tensor([1.0, 5.0]), "n": torch.tensor(3), "y": torch.zeros(2)}
    assert tree.mean_square(new, old).item() == pytest.approx((9 + 1 + 1) / 4)


def test_mean_square_of_large_and_of_half_precision_tensors() -> None:
    generator = torch.Generator().manual_seed(0)
    new, old = torch.randn(2, 700_001, generator=generator).unbind()
    expected = (new.double() - old.double()).square().mean().item()
    value = tree.mean_square({"x": new}, {"x": old}).item()
    assert value == pytest.approx(expected, rel=1e-5)
    half = torch.full((4,), 300.0, dtype=torch.float16)  # its square overflows
    assert tree.mean_square({"x": half}, {"x": -half}).item() == 360_000


def test_mean_square_of_nan_is_nan() -> None:
    nan = torch.tensor([math.nan])
    assert math.isnan(tree.mean_square({"x": nan}, {"x": torch.zeros(1)}).item())


@pytest.mark.parametrize(
    ("new", "old", "share"),
    [
        ([0.0, 1.0], [0.0, 1.0], 0.0),
        ([0.0, 1.0], [-0.0, 1.0], 0.5),
        ([math.nan, 1.0], [math.nan, 1.0], 0.0),
        ([1.0 + 2**-23, 1.0], [1.0, 1.0], 0.5),
    ],
)
def test_share_differing_compares_bits(
    new: list[float], old: list[float], share: float
) -> None:
    for dtype in (torch.float32, torch.float64, torch.complex64):
        a, b = torch.tensor(new, dtype=dtype), torch.tensor(old, dtype=dtype)
        assert tree.share_differing({"x": a}, {"x": b}).item() == share


def test_share_differing_sees_integers_and_flags() -> None:
    new = {"n": torch.tensor([1, 2]), "b": torch.tensor([True, False])}
    old = {"n": torch.tensor([1, 3]), "b": torch.tensor([True, True])}
    assert tree.share_differing(new, old).item() == 0.5


def test_all_finite_looks_at_every_floating_tensor() -> None:
    states = [
        {"x": torch.ones(3), "n": torch.tensor([1])},
        {"x": torch.tensor([1.0, math.inf])},
        {"x": torch.ones(2), "y": torch.tensor([math.nan])},
        {"n": torch.tensor([1])},
        {},
        {"empty": torch.zeros(0)},
        {"big": torch.full((3,), 3e38)},
    ]
    expected = [True, False, False, True, True, True, True]
    assert tree.all_finite(states) == expected
    assert tree.all_finite([]) == []
