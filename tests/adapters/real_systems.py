"""Every config of a threestudio checkout and of extensions, run on CPU in small.

    THREESTUDIO_ROOT=… python -m tests.adapters.real_systems zero123 fantasia3d

Prints a line of JSON per config: equal to its own Lightning run and to itself in
parallel, or refused and why, or not run and why. Run by threestudio's own Python; what
a machine without a GPU lacks is replaced by the stand-ins on the path, by the guidance
below (score distillation towards a blob), and by a rasteriser in torch.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import sys
import tempfile
import traceback
import types
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreampropeller.adapters.threestudio import GrowingHost, SystemHost
from dreampropeller.adapters.threestudio.growing import grows
from tests.adapters import real_threestudio as real
from tests.adapters.cpu_parts import place_on_cpu, rasterise_in_torch

NUM_STEPS = 6
MILESTONE = 3
_ENCODING = {
    "otype": "HashGrid",
    "n_levels": 4,
    "n_features_per_level": 2,
    "log2_hashmap_size": 10,
    "base_resolution": 8,
    "per_level_scale": 1.447269237440378,
}
_GROWTH = {
    "init_num_pts": 64,
    "densify_from_iter": 1,
    "densify_until_iter": 5,
    "densification_interval": 2,
    "prune_from_iter": 1,
    "prune_until_iter": 5,
    "prune_interval": 3,
    "densify_grad_threshold": 1e-4,
    "split_thresh": 0.05,
}
_WHY = {
    "Could not find|dataroot|No such file|Co3d": "needs a data set of the user's",
    "placeholder read_obj": "needs an older libigl",
    "xatlas": "needs xatlas",
    "default_elevation_deg|z_variance": "the config lacks a setting that is read",
    "unexpected keyword argument": "the config has a setting that nothing reads",
    "stable-nerf-volume-renderer": "needs a renderer of another extension",
    "mvdream-random": "needs threestudio-mvdream beside it",
    "xformers": "its guidance needs xformers, which needs a GPU",
}
"""Reasons why a config was not run, by a pattern of upstream's error."""
_MISSING = {
    "system.weights": None,
    "data.image_path": "./load/images/hamburger_rgba.png",
    "system.guide_shape": "load/shapes/teddy.obj",
    "system.geometry.shape_init": "mesh:load/shapes/teddy.obj",
    "system.guidance.geometry.shape_init": "mesh:load/shapes/teddy.obj",
}
"""Values that a config leaves to the user."""
_GUIDANCE, _PROMPTS = (
    rf"{name}(_\w+)?_type|{name}_type(_\w+)?"
    for name in ("guidance", "prompt_processor")
)
_VSD = {
    "stable-diffusion-vsd-guidance",
    "stable-diffusion-unified-guidance",
}
"""Guidances that train a LoRA: run on a tiny random Stable Diffusion.

All others need trained weights and have no state of their own: replaced by `Toy`.
"""


def register() -> None:
    """Register the toy guidance, and prompts that need no language model."""
    threestudio: Any = importlib.import_module("threestudio")
    base: Any = importlib.import_module("threestudio.utils.base")
    C: Any = importlib.import_module("threestudio.utils.misc").C

    class Toy(base.BaseObject):
        """Score distillation towards a blob that depends on the view."""

        @dataclass
        class Config(base.BaseObject.Config):
            min_step_percent: Any = 0.02
            max_step_percent: Any = 0.98
            loss: str = "loss_sds"

        def configure(self) -> None:
            self.low, self.high = 20, 980

        def __call__(
            self, image: Tensor, *prompts: Any, azimuth: Tensor, **_: Any
        ) -> dict[str, Tensor]:
            count, height, width, channels = image.shape
            y, x = torch.meshgrid(
                torch.linspace(-1, 1, height), torch.linspace(-1, 1, width)
            )
            blob = torch.exp(-4 * (x**2 + y**2))[None, ..., None]
            view = torch.deg2rad(azimuth)[:, None, None, None]
            mode = 0.5 + 0.4 * blob * torch.cos(view + torch.arange(channels))
            t = torch.randint(self.low, self.high + 1, [count]) / 1000
            noise = torch.randn_like(image)
            gradient = (image - mode + 0.1 * noise).detach() * t[:, None, None, None]
            loss = (gradient * image).sum() / count
            return {self.cfg.loss: loss, "grad_norm": gradient.norm()}

        def set_min_max_steps(self, low: float, high: float) -> None:
            self.low, self.high = int(1000 * low), int(1000 * high)

        def update_step(self, epoch: int, step: int, **_: Any) -> None:
            self.low = int(1000 * C(self.cfg.min_step_percent, epoch, step))
            self.high = int(1000 * C(self.cfg.max_step_percent, epoch, step))

    threestudio.register("toy-guidance")(Toy)
    real.prompts()


