"""The cost model by hand, and against sleeping drifts of known length."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest

import dreampropeller as dp
from benchmarks import scaling
from dreampropeller import measurement
from dreampropeller.cost_model import (
    MEETINGS,
    Costs,
    best,
    plans,
    predicted,
    sequential,
)
from tests import sleeping
from tests.helpers import OrnsteinUhlenbeck
from tests.processes import group_of
from tests.rank_pool import RankPool

SHARE = 0.35
"""Largest deviation of a prediction from what was measured, on a machine that does
other things; on an idle one it is a few percent."""
COSTS = Costs(
    drift={8: 1.0, 4: 0.6, 2: 0.4},
    rollout=0.01,
    strides={1: 1.0, 4: 4.0, 8: 5.0},
    segments=[100, 50],
    num_bytes=10**6,
    latency=1e-3,
    bandwidth=1e8,
)


def test_seconds_by_hand() -> None:
    plan = predicted(COSTS, 4, 2, 8)
    assert plan.iterations == 20 + 10
    slots, meetings = 2, MEETINGS + 1
    received = (1 * slots + 8 - slots) * 1e6 / 1e8
    wanted = slots * 0.6 + 8 * 0.01 + meetings * 1e-3 + received
    assert plan.seconds == pytest.approx(30 * wanted)
    assert plan.devices == 8
    # A stride that does not divide a segment costs an iteration more.
    assert predicted(COSTS, 1, 1, 4).iterations == 25 + math.ceil(50 / 4)


def test_the_sequential_run_has_no_communication_but_that_of_its_views() -> None:
    assert sequential(COSTS).seconds == pytest.approx(150 * 1.01)
    both = 0.6 + 0.01 + (MEETINGS + 1) * 1e-3 + 1e6 / 1e8
    assert sequential(COSTS, 2).seconds == pytest.approx(150 * both)


@pytest.mark.parametrize(
    ("shards", "seconds"),
    [(1, 1.0), (2, 0.6), (3, 0.5), (4, 0.4), (8, 0.4)],  # three views lie between
)
def test_shards_between_measured_ones_are_interpolated(
    shards: int, seconds: float
) -> None:
    assert COSTS.seconds_of_drift(shards) == pytest.approx(seconds)


def test_more_devices_are_never_predicted_to_be_slower() -> None:
    found = [best(COSTS, count) for count in (1, 2, 4, 8, 16, 32, 64)]
    seconds = [one.seconds for one in found]
    assert seconds == sorted(seconds, reverse=True)
    assert found[0] == sequential(COSTS)  # on one device no window pays
    for count in (1, 6, 64):
        assert all(one.devices <= count for one in plans(COSTS, count))


def test_beyond_the_stride_devices_go_to_views() -> None:
    """32 as 8 steps × 4 views, where no window accepts more than eight steps."""
    free = replace(COSTS, num_bytes=0, latency=0.0, rollout=0.0)
    ideal = replace(
        free,
        drift={8: 0.85, 4: 0.45, 2: 0.25, 1: 0.15},
        strides={1: 1.0, 2: 2.0, 4: 4.0, 8: 8.0, 16: 8.0, 32: 8.0},
    )
    chosen = best(ideal, 32)
    assert (chosen.steps, chosen.views, chosen.window) == (8, 4, 8)
    costly = replace(
        ideal, drift={8: 0.85, 1: 0.85}
    )  # a shard costs what the step does
    assert best(costly, 32).views == 1


def test_the_page_of_predictions_is_what_the_model_says() -> None:
    page = Path(scaling.__file__).with_suffix(".md").read_text()
    assert page == "\n".join(scaling.lines()) + "\n"
    for job in scaling.JOBS:  # the model against the published runs
        published = scaling.PUBLISHED[job.name]
        assert scaling.check(job).seconds == pytest.approx(published, rel=0.2)


def test_missing_measurements_are_refused() -> None:
    with pytest.raises(ValueError, match="`strides` is empty: measure at least one"):
        replace(COSTS, strides={})


def test_strides_of_smaller_windows_are_those_of_the_largest_cut_there() -> None:
    def one(window: int, stride: int) -> dp.Iteration:
        seconds = {"drift": 1.0, "update": 0.1 * window, "communication": 0.5}
        return dp.Iteration(0, window, stride, (), None, (), seconds)

    seen = measurement.observed([one(8, 1), one(8, 8), one(8, 3), one(2, 2)])
    assert seen.strides == {1: 1.0, 2: 2.0, 4: 3.5, 8: 5.5}  # the first is left out
    assert seen.rollout == pytest.approx(0.1)
    assert seen.communication == 0.5


def test_segments_end_at_jumps() -> None:
    class Jumping(OrnsteinUhlenbeck):
        num_steps = 23

        def next_jump(self, step: int) -> int:
            return step - step % 5 + 5

    assert measurement.segments(Jumping()) == [5, 5, 5, 5, 3]


def test_predictions_hold_on_two_workers(two_ranks: RankPool) -> None:
    """Steps × views 2 × 1 and 1 × 2, and both steps on each."""
    meshes = [(2, 1, 2), (1, 2, 2)]
    for wanted, seconds in two_ranks(sleeping.predict_and_run, meshes, 3)[0]:
        assert seconds == pytest.approx(wanted, rel=SHARE)


@pytest.mark.parametrize("views", [1, 2])
def test_bytes_are_those_of_the_model(views: int, two_ranks: RankPool) -> None:
    for counted, wanted in two_ranks(sleeping.bytes_received, views, 4, 1):
        assert counted == wanted


def test_predictions_hold_on_one_worker() -> None:
    problem = sleeping.Sleeping()
    seen = measurement.observe(problem, sleeping.solver(2), 3)
    assert seen.strides == {1: 1.0, 2: 2.0}
    y, _ = problem.init()
    whole = measurement.seconds_of(problem.make_drift(sleeping.CPU), 0, y)[1]
    known = {n: sleeping.FIXED + sleeping.EACH * n for n in (4, 2, 1)}
    found = measurement.drift_by_views(problem, y, sleeping.VIEWS, whole)
    assert found == pytest.approx(known, rel=SHARE)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4, 8])
def test_predictions_hold_on_several_workers(
    count: int, free_port: int, tmp_path: Path
) -> None:
    meshes = {
        2: [(2, 1, 4), (1, 2, 4)],
        4: [(4, 1, 8), (2, 2, 4), (1, 4, 2)],
        8: [(8, 1, 8), (4, 2, 8), (2, 4, 4)],
    }[count]
    job = (sleeping.in_a_group, meshes, 5, 5.0, str(tmp_path))
    with group_of(count, free_port, tmp_path, *job) as ranks:
        for rank in ranks:
            assert rank.wait(300) == 0, rank.said()
    for wanted, seconds in json.loads((tmp_path / "found.json").read_text()):
        assert seconds == pytest.approx(wanted, rel=SHARE)
