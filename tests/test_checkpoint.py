"""Resumed equals uninterrupted; a damaged file falls back; nothing half-written."""

from __future__ import annotations

import functools
import json
import os
import random
import signal
import subprocess
import sys
import time
import zlib
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from beartype.roar import BeartypeCallHintViolation
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file

from dreampropeller import (
    CheckpointError,
    DriftThreshold,
    EMAThreshold,
    Memory,
    OptimizationTrajectory,
    PicardSolver,
    Secant,
    SlidingWindow,
    SolverState,
    checkpoint,
    solve,
)
from dreampropeller.solution import Stats
from tests.helpers import TOYS, tree_equal

SOLVER = PicardSolver(SlidingWindow(5), EMAThreshold(1e-6, 0.9, "median"), "momentum")


@pytest.mark.parametrize("name", TOYS)
@pytest.mark.parametrize("iterations", [1, 4])
def test_resumed_equals_uninterrupted(
    name: str, iterations: int, tmp_path: Path
) -> None:
    trajectory = TOYS[name].make()
    whole = solve(trajectory, SOLVER)
    half = solve(trajectory, SOLVER, max_iterations=iterations, throw=False)
    checkpoint.save(tmp_path, half.state)
    state = checkpoint.load(tmp_path)
    assert tree_equal(vars(state), vars(half.state) | {"stats": state.stats})
    resumed = solve(TOYS[name].make(), SOLVER, state=state)
    assert tree_equal(resumed.value, whole.value)
    assert tree_equal(resumed.carry, whole.carry)
    assert resumed.stats == whole.stats


def test_jump_at_the_checkpoint_is_not_repeated(tmp_path: Path) -> None:
    trajectory = TOYS["growing"].make()
    solver = PicardSolver(SlidingWindow(9), EMAThreshold(1e9, 1.0, "mean"))
    states: list[SolverState[Any]] = []
    whole = solve(
        trajectory,
        solver,
        on_iteration=lambda s, _: (
            checkpoint.save(tmp_path, s) and states.append(s) if s.step == 5 else None
        ),
    )
    assert len(states[0].y["points"]) == 5  # 3 at the start, one more at jumps 0 and 5
    resumed = solve(TOYS["growing"].make(), solver, state=checkpoint.load(tmp_path))
    assert tree_equal(resumed.value, whole.value)


PROGRAM = """
import sys, time, random, torch
from tests.helpers import TOYS
from tests.test_checkpoint import SOLVER
from dreampropeller import checkpoint, solve
torch.set_num_threads(1)

def on_iteration(state, iteration):
    checkpoint.save(sys.argv[1], state)
    print(state.step, flush=True)
    time.sleep(0.02)

state = checkpoint.load(sys.argv[1]) if len(sys.argv) > 2 else None
solve(TOYS["network-adamw"].make(), SOLVER, state=state, on_iteration=on_iteration)
"""


def test_killed_at_a_random_moment_and_resumed_equals_uninterrupted(
    tmp_path: Path,
) -> None:
    whole = solve(TOYS["network-adamw"].make(), SOLVER)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    run = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    first = subprocess.Popen(run, env=env, stdout=subprocess.PIPE, text=True)
    assert first.stdout
    first.stdout.readline()  # at least one checkpoint
    time.sleep(random.uniform(0, 0.3))
    first.send_signal(signal.SIGKILL)
    first.wait()
    first.stdout.close()
    subprocess.run([*run, "resume"], env=env, check=True, stdout=subprocess.DEVNULL)
    state = checkpoint.load(tmp_path)
    assert tree_equal(state.y, whole.value)
    assert state.stats == whole.stats


def small(step: int) -> SolverState[Any]:
    return SolverState(
        step, {"x": torch.full((100,), float(step))}, {"m": (step, None)}
    )


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "foreign"])
def test_damaged_newest_falls_back_with_a_warning(tmp_path: Path, damage: str) -> None:
    checkpoint.save(tmp_path, small(1))
    newest = checkpoint.save(tmp_path, small(2))
    content = bytearray(newest.read_bytes())
    if damage == "cut":
        content = content[:-40]
    elif damage == "flipped":
        content[-7] ^= 1
    elif damage == "empty":
        content = bytearray()
    else:
        content = bytearray(b"\2\0\0\0\0\0\0\0{}")
    newest.write_bytes(content)
    with pytest.warns(UserWarning, match="Falling back"):
        state = checkpoint.load(tmp_path)
    assert state.step == 1
    assert state.carry == {"m": (1, None)}
    with pytest.raises(CheckpointError):
        checkpoint.load(newest)


