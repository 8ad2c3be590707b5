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

import launch
from dreampropeller import (
    FixedThreshold,
    PicardSolver,
    SlidingWindow,
    WorkerError,
    solve,
)
from dreampropeller.dispatch import environment, slurm
from tests.helpers import TOYS, OrnsteinUhlenbeck
from tests.processes import Child, rank_environ
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
        ("n[01-02]-[3-4]", "n01-3"),
        ("r[1,3]n[07-09,12]x", "r1n07x"),
        ("10.0.0.1,10.0.0.2", "10.0.0.1"),
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
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "8"},  # a shell of `salloc`
    ],
)
def test_other_processes_of_a_job_are_left_alone(environ: dict[str, str]) -> None:
    before = dict(environ)
    slurm.read(environ)
    assert environ == before


@pytest.mark.parametrize("name", [name for name in STEP if name != "SLURM_PROCID"])
@pytest.mark.parametrize("value", [None, "", "x["])
def test_a_variable_of_slurm_that_is_missing_or_odd_is_named(
    name: str, value: str | None
) -> None:
    """A default would be wrong: every node `localhost`, every rank the first GPU."""
    environ = {**STEP, name: value or ""}
    if value is None:
        del environ[name]
    with pytest.raises(WorkerError, match=name):
        slurm.read(environ)


def test_variables_of_slurm_that_are_set_by_hand_are_not_needed() -> None:
    environ = {**STEP, "MASTER_ADDR": "here", "MASTER_PORT": "29500"}
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_ID", "SLURM_STEP_ID"):
        del environ[name]
    slurm.read(environ)
    assert environ["RANK"] == "5"
    assert (environ["MASTER_ADDR"], environ["MASTER_PORT"]) == ("here", "29500")


def test_processes_that_do_not_add_up_are_refused() -> None:
    with pytest.raises(WorkerError, match=r"process 5 of 7 on node 1.*`4,2`"):
        slurm.read({**STEP, "SLURM_STEP_TASKS_PER_NODE": "4,2"})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_ADDR": None}, "`MASTER_ADDR` is missing"),
        ({"RANK": None}, "`RANK` is missing"),
        ({"WORLD_SIZE": None}, "`WORLD_SIZE` is missing"),
        ({"WORLD_SIZE": ""}, "`WORLD_SIZE` is empty"),
        ({"MASTER_PORT": "x"}, "`MASTER_PORT` is `x`, and no whole number"),
        ({"MASTER_PORT": "70000"}, "write a port from 1 to 65535"),
        ({"TORCHELASTIC_RESTART_COUNT": "x"}, "`TORCHELASTIC_RESTART_COUNT` is `x`"),
        ({"RANK": "2"}, "`RANK` is 2 and `WORLD_SIZE` is 2"),
        ({"LOCAL_RANK": ""}, "`LOCAL_RANK` is ``"),
    ],
)
def test_a_variable_of_torchrun_that_is_missing_or_odd_is_named(
    change: dict[str, str | None], message: str
) -> None:
    changed: dict[str, str | None] = {**rank_environ(0, 2, 29500), **change}
    environ = {name: value for name, value in changed.items() if value is not None}
    with pytest.raises(WorkerError, match=message):
        environment.read(environ)


def test_the_command_line_prints_one_sentence_about_its_variables(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    assert launch.main(["--settings", "dispatch"]) == 2
    assert capsys.readouterr().err.startswith("error: `MASTER_ADDR` is missing")


@pytest.mark.parametrize("environ", [{}, {"WORLD_SIZE": "1"}, {"WORLD_SIZE": ""}])
def test_a_process_alone_needs_no_variable(environ: dict[str, str]) -> None:
    before = dict(environ)
    environment.read(environ)
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
            "SLURM_STEP_ID": "0",
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
