"""What this machine offers to a run: `launch.py --doctor`.

Each check prints one line. The exit code is 0 if runs can start: optional packages and
models that are missing are named, and are no failure; packages that every run imports
are one.
"""

from __future__ import annotations

import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

import dreampropeller as dp
from dreampropeller.dispatch import process_group
from systems import extras
from systems.settings.reader import ConfigError

REQUIRED = {
    "diffusers": "guidance and sampling",
    "transformers": "prompt embeddings and CLIP",
    "tokenizers": "prompts",
    "safetensors": "checkpoints",
    "tensorboard": "logs",
    "PIL": "images",
}
"""Packages that every run imports, by module, and their purpose."""
PACKAGES = {
    "accelerate": ("loading of large models", False),
    "peft": ("the LoRA of variational score distillation", False),
    "nerfacc": ("occupancy grids", False),
    "gsplat": ("Gaussians on a GPU", True),
    "nvdiffrast": ("meshes on a GPU", True),
    "trimesh": ("mesh files", False),
    "xatlas": ("texture coordinates", False),
    "embreex": ("visibility of textures", False),
    "pygltflib": ("glTF files", False),
    "scipy": ("cleaning of meshes and images", False),
    "fast_simplification": ("fewer faces", False),
    "skimage": ("isosurfaces", False),
    "imageio_ffmpeg": ("turntables", False),
    "matplotlib": ("diagrams of reports", False),
    "viser": ("the live viewer", False),
    "gradio": ("the page of `--app`", False),
    "rembg": ("objects cut from photographs", False),
    "lightning": ("the adapter of Lightning", False),
    "sklearn": ("mixtures", False),
    "ray": ("workers that come and go", False),
}
"""Optional packages by module: purpose, and whether they need a GPU."""
LARGE = 12_600_000
"""Entries of the tensor that the self-test exchanges: the parameters of a hash grid."""
LEAST_FREE = 2**30
"""Bytes on the disk below which a run may not fit."""


@dataclass(frozen=True)
class Line:
    """What a check found.

    Attributes:
        name: What was checked.
        text: The finding, in one line.
        ok: Whether a run can start.
    """

    name: str
    text: str
    ok: bool = True

    def __str__(self) -> str:
        return f"{'ok  ' if self.ok else 'FAIL'}  {self.name:<22}{self.text}"


def run(overrides: Sequence[str] = (), config: Path | None = None) -> int:
    """Print every check; returns 0 if runs can start, 1 otherwise.

    Args:
        overrides: ``exp_root_dir=…``, the folder whose disk is checked.
        config: Refused, as it would not be read.

    Raises:
        ConfigError: There is a config, or another override.
    """
    if config is not None:
        raise ConfigError(
            "`--doctor` checks the machine and reads no `--config`: leave it out, or "
            f"check the config itself with `--plan --config {config}`."
        )
    root = "outputs"
    for word in overrides:
        key, _, value = word.partition("=")
        if key != "exp_root_dir" or not value:
            raise ConfigError(
                f"`--doctor` reads no `{word}`: write `exp_root_dir=FOLDER` to check "
                "another disk, or leave it out."
            )
        root = value
    failed = False
    for line in _checks(Path(root)):
        print(line, flush=True)
        failed |= not line.ok
    return int(failed)


def _checks(root: Path) -> Iterator[Line]:
    yield from versions()
    yield from devices()
    yield from packages()
    yield disk(root)
    yield from models()
    yield dispatch()


def versions() -> Iterator[Line]:
    """Our version, and those of Python, torch and the system."""
    ours = extras.version("dreampropeller")
    clone = f'{ours}, used as a clone: write `pip install -e ".[systems]"`'
    yield Line("dreampropeller", clone if ours == "not installed" else ours)
    yield Line("python", f"{platform.python_version()}, {platform.platform()}")
    tested = (2, 1) <= tuple(map(int, torch.__version__.split(".")[:2])) < (2, 14)
    text = torch.__version__ + ("" if tested else ", not tested: 2.1 to 2.13 are")
    yield Line("torch", text, tested)


def devices() -> Iterator[Line]:
    """The processor and the GPUs."""
    threads = torch.get_num_threads()
    yield Line("cpu", f"{os.cpu_count()} cores, {threads} threads per process")
    if not torch.cuda.is_available():
        built = torch.version.cuda
        why = f"none found by CUDA {built}" if built else "none: torch is built without"
        yield Line("gpu", f"{why}; runs use the CPU")
        return
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        memory = f"{found.total_memory / 2**30:.0f} GiB"
        try:  # a GPU that another program has filled fails here
            total = float(torch.ones(4, device=f"cuda:{index}").sum())
            yield Line(f"gpu {index}", f"{found.name}, {memory}", total == 4)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            yield Line(f"gpu {index}", f"{found.name}, {memory}: {reason}", False)


