"""Trials: a run, a fault, what is left of it, and the run that resumes."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import dreampropeller as dp
from dreampropeller import checkpoint
from tests.chaos import faults, problem
from tests.chaos.faults import Fault
from tests.helpers import tree_equal
from tests.processes import Child, rank_environ

LIMIT = 120.0
"""Seconds within which every process has ended."""
NOTICED = 60.0
"""Seconds within which all others have ended: machines of tests are overloaded. On an
idle one a heartbeat of 3 s needs 4."""


@dataclass
class Outcome:
    """What a trial found.

    Attributes:
        lost: Accepted steps that the last checkpoint does not hold.
        noticed: Seconds from the fault to the end of all other processes; None: the
            run is not meant to end.
        text: How it ended, in a few words.
        said: Output of the processes.
    """

    lost: int = 0
    noticed: float | None = None
    text: str = ""
    said: str = ""


@dataclass
class Trial:
    """The folder, port and processes of one trial."""

    folder: Path
    random: random.Random
    most_ranks: int = 2
    children: list[Child] = field(default_factory=list)
    port: int = 0
    outcome: Outcome = field(default_factory=Outcome)

    @property
    def out(self) -> Path:
        return self.folder / "out"

    @property
    def marker(self) -> Path:
        return self.folder / "happened"

    def fault(self, what: str, place: str, at: int) -> Fault:
        return Fault(what, place, at, str(self.marker))

    def start(
        self,
        words: Sequence[str] = (),
        faulty: dict[int, list[Fault]] | None = None,
        count: int = 1,
        function: Callable[
            ..., int
        ] = faults.run,  # others take the faults of all ranks
    ) -> list[Child]:
        """Start the ranks of a run; one rank is a run without ranks."""
        self.port = free_port()
        begun = []
        scratch = self.folder / "tmp"
        scratch.mkdir(exist_ok=True)
        common = {"TMPDIR": str(scratch), "CHAOS_DISK": str(self.out)}
        plan = faulty or {}
        for rank in range(count):
            environ = rank_environ(rank, count, self.port) if count > 1 else {}
            begun.append(
                Child(
                    function,
                    [*self.words, *words],
                    plan.get(rank, []) if function is faults.run else plan,
                    output=self.folder / f"said-{len(self.children)}",
                    environ={**common, **environ},
                )
            )
            self.children.append(begun[-1])
        return begun

    words: list[str] = field(default_factory=list)
    exact: bool = False

    def count(self) -> int:
        """A random number of ranks."""
        return self.random.choice([1, 2][: self.most_ranks])

    def use_threshold_0(self) -> None:
        self.exact = True
        self.words += EXACT

    def runs(self) -> list[Path]:
        return sorted(self.out.glob("*/*@*"))

    @property
    def run(self) -> Path:
        (found,) = self.runs()
        return found

    def end(self, ranks: Sequence[Child], gone: Sequence[int] = ()) -> list[int]:
        """Wait for all ranks but those that a launcher would have to kill."""
        codes = [
            child.wait(LIMIT) for rank, child in enumerate(ranks) if rank not in gone
        ]
        if self.marker.exists():
            happened = float(self.marker.read_text())
            self.outcome.noticed = time.monotonic() - happened
        for child in ranks:
            child.send(signal.SIGKILL)
            child.wait(10)
        return codes

    def reached(self) -> int:
        """Steps that were accepted, from the metrics."""
        lines = [
            json.loads(line)
            for path in self.out.glob("*/*@*/metrics.jsonl")
            for line in path.read_text().splitlines()
            if line.endswith("}")
        ]
        return max(
            (line["begin"] + line["stride"] for line in lines if "stride" in line),
            default=0,
        )

    def saved(self) -> int:
        """The step of the last checkpoint that can be read."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a damaged one falls back
                return checkpoint.load(self.run / "ckpts").step
        except (dp.CheckpointError, ValueError, OSError):
            return 0

    def resume(self, count: int = 1) -> None:
        """Resume without a fault (or start again, without a checkpoint), and compare.

        The end has to equal that of an undisturbed run bit for bit.
        """
        self.outcome.lost = max(0, self.reached() - self.saved())
        noticed = self.outcome.noticed
        words = [f"resume={self.run}"] if self.saved() else []
        ranks = self.start(words, count=count)
        codes = self.end(ranks)
        self.outcome.noticed = noticed  # without the time of this run
        assert codes == [0] * count, self.said()
        self.compare()

    def compare(self) -> None:
        """The newest run equals the undisturbed one."""
        state = checkpoint.load(self.runs()[-1] / "ckpts")
        wanted = undisturbed(self.exact)
        assert state.step == problem.STEPS
        assert tree_equal(state.y, wanted.y), "another result"
        assert tree_equal(state.carry, wanted.carry), "another carry"
        if not self.exact:  # there, the strides may differ
            assert state.stats == wanted.stats, (state.stats, wanted.stats)

    def said(self) -> str:
        return "\n---\n".join(child.said() for child in self.children)

    def hears(self, pattern: str) -> None:
        """A message, in one of the processes' output."""
        assert re.search(pattern, self.said(), re.S), (pattern, self.said())


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


