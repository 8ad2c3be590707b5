"""Checkpoints of the whole solver state, atomic and without pickle.

A checkpoint is one safetensors file. It holds tensors as such and everything else as
JSON in its header, with a checksum per tensor. It is written under another name,
flushed to the disk and then renamed, so a reader sees all of it or nothing. Files get
the modes that the process's umask gives.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import stat
import warnings
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from dreampropeller import stored_tensors
from dreampropeller.component import Memory
from dreampropeller.solution import SolverState, Stats
from dreampropeller.tree import decode, encode, record_name

FORMAT = 4
_READ = (3, FORMAT)  # 3: without strides
LOCK = ".lock"
"""Name of the lock file of the writing process."""
_LOCKS: dict[Path, int] = {}
_BROKEN = (
    *(OSError, SafetensorError, ValueError, TypeError, AttributeError),
    *(LookupError, ArithmeticError, RuntimeError),  # torch's own, and RecursionError
)
"""What a file may cause whose content is not what `save` writes."""
_NAME = re.compile(r"step-(\d+)(\.lean)?\.safetensors")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written or read; the message says what to do."""


def save(
    folder: str | Path, state: SolverState[Any], keep: int = 2, lean: bool = False
) -> Path:
    """Write a checkpoint; remove older ones, and later ones from before a resume.

    A run that resumes from a full checkpoint equals the uninterrupted run bit for bit.
    A lean checkpoint holds state, carry and the components' estimates, without guesses,
    held drifts and past iterations. Its size is three times the parameters with Adam,
    up to six with the default predictors and accelerations. The run resumes with the
    first iteration's small stride, so its strides differ; at threshold 0 its result
    does not. It does not count as one of `keep`: the newest lean checkpoint is kept
    until a full one of the same or a later step is written.

    Args:
        folder: Folder of the run's checkpoints; it is made if missing.
        state: Solver state to write.
        keep: Number of full checkpoints to keep. Two or more leave one to fall back to.
        lean: Leave out the fields marked `component.FULL`.

    Returns:
        The file, ``step-<step>.safetensors`` or ``step-<step>.lean.safetensors``.

    Raises:
        CheckpointError: The file could not be written, the folder holds checkpoints of
            another run, or another process writes there. Earlier checkpoints are
            intact.
    """
    if keep < 1:
        raise ValueError(f"`keep` is {keep}: keep at least 1 checkpoint.")
    folder = Path(folder)
    _refuse_other_run(folder, state.run)
    kind = ".lean" if lean else ""
    path = folder / f"step-{state.step:08d}{kind}.safetensors"
    structure, leaves = encode(
        state, lambda field: not lean or field.metadata.get("lean", True)
    )
    arrays, described = stored_tensors.store(leaves)
    header = {
        "format": FORMAT,
        "run": state.run,
        "structure": structure,
        **described,
    }
    text = json.dumps(header)
    metadata = {"dreampropeller": text, "checksum": str(zlib.crc32(text.encode()))}
    part = path.with_suffix(".part")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock(folder)
        _write(part, arrays, metadata)
        os.replace(part, path)
        _flush_folder(folder)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"The checkpoint of step {state.step} could not be written to `{folder}`: "
            f"{error}. Earlier checkpoints are intact. Free some space there, or write "
            "to another folder."
        ) from error
    finally:  # also when the process is interrupted
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    _remove_others(folder, path, keep, bool(state.run))
    return path


