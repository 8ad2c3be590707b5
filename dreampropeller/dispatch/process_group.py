"""The device of a rank, and the process group of all ranks."""

from __future__ import annotations

import contextlib
import datetime
import itertools
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from dreampropeller.dispatch import environment
from dreampropeller.dispatch.base import WorkerError


@dataclass(frozen=True)
class Axis:
    """The ranks along one axis of the mesh, as one of them sees them.

    Args:
        group: Their process group; None: all ranks, or this one alone.
        ranks: Their numbers in the default group, in order.
        index: The position of this rank among them.
    """

    group: Any
    ranks: Sequence[int]
    index: int


_CONNECTIONS: set[str] = set()
"""The sockets that `open_group` and `mesh` opened."""
_GENERATIONS, _OPENED = itertools.count(), itertools.count()


def local_device() -> torch.device:
    """The device of this process: its GPU, or the CPU if there is no GPU.

    `torchrun` numbers the ranks of a machine by ``LOCAL_RANK``; rank i takes GPU
    i mod n of the n that it sees, so that ranks beyond n share GPUs, and a rank that
    sees a single GPU takes that one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK")
    if local is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", int(local) % torch.cuda.device_count())


def hide_others() -> int:
    """Make only this process's own GPU visible; call it before CUDA is initialised.

    Returns:
        The number of GPUs visible before.
    """
    count = torch.cuda.device_count()  # asks the driver, does not open CUDA
    if count:
        local = int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
        visible = os.environ.get("CUDA_VISIBLE_DEVICES")
        names = visible.split(",") if visible else [str(gpu) for gpu in range(count)]
        os.environ["CUDA_VISIBLE_DEVICES"] = names[local % count]
    return count


def join(timeout: datetime.timedelta) -> None:
    """Make the process group of torchrun's or srun's ranks, on this rank's device.

    Raises:
        WorkerError: This process is no rank, or as `open_group`.
    """
    environment.read()
    if "RANK" not in os.environ:
        raise WorkerError(
            "`DistributedDispatcher` found no process group and no `RANK` in the "
            "environment. Start the program with `torchrun --nproc-per-node=2 …` "
            "or `srun`, or through `dreampropeller.launch_workers`."
        )
    device = local_device()
    if device.type == "cuda":
        torch.cuda.set_device(device)
    open_group(timeout)


def open_group(timeout: datetime.timedelta, num_gpus: int | None = None) -> None:
    """Make the process group of `torchrun`'s ranks.

    NCCL between GPUs, which refuses two ranks on one GPU, and gloo on the CPU. Gloo is
    used for all ranks if a machine has more ranks than GPUs.

    Args:
        timeout: Time that ranks wait for each other.
        num_gpus: Number of GPUs of the ranks on this machine; default: those that this
            process sees.

    Raises:
        WorkerError: The ranks did not meet, or share GPUs on some machines and not on
            others.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        count = torch.cuda.device_count() if num_gpus is None else num_gpus
        backend = "gloo" if ranks > count else "cpu:gloo,cuda:nccl"
    before = set(_sockets().values())
    try:
        options = _keys_of_this_attempt(timeout)
        dist.init_process_group(backend, timeout=timeout, **options)
    except RuntimeError as error:
        raise WorkerError(_no_meeting(str(error), timeout)) from error
    _CONNECTIONS.update(set(_sockets().values()) - before)
    mine = torch.tensor([int(backend == "gloo")])
    heard = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(heard, mine)
    different = [rank for rank, one in enumerate(heard) if not one.equal(heard[0])]
    if different:
        raise WorkerError(
            f"Rank 0 and rank {different[0]} cannot reach each other's GPUs: on one of "
            "their machines ranks share GPUs, or there are none. Start as many ranks "
            "as GPUs on every machine (`torchrun --nproc-per-node=gpu …`)."
        )


def _keys_of_this_attempt(timeout: datetime.timedelta) -> dict[str, Any]:
    """Arguments of `init_process_group` that keep the groups of a launcher apart.

    torch shares one store between all of them: without keys of its own, a rank may read
    where a dead rank of an earlier attempt, or a group of an earlier solve, listened.
    """
    store = agent_store()
    if store is None:
        return {}
    store.set_timeout(timeout)
    prefix = f"dreampropeller/attempt-{attempt()}/group-{next(_OPENED)}"
    return {
        "store": dist.distributed_c10d.PrefixStore(prefix, store),
        "rank": int(os.environ["RANK"]),
        "world_size": int(os.environ["WORLD_SIZE"]),
    }