def shrink(read: Any, model: str) -> None:
    """Make a config small, in place; its structure and options stay."""
    from omegaconf import OmegaConf

    OmegaConf.set_struct(read, False)
    convert = "system.geometry_convert_from"
    missing = OmegaConf.missing_keys(read)
    for key in missing - {convert}:
        OmegaConf.update(read, key, _MISSING.get(key, "missing"))
    system, data = read.system, read.data
    for section in (data, data.get("random_camera")):
        if section is None:
            continue
        if read.data_type in ("multiview-camera-datamodule", "co3d-datamodule"):
            continue  # these need a data set, and have one resolution
        # This one hands a single resolution on as it stands in the config.
        fixed = "dreamcraft3d" in read.data_type and "image_path" in section
        fixed = fixed and isinstance(section.height, int)
        section.height = section.width = 12 if fixed else [12, 16]
        for name in {"sample_height", "sample_width"} & set(section):
            section[name] = [6, 8]
        section.resolution_milestones = [] if fixed else [MILESTONE]
        if "image_path" not in section:
            section.batch_size = [section.get("n_view", 1)] * 2
            section.n_val_views, section.n_test_views = 1, 2
            section.eval_height = section.eval_width = 12
    for part in (system.get("geometry"), system.get("background")):
        part = part or {}
        for name, value in part.items():
            if name.endswith("encoding_config") and "Grid" in str(value.get("otype")):
                value.update(n_levels=4, log2_hashmap_size=10, base_resolution=8)
    geometry = system.geometry
    if system.geometry_type in ("implicit-sdf", "tetrahedra-sdf-grid"):
        geometry.setdefault("pos_encoding_config", dict(_ENCODING))
    if geometry.get("shape_init") and system.geometry_type == "implicit-sdf":
        # The same start without a thousand optimizer steps.
        geometry.update(shape_init=None, sdf_bias="sphere", sdf_bias_params=0.5)
    if "densify_from_iter" in geometry:
        geometry.update(_GROWTH)
        system.loss.update(lambda_tv_loss=0.0, lambda_depth_tv_loss=0.0)
    if "isosurface_resolution" in geometry:
        geometry.isosurface_resolution = 32
    if system.geometry_type == "volume-grid":
        geometry.grid_size = [8, 8, 8]
    grid = system.geometry_type == "tetrahedra-sdf-grid"
    if convert in missing or (grid and not geometry.get("shape_init")):
        # The result of another config, also where it is not named.
        system.geometry_convert_from = None
        geometry.update(shape_init="sphere", shape_init_params=0.5)
    renderer: Any = system.get("renderer") or {}
    for name in ("num_samples_per_ray", "num_samples_per_ray_importance"):
        if name in renderer:
            renderer[name] = 16
    if system.get("renderer_type") == "patch-renderer":
        renderer.patch_size = 8
    if "base_renderer" in renderer and "num_samples_per_ray" in renderer.base_renderer:
        renderer.base_renderer.num_samples_per_ray = 16
    trained = False
    for name in [name for name in system if re.fullmatch(_GUIDANCE, name)]:
        section = name.replace("_type", "", 1)
        if system[name] == "mesh-fitting-guidance":
            continue
        if "-bsd-" in system[name]:  # calls it without asking whether it is there
            raise ModuleNotFoundError("xformers")
        if system[name] in _VSD:
            trained = True
            guidance = system[section]
            guidance.pretrained_model_name_or_path = model
            for key in ("lora", "phi"):
                for one in [one for one in guidance if one.endswith(f"path_{key}")]:
                    guidance[one] = model
            if "vsd_phi_model_name_or_path" in guidance:
                guidance.vsd_phi_model_name_or_path = model
            if system[name] == "stable-diffusion-vsd-guidance":
                guidance.pretrained_model_name_or_path_lora = model
            guidance.half_precision_weights = False
            continue
        percents = ("min_step_percent", "max_step_percent")
        old = system.get(section) or {}
        kept = {key: old[key] for key in percents if key in old}
        named = [one for one in ("sds", "sdi", "sd") if f"lambda_{one}" in system.loss]
        kept["loss"] = f"loss_{(named or ['sds'])[0]}"
        system[name], system[section] = "toy-guidance", kept
    for name in [name for name in system if re.fullmatch(_PROMPTS, name)]:
        section = name.replace("_type", "", 1)
        if trained and name == "prompt_processor_type":
            system[section].update(pretrained_model_name_or_path=model, spawn=False)
        else:
            system[name], system[section] = "no-prompts", {}
        system[section].prompt = "a pineapple"
    if "latent_steps" in system:
        system.latent_steps = 3
    read.trainer.update(max_steps=NUM_STEPS, precision="32")