EXACT = [
    "solver.threshold.name=fixed",
    "solver.threshold.value=0",
    "solver.acceleration.name=none",
]


@functools.cache
def undisturbed(exact: bool = False) -> Any:
    """The end of a run without faults, on one process."""
    with tempfile.TemporaryDirectory() as folder:
        trial = Trial(Path(folder), random.Random(0))
        trial.words = command(trial)
        trial.words += ["solver.name=sequential"] if exact else []
        assert trial.end(trial.start()) == [0], trial.said()
        state = checkpoint.load(trial.run / "ckpts")
    for child in trial.children:
        child.end()
    return state


def command(trial: Trial) -> list[str]:
    config = trial.folder / "chaos.yaml"
    config.write_text(problem.CONFIG)
    settings = {
        "exp_root_dir": trial.out,
        "dispatch.heartbeat": 3,
        "dispatch.timeout": 100,
        "dispatch.threads": 1,
    }
    words = [f"{key}={value}" for key, value in settings.items()]
    return ["--config", str(config), "--train", *words]


@contextlib.contextmanager
def leaves_nothing(trial: Trial) -> Iterator[None]:
    """No process, socket, shared memory or temporary file is left behind."""
    shared = left_in_memory()
    try:
        yield
        alive = [child.pid for child in trial.children if child.code is None]
        assert not alive, f"left running: {alive}"
        groups = left_in(trial.folder)
        assert not groups, f"processes left: {groups}"
        assert not left_in_memory() - shared, "shared memory left"
        left = [path.name for path in trial.folder.glob("tmp/*")]
        left += [p.name for p in trial.out.rglob("*.part")]
        left += [p.name for p in trial.out.rglob("part-*")]
        assert not left, f"files left: {left}"
        with socket.socket() as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(("127.0.0.1", trial.port))
    finally:
        for child in trial.children:
            child.end()
        for mount in reversed(mounts(trial.folder)):
            subprocess.run(["umount", "-l", mount], check=False)