def _write(part: Path, arrays: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a file, and flush it to the disk."""
    # Safetensors makes private files: take the mode that the umask gives.
    with open(part, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    save_file(arrays, part, metadata=metadata)
    with contextlib.suppress(OSError):  # a file system without modes
        os.chmod(part, mode)
    with open(part, "rb") as file:
        os.fsync(file.fileno())


def _remove_others(folder: Path, path: Path, keep: int, known: bool) -> None:
    """Keep the newest checkpoints up to a file."""
    others = [other for other in _newest_first(folder) if other != path]
    # Beyond this step: from a part of the run that was abandoned by resuming.
    given_up = [o for o in others if known and _step(o) > _step(path)]
    full = [o for o in [path, *others] if o not in given_up and not _is_lean(o)]
    # Of lean ones only the last is of use, and none that a full one has overtaken.
    lean = [other for other in others if _is_lean(other)]
    for old in [*given_up, *full[keep:], *lean]:
        with contextlib.suppress(OSError):
            old.unlink()


def _step(path: Path) -> int:
    found = _NAME.fullmatch(path.name)
    assert found is not None, f"{path} is no checkpoint"
    return int(found[1])


def _is_lean(path: Path) -> bool:
    return path.name.endswith(".lean.safetensors")


def lock(folder: Path) -> None:
    """Lock a folder for this process until it ends; repeated calls have no effect.

    Raises:
        CheckpointError: Another process holds the lock.
    """
    folder = folder.resolve()
    if folder in _LOCKS:
        held = os.fstat(_LOCKS[folder])
        with contextlib.suppress(OSError):
            if os.path.samestat(held, os.stat(folder / LOCK)):
                return
        unlock(folder)  # the folder was removed and made again
    file = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(file)
        if error.errno in (errno.EAGAIN, errno.EACCES):
            raise CheckpointError(
                f"Another process writes to `{folder}`: wait until it has ended, or "
                "name another folder."
            ) from error
        return  # a file system without locks
    _LOCKS[folder] = file


def unlock(folder: Path) -> None:
    """Let other processes write to a folder again."""
    file = _LOCKS.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)


def run_of(folder: Path) -> str:
    """The name of the run whose checkpoints a folder holds; empty if unknown."""
    for path in _newest_first(folder) if folder.is_dir() else []:
        with contextlib.suppress(*_BROKEN):
            return str(_header(path).get("run", ""))
    return ""


def _refuse_other_run(folder: Path, run: str) -> None:
    other = run_of(folder) if run else ""
    if other not in ("", run):
        raise CheckpointError(
            f"`{folder}` holds checkpoints of another run, which would be removed: "
            "name another folder, resume that run with `state=checkpoint.load("
            f'"{folder}")`, or remove them yourself.'
        )


def _header(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        return _parse(file.metadata() or {})


def _parse(metadata: dict[str, str]) -> dict[str, Any]:
    """Our part of a file's header.

    Raises:
        KeyError: The file is not one of ours.
        ValueError: The header is damaged.
        RecursionError: It is nested too deeply.
    """
    text = metadata["dreampropeller"]
    if metadata.get("checksum", str(zlib.crc32(text.encode()))) != str(
        zlib.crc32(text.encode())
    ):
        raise ValueError("its header is damaged")
    found = json.loads(text)
    if not isinstance(found, dict):
        raise ValueError("its header is no mapping")
    return found


def load(
    path: str | Path, device: torch.device | str | None = None
) -> SolverState[Any]:
    """Read a checkpoint: a file, or the newest readable one of a folder.

    Args:
        path: A file that `save` wrote, or its folder. In a folder, a damaged newest
            checkpoint is skipped with a warning.
        device: Device of tensors that were on a GPU; default: the current GPU, or the
            CPU where there is none. Tensors that were on the CPU stay there.

    Raises:
        CheckpointError: There is no checkpoint, or none can be read.
    """
    path = Path(path)
    if not path.is_dir():
        return _read(path, device)
    found = _newest_first(path)
    for newest in found:
        try:
            return _read(newest, device)
        except CheckpointError as error:  # noqa: PERF203, once per damaged file
            if isinstance(error, _NoDevice):  # sound; an older one would not fit either
                raise
            fallback = f"{error} Falling back to the checkpoint before."
            warnings.warn(fallback, stacklevel=2)
    raise CheckpointError(
        f"`{path}` holds no checkpoint that can be read"
        + (f" ({len(found)} damaged)" if found else "")
        + ". Name the folder with `step-….safetensors` files, or start a new run."
    )


class _NoDevice(CheckpointError):
    """The tensors of a sound checkpoint do not fit on a device."""


def _read(path: Path, device: torch.device | str | None) -> SolverState[Any]:
    try:
        with safe_open(path, framework="pt") as file:
            header = _parse(file.metadata() or {})
            # Cloned: mapped memory is aligned differently, which changes the rounding
            # of CPU kernels.
            arrays = {key: file.get_tensor(key).clone() for key in file.keys()}  # noqa: SIM118
            if header["format"] in _READ:
                stored_tensors.restore(header, arrays)
    except _BROKEN as error:
        raise CheckpointError(
            f"The checkpoint `{path}` cannot be read: it is missing, cut short, "
            f"damaged or not one of ours ({str(error)[:300]})."
        ) from error
    if header["format"] not in _READ:
        raise CheckpointError(
            f"The checkpoint `{path}` has format {header['format']}, and this version "
            f"reads {FORMAT}. Resume with the version that wrote it, or start a new "
            "run."
        )
    try:
        leaves = [
            arrays[str(index)].to("cpu" if kind == "cpu" else device or _present(kind))
            for index, kind in enumerate(header["devices"])
        ]
    except (RuntimeError, AssertionError) as error:  # the second without CUDA in torch
        raise _NoDevice(
            f"The tensors of `{path}` cannot be moved to `{device or 'the GPU'}` "
            f'({error}): load them with `device="cpu"`.'
        ) from error
    kinds = (SolverState, Stats, *Memory.kinds())
    try:
        state = decode(
            header["structure"], leaves, {record_name(kind): kind for kind in kinds}
        )
    except _BROKEN as error:
        raise CheckpointError(
            f"The checkpoint `{path}` holds a memory that is not known here "
            f"({str(error)[:300]}): import the module that defines it, in the version "
            "that wrote it, before loading."
        ) from error
    if not _is_state(state):
        raise CheckpointError(f"The checkpoint `{path}` holds no solver state.")
    return state


def _present(kind: str) -> str:
    """A kind of device, if this machine has one; else the CPU."""
    try:
        return "cpu" if torch.empty(0, device=kind).is_meta else kind
    except (RuntimeError, AssertionError, NotImplementedError):
        return "cpu"


def _is_state(state: Any) -> bool:
    """Whether it is a solver state as its readers take for granted."""
    return (
        isinstance(state, SolverState)
        and type(state.step) is int
        and state.step >= 0
        and isinstance(state.y, dict)
        and all(isinstance(v, Tensor) and type(n) is str for n, v in state.y.items())
        and isinstance(state.guesses, list)
        and isinstance(state.stats, Stats)
        and type(state.stats.num_evaluations) is int
        and all(isinstance(v, list) for v in (state.stats.strides, state.stats.growth))
        and isinstance(state.run, str)
        and isinstance(state.problem, dict)
    )


def _newest_first(folder: Path) -> list[Path]:
    return sorted(
        (path for path in folder.iterdir() if _NAME.fullmatch(path.name)),
        key=lambda path: (_step(path), not _is_lean(path)),
        reverse=True,
    )


def _flush_folder(folder: Path) -> None:
    """Make the rename itself durable, where folders can be flushed."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
