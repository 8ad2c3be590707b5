"""Which GPU a rank takes, on machines that are not here."""

from __future__ import annotations

import pytest
import torch

from dreampropeller.dispatch.devices import backend, local_device


def machine(
    monkeypatch: pytest.MonkeyPatch, gpus: int, rank: int | None, ranks: int
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus - 1)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
    if rank is not None:
        monkeypatch.setenv("LOCAL_RANK", str(rank))


@pytest.mark.parametrize(
    ("gpus", "rank", "ranks", "device", "spoken"),
    [
        (0, 1, 2, "cpu", "gloo"),
        (8, 5, 8, "cuda:5", "cpu:gloo,cuda:nccl"),
        (2, 5, 8, "cuda:1", "gloo"),  # NCCL refuses two ranks on one GPU
        (1, 5, 8, "cuda:0", "gloo"),
        (4, None, 1, "cuda:3", "cpu:gloo,cuda:nccl"),  # what the caller has chosen
    ],
)
def test_ranks_beyond_the_gpus_share_them(
    monkeypatch: pytest.MonkeyPatch,
    gpus: int,
    rank: int | None,
    ranks: int,
    device: str,
    spoken: str,
) -> None:
    machine(monkeypatch, gpus, rank, ranks)
    assert local_device() == torch.device(device)
    assert backend() == spoken


def test_a_rank_opens_no_gpu_but_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Asking for the current device opens a context on the first GPU."""
    machine(monkeypatch, 8, 5, 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("opened"))
    assert local_device() == torch.device("cuda", 5)
