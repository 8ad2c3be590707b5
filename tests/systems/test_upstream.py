"""Configs of threestudio, read as they are.

With `THREESTUDIO_ROOT`, the place of a checkout, its own files are read too; the files
written here have the same keys and values as two of them.
"""

from __future__ import annotations

import os
import re
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from omegaconf import OmegaConf

import dreampropeller as dp
from dreampropeller.precision import LOSS_SCALE
from systems import OTHERWISE, build
from systems.dreamfusion import DreamFusion
from systems.settings.config import Config, load
from systems.settings.reader import ConfigError, read
from systems.settings.upstream import resolvers, translate
from systems.settings.upstream_table import SETTINGS, VALUES
from tests.helpers import tree_equal
from tests.systems.test_priors import deep_floyd as deep_floyd
from tests.systems.test_priors import stable_diffusion as stable_diffusion
from tests.systems.test_zero123 import rendered

ROOT = Path(__file__).parent.parent.parent
CHECKOUT = os.environ.get("THREESTUDIO_ROOT")
TINY = (
    "system.prompt_processor.prompt=a",
    "data.width=8",
    "data.height=8",
    "system.geometry.pos_encoding_config.n_levels=2",
    "system.geometry.pos_encoding_config.start_level=1",
    "system.geometry.pos_encoding_config.log2_hashmap_size=6",
    "system.renderer.num_samples_per_ray=12",
    "trainer.max_steps=2",
)
MODELS = {"sd": "stable_diffusion", "if": "deep_floyd"}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.chdir(ROOT)


def theirs(kind: str) -> dict[str, Any]:
    """Of threestudio, `dreamfusion-sd` or `dreamfusion-if`: its keys and values."""
    name, guidance, activation, top, model, scale = {
        "sd": (
            *("stable-diffusion", "stable-diffusion-guidance", "sigmoid", 45),
            *("stabilityai/stable-diffusion-2-1-base", 100.0),
        ),
        "if": (
            *("deep-floyd", "deep-floyd-guidance", "scale_-11_01", 90),
            *("DeepFloyd/IF-I-XL-v1.0", 20.0),
        ),
    }[kind]
    encoding = {
        "otype": "ProgressiveBandHashGrid",
        **{"n_levels": 16, "n_features_per_level": 2, "log2_hashmap_size": 19},
        **{"base_resolution": 16, "per_level_scale": 1.447269237440378},
        **{"start_level": 8, "start_step": 2000, "update_steps": 500},
    }
    geometry = {
        **{"radius": 2.0, "normal_type": "analytic", "density_bias": "blob_magic3d"},
        **{"density_activation": "softplus", "density_blob_scale": 10.0},
        **{"density_blob_std": 0.5, "pos_encoding_config": encoding},
    }
    system = {
        "geometry_type": "implicit-volume",
        "geometry": geometry,
        "material_type": "diffuse-with-point-light-material",
        "material": {"ambient_only_steps": 2001, "albedo_activation": activation},
        "background_type": "neural-environment-map-background",
        "background": {"color_activation": activation},
        "renderer_type": "nerf-volume-renderer",
        "renderer": {
            "radius": "${system.geometry.radius}",
            "num_samples_per_ray": 512,
        },
        "prompt_processor_type": f"{name}-prompt-processor",
        "prompt_processor": {"pretrained_model_name_or_path": model, "prompt": "???"},
        "guidance_type": guidance,
        "guidance": {
            **{"pretrained_model_name_or_path": model, "guidance_scale": scale},
            **{"weighting_strategy": "sds"},
            **{"min_step_percent": 0.02, "max_step_percent": 0.98},
        },
        "loggers": {"wandb": {"enable": False, "project": "x", "name": "None"}},
        "loss": {
            **{"lambda_sds": 1.0, "lambda_orient": [0, 10.0, 1000.0, 5000]},
            **{"lambda_sparsity": 1.0, "lambda_opaque": 0.0},
        },
        "optimizer": {
            "name": "Adam",
            "args": {"lr": 0.01, "betas": [0.9, 0.99], "eps": 1.0e-15},
            "params": {"geometry": {"lr": 0.01}, "background": {"lr": 0.001}},
        },
    }
    return {
        "name": f"dreamfusion-{kind}",
        "tag": "${rmspace:${system.prompt_processor.prompt},_}",
        **{"exp_root_dir": "outputs", "seed": 0},
        "data_type": "random-camera-datamodule",
        "data": {
            **{"batch_size": 1, "width": 64, "height": 64, "eval_fovy_deg": 70.0},
            **{"camera_distance_range": [1.5, 2.0], "fovy_range": [40, 70]},
            **{"elevation_range": [-10, top], "eval_camera_distance": 2.0},
            "light_sample_strategy": "dreamfusion",
        },
        "system_type": "dreamfusion-system",
        "system": system,
        "trainer": {
            **{"max_steps": 10000, "log_every_n_steps": 1, "num_sanity_val_steps": 0},
            **{"val_check_interval": 200, "enable_progress_bar": True},
            "precision": "16-mixed",
        },
        "checkpoint": {
            **{"save_last": True, "save_top_k": -1},
            "every_n_train_steps": "${trainer.max_steps}",
        },
    }