def build(path: str, scratch: str) -> tuple[Any, Any, Any]:
    """System, data module and config, as threestudio's `launch.py` makes them."""
    from omegaconf import OmegaConf

    pl: Any = importlib.import_module("pytorch_lightning")
    threestudio: Any = importlib.import_module("threestudio")
    load_config = importlib.import_module("threestudio.utils.config").load_config
    read = OmegaConf.load(path)
    # HiFA compares decoded images, so its latents need the true scale.
    model = "tiny-sd-8" if "hifa" in path else "tiny-sd-32"
    shrink(read, str(Path(scratch) / model))
    read.exp_root_dir = scratch
    cfg = load_config(OmegaConf.to_yaml(read), from_string=True, n_gpus=1)
    pl.seed_everything(cfg.seed)
    datamodule = threestudio.find(cfg.data_type)(cfg.data)
    system = threestudio.find(cfg.system_type)(cfg.system)
    system.set_save_dir(os.path.join(scratch, "save"))
    if cfg.system.geometry_type == "tetrahedra-sdf-grid":
        system.geometry.initialize_shape()  # instead of an earlier stage's result
    return system, datamodule, cfg


def examine(path: str, scratch: str) -> dict[str, Any]:
    """Compare a config with itself.

    Returns:
        `outcome` is "equal", "different", "refused" or "not run"; `why` says it in the
        words of the error.
    """
    from omegaconf import OmegaConf

    system = {"system": OmegaConf.load(path).system_type}
    try:
        parts = build(path, scratch)
    except Exception as error:
        return {**system, "outcome": "not run", "why": _reason(error)}
    host = GrowingHost() if grows(parts[0]) else SystemHost()
    try:
        host.refuse(parts[0])  # which needs no run
    except (ValueError, TypeError) as error:
        return {**system, "outcome": "refused", "why": str(error)}
    try:
        recording = real.own_run(*parts)
    except Exception as error:
        return {**system, "outcome": "not run", "why": _reason(error)}
    try:
        found = real.compare(lambda: build(path, scratch), recording, loose=False)
    except ValueError as error:
        if not _is_ours(error):
            raise
        return {**system, "outcome": "refused", "why": str(error)}
    equal = found["steps_equal"] == found["steps_compared"] > 0
    equal = equal and found["threshold_zero_equal"] and found["moved"]
    return {**system, "outcome": "equal" if equal else "different", **found}


def table(found: Sequence[dict[str, Any]]) -> str:
    """The examined configs as a table in Markdown."""
    lines = ["| config | system | result |", "|---|---|---|"]
    for one in found:
        result = one["outcome"]
        if result in ("refused", "not run", "failed"):
            result += f": {_shortly(one['why'])}"
        lines.append(f"| {one['config']} | {one['system']} | {result} |")
    return "\n".join(lines) + "\n"


def _shortly(why: str) -> str:
    for pattern, reason in _WHY.items():
        if re.search(pattern, why):
            return reason
    return why.split(". ")[0].rstrip(".").replace("|", "/")


def _reason(error: BaseException) -> str:
    lines = str(error).strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[0][:160]}"


def _is_ours(error: BaseException) -> bool:
    """Whether the adapter raised an error."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    module = "" if trace is None else trace.tb_frame.f_globals.get("__name__", "")
    return module.startswith("dreampropeller.")


class _Absent(types.ModuleType):
    """A package that an extension imports and that the examined parts do not use."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return type(name, (), {})


def load_extension(folder: Path) -> None:
    """Import an extension; packages of its trained models may be absent."""
    try:
        real.load_extension(folder)
    except ModuleNotFoundError as error:
        package = error.name or ""
        if not package or package.startswith(("threestudio", "dreampropeller")):
            raise
        sys.modules[package] = _Absent(package)
        vars(sys.modules[package])["__path__"] = []
        load_extension(folder)


def configs(root: Path, extensions: Sequence[Path]) -> dict[str, Path]:
    """Every config by name, such as `zero123` or `threestudio-3dgs/shading`."""
    found: dict[str, Path] = {}
    for folder, prefix in ((root, ""), *((one, f"{one.name}/") for one in extensions)):
        for path in sorted((folder / "configs").rglob("*.yaml")):
            inner = path.relative_to(folder / "configs").with_suffix("")
            if inner.parts[0] not in ("debugging", "gradio"):
                found[prefix + inner.as_posix()] = path
    return found


def main(names: list[str]) -> None:
    root = Path(os.environ["THREESTUDIO_ROOT"])
    given = os.environ.get("THREESTUDIO_EXTENSIONS", "").split(os.pathsep)
    extensions = [Path(one) for one in given if one]
    os.chdir(root)
    sys.path.insert(0, str(root))
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    importlib.import_module("threestudio")
    register()
    rasterise_in_torch()
    known = configs(root, extensions)
    for extension in extensions:
        if any(name.startswith(f"{extension.name}/") for name in names):
            load_extension(extension)
    place_on_cpu()
    with tempfile.TemporaryDirectory() as scratch:
        from tests.adapters.tiny_sd import write

        write(Path(scratch) / "tiny-sd-32")
        write(Path(scratch) / "tiny-sd-8", blocks=4)
        for name in names:
            os.chdir(root)
            try:
                found = examine(str(known[name]), scratch)
            except Exception as error:
                traceback.print_exc()
                found = {"outcome": "failed", "why": _reason(error)}
            print(json.dumps({"config": name, **found}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