def test_nothing_to_load_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(tmp_path / "step-00000001.safetensors")


def test_another_format_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "FORMAT", 99)
        path = checkpoint.save(tmp_path, small(1))
    with pytest.raises(CheckpointError, match="format 99, and this version reads 4"):
        checkpoint.load(path)


def test_every_field_of_the_state_says_which_checkpoints_hold_it() -> None:
    lean = {f.name: f.metadata["lean"] for f in fields(SolverState)}
    assert [name for name, kept in lean.items() if not kept] == ["guesses"]
    for kind in Memory.kinds():
        for one in fields(cast(Any, kind)):
            dropped = not one.metadata.get("lean", True)
            has_default = (one.default, one.default_factory) != (MISSING, MISSING)
            assert has_default or not dropped, (kind, one.name)


@pytest.mark.parametrize(
    ("options", "most"),
    [({}, 4), ({"predictor": "auto", "acceleration": Secant()}, 7)],
)
def test_a_lean_checkpoint_is_small_and_goes_on(
    options: dict[str, Any], most: int, tmp_path: Path
) -> None:
    def make() -> OptimizationTrajectory:
        return OptimizationTrajectory(
            lambda step, y: ((y["x"] - step / 9) ** 2).sum(),
            {"x": torch.zeros(9000)},
            lambda params: torch.optim.Adam(params.values(), lr=0.3),
            24,
        )

    def size(lean: bool) -> float:
        path = checkpoint.save(tmp_path / str(lean), half.state, lean=lean)
        return path.stat().st_size / 36000

    solver = PicardSolver(SlidingWindow(8), DriftThreshold(0.1), **options)
    half = solve(make(), solver, max_iterations=3, throw=False)
    assert size(lean=True) <= most + 0.2 < size(lean=False)
    state = checkpoint.load(tmp_path / "True")
    assert tree_equal(state.y, half.state.y)
    assert tree_equal(state.carry, half.state.carry)
    assert state.threshold.secants == half.state.threshold.secants
    assert not state.guesses
    exact = PicardSolver(SlidingWindow(8), DriftThreshold(0), **options)
    ends = [solve(make(), exact, state=one).value for one in (state, half.state)]
    assert tree_equal(*ends)
    assert solve(make(), solver, state=state).state.step == 24


def test_views_of_the_same_memory_are_stored_once(tmp_path: Path) -> None:
    x = torch.arange(50000.0)
    state = SolverState(0, {"x": x}, [x.detach(), x.view(-1)], guesses=[{"x": x[:]}])
    path = checkpoint.save(tmp_path, state)
    assert path.stat().st_size < 1.1 * 4 * x.numel()
    loaded = checkpoint.load(path)
    assert loaded.carry[0] is loaded.carry[1] is loaded.guesses[0]["x"]
    assert torch.equal(loaded.y["x"], x)


def test_failed_write_keeps_the_earlier_ones(tmp_path: Path) -> None:
    checkpoint.save(tmp_path, small(1))
    (tmp_path / "step-00000002.part").mkdir()  # the file cannot be written there
    with pytest.raises(CheckpointError, match="Earlier checkpoints are intact"):
        checkpoint.save(tmp_path, small(2))
    assert checkpoint.load(tmp_path).step == 1


def test_old_ones_are_removed_and_none_is_half_written(tmp_path: Path) -> None:
    for step in range(5):
        checkpoint.save(tmp_path, small(step), keep=2)
    names = sorted(path.name for path in tmp_path.glob("step-*"))
    assert names == ["step-00000003.safetensors", "step-00000004.safetensors"]
    with pytest.raises(ValueError, match="`keep` is 0"):
        checkpoint.save(tmp_path, small(5), keep=0)


def test_aliased_and_strided_tensors_survive(tmp_path: Path) -> None:
    shared = torch.arange(6.0)
    state = SolverState(
        3,
        {
            "a": shared.view(2, 3).T,
            "b": shared,
            "c": torch.arange(4.0).expand(4, 4),  # one row, four times
            "d": torch.arange(4.0).unfold(0, 3, 1),
        },
        [shared, shared],
        guesses=[{"b": shared}, {"b": shared}],
        stats=Stats(4, [1, 2]),
    )
    loaded = checkpoint.load(checkpoint.save(tmp_path, state))
    assert tree_equal(loaded.y, state.y)
    assert loaded.y["a"].stride() == state.y["a"].stride()  # sums follow the memory
    assert loaded.carry[0] is loaded.carry[1] is loaded.guesses[0]["b"]
    assert loaded.stats == Stats(4, [1, 2])