def packages() -> Iterator[Line]:
    """The version of each package, or the reason why it is not used."""
    for name, purpose in REQUIRED.items():
        found, reason = extras.probe(name)
        text = getattr(found, "__version__", "found")
        if found is None:
            text = f'{reason} Every run needs it: `pip install -e ".[systems]"`'
        yield Line(name, f"{text} ({purpose})", found is not None)
    for name, (purpose, needs_cuda) in PACKAGES.items():
        found, reason = extras.probe(name, needs_cuda=needs_cuda)
        version = getattr(found, "__version__", "")
        yield Line(name, f"{version or reason or 'found'} ({purpose})")


def disk(root: Path) -> Line:
    """Free space and speed of the disk that results go to."""
    content = os.urandom(2**20) * 32
    place = root
    try:
        above = (root, *root.absolute().parents)
        place = next(p for p in above if os.path.lexists(p))
        if not place.is_dir():
            text = f"`{place}` is no folder; write elsewhere: `exp_root_dir=…`"
            return Line("disk", text, False)
        free = shutil.disk_usage(place).free
        with tempfile.NamedTemporaryFile(dir=place, prefix=".doctor-") as file:
            begin = time.perf_counter()
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
            seconds = time.perf_counter() - begin
    except OSError as error:
        return Line("disk", f"`{place}` cannot be written: {error.strerror}", False)
    speed = len(content) / 2**20 / seconds
    text = f"{free / 2**30:.1f} GiB free in `{place}`, {speed:.0f} MiB/s"
    if free < LEAST_FREE:
        text += "; free some space, or write elsewhere: `exp_root_dir=…`"
    return Line("disk", text, free >= LEAST_FREE)


def models() -> Iterator[Line]:
    """The embedded prior, and the folder of downloaded models."""
    from systems.toybox import WEIGHTS

    there = WEIGHTS.is_dir()
    text = str(WEIGHTS) if there else f"missing: no `{WEIGHTS}`"
    yield Line("toybox", f"{text} (the embedded prior)", there)
    try:
        hub = _hub()
    except RuntimeError:  # no HOME, and a user that the system does not know
        yield Line("models", "no folder: write `HF_HOME=…`, as there is no home folder")
        return
    names = sorted(
        path.name.removeprefix("models--").replace("--", "/")
        for path in hub.glob("models--*")
    )
    found = ", ".join(names) or "none yet; a config's model is downloaded at first use"
    yield Line("models", f"{found} (in `{hub}`)")


def _hub() -> Path:
    """The folder of downloaded models; an empty variable counts as none."""
    for name, below in (
        ("HF_HUB_CACHE", ""),
        ("HF_HOME", "hub"),
        ("XDG_CACHE_HOME", "huggingface/hub"),
    ):
        if os.environ.get(name):
            return Path(os.environ[name]).expanduser() / below
    return Path.home() / ".cache" / "huggingface" / "hub"


def dispatch() -> Line:
    """Two processes solve a small problem and exchange a large tensor."""
    begin = time.perf_counter()
    try:
        answers = dp.launch_workers(self_test, num_workers=2)
    except (dp.WorkerError, OSError, RuntimeError) as error:
        return Line("dispatch", str(error).strip().splitlines()[-1], False)
    total = time.perf_counter() - begin
    same = answers[0][:2] == answers[1][:2]
    seconds = max(answer[2] for answer in answers)
    text = (
        f"2 processes started and ended in {total:.1f} s; an exchange of a word takes "
        f"{1e3 * answers[0][3]:.2f} ms, one of {4 * LARGE / 1e6:.0f} MB {seconds:.2f} s"
    )
    if not same:
        text = "two processes found different results for the same problem"
    return Line("dispatch", text, same)


def self_test() -> tuple[float, int, float, float]:
    """On each rank: the result, the iterations, and the seconds of two exchanges."""
    trajectory = dp.OptimizationTrajectory(
        lambda step, y: ((y["x"] - step / 9) ** 2).sum(),
        {"x": torch.zeros(64)},
        lambda params: torch.optim.Adam(params.values(), lr=0.1),
        12,
    )
    process_group.join(timedelta(seconds=60))
    solver = dp.PicardSolver(dp.SlidingWindow(4))
    solution = dp.solve(trajectory, solver, dp.DistributedDispatcher)
    word, large = torch.zeros(8), torch.zeros(LARGE)
    seconds = _timed(large, 3), _timed(word, 100)
    process_group.close_group()
    total = float(solution.value["x"].double().sum())
    return total, solution.stats.num_iterations, *seconds


def _timed(value: torch.Tensor, count: int) -> float:
    """Seconds per broadcast."""
    dist.broadcast(value, 0)
    begin = time.perf_counter()
    for _ in range(count):
        dist.broadcast(value, 0)
    return (time.perf_counter() - begin) / count
