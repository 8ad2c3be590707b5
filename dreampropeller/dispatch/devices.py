"""Which device a rank works on, and how ranks reach each other."""

from __future__ import annotations

import os

import torch


def local_device() -> torch.device:
    """The device of this process: its GPU, or the CPU where there is none.

    `torchrun` numbers the ranks of a machine by ``LOCAL_RANK``; rank i takes GPU
    i mod n of the n that it sees, so that ranks beyond n share GPUs, and a rank that is
    shown one GPU alone takes that one.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    local = os.environ.get("LOCAL_RANK")
    if local is None:
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cuda", int(local) % torch.cuda.device_count())


def backend() -> str:
    """The backends of `torch.distributed` for the ranks of `torchrun`.

    NCCL between GPUs, which refuses two ranks on one; gloo on the CPU, and for all
    where a machine has more ranks than this process sees GPUs.
    """
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shared = ranks > torch.cuda.device_count()
    return "gloo" if shared else "cpu:gloo,cuda:nccl"
