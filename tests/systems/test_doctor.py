"""`launch.py --doctor`: one line per check, and an exit code that can be believed."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

import launch
from systems import doctor, extras
from systems.doctor import Line


def test_the_exit_code_is_that_of_the_checks(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    monkeypatch.setattr(doctor, "dispatch", lambda: Line("dispatch", "not today"))
    few = {"trimesh": ("mesh files", False), "no_such_thing": ("nothing", False)}
    monkeypatch.setattr(doctor, "PACKAGES", few)
    words = ["--doctor", f"exp_root_dir={tmp_path / 'not' / 'yet'}"]
    assert launch.main(words) == 0
    said = capsys.readouterr().out
    assert "GiB free in" in said
    assert "`no_such_thing` is not used: it is not installed. (nothing)" in said
    assert all(line.startswith("ok  ") for line in said.splitlines())
    names = {line.split()[1] for line in said.splitlines()}
    assert names >= {"dreampropeller", "torch", "cpu", "trimesh", "disk", "toybox"}
    assert not (tmp_path / "not").exists()

    full = shutil._ntuple_diskusage(2**40, 2**40, 2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    assert launch.main(words) == 1
    assert "FAIL  disk" in capsys.readouterr().out


def test_another_setting_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert launch.main(["--doctor", "seed=3"]) == 2
    assert "`--doctor` reads no `seed=3`" in capsys.readouterr().err


def test_two_ranks_that_disagree_are_a_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    answers: Any = [(1.0, 4, 0.1, 0.001), (1.5, 4, 0.1, 0.001)]
    monkeypatch.setattr(doctor.dp, "launch_workers", lambda *a, **k: answers)
    line = doctor.dispatch()
    assert not line.ok
    assert "different results" in str(line)

    def fail(*arguments: Any, **options: Any) -> Any:
        raise doctor.dp.WorkerError("Traceback\nRank 1 failed (exit code -9)")

    monkeypatch.setattr(doctor.dp, "launch_workers", fail)
    assert str(doctor.dispatch()).endswith("Rank 1 failed (exit code -9)")


def test_a_package_that_is_found_but_broken_gives_its_reason(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken_build.py").write_text(
        "raise OSError('libcudart.so.11: cannot open shared object file\\nmore')"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    extras.probe.cache_clear()
    monkeypatch.setattr(doctor, "PACKAGES", {"broken_build": ("a test", False)})
    (line,) = doctor.packages()
    assert line.text == (
        "`broken_build` is not used: libcudart.so.11: cannot open shared object file "
        "(a test)"
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    line = doctor.disk(Path("/proc/self/fdinfo"))
    assert not line.ok
    assert "`/proc/self/fdinfo` cannot be written" in line.text