def written(content: dict[str, Any], folder: Path) -> Path:
    path = folder / "theirs.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path


def source(kind: str, folder: Path) -> Path:
    """A file of the checkout, where there is one."""
    if CHECKOUT is not None:
        return Path(CHECKOUT) / "configs" / f"dreamfusion-{kind}.yaml"
    return written(theirs(kind), folder)


def solved(path: Path | str, model: Path, *settings: str) -> dp.State:
    name = "pretrained_model_name_or_path"
    models = [f"system.{p}.{name}={model}" for p in ("prompt_processor", "guidance")]
    trajectory = build(load(path, [*TINY, *models, *settings])).trajectory()
    start, _ = trajectory.init()
    value = dp.solve(trajectory, dp.Sequential()).value
    table = "geometry.encoding.table"
    assert torch.isfinite(value[table]).all()
    assert not torch.equal(value[table], start[table])
    return value


@pytest.mark.parametrize("kind", MODELS)
def test_their_files_run_and_equal_ours(
    kind: str,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """In their mixed precision; and, in ours, bit for bit what our config makes."""
    model = request.getfixturevalue(MODELS[kind])
    path = source(kind, tmp_path)
    # Steps whose gradients overflow are left out until the loss scale fits.
    mixed = solved(path, model, "trainer.max_steps=24")
    assert LOSS_SCALE in mixed
    full = "trainer.precision=32-true"
    ours = ROOT / "configs" / f"dreamfusion-{kind}.yaml"
    assert tree_equal(solved(path, model, full), solved(ours, model))


def test_what_has_no_effect_is_named_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = written(theirs("sd"), tmp_path)
    config = load(path, [TINY[0], "trainer.profiler=simple"])
    (line,) = capsys.readouterr().err.splitlines()
    for name in (
        *("system.loggers", "trainer.num_sanity_val_steps", "trainer.profiler"),
        *("trainer.enable_progress_bar", "checkpoint.save_last"),
        "checkpoint.save_top_k",
    ):
        assert f"`{name}`" in line
    assert config.checkpoint.every_n_train_steps == 10000
    assert "loggers" not in config.system
    never = load(path, [TINY[0], "checkpoint.every_n_train_steps=0"])
    assert never.checkpoint.every_n_train_steps == 10000  # none before the end


def test_the_guidance_scale_is_counted_as_its_owner_counts(tmp_path: Path) -> None:
    """Theirs is one less; the name of the guidance says who wrote it."""
    path = written(theirs("if"), tmp_path)

    def scale(*settings: str) -> float:
        return build(load(path, [TINY[0], *settings])).settings.guidance.scale  # pyright: ignore[reportAttributeAccessIssue]

    small = TINY[5]
    assert scale(small) == 21
    assert scale(small, "system.guidance_type=diffusers-guidance") == 20
    content = theirs("if")
    del content["system"]["guidance"]["guidance_scale"]
    written(content, tmp_path)
    assert scale(small) == 21  # their default
    assert scale(small, "system.guidance_type=stable-diffusion-guidance") == 101


UNSUPPORTED = {
    "trainer.gradient_clip_val": 1.0,
    "trainer.accumulate_grad_batches": 4,
    "system.geometry.normal_type": "pred",
    "data.progressive_until": 200,
    "system.scheduler": {"name": "ExponentialLR", "args": {"gamma": 0.9}},
    "system.renderer.estimator": "importance",
    "system.guidance.use_sjc": True,
    "system.prompt_processor.use_prompt_debiasing": True,
    "system.loss.lambda_z_variance": [0, 0.0, 1.0, 100],
    "system.background.dir_encoding_config": {"otype": "Frequency"},
}


def test_what_changes_the_result_is_listed_all_at_once(tmp_path: Path) -> None:
    config = OmegaConf.create(theirs("sd"))
    for name, value in UNSUPPORTED.items():
        OmegaConf.update(config, name, value)
    config.system.geometry_type = "volume-grid"
    path = tmp_path / "theirs.yaml"
    OmegaConf.save(config, path)
    own = ("system.geometry.radios=1", "system.loss.lambda_sds=[0,1]", "data.width=big")
    with pytest.raises(ConfigError) as caught:
        build(load(path, own))
    lines = str(caught.value).splitlines()
    assert lines[0] == "The config cannot be used:"
    assert lines[-1] == OTHERWISE
    for name in UNSUPPORTED:
        assert sum(line.startswith(f"- `{name}` is ") for line in lines) == 1, name
    assert "- `system.geometry_type` is `volume-grid`" in str(caught.value)
    assert "- The prompt is missing" in str(caught.value)
    # What is wrong on its own is said in the same breath.
    assert "- In `system.loss`: `lambda_sds` is [0, 1]" in str(caught.value)
    wanted = "a whole number or [a whole number, …]"
    assert f"- `data.width` is `big`: write {wanted}." in str(caught.value)
    assert len(lines) == 1 + len(UNSUPPORTED) + 4 + 1


def test_a_value_that_asks_for_nothing_is_accepted(tmp_path: Path) -> None:
    config = OmegaConf.create(theirs("sd"))
    for name, value in (
        ("trainer.gradient_clip_val", 0),
        ("trainer.accumulate_grad_batches", 1),
        ("data.resolution_milestones", []),
        ("system.scheduler", None),
        ("system.loss.lambda_z_variance", [0, 0.0, 0.0, 100]),
        ("system.material.n_output_dims", 3),
        ("system.guidance.view_dependent_prompting", False),
        (
            "system.background.mlp_network_config",
            {"otype": "VanillaMLP", "activation": "ReLU", "n_neurons": 5},
        ),
    ):
        OmegaConf.update(config, name, value)
    path = tmp_path / "theirs.yaml"
    OmegaConf.save(config, path)
    system: Any = build(load(path, [*TINY]))
    assert system.settings.background.n_neurons == 5
    assert not system.settings.prompt_processor.view_dependent


@pytest.mark.parametrize(
    "changes",
    [
        {"system_type": "latentnerf-system"},
        {"data_type": "co3d-datamodule", "data": {"root_dir": "x"}},
    ],
)
def test_other_systems_and_data_have_a_way_out(
    changes: dict[str, Any], tmp_path: Path
) -> None:
    path = written({**theirs("sd"), **changes}, tmp_path)
    with pytest.raises(ConfigError) as caught:
        build(load(path, ["system.freq.n_ref=2", "trainer.gradient_clip_val=1"]))
    (name, value), *_ = changes.items()
    assert f"`{name}` is `{value}`: write" in str(caught.value)
    assert "`trainer.gradient_clip_val` is `1`" in str(caught.value)
    assert str(caught.value).endswith(OTHERWISE)
    assert "backend=threestudio" in OTHERWISE
    # Of a system that is not ours nothing more can be said.
    assert ("system.freq" in str(caught.value)) == ("data_type" in changes)


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("${add:2,3}", 5),
        ("${sub:2,3}", -1),
        ("${mul:2,3}", 6),
        ("${div:3,2}", 1.5),
        ("${idiv:7,2}", 3),
        ("${not:${gt0:${x}}}", False),
        ("${cmaxgt0:${s}}", True),
        ("${cmaxgt0:[0, 0.0, 0.0, 9]}", False),
        ("${cmaxgt0orcmaxgt0:0,${s}}", True),
        ("${tuple2:${x}}", [3.0, 3.0]),
        ("${basename:load/images/hamburger_rgba.png}", "hamburger_rgba.png"),
        ("${rmspace:a red mug,_}", "a_red_mug"),
        ("${calc_exp_lr_decay_rate:0.25,${sub:${x},1}}", 0.5),
    ],
)
def test_their_resolvers(expression: str, value: Any) -> None:
    s = [0, 0.0, 0.0, 9, 1.0, 10]  # rises after its second piece
    config = OmegaConf.create({"x": 3, "s": s, "y": expression})
    with resolvers():
        found: Any = OmegaConf.to_container(config, resolve=True)
    assert found["y"] == value


