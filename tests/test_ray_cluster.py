"""What is refused before Ray starts anything: it would try for minutes."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dreampropeller import WorkerError
from dreampropeller.dispatch import ray_cluster
from dreampropeller.dispatch.ray import RayDispatcher
from systems.runs import workers
from systems.settings.dispatch import DispatchConfig
from tests.helpers import OrnsteinUhlenbeck


@pytest.mark.parametrize("scheme", ["", "ray://"])
def test_an_address_where_nothing_listens_is_refused_at_once(
    scheme: str, free_port: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And before a run folder is made, which the dispatcher of a run precedes."""
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace())
    address = f"{scheme}127.0.0.1:{free_port}"
    config = DispatchConfig(backend="ray", ray_address=address)
    with pytest.raises(OSError, match=f"No Ray cluster answers at `{address}`"):
        workers.dispatcher(config)


@pytest.mark.parametrize("address", ["head", "head:", ":6379", "head:x", "ray://head"])
def test_what_is_no_address_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=f"is `{address}`: write `HOST:PORT`"):
        ray_cluster.check_address(address)


def test_other_addresses_are_left_to_ray() -> None:
    for address in (None, "auto", "local", "anyscale://cluster"):
        ray_cluster.check_address(address)


def test_a_start_that_fails_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """And what Ray raises, `Exception` itself, becomes one line."""

    def init(**options: Any) -> None:
        assert Path(options["_temp_dir"]).is_dir()
        raise Exception("The current node\ntimed out.")

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    ended: list[int] = []
    ray = SimpleNamespace(
        init=init, is_initialized=bool, shutdown=lambda: ended.append(1)
    )
    monkeypatch.setitem(sys.modules, "ray", ray)
    before = torch.get_num_threads()
    workers = RayDispatcher(OrnsteinUhlenbeck(), threads=before + 1)
    with pytest.raises(WorkerError, match=r"start a cluster.*node timed out\.$"):
        workers.__enter__()
    assert torch.get_num_threads() == before
    assert ended == [1]
    assert not list(tmp_path.iterdir())
