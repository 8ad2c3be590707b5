"""Ranks that `srun` started: SLURM's environment as torchrun's."""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

_FIRST_PORT = 20_000
_NUM_PORTS = 20_000


def read(environ: MutableMapping[str, str] = os.environ) -> None:
    """Set torchrun's variables in a process of an `srun` step of several processes.

    Nothing is done in other processes: those of `torchrun` (also under `srun`), the
    batch script itself, a step of one process. Variables that are set are kept, such
    as ``MASTER_PORT``.

    Args:
        environ: The environment.
    """
    count = environ.get("SLURM_STEP_NUM_TASKS", "1")
    if "RANK" in environ or "SLURM_PROCID" not in environ or count == "1":
        return
    node = int(environ.get("SLURM_NODEID", 0))
    per_node = tasks_per_node(environ.get("SLURM_STEP_TASKS_PER_NODE", count))
    job, step = (int(environ.get(f"SLURM_{name}_ID", 0)) for name in ("JOB", "STEP"))
    found = {
        "WORLD_SIZE": count,
        "LOCAL_RANK": environ.get("SLURM_LOCALID", "0"),
        "LOCAL_WORLD_SIZE": str(per_node[min(node, len(per_node) - 1)]),
        "MASTER_ADDR": first_host(environ.get("SLURM_STEP_NODELIST", "localhost")),
        "MASTER_PORT": str(_FIRST_PORT + (7 * job + step) % _NUM_PORTS),
        "RANK": environ["SLURM_PROCID"],
    }
    for name, value in found.items():
        environ.setdefault(name, value)


def first_host(names: str) -> str:
    """The first host of a list such as ``node[007-009,12],gpu3``."""
    head = re.match(r"([^,\[]*)(?:\[([^\]]*)\])?([^,]*)", names)
    assert head is not None, "the pattern matches the empty text"
    prefix, inside, suffix = head[1], head[2] or "", head[3]
    return prefix + re.split("[-,]", inside)[0] + suffix


def tasks_per_node(text: str) -> list[int]:
    """The processes of each node, from a text such as ``4(x2),3``."""
    found: list[int] = []
    for part in text.split(","):
        count, _, times = part.partition("(x")
        found += [int(count)] * int(times.rstrip(")") or 1)
    return found
