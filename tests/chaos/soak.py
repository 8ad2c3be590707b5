"""One process that runs, fails and resumes over and over: does it grow?

Every run is real: `launch.py` in this very process, with a random fault that leaves the
process alive, and ends as the trials of `trials.py` do. What the process holds is read
after each one.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import multiprocessing.util
import os
import platform
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch

import launch
from tests.chaos import faults, trials
from tests.chaos.trials import Trial
from tests.processes import Child, code_of
from tests.systems.scenes import SMALL, TOYBOX

APART = "CHAOS_APART"
"""Environment variable: /dev/shm and mounts are those of this process only."""
LEAST = 12
"""Runs that quarters are compared of, however short the time."""
MEMORY = "resident memory, MiB"
MEMORY_LIMIT = 1.05
"""Largest ratio of the memory in the last quarter to that in the first one."""


# --- runs in this process ------------------------------------------------------------


class Here(Child):
    """What a trial sees of a run that has ended in this very process."""

    def __init__(
        self,
        function: Callable[..., int | None],
        *arguments: Any,
        output: Path,
        environ: Mapping[str, str] | None = None,
    ) -> None:
        self.output = output
        disk = {k: v for k, v in (environ or {}).items() if k != "TMPDIR"}
        with _said_to(output), mock.patch.dict(os.environ, disk):
            self._code = code_of(function, arguments)

    @property
    def pid(self) -> int:
        return os.getpid()

    @property
    def code(self) -> int | None:
        return self._code

    def send(self, number: int) -> None:
        """It has ended."""

    def wait(self, seconds: float) -> int:
        return self._code

    def end(self) -> None:
        """It has ended."""


@contextlib.contextmanager
def _said_to(output: Path) -> Iterator[None]:
    """Send standard output and error to a file, those of new processes included."""
    streams = (sys.stdout, sys.stderr)
    saved = [os.dup(number) for number in (1, 2)]
    try:
        with open(output, "ab") as file:
            for number, stream in enumerate(streams, 1):
                stream.flush()
                os.dup2(file.fileno(), number)
        yield
    finally:
        for number, (stream, before) in enumerate(zip(streams, saved, strict=True), 1):
            stream.flush()
            os.dup2(before, number)
            os.close(before)


@dataclass
class HereTrial(Trial):
    """A trial whose runs are in this process."""

    most_ranks: int = 1

    def start(
        self,
        words: Sequence[str] = (),
        faulty: dict[int, list[faults.Fault]] | None = None,
        count: int = 1,
        function: Callable[..., int] = faults.run,
    ) -> list[Child]:
        with mock.patch.object(trials, "Child", Here):
            return super().start(words, faulty, count, function)


# --- the kinds -----------------------------------------------------------------------


def undisturbed(trial: Trial) -> None:
    assert trial.end(trial.start()) == [0], trial.said()
    trial.compare()


def interrupted(trial: Trial) -> None:
    """Ctrl-C in any phase, also while results are written."""
    most = {"load": 1, "drift": 20, "drift done": 20, "checkpoint": 3, "replace": 3}
    place = trial.random.choice([*most, "update", "record", "export"])
    at = 1 if place == "export" else trial.random.randint(1, most.get(place, 8))
    codes = trial.end(trial.start(faulty={0: [trial.fault("interrupt", place, at)]}))
    if not trial.marker.exists():  # the run ended before
        assert codes == [0], trial.said()
        trial.compare()
        return
    assert codes == [130], (codes, place, at, trial.said())
    trial.resume()
    assert trial.outcome.lost == 0


def resumed_twice(trial: Trial) -> None:
    """The run that resumes is interrupted, too."""
    words: list[str] = []
    for most in (8, 6):
        fault = faults.Fault("interrupt", "drift", trial.random.randint(2, most))
        codes = trial.end(trial.start(words, faulty={0: [fault]}))
        assert codes == [130], trial.said()
        words = [f"resume={trial.run}"]
    trial.resume()


def worker_lost(trial: Trial, what: str) -> None:
    """One of two ranks that the run itself started dies, or stops."""
    victim, at = trial.random.randrange(2), trial.random.randint(3, 8)
    fault = trial.fault(what, "drift", at)
    codes = trial.end(
        trial.start(
            ["dispatch.num_workers=2"],
            faulty={victim: [fault]},
            function=trials.launched,
        )
    )
    assert codes == [2], (codes, trial.said())
    trial.hears(
        f"error: .*[Rr]ank {victim}|error: .*which the launcher or rank 0 holds"
    )
    trial.resume()


@functools.cache
def _object() -> Path:
    """A finished run of a small object, for exports."""
    folder = Path(tempfile.mkdtemp(prefix="object-", dir=tempfile.gettempdir()))
    words = [*SMALL, "trainer.max_steps=12", "dispatch.threads=1"]
    arguments = ["--config", TOYBOX, "--train", *words, f"exp_root_dir={folder}"]
    with _said_to(folder / "said"):
        assert launch.main(arguments) == 0
    (run,) = folder.glob("*/*@*")
    return run


def exported(trial: Trial, is_full: bool) -> None:
    """`--export` of an object, after one on a full disk."""
    if is_full and not trials.can_mount():
        trial.outcome.text = "not run: mounts are not allowed"
        return
    run = _object()
    if is_full:
        options = ["-t", "tmpfs", "-o", "size=16m", "tmpfs", str(trial.out)]
        subprocess.run(["mount", *options], check=True)
    copy = trial.out / "object"
    shutil.copytree(run, copy)
    before = (copy / "mesh.obj").read_bytes()
    for path in copy.glob("mesh.*"):
        path.unlink()
    trial.words = ["--export", f"resume={copy}"]
    if is_full:
        with mock.patch.dict(os.environ, {"CHAOS_DISK": str(trial.out)}):
            faults.ACTIONS["fill"]()
        assert trial.end(trial.start()) != [0], trial.said()
        trial.hears("No space|full")
        (trial.out / "filler").unlink()
    assert trial.end(trial.start()) == [0], trial.said()
    assert (copy / "mesh.obj").read_bytes() == before, "another mesh"


KINDS: dict[str, Callable[[Trial], None]] = {
    "a worker is killed": functools.partial(worker_lost, what="kill"),
    "a worker is stopped": functools.partial(worker_lost, what="stop"),
    "a worker is killed, restarted": trials.KINDS["a rank is killed, restarted"],
    "undisturbed": undisturbed,
    "Ctrl-C in any phase": interrupted,
    "Ctrl-C, and while resuming": resumed_twice,
    **{
        kind: trials.KINDS[kind]
        for kind in (
            "Ctrl-C twice",
            "SIGTERM",
            "a drift raises",
            "an update raises",
            "NaN",
            "infinity",
            "disk full under a checkpoint",
            "read-only under a checkpoint",
            "disk full under an export",
            "read-only under an export",
        )
    },
    "a checkpoint is cut": functools.partial(
        trials.damaged, how="cut", what="interrupt"
    ),
    "a checkpoint is flipped": functools.partial(
        trials.damaged, how="flipped", what="interrupt"
    ),
    "--export": functools.partial(exported, is_full=False),
    "--export, disk full": functools.partial(exported, is_full=True),
}
"""Those that leave the process alive; the first ones start interpreters."""
SLOW = list(KINDS)[:3]
"""Kinds that take most of the time: once where the others come thrice."""


# --- what the process holds ----------------------------------------------------------


def memory(root: Path) -> float:
    del root
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def descriptors(root: Path) -> int:
    del root
    return len(os.listdir("/proc/self/fd")) - 1  # without that of the listing


def threads(root: Path) -> int:
    del root
    return len(os.listdir("/proc/self/task"))


def children(root: Path) -> int:
    """Children, also ended ones, and what they left behind."""
    found = set(trials.left_in(root))
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):  # the thread has ended
            found.update((task / "children").read_text().split())
    return len(found)


def shared(root: Path) -> int:
    """Where others use /dev/shm, too, only what torch left there."""
    del root
    apart = os.environ.get(APART)
    return len(os.listdir("/dev/shm") if apart else trials.left_in_memory())


def temporary(root: Path) -> int:
    return sum(1 for _ in root.rglob("*"))


def tensors(root: Path) -> int:
    del root
    return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())


GAUGES: dict[str, Callable[[Path], float]] = {
    MEMORY: memory,
    "open file descriptors": descriptors,
    "threads": threads,
    "child processes": children,
    "entries of /dev/shm": shared,
    "temporary files": temporary,
    "live tensors": tensors,
}


# --- the soak ------------------------------------------------------------------------


@dataclass
class Soak:
    """What a soak found.

    Attributes:
        held: What the process held after each run, by gauge.
        kinds: Kind of each run.
        failed: Kind and first line of each run that did not end as it should.
        seconds: Time that it took.
    """

    held: dict[str, list[float]] = field(
        default_factory=lambda: {name: [] for name in GAUGES}
    )
    kinds: list[str] = field(default_factory=list)
    failed: list[tuple[str, str]] = field(default_factory=list)
    seconds: float = 0.0

    def quarters(self, gauge: str) -> tuple[float, float]:
        """Medians of the first and the last quarter, after a tenth to warm up."""
        values = self.held[gauge]
        values = values[len(values) // 10 :]
        size = max(1, len(values) // 4)
        return statistics.median(values[:size]), statistics.median(values[-size:])

    def grown(self) -> list[str]:
        """A sentence about each gauge that is not flat."""
        found = []
        for gauge in self.held:
            first, last = self.quarters(gauge)
            limit = MEMORY_LIMIT if gauge == MEMORY else 1.0
            if last > first * limit:
                found.append(
                    f"Grown: {gauge}, from {first:g} in the first quarter to {last:g} "
                    f"in the last one."
                )
        return found


def soak(
    minutes: float,
    seed: int = 0,
    kinds: Sequence[str] = tuple(KINDS),
    after: Callable[[], object] = lambda: None,
) -> Soak:
    """Run random kinds for some minutes.

    Args:
        minutes: At least so long, and at least `LEAST` runs.
        seed: Of the order and the faults.
        kinds: Names of `KINDS`.
        after: Called after each run.
    """
    found = Soak()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's `&` ignores it
    with _temporary_root() as root:
        for exact in (False, True):
            trials.undisturbed(exact)
        if any("--export" in kind for kind in kinds):
            _object()
        begin = said = time.monotonic()
        for number, kind in enumerate(_order(kinds, random.Random(seed))):
            found.seconds = time.monotonic() - begin
            if found.seconds >= 60 * minutes and number >= LEAST:
                break
            problem = attempt(kind, f"{seed}/{number}", root)
            if problem:
                found.failed.append((kind, problem))
                print(f"FAILED: {kind}, run {number}: {problem}", flush=True)
            after()
            gc.collect()
            found.kinds.append(kind)
            for name, gauge in GAUGES.items():
                found.held[name].append(gauge(root))
            if time.monotonic() - said > 15:
                said = time.monotonic()
                print(progress(found, said - begin, minutes), flush=True)
    return found


def _order(kinds: Sequence[str], order: random.Random) -> Iterator[str]:
    """Rounds in which each kind occurs, first as listed, then shuffled."""
    yield from kinds
    while True:
        batch = [k for k in kinds for _ in range(1 if k in SLOW else 3)]
        order.shuffle(batch)
        yield from batch


@contextlib.contextmanager
def _temporary_root() -> Iterator[Path]:
    """A folder that holds all temporary files of this process."""
    multiprocessing.util.get_temp_dir()  # lives longer
    with tempfile.TemporaryDirectory(prefix="soak-") as folder:
        scratch = Path(folder, "tmp")
        scratch.mkdir()
        with (
            mock.patch.dict(os.environ, {"TMPDIR": str(scratch)}),
            mock.patch.object(tempfile, "tempdir", str(scratch)),
        ):
            yield Path(folder)


def attempt(kind: str, seed: str, root: Path) -> str:
    """Run a kind; the first line of what failed, or nothing."""
    with tempfile.TemporaryDirectory(dir=root) as folder:
        try:
            trial = HereTrial(Path(folder), random.Random(f"{kind}/{seed}"))
            trials.conduct(trial, KINDS[kind])
        except Exception as error:
            traceback.print_exc()
            return f"{type(error).__name__}: {error}".splitlines()[0][:120]
    return ""


def progress(found: Soak, seconds: float, minutes: float) -> str:
    """Time, time to go, runs, and what is held now."""
    now = ", ".join(f"{values[-1]:.4g} {name}" for name, values in found.held.items())
    return (
        f"{seconds / 60:5.1f} of {minutes:g} min, ETA "
        f"{max(0.0, minutes - seconds / 60):.1f} min: {len(found.kinds)} runs; {now}"
    )


def table(found: Soak, seed: int) -> str:
    """Figures, runs by kind, machine."""
    rows = [
        f"{len(found.kinds)} runs in {found.seconds / 60:.1f} minutes, seed {seed}, "
        f"{len(found.failed)} of which did not end as they should; {machine()}.",
        "",
        "| held by the process | first quarter | last quarter | most | flat |",
        "|---|---|---|---|---|",
    ]
    for gauge, values in found.held.items():
        first, last = found.quarters(gauge)
        flat = "no" if any(gauge in line for line in found.grown()) else "yes"
        rows.append(
            f"| {gauge} | {first:.4g} | {last:.4g} | {max(values):.4g} | {flat} |"
        )
    rows += ["", "| kind of run | runs | passed |", "|---|---|---|"]
    bad = Counter(kind for kind, _ in found.failed)
    for kind, count in Counter(found.kinds).items():
        rows.append(f"| {kind} | {count} | {count - bad[kind]} |")
    return "\n".join(rows)


def machine() -> str:
    """Processor, cores, load, versions."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if "model name" in line]
    return (
        f"{os.cpu_count()} cores of {names[0] if names else platform.machine()}, one "
        f"thread, load {os.getloadavg()[2]:.1f}, Python {platform.python_version()}, "
        f"torch {torch.__version__}"
    )


def alone(words: Sequence[str]) -> None:
    """Start this command again where /dev/shm and mounts are its own, if allowed."""
    if os.environ.get(APART) or not trials.can_mount():
        return
    os.environ[APART] = "1"
    script = 'mount -t tmpfs tmpfs /dev/shm && exec "$@"'
    again = [sys.executable, "-m", "tests.chaos", *words]
    os.execvp("unshare", ["unshare", "--mount", "sh", "-c", script, "sh", *again])
