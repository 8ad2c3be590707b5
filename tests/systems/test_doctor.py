"""`launch.py --doctor`: one line per check, and an exit code that can be believed."""

from __future__ import annotations

import importlib
import shutil
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import launch
from dreampropeller import WorkerError
from systems import doctor, extras
from systems.doctor import Line
from systems.runs import workers


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
    monkeypatch.setattr(doctor, "REQUIRED", {})
    (line,) = doctor.packages()
    assert line.text == (
        "`broken_build` is not used: found, but cannot be imported: libcudart.so.11: "
        "cannot open shared object file (a test)"
    )


def test_a_folder_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    line = doctor.disk(Path("/proc/self/fdinfo"))
    assert not line.ok
    assert "`/proc/self/fdinfo` cannot be written" in line.text


@pytest.mark.parametrize(
    "fault", ["raise AttributeError('no such thing')", "import no_such_part"]
)
def test_a_package_that_every_run_needs_is_a_failure(
    fault: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Missing, or found with a part of its own that is missing or old."""
    (tmp_path / "half_installed.py").write_text(fault)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(doctor, "PACKAGES", {})
    needs = {"half_installed": "a test", "no_such_thing": "another"}
    monkeypatch.setattr(doctor, "REQUIRED", needs)
    extras.probe.cache_clear()
    broken, missing = doctor.packages()
    extras.probe.cache_clear()
    assert (broken.ok, missing.ok) == (False, False)
    assert "found, but cannot be imported: " in broken.text
    assert "it is not installed. Every run needs it: `pip install" in missing.text


@pytest.mark.parametrize("below", ["", "runs/today"])
def test_a_file_is_no_place_for_results(below: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = doctor.disk(tmp_path / "file" / below)
    assert not line.ok
    assert line.text == f"`{tmp_path / 'file'}` is no folder; write elsewhere: " + (
        "`exp_root_dir=…`"
    )


def test_a_config_that_would_not_be_read_is_refused(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert launch.main(["--doctor", "--config", "nonsense.yaml"]) == 2
    assert "reads no `--config`" in capsys.readouterr().err


def test_a_clone_that_is_not_installed_is_no_failure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def version(name: str) -> str:
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", version)
    line = next(iter(doctor.versions()))
    assert line.ok
    assert line.text.startswith("not installed, used as a clone: write `pip install")


@pytest.mark.parametrize(
    ("variables", "hub"),
    [
        ({"HF_HUB_CACHE": "~/hub"}, "/home/me/hub"),
        ({"HF_HOME": "/models"}, "/models/hub"),
        ({"HF_HOME": "", "HF_HUB_CACHE": ""}, "/home/me/.cache/huggingface/hub"),
    ],
)
def test_the_folder_of_models_is_that_of_the_hub(
    variables: dict[str, str], hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HF_HUB_CACHE", "HF_HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/home/me")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    *_, line = doctor.models()
    assert f"(in `{hub}`)" in line.text


def test_a_machine_without_a_home_folder_is_examined(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", home)
    for name in ("HF_HUB_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HOME", "/models")
    *_, line = doctor.models()
    assert "(in `/models/hub`)" in line.text
    monkeypatch.delenv("HF_HOME")
    *_, line = doctor.models()
    assert "write `HF_HOME=…`" in line.text


class Hidden:
    """Hides a package from imports."""

    def __init__(self, name: str) -> None:
        self.name = name

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.mark.parametrize(
    ("name", "module", "extra"),
    [
        ("tensorboard", "torch.utils.tensorboard", "systems"),
        ("ray", "ray", "ray"),
        ("peft", "peft", "systems"),
    ],
)
def test_a_package_that_is_missing_is_named_with_its_extra(
    name: str,
    module: str,
    extra: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for loaded in list(sys.modules):
        if f"{loaded}.".startswith((f"{name}.", f"{module}.")):
            monkeypatch.delitem(sys.modules, loaded)
    monkeypatch.setattr(sys, "meta_path", [Hidden(name), *sys.meta_path])
    monkeypatch.setattr(
        launch, "list_settings", lambda _: importlib.import_module(module)
    )
    assert launch.main(["--settings"]) == 2
    said = capsys.readouterr().err
    assert said == (
        f'error: `{name}` is not installed: write `pip install -e ".[{extra}]"`.\n'
    )


def test_a_missing_package_of_a_rank_is_named_too() -> None:
    trace = "Rank 1 failed (exit code 1):\nModuleNotFoundError: No module named 'peft'"
    assert workers.words(WorkerError(trace)).startswith("`peft` is not installed: ")


def test_the_extra_that_is_named_brings_the_module() -> None:
    lines = list(map(Requirement, metadata.requires("dreampropeller") or []))

    def brings(extra: str) -> set[str]:
        asked = [r for r in lines if r.marker and r.marker.evaluate({"extra": extra})]
        inner = [brings(name) for one in asked for name in one.extras]
        return {canonicalize_name(one.name) for one in asked}.union(*inner)

    distributions = metadata.packages_distributions()
    for module, extra in extras._EXTRAS.items():
        if module == "pytorch_lightning":  # which `lightning` brings
            continue
        names = distributions.get(module, [module])
        assert brings(extra) & set(map(canonicalize_name, names)), (module, extra)
