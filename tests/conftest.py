import os
import socket
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests import typechecker as typechecker  # before the package is imported
from tests.rank_pool import RankPool


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a CUDA device (`pytest -m gpu`)")
    config.addinivalue_line("markers", "long: takes minutes (`pytest -m long`)")
    config.addinivalue_line("markers", "chaos: every kind of fault (`pytest -m chaos`)")
    config.addinivalue_line("markers", "browser: needs chromium and playwright")
    config.addinivalue_line("markers", "docs: site and pages (`pytest -m docs`)")
    if config.option.markexpr != "gpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # bitwise claims are made for the CPU


def pytest_collection_modifyitems(
    config: pytest.Config, items: list[pytest.Item]
) -> None:
    waits = {
        "long": "takes minutes",
        "chaos": "takes minutes",
        "docs": "runs pages",
    }
    for marker, why in waits.items():
        if marker not in config.option.markexpr:
            skip = pytest.mark.skip(reason=f"{why}: `pytest -m {marker}`")
            for item in items:
                if item.get_closest_marker(marker):
                    item.add_marker(skip)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device and `pytest -m gpu`")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file's tests stay in one process, which makes their fixtures once."""
    from xdist.scheduler import LoadScopeScheduling

    return LoadScopeScheduling(config, log)


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)  # results depend on the number of threads


@pytest.fixture(scope="session")
def two_ranks() -> Iterator[RankPool]:
    pool = RankPool()
    yield pool
    pool.close()


@pytest.fixture
def free_port() -> int:
    """A port of this machine that nothing listens on."""
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
