"""Ranks that `srun` started: SLURM's environment as torchrun's."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from dreampropeller.dispatch.base import WorkerError

_FIRST_PORT = 20_000
_NUM_PORTS = 20_000
_ALONE = (
    "For a single process of its own, unset `SLURM_PROCID`; otherwise start the "
    "processes with `srun` or `torchrun`."
)


def read(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables in a process of an `srun` step of several processes.

    Nothing is done in other processes: those of `torchrun` (also under `srun`), the
    batch script itself, a step of one process. Variables that are set are kept, such
    as ``MASTER_PORT``.

    Args:
        environ: The environment.

    Raises:
        WorkerError: A variable is missing or odd. A guess would be wrong on some ranks:
            they would not meet, or share a GPU.
    """
    if "RANK" in environ or "SLURM_PROCID" not in environ:
        return
    rank = _number(environ, "SLURM_PROCID")
    if rank == 0 and "SLURM_STEP_NUM_TASKS" not in environ:
        return  # the batch script
    count = _number(environ, "SLURM_STEP_NUM_TASKS")
    if count == 1:
        return
    node = _number(environ, "SLURM_NODEID")
    tasks = _text(environ, "SLURM_STEP_TASKS_PER_NODE")
    per_node = tasks_per_node(tasks)
    if sum(per_node) != count or node >= len(per_node) or rank >= count:
        raise WorkerError(
            f"SLURM's variables contradict each other: process {rank} of {count} on "
            f"node {node}, and `SLURM_STEP_TASKS_PER_NODE` is `{tasks}`. {_ALONE}"
        )
    found = {
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(per_node[node]),
        "RANK": str(rank),
    }
    if "LOCAL_RANK" not in environ:
        found["LOCAL_RANK"] = str(_number(environ, "SLURM_LOCALID"))
    if "MASTER_ADDR" not in environ:
        found["MASTER_ADDR"] = first_host(_text(environ, "SLURM_STEP_NODELIST"))
    if "MASTER_PORT" not in environ:
        job, step = (_number(environ, f"SLURM_{name}_ID") for name in ("JOB", "STEP"))
        found["MASTER_PORT"] = str(_FIRST_PORT + (7 * job + step) % _NUM_PORTS)
    for name, value in found.items():
        environ.setdefault(name, value)


def first_host(names: str) -> str:
    """The first host of a list such as ``node[007-009,12]-[1-2],gpu3``.

    Raises:
        WorkerError: It is no such list.
    """
    # Each bracket stands for its first number.
    host = re.sub(r"\[(\w+)(?:[-,]\w+)*\]", r"\1", names).split(",")[0]
    if not re.fullmatch(r"[\w.:-]+", host):
        raise WorkerError(
            f"`SLURM_STEP_NODELIST` is `{names}`, which is no list of hosts: set "
            "`MASTER_ADDR` to the host of rank 0."
        )
    return host


def tasks_per_node(text: str) -> list[int]:
    """The processes of each node, from a text such as ``4(x2),3``.

    Raises:
        WorkerError: It is no such text.
    """
    found: list[int] = []
    for part in text.split(","):
        fits = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part, re.ASCII)
        if fits is None:
            raise WorkerError(
                f"`SLURM_STEP_TASKS_PER_NODE` is `{text}`, and not of the form "
                f"`4(x2),3`. {_ALONE}"
            )
        found += [int(fits[1])] * int(fits[2] or 1)
    return found


def _text(environ: MutableMapping[str, str], name: str) -> str:
    text = environ.get(name, "")
    if not text:
        is_set = "is empty" if name in environ else "is missing"
        raise WorkerError(
            f"`SLURM_PROCID` says that SLURM started this process, and `{name}` "
            f"{is_set}. {_ALONE}"
        )
    return text


def _number(environ: MutableMapping[str, str], name: str) -> int:
    text = _text(environ, name)
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise WorkerError(f"`{name}` is `{text}`, and no whole number. {_ALONE}")
    return int(text)