def test_files_of_format_3_are_read(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, rich())
    header = {**checkpoint._header(path), "format": 3}
    del header["orders"]
    assert tree_equal(checkpoint.load(crafted(path, header)).y, rich().y)


# --- crafted files: valid checksums, other values -------------------------------------

DEEP = "[" * 100_000
VALUES = st.one_of(
    st.sampled_from([None, -1, 10**30, [], {}, [[]], {"tuple": []}]),
    st.integers(-3, 9),
    st.sampled_from(["", "cuda", "meta", "float32", "qint8", "nn", "0x1p99999"]),
)


def crafted(path: Path, header: Any) -> Path:
    """A checkpoint with another header, of which the checksum is right."""
    with safe_open(path, framework="pt") as file:
        arrays = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
    text = header if isinstance(header, str) else json.dumps(header)
    checksum = str(zlib.crc32(text.encode()))
    save_file(arrays, path, metadata={"dreampropeller": text, "checksum": checksum})
    return path


def rich() -> SolverState[Any]:
    y = {"x": torch.arange(3.0), "z": torch.ones(2, dtype=torch.complex64)}
    return SolverState(1, y, (0.5, [None]), guesses=[y], stats=Stats(1, [1]))


NEGATIVE = [["step", -1], ["y", {"dict": []}], ["carry", None]]


@pytest.mark.parametrize(
    "change",
    [
        {"types": []},
        {"types": {"1": ["complex64", [7]]}},
        {"types": {"1": ["complex64", [10**30]]}},
        {"devices": [[], []]},
        {"orders": [[0], [1]]},
        {"orders": [[0], [5]]},
        {"orders": [[0]]},
        {"structure": {"float": "0x1p99999"}},
        {"structure": {"tuple": 5}},
        {"structure": {"record": ["SolverState", {"dict": NEGATIVE}]}},
    ],
    ids=str,
)
def test_a_crafted_header_is_refused(change: Any, tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, rich())
    with pytest.raises(CheckpointError):
        checkpoint.load(crafted(path, {**checkpoint._header(path), **change}))


def test_a_header_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = crafted(checkpoint.save(tmp_path, rich()), DEEP)
    with pytest.raises(CheckpointError, match="cannot be read"):
        checkpoint.load(path)
    assert checkpoint.run_of(tmp_path) == ""


def spots(value: Any, where: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The paths of all values in a nest of JSON."""
    found: list[tuple[Any, ...]] = []
    if isinstance(value, (dict, list)):
        for key in value if isinstance(value, dict) else range(len(value)):
            found += [(*where, key), *spots(value[key], (*where, key))]
    return found


@settings(
    max_examples=100,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(data=st.data())
def test_any_value_of_the_header_may_be_another(
    data: st.DataObject, tmp_path: Path
) -> None:
    """A solver state, or the documented error."""
    path = checkpoint.save(tmp_path, rich())
    header = checkpoint._header(path)
    *inner, last = data.draw(st.sampled_from(spots(header)))
    place = functools.reduce(lambda nest, key: nest[key], inner, header)
    place[last] = data.draw(VALUES)
    try:
        assert isinstance(checkpoint.load(crafted(path, header)), SolverState)
    except (CheckpointError, BeartypeCallHintViolation):  # the second in tests only
        path.unlink()


def test_tensors_of_a_gpu_are_read_without_one(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, small(1))
    header = {**checkpoint._header(path), "devices": ["xpu"]}
    crafted(path, header)
    assert checkpoint.load(path).y["x"].device.type == "cpu"
    with pytest.raises(CheckpointError, match=r"cannot be moved to `xpu`.*\"cpu\""):
        checkpoint.load(path, device="xpu")


def test_a_sound_checkpoint_that_fits_no_device_is_no_damaged_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Falling back to an older one would lose steps."""
    state = PicardSolver(SlidingWindow(2)).init({"x": torch.ones(2)}, None)
    checkpoint.save(tmp_path, state)
    header = checkpoint._parse

    def on_gpu(metadata: dict[str, str]) -> dict[str, Any]:
        found = header(metadata)
        return {**found, "devices": ["cuda"] * len(found["devices"])}

    monkeypatch.setattr(checkpoint, "_parse", on_gpu)
    monkeypatch.setattr(checkpoint.stored_tensors, "restore", lambda *_: None)
    with pytest.raises(checkpoint.CheckpointError, match="load them with"):
        checkpoint.load(tmp_path, device="nonsense")  # a warning is an error here