def _no_meeting(cause: str, timeout: datetime.timedelta) -> str:
    """Why the ranks did not meet."""
    host, port = (os.environ.get(name, "?") for name in ("MASTER_ADDR", "MASTER_PORT"))
    if "EADDRINUSE" in cause or "already in use" in cause:
        return (
            f"Port {port} is taken by another program: choose another one, "
            "`torchrun --master-port=29501 …`, or let torchrun choose, `torchrun "
            "--standalone …`."
        )
    return (
        f"The ranks did not meet at {host}:{port} within {timeout.total_seconds():g} s "
        "(`dispatch.timeout`): see that rank 0 runs, and that its machine accepts "
        f"connections. Cause: {cause.splitlines()[0]}"
    )


def attempt() -> int:
    """How often `torchrun` or `launch_workers` has restarted the ranks."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))


def agent_store() -> Any:
    """A connection to the store of `torchrun`, which outlives restarts.

    None if this process was not started by `torchrun` or `launch_workers`.
    """
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != str(True):
        return None
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    make: Any = vars(dist)["TCPStore"]  # missing from torch's type stubs
    return make(host, port, is_master=False)


def mesh(views: int, timeout: datetime.timedelta) -> tuple[Axis, Axis]:
    """The axes of this rank in the mesh ``(steps, views)`` of all ranks.

    Args:
        views: Number of columns.
        timeout: Time that ranks wait for each other.

    Returns:
        The ranks of this rank's column, over which the steps of a window are spread,
        and those of its row, over which the views of a step are.

    Raises:
        ValueError: The ranks do not fill such a mesh.
        WorkerError: The ranks did not meet.
    """
    rank, size = dist.get_rank(), dist.get_world_size()
    if size % views:
        fits = ", ".join(str(n) for n in range(1, size + 1) if size % n == 0)
        raise ValueError(
            f"`views` is {views}, and {size} ranks do not divide into rows of as many: "
            f"write one of {fits}, or start another number of ranks."
        )
    numbers = torch.arange(size).view(-1, views)
    if views in (1, size):  # one axis has all ranks, the other this one alone
        every, alone = Axis(None, range(size), rank), Axis(None, [rank], 0)
        return (every, alone) if views == 1 else (alone, every)
    before = set(_sockets().values())
    try:
        axes = [_axis(lines.tolist(), rank, timeout) for lines in (numbers.T, numbers)]
    except RuntimeError as error:
        raise WorkerError(
            f"The groups of a mesh of {size // views} × {views} ranks could not be "
            f"made: a rank ended meanwhile. Cause: {str(error).splitlines()[0]}"
        ) from error
    _CONNECTIONS.update(set(_sockets().values()) - before)
    return axes[0], axes[1]


def _axis(lines: list[list[int]], rank: int, timeout: datetime.timedelta) -> Axis:
    """Make the groups of parallel lines of the mesh; returns that of a rank."""
    groups = [dist.new_group(line, timeout=timeout) for line in lines]
    number = next(n for n, line in enumerate(lines) if rank in line)
    return Axis(groups[number], lines[number], lines[number].index(rank))


def close_axes(*axes: Axis) -> None:
    """Close the groups that `mesh` made beside a group of the user's own."""
    for axis in axes:
        if axis.group is not None:
            dist.destroy_process_group(axis.group)


def close_group() -> None:
    """Close the group that `open_group` made."""
    dist.destroy_process_group()
    _CONNECTIONS.clear()


def own_store() -> Any:
    """A further connection to the group's store, with keys of its own.

    Every rank has to ask for as many as the others.
    """
    store: Any = dist.distributed_c10d._get_default_store()
    clone = getattr(store, "clone", None)  # torch < 2.6 shares the connection
    prefix = f"dreampropeller/{next(_GENERATIONS)}"
    return dist.distributed_c10d.PrefixStore(prefix, clone() if clone else store)


def hang_up() -> None:
    """End the connections that `open_group` and `mesh` made, once a rank is lost.

    A collective that waits for a stopped rank keeps a gloo group from being closed
    until its time-out; without connections it fails at once. (gloo has no `abort`.)
    """
    mine = [n for n, name in _sockets().items() if name in _CONNECTIONS]
    for number in mine:
        with contextlib.suppress(OSError):
            one = socket.socket(fileno=os.dup(number))
            try:
                one.getpeername()  # not one that listens: gloo would abort
                one.shutdown(socket.SHUT_RDWR)
            finally:
                one.close()


def _sockets() -> dict[int, str]:
    """The sockets of this process by file descriptor, on Linux; elsewhere none."""
    found: dict[int, str] = {}
    with contextlib.suppress(OSError):
        for number in os.listdir("/proc/self/fd"):
            with contextlib.suppress(OSError):
                name = os.readlink(f"/proc/self/fd/{number}")
                if name.startswith("socket:"):
                    found[int(number)] = name
    return found
