"""The variables of a launcher, `torchrun` or `srun`: all of them are read, or refused.

A rank that guessed one would run alone, meet no other rank, or take another's GPU.
"""

from __future__ import annotations

import os
import re
from collections.abc import MutableMapping

from dreampropeller.dispatch import slurm
from dreampropeller.dispatch.base import WorkerError

_NEEDED = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What a rank needs to meet the others."""
_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")
_ADVICE = (
    "Start the program with `torchrun --nproc-per-node=2 …` or `srun`, which set all "
    "of them, or unset `RANK` and `WORLD_SIZE` for a single process."
)


def read(environ: MutableMapping[str, str] = os.environ) -> None:
    """Read SLURM's variables as torchrun's, and check those that are set.

    Nothing is done in a process that no launcher started.

    Args:
        environ: The environment.

    Raises:
        WorkerError: A variable is missing or odd; the message names it.
    """
    slurm.read(environ)
    _check_number(environ, "TORCHELASTIC_RESTART_COUNT")
    if "RANK" not in environ and environ.get("WORLD_SIZE", "") in ("", "1"):
        return
    for name in _NEEDED:
        if not environ.get(name):
            is_set = "is empty" if name in environ else "is missing"
            raise WorkerError(
                f"`{name}` {is_set} in the environment of this rank, of which "
                f"a launcher sets {', '.join(f'`{one}`' for one in _NEEDED)}. {_ADVICE}"
            )
    for name in _NUMBERS:
        _check_number(environ, name)
    rank, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    if rank >= size:
        raise WorkerError(
            f"`RANK` is {rank} and `WORLD_SIZE` is {size}: ranks are counted from 0. "
            f"{_ADVICE}"
        )
    if not 0 < int(environ["MASTER_PORT"]) < 2**16:
        raise WorkerError(
            f"`MASTER_PORT` is {environ['MASTER_PORT']}: write a port from 1 to 65535."
        )


def _check_number(environ: MutableMapping[str, str], name: str) -> None:
    text = environ.get(name, "0")
    if not re.fullmatch(r"\d+", text, re.ASCII):
        raise WorkerError(f"`{name}` is `{text}`, and no whole number. {_ADVICE}")
