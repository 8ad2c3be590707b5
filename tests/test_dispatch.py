"""Two and three gloo processes: the same bits, errors heard, nobody left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dreampropeller import (
    DistributedDispatcher,
    FixedThreshold,
    InlineDispatcher,
    OptimizationTrajectory,
    PicardSolver,
    SlidingWindow,
    State,
    WorkerError,
    launch_workers,
    solve,
)
from dreampropeller.dispatch import wire
from tests import ranks
from tests.helpers import TOYS, OrnsteinUhlenbeck, tree_equal
from tests.rank_pool import RankPool


def test_every_rank_of_every_solve_equals_the_loop_by_hand() -> None:
    """Three ranks; most other tests have two."""
    answers = launch_workers(ranks.solve_all, num_workers=3)
    for answer in answers:
        assert tree_equal(answer["sequential"], TOYS["sde"].loop()[-1])
        # Only rank 0 asked to stop, and all did.
        assert 9 <= answer["stopped"] == answers[0]["stopped"] < 12
    for name, toy in TOYS.items():
        loop = toy.loop()
        logged: list[Any] = []
        inline = solve(
            toy.make(),
            PicardSolver(SlidingWindow(7), FixedThreshold(1e-5), "momentum"),
            on_iteration=lambda _, it, log=logged: log.append(it.aux),
        )
        carry = solve(
            toy.make(), PicardSolver(SlidingWindow(1), FixedThreshold(0))
        ).carry
        for answer in answers:
            for window in ranks.WINDOWS:
                value = (loop[-1], carry)
                assert tree_equal(answer[f"{name}/{window}"], value), (name, window)
            value = (inline.value, inline.stats.strides, logged)
            assert tree_equal(answer[f"{name}/loose"], value), name
        for kind, solver in {"adaptive": ranks.ADAPTIVE, **ranks.ACCELERATED}.items():
            alone = solve(toy.make(), solver)
            for answer in answers:  # value, stats, carry
                found = answer[f"{name}/{kind}"]
                assert tree_equal(found[0], alone.value), name
                assert found[1] == alone.stats, name
                assert tree_equal(found[2], alone.carry), name


def test_failure_is_heard_on_every_rank() -> None:
    """Step 11 lies in the second window of 8: a guess on rank 1."""
    expected = {
        "drift": r"On rank 1, step 11:.*ZeroDivisionError: no such image",
        "update": r"On rank 1:.*KeyError: 'gone'",
        "different-start": r"rank 1 has another state",
        "different-window": r"rank 1 has another window",
    }
    kinds = ["guess", *expected]
    first, second = launch_workers(ranks.hear_failures, kinds, num_workers=2)
    exact = str(TOYS["sde"].loop()[-1]["x"].tolist())
    assert first.pop(0) == second.pop(0) == exact, "at a guess alone"
    for on_0, on_1, message in zip(first, second, expected.values(), strict=True):
        assert re.search(f"(?s)WorkerError.*{message}", on_0), on_0
        # The rank that failed in its own update raises what it was.
        assert re.search(f"(?s)WorkerError.*{message}|KeyError: 'gone'", on_1), on_1


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("exit", r"(?s)lost contact|exit code 7"),
        pytest.param(
            *("hang", r"(?s)did not answer within `timeout` = 2 s"),
            marks=pytest.mark.long,  # a stopped rank: tests/test_heartbeat.py
        ),
    ],
)
def test_lost_rank_is_noticed_and_nobody_is_left_behind(how: str, message: str) -> None:
    start, before = time.monotonic(), _children()
    with pytest.raises(WorkerError, match=message):
        launch_workers(ranks.solve_failing, how, num_workers=2)
    assert time.monotonic() - start < 50
    assert _children() == before


def test_one_worker_is_enough() -> None:
    """The published code waits for ever with one device."""
    assert launch_workers(ranks.stop_on_rank_zero, num_workers=1)[0] >= 9


def test_each_solve_may_have_a_group_of_its_own() -> None:
    """They share the launcher's store, which remembers where the first one listened."""
    for values in launch_workers(ranks.solve_twice, num_workers=2):
        assert tree_equal(values, [TOYS["sde"].loop()[-1]] * 2)


def test_torchrun_starts_the_same_program(tmp_path: Path) -> None:
    script = tmp_path / "main.py"
    script.write_text(
        "import os, sys\n"
        "from tests.ranks import quick, OrnsteinUhlenbeck\n"
        "from dreampropeller import *\n"
        "solver = PicardSolver(SlidingWindow(7), FixedThreshold(0))\n"
        "x = solve(OrnsteinUhlenbeck(), solver, quick).value['x'].tolist()\n"
        "open(f'{sys.argv[1]}/{os.environ[\"RANK\"]}', 'w').write(str(x))\n"
    )
    run = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    run += [
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        str(script),
        str(tmp_path),
    ]
    path = str(Path(__file__).parent.parent)
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    subprocess.run(run, env=env, check=True, capture_output=True, timeout=60)
    expected = str(TOYS["sde"].loop()[-1]["x"].tolist())
    assert [(tmp_path / rank).read_text() for rank in "01"] == [expected, expected]


def test_ranks_end_when_their_launcher_is_killed(tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "from tests.ranks import wait_for_the_end\n"
        "from dreampropeller import launch_workers\n"
        "if __name__ == '__main__':\n"
        "    launch_workers(wait_for_the_end, sys.argv[1], num_workers=2)\n"
    )
    script = tmp_path / "main.py"
    script.write_text(code)
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    parent = subprocess.Popen([sys.executable, str(script), str(tmp_path)], env=env)
    files = [tmp_path / "0", tmp_path / "1"]
    _wait(lambda: all(f.exists() and f.read_text() for f in files), 40)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    pids = [int(file.read_text()) for file in files]
    _wait(lambda: not any(_alive(pid) for pid in pids), 10)