def test_their_own_resolvers_can_be_registered_afterwards() -> None:
    """As importing threestudio does, which refuses names that are taken."""
    register = getattr(OmegaConf, "register_resolver", OmegaConf.register_new_resolver)
    with resolvers():
        assert OmegaConf.has_resolver("sub")
    register("sub", lambda a, b: "theirs")
    try:
        config = OmegaConf.create({"y": "${sub:1,2}"})
        with resolvers():
            assert config.y == "theirs"
        assert OmegaConf.has_resolver("sub")
    finally:
        OmegaConf.clear_resolver("sub")


def test_no_setting_of_ours_is_taken_for_theirs() -> None:
    """Who teaches the workspace one of their settings takes it out of the table."""
    plain = OmegaConf.create(theirs("sd"))
    plain.tag = plain.system.renderer = ""
    plain.system.prompt_processor.prompt = "a"
    found = translate(OmegaConf.to_container(plain, resolve=True)).settings  # pyright: ignore[reportArgumentType]
    found["system"]["renderer"] = {}
    for section, table in SETTINGS.items():
        if section.endswith("mlp_network_config"):
            continue  # what remains of the section is ours, or moves up
        for key in table:
            name = f"{section}.{key}" if section else key
            assert name not in VALUES
            copy = deepcopy(found)
            node = copy
            for part in section.split(".") if section else []:
                node = node.setdefault(part, {})
            node[key] = 1
            # This system lacks a whole section of others.
            lacking = f"There is no setting `({section}|{name})`"
            with pytest.raises(ConfigError, match=lacking):
                _read_all(copy)


