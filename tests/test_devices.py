"""Which GPU a rank takes and how it speaks, on machines that are not here."""

from __future__ import annotations

import datetime
import os
from typing import Any

import pytest
import torch

from dreampropeller import WorkerError
from dreampropeller.dispatch.process_group import hide_others, local_device, open_group

BOTH = "cpu:gloo,cuda:nccl"


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretends to be a rank of a machine; gives what its group was opened with."""

    def pretend(gpus: int, rank: int | None, ranks: int, opens: bool = True) -> Any:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: opens and gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: gpus - 1)
        monkeypatch.delenv("LOCAL_RANK", raising=False)
        monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
        if rank is not None:
            monkeypatch.setenv("LOCAL_RANK", str(rank))
            monkeypatch.setenv("RANK", str(rank))
        opened: list[str] = []
        dist: Any = torch.distributed
        monkeypatch.setattr(
            dist, "init_process_group", lambda name, timeout: opened.append(name)
        )
        monkeypatch.setattr(dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(
            dist, "all_gather", lambda heard, mine: [one.copy_(mine) for one in heard]
        )
        return opened

    return pretend


@pytest.mark.parametrize(
    ("gpus", "rank", "ranks", "device", "backend"),
    [
        (0, 1, 2, "cpu", "gloo"),
        (8, 5, 8, "cuda:5", BOTH),
        (2, 5, 8, "cuda:1", "gloo"),  # NCCL refuses two ranks on one GPU
        (1, 5, 8, "cuda:0", "gloo"),
        (4, None, 1, "cuda:3", BOTH),  # what the caller has chosen
    ],
)
def test_ranks_beyond_the_gpus_share_them(
    machine: Any, gpus: int, rank: int | None, ranks: int, device: str, backend: str
) -> None:
    opened = machine(gpus, rank, ranks)
    open_group(datetime.timedelta(seconds=1))
    assert local_device() == torch.device(device)
    assert opened == [backend]


def test_gpus_that_torch_cannot_open_are_left_alone(machine: Any) -> None:
    """The driver counts them, and is too old for this torch."""
    opened = machine(8, 5, 8, opens=False)
    open_group(datetime.timedelta(seconds=1))
    assert local_device() == torch.device("cpu")
    assert opened == ["gloo"]


def test_a_rank_opens_no_gpu_but_its_own(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Asking for the current device opens a context on the first GPU."""
    machine(8, 5, 8)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: pytest.fail("opened"))
    assert local_device() == torch.device("cuda", 5)


@pytest.mark.parametrize(
    ("visible", "gpus", "ranks", "left", "backend"),
    [
        (None, 8, 8, "5", BOTH),
        (None, 2, 8, "1", "gloo"),
        ("4,5,6,7,0,1,2,3", 8, 8, "1", BOTH),
        ("0,1,7,9", 2, 8, "1", "gloo"),  # there are no such GPUs
        ("", 0, 8, "", "gloo"),  # hidden, and stays so
    ],
)
def test_a_rank_is_shown_its_own_gpu(
    machine: Any,
    monkeypatch: pytest.MonkeyPatch,
    visible: str | None,
    gpus: int,
    ranks: int,
    left: str,
    backend: str,
) -> None:
    opened = machine(gpus, 5, ranks)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    monkeypatch.setattr(os, "environ", dict(os.environ))
    count = hide_others()
    assert count == gpus
    assert os.environ["CUDA_VISIBLE_DEVICES"] == left
    monkeypatch.setattr(torch.cuda, "device_count", lambda: min(gpus, 1))
    open_group(datetime.timedelta(seconds=1), count)
    assert opened == [backend]


def test_machines_that_cannot_speak_are_an_error(
    machine: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One has as many GPUs as ranks and one has fewer: NCCL would wait for ever."""
    machine(8, 5, 8)
    dist: Any = torch.distributed

    def hear(heard: list[torch.Tensor], mine: torch.Tensor) -> None:
        heard[0].copy_(mine)
        heard[1].copy_(1 - mine)

    monkeypatch.setattr(dist, "all_gather", hear)
    with pytest.raises(WorkerError, match="as many ranks as GPUs on every machine"):
        open_group(datetime.timedelta(seconds=1))