def _alive(pid: int) -> bool:
    status = Path(f"/proc/{pid}/status")
    return status.exists() and "State:\tZ" not in status.read_text()


def _wait(condition: Any, seconds: float) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.1)


def _children() -> set[str]:
    me = str(os.getpid())
    found = set()
    for status in Path("/proc").glob("[0-9]*/status"):
        try:
            text = status.read_text()
        except OSError:
            continue
        if f"\nPPid:\t{me}\n" in text and "spawn" in (
            status.parent / "cmdline"
        ).read_text().replace("\0", " "):
            found.add(status.parent.name)
    return found


SCRIPT = """
import torch
import dreampropeller as dp


def main():
    SEED
    model = torch.nn.Linear(2, 1)
    trajectory = dp.OptimizationTrajectory.from_module(
        model,
        lambda step, model: model(torch.rand(8, 2)).square().mean(),
        optimizer=lambda params: torch.optim.SGD(params.values(), lr=0.1),
        num_steps=4,
    )
    solver = dp.PicardSolver(dp.SlidingWindow(2), dp.FixedThreshold(0))
    dp.solve(trajectory, solver, dp.DistributedDispatcher)
    print("solved")


GUARD
dp.launch_workers(main, num_workers=2)
"""


@pytest.mark.parametrize(
    ("seed", "guard", "message"),
    [
        pytest.param(
            *("pass", "if __name__ == '__main__':\n    ", "torch.manual_seed(0)"),
            marks=pytest.mark.long,
        ),
        ("torch.manual_seed(0)", "", 'under `if __name__ == "__main__":`'),
    ],
    ids=["no seed", "no guard"],
)
def test_a_script_of_several_processes_says_what_is_amiss(
    seed: str, guard: str, message: str, tmp_path: Path
) -> None:
    """One with both is in the README, and runs in tests/test_readme.py."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("SEED", seed).replace("GUARD\n", guard))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1
    assert message in done.stderr.strip().splitlines()[-1], done.stderr
    assert len(done.stderr.splitlines()) < 25, done.stderr


def test_no_process_group_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="torchrun"):
        solve(
            OrnsteinUhlenbeck(),
            PicardSolver(SlidingWindow(2), FixedThreshold(0)),
            DistributedDispatcher,
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [({"timeout": 0.0}, "`timeout`"), ({"threads": 0}, "`threads`")],
)
def test_bad_settings_are_refused(options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistributedDispatcher(OrnsteinUhlenbeck(), **options)


def test_error_in_an_inline_drift_surfaces_unwrapped() -> None:
    solver = PicardSolver(SlidingWindow(8), FixedThreshold(0))
    with pytest.raises(ZeroDivisionError, match="no such image"):
        solve(ranks.Failing("drift"), solver, InlineDispatcher)


def test_wire_carries_every_type_bit_for_bit() -> None:
    drift = {
        "half": torch.tensor([1.5, -0.0], dtype=torch.bfloat16),
        "flags": torch.tensor([True, False, True]),
        "count": torch.tensor(-7),
        "empty": torch.zeros(0, 3),
        "strided": torch.arange(6.0).view(2, 3).T,
        "image": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "nan": torch.tensor(float("nan"), dtype=torch.float64),
    }
    slots = [wire.entries(drift, {"loss": 0.1}), {}, wire.entries({}, {})]
    rows = [list(slot) for slot in slots]
    buffer = torch.empty(wire.size(rows), dtype=torch.uint8)
    wire.pack(rows, slots, buffer)
    received = wire.unpack(rows, buffer)
    assert tree_equal(received[0][0], {k: v.contiguous() for k, v in drift.items()})
    for name, value in drift.items():  # sums are rounded in the order of the memory
        assert received[0][0][name].stride() == value.stride()
    assert received[0][1] == {"loss": 0.1}
    assert received[1:] == [({}, {}), ({}, {})]


def test_a_shared_state_has_the_strides_of_rank_0(two_ranks: RankPool) -> None:
    image = torch.arange(120.0).view(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for found in two_ranks(ranks.share_an_image):
        assert torch.equal(found["x"], image)
        assert found["x"].stride() == image.stride()
        assert torch.equal(found["rows"], torch.arange(4.0).expand(4, 4))


def test_a_drift_has_the_strides_that_backward_gives_a_gradient() -> None:
    """Else a norm of it would be rounded otherwise than in the loop itself."""
    factor = torch.rand(5, 3)

    def loss(step: int, y: State) -> torch.Tensor:
        return (y["w"].T * factor).sum()

    w = torch.rand(3, 5)
    trajectory = OptimizationTrajectory(
        loss, {"w": w}, lambda params: torch.optim.SGD(params.values(), 0.1), 1
    )
    drift, _ = trajectory.make_drift(torch.device("cpu"))(0, {"w": w})
    parameter = w.clone().requires_grad_()
    loss(0, {"w": parameter}).backward()
    assert parameter.grad is not None
    assert drift["w"].stride() == parameter.grad.stride() == w.stride()
    assert torch.equal(drift["w"], parameter.grad)


def test_fingerprint_sees_a_single_bit() -> None:
    y = {"x": torch.ones(7), "flags": torch.tensor([True, False])}
    other = {**y, "x": y["x"].clone()}
    assert wire.fingerprint(other) == wire.fingerprint(y)
    other["x"][6] = 1 + 2**-23
    assert wire.fingerprint(other) != wire.fingerprint(y)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_a_killed_rank_has_no_semaphore_to_leave_behind() -> None:
    """A long-lived process that starts ranks again and again would collect them."""
    (added,) = launch_workers(ranks.semaphores_of_a_progress_bar, num_workers=1)
    assert added == set()