def left_in(folder: Path) -> list[str]:
    """Processes that have the folder in their environment, so belong to the trial."""
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            state = (path.parent / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and f"TMPDIR={folder}/".encode() in path.read_bytes():
                found.append(path.parent.name)
    return found


def left_in_memory() -> set[str]:
    """Shared memory of torch whose process has ended.

    Semaphores are removed by Python's resource tracker, here that of all trials.
    """
    return {
        name
        for name in os.listdir("/dev/shm")
        if name.startswith("torch_") and not Path("/proc", name.split("_")[1]).exists()
    }


def mounts(folder: Path) -> list[str]:
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [line.split()[1] for line in lines if f" {folder}/" in line]


def run(kind: str, seed: int, folder: Path) -> Outcome:
    """One trial of a kind.

    Raises:
        AssertionError: Something was lost, hung, or was left behind.
    """
    trial = Trial(folder, random.Random(f"{kind}/{seed}"))
    return conduct(trial, KINDS[kind])


def conduct(trial: Trial, test: Callable[[Trial], None]) -> Outcome:
    """A trial in its own folder."""
    undisturbed()
    trial.words = command(trial)
    trial.out.mkdir()
    with leaves_nothing(trial):
        test(trial)
        trial.outcome.said = trial.said()
    if trial.outcome.noticed is not None:
        assert trial.outcome.noticed < NOTICED, trial.outcome
    return trial.outcome


# --- the kinds -----------------------------------------------------------------------

PHASES = [place for place in faults.PLACES if place != "export"]


def place_of(trial: Trial, rank: int) -> tuple[str, int]:
    """A random phase of an iteration, and which visit of it."""
    places = [p for p in PHASES if rank == 0 or p not in RECORDING]
    place = trial.random.choice(places)
    most = {"load": 1, "checkpoint": 3, "replace": 3, "drift": 20, "drift done": 20}
    return place, trial.random.randint(1, most.get(place, 8))


RECORDING = ("record", "checkpoint", "replace")


def killed(trial: Trial, what: str = "kill") -> None:
    """One of two ranks dies, or stops, in any phase."""
    victim = trial.random.randrange(2)
    place, at = place_of(trial, victim)
    if what == "stop" and place == "load":  # before the ranks have met
        place = "drift"
    ranks = trial.start(faulty={victim: [trial.fault(what, place, at)]}, count=2)
    other = ranks[1 - victim]
    if place == "load":  # rank 0 holds the store, so the other one waits for it
        ranks[victim].wait(LIMIT)
        other.send(signal.SIGKILL)
    codes = trial.end(ranks, gone=[victim])
    if not trial.marker.exists():  # the run ended before
        assert codes == [0], trial.said()
        trial.compare()
        trial.outcome.text = "ended before"
        return
    if place == "load":
        trial.outcome.noticed = None
    elif codes != [0]:  # it may fail at the very end
        assert codes == [2], (codes, place, at, trial.said())
        trial.hears(f"rank {victim}|which the launcher or rank 0 holds")
    trial.outcome.text = f"{place}, rank {victim}"
    if trial.runs():
        trial.resume(count=trial.random.choice([1, 2]))


def slow(trial: Trial) -> None:
    """A rank takes a quarter of a second longer in every drift from some step on."""
    victim = trial.random.randrange(2)
    at = trial.random.randint(12, 18)
    ranks = trial.start(faulty={victim: [Fault("sleep", "drift", at)]}, count=2)
    assert trial.end(ranks) == [0, 0], trial.said()
    trial.compare()


def raises(trial: Trial, place: str) -> None:
    count = trial.count()
    victim = trial.random.randrange(count)
    at = trial.random.randint(1, 15)
    ranks = trial.start(faulty={victim: [trial.fault("raise", place, at)]}, count=count)
    codes = trial.end(ranks)
    assert all(codes), trial.said()
    trial.hears("ZeroDivisionError: no such image")
    if trial.runs():
        trial.resume(count)
        assert trial.outcome.lost == 0


def not_finite(trial: Trial, what: str) -> None:
    """At a guess it cuts the window, so that only threshold 0 keeps the result."""
    trial.use_threshold_0()
    count = trial.count()
    at = trial.random.randint(1, 12)
    bad = {rank: [trial.fault(what, "drift done", at)] for rank in range(count)}
    codes = trial.end(trial.start(faulty=bad, count=count))
    assert codes == [2] * count, trial.said()
    trial.hears("holds NaN or infinity")
    if trial.runs():
        trial.resume(count)
        assert trial.outcome.lost == 0


def disagrees(trial: Trial) -> None:
    """A rank's accepted state is off by one bit in a million."""
    victim = trial.random.randrange(2)
    ranks = trial.start(faulty={victim: [trial.fault("differ", "update", 1)]}, count=2)
    codes = trial.end(ranks)
    assert codes == [2, 2], trial.said()
    trial.hears("The ranks have come apart: rank 1 has another state than rank 0")
    assert not trial.saved()
    trial.resume(2)


def disk(trial: Trial, what: str, place: str) -> None:
    """The disk is full, or the folder read-only, at a checkpoint or at the end."""
    if not can_mount():
        trial.outcome.text = "not run: mounts are not allowed"
        return
    options = ["-t", "tmpfs", "-o", "size=1m", "tmpfs", str(trial.out)]
    subprocess.run(["mount", *options], check=True)
    at = 1 if place == "export" else trial.random.randint(2, 4)
    codes = trial.end(trial.start(faulty={0: [trial.fault(what, place, at)]}))
    assert codes == [2], trial.said()
    trial.hears(r"error: .*(could not|cannot) be written.*(full|No space|Read-only)")
    (trial.out / "filler").unlink(missing_ok=True)
    if what == "write-protect":
        subprocess.run(["umount", "-l", str(trial.run)], check=True)
    trial.resume()
    assert trial.outcome.lost <= 10  # a checkpoint every 6 steps, windows of 4


def damaged(trial: Trial, how: str, what: str = "kill") -> None:
    """An ended run's newest checkpoint is damaged, too: the one before is used."""
    at = trial.random.randint(3, 4)
    trial.end(trial.start(faulty={0: [Fault(what, "replace", at)]}))
    files = sorted((trial.run / "ckpts").glob("step-*.safetensors"))
    assert len(files) >= 2
    content = bytearray(files[-1].read_bytes())
    where = trial.random.randrange(len(content))
    if how == "cut":
        content = content[:where]
    else:
        content[where] ^= 1 << trial.random.randrange(8)
    files[-1].write_bytes(content)
    trial.resume()
    trial.outcome.text = "falls back to the checkpoint before"


def interrupted(trial: Trial, what: str, code: int) -> None:
    at = trial.random.randint(2, 12)
    child = trial.start(faulty={0: [trial.fault(what, "drift", at)]})
    assert trial.end(child) == [code], trial.said()
    trial.resume()
    assert trial.outcome.lost == 0


def each_iteration(trial: Trial) -> None:
    """One process is killed; a checkpoint each iteration loses at most one."""
    trial.words.append("checkpoint.every_n_iterations=1")
    place, at = place_of(trial, 0)
    if place in ("load", "send", "gather"):
        place = "drift"
    child = trial.start(faulty={0: [trial.fault("kill", place, at)]})
    trial.end(child)
    trial.outcome.noticed = None
    trial.outcome.text = place
    if not trial.marker.exists():
        trial.compare()
    elif trial.runs():
        trial.resume()
        assert trial.outcome.lost <= 4  # one iteration of at most 4 steps


def lean(trial: Trial) -> None:
    """From a lean checkpoint, at threshold 0: the same result, other strides."""
    trial.use_threshold_0()
    at = trial.random.randint(30, 60)
    trial.end(trial.start(faulty={0: [Fault("kill", "drift", at)]}))
    folder = trial.run / "ckpts"
    state = checkpoint.load(folder)
    for path in folder.glob("step-*"):
        path.unlink()
    checkpoint.save(folder, state, lean=True)
    checkpoint.unlock(folder)
    trial.resume(trial.random.choice([1, 2]))


def two_runs(trial: Trial) -> None:
    """The second run in a folder is refused; the first one does not notice."""
    first = trial.start(faulty={0: [trial.fault("wait", "update", 30)]})
    while not trial.marker.exists():
        assert first[0].code is None, trial.said()
        time.sleep(0.02)
    trial.marker.unlink()
    second = trial.start([f"resume={trial.run}"])
    assert second[0].wait(LIMIT) == 2, trial.said()
    (trial.out / "release").touch()
    trial.hears("Another process writes to")
    assert trial.end(first) == [0], trial.said()
    trial.compare()


def port_taken(trial: Trial) -> None:
    """Another program listens on the ranks' port."""
    with socket.socket() as taken:
        taken.bind(("0.0.0.0", 0))
        taken.listen()
        environ = rank_environ(0, 2, taken.getsockname()[1])
        begin = time.monotonic()
        job: tuple[Any, ...] = (faults.run, trial.words, [])
        output = trial.folder / "said-0"
        trial.children.append(Child(*job, output=output, environ=environ))
        assert trial.children[0].wait(LIMIT) == 2, trial.said()
        trial.outcome.noticed = time.monotonic() - begin
    trial.hears("Port .* is taken by another program: choose another one")
    trial.port = free_port()


def restarted(trial: Trial) -> None:
    """A rank is killed, and the launcher starts both again by itself."""
    at = trial.random.randint(6, 10)
    (child,) = trial.start(
        ["dispatch.num_workers=2", "dispatch.max_restarts=1"],
        faulty={trial.random.randrange(2): [trial.fault("kill", "drift", at)]},
        function=launched,
    )
    assert child.wait(3 * LIMIT) == 0, trial.said()
    trial.hears("Restart 1, from step")
    trial.compare()


def torchrun_restarts(trial: Trial) -> None:
    """`torchrun --max-restarts=1 …` starts both ranks again after one was killed."""
    trial.words.append(f"--log-dir={trial.folder / 'logs'}")  # else left in /tmp
    victim, at = trial.random.randrange(2), trial.random.randint(6, 10)
    (child,) = trial.start(
        faulty={victim: [trial.fault("kill", "drift", at)]}, function=under_torchrun
    )
    assert child.wait(3 * LIMIT) == 0, trial.said()
    trial.hears("Restart 1, from step")
    trial.compare()


def launcher_killed(trial: Trial) -> None:
    """The launcher is killed: its ranks end, and the last state is saved."""
    (child,) = trial.start(
        ["dispatch.num_workers=2"],
        faulty={0: [Fault("sleep", "record", 3)]},
        function=launched,
    )
    while trial.reached() < 8:
        assert child.code is None, trial.said()
        time.sleep(0.05)
    child.send(signal.SIGKILL)
    begin = time.monotonic()
    while left_in(trial.folder):
        assert time.monotonic() - begin < LIMIT, trial.said()
        time.sleep(0.05)
    trial.outcome.noticed = time.monotonic() - begin
    trial.resume(2)
    assert trial.outcome.lost == 0


def launched(words: list[str], faulty: dict[int, list[Fault]]) -> int:
    """`launch.py` with `dispatch.num_workers`, whose ranks have faults."""
    from systems.runs import run as runs

    problem.register()
    healthy = runs.work
    plan = functools.partial(faulty_work, faulty)
    runs.work = plan if "resume" not in " ".join(words) else healthy
    try:
        return problem.run(words)
    finally:
        runs.work = healthy


def faulty_work(
    faulty: dict[int, list[Fault]], config: Any, folder: Path | None, leads: bool
) -> int:
    """The work of a rank, with faults in its first attempt."""
    from systems.runs import run as runs

    problem.register()
    if os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        for fault in faulty.get(int(os.environ["RANK"]), []):
            fault.install()
    return runs.work(config, folder, leads)


def under_torchrun(words: list[str], faulty: dict[int, list[Fault]]) -> int:
    """`torchrun launch.py`, with the faults of its ranks in the environment."""
    ((rank, (fault,)),) = faulty.items()
    environ = {"CHAOS_RANK": str(rank), "CHAOS_FAULT": json.dumps(asdict(fault))}
    *words, log = words
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
    torchrun += ["--max-restarts=1", "--rdzv-backend=c10d", log]
    torchrun += ["--rdzv-endpoint=127.0.0.1:0", "-m", "tests.chaos.under_torchrun"]
    command = [*torchrun, *words]
    return subprocess.run(command, env=os.environ | environ, check=False).returncode


@functools.cache
def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            ["mount", "-t", "tmpfs", "tmpfs", folder], capture_output=True, check=False
        )
        if done.returncode == 0:
            subprocess.run(["umount", folder], check=True)
        return done.returncode == 0


