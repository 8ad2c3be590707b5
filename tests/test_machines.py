"""Several machines: SLURM's environment, and two hosts that share only a network."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from dreampropeller import FixedThreshold, PicardSolver, SlidingWindow, solve
from dreampropeller.dispatch import slurm
from tests.helpers import TOYS, OrnsteinUhlenbeck
from tests.processes import Child
from tests.ranks import quick

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("names", "host"),
    [
        ("node1", "node1"),
        ("node1,node2", "node1"),
        ("node[007-009,012]", "node007"),
        ("rack2-node[3,5]-ib,other1", "rack2-node3-ib"),
        ("gpu5,node[1-2]", "gpu5"),
    ],
)
def test_the_first_host_of_a_list_is_found(names: str, host: str) -> None:
    assert slurm.first_host(names) == host


STEP = {
    "SLURM_JOB_ID": "1234567",
    "SLURM_STEP_ID": "2",
    "SLURM_PROCID": "5",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "4,3",
    "SLURM_STEP_NODELIST": "node[03-04]",
}


def test_the_environment_of_srun_is_read_as_torchruns() -> None:
    environ = dict(STEP)
    slurm.read(environ)
    assert {k: v for k, v in environ.items() if k not in STEP} == {
        "RANK": "5",
        "WORLD_SIZE": "7",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "3",
        "MASTER_ADDR": "node03",
        "MASTER_PORT": str(20000 + (7 * 1234567 + 2) % 20000),
    }
    other = {**STEP, "SLURM_PROCID": "0", "SLURM_NODEID": "0"}
    slurm.read(other)
    assert other["LOCAL_WORLD_SIZE"] == "4"
    assert other["MASTER_PORT"] == environ["MASTER_PORT"]
    assert slurm.tasks_per_node("4(x2),3") == [4, 4, 3]


@pytest.mark.parametrize(
    "environ",
    [
        {},
        {**STEP, "RANK": "0", "WORLD_SIZE": "1"},  # torchrun, started by srun
        {**STEP, "SLURM_STEP_NUM_TASKS": "1"},
        {"SLURM_JOB_ID": "1", "SLURM_PROCID": "0", "SLURM_NTASKS": "8"},  # the script
    ],
)
def test_other_processes_of_a_job_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    slurm.read(environ)
    assert environ == before


def solve_here(namespace: str, folder: str) -> None:
    """Solve on this rank, in a network namespace; empty: in this one."""
    if namespace:
        with open(f"/var/run/netns/{namespace}") as file:
            assert not ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0)
    solver = PicardSolver(SlidingWindow(7), FixedThreshold(0))
    found = solve(OrnsteinUhlenbeck(), solver, quick, check=False)
    Path(folder, os.environ["RANK"]).write_text(str(found.value["x"].tolist()))


SCRIPT = """
import sys
from tests.test_machines import solve_here
solve_here("", sys.argv[1])
"""


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


@dataclass
class Host:
    """A machine: its namespace, its address, and its network device."""

    namespace: str
    address: str
    device: str


@pytest.fixture
def hosts() -> Iterator[list[Host]]:
    """Two network namespaces with a cable between them.

    Where namespaces are not allowed: this machine, twice, over loopback.
    """
    mark = uuid.uuid4().hex[:6]
    made = [Host(f"dp{mark}{i}", f"10.77.0.{i + 1}", f"v{mark}{i}") for i in range(2)]
    try:
        for host in made:
            _ip("netns", "add", host.namespace)
        ends = [host.device for host in made]
        _ip("link", "add", ends[0], "type", "veth", "peer", "name", ends[1])
        for host in made:
            _ip("link", "set", host.device, "netns", host.namespace)
            inside = ["-n", host.namespace]
            _ip(*inside, "addr", "add", f"{host.address}/24", "dev", host.device)
            _ip(*inside, "link", "set", host.device, "up")
            _ip(*inside, "link", "set", "lo", "up")
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"network namespaces are not allowed here ({error}): over loopback")
        yield [Host("", "127.0.0.1", "lo")] * 2
        return
    else:
        yield made
    finally:
        for host in made:
            remove = ["ip", "netns", "del", host.namespace]
            subprocess.run(remove, capture_output=True, check=False)


def check(folder: Path) -> None:
    expected = str(TOYS["sde"].loop()[-1]["x"].tolist())
    assert [(folder / rank).read_text() for rank in "01"] == [expected, expected]


def test_two_machines_under_srun_solve_as_one(
    hosts: list[Host], tmp_path: Path, free_port: int
) -> None:
    children = []
    for node, host in enumerate(hosts):
        environ = {
            "GLOO_SOCKET_IFNAME": host.device,
            "SLURM_PROCID": str(node),
            "SLURM_NODEID": str(node),
            "SLURM_LOCALID": "0",
            "SLURM_STEP_NUM_TASKS": "2",
            "SLURM_STEP_TASKS_PER_NODE": "1(x2)",
            "SLURM_STEP_NODELIST": f"{hosts[0].address},other",
            "SLURM_JOB_ID": str(free_port),
        }
        job = (solve_here, host.namespace, str(tmp_path))
        children.append(Child(*job, output=tmp_path / f"o{node}", environ=environ))
    try:
        codes = [child.wait(120) for child in children]
        assert codes == [0, 0], [child.said() for child in children]
        check(tmp_path)
    finally:
        for child in children:
            child.end()


@pytest.mark.chaos
def test_two_machines_under_torchrun_solve_as_one(
    hosts: list[Host], tmp_path: Path, free_port: int
) -> None:
    """One command per machine."""
    script = tmp_path / "main.py"
    script.write_text(SCRIPT)
    started = []
    for node, host in enumerate(hosts):
        environ = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environ |= {"GLOO_SOCKET_IFNAME": host.device}
        command = ["ip", "netns", "exec", host.namespace] if host.namespace else []
        command += [sys.executable, "-W", "ignore", "-m", "torch.distributed.run"]
        command += ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d"]
        command += [f"--rdzv-endpoint={hosts[0].address}:{free_port}"]
        # In a namespace a host does not find its own name, to see that it is the first.
        command += [f"--rdzv-conf=is_host={int(node == 0)}"]
        command += [f"--local-addr={host.address}", str(script), str(tmp_path)]
        pipe = subprocess.PIPE
        run = subprocess.Popen(
            command, env=environ, stdout=pipe, stderr=subprocess.STDOUT, text=True
        )
        started.append(run)
    said = [run.communicate(timeout=240)[0] for run in started]
    assert [run.returncode for run in started] == [0, 0], said
    check(tmp_path)
