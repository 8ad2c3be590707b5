"""A stopped or dead rank is noticed at once, named on every rank, and left behind."""

from __future__ import annotations

import functools
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import (
    DistributedDispatcher,
    FixedThreshold,
    PicardSolver,
    SlidingWindow,
    State,
    WorkerError,
    solve,
)
from dreampropeller.dispatch.heartbeat import Heartbeat, Interrupted
from dreampropeller.trajectory import Drift
from tests.helpers import OrnsteinUhlenbeck
from tests.processes import Child, rank_environ


class Faulty(OrnsteinUhlenbeck):
    """Rank 1 is stopped or killed at step 3; a drift of rank 0 may take a minute."""

    def __init__(self, how: str) -> None:
        self.how = how
        self.rank = int(os.environ["RANK"])

    def make_drift(self, device: torch.device) -> Drift:
        healthy = super().make_drift(device)

        def drift(step: int, y: State) -> Any:
            if step == 3 and self.rank == 1:
                print("fault", flush=True)
                os.kill(os.getpid(), getattr(signal, self.how.partition("+")[0]))
                time.sleep(60)  # the signal arrives
            if step >= 2 and self.rank == 0 and "+drift" in self.how:
                for _ in range(600):
                    time.sleep(0.1)
            if step >= 2 and self.rank == 0 and "+call" in self.how:
                time.sleep(60)
            return healthy(step, y)

        return drift


def solve_faulty(how: str, silence: float) -> int:
    spread = functools.partial(
        DistributedDispatcher, heartbeat=silence, timeout=300, fingerprint_every=None
    )
    solver = PicardSolver(SlidingWindow(4), FixedThreshold(0))
    try:
        solve(Faulty(how), solver, spread, check=False)
    except WorkerError as error:
        print("heard", str(error).replace("\n", " "))
        return 2
    return 0


@pytest.mark.parametrize(
    ("how", "heard"),
    [
        ("SIGKILL", "rank 1 stopped giving signs of life"),
        ("SIGSTOP+drift", "rank 1 has given no sign of life for 1.5 s"),
        ("SIGSTOP+call", "ends in the middle of a drift, which cannot be interrupted"),
    ],
)
def test_a_lost_rank_is_named_by_every_other_and_all_end(
    how: str, heard: str, free_port: int, tmp_path: Path
) -> None:
    """In a collective, in a drift of a minute, and in one call of a minute.

    A rank that is stopped while another waits in a collective: `tests/chaos`.
    """
    ranks = [
        Child(
            solve_faulty,
            how,
            1.5,
            output=tmp_path / str(rank),
            environ=rank_environ(rank, 2, free_port),
        )
        for rank in range(2)
    ]
    try:
        ranks[1].wait_for("fault", 60)
        begin = time.monotonic()
        code = ranks[0].wait(30)
        seconds = time.monotonic() - begin
    finally:
        for rank in ranks:
            rank.end()
    said = ranks[0].said()
    assert heard in said, said
    assert code == (86 if "+call" in how else 2)
    assert seconds < 20, said  # 3 s where nothing else runs; a drift takes 60


class Store:
    """A store in memory, which may stop answering."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.open = True

    def add(self, key: str, amount: int) -> int:
        if not self.open:
            raise RuntimeError("Connection reset by peer")
        self.values[key] = self.values.get(key, 0) + amount
        return self.values[key]

    def set(self, key: str, value: str) -> None:
        self.values[key] = value

    def get(self, key: str) -> bytes:
        return self.values[key].encode()

    def check(self, keys: list[str]) -> bool:
        return all(key in self.values for key in keys)


def wait(heartbeat: Heartbeat, seconds: float) -> str:
    end = time.monotonic() + seconds
    while not heartbeat.lost and time.monotonic() < end:
        time.sleep(0.02)
    return heartbeat.lost


def test_a_rank_that_leaves_or_has_not_come_is_not_lost() -> None:
    store = Store()
    here = Heartbeat(store, 0, 3, 0.5)
    there = Heartbeat(store, 1, 3, 0.5)  # the third has not entered yet
    here.start()
    there.start()
    time.sleep(0.3)
    there.stop()
    try:
        assert wait(here, 1.2) == ""
    finally:
        here.stop()


def test_the_verdict_of_rank_0_is_heard_by_a_rank_that_watches_nobody_else() -> None:
    store = Store()
    beats = [Heartbeat(store, rank, 3, 0.5) for rank in range(2)]
    store.add("2", 1)  # rank 2 has beaten once
    for one in beats:
        one.start()
    try:
        for one in beats:
            assert wait(one, 5) == "rank 2 has given no sign of life for 0.5 s"
    finally:
        for one in beats:
            one.stop()


def evaluate(heartbeat: Heartbeat) -> None:
    with heartbeat.interruptible():
        for _ in range(500):
            time.sleep(0.01)


def test_a_store_that_ends_is_named() -> None:
    store = Store()
    heartbeat = Heartbeat(store, 1, 2, 0.5)
    heartbeat.start()
    try:
        store.open = False
        assert "Connection reset by peer" in wait(heartbeat, 5)
        with pytest.raises(Interrupted):
            evaluate(heartbeat)
    finally:
        heartbeat.stop()


def test_a_process_that_was_stopped_itself_blames_nobody(tmp_path: Path) -> None:
    """A laptop that slept: all were silent, as nobody listened."""
    child = Child(beat_for_two, output=tmp_path / "said")
    try:
        child.wait_for("beating", 60)
        time.sleep(0.3)
        child.send(signal.SIGSTOP)
        time.sleep(1.5)
        child.send(signal.SIGCONT)
        assert child.wait(30) == 0
        assert "lost: ''" in child.said()
    finally:
        child.end()


def beat_for_two() -> None:
    store = Store()
    beats = [Heartbeat(store, rank, 2, 0.6) for rank in range(2)]
    for one in beats:
        one.start()
    print("beating")
    for _ in range(26):
        time.sleep(0.1)
    print(f"lost: {beats[0].lost + beats[1].lost!r}")
    for one in beats:
        one.stop()


def test_a_heartbeat_of_no_length_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`heartbeat` is 0.*or None"):
        DistributedDispatcher(OrnsteinUhlenbeck(), heartbeat=0)