def test_what_is_refused_as_theirs_cannot_be_done_here() -> None:
    """Values that the workspace learns leave the table."""
    samples = {
        "system.geometry.normal_type": "pred",
    }
    assert set(samples) == set(VALUES)
    plain = OmegaConf.create(theirs("sd"))
    plain.tag = plain.system.renderer = ""
    plain.system.prompt_processor.prompt = "a"
    resolved: Any = OmegaConf.to_container(plain, resolve=True)
    found = translate(resolved).settings
    found["system"]["renderer"] = {}
    _read_all(found)
    for name, value in samples.items():
        assert VALUES[name](value)
        *sections, key = name.split(".")
        copy = deepcopy(found)
        node = copy
        for part in sections:
            node = node[part]
        node[key] = value
        with pytest.raises(ConfigError, match=f"{key}` is"):
            _read_all(copy)


def _read_all(settings: dict[str, Any]) -> None:
    config = read(Config, settings, "")
    for section, kind in DreamFusion.section_types.items():
        read(kind, getattr(config, section), section)


@pytest.mark.skipif(CHECKOUT is None, reason="THREESTUDIO_ROOT names no checkout")
def test_every_file_of_a_checkout_runs_or_says_all_that_is_in_the_way(
    tmp_path: Path,
) -> None:
    """What is listed is all: without it, a file of a system of ours can be built."""
    prompt = ["system.prompt_processor.prompt=a red mug", TINY[5]]
    picture = rendered(tmp_path / "mug.png")
    assert CHECKOUT is not None
    for path in sorted(Path(CHECKOUT, "configs").glob("*.yaml")):
        content: Any = OmegaConf.to_container(OmegaConf.load(path))
        own = prompt
        if content["data_type"] == "single-image-datamodule":
            own = [TINY[5], f"data.image_path={picture}"]
        try:
            build(load(path, own))
        except ConfigError as error:
            text, problems = str(error), error.problems
        else:
            continue
        if text.startswith("`system.geometry_convert_from` is missing"):
            continue  # a later stage, which only needs the stage before
        assert OTHERWISE in text, (path, text)
        if re.search(r"`system(\.\w+)?_type` is", text):
            continue  # of what is not ours nothing more can be said
        for line in problems:
            *sections, key = line.partition("`")[2].partition("`")[0].split(".")
            node = content
            for section in sections:
                node = node[section]
            node.pop(key, None)  # one may be missing and refused too
        build(load(written(content, tmp_path), own))
