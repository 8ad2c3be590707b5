"""The device of a rank, and the process group of all ranks."""

from __future__ import annotations

import datetime
import os

import torch
import torch.distributed as dist

from dreampropeller.dispatch.base import WorkerError


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


def open_group(timeout: datetime.timedelta, num_gpus: int | None = None) -> None:
    """Make the process group of `torchrun`'s ranks.

    NCCL between GPUs, which refuses two ranks on one GPU, and gloo on the CPU. Gloo is
    used for all ranks if a machine has more ranks than GPUs.

    Args:
        timeout: Time that ranks wait for each other.
        num_gpus: Number of GPUs of the ranks on this machine; default: those that this
            process sees.

    Raises:
        WorkerError: Ranks share GPUs on some machines and not on others.
    """
    backend = "gloo"
    if torch.cuda.is_available():
        ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        count = torch.cuda.device_count() if num_gpus is None else num_gpus
        backend = "gloo" if ranks > count else "cpu:gloo,cuda:nccl"
    dist.init_process_group(backend, timeout=timeout)
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