KINDS: dict[str, Callable[[Trial], None]] = {
    "a rank is killed": killed,
    "a rank is stopped": functools.partial(killed, what="stop"),
    "a rank is slow": slow,
    "a drift raises": functools.partial(raises, place="drift"),
    "an update raises": functools.partial(raises, place="update"),
    "NaN": functools.partial(not_finite, what="nan"),
    "infinity": functools.partial(not_finite, what="infinity"),
    "a rank disagrees": disagrees,
    "disk full under a checkpoint": functools.partial(
        disk, what="fill", place="checkpoint"
    ),
    "read-only under a checkpoint": functools.partial(
        disk, what="write-protect", place="checkpoint"
    ),
    "disk full under an export": functools.partial(disk, what="fill", place="export"),
    "read-only under an export": functools.partial(
        disk, what="write-protect", place="export"
    ),
    "a checkpoint is cut": functools.partial(damaged, how="cut"),
    "a checkpoint is flipped": functools.partial(damaged, how="flipped"),
    "Ctrl-C": functools.partial(interrupted, what="interrupt", code=130),
    "Ctrl-C twice": functools.partial(interrupted, what="interrupt twice", code=130),
    "SIGTERM": functools.partial(interrupted, what="terminate", code=143),
    "killed, saving each iteration": each_iteration,
    "killed, a lean checkpoint": lean,
    "two runs in one folder": two_runs,
    "a port is taken": port_taken,
    "a rank is killed, restarted": restarted,
    "a rank is killed, restarted by torchrun": torchrun_restarts,
    "the launcher is killed": launcher_killed,
}
"""Every kind of fault."""
LAUNCHED = (
    "a rank is killed, restarted",
    "a rank is killed, restarted by torchrun",
    "the launcher is killed",
)
"""Kinds that start new interpreters, which takes most of their time."""
